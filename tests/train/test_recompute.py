"""Activations that are made again in the backward pass: the same bits, and exactly the memory that the rule says."""

import gc

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nativerank.accounting.flops import recomputed_flops
from nativerank.data.loader import document_positions
from nativerank.evaluate.loss import token_losses
from nativerank.layers.shared import join_products
from nativerank.methods import factorize
from nativerank.models import make_hf_config, materialize, read_hf_config, skeleton
from nativerank.train.recompute import recompute_blocks

TOKENS = (2, 24)
RANK = 6
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
}
WIDE = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}


@pytest.fixture
def make(tiny_config):
    """make(method, architecture): a factorized model in training mode; always the same one."""

    def build(method="spectron", architecture=None):
        config = make_hf_config(dict(architecture), "test") if architecture else read_hf_config(tiny_config)
        model = skeleton(config)
        if method != "dense-adamw":
            factorize(model, method, rank=RANK)
        return materialize(model, seed=0, init_scale=1.0).train()

    return build


def batch(masked=False):
    ids = torch.randint(1, 300, (TOKENS[0], TOKENS[1] + 1), generator=torch.Generator().manual_seed(0))
    ids[0, 7] = ids[1, 3] = 0  # ends of texts
    positions = torch.from_numpy(document_positions(ids[:, :-1].numpy(), 0)) if masked else None
    return ids[:, :-1], ids[:, 1:], positions


def loss_and_gradients(model, given):
    torch.manual_seed(0)
    loss = token_losses(model, *given).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


CASES = {
    "lowrank": ("spectron", None, False),
    "spectral": ("sct", None, False),
    "guided": ("self-guided", None, False),
    "documents": ("spectron", None, True),
    "experts": ("spectron", MIXTRAL, False),
    "dropout, fused projections": ("spectron", GPT2 | {"resid_pdrop": 0.2, "attn_pdrop": 0.2}, False),
}


@pytest.mark.parametrize("keep", ["up", "blocks"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_have_the_same_bits(make, case, keep):
    method, architecture, masked = CASES[case]
    plain, again = make(method, architecture), make(method, architecture)
    recompute_blocks(again, keep)
    loss, expected = loss_and_gradients(plain, batch(masked))
    same, found = loss_and_gradients(again, batch(masked))
    assert torch.equal(loss, same)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def memory(model, ids):
    """(bytes that wait at the end of the forward pass, the most that was held), beyond what was there before."""
    gc.collect()  # what earlier models left must not be freed meanwhile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        with torch.profiler.record_function("end of the forward pass"):
            pass
        hidden.sum().backward()
    held = peak = waiting = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        elif event.name() == "end of the forward pass":
            waiting = held
    return waiting, peak


def test_up_keeps_what_narrows_and_attention(make):
    """Beyond the inputs of the blocks: r numbers per factor pair, attention's output and its logsumexp per head."""
    ids, waiting = batch()[0], {}
    for keep in ("up", "blocks"):
        model = make()
        recompute_blocks(model, keep)
        memory(model, ids)  # which also makes the gradients
        waiting[keep], _ = memory(model, ids)
    per_token = 7 * RANK + model.config.hidden_size + model.config.num_attention_heads
    assert waiting["up"] - waiting["blocks"] == model.config.num_hidden_layers * ids.numel() * per_token * 4


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.6])
def test_up_makes_again_what_is_declared_at_every_rank(ratio, joined):
    """Joint matrices may be wider than their input; each of their products narrows all the same."""
    flops, ids = {}, batch()[0]
    for keep in ("none", "up"):
        model = skeleton(make_hf_config(WIDE, "test"))
        factorize(model, "spectron", rank_ratio=ratio)
        declared = recomputed_flops(model, TOKENS[1], keep)
        materialize(model, seed=0, init_scale=1.0).train()
        if joined:
            assert len(join_products(model)) == 2 * model.config.num_hidden_layers
        if keep == "up":
            recompute_blocks(model, keep)
        # Attention is no product for this counter on a CPU, neither at first nor again.
        with FlopCounterMode(display=False) as counter:
            model.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
        flops[keep] = counter.get_total_flops()
    assert flops["up"] - flops["none"] == declared * ids.numel() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, which its compiler raises and hides
@pytest.mark.parametrize("autocast", [False, True])
def test_wide_joint_products_stay_when_compiled(autocast):
    """In the compiler's partition nothing but them waits that waits not for separate products, casts included."""
    waiting, found = {}, {}
    for joined in (False, True):
        model = skeleton(make_hf_config(WIDE, "test"))
        factorize(model, "spectron", rank_ratio=0.6)
        materialize(model, seed=0, init_scale=1.0).train()
        if joined:
            join_products(model)
        recompute_blocks(model, "up")
        for block in model.model.layers:
            block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            memory(model, batch()[0])
            waiting[joined], _ = memory(model, batch()[0])
        found[joined] = {name: p.grad for name, p in model.model.named_parameters()}
    assert waiting[True] == waiting[False] > 0
    for name, gradient in found[False].items():
        assert (found[True][name] - gradient).norm() < (0.05 if autocast else 1e-5) * gradient.norm()


def test_each_choice_holds_less_than_the_one_before(write_hf_config):
    """Of eight blocks' activations seven become an input each, or little more: the peak falls below half."""
    config, ids, found = read_hf_config(write_hf_config(num_hidden_layers=8)), torch.ones(2, 64, dtype=torch.long), []
    for keep in ("none", "up", "blocks"):
        model = skeleton(config)
        factorize(model, "spectron", rank=4)
        materialize(model, seed=0, init_scale=1.0).train()
        if keep != "none":
            recompute_blocks(model, keep)
        memory(model, ids)
        found.append(memory(model, ids))
    (all_waits, all_peak), (up_waits, up_peak), (blocks_wait, blocks_peak) = found
    assert blocks_wait < up_waits < 0.3 * all_waits
    assert blocks_peak < up_peak < 0.5 * all_peak


@pytest.mark.filterwarnings("ignore")  # torch's own, which its compiler raises and hides
@pytest.mark.parametrize("method", ["spectron", "sct"])
def test_compiled_blocks_keep_the_same(make, method):
    """The compiler's partition of a block obeys the rule; its operators run one by one here, without kernels."""
    torch.compiler.reset()  # PyTorch counts what other tests of this process compiled
    plain, again = make(method), make(method)
    recompute_blocks(again, "up")
    waiting = {}
    for name, model in (("plain", plain), ("again", again)):
        for block in model.model.layers:
            block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
        loss_and_gradients(model, batch())
        waiting[name], _ = memory(model, batch()[0])
        model.zero_grad()
    _, expected = loss_and_gradients(make(method), batch())
    _, found = loss_and_gradients(again, batch())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert waiting["again"] < 0.6 * waiting["plain"]


def test_an_architecture_that_cannot_recompute_says_so(make):
    model = make("dense-adamw")
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match=r"train\.recompute: llama models cannot"):
        recompute_blocks(model)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--method", "dense-adamw", "--train.recompute", "up"], "dense-adamw has no factors; take --train.recompute"),
        (["--train.recompute", "true"], "train.recompute must be one of none, up, blocks, got true"),
    ],
)
def test_a_choice_that_is_none_gets_one_line(tmp_path, cli, flags, words, named):
    result = cli("train", *flags(out=tmp_path / "run"), *words)
    assert result.code == 2 and result.err.count("\n") == 1
    assert named in result.err


def test_a_run_folder_from_before_gets_one_line(tmp_path, cli):
    (tmp_path / "config.yaml").write_text("train:\n  recompute: false\n")
    result = cli("train", "--config", tmp_path / "config.yaml", "--out", tmp_path / "run")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "train.recompute must be one of none, up, blocks, got" in result.err

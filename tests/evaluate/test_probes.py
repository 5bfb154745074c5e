"""Probes of real steps against float64 matrices and outputs that are formed before and after."""

import math

import pytest
import torch
from torch.testing import assert_close

from nativerank.evaluate.probes import Probe, fixed_batch, probeable, probed_names
from nativerank.layers import linear_modules
from nativerank.methods import build_optimizer, factorize, find_method
from nativerank.models import make_hf_config, materialize, skeleton
from nativerank.train.step import train_step

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=32)
FAMILIES = {
    "llama": SIZES,
    "mixtral": SIZES | dict(num_local_experts=4, num_experts_per_tok=2),
    "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    | dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),  # Conv1D weights, and dropout
}
IDS = torch.randint(64, (1, 24), generator=torch.Generator().manual_seed(0))


def make(family="llama", method="spectron"):
    model = skeleton(make_hf_config({"model_type": family, **FAMILIES[family]}, "test"))
    if find_method(method).layer:
        factorize(model, method, rank_ratio=0.25)
    return materialize(model, 0, 1.0).train()


def batch(seed):
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:], None


def dense_weights(model, names):
    """W (..., d_out, d_in) in float64, formed."""
    found = {}
    for name in names:
        weights = [w.detach().double() for w in probeable(model)[name]()]
        found[name] = weights[0] @ weights[1].mT if len(weights) == 2 else weights[0].clone()
    return found


def inputs_of(model, names):
    """What linear layers read on the fixed batch in eval mode, recorded here."""
    found, handles = {}, []
    for name in names:
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_hook(lambda m, args, out, name=name: found.update({name: args[0].double()}))
        )
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    model.train()
    for handle in handles:
        handle.remove()
    return found


def probed_steps(model, method, names, steps=3, lr=0.05, **options):
    """Yields (figures, W before, W after, inputs, lr) of a few training steps."""
    optimizer = build_optimizer(model, method, lr=lr, **options)
    probe = Probe(model, names, IDS)
    linears = [name for name in names if "experts" not in name]
    for step in range(steps):
        optimizer.set_rate(1 - step / 10)
        before, W, x = probe.before(), dense_weights(model, names), inputs_of(model, linears)
        train_step(model, optimizer, [batch(step)], 1, clip=1.0)
        rate = optimizer.param_groups[0]["lr"]
        yield probe.after(before, rate, optimizer.records()), W, dense_weights(model, names), x, rate


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "spectron"),
        ("llama", "lowrank-adamw"),
        ("llama", "dense-adamw"),
        ("mixtral", "spectron"),
        ("mixtral", "dense-muon"),
        ("gpt2", "lowrank-muon"),
        ("gpt2", "dense-muon"),
    ],
)
def test_figures_are_those_of_matrices_formed_before_and_after(family, method):
    model = make(family, method)
    names = list(probeable(model))
    for figures, W, W_new, x, lr in probed_steps(model, method, names, weight_decay=0.1):
        assert list(figures) == names
        for name, values in figures.items():
            S = torch.linalg.svdvals(W_new[name])
            dW = W_new[name] - W[name]
            wanted = {
                "update_norm": torch.linalg.matrix_norm(dW, 2).max(),
                "sigma_W": S[..., 0].max(),
                "stable_rank": (S.square().sum(-1) / S[..., 0].square()).max(),
            }
            if find_method(method).layer:
                A, B = (w.detach().double() for w in probeable(model)[name]())
                a, b = torch.linalg.matrix_norm(A, 2), torch.linalg.matrix_norm(B, 2)
                wanted |= {"sigma_A": a.max(), "sigma_B": b.max(), "gauge": (a / b).max()}
            if name in x:
                wanted["output_change"] = (x[name] @ dW.mT).square().mean().sqrt()
            if method == "spectron":
                wanted["update_ratio"] = wanted["update_norm"] / lr
            extra = {"rho"} if method == "spectron" else set()
            if "experts" in name and method == "spectron":
                extra.add("output_change")
            assert set(values) == set(wanted) | extra, name
            for key, value in wanted.items():
                # Norms of the factors are taken in float32.
                assert values[key] == pytest.approx(value.item(), rel=1e-4 if key[:5] in ("sigma", "gauge") else 1e-8)
            assert values["update_norm"] > 0


def test_the_output_change_of_experts_is_that_of_their_tokens():
    """Against the layer itself, called before and after the step in float64 with what it was called with."""
    model = make("mixtral")
    name = next(n for n in probeable(model) if n.endswith("experts.down_proj"))
    probe, optimizer = Probe(model, [name], IDS), build_optimizer(model, "spectron", lr=0.05)
    before = probe.before()
    ((x, offsets),) = before.inputs[name]
    assert len(x) == 2 * IDS.numel() == offsets[-1]

    def output():
        layer = model.get_submodule(name)
        bounds = [0, *offsets.tolist()]
        parts = zip(bounds, bounds[1:], layer.to_dense().detach().double(), strict=False)
        return torch.cat([x[i:j].double() @ W.mT for i, j, W in parts])

    old = output()
    train_step(model, optimizer, [batch(0)], 1, clip=1.0)
    figures = probe.after(before, 0.05, optimizer.records())[name]
    assert figures["output_change"] == pytest.approx((output() - old).square().mean().sqrt().item(), rel=1e-4)


def test_a_step_that_was_refused_changed_nothing():
    model = make()
    probe, optimizer = Probe(model, probed_names(model), IDS), build_optimizer(model, "spectron")
    train_step(model, optimizer, [batch(0)], 1, clip=1.0)  # so that there are records
    before = probe.before()
    result = train_step(model, optimizer, [batch(1)], 1, clip=1.0, accept=lambda loss, norm: False)
    assert not result.updated
    for values in probe.after(before, 0.07, {}).values():
        assert values["update_norm"] == values["output_change"] == 0
        assert "rho" not in values and "update_ratio" not in values


@pytest.mark.parametrize("method", ["spectron", "dense-adamw"])
def test_weights_that_are_not_finite_are_reported_and_raise_nothing(method):
    model = make(method=method)
    names = probed_names(model)
    probe = Probe(model, names, IDS)
    before = probe.before()
    with torch.no_grad():
        for p in model.get_submodule(names[1]).parameters():
            p.view(-1)[3] = torch.inf
    figures = probe.after(before, 0.1, {})
    broken = figures.pop(names[1])
    assert math.isnan(broken["update_norm"]) and not any(map(math.isfinite, broken.values()))
    assert all(math.isfinite(value) for values in figures.values() for value in values.values())


@pytest.mark.parametrize("method", ["spectron", "dense-adamw"])
def test_first_middle_and_last_are_probed(method):
    names = probed_names(make(method=method))
    assert [n.split(".")[2] for n in names] == ["0", "1", "2"]
    assert probed_names(torch.nn.Linear(3, 3)) == []


def test_patterns_choose_and_one_that_matches_nothing_is_an_error():
    model = make()
    assert len(probed_names(model, ["q_proj", "layers.0.*"])) == 2 + 7
    assert set(probed_names(model, "*")) == set(probeable(model))
    with pytest.raises(ValueError, match=r"train.probe pattern 'q_project' matches none of the 21 weights"):
        probed_names(model, ["k_proj", "q_project"])


def test_dense_matrices_left_in_a_factorized_model_can_be_named():
    model = skeleton(make_hf_config({"model_type": "llama", **SIZES}, "test"))
    factorize(model, "spectron", rank_ratio=0.25, exclude=["k_proj"])
    assert len(linear_modules(model)) == 3
    names = probed_names(materialize(model, 0, 1.0), ["k_proj"])
    assert [n.split(".")[-1] for n in names] == ["k_proj"] * 3
    assert all("k_proj" not in n for n in probed_names(model))


def test_looking_leaves_no_trace():
    """Random state, mode, weights, gradients and hooks are as before, with dropout in the model."""
    model = make("gpt2")
    names = probed_names(model)
    train_step(model, build_optimizer(model), [batch(0)], 1, clip=1.0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    random, probe = torch.get_rng_state(), Probe(model, names, IDS)
    first, second = probe.before(), probe.before()
    probe.after(first, 0.1, {})
    assert torch.equal(random, torch.get_rng_state())
    assert model.training and all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert_close([p.grad for p in model.parameters()], grads, rtol=0, atol=0)
    for name in names:
        assert_close(first.inputs[name], second.inputs[name], rtol=0, atol=0)


def test_the_fixed_batch_is_the_beginning_of_the_split():
    class Split:
        tokens = 200

        def read(self, start, count):
            return torch.arange(start, start + count).numpy()

    assert_close(fixed_batch(Split(), 256), torch.arange(128)[None])
    assert fixed_batch(Split(), 16).shape == (1, 16)
    Split.tokens = 5
    assert fixed_batch(Split(), 16).shape == (1, 5)


@pytest.mark.filterwarnings("ignore")  # torch's own, which its compiler raises and hides
def test_compiled_blocks_are_seen_and_stay_compiled():
    """Inputs are recorded although the blocks are compiled, and the code compiled before serves the steps after."""
    from torch._dynamo.utils import counters

    plain, compiled = make(), make()
    torch._dynamo.reset()
    for block in compiled.model.layers:
        block.compile(backend="eager")  # what sees hooks is dynamo, under every backend
    names = probed_names(plain)
    seen = []
    for model in (plain, compiled):
        optimizer, probe = build_optimizer(model), Probe(model, names, IDS)
        for step in range(3):
            before = probe.before()
            train_step(model, optimizer, [batch(step)], 1, clip=1.0)
            figures = probe.after(before, 0.07, optimizer.records())
            if step == 0:
                after_first = counters["stats"]["unique_graphs"]
        seen.append(figures)
    assert counters["stats"]["unique_graphs"] == after_first > 0
    for name in names:
        assert seen[1][name] == pytest.approx(seen[0][name], rel=1e-3)

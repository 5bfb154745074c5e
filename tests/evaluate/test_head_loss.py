"""The chunked loss is the whole one, in value and gradients, for every architecture that returns what its head made."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nativerank.accounting.trace import trace_step
from nativerank.data.loader import document_positions
from nativerank.data.shards import Dataset
from nativerank.evaluate import head_loss
from nativerank.evaluate.head_loss import add_product, chunk_tokens, takes_chunks
from nativerank.evaluate.loss import (
    check_loss,
    mean_loss,
    next_token_logits,
    token_losses,
    token_losses_of,
    validation_loss,
)
from nativerank.methods import factorize
from nativerank.models import make_hf_config, materialize, skeleton
from nativerank.train.compiled import compile_blocks
from nativerank.train.recompute import recompute_blocks

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
PHI = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
FAMILIES = {
    "llama": SIZES,
    "llama, tied": SIZES | dict(tie_word_embeddings=True),
    "qwen2": SIZES,
    "mixtral": SIZES | dict(num_local_experts=4, num_experts_per_tok=2),
    "gpt2": dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0),
    "phi": PHI,  # its head has a bias
}
CHANGE_LOGITS = {
    "gemma2": SIZES | dict(head_dim=16),
    "cohere": SIZES | dict(logit_scale=0.5),
    "granite": SIZES | dict(logits_scaling=8.0),
}


def make(family="llama"):
    kind = family.split(",")[0]
    model = skeleton(make_hf_config({"model_type": kind, **(FAMILIES | CHANGE_LOGITS)[family]}, "test"))
    factorize(model, "spectron", rank_ratio=0.5)
    model = materialize(model, 0, 2.0).train()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias.data, generator=torch.Generator().manual_seed(3))
    return model


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(1, 300, (2, 15), generator=torch.Generator().manual_seed(0))
    ids[0, 6] = ids[1, 3] = 0
    positions = torch.from_numpy(document_positions(ids[:, :-1].numpy(), 0))
    return ids[:, :-1], ids[:, 1:], positions


@pytest.fixture
def chunks_of(monkeypatch):
    return lambda tokens: monkeypatch.setitem(head_loss.CHUNK_TOKENS, "cpu", tokens)


def loss_and_gradients(model, batch, chunked):
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    loss = mean_loss(model, *batch, chunked=chunked)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(found[1], expected[1], **tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_whole_logits(family, masked, batch, chunks_of):
    model, batch = make(family).double(), batch if masked else (*batch[:2], None)
    assert takes_chunks(model)
    expected = loss_and_gradients(model, batch, chunked=False)
    assert expected[1].keys() == {name for name, _ in model.named_parameters()}
    for tokens in (1, 5, 27, 28, 256):
        chunks_of(tokens)
        same(loss_and_gradients(model, batch, chunked=True), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_to_its_rounding(family, batch, chunks_of):
    model = make(family)
    chunks_of(9)
    expected = loss_and_gradients(model, batch, chunked=False)
    same(loss_and_gradients(model, batch, chunked=True), expected, rtol=1e-4, atol=1e-6)


def test_logits_far_apart_overflow_nowhere(batch, chunks_of):
    model = make().double()
    model.get_output_embeddings().weight.data.mul_(1e4)
    chunks_of(9)
    expected = loss_and_gradients(model, batch, chunked=False)
    assert expected[0] > 1e3
    same(loss_and_gradients(model, batch, chunked=True), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", CHANGE_LOGITS)
def test_who_changes_logits_is_found_out_and_takes_them_whole(family, batch):
    model = make(family).eval()
    assert not takes_chunks(model)
    same(loss_and_gradients(model, batch, True), loss_and_gradients(model, batch, False), rtol=0, atol=0)
    with torch.no_grad():
        expected = token_losses_of(next_token_logits(model, *batch[::2]), batch[1])
        assert torch.equal(token_losses(model, *batch), expected)
    check_loss(model, "auto")
    with pytest.raises(ValueError, match=rf"train\.loss chunked: {family} models change"):
        check_loss(model, "chunked")


def test_a_scale_of_one_loses_nothing_but_the_chunks(batch):
    """What is asked is whether the model returns the very tensor, not whether numbers agree by chance."""
    model = make("granite")
    model.logits_scaling = 1.0
    assert not takes_chunks(model)


@pytest.mark.parametrize("which", ["hook", "pre-hook", "backward hook", "backward pre-hook", "forward", "class"])
def test_a_head_that_others_have_a_hand_in_is_left_alone(which, batch):
    model = make()
    head = model.get_output_embeddings()
    if which == "hook":
        head.register_forward_hook(lambda module, given, made: 0.5 * made)
    elif which == "pre-hook":
        head.register_forward_pre_hook(lambda module, given: (0.5 * given[0],))
    elif which == "backward hook":
        head.register_full_backward_hook(lambda module, after, before: None)
    elif which == "backward pre-hook":
        head.register_full_backward_pre_hook(lambda module, before: (0.5 * before[0],))
    elif which == "forward":
        head.forward = lambda x: 0.5 * torch.nn.functional.linear(x, head.weight)
    else:
        head.__class__ = type("Other", (torch.nn.Linear,), {"forward": lambda self, x: 0.5 * x @ self.weight.mT})
    assert not takes_chunks(model)
    same(loss_and_gradients(model, batch, True), loss_and_gradients(model, batch, False), rtol=0, atol=0)


def test_asking_leaves_the_model_and_random_numbers_as_they_are():
    model, state = make("gpt2"), torch.get_rng_state()
    assert takes_chunks(model) and model.training and "forward" not in vars(model.get_output_embeddings())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_head_is_itself_again_after_an_error(batch):
    model = make()
    with pytest.raises(IndexError):
        mean_loss(model, batch[0] + 300, batch[1])
    assert "forward" not in vars(model.get_output_embeddings())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


def test_all_logits_are_never_held(chunks_of, prepared):
    model, ids = make(), torch.randint(0, 300, (2, 41), generator=torch.Generator().manual_seed(0))
    batch, all_logits = (ids[:, :-1], ids[:, 1:], None), 2 * 40 * 300
    chunks_of(7)
    takes_chunks(model)
    with Largest() as whole:
        loss_and_gradients(model, batch, chunked=False)
    with Largest() as chunked:
        loss_and_gradients(model, batch, chunked=True)
    with Largest() as validating:
        validation_loss(model, Dataset.open(prepared).split("val"), 40, 2, max_tokens=160)
    assert whole.numbers == all_logits
    assert chunked.numbers == validating.numbers == max(p.numel() for p in model.parameters()) < all_logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_each_token_where_nothing_is_differentiated(family, batch, chunks_of):
    model = make(family).double().eval()
    with torch.no_grad():
        expected = token_losses_of(next_token_logits(model, *batch[::2]), batch[1])
        for tokens in (1, 5, 256):
            chunks_of(tokens)
            found = token_losses(model, *batch)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert mean_loss(model, *batch).item() == pytest.approx(expected.mean().item(), rel=1e-12)
    with_gradients = token_losses(model, *batch)
    assert with_gradients.requires_grad and torch.equal(with_gradients, expected)


@pytest.mark.parametrize("frozen", ["all but the head", "the head", "everything but the bias"])
def test_only_what_trains_gets_a_gradient(frozen, batch):
    model = make("phi").double()
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    bias = model.get_output_embeddings().bias
    for p in model.parameters():
        trains = {"all but the head": id(p) in head, "the head": id(p) not in head}.get(frozen, p is bias)
        p.requires_grad_(trains)
    same(loss_and_gradients(model, batch, True), loss_and_gradients(model, batch, False), rtol=1e-9, atol=1e-12)


def test_the_upstream_factor_reaches_every_gradient_and_they_add_up(batch):
    model, found = make("llama, tied").double(), []
    for chunked in (False, True):
        model.zero_grad()
        for share in (0.25, 0.5):
            (mean_loss(model, *batch, chunked=chunked) * share).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_it_is_differentiated_once(batch):
    loss = mean_loss(make(), *batch)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="differentiated once"):
        loss.backward()


def test_the_gradient_of_the_head_is_there_for_hooks_within_the_backward_pass(batch):
    """As layer-wise updating takes it: used up at once, the others are not touched by it."""
    model = make().double()
    _, expected = loss_and_gradients(model, batch, chunked=False)
    weight, taken = model.get_output_embeddings().weight, []

    def take(p):
        taken.append(p.grad)
        p.grad = None
        p.data.zero_()

    weight.register_post_accumulate_grad_hook(take)
    _, found = loss_and_gradients(model, batch, chunked=True)
    torch.testing.assert_close(found | {"lm_head.weight": taken[0]}, expected, rtol=1e-9, atol=1e-12)


def test_under_autocast_products_are_rounded_and_softmax_and_sums_are_not(batch, chunks_of):
    """The gradient of a head whose chunks were added up in bfloat16 would be several times as far off."""
    model = make()
    chunks_of(1)
    exact = loss_and_gradients(make().double(), batch, chunked=False)
    errors = []
    for chunked in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = loss_and_gradients(model, batch, chunked)
        assert loss.dtype == torch.float32 and {g.dtype for g in gradients.values()} == {torch.float32}
        assert loss.item() == pytest.approx(exact[0].item(), rel=5e-3)
        found, wanted = gradients["lm_head.weight"].double(), exact[1]["lm_head.weight"]
        errors.append(((found - wanted).norm() / wanted.norm()).item())
    assert errors[1] < 1.2 * errors[0] < 0.05


@pytest.mark.filterwarnings("ignore")  # torch's own, which its compiler raises and hides
def test_the_question_costs_compiled_blocks_nothing(batch, monkeypatch):
    """Neither a compilation of its own nor sizes that are symbols from then on."""
    model, sizes, said = make(), [], []

    def backend(graph, inputs):
        sizes.append([size for x in inputs if isinstance(x, torch.Tensor) for size in x.shape])
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    compile_blocks(model, said.append)
    loss_and_gradients(model, batch, chunked=True)
    assert len(sizes) == 1 and not said
    assert all(type(size) is int for size in sizes[0])


@pytest.mark.parametrize("keep", ["up", "blocks"])
def test_the_question_may_come_in_the_middle_of_a_step_under_autocast(keep, batch):
    """Which keeps casts of weights: a pass that found some would not be the one that is made again."""
    found = []
    for chunked in (False, True):
        model = make()
        recompute_blocks(model, keep)
        with torch.autocast("cpu", torch.bfloat16):
            loss = mean_loss(model, *batch, chunked=chunked)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (chunked_loss, gradients), (whole_loss, expected) = found[1], found[0]
    torch.testing.assert_close(chunked_loss, whole_loss, rtol=2**-8, atol=0)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() < 0.03 * gradient.norm()


def test_float64_under_autocast_is_left_alone(batch):
    """As autocast does."""
    model = make().double()
    expected = loss_and_gradients(model, batch, chunked=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(model, batch, chunked=True)
    assert found[0].dtype == torch.float64
    same(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [5, 256])
def test_targets_of_minus_100_count_for_nothing(tokens, batch, chunks_of):
    """The mean is over the others, as of PyTorch's cross entropy, whichever way it is made."""
    model, (inputs, targets, positions) = make("phi").double().eval(), batch
    targets = targets.clone()
    targets[0, 3:11] = targets[1, -1] = -100
    chunks_of(tokens)
    logits = next_token_logits(model, inputs, positions)
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected = (
        exact.detach(),
        dict(zip(dict(model.named_parameters()), torch.autograd.grad(exact, list(model.parameters())), strict=True)),
    )
    for chunked in (False, True):
        same(loss_and_gradients(model, (inputs, targets, positions), chunked), expected, rtol=1e-9, atol=1e-12)
    each = token_losses(model, inputs, targets, positions)
    with torch.no_grad():
        torch.testing.assert_close(token_losses(model, inputs, targets, positions), each.detach())
    assert torch.equal(each == 0, targets == -100)


def held_and_peak(tokens, chunked, width=64, vocab_size=4096):
    """Bytes of head and loss under bf16 autocast: what waits for the backward pass, and the most at once."""
    sizes = SIZES | dict(vocab_size=vocab_size, hidden_size=width, intermediate_size=8, num_hidden_layers=1)
    model = skeleton(make_hf_config({"model_type": "llama", **sizes}, "test"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        ids = torch.zeros(1, tokens, dtype=torch.long)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        check_loss(model, "auto")
        found = trace_step(model, lambda m: mean_loss(m, ids, ids, chunked=chunked), autocast_bf16=True)
    return found.held, max(found.peak.values())


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
def test_few_tokens_take_no_more_memory_than_with_whole_logits(tokens):
    """Where all are one chunk no sum of chunks in float32 lies beside it: dW waits in bfloat16."""
    slack = 1.02  # for the rest of the model, whose activations are there at another time
    whole, chunked = held_and_peak(tokens, False), held_and_peak(tokens, True)
    assert chunked[1] <= slack * whole[1]
    assert chunked[0] < whole[0]


def test_a_narrow_product_is_added_without_a_second_matrix_of_its_size():
    left, right = torch.randn(10_000, 8).bfloat16(), torch.randn(8, 16).bfloat16()
    total = torch.ones(10_000, 16)
    with Largest() as made:
        add_product(total, left, right)
    torch.testing.assert_close(total, 1 + (left @ right).float(), rtol=0, atol=0)
    assert made.numbers < total.numel()


def test_chunks_are_about_equal():
    cpu = torch.device("cpu")
    assert [chunk_tokens(n, cpu) for n in (1, 256, 257, 2048, 600)] == [1, 256, 129, 256, 200]

"""Compiled blocks: one graph each, one compilation for all, and pieces where that cannot be."""

import copy
import functools

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from nativerank.data.loader import document_positions
from nativerank.evaluate.loss import token_losses
from nativerank.layers.lowrank import LowRankLinear
from nativerank.layers.shared import join_products
from nativerank.methods import factorize
from nativerank.models import make_hf_config, materialize, skeleton
from nativerank.train.compiled import compile_blocks
from nativerank.train.recompute import recompute_blocks

# Torch's own warnings, which its compiler raises and hides.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OTHERS = {
    "gpt2": {
        "vocab_size": 300,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 64,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
    "mixtral": SIZES | {"num_local_experts": 4},
    "qwen3_moe": SIZES | {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
}
FAMILIES = ("llama", "qwen3", "gemma2", "olmo2", "phi3", *OTHERS)
IDS = torch.randint(1, 300, (2, 25), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def by(monkeypatch):
    """by(backend): with which blocks are compiled; what sees graph breaks is dynamo, under every backend."""
    torch._dynamo.reset()
    counters.clear()

    def choose(backend):
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    return choose


def make(family="llama", method="spectron", **sizes):
    model = skeleton(make_hf_config({"model_type": family} | OTHERS.get(family, SIZES) | sizes, "test"))
    if method != "dense-adamw":
        factorize(model, method, rank=6)
    return materialize(model, seed=0, init_scale=1.0).train()


def gradients(model, passes=1, masked=False):
    """(loss, gradients) of the last pass."""
    positions = torch.from_numpy(document_positions(IDS[:, :-1].numpy(), 7)) if masked else None
    for _ in range(passes):
        model.zero_grad()
        loss = token_losses(model, IDS[:, :-1], IDS[:, 1:], positions).mean()
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


CASES = {family: (family, "spectron", "none", False) for family in FAMILIES}
CASES |= {method: ("llama", method, "none", False) for method in ("dense-adamw", "sct", "self-guided")}
CASES |= {
    "recomputed up": ("llama", "spectron", "up", False),
    "recomputed blocks": ("llama", "sct", "blocks", False),
    "documents": ("llama", "spectron", "up", True),
    "no norm before, recomputed up": ("olmo2", "spectron", "up", False),
    "no norm before, recomputed blocks": ("olmo2", "spectron", "blocks", False),
}


@pytest.mark.parametrize("case", CASES)
def test_every_block_is_the_same_single_graph(by, case):
    """With joint products, as every run has them."""
    family, method, keep, masked = CASES[case]
    model, said = make(family, method), []
    join_products(model)
    if keep != "none":
        recompute_blocks(model, keep)
    by("eager")
    compile_blocks(model, said.append)
    loss, found = gradients(model, passes=3, masked=masked)
    assert counters["stats"]["unique_graphs"] == 1 and said == []
    same, expected = gradients(make(family, method), masked=masked)
    assert_close(loss, same)
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


@pytest.mark.parametrize("keep", ["none", "up"])
def test_experts_compile_as_one_operator(by, keep):
    """With the compiler's own gradients, of an operator that it cannot look into."""
    model, said = make("mixtral"), []
    if keep != "none":
        recompute_blocks(model, keep)
    by("aot_eager_decomp_partition")
    compile_blocks(model, said.append)
    _, found = gradients(model)
    assert counters["stats"]["unique_graphs"] == 1 and said == []
    for name, gradient in gradients(make("mixtral"))[1].items():
        assert_close(found[name], gradient)


def ranked(backend, by):
    """Ten blocks of ten ranks, compiled, and the same ones not compiled."""
    models = [make(num_hidden_layers=10) for _ in range(2)]
    for model in models:
        for number, block in enumerate(model.model.layers):
            for layer in block.modules():
                if isinstance(layer, LowRankLinear):
                    layer.resize(4 + number, torch.Generator().manual_seed(number))
        join_products(model)
    said = []
    by(backend)
    compile_blocks(models[0], said.append)
    return *models, said


def test_blocks_of_many_shapes_are_one_graph_each(by):
    model, plain, said = ranked("eager", by)
    loss, found = gradients(model, passes=2)
    assert counters["stats"]["unique_graphs"] == 10 and said == []
    same, expected = gradients(plain)
    assert_close(loss, same)
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


def test_too_many_shapes_are_said_once_and_the_run_goes_on(by, monkeypatch):
    monkeypatch.setattr("nativerank.train.compiled.COMPILATIONS", 0.3)
    model, plain, said = ranked("eager", by)
    assert_close(gradients(model, passes=2)[0], gradients(plain)[0])
    assert len(said) == 1 and "compiled in pieces" in said[0]


def broken(forward):
    def with_a_break(*args, **kwargs):
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    return with_a_break


def test_a_block_that_breaks_is_compiled_in_pieces_and_says_so_once(by):
    model, said = make(), []
    for block in model.model.layers:
        block.self_attn.forward = broken(block.self_attn.forward)
    by("eager")
    compile_blocks(model, said.append)
    loss, _ = gradients(model, passes=2)
    assert_close(loss, gradients(make())[0])
    assert len(said) == 1 and "compiled in pieces" in said[0] and "\n" not in said[0]
    assert counters["stats"]["unique_graphs"] > 1


def test_an_error_of_the_model_is_its_own(by):
    model = make()
    by("eager")
    compile_blocks(model, print)
    with pytest.raises(AttributeError, match="dtype"):
        model.model.layers[0](None)


def test_a_copy_computes_with_its_own_weights(by):
    model = make()
    by("eager")
    compile_blocks(model, print)
    twin = copy.deepcopy(model)
    for p in model.parameters():
        p.data.zero_()
    assert_close(gradients(twin)[0], gradients(make())[0])

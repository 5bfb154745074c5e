"""Joint products of layers that read one input: found by asking, equal to separate ones, and nothing stays behind."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import nativerank as nr
from nativerank.layers import shared
from nativerank.layers.guided import GuidedLinear
from nativerank.layers.lowrank import LowRankLinear
from nativerank.layers.reads import reads_of, recorded, same_inputs
from nativerank.layers.shared import JointProduct, SharedInput, join_products
from nativerank.layers.spectral import SpectralLinear

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
WANTED = {"llama": {ATTENTION, MLP}, "qwen2": {ATTENTION, MLP}, "mixtral": {ATTENTION}, "gpt2": set()}
D_IN, RANKS = 7, (3, 2, 3)


class Readers(nn.Module):
    """Three layers of one input, used by a function that may treat them in its own way."""

    def __init__(self, kind=LowRankLinear, bias=False):
        super().__init__()
        torch.manual_seed(0)
        made = [kind(D_IN, 5, rank, bias=bias, dtype=torch.float64) for rank in RANKS]
        self.q, self.k, self.v = made

    def forward(self, x):
        h = torch.sin(x)
        return self.q(h) * self.k(h) + self.v(h)


def pair(kind=LowRankLinear, bias=False):
    """The same readers apart and joined."""
    apart, joint = Readers(kind, bias), Readers(kind, bias)
    assert join_products(joint, sample()) == [("q", "k", "v")]
    return apart, joint


def sample(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 4)), D_IN, dtype=torch.float64, generator=generator).requires_grad_()


def outcome(model, x=None):
    """Output, and every gradient."""
    model.zero_grad()
    x = sample() if x is None else x.detach().clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.fixture
def products(monkeypatch):
    """How many matrices each joint product of a forward pass had."""
    seen, forward = [], JointProduct.forward

    def counted(ctx, x, dtype, *weights):
        seen.append(len(weights))
        return forward(ctx, x, dtype, *weights)

    monkeypatch.setattr(JointProduct, "forward", staticmethod(counted))
    return seen


# -- who reads what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WANTED)
def test_sharing_is_found_by_asking_the_model(build, family):
    model = build(family)
    nr.factorize(model, rank=4)
    found = nr.join_products(model)
    assert {tuple(name.split(".", 3)[-1] for name in group) for group in found} == WANTED[family]
    assert len(found) == 2 * len(WANTED[family])
    assert not model.training and all(p.device.type == "cpu" and type(p) is nn.Parameter for p in model.parameters())


def test_asking_draws_no_random_numbers_and_keeps_modes():
    class Dropped(Readers):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    model = Dropped().train()
    model.k.eval()
    before = torch.get_rng_state()
    assert same_inputs(reads_of(model, ["q", "k", "v"], (sample(),), {})) == [("q", "k", "v")]
    assert len(recorded(model, ["q", "k", "v"], (sample(),), {})) == 3  # on the model itself
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.k.training and model.q.training


def test_a_model_that_looks_at_numbers_is_run_itself():
    class Looking(Readers):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else self.q(x)

    assert join_products(Looking(), sample().abs()) == [("q", "k", "v")]
    assert join_products(Looking(), -sample().abs()) == []


def test_an_error_of_the_model_is_the_models():
    with pytest.raises(RuntimeError, match="shape"):
        join_products(Readers(), torch.zeros(2, D_IN + 1, dtype=torch.float64))


@pytest.mark.parametrize("between", ["copy", "write"])
def test_equal_numbers_are_not_the_same_input(between):
    class Changing(Readers):
        def forward(self, x):
            h = torch.sin(x)
            q, h = self.q(h), h.clone() if between == "copy" else h.mul_(2)
            return q + self.k(h) + self.v(h)

    assert join_products(Changing(), sample()) == [("k", "v")]


def test_a_layer_that_is_called_with_other_neighbours_stays_alone():
    class Twice(Readers):
        def forward(self, x):
            h = torch.sin(x)
            return self.q(h) + self.k(h) + self.v(h) + self.q(torch.cos(x))

    assert join_products(Twice(), sample()) == [] and join_products(Readers(), sample()) != []


# -- the same numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [LowRankLinear, SpectralLinear, GuidedLinear])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_outputs_and_gradients_are_those_of_separate_products(kind, bias, shape, products):
    apart, joint = pair(kind, bias)
    for model in (apart, joint):
        for layer in model.children():
            layer.alpha = 0.4
    x = sample(*shape)
    for found, wanted in zip(outcome(joint, x), outcome(apart, x), strict=True):
        assert_close(found, wanted, rtol=0, atol=1e-12)
    assert products == [3]


def test_gradients_of_some_only():
    """Frozen factors get none, an input that wants none either, and what nobody used stays without one."""
    apart, joint = pair()
    for model in (apart, joint):
        model.k.down.weight.requires_grad_(False)
        h = torch.sin(sample().detach())
        q, _, v = model.q(h), model.k(h), model.v(h)
        q.sum().backward()
        assert v.requires_grad and model.v.down.weight.grad is None and model.k.down.weight.grad is None
    assert_close(joint.q.down.weight.grad, apart.q.down.weight.grad)


def test_flops_are_the_same_and_products_fewer():
    def counted(model):
        with FlopCounterMode(display=False) as counter:
            outcome(model)
        return counter.get_total_flops()

    apart, joint = pair()
    assert counted(joint) == counted(apart) > 0


@pytest.mark.parametrize("rank", [2, 3, 6])
def test_a_joint_matrix_wider_than_its_input_is_a_product_by_another_name(rank, products):
    apart, joint = pair()
    for model in (apart, joint):
        for seed, layer in enumerate(model.children()):
            layer.resize(min(rank, 5), torch.Generator().manual_seed(seed))
    with FlopCounterMode(display=False) as counter:
        found = outcome(joint)
    named = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    wide = sum(layer.rank for layer in joint.children()) >= D_IN
    assert wide == (rank > 2) and wide == ("nativerank.joint_product" in named) and products == [3]
    with FlopCounterMode(display=False) as separate:
        wanted = outcome(apart)
    assert counter.get_total_flops() == separate.get_total_flops()
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)


def test_autocast_rounds_as_for_one_linear():
    """Gradients of x are added up before they are rounded, so they are no further from the truth than separate ones."""
    exact, (apart, joint) = outcome(Readers()), pair()
    off = {}
    for name, model in (("apart", apart), ("joint", joint)):
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            found = outcome(model, sample().float())
        assert [t.dtype for t in found[1:]] == [torch.float32] * (len(found) - 1)
        off[name] = torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])
    assert (off["joint"] < 0.02).all() and off["joint"][1] < 1.1 * off["apart"][1]
    assert outcome(joint, sample().float())[0].dtype == torch.float32


@pytest.mark.parametrize("method", ["lowrank-adamw", "spectron", "sct", "tsvd", "stiefel-spectron", "self-guided"])
def test_three_steps_of_every_method_are_the_same(build, tokens, method):
    losses = []
    for join in (False, True):
        model = build("llama").double().train()
        nr.factorize(model, method, rank=4)
        assert not join or len(nr.join_products(model)) == 4
        optimizer = nr.build_optimizer(model, method, **({"guided_steps": 2} if method == "self-guided" else {}))
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and losses[0][-1] < losses[0][0]


class Again(nn.Module):
    """Keeps the input and runs the model again in the backward pass."""

    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_run_again(reentrant):
    apart, joint = pair()
    wanted = outcome(apart)
    for found, other in zip(outcome(Again(joint, reentrant)), wanted, strict=True):
        assert_close(found, other, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # Torch's own, which its compiler raises and hides.
def test_all_compiled_blocks_are_one_graph(build, tokens):
    apart, joint = build("llama", num_hidden_layers=3).train(), build("llama", num_hidden_layers=3).train()
    for model in (apart, joint):
        torch.manual_seed(0)
        nr.factorize(model, rank=4)
        model.load_state_dict(apart.state_dict())
    nr.join_products(joint)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in joint.model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    for model in (apart, joint):
        for _ in range(2):
            model.zero_grad()
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert len(graphs) == 1
    assert sum("autograd_function" in str(node.target) for node in graphs[0].graph.nodes) == 2
    for wanted, found in zip(apart.parameters(), joint.parameters(), strict=True):
        assert_close(found.grad, wanted.grad)


def test_ranks_may_change_on_the_way(products):
    apart, joint = pair()
    for model in (apart, joint):
        model.k.resize(4, torch.Generator().manual_seed(0))
    for found, wanted in zip(outcome(joint), outcome(apart), strict=True):
        assert_close(found, wanted, rtol=0, atol=1e-12)
    assert products == [3]


# -- nothing stays behind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["whole", "one alone", "an error"])
def test_no_tensor_outlives_the_forward_pass(way, monkeypatch):
    made, apply = [], JointProduct.apply

    def kept(*args):
        parts = apply(*args)
        made.extend(weakref.ref(part) for part in (args[0], *parts))
        return parts

    _, joint = pair()
    monkeypatch.setattr(JointProduct, "apply", kept)
    if way == "whole":
        y = joint(sample())
        assert len(made) == 4 and y.grad_fn is not None
    elif way == "one alone":
        y = joint.q(torch.sin(sample()))  # whose graph lives on
    else:
        joint.v.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            joint(sample())
    alive = [reference() for reference in made if reference() is not None]
    assert alive == []


def test_a_tensor_that_stays_carries_nothing(products):
    _, joint = pair()
    x = torch.sin(sample())
    for layer in joint.children():
        layer(x)
    assert vars(x) == {} and products == [3]


def test_a_leaf_that_wants_a_gradient_is_read_by_each_for_itself(products):
    """Parts that wait on it would lead back to it through the graph, which no garbage collector sees."""
    _, joint = pair()
    x = sample()
    storage = weakref.ref(x.untyped_storage())
    joint.q(x).sum().backward()
    assert vars(x) == {} and products == []
    del x
    assert storage() is None


class Crossing(nn.Module):
    """Reads what all blocks read."""

    def __init__(self):
        super().__init__()
        self.k, self.v, self.o = (LowRankLinear(D_IN, D_IN, 2, bias=False, dtype=torch.float64) for _ in range(3))

    def forward(self, x, memory):
        return x + self.o(torch.tanh(self.k(memory)) * self.v(memory) + x)


class Decoder(nn.Module):
    def __init__(self, again):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.again = nn.ModuleList([Crossing(), Crossing()]), again

    def forward(self, x):
        memory, y = torch.sin(x), torch.cos(x)
        for block in self.blocks:
            y = checkpoint(block, y, memory, use_reentrant=False) if self.again else block(y, memory)
        return y


def test_readers_in_two_blocks_are_two_groups(products):
    """Each block may be run again by itself."""
    apart, joint = Decoder(False), Decoder(True)
    assert join_products(joint, sample()) == [("blocks.0.k", "blocks.0.v"), ("blocks.1.k", "blocks.1.v")]
    for found, wanted in zip(outcome(joint), outcome(apart), strict=True):
        assert_close(found, wanted, rtol=0, atol=1e-12)
    assert products == [2] * 4


# -- who computes for himself -------------------------------------------------------------------------------------


class Special(nn.Linear):
    """What adapters, quantizers and float8 put in the place of a linear."""


class Wrapped(torch.Tensor):
    """A weight of another kind."""


def hooked(layer):
    layer.down.register_forward_hook(lambda *_: None)


def replaced(layer):
    special = Special(D_IN, layer.rank, bias=False, dtype=torch.float64)
    special.weight = layer.down.weight
    layer.down = special


def own_forward(layer):
    layer.down.forward = layer.down.forward


def other_weight(layer):
    layer.down.weight = nn.Parameter(layer.down.weight.detach().as_subclass(Wrapped))


@pytest.mark.parametrize("change", [hooked, replaced, own_forward, other_weight])
@pytest.mark.parametrize("name", ["q", "k"])
def test_a_down_that_is_more_than_a_product_is_called(change, name, products):
    apart, joint = pair()
    change(getattr(joint, name))
    for found, wanted in zip(outcome(joint), outcome(apart), strict=True):
        assert_close(found.as_subclass(torch.Tensor), wanted, rtol=0, atol=1e-12)
    assert products == [2]


def test_hooks_see_what_they_saw(products):
    _, joint = pair()
    seen = []
    joint.k.down.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    joint.k.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    joint(sample())
    (x, h), (same, y) = seen
    assert same is x and torch.equal(joint.k.up(h), y) and products == [2]


def test_another_input_than_at_first_is_computed_anew(products):
    apart, joint = pair()
    for model in (apart, joint):
        model.v.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    for found, wanted in zip(outcome(joint), outcome(apart), strict=True):
        assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("what", ["input", "weight", "autocast"])
def test_what_changed_between_two_readers_counts(what):
    _, joint = pair()
    with torch.no_grad():
        h = sample().detach() if what != "autocast" else sample().detach().float()
    if what == "autocast":
        joint.float()
    joint.q(h)
    with torch.no_grad():
        if what == "input":
            h.mul_(3)
        elif what == "weight":
            joint.k.down.weight.mul_(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        found, wanted = joint.k(h), joint.k.up(joint.k.down(h))
    assert found.dtype == wanted.dtype
    assert_close(found, wanted)


def test_where_nothing_is_learned_there_is_no_joint_product(products):
    _, joint = pair()
    joint.eval()(sample())
    joint.train()
    with torch.no_grad():
        joint(sample())
    with torch.inference_mode():
        joint(sample().detach())
    assert products == []


def test_gradients_of_gradients_are_refused():
    _, joint = pair()
    x = sample()
    (slope,) = torch.autograd.grad(joint(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# -- models as they were ------------------------------------------------------------------------------------------


def test_parameters_names_and_files_are_as_before(build, tokens, tmp_path):
    model = build("llama")
    nr.factorize(model, rank=4)
    before, parameters = list(model.state_dict()), list(map(id, model.parameters()))
    nr.join_products(model)
    assert list(model.state_dict()) == before and list(map(id, model.parameters())) == parameters
    nr.save(model, tmp_path / "saved")
    again = nr.load(tmp_path / "saved")
    assert torch.equal(again.eval()(input_ids=tokens).logits, model(input_ids=tokens).logits)


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file])
def test_a_copy_computes_with_its_own_weights(copied, products):
    _, joint = pair()
    twin = copied(joint)
    wanted = outcome(joint)
    for p in joint.parameters():
        p.data.zero_()
    for found, same in zip(outcome(twin), wanted, strict=True):
        assert_close(found, same)
    assert products == [3] and join_products(twin, sample()) == [("q", "k", "v")]


def test_layers_that_turn_dense_leave(products):
    apart, joint = pair()
    joint.k = joint.k.restore()
    assert_close(outcome(joint)[0], outcome(apart)[0])
    assert products == [2]
    assert join_products(joint, sample()) == [("q", "v")]


def test_joining_again_starts_afresh(products):
    _, joint = pair()
    old = joint.q.shared
    assert join_products(joint, sample()) == [("q", "k", "v")]
    assert old is not joint.q.shared and isinstance(joint.q.shared, SharedInput) and old.layers == [None] * 3
    outcome(joint)
    assert products == [3] and shared.WAITING not in vars(sample())

"""Models wrapped by FSDP2 or DDP whose parameters are exchanged for others: as if wrapped around those in the first
place, at no cost in memory or messages, and with nothing of the old ones left behind."""

import gc
import inspect
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import _get_param_module_infos
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from nativerank.distributed.grid import make_grid
from nativerank.distributed.pieces import full, local, piece_of
from nativerank.distributed.rewrap import group_of, let_go, loosen, tighten
from nativerank.distributed.wrap import reshard, wrap
from nativerank.layers.factorize import factorize_modules
from nativerank.optim.roles import assign_roles, long_sides
from nativerank.train.recompute import recompute_blocks

CPU = torch.device("cpu")
RESIZED = "model.layers.0.mlp.down_proj"


def llama(recompute=False):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, use_cache=False))
    factorize_modules(model, kind="lowrank", ratio=0.25, init="svd")
    if recompute:
        recompute_blocks(model, "up")
    return model.train()


def loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


def gradients(wrapped, model, reference, rank, world):
    """Largest relative difference of any gradient to those of one process that sees all batches."""
    batches = [(torch.arange(32).view(2, 16) + 5 * r) % 64 for r in range(world)]
    wrapped.zero_grad(set_to_none=True)
    reference.zero_grad(set_to_none=True)
    for ids in batches:
        (loss(reference, ids) / world).backward()
    loss(wrapped, batches[rank]).backward()
    pairs = zip(model.named_parameters(), reference.named_parameters(), strict=True)
    worst = 0.0
    for (name, p), (_, q) in pairs:
        assert torch.equal(full(p), q), name
        worst = max(worst, ((full(p.grad) - q.grad).norm() / q.grad.norm()).item())
    return worst


class Watched(TorchDispatchMode):
    """The largest tensor that takes memory, and whether anything was sent."""

    largest, sent = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.sent |= func.namespace in ("c10d", "_c10d_functional")
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.device.type != "meta":
            self.largest = max(self.largest, local(out).numel())
        return out


def resized_llama(rank, replicas, shards, options, recompute):
    grid = make_grid(replicas, shards, "cpu")
    model, reference = llama(recompute), llama(recompute)
    wrapped, _ = wrap(model, grid, long_sides(assign_roles(model)), **options)
    before = gradients(wrapped, model, reference, rank, grid.world)
    with torch.no_grad():
        loss(wrapped, torch.arange(32).view(2, 16))  # which leaves the parameters around the blocks gathered
    reshard(model)

    objects = dict(model.named_parameters())
    names = [f"{RESIZED}.{side}.weight" for side in ("up", "down")]
    with Watched() as watched:
        old = loosen(model, names)
        model.get_submodule(RESIZED).reshape(5)
        tighten(model, lambda p: Shard(int(p.shape[0] < p.shape[1] and p.shape[1] % shards == 0)), CPU)
    assert [name for name, _ in model.named_parameters()] == list(objects)
    assert all((p is objects[name]) == (name not in names) for name, p in model.named_parameters())
    if shards > 1:
        assert not watched.sent and watched.largest <= -(-48 // shards) * 8, "more than a shard of the old rank"
    if isinstance(wrapped, DistributedDataParallel):
        let_go(wrapped)
        wrapped, _ = wrap(model, grid, {})
    gone = [weakref.ref(p) for p in old.values()]
    del old, objects
    gc.collect()
    assert all(ref() is None for ref in gone)

    reference.get_submodule(RESIZED).resize(5)
    for name in names:
        piece, whole = piece_of(name, model.get_parameter(name), grid), reference.get_parameter(name).detach()
        along = piece.along
        piece.tensor.copy_(whole if along is None else whole.narrow(along, piece.start, piece.tensor.shape[along]))
    for _ in range(2):
        after = gradients(wrapped, model, reference, rank, grid.world)
    order = [[id(m.sharded_param) for m in group.fsdp_params] for x in model.modules() if (group := group_of(x))]
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        close = torch.allclose(loss(wrapped, ids), loss(reference, ids), atol=1e-3)
    reshard(model)
    place = {id(p): i for i, p in enumerate(model.parameters())}
    assert all(place[a] < place[b] for members in order for a, b in pairwise(members)), "groups in the model's order"
    return before, after, close


@pytest.mark.parametrize(
    ("grid", "options", "recompute"),
    [
        ((1, 2), {}, False),
        ((1, 2), {"precision": "bf16", "reduce": "fp32"}, True),
        ((1, 3), {}, False),
        ((2, 1), {}, True),
        pytest.param((2, 2), {}, True, marks=pytest.mark.slow),
        pytest.param((1, 2), {"reshard_after_forward": False}, False, marks=pytest.mark.slow),
    ],
)
def test_a_model_around_other_parameters_computes_what_it_should(forked, grid, options, recompute):
    llama()  # imports what the processes would all import
    tolerance = 0.05 if options.get("precision") else 1e-5
    for before, after, close in forked(resized_llama, grid[0] * grid[1], *grid, options, recompute):
        assert before < tolerance and after < tolerance and close


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(x))


CONSTRUCTED = ["self", "param", "module_info", "mesh_info", "post_forward_mesh_info", "device", "shard_placement_fn"]
CONSTRUCTED += ["mp_policy", "offload_policy"]
OF_GROUPS = ["fsdp_params", "modules", "mesh_info", "post_forward_mesh_info", "device", "mp_policy", "offload_policy"]
OF_MEMBERS = ["sharded_param", "sharded_size", "to_sharded_dtensor", "reset_sharded_param", "init_dtype_attrs"]
OF_MEMBERS += ["_post_load_hook_handle", "_setattr_on_modules"]


def lacking_internals(rank):
    model = fully_shard(Two(), mesh=make_grid(1, 2, "cpu").mesh["shard"])
    group = group_of(model)
    found = [name for name in OF_GROUPS if not hasattr(group, name)]
    found += [name for name in OF_MEMBERS if not hasattr(group.fsdp_params[0], name)]
    infos = _get_param_module_infos([group.fsdp_params[0].sharded_param], group.modules)
    return found, len(infos), list(inspect.signature(FSDPParam.__init__).parameters)


def test_pytorch_has_what_is_used_of_its_internals(forked):
    """Fails where a version of PyTorch renames them: `distributed.rewrap` is the one place that uses them."""
    for lacking, infos, constructed in forked(lacking_internals, 2):
        assert (lacking, infos) == ([], 1)
        assert constructed[: len(CONSTRUCTED)] == CONSTRUCTED
    assert hasattr(DistributedDataParallel, "_remove_autograd_hooks")


def coming_and_going(rank):
    mesh = make_grid(1, 2, "cpu").mesh["shard"]
    model = Two()
    for module in (model.block, model.head, model):
        fully_shard(module, mesh=mesh)

    def run():
        model(torch.ones(3, 6)).sum().backward()
        return {name: full(p.grad).shape for name, p in model.named_parameters() if p.grad is not None}

    first = run()
    loosen(model, ["block.bias"])
    model.block.bias = None
    tighten(model, lambda p: None, CPU)
    without = run()
    loosen(model, [])
    model.block.bias = nn.Parameter(torch.empty(4, device="meta"))
    tighten(model, lambda p: None, CPU)
    assert not full(model.block.bias).any() and isinstance(model.block, FSDPModule)
    return first, without, run()


def test_a_parameter_goes_and_another_one_comes(forked):
    for first, without, again in forked(coming_and_going, 2):
        assert list(first) == ["block.weight", "block.bias", "head.weight", "head.bias"] == list(again)
        assert list(without) == ["block.weight", "head.weight", "head.bias"]


def hooks_that_are_gone(rank):
    model = nn.Linear(4, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    old = DistributedDataParallel(model)
    let_go(old)
    model(torch.full((2, 4), float(rank))).sum().backward()
    alone = model.weight.grad[0, 0].item()
    new, gone = DistributedDataParallel(model), weakref.ref(old)
    del old
    gc.collect()
    model.zero_grad()
    new(torch.full((2, 4), float(rank))).sum().backward()
    return alone, model.weight.grad[0, 0].item(), gone() is None


def test_hooks_of_a_wrapper_that_was_let_go_fire_no_more(forked):
    found = forked(hooks_that_are_gone, 2)
    assert [alone for alone, _, _ in found] == [0.0, 2.0], "gradients of this process alone"
    assert [mean for _, mean, _ in found] == [1.0, 1.0] and all(gone for _, _, gone in found)

"""A model on a grid has the gradients of the whole batch, and exchanges them once a step."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from nativerank.distributed.gradients import clip, loss_and_norms
from nativerank.distributed.grid import make_grid
from nativerank.distributed.pieces import cut_along, full, local
from nativerank.distributed.wrap import deal, gradient_sync, original_class, reshard, wrap
from nativerank.layers.shared import JointProduct, join_products
from nativerank.methods import factorize
from nativerank.optim.roles import assign_roles, long_sides
from nativerank.train.recompute import recompute_blocks

GRIDS = {"ddp": (2, 1), "fsdp": (1, 2), "hsdp": (2, 2)}
UNEVEN = [f"model.layers.{i}.mlp.down_proj.down.weight" for i in range(2)]


def make_model(tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=25,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).double().train()
    factorize(model, "lowrank-adamw", rank=4)
    return model


def backward(model, forward, passes):
    """Accumulates the gradient of the mean loss; True in `passes` where processes exchange it."""
    for ids, last in passes:
        with gradient_sync(forward, last):
            logits = forward(input_ids=ids, use_cache=False).logits
            (cross_entropy(logits.flatten(0, 1), ids.flatten()) / len(passes)).backward()


@contextmanager
def counting():
    """How many matrices each joint product of a forward pass had."""
    seen, forward = [], JointProduct.forward

    def counted(ctx, x, dtype, *weights):
        seen.append(len(weights))
        return forward(ctx, x, dtype, *weights)

    JointProduct.forward = staticmethod(counted)
    yield seen
    JointProduct.forward = staticmethod(forward)


def gradients(rank, shape, tied, recompute):
    """The largest deviation from one process of: weights, gradients, norm, and of gradients that were clipped."""
    grid, model = make_grid(*shape, "cpu"), make_model(tied)
    reference = copy.deepcopy(model)
    assert len(join_products(model)) == 4  # of the wrapped model only
    ids = torch.randint(0, 60, (8, 6), generator=torch.Generator().manual_seed(1))
    backward(reference, reference, [(ids, True)])
    if recompute:
        recompute_blocks(model, "up")
    drawn = {name: p.detach().clone() for name, p in model.named_parameters()} if rank == 0 else {}
    if rank:
        for p in model.parameters():
            p.data.fill_(torch.nan)
    forward, uneven = wrap(model, grid, long_sides(assign_roles(model)))
    if grid.shards > 1:
        deal(model, drawn, grid)
        assert isinstance(next(model.parameters()), DTensor) and not drawn
        assert uneven == UNEVEN
        names = dict(model.named_parameters())
        assert cut_along(names["model.layers.0.mlp.up_proj.down.weight"]) == 1
        assert cut_along(names["model.layers.0.mlp.up_proj.up.weight"]) == cut_along(names[UNEVEN[0]]) == 0
    assert original_class(model).__name__ == "LlamaForCausalLM"

    def worst(of, wanted):
        mine, other = model.named_parameters(), dict(reference.named_parameters())
        return max((full(of(p)) - wanted(other[name])).abs().max().item() for name, p in mine)

    found = [worst(torch.detach, torch.detach)]
    own = ids.chunk(grid.world)[rank].chunk(2)
    with counting() as joint:
        backward(model, forward, [(own[0], False), (own[1], True)])
    # q, k, v and gate, up of each of two blocks in each of two passes, made once more where they are made again.
    assert joint == [3, 2] * (8 if recompute else 4)
    found.append(worst(lambda p: p.grad, lambda p: p.grad))
    wanted = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    loss, norms, votes = loss_and_norms(torch.tensor(float(rank)), model.named_parameters(), grid, [1.0, float(rank)])
    assert (loss, votes) == ((grid.world - 1) / 2, [grid.world, sum(range(grid.world))])
    _, each, _ = loss_and_norms(torch.tensor(0.0), model.named_parameters(), grid, apart=True)
    assert (len(norms), len(each)) == (1, grid.replicas)
    norms += each
    found += [abs(norm - wanted.item()) for norm in norms]
    clip(model.parameters(), norms[0], 0.01)
    found.append(worst(lambda p: p.grad, lambda p: p.grad))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    reshard(model)
    assert all(isinstance(p, DTensor) == (grid.shards > 1) for p in model.parameters())
    return found, norms


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "tied-recomputed"])
@pytest.mark.parametrize("mode", GRIDS)
def test_gradients_and_their_norm_are_those_of_the_whole_batch(forked, mode, plain):
    replicas, shards = GRIDS[mode]
    found = forked(gradients, replicas * shards, GRIDS[mode], not plain, not plain)
    assert max(max(deviations) for deviations, _ in found) < 1e-12
    assert len({tuple(norms) for _, norms in found}) == 1  # to the last bit


def after_one_pass(rank, shape):
    """How many parameters are whole on this process after a pass that is not the last; and what it has of gradients."""
    grid, model = make_grid(*shape, "cpu"), make_model()
    forward, _ = wrap(model, grid, {})
    ids = torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(rank))
    backward(model, forward, [(ids, False)])
    held = [local(p.grad) for p in model.parameters() if p.grad is not None]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
    return len(whole), held


def test_ddp_exchanges_nothing_before_the_last_pass(forked):
    (_, one), (_, two) = forked(after_one_pass, 2, GRIDS["ddp"])
    assert one and not any(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_shards_keep_no_whole_gradient_between_passes(forked):
    parameters = list(make_model().parameters())
    for whole, held in forked(after_one_pass, 2, GRIDS["fsdp"]):
        assert whole == 0 and len(held) == len(parameters)
        assert sum(g.numel() for g in held) < 0.6 * sum(p.numel() for p in parameters)

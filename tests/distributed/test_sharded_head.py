"""The chunked loss on two processes is that of whole logits on one: losses, gradients, and whole runs."""

import pytest
import torch
from training_runs import DDP, FSDP, steps, weights
from transformers import LlamaConfig, LlamaForCausalLM

from nativerank.distributed.grid import make_grid
from nativerank.distributed.pieces import full
from nativerank.distributed.wrap import deal, gradient_sync, wrap
from nativerank.evaluate import head_loss
from nativerank.evaluate.head_loss import takes_chunks
from nativerank.evaluate.loss import mean_loss, token_losses
from nativerank.methods import factorize
from nativerank.optim.roles import assign_roles, long_sides

GRIDS = {"ddp": (2, 1), "fsdp": (1, 2)}


def make_model(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).double().train()
    factorize(model, "lowrank-adamw", rank=4)
    return model


def deviations(rank, shape, tied):
    """The largest ones from one process and whole logits, over two passes: of loss, gradients, losses of tokens."""
    head_loss.CHUNK_TOKENS["cpu"] = 5
    grid, model, alone = make_grid(*shape, "cpu"), make_model(tied), make_model(tied)
    ids = torch.randint(0, 60, (8, 7), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    wanted = mean_loss(alone, inputs, targets, chunked=False)
    wanted.backward()
    drawn = {name: p.detach().clone() for name, p in model.named_parameters()} if rank == 0 else {}
    forward, _ = wrap(model, grid, long_sides(assign_roles(model)))
    if grid.shards > 1:
        deal(model, drawn, grid)
    assert takes_chunks(forward)
    total = torch.zeros((), dtype=torch.float64)
    for begin in (4 * rank, 4 * rank + 2):
        rows = slice(begin, begin + 2)
        with gradient_sync(forward, begin % 4 == 2):
            loss = mean_loss(forward, inputs[rows], targets[rows]) / 2
            loss.backward()
        total += loss.detach()
    torch.distributed.all_reduce(total)
    others = dict(alone.named_parameters())
    found = [(total / 2 - wanted).abs().item()]
    found += [(full(p.grad) - others[name].grad).abs().max().item() for name, p in model.named_parameters()]
    with torch.no_grad():
        found.append((token_losses(model, inputs, targets).mean() - wanted).abs().item())
    return max(found)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("mode", GRIDS)
def test_two_processes_in_chunks_are_one_with_whole_logits(forked, mode, tied):
    assert max(forked(deviations, 2, GRIDS[mode], tied)) < 1e-9  # norms are in float32 and see other batches


@pytest.mark.parametrize("where", [DDP, pytest.param(FSDP, marks=pytest.mark.slow)], ids=["ddp", "fsdp"])
def test_a_run_in_chunks_on_two_is_a_run_with_whole_logits_on_one(train_on, monkeypatch, where):
    monkeypatch.setitem(head_loss.CHUNK_TOKENS, "cpu", 11)
    common = {"method": "spectron", "train__batch_size": 4, "train__steps": 6, "train__accumulation": 1}
    whole = train_on(1, "whole", train__loss="whole", **common)
    chunked = train_on(2, "chunked", train__loss="chunked", **common | where)
    losses = [[row["loss"] for row in steps(folder)] for folder in (chunked, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 6
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(chunked)[name], value, rtol=0, atol=1e-4)

"""One update: accumulation is a larger batch, clipping bounds the gradient, refusing leaves the weights alone."""

import copy

import pytest
import torch
from torch import nn

from nativerank.methods import build_optimizer, factorize
from nativerank.models import make_hf_config, materialize, skeleton
from nativerank.train import step as step_module
from nativerank.train.step import Stopwatch, to_device, train_step

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_config):
    from nativerank.models import read_hf_config

    return materialize(skeleton(read_hf_config(tiny_config)), seed=0, init_scale=1.0).train()


def batch(rows, seed=0):
    tokens = torch.randint(0, 300, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:], None


def halves(whole):
    inputs, targets, _ = whole
    return [(i, t, None) for i, t in zip(inputs.chunk(2), targets.chunk(2), strict=True)]


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_two_micro_batches_are_one_of_twice_the_size(model):
    twin, whole = copy.deepcopy(model), batch(4)
    one = train_step(model, sgd(model), [whole], 1, 0.0)
    two = train_step(twin, sgd(twin), halves(whole), 2, 0.0)
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_gradients_do_not_leak_into_the_next_step(model):
    twin, whole = copy.deepcopy(model), batch(2)
    first = train_step(model, sgd(model, 0.0), [whole], 1, 0.0)
    again = train_step(model, sgd(model, 0.0), [whole], 1, 0.0)
    assert first.grad_norm == again.grad_norm
    del twin


@pytest.mark.parametrize("clip", [0.5, 1e6, 0.0])
def test_clipping_bounds_the_step_and_reports_the_norm_before(model, clip):
    before = [p.detach().clone() for p in model.parameters()]
    result = train_step(model, sgd(model, lr=1.0), [batch(2)], 1, clip)
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]).norm().item()
    assert result.grad_norm > 0.6, "else 0.5 clips nothing"
    wanted = min(clip or float("inf"), result.grad_norm)
    assert moved == pytest.approx(wanted, rel=1e-4)  # float32 sums of 30000 squares


def test_a_refused_step_moves_nothing_and_says_so(model):
    before, asked = [p.detach().clone() for p in model.parameters()], []

    def refuse(loss, grad_norm):
        asked.append((loss, grad_norm))
        return False

    result = train_step(model, sgd(model), [batch(2)], 1, 1.0, accept=refuse)
    assert not result.updated and asked == [(result.loss, result.grad_norm)]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_phases_are_timed(model):
    seconds = train_step(model, sgd(model), halves(batch(2)), 2, 1.0).seconds
    assert list(seconds) == ["forward", "backward", "clip", "optimizer"]
    assert all(s > 0 for s in seconds.values())


def test_a_stopwatch_sums_a_phase_over_its_marks(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(Stopwatch, "clock", lambda self: next(times))
    watch = Stopwatch(CPU, wait=True)
    for phase in ("forward", "backward", "forward"):
        watch.mark(phase)
    assert watch.seconds == {"forward": 5.0, "backward": 2.0}


def test_the_loss_is_the_mean_negative_log_likelihood(model):
    inputs, targets, _ = batch(2)
    result = train_step(model, sgd(model), [(inputs, targets, None)], 1, 1.0, accept=lambda *_: False)
    with torch.no_grad():
        logits = model(input_ids=inputs).logits.double()
    by_hand = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert result.loss == pytest.approx(by_hand.item(), rel=1e-6)


def test_a_tied_embedding_is_one_parameter(write_hf_config):
    config = make_hf_config({"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2}, "test")
    model = materialize(skeleton(config), seed=0, init_scale=1.0)
    assert model.lm_head.weight is model.transformer.wte.weight
    train_step(model, sgd(model), [batch(2)], 1, 1.0)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model, nn.Module)


def test_a_batch_on_a_device_has_the_same_numbers():
    ids = batch(2)[0].numpy()
    assert torch.equal(to_device(ids, CPU), torch.from_numpy(ids))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_host_waits_for_a_gpu_once_in_a_step(model, monkeypatch):
    """Where loss and norm are read; not for batches, passes or clipping."""
    cuda = torch.device("cuda")
    factorize(model, "spectron", rank=8)
    model.cuda()
    optimizer, arrays = build_optimizer(model, "spectron"), [[t.numpy() for t in batch(2, i)[:2]] for i in range(2)]
    norm, clipped, looked_at = torch.nn.utils.get_total_norm, step_module.clip_gradients, []

    def strict(on):
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    def batches():
        strict(True)
        yield from ((*(to_device(array, cuda) for array in pair), None) for pair in arrays)

    def up_to_the_read(*args, **kwargs):
        found = norm(*args, **kwargs)
        strict(False)
        looked_at.append("norm")
        return found

    def after_the_read(*args, **kwargs):
        strict(True)
        clipped(*args, **kwargs)
        strict(False)
        looked_at.append("clip")

    one = [(*(to_device(array, cuda) for array in arrays[0]), None)]
    train_step(model, optimizer, one, 1, 0.1, time_phases=False)  # workspaces and kernels exist from then on
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", up_to_the_read)
    monkeypatch.setattr(step_module, "clip_gradients", after_the_read)
    try:
        train_step(model, optimizer, batches(), 2, 0.1, time_phases=False)
    finally:
        strict(False)
    assert looked_at == ["norm", "clip"]

"""Bytes that wait for the backward pass, the peak, and the time, of each choice of train.recompute.

    python benchmarks/recompute.py --preset demo --clock cpu
    python benchmarks/recompute.py --preset spectron-s --batch_size 4 --context 512 --repeats 3

One forward and backward pass of a low-rank model up to its last hidden states, without head, loss and optimizer, which
the choice does not touch. Bytes are those that PyTorch allocates beyond weights and gradients; seconds are of passes in
turns in one process, of the clock or the processor, and ratios medians of pairs. "up, attention too" makes attention's
output again as well, which `--train.recompute up` keeps. Gradients are compared bit by bit.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nativerank.bench.measure import CLOCKS, check_sizes, measured_by, race
from nativerank.bench.record import raced, record
from nativerank.cli.output import add_json, check_json, write_json
from nativerank.layers import join_products
from nativerank.methods import factorize
from nativerank.models import Preset, find_preset, hf_config, materialize, scaled, skeleton
from nativerank.train import recompute

CHOICES = ("none", "up", "up, attention too", "blocks")
KEPT = frozenset(recompute.ATTENTION)
END = "end of the forward pass"


def backward(model: Any, ids: torch.Tensor, choice: str) -> None:
    """One pass; which operators stay is looked up as they run."""
    recompute.ATTENTION.clear()
    if choice != "up, attention too":
        recompute.ATTENTION.update(KEPT)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    with record_function(END):
        pass
    hidden.square().mean().backward()


def again(model: Any, ids: torch.Tensor, choice: str) -> None:
    """One pass, whose gradients are made anew."""
    model.zero_grad(set_to_none=True)
    backward(model, ids, choice)


def memory(model: Any, ids: torch.Tensor, choice: str) -> tuple[int, int]:
    """(bytes that wait at the end of the forward pass, the most at any time)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watching:
        backward(model, ids, choice)
    held = peak = waiting = 0
    events: Any = watching.profiler
    for event in sorted(events.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        elif event.name() == END:
            waiting = held
    return waiting, peak


def build(preset: Preset, choice: str) -> Any:
    """The same weights for every choice."""
    model = skeleton(hf_config(preset))
    factorize(model, "spectron", rank_ratio=preset.ratio, rank=preset.value)
    model = materialize(model, seed=0, init_scale=1.0, init="sampled").train()
    join_products(model)
    if choice != "none":
        recompute.recompute_blocks(model, choice.split(",")[0])
    return model


def compare(preset: Preset, threads: int, repeats: int) -> dict[str, Any]:
    """The record's case."""
    ids = torch.randint(preset.vocab_size, (preset.batch_size, preset.context), generator=torch.manual_seed(0))
    models = {choice: build(preset, choice) for choice in CHOICES}
    calls = {choice: partial(again, model, ids, choice) for choice, model in models.items()}
    seconds = race(calls, repeats, ids.device)
    plain = [p.grad.clone() for p in models["none"].parameters() if p.grad is not None]
    found: dict[str, dict[str, Any]] = {"waiting_bytes": {}, "peak_bytes": {}, "same_bits": {}}
    for choice, model in models.items():
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found["same_bits"][choice] = all(torch.equal(*pair) for pair in zip(plain, gradients, strict=True))
        found["waiting_bytes"][choice], found["peak_bytes"][choice] = memory(model, ids, choice)
    case = {
        "layers": preset.layers,
        "d_model": preset.d_model,
        "batch_size": preset.batch_size,
        "context": preset.context,
        "threads": threads,
    }
    return raced(case, "none", seconds, **found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--repeats", type=int, default=7)
    add_json(parser)
    a = parser.parse_args(arguments)
    settings = {key: value for key, value in vars(a).items() if key != "json"}
    try:
        check_json(a.json)
        check_sizes(**{key: value for key, value in settings.items() if key not in ("preset", "clock")})
        preset = scaled(find_preset(a.preset), None, a.layers)
        preset = replace(preset, batch_size=a.batch_size or preset.batch_size, context=a.context or preset.context)
        torch.set_num_threads(a.threads)
        with measured_by(a.clock, [a.threads], torch.device("cpu")):
            case = compare(preset, a.threads, a.repeats)
    except ValueError as error:
        parser.error(str(error))
    if write_json(record("recompute", settings, [case], torch.device("cpu")), a.json):
        return
    for choice, ratio in case["ratio"].items():
        waiting, peak = (case[what][choice] / 1e6 for what in ("waiting_bytes", "peak_bytes"))
        print(f"{choice:<20} waits {waiting:8.1f} MB  peak {peak:8.1f} MB", end="  ")
        print(f"time {ratio:.2f}  same bits: {case['same_bits'][choice]}")


if __name__ == "__main__":
    main()

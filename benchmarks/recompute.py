"""Bytes that wait for the backward pass, the peak, and the time, of each choice of train.recompute.

    python benchmarks/recompute.py --preset demo
    python benchmarks/recompute.py --preset spectron-s --batch_size 4 --context 512 --repeats 3

One forward and backward pass of a low-rank model up to its last hidden states, without head, loss and optimizer, which
the choice does not touch. Bytes are those that PyTorch allocates beyond weights and gradients; seconds are of passes in
turns in one process, and ratios medians of pairs. "up, attention too" makes attention's output again as well, which
`--train.recompute up` keeps. Gradients are compared bit by bit.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nativerank.layers import join_products
from nativerank.methods import factorize
from nativerank.models import find_preset, hf_config, materialize, scaled, skeleton
from nativerank.train import recompute
from nativerank.train.setup import versions

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    preset = scaled(find_preset(a.preset), None, a.layers)
    preset = replace(preset, batch_size=a.batch_size or preset.batch_size, context=a.context or preset.context)
    ids = torch.randint(preset.vocab_size, (preset.batch_size, preset.context), generator=torch.manual_seed(0))
    models = {}
    for choice in CHOICES:
        model = skeleton(hf_config(preset))
        factorize(model, "spectron", rank_ratio=preset.ratio, rank=preset.value)
        models[choice] = materialize(model, seed=0, init_scale=1.0, init="sampled").train()
        join_products(model)
        if choice != "none":
            recompute.recompute_blocks(model, choice.split(",")[0])
    seconds: dict[str, list[tuple[float, float]]] = {choice: [] for choice in CHOICES}
    for round_ in range(a.repeats + 1):
        for choice, model in models.items():
            model.zero_grad(set_to_none=True)
            began = time.perf_counter(), time.process_time()
            backward(model, ids, choice)
            if round_:
                seconds[choice].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    plain = [p.grad.clone() for p in models["none"].parameters() if p.grad is not None]
    rows = {}
    for choice, model in models.items():
        same = all(torch.equal(*pair) for pair in zip(plain, (p.grad for p in model.parameters()), strict=False))
        waiting, peak = memory(model, ids, choice)
        both = list(zip(seconds[choice], seconds["none"], strict=True))
        clock, cpu = (statistics.median(x[i] / y[i] for x, y in both) for i in (0, 1))
        rows[choice] = {"waiting_bytes": waiting, "peak_bytes": peak, "same_bits": same, "clock": clock, "cpu": cpu}
        print(f"{choice:<20} waits {waiting / 1e6:8.1f} MB  peak {peak / 1e6:8.1f} MB", end="  ")
        print(f"time {clock:.2f} (CPU {cpu:.2f})  same bits: {same}")
    if a.json:
        settings = {key: value for key, value in vars(a).items() if key != "json"}
        found = {"settings": settings, "choices": rows, "environment": versions()}
        a.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

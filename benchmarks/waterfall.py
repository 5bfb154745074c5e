"""From the FLOP ratio of a low-rank step to its measured ratio: where each percent of the dense twin's step goes.

    python benchmarks/waterfall.py --d_model 512 --threads 1

Both sides train in one process with the loop's own step, AdamW on the dense side, in turns: plain steps, whose paired
ratios are what counts, and profiled steps, whose parts (`nativerank.train.parts`) explain it: every event counts as in
the step in which it was fastest, since other programs strike other events each time. With T and F the time and
the exact FLOP of a part, d dense, l low rank, and e = F_d / T_d of the dense matrices:

    FLOP ratio                    sum F_l / sum F_d
    slower parts count more       the same with attention, head and loss weighed by the dense side's seconds
    parts without FLOPs           (F_l / e + the dense side's other parts) / dense step
    thin products                 + (T_l - F_l / e) / dense step, for the matrices
    every other part              + (T_l - T_d) / dense step
"""

import argparse
import json
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nativerank.layers import join_products
from nativerank.methods import build_optimizer, factorize, find_method
from nativerank.models import Preset, find_preset, hf_config, materialize, scaled, skeleton
from nativerank.train.parts import ATTENTION, DENSE, DOWN, HEAD, STEP, UP, Names, gflop_of, listed, parts_of
from nativerank.train.setup import versions
from nativerank.train.step import train_step

MATRICES = (DOWN, UP, DENSE)
GROUPS = {ATTENTION: "attention", HEAD: "head and loss", "clip": "clip"}
GROUPS |= {name: "matrices" for name in MATRICES}
GROUPS |= {name: "norms, activation, residuals" for name in ("norms", "activation, residuals")}


class Side:
    """A model with its optimizer, the seconds of its plain steps, and what its profiled ones took by part."""

    def __init__(self, preset: Preset, method: str):
        model = skeleton(hf_config(preset))
        if find_method(method).layer:
            factorize(model, method, rank_ratio=preset.ratio, rank=preset.value)
        self.model = materialize(model, seed=0, init_scale=1.0, init="sampled").train()
        join_products(self.model)
        self.optimizer = build_optimizer(self.model, method)
        self.seconds: list[tuple[float, float]] = []  # on the clock, and of CPU time
        self.events: list[list[tuple[str, float]]] = []

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        began = time.perf_counter(), time.process_time()
        train_step(self.model, self.optimizer, [(ids[:, :-1], ids[:, 1:], None)], 1, clip=1.0)
        return time.perf_counter() - began[0], time.process_time() - began[1]

    def profiled_step(self, ids: torch.Tensor) -> None:
        names = Names(parts_of(self.model, compiled=False))
        with profile(activities=[ProfilerActivity.CPU]) as watching, record_function(STEP):
            self.step(ids)
        names.remove()
        found, _ = listed(watching.events() or [], False)
        self.events.append([(group(part), milliseconds) for (part, _), milliseconds in found])

    def parts(self) -> dict[str, float]:
        """Milliseconds by group: every event at its fastest over all profiled steps of equal course.

        Other programs on the machine strike other events each time.
        """
        course = Counter(tuple(name for name, _ in events) for events in self.events).most_common(1)[0][0]
        alike = [events for events in self.events if tuple(name for name, _ in events) == course]
        grouped: dict[str, float] = defaultdict(float)
        for name, *all_of_one in zip(course, *alike, strict=True):
            grouped[name] += min(milliseconds for _, milliseconds in all_of_one)
        return grouped


def group(part: str) -> str:
    """What a part counts to in the waterfall."""
    return "optimizer" if part.startswith("optimizer") else GROUPS.get(part, "all else")


def waterfall(low: Side, dense: Side, context: int, tokens: int) -> list[tuple[str, float]]:
    """(what, share of the dense step): the first is the FLOP ratio, the others are added to it."""
    F_l, F_d = (gflop_of(side.model, context, tokens, False) for side in (low, dense))
    T_l, T_d = low.parts(), dense.parts()
    names = sorted(set(T_l) | set(T_d))
    whole, shared = sum(T_d.values()), T_d["attention"] + T_d["head and loss"]
    products_l, products_d = (sum(F.get(name, 0.0) for name in MATRICES) for F in (F_l, F_d))
    at_dense_speed = products_l / products_d * T_d["matrices"]
    flops = sum(F_l.values()) / sum(F_d.values())
    by_time = (at_dense_speed + shared) / (T_d["matrices"] + shared)
    with_rest = (at_dense_speed + whole - T_d["matrices"]) / whole
    rows = [("exact FLOP ratio", flops), ("attention and head weigh more in time", by_time - flops)]
    rows += [("parts without FLOPs, as on the dense side", with_rest - by_time)]
    rows += [("thin products are slower per FLOP", (T_l["matrices"] - at_dense_speed) / whole)]
    rows += [(f"{name}: low rank minus dense", (T_l[name] - T_d[name]) / whole) for name in names if name != "matrices"]
    return [*rows, ("profiled steps", sum(T_l.values()) / whole)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--method", default="spectron")
    parser.add_argument("--d_model", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    preset = scaled(find_preset(a.preset), a.d_model, a.layers)
    batch_size, generator = a.batch_size or preset.batch_size, torch.Generator().manual_seed(0)
    low, dense = Side(preset, a.method), Side(preset, "dense-adamw")
    for round_ in range(a.repeats + 1):
        ids = torch.randint(preset.vocab_size, (batch_size, preset.context + 1), generator=generator)
        for side in (low, dense) if round_ % 2 else (dense, low):
            seconds = side.step(ids)
            if round_:
                side.seconds.append(seconds)
                side.profiled_step(ids)
    pairs = list(zip(low.seconds, dense.seconds, strict=True))
    ratios = {name: sorted(x[i] / y[i] for x, y in pairs) for i, name in enumerate(("clock", "cpu_time"))}
    rows = waterfall(low, dense, preset.context, batch_size * preset.context)
    found: dict[str, Any] = {
        "settings": {key: value for key, value in vars(a).items() if key != "json"},
        "plain_ratio": {
            name: {"median": statistics.median(values), "min": values[0], "max": values[-1]}
            for name, values in ratios.items()
        },
        "waterfall": dict(rows),
        "milliseconds": {
            label: dict(sorted(side.parts().items())) for label, side in (("low_rank", low), ("dense", dense))
        },
        "environment": versions(),
    }
    for what, share in rows:
        print(f"{what:<55}{share:+8.3f}")
    for name, values in found["plain_ratio"].items():
        print(f"{f'plain steps, median of paired ratios, {name}':<55}{values['median']:+8.3f}")
    for label, values in found["milliseconds"].items():
        print(label, {name: round(value, 1) for name, value in values.items()})
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

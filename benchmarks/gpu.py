"""What an NVIDIA GPU makes of nativerank: speed, memory, the optimizer's share, retraction.

    python benchmarks/gpu.py                 # every slice that benchmarks/results/gpu-<card>.json does not hold yet
    python benchmarks/gpu.py --only retraction optimizer-spectron-s
    python benchmarks/gpu.py --list

A slice takes some minutes, is written as soon as it is done and is skipped by the next call, so a machine that is lent
for a quarter of an hour brings a part. Delete a case from the file to measure it again. Without a CUDA device nothing
is measured, and the exit status is 0.

| slice | what |
|---|---|
| layer | one factor layer beside nn.Linear |
| memory-P | peak memory of Spectron, lowrank-adamw and the dense twin, each alone on the card |
| train-P | their steps by turns: tokens/s, MFU |
| optimizer-P | Spectron's update in r x r, certified, and as published, beside the passes of 32k and 512k tokens |
| retraction | the SCT paper's 70B stack at rank 32 |

P is spectron-s, -m or -l: blocks compiled, bfloat16 autocast, sequences of 2048. MFU: exact FLOPs (ranks, attention and
head included, recomputation not) over the bfloat16 peak of the card's row in `nativerank.accounting.hardware`.
"""

import argparse
import gc
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nativerank.accounting.hardware import present_device
from nativerank.bench import retraction
from nativerank.bench.contestants import Ours, make
from nativerank.bench.layer import bench_layer
from nativerank.bench.measure import medians, race
from nativerank.bench.optimizer import FORMS
from nativerank.bench.plain import PlainSpectron
from nativerank.bench.record import raced, record
from nativerank.bench.train import bench_train, run, shapes
from nativerank.models import Preset
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.roles import factor_modules

RESULTS = Path(__file__).parent / "results"
PRESETS = ("spectron-s", "spectron-m", "spectron-l")
SIDES = ("spectron", "lowrank-adamw", "dense-adamw")
SHARES_AT = {"32k": 32_768, "512k": 524_288}  # tokens per step
FULL = {"batch": 8, "context": 2048, "repeats": 10, "compile": "+compile", "stack_layers": 80, "layer": {}}
SMOKE = {"batch": 2, "context": 16, "repeats": 2, "compile": "", "stack_layers": 1, "d_model": 64, "layers": 1}
SMOKE |= {"vocab_size": 64, "layer": {"d_in": 32, "d_out": 48, "rank": 8, "tokens": 16}}
Cases = list[dict[str, Any]]


class Measurement:
    """All slices on one device.

    Args:
        size: FULL or SMOKE.
    """

    def __init__(self, device: torch.device, size: dict[str, Any]):
        self.device, self.size = device, size
        card = present_device() if device.type == "cuda" else None
        self.peak_flops = card.bf16_flops if card else None
        self.slices: dict[str, Callable[[], dict[str, Any]]] = {"layer": self.layer, "retraction": self.retraction}
        for preset in PRESETS:
            for what, measure in (("memory", self.memory), ("train", self.train), ("optimizer", self.optimizer)):
                self.slices[f"{what}-{preset}"] = partial(self.fitting, measure, preset)

    def fitting(self, measure: Callable[[str, int], dict[str, Any]], preset: str) -> dict[str, Any]:
        """With as many sequences at once as fit: the full batch, or a half, a quarter ... of it."""
        batch = int(self.size["batch"])
        while True:
            try:
                return measure(preset, batch)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            batch //= 2  # outside of the except block, which keeps what did not fit alive
            self.clear()

    def clear(self) -> None:
        """Gives back what the last contestants held."""
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def preset(self, name: str) -> Preset:
        """Its shapes, or tiny ones."""
        changes = (self.size.get(key) for key in ("d_model", "layers"))
        return shapes(name, *changes, self.size["context"], self.size.get("vocab_size"), None)

    def layer(self) -> dict[str, Any]:
        threads, repeats = [torch.get_num_threads()], self.size["repeats"]
        (case,) = bench_layer(**self.size["layer"], repeats=repeats, threads=threads, device=self.device.type)["cases"]
        return dict(case)

    def retraction(self) -> dict[str, Any]:
        stacks = [(self.size["stack_layers"] * n, d, r) for n, d, r in retraction.LAYER_70B]
        return retraction.measure({"stacks": "70b"}, stacks, self.size["repeats"], self.device)

    def memory(self, preset: str, batch: int) -> dict[str, Any]:
        peaks = {}
        for name in SIDES:
            self.clear()
            side = make(name + self.size["compile"], self.preset(preset), self.device)
            ids = torch.randint(64, (batch, self.size["context"]), device=self.device)
            for _ in range(3):  # the third step has everything: state, compiled code, workspaces
                side.step((ids, ids, None))
            peaks[name] = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
            del side
        return {"case": {"preset": preset, "sequences": batch}, "peak_bytes": peaks}

    def train(self, preset: str, batch: int) -> dict[str, Any]:
        tiny = {key: self.size[key] for key in ("d_model", "layers", "vocab_size") if key in self.size}
        names = [name + self.size["compile"] for name in SIDES]
        found = bench_train(
            preset,
            names,
            context=self.size["context"],
            tokens=batch * self.size["context"],
            repeats=self.size["repeats"],
            device=self.device.type,
            **tiny,
        )
        (case,) = found["cases"]
        speed = case["tokens_per_second"]
        achieved = {name: speed[name] * flops for name, flops in case["flops_per_token"].items()}
        mfu = {name: rate / self.peak_flops for name, rate in achieved.items()} if self.peak_flops else None
        return {**case, "case": {"preset": preset, "sequences": batch}, "mfu": mfu}

    def optimizer(self, preset: str, batch: int) -> dict[str, Any]:
        """Shares of a step: forward, backward and clipping of a pass count as often as the step needs passes."""
        side = make("spectron" + self.size["compile"], self.preset(preset), self.device)
        assert isinstance(side, Ours)
        tokens = batch * self.size["context"]
        phases, _ = run([side], self.preset(preset), tokens, self.size["repeats"], self.device)
        once = medians(phases[side.name])
        passes = once["forward"] + once["backward"]
        pairs = [(layer.up.weight, layer.down.weight) for _, layer in factor_modules(side.model)]
        factors = [p for pair in pairs for p in pair]  # their gradients are in place
        steps: dict[str, Callable[[], Any]] = {
            name: LowRankOptimizer([{"params": factors, "rule": "spectron", "lr": 1e-3, **options}]).step
            for name, options in FORMS.items()
        }
        steps["published"] = PlainSpectron(pairs, lr=1e-3, stacked=True).step
        steps["published, one by one"] = PlainSpectron(pairs, lr=1e-3).step
        seconds = race(steps, self.size["repeats"], self.device)
        shares = {
            label: {name: value / (value + passes * total / tokens) for name, value in medians(seconds).items()}
            for label, total in SHARES_AT.items()
        }
        case = {"preset": preset, "sequences": batch}
        return raced(case, "published", seconds, pass_seconds=passes, pass_tokens=tokens, share=shares)


def goals(found: dict[str, dict[str, Any]]) -> Cases:
    """Every goal that these slices speak of: what it says, the figure, its bound, and by how much it is missed."""
    rows: Cases = []

    def goal(text: str, figure: float, bound: float, below: bool = True) -> None:
        met = figure < bound if below else figure <= bound
        by = "" if met else f"missed by {figure / bound - 1:.0%}"
        rows.append({"goal": text, "figure": figure, "bound": bound, "met": met, "missed": by})

    for preset in PRESETS:
        if case := found.get(f"train-{preset}"):
            for name, ratio in case["ratio"].items():
                if name != case["reference"]:
                    goal(f"{preset}: {name} no slower than {case['reference']}", ratio, 1.0, below=False)
                    if preset == PRESETS[-1]:
                        share = case["flop_share"][name]
                        goal(f"{preset}: {name}, time per token (FLOP share {share:.2f}, aim 0.70)", ratio, 0.80, False)
        if case := found.get(f"optimizer-{preset}"):
            for label, bound in (("512k", 0.01), ("32k", 0.05)):
                for form in ("published", "spectron", "certified"):
                    share = case["share"][label][form]
                    text = f"{preset}: optimizer, {form}, of a step of {label} tokens"
                    if form == "certified":
                        rows.append({"goal": text, "figure": share, "bound": None, "met": None, "missed": ""})
                    else:
                        goal(text, share, bound)
    if case := found.get("retraction"):
        way, least = min(((w, s) for w, s in case["seconds"].items() if w != "loop"), key=lambda pair: pair[1])
        goal(f"retraction of the 70B stack, seconds ({way})", least, 0.020)
    return rows


def show_goals(rows: Cases) -> None:
    """A line each."""
    for row in rows:
        verdict = "reported" if row["met"] is None else "met" if row["met"] else row["missed"]
        bound = "" if row["bound"] is None else f" (goal {row['bound']:g})"
        print(f"{row['goal']}: {row['figure']:.4g}{bound}: {verdict}")


def write(file: Path, found: dict[str, dict[str, Any]], size: dict[str, Any], device: torch.device) -> None:
    """All slices so far, each with the environment it was measured in; whole or not at all."""
    cases = [{**case, "case": {"slice": name, **case["case"]}} for name, case in found.items()]
    text = json.dumps({**record("gpu", size, cases, device), "goals": goals(found)}, indent=1)
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(text + "\n", encoding="utf-8")
    os.replace(partial_file, file)


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The slices that are there, by name."""
    cases = json.loads(file.read_text(encoding="utf-8"))["cases"] if file.exists() else []
    return {case["case"]["slice"]: case for case in cases}


def main(arguments: list[str] | None = None) -> int:
    """Measures what is missing and prints the goals."""
    parser = argparse.ArgumentParser(description="GPU measurements, in slices that can be resumed.")
    parser.add_argument("--only", nargs="+", metavar="SLICE", help="these slices, measured again if they are there")
    parser.add_argument("--list", action="store_true", help="names of the slices")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu-<card>.json")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)  # tiny shapes on the CPU, for tests
    flags = parser.parse_args(arguments)
    if not flags.smoke and not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device here, nothing measured")
        return 0
    device = torch.device("cpu" if flags.smoke else "cuda")
    card = "smoke" if flags.smoke else re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    size = SMOKE if flags.smoke else FULL
    measurement = Measurement(device, size)
    names = flags.only or list(measurement.slices)
    if unknown := [name for name in names if name not in measurement.slices]:
        parser.error(f"no slice {unknown[0]}; there are {', '.join(measurement.slices)}")
    if flags.list:
        print("\n".join(measurement.slices))
        return 0
    file = flags.out / f"gpu-{card}.json"
    found = read(file)
    for name in names:
        if name in found and not flags.only:
            continue
        print(f"{name} ...", flush=True)
        measurement.clear()
        found[name] = measurement.slices[name]()
        write(file, found, size, device)
    show_goals(goals(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

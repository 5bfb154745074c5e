"""What an NVIDIA GPU makes of nativerank: speed, memory, the optimizer's share, retraction.

    python benchmarks/gpu.py                 # every slice that benchmarks/results/gpu-<card>.json does not hold yet
    python benchmarks/gpu.py --only retraction optimizer-spectron-s
    python benchmarks/gpu.py --list

A slice takes some minutes, is written as soon as it is done, with the environment it was measured in, and is skipped by
the next call, so a machine that is there for a quarter of an hour brings a part. A slice that fails is reported, the
others go on, the exit status is 1, and the next call tries it again. Without a CUDA device nothing is measured, and the
exit status is 0.

| slice | what |
|---|---|
| layer | one factor layer beside nn.Linear, 16,384 tokens |
| memory-P | what PyTorch holds at most in a step of Spectron, lowrank-adamw, the dense twin, each alone on the card |
| train-P | their steps by turns, as `nativerank train` makes them (nothing waits between phases): tokens/s, MFU |
| optimizer-P | Spectron's update in r x r, certified, and as published, as shares of steps of 32k and 512k tokens |
| retraction | the SCT paper's 70B stack at rank 32, in stacks as large as the optimizer makes them |

P is spectron-s, -m or -l: blocks compiled, bfloat16 autocast, sequences of 2048. MFU: exact FLOPs (ranks, attention and
head included, recomputation not) over the bfloat16 peak of the card's row in `nativerank.accounting.hardware`.

    share = (update + rest) / (update + rest + clip + passes (forward + backward))        passes = tokens / those of one

update: of the factors; rest: AdamW of embedding, head and norms. Seconds include the host's launching.
"""

import argparse
import gc
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from nativerank.accounting.hardware import present_device
from nativerank.bench import retraction
from nativerank.bench.contestants import Ours, make
from nativerank.bench.gpu_goals import PRESETS, Case, goals, show_goals
from nativerank.bench.layer import bench_layer
from nativerank.bench.measure import medians, race
from nativerank.bench.optimizer import FORMS
from nativerank.bench.plain import PlainSpectron
from nativerank.bench.record import environment, raced, record
from nativerank.bench.train import bench_train, run, shapes
from nativerank.layers.base import factor_layers
from nativerank.models import Preset
from nativerank.optim.optimizer import LowRankOptimizer

RESULTS = Path(__file__).parent / "results"
SIDES = ("spectron", "lowrank-adamw", "dense-adamw")
SHARES_AT = {"32k": 32_768, "512k": 524_288}  # tokens per step
FULL = {
    "batch": 8,
    "context": 2048,
    "repeats": 10,
    "compile": "+compile",
    "stack_layers": 80,
    "layer": {"tokens": 16384},
}
SMOKE = {"batch": 2, "context": 16, "repeats": 2, "compile": "", "stack_layers": 1, "d_model": 64, "layers": 1}
SMOKE |= {"vocab_size": 64, "layer": {"d_in": 32, "d_out": 48, "rank": 8, "tokens": 16}}
MEASURED = ("memory", "train", "optimizer")  # of every preset
SLICES = ("layer", "retraction", *(f"{what}-{preset}" for preset in PRESETS for what in MEASURED))
REST = "adamw of the rest"


class Measurement:
    """All slices on one device.

    Args:
        size: FULL or SMOKE.
    """

    def __init__(self, device: torch.device, size: dict[str, Any]):
        self.device, self.size = device, size
        card = present_device() if device.type == "cuda" else None
        self.peak_flops = card.bf16_flops if card else None

    def measure(self, name: str) -> Case:
        """What a slice finds, when, and where."""
        self.clear()
        what, _, preset = name.partition("-")
        measure: Callable[..., Case] = getattr(self, what)
        found = self.fitting(measure, preset) if preset else measure()
        about = environment(self.device) | {"measured": datetime.now(UTC).isoformat(timespec="seconds")}
        return {**found, "case": {"slice": name, **found["case"]}, "environment": about}

    def fitting(self, measure: Callable[[str, int], Case], preset: str) -> Case:
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

    def layer(self) -> Case:
        threads, repeats = [torch.get_num_threads()], self.size["repeats"]
        (case,) = bench_layer(**self.size["layer"], repeats=repeats, threads=threads, device=self.device.type)["cases"]
        return dict(case)

    def retraction(self) -> Case:
        layers = self.size["stack_layers"]
        whole = [(layers * n, d, r) for n, d, r in retraction.LAYER_70B]
        stacks = retraction.as_the_optimizer_does(whole, self.device)
        return retraction.measure({"stacks": "70b", "layers": layers}, stacks, self.size["repeats"], self.device)

    def memory(self, preset: str, batch: int) -> Case:
        peaks = {}
        for name in SIDES:
            self.clear()
            side = make(name + self.size["compile"], self.preset(preset), self.device)
            ids = torch.randint(64, (batch, self.size["context"]), device=self.device)
            for _ in range(3):
                if self.device.type == "cuda":  # the last step counts: compiled code, state and workspaces are there
                    torch.cuda.reset_peak_memory_stats()
                side.step((ids, ids, None))
            peaks[name] = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
            del side
        return {"case": self.about(preset, batch), "peak_bytes": peaks}

    def about(self, preset: str, batch: int) -> Case:
        """What was measured on."""
        return {"preset": preset, "sequences": batch, "tokens": batch * self.size["context"]}

    def train(self, preset: str, batch: int) -> Case:
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
        return {**case, "case": self.about(preset, batch), "mfu": mfu, "notes": found["notes"]}

    def optimizer(self, preset: str, batch: int) -> Case:
        """Shares of a step: forward and backward count as often as it needs passes, the rest once."""
        side = make("spectron" + self.size["compile"], self.preset(preset), self.device)
        assert isinstance(side, Ours)
        tokens = batch * self.size["context"]
        phases, _, _ = run([side], self.preset(preset), tokens, self.size["repeats"], self.device)
        once = medians(phases[side.name])
        one_pass = once["forward"] + once["backward"]
        seconds = race(updates(side.model), self.size["repeats"], self.device)
        update = medians(seconds)
        rest = update.pop(REST)
        shares = {
            label: {
                name: share(value + rest, once["clip"] + one_pass * total / tokens) for name, value in update.items()
            }
            for label, total in SHARES_AT.items()
        }
        figures = {"pass_seconds": one_pass, "clip_seconds": once["clip"], "share": shares}
        return raced(self.about(preset, batch), "published", seconds, **figures)


def updates(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """A step of every form of Spectron over all factors, whose gradients are in place, and of AdamW over the rest."""
    pairs = [(layer.up.weight, layer.down.weight) for layer in factor_layers(model).values()]
    factors = [p for pair in pairs for p in pair]
    known = set(map(id, factors))
    rest = [p for p in model.parameters() if id(p) not in known]
    steps: dict[str, Callable[[], Any]] = {
        name: LowRankOptimizer([{"params": factors, "rule": "spectron", "lr": 1e-3, **options}]).step
        for name, options in FORMS.items()
    }
    steps["published"] = PlainSpectron(pairs, lr=1e-3, stacked=True).step
    steps["published, one by one"] = PlainSpectron(pairs, lr=1e-3).step
    steps[REST] = LowRankOptimizer([{"params": rest, "rule": "adamw", "lr": 1e-3}]).step
    return steps


def share(part: float, others: float) -> float:
    """Of the whole."""
    return part / (part + others)


def write(file: Path, found: dict[str, Case], size: Case, device: torch.device) -> None:
    """All slices so far; whole or not at all. `environment` is that of the latest, and every case has its own."""
    text = json.dumps({**record("gpu", size, list(found.values()), device), "goals": goals(found)}, indent=1)
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(text + "\n", encoding="utf-8")
    os.replace(partial_file, file)


def read(file: Path, size: Case) -> dict[str, Case]:
    """The slices that are there, by name.

    Raises:
        ValueError: naming the file: it is no such record, or one of other sizes.
    """
    if not file.exists():
        return {}
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        found = {case["case"]["slice"]: case for case in whole["cases"]}
        settings = whole["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no record of this script ({error}): move it away") from None
    if settings != size:
        raise ValueError(f"{file} holds slices of other sizes: move it away")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Flags, whose slices are known ones."""
    parser = argparse.ArgumentParser(description="GPU measurements, in slices that can be resumed.")
    parser.add_argument("--only", nargs="+", metavar="SLICE", help="these slices, measured again if they are there")
    parser.add_argument("--list", action="store_true", help="names of the slices")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu-<card>.json")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)  # tiny shapes on the CPU, for tests
    flags = parser.parse_args(arguments)
    for name in flags.only or ():
        if name not in SLICES:
            refuse(f"no slice {name}; there are {', '.join(SLICES)}")
    return flags


def refuse(reason: str) -> NoReturn:
    """One line, and the exit status of wrong usage."""
    print(f"benchmarks/gpu.py: error: {reason}", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str] | None = None) -> int:
    """Measures what is missing and prints the goals."""
    flags = parse(arguments)
    if flags.list:
        print("\n".join(SLICES))
        return 0
    if not flags.smoke and not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device here, nothing measured")
        return 0
    device = torch.device("cpu" if flags.smoke else "cuda")
    card = "smoke" if flags.smoke else re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    size, file = SMOKE if flags.smoke else FULL, flags.out / f"gpu-{card}.json"
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
        found = read(file, size)
    except (OSError, ValueError) as error:
        refuse(str(error))
    missing = flags.only or [name for name in SLICES if name not in found]
    failed = measure_all(missing, found, file, Measurement(device, size))
    show_goals(goals(found))
    if failed:
        print(f"failed, tried again by the next call: {' '.join(failed)}")
    return 1 if failed else 0


def measure_all(names: Sequence[str], found: dict[str, Case], file: Path, measurement: Measurement) -> list[str]:
    """Adds these slices to `found` and to the file, each as soon as it is there; returns those that raised."""
    failed = []
    for name in names:
        print(f"{name} ...", flush=True)
        try:
            found[name] = measurement.measure(name)
        except Exception as error:
            traceback.print_exc()
            print(f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
            failed.append(name)
            continue
        write(file, found, measurement.size, measurement.device)
    return failed


if __name__ == "__main__":
    sys.exit(main())

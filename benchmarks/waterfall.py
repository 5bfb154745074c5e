"""From the FLOP ratio of a low-rank step to its measured ratio: where each percent of the dense twin's step goes.

    python benchmarks/waterfall.py --d_model 512 --json FILE

Both sides train in one process with the loop's own step, AdamW on the dense side, in turns, by the processor time of
one thread: a step that does not count, a plain one, whose phases do, and a watched one. That times every operator of
the forward and backward pass by itself and tells the part of the model (`nativerank.train.parts`) that called it or
whose gradient it computes. Parts are medians over the watched steps; what a plain forward and backward pass takes
beyond them is "outside of operators": Python, the dispatcher, autograd. So the parts of a side add up to its plain
step. With T and F the time and the exact FLOP of a part, d dense, l low rank, and e = F_d / T_d of the dense matrices:

    FLOP ratio                    sum F_l / sum F_d
    slower parts count more       the same with attention, head and loss weighed by the dense side's seconds
    parts without FLOPs           (F_l / e + the dense side's other parts) / dense step
    thin products                 + (T_l - F_l / e) / dense step, for the matrices
    every other part              + (T_l - T_d) / dense step
"""

import argparse
import statistics
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nativerank.bench.measure import check_sizes, measured_by, rounds
from nativerank.bench.record import raced, record
from nativerank.cli.output import add_json, check_json, write_json
from nativerank.layers import join_products
from nativerank.methods import build_optimizer, factorize, find_method
from nativerank.models import Preset, find_preset, hf_config, materialize, scaled, skeleton
from nativerank.train.parts import ATTENTION, DENSE, DOWN, GRADIENTS, HEAD, UP, gflop_of, parts_of
from nativerank.train.step import train_step

MATRICES = (DOWN, UP, DENSE)
WITH_FLOPS = (*MATRICES, ATTENTION, HEAD)
OUTSIDE = "outside of operators"


class Watch(TorchDispatchMode):
    """Processor seconds of every operator of a forward and backward pass while it is entered, by part of the model.

    An operator of the backward pass runs for a node of the graph, whose number tells during which part it was made.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.stack, self.backward = [HEAD], False  # outside of the base model all is head and loss
        self.numbers, self.names = [0], [HEAD]
        self.seconds: dict[str, float] = defaultdict(float)
        self.handles: list[Any] = []
        for module, part in parts_of(model, compiled=False).items():
            self.handles.append(module.register_forward_pre_hook(lambda *_, part=part: self._go([*self.stack, part])))
            self.handles.append(module.register_forward_hook(lambda *_: self._go(self.stack[:-1])))

    def _go(self, stack: list[str]) -> None:
        self.stack = stack
        self.numbers.append(torch.autograd._get_sequence_nr())
        self.names.append(stack[-1])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node = torch._C._current_autograd_node()
        self.backward |= node is not None
        began = time.thread_time()
        out = function(*args, **(kwargs or {}))
        took = time.thread_time() - began
        if node is not None:
            self.seconds[self._made(node._sequence_nr())] += took
        elif not self.backward:  # what comes after the backward pass has a phase of its own
            self.seconds[self.stack[-1]] += took
        return out

    def _made(self, number: int) -> str:
        """The part during which this node was made; those that add gradients up have a number beyond all."""
        if number >= self.numbers[-1]:
            return HEAD if number < 2**62 else GRADIENTS
        return self.names[bisect_right(self.numbers, number) - 1]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class Side:
    """A model with its optimizer, the seconds of its plain steps by phase, and of its watched ones by part."""

    def __init__(self, preset: Preset, method: str):
        model = skeleton(hf_config(preset))
        if find_method(method).layer:
            factorize(model, method, rank_ratio=preset.ratio, rank=preset.value)
        self.model = materialize(model, seed=0, init_scale=1.0, init="sampled").train()
        join_products(self.model)
        self.optimizer = build_optimizer(self.model, method)
        self.phases: list[dict[str, float]] = []
        self.watched: list[dict[str, float]] = []

    def step(self, ids: torch.Tensor) -> dict[str, float]:
        return train_step(self.model, self.optimizer, [(ids[:, :-1], ids[:, 1:], None)], 1, clip=1.0).seconds

    def watched_step(self, ids: torch.Tensor) -> None:
        watch = Watch(self.model)
        with watch:
            self.step(ids)
        watch.remove()
        self.watched.append(dict(watch.seconds))

    def parts(self) -> dict[str, float]:
        """Milliseconds by part, which add up to the plain step."""
        plain = {name: 1e3 * statistics.median(step[name] for step in self.phases) for name in self.phases[0]}
        names = sorted({name for step in self.watched for name in step})
        found = {name: 1e3 * statistics.median(step.get(name, 0.0) for step in self.watched) for name in names}
        found[OUTSIDE] = plain["forward"] + plain["backward"] - sum(found.values())
        return found | {name: plain[name] for name in ("clip", "optimizer")}


def waterfall(low: Side, dense: Side, context: int, tokens: int) -> dict[str, float]:
    """{what: share of the dense step}: the first is the FLOP ratio, to which all others but the last are added."""
    F_l, F_d = (gflop_of(side.model, context, tokens, False) for side in (low, dense))
    T_l, T_d = low.parts(), dense.parts()
    products_l, products_d, milliseconds_l, milliseconds_d = (
        sum(found.get(name, 0.0) for name in MATRICES) for found in (F_l, F_d, T_l, T_d)
    )
    whole, shared = sum(T_d.values()), T_d[ATTENTION] + T_d[HEAD]
    at_dense_speed = products_l / products_d * milliseconds_d
    flops = sum(F_l.values()) / sum(F_d.values())
    by_time = (at_dense_speed + shared) / (milliseconds_d + shared)
    with_rest = (at_dense_speed + whole - milliseconds_d) / whole
    rows = {"exact FLOP ratio": flops, "attention and head weigh more in time": by_time - flops}
    rows["parts without FLOPs, as on the dense side"] = with_rest - by_time
    rows["thin products are slower per FLOP"] = (milliseconds_l - at_dense_speed) / whole
    for name in sorted((set(T_l) | set(T_d)) - set(MATRICES)):
        rows[f"{name}: low rank minus dense"] = (T_l.get(name, 0.0) - T_d.get(name, 0.0)) / whole
    return rows | {"step": sum(T_l.values()) / whole}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--method", default="spectron")
    parser.add_argument("--d_model", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    add_json(parser)
    a = parser.parse_args(arguments)
    try:
        check_json(a.json)
        check_sizes(d_model=a.d_model, layers=a.layers, batch_size=a.batch_size, repeats=a.repeats)
        if find_method(a.method).layer is None:
            raise ValueError(f"--method must be a low-rank method, got {a.method}")
        preset = scaled(find_preset(a.preset), a.d_model, a.layers)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    device = torch.device("cpu")
    batch_size, generator = a.batch_size or preset.batch_size, torch.Generator().manual_seed(0)
    tokens = batch_size * preset.context
    sides = {a.method: Side(preset, a.method), "dense-adamw": Side(preset, "dense-adamw")}
    with measured_by("cpu", [1], device):
        for names, counts in rounds(list(sides), a.repeats, warmup=1):
            ids = torch.randint(preset.vocab_size, (batch_size, preset.context + 1), generator=generator)
            for side in map(sides.__getitem__, names):
                side.step(ids)  # the other side's memory was another
                if counts:
                    side.phases.append(side.step(ids))
                    side.watched_step(ids)
    low, dense = sides.values()
    rows = waterfall(low, dense, preset.context, tokens)
    gflop = {name: gflop_of(side.model, preset.context, tokens, False) for name, side in sides.items()}
    milliseconds = {name: side.parts() for name, side in sides.items()}
    steps = {name: [sum(phases.values()) for phases in side.phases] for name, side in sides.items()}
    case = {"d_model": preset.d_model, "layers": preset.layers, "tokens": tokens, "threads": 1}
    figures = {"waterfall": rows, "milliseconds": milliseconds, "gflop": gflop}
    settings = {key: value for key, value in vars(a).items() if key != "json"} | {"clock": "cpu"}
    found = record("waterfall", settings, [raced(case, "dense-adamw", steps, **figures)], device)
    if write_json(found, a.json):
        return
    for what, share in rows.items():
        print(f"{what:<60}{share:+8.3f}")
    print(f"{'plain steps, median of paired ratios':<60}{found['cases'][0]['ratio'][a.method]:+8.3f}")
    print(f"{'milliseconds':<30}" + "".join(f"{name:>14}" for name in sides))
    for name in sorted(set().union(*milliseconds.values())):
        print(f"{name:<30}" + "".join(f"{values.get(name, 0.0):14.1f}" for values in milliseconds.values()))


if __name__ == "__main__":
    main()

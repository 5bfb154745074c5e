"""One training step of LLaMA-3-70B's hidden matrices at rank 32: peak memory and seconds per phase.

| part | what is done |
|---|---|
| variants | each in a fresh process: two steps; peak resident memory of the process, phases of the second step |
| literal | in one process, taking turns with our plain step: foreach AdamW and `torch.linalg.qr` matrix by matrix |
| arithmetic | nothing: the SCT paper's table of bytes, and the stack's, from the shapes |

Memory is the whole process's, PyTorch's own 0.2 GB included. Seconds depend on the machine and its other work; ratios
of the race mean something.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

from nativerank.accounting.memory import LEFT_OUT, SCT_RANK, llama_shapes, sct_table, state_of
from nativerank.bench.measure import check_sizes, rounds
from nativerank.bench.record import record
from nativerank.bench.stack70b import PHASES, PRESET, STATES, Session, Variant
from nativerank.layers.base import factor_layers
from nativerank.models import find_preset

RECORD: tuple[dict[str, Any], ...] = (
    {},
    {"layerwise": True},
    {"layerwise": True, "state": "bf16"},
    {"layerwise": True, "state": "momentum-bf16"},
    {"layerwise": True, "state": "momentum-bf16", "gqa": True, "attention": "real"},
    {"layerwise": True, "state": "momentum-bf16", "attention": "real"},
    {"layerwise": True, "gqa": True, "tokens": 128},
)


def bench_step70b(
    layerwise: bool = False,
    state: str = "fp32",
    gqa: bool = False,
    attention: str = "simplified",
    tokens: int = 16,
    layers: int = 80,
    everything: bool = False,
    literal: bool = False,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measures one variant, or all of the record.

    Args:
        layerwise, state, gqa, attention, tokens, layers: the variant, see `stack70b.Variant`.
        everything: the variants of RECORD and the race instead; only `layers` and `repeats` count then.
        literal: race the plain step against the literal form too.
        repeats: recorded rounds of the race, after one unrecorded.
    """
    check_sizes(tokens=tokens, layers=layers, repeats=repeats)
    if state not in STATES or attention not in ("simplified", "real"):
        raise ValueError(f"--state is one of {', '.join(STATES)} and --attention simplified or real")
    one = {"layerwise": layerwise, "state": state, "gqa": gqa, "attention": attention, "tokens": tokens}
    chosen = [Variant(**{"layers": layers, **changes}) for changes in (RECORD if everything else [one])]
    preset = find_preset(PRESET)
    assert preset.kv_heads
    grouped = preset.d_model * preset.kv_heads // preset.heads
    arithmetic = {
        "matrices": sct_table(),
        "stack": state_of(shapes_of(preset, layers, preset.d_model), SCT_RANK),
        "stack_gqa": state_of(shapes_of(preset, layers, grouped), SCT_RANK),
        "left_out": LEFT_OUT,
    }
    return record(
        "step70b",
        {"layers": layers, "repeats": repeats, "everything": everything} | ({} if everything else one),
        [in_a_fresh_process(variant) for variant in chosen],
        torch.device("cpu"),
        literal=race_literal(Variant(layers=layers), repeats) if literal or everything else [],
        arithmetic=arithmetic,
    )


def shapes_of(preset: Any, layers: int, kv_width: int) -> list[tuple[int, int]]:
    """The stack's matrices."""
    return list(llama_shapes(preset.d_model, preset.d_ffn, layers, kv_width).values())


def in_a_fresh_process(variant: Variant) -> dict[str, Any]:
    """What `stack70b.measure` finds where nothing else has been done.

    Raises:
        ValueError: the process ended without a result, which mostly means that memory ran out.
    """
    command = [sys.executable, "-m", "nativerank.bench.stack70b", json.dumps(dataclasses.asdict(variant))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed, so probably out of memory"])[-1]
        raise ValueError(f"the process of {variant} ended with {done.returncode}: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def race_literal(variant: Variant, repeats: int) -> list[dict[str, Any]]:
    """Plain steps in both forms by turns, with one thread and with PyTorch's own number of them.

    On one stack and one optimizer state, so that memory suffices for both.
    """
    session, before = Session(dataclasses.replace(variant, layerwise=False)), torch.get_num_threads()
    races = []
    try:
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            races.append({"threads": threads, **_race(session, repeats)})
    finally:
        torch.set_num_threads(before)
    return races


def _race(session: Session, repeats: int) -> dict[str, Any]:
    steps: dict[str, Callable[[], Any]] = {"ours": session.step, "literal": lambda: literal_step(session)}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for order, counts in rounds(list(steps), repeats, warmup=1):
        for name in order:
            steps[name]()
            if counts:
                seconds[name].append({**session.seconds, "step": sum(session.seconds.values())})

    def ratio(phase: str) -> float:
        pairs = zip(seconds["ours"], seconds["literal"], strict=True)
        return statistics.median(a[phase] / b[phase] for a, b in pairs)

    medians = {
        name: {phase: statistics.median(row[phase] for row in rows) for phase in (*PHASES, "step")}
        for name, rows in seconds.items()
    }
    return {"repeats": repeats, **medians, "ratio": {phase: ratio(phase) for phase in (*PHASES, "step")}}


def literal_step(session: Session) -> float:
    """The step as the paper writes it, with torch's own parts; the same state as ours."""
    loss = session.forward_backward()
    optimizer, group = session.optimizer, session.optimizer.param_groups[0]
    params = [p for g in optimizer.param_groups for p in g["params"]]
    state = [optimizer.state[p] for p in params]
    with torch.no_grad():
        adamw(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in state],
            [s["exp_avg_sq"] for s in state],
            [],
            [s["step"] for s in state],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        session.mark("optimizer")
        for layer in factor_layers(session.model).values():
            for tall in (layer.up.weight, layer.down.weight.mT):
                Q, R = torch.linalg.qr(tall)
                tall.copy_(Q * R.diagonal().sign())
        session.mark("retraction")
    return loss

"""Writing text with factors, with the matrices they make, and with a dense twin: tokens per second and memory.

| form | what runs |
|---|---|
| factored | y = A (B^T x), a model of every rank ratio that is asked for |
| merged | the first of them with W = A B^T formed in memory: what `nativerank generate --form merged` does |
| dense | the stock architecture, freshly drawn: shapes as merged, so their ratio shows the noise of the machine |

Transformers' generate runs as in `nativerank generate`, greedily, on random prompts and without an end; forms take
turns. Prefill is the time to the first token, decode that of the others. Memory is measured in a fresh process for each
form (`bench.generate_memory`); bytes of weights and cache are those of the tensors.

The times go into the user cache, where `--form auto` finds them, unless there are too few of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nativerank.accounting.memory import weights_bytes
from nativerank.bench.generate_memory import add_memory, measure_memory
from nativerank.bench.generate_sides import PHASES, Side, Source, make_sides, random_prompts, write_once
from nativerank.bench.measure import check_sizes, ratio, rounds
from nativerank.bench.record import record
from nativerank.hub.forms import DENSE, FACTORED, MERGED, place, remember, size_of
from nativerank.models import context_length, count_parameters
from nativerank.train.setup import pick_device

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LEAST_REPEATS, LEAST_TOKENS = 3, 16  # of a measurement that `--form auto` may go by


def bench_generate(
    folder: str | None = None,
    preset_name: str = "demo",
    ratios: Sequence[float] | None = None,
    d_model: int | None = None,
    layers: int | None = None,
    batches: Sequence[int] = BATCHES,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    repeats: int = 3,
    memory: bool = True,
    clock: str = "wall",
    device: str = "cpu",
) -> dict[str, Any]:
    """Times all forms against each other and measures their memory.

    Args:
        folder: a run, checkpoint or factored model folder, instead of the preset.
        preset_name: shapes. ratios: rank ratios, instead of the preset's. d_model, layers: another size.
        batches: sequences at a time.
        prompt_tokens, new_tokens: of every sequence.
        repeats: recorded generations of each form and batch, after one unrecorded.
        memory: False leaves out the fresh processes that measure it.
        clock: "wall", or "cpu": the processor time of this process, for a machine that has other work to do.
        device: cpu, cuda or mps.

    Raises:
        ValueError: sizes below 1, processor time of several threads or of another device, a length beyond the model's
            context, or a folder without factors.
    """
    check_sizes(
        repeats=repeats, d_model=d_model, layers=layers, batches=min(batches, default=0), prompt_tokens=prompt_tokens
    )
    source = Source(folder, preset_name, d_model, layers)
    check_request(source, ratios, new_tokens, clock, device)
    batches, where = sorted(set(batches)), pick_device(device)
    asked: list[float | None] = [*dict.fromkeys(ratios or [])] or [None]
    sides, merge_seconds = make_sides(source, asked, where, clock)
    check_context(sides[0].model, prompt_tokens + new_tokens)
    race(sides, batches, prompt_tokens, new_tokens, repeats, clock)
    found = [summary(side, batches, prompt_tokens, new_tokens) for side in sides]
    if memory:
        for side, one in zip(sides, found, strict=True):
            add_memory(one, measure_memory(source, side, batches, prompt_tokens, new_tokens, device))
    settings = {
        **(dict(folder=str(folder)) if folder else dict(preset=preset_name, d_model=source.shapes().d_model)),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "ratios": list(ratios or []),
        "layers": layers,
        "batches": batches,
        "repeats": repeats,
        "memory": memory,
        "clock": clock,
        "device": device,
    }
    result = record(
        "generate",
        settings,
        found,
        where,
        place=place(where),
        merge_seconds=merge_seconds,
        speedup=[speedups(side, sides, batches) for side in sides if side.form == FACTORED],
        merged_over_dense=speedups(side_of(sides, MERGED), sides, batches, DENSE),
    )
    result["remembered"] = repeats >= LEAST_REPEATS and new_tokens >= LEAST_TOKENS
    if result["remembered"]:
        remember(for_auto(result))
    return result


def check_request(source: Source, ratios: Sequence[float] | None, new_tokens: int, clock: str, device: str) -> None:
    """Raises a ValueError for what cannot be measured, or not together."""
    if new_tokens < 2:
        raise ValueError(f"--new_tokens must be at least 2, the first one is the prefill's; got {new_tokens}")
    if source.folder and (ratios or source.d_model or source.layers):
        raise ValueError(f"{source.folder} has its sizes and ranks; leave out --rank.ratio, --d_model and --layers")
    if clock == "cpu" and (device != "cpu" or torch.get_num_threads() > 1):
        raise ValueError("--clock cpu adds up the time of all threads; use --device cpu and OMP_NUM_THREADS=1")


def check_context(model: nn.Module, tokens: int) -> None:
    """Raises a ValueError if so many tokens are beyond the model."""
    hf: Any = model
    context = context_length(hf.config)
    if context and tokens > context:
        raise ValueError(f"--prompt_tokens and --new_tokens are {tokens} together, the model's context only {context}")


def race(
    sides: list[Side], batches: Sequence[int], prompt_tokens: int, new_tokens: int, repeats: int, clock: str
) -> None:
    """Every form by turns at each batch, on the same prompts."""
    for batch in batches:
        device = next(sides[0].model.parameters()).device
        ids = random_prompts(sides[0].model, batch, prompt_tokens, device)
        for order, counts in rounds(sides, repeats, warmup=1):
            for side in order:
                seconds = write_once(side.model, ids, new_tokens, clock)
                if counts:
                    side.record(batch, seconds)


def summary(side: Side, batches: Sequence[int], prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """What is known of one form."""
    size = size_of(side.model) if side.form == FACTORED else None
    return {
        "form": side.form,
        "ratio": side.rank_ratio,
        "parameters": count_parameters(side.model),
        "weights_bytes": weights_bytes(side.model),
        "products": size and size._asdict(),
        "batches": [side.row(batch, prompt_tokens, new_tokens) for batch in batches],
    }


def side_of(sides: list[Side], form: str) -> Side:
    """The first one of a form."""
    return next(side for side in sides if side.form == form)


def speedups(side: Side, sides: list[Side], batches: Sequence[int], over: str = MERGED) -> dict[str, Any]:
    """How many times as fast a side is as the one of another form, and in words where it is faster."""
    other, found = side_of(sides, over), []
    for batch in batches:
        pairs = {p: ratio(other.seconds[batch][p], side.seconds[batch][p]) for p in (*PHASES, "whole")}
        found.append({"batch": batch, **pairs})
    words = {p: in_words(batches, [row[p] > 1 for row in found]) for p in (*PHASES, "whole")}
    return {"form": side.form, "ratio": side.rank_ratio, "over": over, "batches": found, "faster": words}


def in_words(batches: Sequence[int], faster: Sequence[bool]) -> str:
    """At which of the ascending batches something holds."""
    count, n = sum(faster), len(faster)
    if count in (0, n):
        return "at every batch measured" if count else "at no batch measured"
    if all(faster[:count]):
        return f"up to batch {batches[count - 1]}"
    if all(faster[n - count :]):
        return f"from batch {batches[n - count]} on"
    return "at batch " + ", ".join(str(batch) for batch, wins in zip(batches, faster, strict=True) if wins)


def noise(result: dict[str, Any]) -> float:
    """How far the times of merged and dense, which have equal shapes, are apart at most, as a part of them."""
    return float(max(abs(row["whole"] - 1) for row in result["merged_over_dense"]["batches"]))


def for_auto(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The times as `hub.forms` reads them, one entry for each factored side."""

    def times(row: dict[str, Any]) -> dict[str, float]:
        tokens = result["settings"]["new_tokens"] - 1
        return {"prefill_seconds": row["prefill_seconds"], "token_seconds": row["decode_seconds"] / tokens}

    merged = next(one for one in result["cases"] if one["form"] == MERGED)["batches"]
    return [
        {
            "place": result["place"],
            **one["products"],
            "merge_seconds": result["merge_seconds"],
            "noise": noise(result),
            "prompt_tokens": result["settings"]["prompt_tokens"],
            "new_tokens": result["settings"]["new_tokens"],
            "batches": [
                {"batch": ours["batch"], FACTORED: times(ours), MERGED: times(theirs)}
                for ours, theirs in zip(one["batches"], merged, strict=True)
            ],
        }
        for one in result["cases"]
        if one["form"] == FACTORED
    ]

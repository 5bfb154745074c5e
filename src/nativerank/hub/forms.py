"""Factors or the matrix they make: in which form a model writes faster.

    factored   y = A (B^T x): r (d_in + d_out) weights to read and multiply, two products one after the other
    merged     y = W x with W = A B^T formed in memory before: d_in d_out weights, one product

Both give the same text up to rounding. Which one is faster depends on ranks, batch and machine, so `--form auto` asks

1. the measurements of `nativerank bench generate` in the user cache, if one was made on this machine, with this device
   and number of threads, for a model of similar size and rank: the form that is done first, the time that merging
   itself takes included, if it is ahead by more than that measurement's noise (`MARGIN` at least);
2. else the multiplications of one token, which for both forms are the weights that have to be read: the fewer. That
   rule cannot see the second product's overhead, which is what a measurement is for.
"""

import json
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from nativerank.data.integrity import cache_dir
from nativerank.layers import to_dense_modules
from nativerank.layers.base import factor_layers

FACTORED, MERGED, DENSE, AUTO = "factored", "merged", "dense", "auto"
FORMS = (AUTO, FACTORED, MERGED)
FILE, VERSION = "generate-forms.json", 2
SIMILAR_SIZE, SIMILAR_SHARE = 4.0, 1.25  # how far a measured model may be, as factors
MARGIN = 0.05  # by how much a form must be ahead; timings of the same shapes differ by that much on a quiet machine


class Work(NamedTuple):
    """What is to be written: sequences at a time, tokens of each before and after."""

    batch: int
    prompt_tokens: int
    new_tokens: int


class Size(NamedTuple):
    """Multiplications of one token in the factored matrices.

    Attributes:
        dense: with every one of them merged.
        share: with factors, as a part of that.
    """

    dense: float
    share: float


class Choice(NamedTuple):
    """A form and why, in a few words."""

    form: str
    reason: str


def take_form(model: nn.Module, form: str, work: Work, device: torch.device) -> Choice:
    """Brings a model on the CPU into the form that was asked for, in place.

    Args:
        model: with factors or without.
        form: one of FORMS.
        work: what `auto` decides by.
        device: where the model will run.

    Raises:
        ValueError: an unknown form, or factors asked of a dense model.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if not factor_layers(model):
        if form == FACTORED:
            raise ValueError("form factored: the model holds no factors")
        return Choice(DENSE, "the model holds no factors")
    choice = choose(size_of(model), work, device) if form == AUTO else Choice(form, "as asked")
    if choice.form == MERGED:
        to_dense_modules(model)
    return choice


def size_of(model: nn.Module) -> Size:
    """Of a model with factors, by what its layers declare."""
    factored = dense = 0.0
    for layer in factor_layers(model).values():
        gemms, factors = layer.gemms(), layer.factors()
        factored += sum(g.k * g.n * g.count for g in gemms)
        dense += factors[0].shape[-2] * factors[-1].shape[-2] * gemms[0].count
    return Size(dense, factored / dense)


def choose(size: Size, work: Work, device: torch.device) -> Choice:
    """The faster form, by measurements if there are any, else by counting."""
    found = nearest(size, measurements(), place(device))
    if found is None:
        return counted(size, "`nativerank bench generate` measures")
    row = min(found["batches"], key=lambda row: abs(math.log2(row["batch"] / work.batch)))
    seconds = {form: predicted(row, form, found, work) for form in (FACTORED, MERGED)}
    form = min(seconds, key=lambda form: seconds[form])
    ahead, margin = max(seconds.values()) / seconds[form], max(found["noise"], MARGIN)
    other = "" if (found["dense"], found["share"]) == tuple(size) else " of an alike model"
    where, merging = f"measured at batch {row['batch']}{other}", " with merging" if found["merge_seconds"] else ""
    if ahead - 1 <= margin:
        return counted(size, f"{where}, the forms are within the noise of {margin:.0%}{merging}")
    return Choice(form, f"{where}, {ahead:.2f}x as fast{merging}")


def counted(size: Size, why: str) -> Choice:
    """The form with fewer multiplications."""
    form = FACTORED if size.share < 1 else MERGED
    return Choice(form, f"counted, {size.share:.2f} of the merged multiplications; {why}")


def predicted(row: dict[str, Any], form: str, measurement: dict[str, Any], work: Work) -> float:
    """Seconds for the work, as the measured model would take."""
    prefill = row[form]["prefill_seconds"] * work.prompt_tokens / measurement["prompt_tokens"]
    once = measurement["merge_seconds"] if form == MERGED else 0.0
    return float(once + prefill + row[form]["token_seconds"] * work.new_tokens)


def nearest(size: Size, known: list[dict[str, Any]], where: dict[str, Any]) -> dict[str, Any] | None:
    """The measurement here of the model that is most like this one; None if none is like it."""
    far: dict[int, float] = {}
    for i, one in enumerate(known):
        apart = abs(math.log(one["dense"] / size.dense)) / math.log(SIMILAR_SIZE)
        off = abs(math.log(one["share"] / size.share)) / math.log(SIMILAR_SHARE)
        if one["place"] == where and max(apart, off) <= 1:
            far[i] = apart + off
    return known[min(far, key=lambda i: far[i])] if far else None


def place(device: torch.device) -> dict[str, Any]:
    """What speed depends on besides model and work."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "threads": None}
    return {"device": f"{device.type}: {processor()}, {os.cpu_count()} cores", "threads": torch.get_num_threads()}


def processor() -> str:
    """The name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def measurements() -> list[dict[str, Any]]:
    """All of them; none where there is no file or not a readable one, which the next benchmark writes anew."""
    try:
        stored = json.loads(measurements_file().read_text(encoding="utf-8"))
        found: list[dict[str, Any]] = stored["measurements"] if stored["version"] == VERSION else []
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return []


def measurements_file() -> Path:
    """Where measurements are kept."""
    return cache_dir() / FILE


def remember(new: list[dict[str, Any]]) -> Path:
    """Adds measurements to the file, in the place of those of the same size, place and lengths."""

    def key(one: dict[str, Any]) -> str:
        return json.dumps([one[k] for k in ("place", "dense", "share", "prompt_tokens", "new_tokens")])

    fresh = {key(one) for one in new}
    kept = [one for one in measurements() if key(one) not in fresh]
    file = measurements_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": VERSION, "measurements": kept + new}, indent=1)
    temporary = tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8")
    try:
        with temporary:
            temporary.write(text)
        os.replace(temporary.name, file)
    except OSError:  # a full disk
        Path(temporary.name).unlink(missing_ok=True)
        raise
    return file

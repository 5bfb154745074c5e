"""The model card: README.md of a model folder, which says what the model is and how to load it.

What can be counted is counted on the model itself; how it was trained says who trained it (`Training`), and that stands
in config.json too, so that an export of the folder can repeat it. Everything that comes from outside is put into table
cells, never into the YAML block at the top. The licence is left to whoever publishes the model.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from nativerank.distributed.wrap import original_class
from nativerank.layers.base import factor_layers
from nativerank.layers.pretrained import CONFIG, RECORD, kind_of
from nativerank.version import __version__

CARD = "README.md"
TRAINING = "training"  # its key in config.json, under "nativerank"
FORMULAS = {"lowrank": "A B^T", "spectral": "U diag(s) V^T"}


@dataclass(frozen=True)
class Paper:
    """A publication, as BibTeX has it."""

    key: str
    authors: str
    title: str
    year: int
    arxiv: str

    def bibtex(self) -> str:
        return (
            f"@misc{{{self.key},\n  author = {{{self.authors}}},\n  title = {{{self.title}}},\n"
            f"  year = {{{self.year}}},\n  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
        )


SPECTRON = Paper(
    "janson2026spectron",
    "Janson and Oyallon and Belilovsky",
    "Stabilizing Native Low-Rank LLM Pretraining",
    2026,
    "2602.12429",
)
PAPERS: dict[str, Paper] = {
    "spectron": SPECTRON,
    "stiefel-spectron": SPECTRON,  # ours, built on it
    "self-guided": Paper(
        "wei2024building",
        "Wei and Moalla and Pascanu and Gulcehre",
        "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
        2024,
        "2406.16450",
    ),
    "sct": Paper(
        "kohlberger2026spectral",
        "Kohlberger, B. R.",
        "Spectral Compact Training: Pre-Training Large Language Models via Permanent Truncated SVD and Stiefel QR "
        "Retraction",
        2026,
        "2604.00733",
    ),
    "tsvd": Paper(
        "kamali2026tsvd",
        "Kamali and Schweighofer and Shahrzad and Francon and Hodjat and Miikkulainen",
        "Efficient Pre-Training of LLMs through Truncated SVD Layers",
        2026,
        "2605.28573",
    ),
}
NOTES = {
    "stiefel-spectron": "stiefel-spectron is nativerank's own; it takes its step from Spectron.",
    "tsvd": "Of TSVD only the abstract was available: the method here is a reconstruction and may differ from it.",
}


@dataclass(frozen=True)
class Training:
    """How a model was trained, as far as it is known.

    Attributes:
        method: of the table of methods.
        data: names of the sources.
        data_sha256: hash of what was read, tokenizer and shards.
        tokens: that were trained on, repetitions included. steps: updates.
        metrics: name -> number, such as "validation loss (nats per token)".
    """

    method: str | None = None
    data: tuple[str, ...] = ()
    data_sha256: str | None = None
    tokens: int | None = None
    steps: int | None = None
    metrics: Mapping[str, float] | None = None


def read_training(folder: Path) -> Training | None:
    """What a model folder says of its training, None if nothing.

    Raises:
        ValueError: a config that cannot be read, or a value of another type, naming file and key.
    """
    said = f"cannot read what {folder / CONFIG} says of its training"
    try:
        known = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get(RECORD, {}).get(TRAINING)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{said}: {error}") from None
    if known is None:
        return None
    if not isinstance(known, dict):
        raise ValueError(f"{said}: {RECORD}.{TRAINING} is {repr(known)[:80]}, expected keys and values")
    found = {f.name: known[f.name] for f in fields(Training) if known.get(f.name) is not None}
    for key, value in found.items():
        wanted, fits = FORMS[key]
        if not fits(value):
            raise ValueError(f"{said}: {RECORD}.{TRAINING}.{key} is {repr(value)[:80]}, expected {wanted}")
    return Training(**found | {"data": tuple(found.get("data", ()))})


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # of the fields of Training in JSON
    "method": ("a name", _is_text),
    "data": ("a list of names", lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "data_sha256": ("a hash", _is_text),
    "tokens": ("a number of tokens", _is_count),
    "steps": ("a number of steps", _is_count),
    "metrics": (
        "names and numbers",
        lambda value: isinstance(value, dict) and all(type(number) in (int, float) for number in value.values()),
    ),
}


def model_card(model: nn.Module, config: Mapping[str, Any], training: Training | None = None) -> str:
    """The text of README.md.

    Args:
        model: as it is saved.
        config: its config.json.
        training: what is known of it.
    """
    layers, known = factor_layers(model), training or Training()
    name = original_class(model).__name__
    parts = [
        _front(model, name, "auto_map" in config),
        f"# {name}{', low rank' if layers else ''}",
        _what(model, layers, known),
    ]
    if layers:
        parts += ["## Ranks", _table(("modules", "matrix", "form", "rank", "count"), _rank_rows(layers))]
    if rows := list(_training_rows(known)):
        parts += ["## Training", _table(("", ""), rows)]
    if known.metrics:
        parts += ["## Evaluation", _table(("metric", ""), [(k, f"{v:.4f}") for k, v in known.metrics.items()])]
    parts += ["## How to load it", _loading(config, hasattr(model, "config"), bool(layers))]
    if paper := PAPERS.get(known.method or ""):
        note = [NOTES[known.method]] if known.method in NOTES else []
        parts += ["## Citation", *note, f"```bibtex\n{paper.bibtex()}\n```"]
    parts += ["## Licence", "Left to whoever publishes this model: `license:` in the block at the top of this file."]
    return "\n\n".join(parts) + "\n"


def _front(model: nn.Module, name: str, own_code: bool) -> str:
    """The YAML block; nothing in it comes from outside."""
    dense = not factor_layers(model)
    library = "transformers" if own_code or (dense and hasattr(model, "config")) else "nativerank"
    lines = ["---", f"library_name: {library}", "tags:", "- nativerank", "- low-rank"]
    if name.endswith("ForCausalLM"):
        lines.append("pipeline_tag: text-generation")
    return "\n".join([*lines, "---"])


def _what(model: nn.Module, layers: Mapping[str, Any], known: Training) -> str:
    total = sum(p.numel() for p in model.parameters())
    text = f"{total:,} parameters"
    if layers:
        factors = {id(p): p.numel() for layer in layers.values() for p in layer.parameters()}
        text += (
            f", {sum(factors.values()):,} of them in thin factors of {len(layers)} matrices or stacks of matrices, "
            f"which would have {_dense_numel(layers):,} as dense ones"
        )
    method = f" with the method `{_cell(known.method)}`" if known.method else ""
    return f"{text}. Made{method} by nativerank {__version__}."


def _dense_numel(layers: Mapping[str, Any]) -> int:
    return sum(getattr(m, "num_experts", 1) * m.in_features * m.out_features for m in layers.values())


def _rank_rows(layers: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    """One row for all layers with one last name, shape and kind."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for name, layer in layers.items():
        shape, kind = f"{layer.out_features} x {layer.in_features}", kind_of(layer)
        rows.setdefault((name.rpartition(".")[2], shape, FORMULAS.get(kind, kind)), []).append(layer.rank)
    for (leaf, shape, form), ranks in rows.items():
        span = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
        yield leaf, shape, form, span, str(len(ranks))


def _training_rows(known: Training) -> Iterable[tuple[str, str]]:
    if known.data:
        yield "data", ", ".join(known.data)
    if known.data_sha256:
        yield "sha256 of tokenizer and shards", known.data_sha256
    if known.tokens is not None:
        yield "tokens trained on", f"{known.tokens:,}"
    if known.steps is not None:
        yield "steps", f"{known.steps:,}"


def _loading(config: Mapping[str, Any], hugging_face: bool, factored: bool) -> str:
    auto = "AutoModelForCausalLM" if "auto_map" in config else "AutoModel"
    stock = f'model = {auto}.from_pretrained("FOLDER"'
    if not hugging_face:
        ways = ['model = nr.load("FOLDER", into=module)  # a module of the same class, dense or factorized alike']
    elif not factored:
        name = config["architectures"][0]
        return _code([f"from transformers import {name}", "", f'model = {name}.from_pretrained("FOLDER")'])
    else:
        ways = ['model = nr.load("FOLDER")  # strict: what is missing or left over is an error']
    text = _code(["import nativerank as nr", "", *ways])
    if hugging_face:
        text += "\n\nThrough transformers, pipelines included:\n\n"
        text += _code([f"from transformers import {auto}", "", "nr.register()", f"{stock})"])
    if "auto_map" in config:
        text += "\n\nWhere nativerank is not installed, with the code in this folder:\n\n"
        text += _code([f"{stock}, trust_remote_code=True)"])
    return text


def _code(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str | None) -> str:
    """Text that stays within its table cell and is no image, link or markup there."""
    plain = " ".join(str(text).split()).replace("<", "&lt;").replace("`", "'")
    return re.sub(r"([\\|\[\]!])", r"\\\1", plain)

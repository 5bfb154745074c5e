"""A dense model into factors that training goes on from.

    any Hugging Face folder, or the dense model/ of a run
        -> loss on a text -> W ~ W_r, matrix by matrix -> loss on the same text -> a factored folder with the tokenizer

A text and its losses are for causal language models; others (images, encoders) are converted without.
Everything that can be refused is refused before the first decomposition, and the new folder appears when it is
complete. Weights are read, truncated and written in float32 (the truncation itself runs in float64), so that
`nativerank train --init DIR` starts from exactly the loss that is reported.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nativerank.config import RankConfig
from nativerank.data.tokenizer import load_tokenizer
from nativerank.evaluate.loss import Loss
from nativerank.evaluate.text import Windows, open_text, reader_of, text_loss, window
from nativerank.files import check_free, check_writable
from nativerank.hub.companions import beside, check_tokenizer
from nativerank.hub.load import TOKENIZER, layer_kind, load, model_folder, outline
from nativerank.hub.save import save
from nativerank.layers import FactorizeReport, factorize_modules
from nativerank.models import count_parameters, predicts_next_token

KINDS = ("lowrank", "spectral")
EVAL_TOKENS = 32768
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; `before` and `after` are the losses, None without a text.

    `causal`: whether it is a causal language model, which `nativerank train` takes up.
    """

    source: str
    out: str
    kind: str
    report: FactorizeReport
    parameters: dict[str, dict[str, int]]
    before: Loss | None
    after: Loss | None
    context: int | None
    causal: bool = True

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        losses = {"before": self.before, "after": self.after} if self.before else {}
        return {
            "source": self.source,
            "out": self.out,
            "kind": self.kind,
            "parameters": self.parameters,
            "matrices": [entry.as_dict() for entry in self.report.entries],
            "loss": {name: _plain(loss) for name, loss in losses.items() if loss} | {"context": self.context}
            if losses
            else None,
        }


def convert(
    source: str | Path,
    out: str | Path,
    rank: RankConfig,
    *,
    kind: str = "lowrank",
    data: str | Path | None = None,
    eval_tokens: int | None = EVAL_TOKENS,
    watch: Watch = lambda what, done, total: None,
) -> Conversion:
    """Writes the factored form of a dense model into a new folder.

    Args:
        source: model or run folder.
        out: must not exist, or be empty.
        rank: how thin, and which matrices; its `init` plays no part.
        kind: which layer holds the factors, "lowrank" A B^T or "spectral" U diag(s) V^T.
        data: a text file, read with the model's own tokenizer, or a prepared folder, whose validation split is read.
        eval_tokens: about how much of it to predict, spread evenly; None for all.
        watch: told what is going on: name of the matrix, its number, how many there are (0 for the losses).

    Raises:
        ValueError: whatever is wrong with the arguments, the folder or the text.
    """
    folder = model_folder(Path(source))
    check_request(folder, Path(out), rank, kind, eval_tokens)
    if data is not None and not Path(data).exists():
        raise ValueError(f"--data {data}: no such file or folder")
    watch("reading weights", 0, 0)
    model = load(folder)
    if data is not None and not predicts_next_token(model):
        raise ValueError(f"--data {data}: {folder} holds a {type(model).__name__}, which predicts no next token")
    counts = {"before": count_parameters(model)}
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None
    check_tokenizer(tokenizer, model, str(folder))
    reader, windows = reader_of(model, tokenizer, str(folder)), Windows(max_tokens=eval_tokens)
    with open_text(Path(data), reader) if data is not None else nullcontext() as text:
        watch("loss of the dense model", 0, 0)
        before = text_loss(reader, text, windows) if text else None
        report = factorize_modules(model, kind=kind, progress=watch, **choices(rank))
        counts["after"] = count_parameters(model)
        watch("loss of the factors", 0, 0)
        after = text_loss(reader, text, windows) if text else None
    watch("writing", 0, 0)
    save(model, out, companions=beside(folder))
    context = window(model) if before else None
    return Conversion(str(source), str(out), kind, report, counts, before, after, context, predicts_next_token(model))


def check_request(folder: Path, out: Path, rank: RankConfig, kind: str, eval_tokens: int | None) -> None:
    """Raises a ValueError for what can be seen without reading weights, by converting the mere shapes too."""
    if kind not in KINDS:
        raise ValueError(f"--kind is {' or '.join(KINDS)}, got {kind!r}")
    if rank.ratio is None and rank.value is None and rank.energy is None:
        raise ValueError("how thin? give --rank.energy 0.95, --rank.ratio 0.25 or --rank.value 64")
    if eval_tokens is not None and eval_tokens < 1:
        raise ValueError(f"--eval_tokens must be at least 1, got {eval_tokens}")
    check_free(out)
    check_writable(out)
    beside(folder)
    if (found := layer_kind(folder)) is not None:
        raise ValueError(f"{folder} is in low rank already ({found} layers); convert takes a dense model")
    factorize_modules(outline(folder), kind=kind, **choices(rank))


def choices(rank: RankConfig) -> dict[str, Any]:
    """The arguments of `factorize_modules` that say how thin."""
    same = ("ratio", "value", "energy", "rule", "include", "exclude", "overrides")
    return {name: getattr(rank, name) for name in same}


def _plain(loss: Loss) -> dict[str, float]:
    names = ("nats", "perplexity", "bits_per_byte", "tokens")
    return {name: getattr(loss, name) for name in names}

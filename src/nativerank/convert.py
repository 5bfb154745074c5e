"""A dense model into factors that training goes on from.

    any Hugging Face causal LM folder, or the dense model/ of a run
        -> loss on a text -> W ~ W_r, matrix by matrix -> loss on the same text -> a factored folder with the tokenizer

Everything that can be refused is refused before the first decomposition, and the new folder appears when it is
complete. Weights are read, truncated and written in float32 (the truncation itself runs in float64), so that
`nativerank train --init DIR` starts from exactly the loss that is reported.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nativerank.config import RankConfig
from nativerank.data.prepare import prepare
from nativerank.data.shards import Dataset, Split
from nativerank.data.sources import CHUNK_BYTES
from nativerank.data.tokenizer import load_tokenizer
from nativerank.evaluate.loss import Loss, validation_loss
from nativerank.files import check_free
from nativerank.hub.generate import end_of_text
from nativerank.hub.load import TOKENIZER, base_config, layer_kind, load, model_folder, tokenizer_fingerprint
from nativerank.hub.save import save
from nativerank.layers import FactorizeReport, factorize_modules
from nativerank.models import count_parameters, skeleton

KINDS = ("lowrank", "spectral")
EVAL_TOKENS = 32768
LONGEST_CONTEXT = 1024  # of a window of the text; a model with a shorter one decides
LOGITS = 1 << 26  # at most so many numbers in the logits of one batch
# What belongs to a model besides config and weights: its tokenizer in every form, and how it is asked to generate.
COMPANIONS = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; `before` and `after` are the losses, None without a text."""

    source: str
    out: str
    kind: str
    report: FactorizeReport
    parameters: dict[str, dict[str, int]]
    before: Loss | None
    after: Loss | None
    context: int | None

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
    counts = {"before": count_parameters(model)}
    with open_text(data, folder, model) as text:
        watch("loss of the dense model", 0, 0)
        before = text_loss(model, text, eval_tokens)
        report = factorize_modules(model, kind=kind, progress=watch, **choices(rank))
        counts["after"] = count_parameters(model)
        watch("loss of the factors", 0, 0)
        after = text_loss(model, text, eval_tokens)
    watch("writing", 0, 0)
    save(model, out, companions=[folder / name for name in COMPANIONS if (folder / name).is_file()])
    return Conversion(str(source), str(out), kind, report, counts, before, after, window(model) if before else None)


def check_request(folder: Path, out: Path, rank: RankConfig, kind: str, eval_tokens: int | None) -> None:
    """Raises a ValueError for what can be seen without reading weights, by converting the mere shapes too."""
    if kind not in KINDS:
        raise ValueError(f"--kind is {' or '.join(KINDS)}, got {kind!r}")
    if rank.ratio is None and rank.value is None and rank.energy is None:
        raise ValueError("how thin? give --rank.energy 0.95, --rank.ratio 0.25 or --rank.value 64")
    if eval_tokens is not None and eval_tokens < 1:
        raise ValueError(f"--eval_tokens must be at least 1, got {eval_tokens}")
    check_free(out)
    if (found := layer_kind(folder)) is not None:
        raise ValueError(f"{folder} is in low rank already ({found} layers); convert takes a dense model")
    factorize_modules(skeleton(base_config(folder)), kind=kind, **choices(rank))


def choices(rank: RankConfig) -> dict[str, Any]:
    """The arguments of `factorize_modules` that say how thin."""
    same = ("ratio", "value", "energy", "rule", "include", "exclude", "overrides")
    return {name: getattr(rank, name) for name in same}


@contextmanager
def open_text(data: str | Path | None, folder: Path, model: nn.Module) -> Iterator[Split | None]:
    """The tokens of a text file or of a prepared folder's validation split, for the block; None without data."""
    if data is None:
        yield None
    elif Path(data).is_dir():
        yield prepared_text(Path(data), folder, model)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield encoded_text(Path(data), folder, model, Path(temporary) / "text")


def prepared_text(data: Path, folder: Path, model: nn.Module) -> Split:
    """The validation split of a prepared folder that fits the model."""
    dataset = Dataset.open(data)
    found = tokenizer_fingerprint(folder)
    if found is not None and found != dataset.tokenizer_sha256:
        raise ValueError(f"{data} was made with another tokenizer than that of {folder}")
    check_vocabulary(dataset, folder, model)
    split = dataset.split("val")
    if split.tokens < 2:
        raise ValueError(f"the validation split of {data} holds no tokens; give a text file")
    return split


def encoded_text(file: Path, folder: Path, model: nn.Module, where: Path) -> Split:
    """A text file as the model's own tokenizer reads it, written below `where`."""
    if not (folder / TOKENIZER).is_file():
        raise ValueError(f"{folder} holds no {TOKENIZER} to read {file} with; give a prepared data folder")
    tokenizer = load_tokenizer(folder / TOKENIZER)
    eot = tokenizer.id_to_token(end_of_text(model, tokenizer))
    options: dict[str, Any] = {"workers": 1, "chunk_bytes": CHUNK_BYTES, "quiet": True}
    prepare([str(file)], where, str(folder / TOKENIZER), val_fraction=0.0, eot=eot, **options)
    dataset = Dataset.open(where)
    check_vocabulary(dataset, folder, model)
    return dataset.split("train")


def check_vocabulary(dataset: Dataset, folder: Path, model: Any) -> None:
    """Raises a ValueError if the model has no row for some of the tokens."""
    rows = model.get_input_embeddings().num_embeddings
    if rows < dataset.vocab_size:
        raise ValueError(f"{folder} has a vocabulary of {rows}, smaller than the data's {dataset.vocab_size}")


def text_loss(model: nn.Module, text: Split | None, eval_tokens: int | None) -> Loss | None:
    """The model's loss on the text, None without one."""
    if text is None:
        return None
    hf: Any = model
    context = window(model)
    batch_size = max(1, min(8, LOGITS // (context * hf.get_input_embeddings().num_embeddings)))
    return validation_loss(model, text, context, batch_size, max_tokens=eval_tokens)


def window(model: Any) -> int:
    """Tokens of one window of the text."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(limit or LONGEST_CONTEXT, LONGEST_CONTEXT)


def _plain(loss: Loss) -> dict[str, float]:
    names = ("nats", "perplexity", "bits_per_byte", "tokens")
    return {name: getattr(loss, name) for name in names}

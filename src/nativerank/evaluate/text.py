"""A text as a model reads it, and how well it is predicted.

    a text file         encoded with the model's tokenizer, its start-of-text token first; as one document, or as
                        several where it is longer than DOCUMENT_BYTES
    a prepared folder   a split as it lies there, documents with end-of-text tokens between them

Every token but the first is predicted exactly once. In windows of `context` tokens, each beginning `stride` tokens
after the one before, it follows on at least context - stride + 1 tokens of its own text (all there are, near the
beginning). stride = context reads each token once and is what training calls its validation loss; stride = 1 gives
every token all the context that it can have, at `context` times the cost. Where the whole text fits into one window the
sum is the log likelihood of one forward pass. What is left for the last window of a split is read alone, as training
does it; that of a text file with as much before it as fits, as lm-evaluation-harness does it.

    bits per byte    = total nats / (ln 2 * UTF-8 bytes of the text)
    word perplexity  = exp(total nats / words), words as lm-evaluation-harness counts them: pieces between white space

The tokens between documents are predicted too and count as nats and tokens, but have no bytes.
"""

import math
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from nativerank.data.prepare import prepare
from nativerank.data.shards import Dataset, Split
from nativerank.data.sources import open_source
from nativerank.data.tokenizer import FILE_NAME, tokenizer_hash, vocab_size
from nativerank.evaluate.loss import Loss, check_document_mask, validation_loss
from nativerank.models import context_length, end_of_text, start_of_text

LONGEST_CONTEXT = 1024  # of a window, where nothing else is asked; a model with a shorter one decides
LOGITS = 1 << 26  # at most so many numbers in the logits of one batch
LARGEST_BATCH = 8
DOCUMENT_BYTES = 1 << 24  # a longer text file is read as several documents


@dataclass(frozen=True)
class Reader:
    """A model that reads text.

    Attributes:
        model: causal LM. tokenizer: its own, None where it is not known.
        start_id: the token before a text; None looks for one with a usual name. label: for messages.
    """

    model: nn.Module
    tokenizer: Tokenizer | None
    start_id: int | None
    label: str

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        hf: Any = self.model
        return int(hf.get_input_embeddings().num_embeddings)


def reader_of(model: nn.Module, tokenizer: Tokenizer | None, label: str) -> Reader:
    """The model as one that reads text, if it has a tokenizer and that a token to begin with."""
    start = None
    if tokenizer is not None:
        with suppress(ValueError):  # prepared data need none
            start = start_of_text(model, tokenizer, end_of_text(model, tokenizer))
    return Reader(model, tokenizer, start, label)


@dataclass(frozen=True)
class Text:
    """Tokens to predict.

    Attributes:
        split: the tokens. eot_id: what parts documents.
        words: None where the text itself is not at hand.
        full_last: how the last window is read, see above.
    """

    split: Split
    eot_id: int
    words: int | None = None
    full_last: bool = False


@dataclass(frozen=True)
class Windows:
    """How a text is read: None leaves the choice to `reading`.

    Attributes:
        context: tokens of a window. stride: by which the next one begins later. batch_size: windows at once.
        max_tokens: about how many tokens to predict, spread evenly; None for all.
        document_mask: whether attention restarts at each document.
    """

    context: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    max_tokens: int | None = None
    document_mask: bool = False


@contextmanager
def open_text(data: Path, reader: Reader, split: str = "val") -> Iterator[Text]:
    """The tokens of a text file or of a prepared folder's split, for the block.

    Raises:
        ValueError: no such file, not text, empty; made with another tokenizer; ids that the model has no row for.
    """
    if not data.exists():
        raise ValueError(f"--data {data}: no such file or folder")
    if data.is_dir():
        yield prepared_text(data, reader, split)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield encoded_text(data, reader, Path(temporary) / "text")


def prepared_text(data: Path, reader: Reader, split: str = "val") -> Text:
    """A split of a prepared folder, if it fits the model."""
    dataset = Dataset.open(data)
    if reader.tokenizer is not None and tokenizer_hash(reader.tokenizer) != dataset.tokenizer_sha256:
        raise ValueError(f"{data} was made with another tokenizer than that of {reader.label}")
    check_vocabulary(dataset.vocab_size, reader)
    tokens = dataset.split(split)
    if tokens.tokens < 2:
        which = "validation" if split == "val" else split
        raise ValueError(f"the {which} split of {data} holds no tokens; give a text file")
    return Text(tokens, dataset.eot_id)


def encoded_text(file: Path, reader: Reader, where: Path) -> Text:
    """A text file as the model's own tokenizer reads it, written below `where`."""
    tokenizer = own_tokenizer(reader, str(file))
    words = sum(len(re.split(r"\s+", document)) for document in open_source(str(file), chunk_bytes=DOCUMENT_BYTES))
    where.mkdir(parents=True)
    (where / FILE_NAME).write_text(tokenizer.to_str(), encoding="utf-8")
    start = None if reader.start_id is None else tokenizer.id_to_token(reader.start_id)
    options: dict[str, Any] = {"workers": 1, "chunk_bytes": DOCUMENT_BYTES, "quiet": True}
    prepare([str(file)], where / "data", str(where), val_fraction=0.0, eot=start, **options)
    dataset = Dataset.open(where / "data")
    return Text(dataset.split("train"), dataset.eot_id, words, full_last=True)


def own_tokenizer(reader: Reader, what: str) -> Tokenizer:
    """The tokenizer to read something with.

    Raises:
        ValueError: there is none, or one with tokens that the model has no row for.
    """
    if reader.tokenizer is None:
        raise ValueError(f"{reader.label} holds no {FILE_NAME} to read {what} with; prepared data folders need none")
    check_vocabulary(vocab_size(reader.tokenizer), reader)
    return reader.tokenizer


def check_vocabulary(needed: int, reader: Reader) -> None:
    """Raises a ValueError if the model has no row for some of the tokens."""
    if reader.vocab_size < needed:
        raise ValueError(
            f"{reader.label} has a vocabulary of {reader.vocab_size}, smaller than the {needed} of its text"
        )


def window(model: Any) -> int:
    """Tokens of one window, where nothing else is asked."""
    return min(context_length(model.config) or LONGEST_CONTEXT, LONGEST_CONTEXT)


def batch_of(context: int, vocab_size: int) -> int:
    """Windows at once, so that the logits stay small."""
    return max(1, min(LARGEST_BATCH, LOGITS // (context * vocab_size)))


def reading(reader: Reader, windows: Windows) -> Windows:
    """The same with every choice made.

    Raises:
        ValueError: a context longer than the model's, a stride longer than the context, or a number below 1.
    """
    check_windows(windows)
    context, limit = windows.context or window(reader.model), context_length(reader.model.config)
    if limit is not None and context > limit:
        raise ValueError(f"--context {context} is more than the {limit} positions of {reader.label}")
    stride = context if windows.stride is None else windows.stride
    check_windows(Windows(context, stride))
    batch_size = windows.batch_size or batch_of(context, reader.vocab_size)
    return Windows(context, stride, batch_size, windows.max_tokens, windows.document_mask)


def check_windows(windows: Windows) -> None:
    """Raises a ValueError for what is wrong with any model."""
    flags = {"context": "context", "stride": "stride", "batch_size": "batch_size", "max_tokens": "eval_tokens"}
    for name, flag in flags.items():
        value = getattr(windows, name)
        if value is not None and value < 1:
            raise ValueError(f"--{flag} must be at least 1, got {value}")
    if windows.context and windows.stride and windows.stride > windows.context:
        raise ValueError(f"--stride {windows.stride} is more than the context, {windows.context}: tokens would be lost")


def text_loss(
    reader: Reader, text: Text, windows: Windows | None = None, between: Callable[[], None] = lambda: None
) -> Loss:
    """How well the model predicts the text.

    Args:
        reader: its model is left on its device and in its mode.
        text: of `open_text`.
        windows: how it is read.
        between: called before each batch.

    Raises:
        ValueError: windows that do not fit the model; a log likelihood that is not a number.
    """
    chosen = reading(reader, windows or Windows())
    if chosen.document_mask:
        check_document_mask(reader.model)
    assert chosen.context and chosen.batch_size
    loss = validation_loss(
        reader.model,
        text.split,
        chosen.context,
        chosen.batch_size,
        stride=chosen.stride,
        full_last=text.full_last,
        max_tokens=chosen.max_tokens,
        mask_eot=text.eot_id if chosen.document_mask else None,
        between=between,
    )
    if not math.isfinite(loss.total_nats):
        raise ValueError(
            f"the log likelihood that {reader.label} gives is {-loss.total_nats}: it diverged or is damaged"
        )
    return loss


def metrics(loss: Loss, words: int | None, tokens: int) -> dict[str, float]:
    """The numbers of a text, of which `tokens` could be predicted; the word perplexity only where all were."""
    values = {"nats": loss.nats, "perplexity": loss.perplexity, "bits_per_byte": loss.bits_per_byte}
    if words and loss.tokens == tokens and loss.total_nats / words < 700:
        values["word_perplexity"] = math.exp(loss.total_nats / words)
    return values

"""Byte-level BPE: training, loading, and encoding that never mistakes text for control.

There is no normaliser and every byte has a token, so decode(encode(x)) == x for any text x. The spelling of a special
token inside a text ("<|endoftext|>") is ordinary text: only the shard writer places special ids.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
SMALLEST_VOCAB = 257  # 256 bytes and the end-of-text token
FILE_NAME = "tokenizer.json"


def train_bpe(documents: Iterable[str], vocab_size: int, max_bytes: int = 200_000_000) -> Tokenizer:
    """A byte-level BPE of at most vocab_size tokens (fewer where the text has no more pairs to merge).

    Reads the first max_bytes of the documents at most; memory grows with the number of distinct words only.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"vocab_size must be at least {SMALLEST_VOCAB} (256 bytes + {END_OF_TEXT}), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(first_bytes(documents, max_bytes), trainer)
    return plain_text_only(tokenizer)


def first_bytes(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Documents until max_bytes are reached (the one that crosses the line is the last)."""
    taken = 0
    for document in documents:
        yield document
        taken += len(document.encode("utf-8"))
        if taken >= max_bytes:
            return


def plain_text_only(tokenizer: Tokenizer) -> Tokenizer:
    """Encodes all text whole and as text: no truncation, no padding, no special token recognised in it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json, or the one inside a folder."""
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"no tokenizer at {file}; a tokenizer.json or a folder with one is needed")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises a bare Exception
        raise ValueError(f"{file} is not a tokenizer.json: {error}") from None
    return plain_text_only(tokenizer)


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without any special token."""
    return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def tokenizer_hash(tokenizer: Tokenizer | str | Path) -> str:
    """sha256 of the tokenizer's JSON with sorted keys and no spaces; of a file or folder, of what is written there."""
    if isinstance(tokenizer, Tokenizer):
        text = tokenizer.to_str()
    else:
        path = Path(tokenizer)
        text = (path / FILE_NAME if path.is_dir() else path).read_text(encoding="utf-8")
    canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def vocab_size(tokenizer: Tokenizer) -> int:
    """Rows an embedding needs: the largest id plus one (ids may have holes)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def text_ends(tokenizer: Tokenizer, named: int | list[int] | None) -> int:
    """The id that separates documents: the first one named that the tokenizer has, else `end_of_text_id`.

    Args:
        named: a config's `eos_token_id`; a stock folder may name several, or one of another vocabulary.

    Raises:
        ValueError: there is none.
    """
    for token_id in named if isinstance(named, list) else [named]:
        if token_id is not None and tokenizer.id_to_token(token_id) is not None:
            return int(token_id)
    return end_of_text_id(tokenizer)


def text_begins(tokenizer: Tokenizer, named: int | None, eot_id: int) -> int:
    """The id that stands before a text: the one named, if the tokenizer has it as a special token, else end of text.

    Args:
        named: a config's `bos_token_id`.
        eot_id: of `text_ends`.
    """
    added = tokenizer.get_added_tokens_decoder()
    return named if isinstance(named, int) and named in added and added[named].special else eot_id


def end_of_text_id(tokenizer: Tokenizer, name: str | None = None) -> int:
    """The id that separates documents: of the token `name`, else of the first usual name that the vocabulary has."""
    for candidate in [name] if name is not None else END_OF_TEXT_NAMES:
        token_id = tokenizer.token_to_id(candidate)
        if token_id is not None:
            return token_id
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    wanted = f"no token {name!r}" if name is not None else f"none of {', '.join(END_OF_TEXT_NAMES)}"
    raise ValueError(
        f"{wanted} in the tokenizer; name its end-of-text token (eot); special tokens: {', '.join(special) or 'none'}"
    )

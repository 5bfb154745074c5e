"""A byte-level BPE as GGUF metadata.

    tokens, token_type   by id; rows of the embedding without a token are called [PADi] and marked unused
    merges               "a b", in the order of their ranks
    model "gpt2"         byte-level BPE;  pre "gpt-2": words are split by GPT-2's expression

What a reader of GGUF would split or normalise in another way is refused: it would run, and see other tokens.
"""

import json
from typing import Any

from tokenizers import Tokenizer

from nativerank.data.tokenizer import text_begins, text_ends

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
KEY = "tokenizer.ggml"


def token_metadata(tokenizer: Tokenizer, config: Any) -> dict[str, Any]:
    """The keys tokenizer.ggml.* of a tokenizer and the config of its model.

    Where the config names no beginning of its own, the end-of-text token stands before every text too, as in training.

    Raises:
        ValueError: another kind of tokenizer, or one with more tokens than the model has rows.
    """
    parts = json.loads(tokenizer.to_str())
    check_form(parts)
    tokens, types = token_table(tokenizer, config.vocab_size)
    merges = parts["model"]["merges"]
    eot = text_ends(tokenizer, config.eos_token_id)
    return {
        f"{KEY}.model": "gpt2",
        f"{KEY}.pre": "gpt-2",
        f"{KEY}.tokens": tokens,
        f"{KEY}.token_type": types,
        f"{KEY}.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        f"{KEY}.bos_token_id": text_begins(tokenizer, config.bos_token_id, eot),
        f"{KEY}.eos_token_id": eot,
        f"{KEY}.add_bos_token": True,
    }


def check_form(parts: dict[str, Any]) -> None:
    """Raises a ValueError unless a tokenizer.json is byte-level BPE as GPT-2 has it."""
    model, pre = parts["model"], parts["pre_tokenizer"] or {}
    wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    different = [
        f"the model {model['type']}" if model["type"] != "BPE" else None,
        f"the normalizer {parts['normalizer']['type']}" if parts["normalizer"] else None,
        f"the pre-tokenizer {pre.get('type')}" if pre.get("type") != "ByteLevel" else None,
        "another splitting into words" if {key: pre.get(key) for key in wanted} != wanted else None,
        "a fallback to bytes" if model.get("byte_fallback") else None,
        None if model.get("merges") else "no merges",
    ]
    if reason := next((reason for reason in different if reason), None):
        raise ValueError(f"the tokenizer has {reason}; GGUF is written with byte-level BPE as GPT-2 splits words only")


def token_table(tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """Name and type of the token of each row of the embedding."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    if (largest := max(vocabulary.values())) >= rows:
        raise ValueError(f"the tokenizer has a token {largest}, the model only {rows} rows")
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for i, extra in added.items():
        types[i] = CONTROL if extra.special else USER_DEFINED
    return tokens, types

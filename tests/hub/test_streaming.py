"""Streamed pieces add up to exactly the text, and no piece holds a part of a character."""

import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nativerank.data.shards import Dataset
from nativerank.data.tokenizer import train_bpe
from nativerank.hub.generate import generate
from nativerank.hub.streaming import TextStream, continuation
from nativerank.models import materialize, read_hf_config, skeleton

TEXT = "na\u00efve caf\u00e9 \u20ac5, \u4f60\u597d\uff0c\u4e16\u754c \U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea end"


def streamed(tokenizer, prompt, ids, stops=()):
    pieces = []
    stream = TextStream(tokenizer, prompt, stops, pieces.append)
    stream.put(torch.tensor([prompt]))
    for i in ids:
        stream.put(torch.tensor([i]))
    stream.end()
    return pieces


@pytest.fixture(scope="module")
def bytes_only():
    """Every byte is a token of its own, so each character of several bytes is cut."""
    return train_bpe(["ab"], 257)


def test_characters_that_tokens_cut_come_whole(bytes_only):
    ids = bytes_only.encode(TEXT, add_special_tokens=False).ids
    assert len(ids) == len(TEXT.encode())
    pieces = streamed(bytes_only, [0], ids)
    assert "".join(pieces) == TEXT and all(len(piece) == 1 for piece in pieces)


def test_bytes_that_are_no_characters_add_up_too(bytes_only):
    source = random.Random(0)
    for _ in range(200):
        ids = [source.randrange(1, 257) for _ in range(30)]
        pieces = streamed(bytes_only, [0], ids)
        assert "".join(pieces) == bytes_only.decode(ids) and "" not in pieces


def test_a_character_that_the_end_cuts_is_shown_as_such(bytes_only):
    ids = bytes_only.encode("a\u20ac", add_special_tokens=False).ids[:-1]
    assert streamed(bytes_only, [0], ids) == ["a", "\ufffd"]


def test_the_end_of_text_is_not_shown(bytes_only):
    ids = bytes_only.encode("ab", add_special_tokens=False).ids
    assert "".join(streamed(bytes_only, [0], [*ids, 0])) == "ab"  # special
    assert "".join(streamed(bytes_only, [0], ids, stops=[ids[-1]])) == "a"  # ordinary, and yet a stop


@pytest.fixture(scope="module")
def metaspace():
    """SentencePiece's way: a space belongs to the token behind it, and the first one is not shown."""
    words = ["\u2581the", "\u2581low", "\u2581rank", "s", "<s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def test_the_space_between_prompt_and_text_is_kept(metaspace):
    assert continuation(metaspace, [4, 0], [1, 2, 3]) == " low ranks"
    assert streamed(metaspace, [4, 0], [1, 2, 3]) == [" low", " rank", "s"]
    assert "".join(streamed(metaspace, [4], [1, 2])) == continuation(metaspace, [4], [1, 2]) == "low rank"


def test_of_a_decoder_that_changes_its_mind_the_end_is_not_lost():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<s>": 3}, unk_token="<s>"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")])
    assert continuation(tokenizer, [3], [2, 0, 1, 2]) == "cXc"
    assert streamed(tokenizer, [3], [2, 0, 1, 2]) == ["c", "a", "Xc"]  # what it took back is written already


def test_the_prompt_alone_is_decoded_once(bytes_only):
    decoded = []
    spy = SimpleNamespace(decode=lambda ids: decoded.append(ids) or bytes_only.decode(ids))
    streamed(spy, [65, 66], [67, 68, 69])
    assert decoded.count([65, 66]) == 1


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "top_k": 0, "seed": 2}])
def test_a_model_streams_exactly_what_it_writes(prepared, tiny_config, options):
    data, model = Dataset.open(prepared), materialize(skeleton(read_hf_config(tiny_config)), 0, 3.0)
    pieces = []
    how = dict(eot_id=data.eot_id, max_new_tokens=40, **options)
    text = generate(model, data.tokenizer(), "the low", stream=pieces.append, **how)
    assert "".join(pieces) == text == generate(model, data.tokenizer(), "the low", **how)
    assert len(pieces) > 5

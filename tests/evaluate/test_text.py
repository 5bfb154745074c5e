"""Sliding windows against float64 by hand, exact counts of tokens and bytes, and texts that cannot be read."""

import math

import numpy as np
import pytest
import torch

from nativerank.data.loader import sequential_batches
from nativerank.data.shards import Dataset
from nativerank.data.tokenizer import load_tokenizer
from nativerank.evaluate.loss import validation_loss
from nativerank.evaluate.text import Reader, Text, Windows, metrics, open_text, reading, text_loss
from nativerank.methods import factorize
from nativerank.models import make_hf_config, materialize, skeleton

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
CAFE = "the low rank mod\u00e8le \u2014 r\u00e9sum\u00e9 \U0001f600 of  text\n\nlearns "


class Tokens:
    """A stream of ids that looks like a split."""

    def __init__(self, ids):
        self.ids, self.tokens, self.text_bytes, self.documents = np.asarray(ids), len(ids), 3.0 * len(ids), 1

    def read(self, start, count):
        assert 0 <= start and start + count <= self.tokens
        return self.ids[start : start + count]


@pytest.fixture(scope="module")
def model():
    model = skeleton(make_hf_config({"model_type": "llama", **SIZES}, "test"))
    factorize(model, "spectron", rank_ratio=0.5)
    return materialize(model, 0, 2.0).eval()


@pytest.fixture(scope="module")
def reader(model, prepared):
    return Reader(model, load_tokenizer(prepared), 0, "the model")


def ids(count):
    return np.random.default_rng(0).integers(1, 300, count)


def first_seen(target, tokens, context, stride, full_last):
    """Where the window begins from which this target is predicted."""
    first = 0 if target <= context else stride * math.ceil((target - context) / stride)
    return min(first, max(0, tokens - 1 - context)) if full_last else first


def slow_sum(model, stream, context, stride, full_last):
    """Summed nats in float64, each target from a forward pass of its own."""
    wide, total = model.double(), 0.0
    with torch.no_grad():
        for target in range(1, len(stream)):
            seen = torch.tensor(stream[first_seen(target, len(stream), context, stride, full_last) : target])[None]
            total -= wide(seen).logits[0, -1].log_softmax(-1)[stream[target]].item()
    model.float()
    return total


@pytest.mark.parametrize("full_last", [False, True])
@pytest.mark.parametrize("tokens, context, stride", [(50, 16, 16), (50, 16, 5), (50, 16, 1), (12, 16, 4), (33, 16, 16)])
def test_the_sum_is_a_slow_float64_sum(reader, model, tokens, context, stride, full_last):
    stream = ids(tokens)
    windows = Windows(context=context, stride=stride, batch_size=3)
    loss = text_loss(reader, Text(Tokens(stream), 0, full_last=full_last), windows)
    assert loss.tokens == tokens - 1 and loss.text_bytes == 3.0 * tokens
    assert loss.total_nats == pytest.approx(slow_sum(model, stream, context, stride, full_last), rel=1e-5)


@pytest.mark.parametrize("full_last", [False, True])
@pytest.mark.parametrize("context, stride", [(8, 8), (8, 3), (8, 1), (5, 4), (64, 7)])
def test_every_token_is_predicted_once_from_enough_before_it(context, stride, full_last):
    for tokens in range(2, 40):
        split, times = Tokens(np.arange(tokens)), np.zeros(tokens, int)
        batches = sequential_batches(split, context, 3, stride=stride, full_last=full_last)
        for inputs, targets, valid in batches:
            for row, column in zip(*np.nonzero(valid), strict=True):
                target = targets[row, column]
                times[target] += 1
                assert list(inputs[row, : column + 1]) == list(range(target - column - 1, target))
                assert column + 1 >= min(target, context - stride + 1)
        assert list(times) == [0] + [1] * (tokens - 1)


@pytest.mark.parametrize("stride", [1, 7, 64])
def test_a_text_that_fits_is_one_forward_pass(reader, model, stride):
    stream = torch.tensor(ids(60))
    with torch.no_grad():
        whole = model(stream[None, :-1]).logits[0].log_softmax(-1)
    by_hand = -whole[torch.arange(59), stream[1:]].double().sum().item()
    loss = text_loss(reader, Text(Tokens(stream.numpy()), 0), Windows(context=64, stride=stride))
    assert loss.total_nats == pytest.approx(by_hand, rel=1e-6)


def test_windows_side_by_side_are_the_validation_of_training(reader, model, prepared):
    with open_text(prepared, reader) as text:
        loss = text_loss(reader, text, Windows(context=16))
        masked = text_loss(reader, text, Windows(context=16, document_mask=True))
    data = Dataset.open(prepared)
    assert loss == validation_loss(model, data.split("val"), 16, 8)
    assert masked == validation_loss(model, data.split("val"), 16, 8, mask_eot=data.eot_id) != loss


@pytest.mark.parametrize("max_tokens", [None, 40])
def test_every_byte_and_token_of_a_file_is_counted(reader, tmp_path, max_tokens):
    (tmp_path / "a.txt").write_text(CAFE * 9, encoding="utf-8")
    with open_text(tmp_path / "a.txt", reader) as text:
        loss = text_loss(reader, text, Windows(context=16, max_tokens=max_tokens))
        found = metrics(loss, text.words, text.split.tokens - 1)
        first = int(text.split.read(0, 1)[0])
    encoded = reader.tokenizer.encode(CAFE * 9, add_special_tokens=False).ids
    size = len((CAFE * 9).encode("utf-8"))
    assert (text.split.tokens, first) == (len(encoded) + 1, reader.start_id)
    if max_tokens:
        assert 0 < loss.tokens <= 40 and "word_perplexity" not in found
        assert loss.text_bytes == pytest.approx(size * loss.tokens / len(encoded))
        return
    assert (loss.tokens, loss.text_bytes) == (len(encoded), size)
    assert found["bits_per_byte"] == pytest.approx(loss.total_nats / math.log(2) / size)
    assert found["perplexity"] == pytest.approx(math.exp(loss.total_nats / len(encoded)))
    words = len((CAFE * 9).split()) + 1  # the piece after the last space is empty and counts, as in lm-eval
    assert found["word_perplexity"] == pytest.approx(math.exp(loss.total_nats / words))


@pytest.mark.parametrize(
    "windows, message",
    [
        (dict(context=65), r"--context 65 is more than the 64 positions of the model"),
        (dict(context=8, stride=9), r"--stride 9 is more than the context, 8: tokens would be lost"),
        (dict(stride=65), r"--stride 65 is more than the context, 64"),
        (dict(stride=0), r"--stride must be at least 1, got 0"),
        (dict(max_tokens=-1), r"--eval_tokens must be at least 1, got -1"),
        (dict(batch_size=0), r"--batch_size must be at least 1, got 0"),
    ],
)
def test_windows_that_do_not_fit_are_named(reader, windows, message):
    with pytest.raises(ValueError, match=message):
        reading(reader, Windows(**windows))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no text in .*a.txt"),
        (b" \n", "no text in .*a.txt"),
        (b"ab\xff", "a.txt is not UTF-8: byte 0xff at offset 2"),
    ],
)
def test_a_file_without_text_is_named(reader, tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message), open_text(tmp_path / "a.txt", reader):
        pass


def test_a_text_of_another_vocabulary_is_refused(reader, other_prepared, without_validation, tmp_path):
    def refused(data, by, message):
        with pytest.raises(ValueError, match=message), open_text(data, by):
            pass

    (tmp_path / "a.txt").write_text(CAFE)
    bare = Reader(reader.model, None, None, "bare")
    refused(other_prepared, reader, "was made with another tokenizer than that of the model")
    refused(without_validation, bare, "the validation split of .* holds no tokens")
    refused(tmp_path / "a.txt", bare, "bare holds no tokenizer.json to read .*a.txt with")
    refused(tmp_path / "none.txt", reader, "none.txt: no such file or folder")
    small = materialize(skeleton(make_hf_config({"model_type": "llama", **SIZES, "vocab_size": 290}, "test")), 0, 2.0)
    narrow = Reader(small, reader.tokenizer, 0, "narrow")
    refused(tmp_path / "a.txt", narrow, "narrow has a vocabulary of 290, smaller than the 300 of its text")


def test_a_model_that_answers_nan_is_an_error(reader, prepared):
    broken = materialize(skeleton(make_hf_config({"model_type": "llama", **SIZES}, "test")), 0, 2.0)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    bad = Reader(broken, reader.tokenizer, 0, "broken")
    with open_text(prepared, bad) as text, pytest.raises(ValueError, match="that broken gives is nan: it diverged"):
        text_loss(bad, text, Windows(context=16))

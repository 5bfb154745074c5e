"""Losses against float64 by hand, and documents that share a window but do not see each other."""

import lzma
import math

import numpy as np
import pytest
import torch

from nativerank.data.loader import document_positions
from nativerank.data.shards import Dataset
from nativerank.evaluate.loss import (
    Loss,
    check_document_mask,
    check_predictions,
    token_losses,
    validation_loss,
    xz_bits_per_byte,
)
from nativerank.methods import factorize
from nativerank.models import make_hf_config, materialize, skeleton

CONTEXT = 16
SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
FAMILIES = {
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": SIZES,
    "mixtral": SIZES | dict(num_local_experts=4, num_experts_per_tok=2),
    "gpt2": dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0),
}
IGNORE_POSITIONS = {
    "opt": SIZES | dict(ffn_dim=48, word_embed_proj_dim=32),
    "bloom": dict(vocab_size=300, hidden_size=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
}


def make(family="llama"):
    model = skeleton(make_hf_config({"model_type": family, **(FAMILIES | IGNORE_POSITIONS)[family]}, "test"))
    factorize(model, "spectron", rank_ratio=0.5)
    return materialize(model, 0, 2.0).eval()


@pytest.fixture(scope="module")
def data(prepared):
    return Dataset.open(prepared)


@pytest.fixture(scope="module")
def model():
    return make()


class Piece:
    """The first tokens of a split."""

    def __init__(self, split, tokens):
        self.split, self.tokens = split, tokens
        self.text_bytes = tokens * 2.5

    def read(self, start, count):
        assert start + count <= self.tokens
        return self.split.read(start, count)


def oracle(model, tokens, context, eot=None):
    """Summed nats in float64: each target from a forward of its own over what it may see, and nothing else."""
    wide, total = model.double(), 0.0
    with torch.no_grad():
        for position in range(1, len(tokens)):
            first = (position - 1) // context * context
            seen = tokens[first:position]
            if eot is not None and eot in seen:
                seen = seen[max(i for i, t in enumerate(seen) if t == eot) :]
            logits = wide(torch.tensor([seen])).logits[0, -1]
            total -= logits.log_softmax(-1)[tokens[position]].item()
    model.float()
    return total


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [100, 97, 17, 5, 2])
def test_validation_is_a_slow_float64_sum(model, data, length, masked):
    eot = data.eot_id if masked else None
    split = data.split("val")
    tokens = [int(t) for t in split.read(0, split.tokens)]
    end = tokens.index(data.eot_id, 40) + 40  # the middle of it holds the border of two documents
    piece = Piece(split, length)
    piece.read = lambda start, count: split.read(end - 80 + start, count)
    loss = validation_loss(model, piece, CONTEXT, 3, mask_eot=eot)
    assert loss.tokens == length - 1
    by_hand = oracle(model, tokens[end - 80 : end - 80 + length], CONTEXT, eot)
    assert loss.total_nats == pytest.approx(by_hand, rel=1e-5)  # float32 logits against float64
    assert loss.text_bytes == pytest.approx(piece.text_bytes)


def test_the_batch_size_does_not_matter(model, data):
    losses = [validation_loss(model, data.split("val"), CONTEXT, n).nats for n in (1, 7, 64)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_part_is_spread_and_scaled(model, data):
    split = data.split("val")
    whole = validation_loss(model, split, CONTEXT, 8)
    part = validation_loss(model, split, CONTEXT, 8, max_tokens=split.tokens // 3)
    assert whole.tokens == split.tokens - 1 and split.tokens // 4 < part.tokens <= split.tokens // 3
    assert part.nats == pytest.approx(whole.nats, rel=0.05)
    assert part.text_bytes / part.tokens == pytest.approx(whole.text_bytes / whole.tokens)
    assert part == validation_loss(model, split, CONTEXT, 8, max_tokens=split.tokens // 3)


def test_bits_per_byte_by_hand():
    loss = Loss(total_nats=math.log(2) * 24, tokens=6, text_bytes=12)
    assert loss.bits_per_byte == pytest.approx(2.0)
    assert loss.nats == pytest.approx(4 * math.log(2)) and loss.perplexity == pytest.approx(16.0)
    assert Loss(1e6, 1, 1).perplexity == math.inf


def test_bits_per_byte_of_a_uniform_model_are_those_of_its_vocabulary(data):
    """log2(300) bits for each token, however the split is cut."""
    uniform = make()
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    split = data.split("val")
    loss = validation_loss(uniform, split, CONTEXT, 8)
    assert loss.bits_per_byte == pytest.approx((split.tokens - 1) * math.log2(300) / split.text_bytes, rel=1e-6)


def test_the_mode_of_the_model_is_kept(model, data):
    for mode in (True, False):
        model.train(mode)
        validation_loss(model, data.split("val"), CONTEXT, 8, max_tokens=20)
        assert model.training is mode


def test_no_token_no_loss(model, data):
    with pytest.raises(ValueError, match="at least 2 are needed to predict one"):
        validation_loss(model, Piece(data.split("val"), 1), CONTEXT, 8)


def test_xz_is_what_the_tool_needs():
    text = b"the low rank of the low rank " * 50
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9)) / len(text)


# -- documents in a window


def packed(*lengths):
    """Tokens of documents one after the other, each opened by the end-of-text id 0."""
    source = np.random.default_rng(0)
    return [np.concatenate([[0], source.integers(1, 300, n - 1)]) for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_packed_window_gives_the_logits_of_its_documents_apart(family):
    model, documents = make(family), packed(5, 1, 9, 12)
    window = np.concatenate(documents)[None]
    positions = torch.from_numpy(document_positions(window, 0))
    together = model(input_ids=torch.from_numpy(window), position_ids=positions, use_cache=False).logits[0]
    apart = torch.cat([model(torch.from_numpy(d)[None]).logits[0] for d in documents])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4 * apart.abs().max().item())  # other sums in float32
    crossing = model(torch.from_numpy(window)).logits[0]
    assert (crossing - apart).abs().max() > 0.01 * apart.abs().max(), "else the mask would not matter here"


@torch.no_grad()
def test_rows_with_other_borders_keep_to_themselves(model):
    rows = [np.concatenate(packed(6, 10)), np.concatenate(packed(16)), np.concatenate(packed(3, 3, 10))]
    inputs = np.stack([r[:-1] for r in rows])
    targets = np.stack([r[1:] for r in rows])
    positions = torch.from_numpy(document_positions(inputs, 0))
    inputs, targets = torch.from_numpy(inputs), torch.from_numpy(targets)
    together = token_losses(model, inputs, targets, positions)
    for i in range(3):
        alone = token_losses(model, inputs[i : i + 1], targets[i : i + 1], positions[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_passes_where_documents_stay_apart(family):
    model = make(family)
    check_document_mask(model)
    assert not model.training


@pytest.mark.parametrize("family", IGNORE_POSITIONS)
def test_the_check_finds_architectures_that_ignore_positions(family):
    with pytest.raises(ValueError, match=f"data.document_mask: {family} models do not keep documents"):
        check_document_mask(make(family))


def test_training_uses_the_mask(tmp_path, run_config, listen):
    """The first loss of a masked run is the masked loss of its first batch, with the weights of step 0."""
    from nativerank.data.loader import Loader
    from nativerank.train.loop import train
    from nativerank.train.resolve import resolve
    from nativerank.train.setup import build, open_data

    losses = {}
    for mask in (True, False):
        listener = listen()
        train(
            run_config(out=tmp_path / str(mask), data__document_mask=mask, train__steps=1, train__batch_size=64),
            listener,
        )
        losses[mask] = listener.rows[0]["loss"]
    config = resolve(run_config(out="x", train__batch_size=64))
    data = open_data(config)
    built = build(config, data)
    inputs, targets = Loader(data.split("train"), 16, 64, 0).next()
    for mask in (True, False):
        positions = torch.from_numpy(document_positions(inputs, data.eot_id)) if mask else None
        with torch.no_grad():
            loss = token_losses(built.model, torch.from_numpy(inputs), torch.from_numpy(targets), positions).mean()
        assert losses[mask] == pytest.approx(loss.item(), rel=1e-6)
    assert losses[True] != losses[False]


@pytest.mark.parametrize("family", [*FAMILIES, *IGNORE_POSITIONS])
def test_causal_models_predict(family):
    check_predictions(make(family), "it")


def test_a_model_that_sees_what_it_is_to_predict_or_answers_nan_is_refused():
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"^it holds a BertForMaskedLM, which predicts no next token$"):
        check_predictions(BertForMaskedLM(BertConfig(**sizes)), "it")
    with pytest.raises(ValueError, match=r"^it holds a BertLMHeadModel, which sees the token that it is to predict$"):
        check_predictions(BertLMHeadModel(BertConfig(**sizes)), "it")
    check_predictions(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)), "it")
    model = make()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="the logits of it are not finite numbers"):
        check_predictions(model, "it")

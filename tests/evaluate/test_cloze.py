"""Choices scored against float64 by hand, and files of questions that are none."""

import json
import math

import numpy as np
import pytest
import torch

from nativerank.data.tokenizer import load_tokenizer
from nativerank.evaluate.cloze import Question, cloze, encode_questions, log_likelihoods, read_questions, score
from nativerank.evaluate.text import Reader
from nativerank.methods import factorize
from nativerank.models import make_hf_config, materialize, skeleton

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
QUESTIONS = [
    Question("the low rank matrix", ("model learns", "of", "text from the gradient"), 1, "1"),
    Question("every token is read once ", ("or twice", "caf\u00e9 \u2014"), 0, "2"),
    Question("", ("the", "language model"), 1, "3"),
    Question("gradient descent moves " * 12, ("thin factors", "weights", "bounds", "norm"), 3, "4"),
]


@pytest.fixture(scope="module")
def reader(prepared):
    model = skeleton(make_hf_config({"model_type": "llama", **SIZES}, "test"))
    factorize(model, "spectron", rank_ratio=0.5)
    return Reader(materialize(model, 0, 2.0).eval(), load_tokenizer(prepared), 0, "the model")


def by_hand(reader, question, choice):
    """log p(" choice" | context) in float64, token by token; white space at the end of a context goes over."""
    context, continuation = question.context.rstrip(), " " + choice
    continuation = question.context[len(context) :] + continuation
    before = reader.tokenizer.encode(context, add_special_tokens=False).ids
    ids = reader.tokenizer.encode(context + continuation, add_special_tokens=False).ids
    if not before:
        before, ids = [0], [0, *ids]
    total, wide = 0.0, reader.model.double()
    with torch.no_grad():
        for position in range(len(before), len(ids)):
            first = max(0, len(ids) - 1 - SIZES["max_position_embeddings"])
            logits = wide(torch.tensor([ids[first:position]])).logits[0, -1]
            total += logits.log_softmax(-1)[ids[position]].item()
    reader.model.float()
    return total


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_likelihoods_are_slow_float64_sums(reader, batch_size):
    found = log_likelihoods(reader, encode_questions(reader, QUESTIONS), batch_size)
    expected = [by_hand(reader, question, choice) for question in QUESTIONS for choice in question.choices]
    assert found == pytest.approx(expected, rel=1e-5)
    pairs = encode_questions(reader, QUESTIONS[3:])
    assert len(pairs[0].context) + len(pairs[0].continuation) == 65, "the case of a context that is cut"


def test_scores_are_what_the_names_say():
    first = Question("", ("aaaa", "b", "\u00e9\u00e9\u00e9"), 0, "1")
    second = Question("", ("x", "yy"), 1, "2")
    found = score([first, second], [-6.0, -2.0, -3.3, -1.0, -2.5])
    # first: acc takes b; per character -1.5, -2, -1.1 the third; per byte -1.5, -2, -0.55 the third. second: x, x, x.
    assert found.values == {"acc": 0.0, "acc_norm": 0.0, "acc_bytes": 0.0}
    found = score([first, second], [-3.0, -2.0, -3.3, -1.5, -2.0])
    # first: b, then aaaa (-0.75 against -1.1), then the third (-0.75 against -0.55). second: x, yy, yy.
    assert found.values == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 0.5}
    assert found.stderrs == {"acc": 0.0, "acc_norm": 0.0, "acc_bytes": pytest.approx(0.5)}
    assert found.n == 2 and found.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert score([second], [-1.0, -2.0]).stderrs["acc"] is None


def test_the_standard_error_is_that_of_a_mean():
    questions = [Question("", ("a", "b"), answer, "") for answer in (0, 0, 0, 1, 0, 1, 0)]
    found = score(questions, [0.0, -1.0] * 7)
    hits = np.array([1, 1, 1, 0, 1, 0, 1.0])
    assert found.values["acc"] == pytest.approx(hits.mean())
    assert found.stderrs["acc"] == pytest.approx(math.sqrt(hits.var(ddof=1) / 7))


@pytest.mark.parametrize("form", ["lines", "list"])
def test_a_file_of_lines_or_a_list(tmp_path, form):
    rows = [
        {"context": "a\u2028b", "choices": ["x", "y"], "answer": 1},
        {"query": "", "choices": ["x", "y"], "answer": 0},
    ]
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    if form == "lines":
        text = "\ufeff" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "q.json").write_bytes(text.encode("utf-8"))
    found = read_questions(tmp_path / "q.json")
    assert [(q.context, q.choices, q.answer) for q in found] == [("a\u2028b", ("x", "y"), 1), ("", ("x", "y"), 0)]
    assert found[1].place.endswith("question 2" if form == "list" else "line 3")
    assert read_questions(tmp_path / "q.json", 1) == found[:1]


GOOD = {"context": "c", "choices": ["x", "y"], "answer": 0}


@pytest.mark.parametrize(
    "bad, message",
    [
        (GOOD | {"choices": ["x"]}, "'choices' must be a list of at least 2, got .'x'."),
        (GOOD | {"choices": "xy"}, "'choices' must be a list of at least 2, got xy"),
        (GOOD | {"choices": ["x", ""]}, "'choices' holds '', which is no text to choose"),
        (GOOD | {"choices": ["x", 3]}, "'choices' holds 3"),
        (GOOD | {"choices": ["x", "\ud800"]}, "'choices' holds '.ud800'"),
        (GOOD | {"answer": 2}, "'answer' must be one of 0 .. 1, got 2"),
        (GOOD | {"answer": -1}, "'answer' must be one of 0 .. 1, got -1"),
        (GOOD | {"answer": True}, "'answer' must be one of 0 .. 1, got True"),
        (GOOD | {"answer": "x"}, "'answer' must be one of 0 .. 1, got 'x'"),
        (GOOD | {"context": 5}, "'context' is not text but 5"),
        (GOOD | {"query": "q"}, "exactly one of the keys 'context' and 'query' is needed, there are 2"),
        ({"context": "c", "answer": 0}, "no key 'choices'"),
        ({"context": "c", "choices": ["x", "y"]}, "no key 'answer'"),
        ([1], "not a JSON object but '.1.'"),
    ],
)
def test_a_question_that_is_none_is_named_with_its_line(tmp_path, bad, message):
    (tmp_path / "q.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=rf"q.jsonl, line 2: {message}"):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no questions"),
        (b"[]", "holds no questions"),
        (b"{\n", "line 1: not JSON"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_file_that_holds_no_questions_is_named(tmp_path, content, message):
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"q.jsonl.*{message}"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        read_questions(tmp_path / "none.json")


def test_a_model_that_cannot_answer_is_an_error(reader):
    with pytest.raises(ValueError, match=r"bare holds no tokenizer\.json"):
        cloze(Reader(reader.model, None, None, "bare"), QUESTIONS)
    long = Question("c", ("x", "matrix " * 70), 0, "q.jsonl, line 7")
    with pytest.raises(ValueError, match=r"q\.jsonl, line 7: a choice of .* tokens is longer than the model's 64"):
        cloze(reader, [long])
    small = materialize(skeleton(make_hf_config({"model_type": "llama", **SIZES, "vocab_size": 20}, "test")), 0, 2.0)
    with pytest.raises(ValueError, match="narrow has a vocabulary of 20, smaller than"):
        cloze(Reader(small, reader.tokenizer, 0, "narrow"), QUESTIONS)
    broken = materialize(skeleton(make_hf_config({"model_type": "llama", **SIZES}, "test")), 0, 2.0)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="that broken gives is nan"):
        cloze(Reader(broken, reader.tokenizer, 0, "broken"), QUESTIONS)

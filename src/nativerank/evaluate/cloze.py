"""Multiple choice by log likelihood, from a local file of questions.

    {"context": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}     one a line, or in a JSON list

A choice is scored by the log likelihood of " " + choice after the context, in one forward pass per choice:

    acc        the largest log likelihood is that of the answer
    acc_norm   log likelihood / characters of the choice
    acc_bytes  log likelihood / UTF-8 bytes of the choice

as lm-evaluation-harness defines these names, ties to the first. Context and continuation are encoded together and
parted after as many tokens as the context alone has; white space at the end of the context goes to the continuation.
Where both are longer than the model's positions, the beginning of the context is left away. The standard error of a
mean over n questions is that of n independent ones. Chance is the mean of 1 / choices.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nativerank.data.readers import decode, open_stream
from nativerank.data.tokenizer import end_of_text_id
from nativerank.distributed.wrap import evaluating
from nativerank.evaluate.loss import autocast, token_losses
from nativerank.evaluate.text import Reader, batch_of, own_tokenizer
from nativerank.models import context_length

CONTEXTS = ("context", "query")
DELIMITER = " "
METRICS = ("acc", "acc_norm", "acc_bytes")
PAD_ID = 0


@dataclass(frozen=True)
class Question:
    """One line of the file; `place` is where it stands, for messages."""

    context: str
    choices: tuple[str, ...]
    answer: int
    place: str


class Pair(NamedTuple):
    """Tokens to score after the tokens that they follow."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class ClozeScore:
    """Means over `n` questions and their standard errors (None for a single question)."""

    values: dict[str, float]
    stderrs: dict[str, float | None]
    n: int
    chance: float


def read_questions(file: Path, limit: int | None = None) -> list[Question]:
    """The questions of a .json or .jsonl file, at most `limit`.

    Raises:
        ValueError: no such file, not UTF-8, no JSON, or a question that is none; with file, place and key.
    """
    if not file.is_file():
        raise ValueError(f"--cloze {file}: no such file")
    found = [question(record, place) for record, place in records(file)]
    if not found:
        raise ValueError(f"--cloze {file} holds no questions")
    return found[:limit]


def records(file: Path) -> Iterator[tuple[Any, str]]:
    """The objects of a file with their places."""
    with open_stream(file) as stream:
        text = decode(stream.read(), file, 0)
    if text.lstrip("\ufeff \t\r\n").startswith("["):
        for number, record in enumerate(parsed(text.removeprefix("\ufeff"), str(file)), 1):
            yield record, f"{file}, question {number}"
        return
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            yield parsed(line, f"{file}, line {number}"), f"{file}, line {number}"


def parsed(text: str, place: str) -> Any:
    """A piece of JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from None


def question(record: Any, place: str) -> Question:
    """A record as a question, checked.

    Raises:
        ValueError: names place and key.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place}: not a JSON object but {str(record)[:40]!r}")
    names = [name for name in CONTEXTS if name in record]
    if len(names) != 1:
        raise ValueError(f"{place}: exactly one of the keys 'context' and 'query' is needed, there are {len(names)}")
    for name in ("choices", "answer"):
        if name not in record:
            raise ValueError(f"{place}: no key {name!r}")
    context, choices, answer = record[names[0]], record["choices"], record["answer"]
    if not is_text(context):
        raise ValueError(f"{place}: {names[0]!r} is not text but {context!r}")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{place}: 'choices' must be a list of at least 2, got {str(choices)[:60]}")
    for choice in choices:
        if not is_text(choice) or not choice:
            raise ValueError(f"{place}: 'choices' holds {choice!r}, which is no text to choose")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{place}: 'answer' must be one of 0 .. {len(choices) - 1}, got {answer!r}")
    return Question(context, tuple(choices), answer, place)


def is_text(value: Any) -> bool:
    """Whether it is a string of Unicode characters; JSON can spell half of one."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def encode_pair(reader: Reader, context: str, continuation: str, start_id: int) -> Pair:
    """Both as tokens; before the continuation of nothing stands the start of a text."""
    tokenizer = reader.tokenizer
    assert tokenizer is not None
    bare = context.rstrip()
    if not bare:
        return Pair([start_id], tokenizer.encode(context + continuation, add_special_tokens=False).ids)
    whole, before = tokenizer.encode(context + continuation).ids, tokenizer.encode(bare).ids
    return Pair(before, whole[len(before) :])


def encode_questions(reader: Reader, questions: list[Question]) -> list[Pair]:
    """All choices of all questions, in order, cut to the model's positions.

    Raises:
        ValueError: no tokenizer, or one of another vocabulary; a choice without a token, or longer than the positions.
    """
    tokenizer, limit = own_tokenizer(reader, "the questions"), context_length(reader.model.config)
    start_id = end_of_text_id(tokenizer) if reader.start_id is None else reader.start_id
    pairs = []
    for q in questions:
        for choice in q.choices:
            pair = encode_pair(reader, q.context, DELIMITER + choice, start_id)
            if not pair.continuation:
                raise ValueError(f"{q.place}: the choice {choice!r} adds no token to the context")
            if limit is not None:
                pair = cut(pair, limit, q.place)
            pairs.append(pair)
    return pairs


def cut(pair: Pair, limit: int, place: str) -> Pair:
    """The pair without the beginning of a context that is too long; the last token is only a target."""
    room = limit + 1 - len(pair.continuation)
    if room < 1:
        raise ValueError(f"{place}: a choice of {len(pair.continuation)} tokens is longer than the model's {limit}")
    return Pair(pair.context[-room:], pair.continuation)


@torch.no_grad()
def log_likelihoods(
    reader: Reader, pairs: list[Pair], batch_size: int | None = None, watch: Callable[[int], None] = lambda done: None
) -> list[float]:
    """Summed log probability (nats) of each continuation, in the order of the pairs.

    Raises:
        ValueError: one that is not a number.
    """
    model = reader.model
    device = next(model.parameters()).device
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].context) - len(pairs[i].continuation))
    out, done = [0.0] * len(pairs), 0
    with evaluating(model):
        while done < len(order):
            longest = len(pairs[order[done]].context) + len(pairs[order[done]].continuation) - 1
            rows = order[done : done + (batch_size or batch_of(longest, reader.vocab_size))]
            inputs, targets, scored = padded([pairs[i] for i in rows], longest)
            with autocast(device):
                losses = token_losses(model, inputs.to(device), targets.to(device)).cpu().double()
            for i, row, mask in zip(rows, losses, scored, strict=True):
                out[i] = -float(row[mask].sum())
            done += len(rows)
            watch(done)
    if not all(map(math.isfinite, out)):
        bad = next(value for value in out if not math.isfinite(value))
        raise ValueError(f"the log likelihood that {reader.label} gives is {bad}: it diverged or is damaged")
    return out


def padded(pairs: list[Pair], width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(inputs, targets, scored), each (batch, width): what stands behind the end is not seen by what is scored."""
    tokens = torch.full((len(pairs), width + 1), PAD_ID)
    scored = torch.zeros(len(pairs), width, dtype=torch.bool)
    for row, (context, continuation) in enumerate(pairs):
        end = len(context) + len(continuation)
        tokens[row, :end] = torch.tensor(context + continuation)
        scored[row, len(context) - 1 : end - 1] = True
    return tokens[:, :-1], tokens[:, 1:], scored


def score(questions: list[Question], likelihoods: list[float]) -> ClozeScore:
    """Means and errors from the log likelihoods of all choices in order."""
    hits: dict[str, list[float]] = {name: [] for name in METRICS}
    first = 0
    for q in questions:
        values = np.array(likelihoods[first : first + len(q.choices)])
        first += len(q.choices)
        lengths = {
            "acc": np.ones(len(q.choices)),
            "acc_norm": np.array([len(choice) for choice in q.choices]),
            "acc_bytes": np.array([len(choice.encode("utf-8")) for choice in q.choices]),
        }
        for name in METRICS:
            hits[name].append(float(np.argmax(values / lengths[name]) == q.answer))
    n = len(questions)
    stderrs = {name: float(np.std(h, ddof=1)) / math.sqrt(n) if n > 1 else None for name, h in hits.items()}
    chance = sum(1 / len(q.choices) for q in questions) / n
    return ClozeScore({name: sum(h) / n for name, h in hits.items()}, stderrs, n, chance)


def cloze(
    reader: Reader,
    questions: list[Question],
    batch_size: int | None = None,
    watch: Callable[[int], None] = lambda done: None,
) -> ClozeScore:
    """How many questions the model answers.

    Args:
        reader: a model with its tokenizer.
        questions: of `read_questions`.
        batch_size: choices at once; None for what keeps the logits small.
        watch: told how many choices are done.

    Raises:
        ValueError: as of `encode_questions` and `log_likelihoods`.
    """
    return score(questions, log_likelihoods(reader, encode_questions(reader, questions), batch_size, watch))

"""Several trained models on several texts, questions and tasks, side by side.

The result, as `--json` writes it:

    {"models": {LABEL: {"path", "folder", "parameters", "scores": {NAME: SCORE}}},
     "versions": {"nativerank", "commit", "torch", "transformers", "python", "machine", "lm_eval" where it was used},
     "device", "limit", "quantize"}

    SCORE = {"kind": "text" | "cloze" | "task",
             "metrics": {METRIC: {"value", "stderr"}},      null where there is none, or it is infinite
             "n":       tokens predicted, or questions answered,
             ...}       text: "skipped" (tokens not predicted: 1, the first, if all were asked for), "text_bytes",
                        "documents", "context", "stride", "document_mask", "split"; cloze: "chance"; task: "version"

LABEL is what `open_trained` calls the model; NAME the file, the folder or the task. On CUDA the products are done in
bfloat16 as in training, elsewhere in float32.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nativerank.data.demo import prepared_demo
from nativerank.data.shards import SPLITS, Dataset
from nativerank.data.tokenizer import FILE_NAME, vocab_size
from nativerank.evaluate.cloze import METRICS, Question, cloze, read_questions
from nativerank.evaluate.loss import Loss, check_predictions
from nativerank.evaluate.tasks import PACKAGE, Tasks, evaluate_tasks, open_tasks, package_version
from nativerank.evaluate.text import (
    Reader,
    Text,
    Windows,
    check_windows,
    metrics,
    open_text,
    own_tokenizer,
    prepared_text,
    reader_of,
    reading,
    text_loss,
)
from nativerank.hub.companions import TOKENIZER_CONFIG, write_tokenizer
from nativerank.integrations.quantize import quantize
from nativerank.models import PRESETS, check_predicts_next_token, count_parameters, one_line
from nativerank.train.setup import versions
from nativerank.train.trained import Trained, open_trained, to_stderr

Watch = Callable[[str, int, int], None]
Score = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to evaluate, and on what.

    Attributes:
        models: runs, checkpoints or model folders. step: of runs, the checkpoint to take.
        data: text files and prepared folders. split: of the folders, None for val.
        cloze: files of questions. tasks, include: as of `open_tasks`.
        limit: questions of each file and task. windows: how texts are read.
        quantize: a format of `integrations.quantize` to bring the weights into first.
        quiet: nothing of what the harness prints.
    """

    models: list[str]
    step: int | None = None
    data: list[str] = field(default_factory=list)
    split: str | None = None
    cloze: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    include: list[str] = field(default_factory=list)
    limit: int | None = None
    quantize: str | None = None
    windows: Windows = field(default_factory=Windows)
    quiet: bool = True


@dataclass(frozen=True)
class Material:
    """What a request names, read once for all models."""

    questions: dict[str, list[Question]]
    tasks: Tasks | None


def evaluate(
    request: Request,
    device: torch.device | None = None,
    watch: Watch = lambda what, done, total: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """All models on all that is asked for; see above for what comes out.

    Args:
        request: what to do.
        device: None for the CPU.
        watch: told what is going on: in words, how much is done, of how much (0 where that is not known).
        keep: given the result so far after each model, so that a later one that fails does not take it along.

    Raises:
        ValueError: whatever is wrong with request, models or material. Where no weights are needed to see it, before
            the first ones are read.
    """
    device = device or torch.device("cpu")
    material = gathered(request, watch)
    models: dict[str, Any] = {}
    used = versions() | ({PACKAGE: package_version()} if material.tasks else {})
    asked = {"limit": request.limit, "quantize": request.quantize}
    result = {"models": models, "versions": used, "device": str(device), **asked}
    for path in request.models:
        watch(f"reading {path}", 0, 0)
        trained = open_trained(path, request.step)
        trained.model.to(device)
        if request.quantize:
            watch(f"{path}: {quantize(trained.model, request.quantize)}", 0, 0)
        label = unique(trained.label, models)
        models[label] = {
            "path": path,
            "folder": str(trained.folder),
            "parameters": count_parameters(trained.model)["total"],
            "scores": scores(trained, label, request, material, watch),
        }
        keep(result)
    return result


def gathered(request: Request, watch: Watch) -> Material:
    """Checks what can be checked without weights, reads the questions and loads the tasks."""
    check_request(request)
    questions = {file: read_questions(Path(file), request.limit) for file in request.cloze}
    for path in request.models:
        check_model(open_trained(path, request.step, complain=lambda message: None, weights=False), request)
    tasks = None
    if request.tasks:
        watch("loading tasks", 0, 0)
        tasks = open_tasks(request.tasks, request.include, request.quiet)
    return Material(questions, tasks)


def check_request(request: Request) -> None:
    """Raises a ValueError for what is wrong with any model, or would be ignored."""
    check_windows(request.windows)
    if request.limit is not None and request.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {request.limit}")
    if request.split not in (None, *SPLITS):
        raise ValueError(f"--split is {' or '.join(SPLITS)}, got {request.split!r}")
    if request.include and not request.tasks:
        raise ValueError("--include_path says where tasks are; --tasks says which of them")
    for path in request.models:
        if not Path(path).is_dir():
            raise ValueError(f"no such folder: {path}")
    for data in request.data:
        if not Path(data).exists():
            raise ValueError(f"--data {data}: no such file or folder")
    check_used(request)


def check_used(request: Request) -> None:
    """Raises a ValueError for a number that nothing of what was asked for looks at."""
    windows, asked = request.windows, bool(request.data or request.cloze or request.tasks)
    text = bool(request.data) or not asked  # of a run its own
    folders = not asked or any(Path(data).is_dir() for data in request.data)
    for flag, value, used, what in (
        ("limit", request.limit, bool(request.cloze or request.tasks), "questions: --cloze or --tasks; "
         "--eval_tokens takes a part of a text"),
        ("eval_tokens", windows.max_tokens, text, "texts: --data; --limit takes a part of the questions"),
        ("stride", windows.stride, text, "texts: --data"),
        ("context", windows.context, text or bool(request.tasks), "texts and tasks: --data or --tasks"),
        ("split", request.split, folders, "prepared folders: --data DIR"),
    ):  # fmt: skip
        if value is not None and not used:
            raise ValueError(f"--{flag} {value} has no meaning here, it is for {what}")


def check_model(trained: Trained, request: Request) -> None:
    """Raises a ValueError for what a model cannot do of a request; its weights are not looked at."""
    check_predicts_next_token(trained.model, trained.label)
    reader, windows = reader_of(trained.model, trained.tokenizer, trained.label), windows_of(trained, request)
    texts = texts_of(trained, request)
    if texts or request.tasks:
        reading(reader, windows)
    for data in texts:
        if Path(data).is_dir():
            prepared_text(Path(data), reader, request.split or "val")
        else:
            own_tokenizer(reader, data)
    for what in [*request.cloze, *request.tasks]:
        own_tokenizer(reader, what)
    if request.tasks:
        hf_tokenizer(trained)


def windows_of(trained: Trained, request: Request) -> Windows:
    """As asked for; the context and the document mask of a run are those that it was trained with."""
    asked = request.windows
    return replace(asked, context=asked.context or trained.context, document_mask=trained.document_mask)


def unique(label: str, taken: dict[str, Any]) -> str:
    """The label, numbered if another model has it."""
    names = [label, *(f"{label} ({number})" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


def scores(trained: Trained, label: str, request: Request, material: Material, watch: Watch) -> dict[str, Score]:
    """All scores of one model by name."""
    check_predictions(trained.model, trained.label)
    reader = reader_of(trained.model, trained.tokenizer, trained.label)
    windows, split = windows_of(trained, request), request.split or "val"
    out: dict[str, Score] = {}
    for data in texts_of(trained, request):
        with open_text(Path(data), reader, split) as text:
            out[data] = text_score(reader, text, windows, partial(watch, f"{label}: {data}"))
            out[data]["split"] = split if Path(data).is_dir() else None
    for file, questions in material.questions.items():
        out[file] = cloze_score(reader, questions, windows.batch_size, partial(watch, f"{label}: {file}"))
    if material.tasks:
        watch(f"{label}: {', '.join(material.tasks.names)}", 0, 0)
        out |= task_scores(trained, reader, request, material.tasks)
    return out


def texts_of(trained: Trained, request: Request) -> list[str]:
    """What was asked for; if nothing was, the data of the run, else the built-in corpus if the model reads it.

    Raises:
        ValueError: neither.
    """
    if request.data or request.cloze or request.tasks:
        return request.data
    if trained.data is not None:
        return [str(trained.data)]
    sizes = {preset.vocab_size for preset in PRESETS.values()}
    if trained.tokenizer is not None and vocab_size(trained.tokenizer) in sizes:
        demo = prepared_demo(vocab_size(trained.tokenizer), quiet=True)
        if Dataset.open(demo).tokenizer().to_str() == trained.tokenizer.to_str():
            return [str(demo)]
    if trained.tokenizer is None:
        raise ValueError(f"{trained.label} holds no {FILE_NAME}, so it reads nothing but prepared folders: --data DIR")
    raise ValueError(f"what is {trained.label} to be evaluated on? give --data FILE|DIR, --cloze FILE or --tasks NAME")


def text_score(reader: Reader, text: Text, windows: Windows, watch: Callable[[int, int], None]) -> Score:
    """The numbers of one text."""
    chosen = reading(reader, windows)
    assert chosen.context and chosen.stride and chosen.batch_size
    tokens = text.split.tokens - 1
    total = -(-min(tokens, chosen.max_tokens or tokens) // (chosen.stride * chosen.batch_size))
    done = iter(range(total + 2))
    loss: Loss = text_loss(reader, text, chosen, between=lambda: watch(next(done, total), total))
    return {
        "kind": "text",
        "metrics": {name: number(value) for name, value in metrics(loss, text.words, tokens).items()},
        "n": loss.tokens,
        "skipped": text.split.tokens - loss.tokens,
        "text_bytes": loss.text_bytes,
        "documents": text.split.documents,
        "context": chosen.context,
        "stride": chosen.stride,
        "document_mask": chosen.document_mask,
    }


def cloze_score(
    reader: Reader, questions: list[Question], batch_size: int | None, watch: Callable[[int, int], None]
) -> Score:
    """The numbers of one file of questions."""
    total = sum(len(q.choices) for q in questions)
    watch(0, total)
    found = cloze(reader, questions, batch_size, lambda done: watch(done, total))
    shown = {name: number(found.values[name], found.stderrs[name]) for name in METRICS}
    return {"kind": "cloze", "metrics": shown, "n": found.n, "chance": found.chance}


def task_scores(trained: Trained, reader: Reader, request: Request, tasks: Tasks) -> dict[str, Score]:
    """The numbers of the harness's tasks."""
    own_tokenizer(reader, "tasks")
    windows = request.windows
    found = evaluate_tasks(
        trained.model,
        hf_tokenizer(trained),
        tasks,
        limit=request.limit,
        batch_size=windows.batch_size,
        context=windows.context,
        quiet=request.quiet,
        complain=lambda message: to_stderr(f"{trained.label}: {message}"),
    )
    return {
        name: {
            "kind": "task",
            "metrics": {metric: number(value, s.stderrs[metric]) for metric, value in s.values.items()},
            "n": s.n,
            "version": s.version,
        }
        for name, s in found.items()
    }


def hf_tokenizer(trained: Trained) -> Any:
    """The tokenizer as a class of transformers: as the folder says, or as `nr.save` would write it there.

    Raises:
        ValueError: the folder asks for a class that transformers lacks; code of its own is never run.
    """
    if (trained.folder / TOKENIZER_CONFIG).is_file():
        return read_tokenizer(trained.folder)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(trained.tokenizer, trained.model, Path(folder))
        return read_tokenizer(Path(folder))


def read_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer, by transformers' own classes alone: left to itself it asks whether to run a folder's."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read the tokenizer in {folder}: {one_line(error)}") from None


def number(value: float, stderr: float | None = None) -> dict[str, float | None]:
    """A metric, ready for JSON, which has no infinity."""
    return {"value": value if math.isfinite(value) else None, "stderr": stderr}

"""Tasks of lm-evaluation-harness (the extra `eval`), by name or from YAML files of one's own.

The model object itself is given to the harness, so factors are evaluated as factors, with the harness's own prompts,
tokenisation and metrics: the numbers are those of driving it on the merged dense export, up to rounding of the merge.
Importing the harness takes some ten seconds. Its stock tasks download their data from the Hugging Face hub.

`GROUPS` names what papers evaluated: `spectron` is HellaSwag, PIQA and ARC-Easy, zero-shot (Janson et al., ICML 2026).
"""

import contextlib
import importlib.metadata
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from nativerank.config import nearest
from nativerank.distributed.wrap import evaluating
from nativerank.extras import require
from nativerank.models import one_line

GROUPS = {"spectron": ("hellaswag", "piqa", "arc_easy")}
PACKAGE, EXTRA, WHAT = "lm_eval", "eval", "--tasks"
YAML = (".yaml", ".yml")
BATCH = 8
CLOSE = 0.75  # names that are less alike than this are no slip of the keyboard
FROM_HUB = (
    " (data of a stock task come from huggingface.co: run it once where there is a network, then "
    "HF_DATASETS_OFFLINE=1 finds them in the cache)"
)


@dataclass(frozen=True)
class TaskScore:
    """What the harness says of one task: values and standard errors (None where it has none) by metric."""

    values: dict[str, float]
    stderrs: dict[str, float | None]
    n: int | None
    version: str | None


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks with their data: what the harness evaluates by name, `manager` knows all of its tasks."""

    objects: dict[str, list[Any]]
    manager: Any

    @property
    def names(self) -> tuple[str, ...]:
        """As they were asked for, groups of ours replaced by their members."""
        return tuple(self.objects)


def package_version() -> str:
    """Of the harness."""
    return importlib.metadata.version(PACKAGE)


def expanded(names: list[str]) -> list[str]:
    """The names with groups replaced by their members, each once, in order."""
    members = [member for name in names for member in GROUPS.get(name, (name,))]
    return list(dict.fromkeys(members))


def open_tasks(names: list[str], include: list[str], quiet: bool = True) -> Tasks:
    """Loads tasks and their data.

    Args:
        names: of tasks, groups (ours or the harness's), or paths of YAML files.
        include: folders with YAML files of tasks.
        quiet: nothing of what the harness prints.

    Raises:
        ValueError: the extra is missing, no such folder or task, or data that cannot be had.
    """
    for folder in include:
        if Path(folder).is_file():
            raise ValueError(f"--include_path {folder} is a file; give its folder, or --tasks {folder}")
        if not Path(folder).is_dir():
            raise ValueError(f"--include_path {folder}: no such folder")
    harness = require(f"{PACKAGE}.tasks", EXTRA, WHAT)
    wanted = expanded(names)
    with hushed(quiet):
        manager = harness.TaskManager(include_path=include or None)
        own = harness.TaskManager(include_path=include, include_defaults=False).all_tasks if include else []
        check_known(wanted, manager.all_tasks, own, include)
        return Tasks({name: group_or_tasks(name, load_task(manager, name)) for name in wanted}, manager)


def check_known(names: list[str], known: list[str], own: Sequence[str] = (), include: Sequence[str] = ()) -> None:
    """Raises a ValueError for a name that is neither a task nor a YAML file.

    It tells the nearest one that is, first of all of one's `own`, and a file in the `include` folders that the harness
    passed by because it cannot be read.
    """
    for name in names:
        if Path(name).suffix in YAML:
            if not Path(name).is_file():
                raise ValueError(f"--tasks {name}: no such file")
        elif name not in known:
            near = nearest(name, [*own, *GROUPS], CLOSE) or nearest(name, known, CLOSE)
            hint = unreadable(include) or "--include_path DIR adds YAML files of your own"
            raise ValueError(f"unknown task {name!r}{near} ({hint})")


def unreadable(include: Sequence[str]) -> str | None:
    """What is wrong with the first file of the folders that is not YAML; None if all are."""
    for file in sorted(file for folder in include for file in Path(folder).rglob("*.yaml")):
        try:
            yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)  # tags of the harness stay closed
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            return f"{file} cannot be read: {one_line(error)}"
    return None


def load_task(manager: Any, name: str) -> Any:
    """One name with its data. What fails in there (network, YAML, templates) has dozens of types."""
    try:
        return manager.load([name])
    except Exception as error:
        hint = FROM_HUB if away(error) else ""
        raise ValueError(f"cannot load task {name}: {type(error).__name__}: {one_line(error)}{hint}") from None


def away(error: BaseException | None) -> bool:
    """Whether it comes of data that are elsewhere: no connection, or a name that only huggingface.co knows."""
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"ConnectionError", "DatasetNotFoundError", "HfHubHTTPError", "LocalEntryNotFoundError"}:
            return True
        error = error.__cause__ or error.__context__
    return False


def group_or_tasks(name: str, found: Any) -> list[Any]:
    """The group of that name, else the tasks that the name stands for."""
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    context: int | None = None,
    quiet: bool = True,
    complain: Callable[[str], None] = lambda message: None,
) -> dict[str, TaskScore]:
    """Scores by task, and by group where the harness gives one.

    Args:
        model: a causal LM of transformers, factored or not, on its device.
        tokenizer: of transformers.
        tasks: of `open_tasks`.
        limit: questions per task; None for all.
        batch_size: requests at once.
        context: tokens that the model sees at most; None for its positions.
        quiet: no progress.
        complain: told of a task whose prompts were cut.

    Raises:
        ValueError: results that are not numbers, or a task that does not fit the model or itself.
    """
    models, evaluator = (require(f"{PACKAGE}.{part}", EXTRA, WHAT) for part in ("models.huggingface", "evaluator"))
    device = next(model.parameters()).device
    options: dict[str, Any] = {"limit": limit, "log_samples": False, "bootstrap_iters": 100}
    found: dict[str, TaskScore] = {}
    with hushed(quiet) as notes, evaluating(model), torch.no_grad():
        wrapped = models.HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size or BATCH,
            max_length=context,
            mixed_precision_dtype="bfloat16" if device.type == "cuda" else None,  # as `loss.autocast`
        )
        for name, objects in tasks.objects.items():
            with named(name, wrapped.max_length):
                results = evaluator.simple_evaluate(wrapped, tasks=objects, task_manager=tasks.manager, **options)
            found |= {task: task_score(task, results) for task in results["results"]}
            if notes.cuts:
                complain(
                    f"{name}: prompts longer than the {wrapped.max_length} tokens of the model lost their beginning"
                )
                notes.cuts = 0
    return found


@contextlib.contextmanager
def named(name: str, limit: int) -> Iterator[None]:
    """Makes one line of what the harness raises on a task that does not fit the model or itself.

    It asserts what it needs of lengths, and templates, answers and metrics fail where they are used. Anything else
    (memory, our own mistakes) keeps its traceback.
    """
    from jinja2 import TemplateError

    try:
        yield
    except (AssertionError, ValueError, IndexError, KeyError, TypeError, AttributeError, TemplateError) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        reason = f"{type(error).__name__}: {one_line(error) or line}"
        raise ValueError(f"cannot evaluate task {name} with the model's {limit} tokens: {reason}") from error


def task_score(name: str, results: dict[str, Any]) -> TaskScore:
    """The row of one task; its keys are "metric,filter" and "metric_stderr,filter"."""
    row = results["results"][name]
    numbers = {key: value for key, value in row.items() if "," in key}
    values, stderrs = {}, {}
    for key, value in numbers.items():
        metric, _, chosen = key.partition(",")
        if metric.endswith("_stderr"):
            continue
        shown = metric if chosen == "none" else f"{metric} ({chosen})"
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{metric} of task {name} is {value}, not a number: the model diverged or is damaged")
        error = numbers.get(f"{metric}_stderr,{chosen}")
        values[shown], stderrs[shown] = float(value), float(error) if isinstance(error, int | float) else None
    samples = results.get("n-samples", {}).get(name, {}).get("effective")
    version = results.get("versions", {}).get(name)
    return TaskScore(values, stderrs, samples, None if version in (None, "N/A", "Yaml") else str(version))


class Notes(logging.Handler):
    """In the place of the harness's log: counts the prompts that it cut, which it says nowhere else."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.cuts = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.cuts += "truncat" in record.getMessage().lower()


@contextlib.contextmanager
def hushed(quiet: bool) -> Iterator[Notes]:
    """Keeps the harness's notes to itself, and if quiet its progress bars; its errors are raised all the same."""
    logger, notes = logging.getLogger(PACKAGE), Notes()
    before = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(notes)
    try:
        with contextlib.redirect_stdout(sys.stderr), silent_stderr() if quiet else contextlib.nullcontext():
            yield notes  # standard output is for the result
    finally:
        logger.removeHandler(notes)
        logger.level, logger.propagate = before


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Standard error of this process and of the git that the harness asks for a commit, dropped for the block."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
                yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

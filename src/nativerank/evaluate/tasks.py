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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nativerank.config import nearest
from nativerank.distributed.wrap import evaluating
from nativerank.extras import require

GROUPS = {"spectron": ("hellaswag", "piqa", "arc_easy")}
PACKAGE, EXTRA, WHAT = "lm_eval", "eval", "--tasks"
YAML = (".yaml", ".yml")
BATCH = 8


@dataclass(frozen=True)
class TaskScore:
    """What the harness says of one task: values and standard errors (None where it has none) by metric."""

    values: dict[str, float]
    stderrs: dict[str, float | None]
    n: int | None
    version: str | None


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks with their data: `objects` is what the harness evaluates, `manager` knows all of its tasks."""

    names: tuple[str, ...]
    objects: list[Any]
    manager: Any


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
        if not Path(folder).is_dir():
            raise ValueError(f"--include_path {folder}: no such folder")
    harness = require(f"{PACKAGE}.tasks", EXTRA, WHAT)
    wanted = expanded(names)
    with hushed(quiet):
        manager = harness.TaskManager(include_path=include or None)
        check_known(wanted, manager.all_tasks)
        loaded = [load_task(manager, name) for name in wanted]
    objects = [task for name, found in zip(wanted, loaded, strict=True) for task in group_or_tasks(name, found)]
    return Tasks(tuple(wanted), objects, manager)


def check_known(names: list[str], known: list[str]) -> None:
    """Raises a ValueError for a name that is neither a task nor a YAML file, with the nearest one that is."""
    for name in names:
        if Path(name).suffix in YAML:
            if not Path(name).is_file():
                raise ValueError(f"--tasks {name}: no such file")
        elif name not in known:
            near = nearest(name, [*known, *GROUPS])
            raise ValueError(f"unknown task {name!r}{near} (--include_path DIR adds YAML files of your own)")


def load_task(manager: Any, name: str) -> Any:
    """One name with its data. What fails in there (network, YAML, templates) has dozens of types."""
    try:
        return manager.load([name])
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"cannot load task {name}: {reason} (data of a stock task come from huggingface.co: run it once where "
            f"there is a network, then HF_DATASETS_OFFLINE=1 finds them in the cache)"
        ) from None


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

    Raises:
        ValueError: logits or results that are not numbers.
    """
    models, evaluator = (require(f"{PACKAGE}.{part}", EXTRA, WHAT) for part in ("models.huggingface", "evaluator"))
    device = next(model.parameters()).device
    check_finite(model, device)
    with hushed(quiet), evaluating(model), torch.no_grad():
        wrapped = models.HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size or BATCH,
            max_length=context,
            mixed_precision_dtype="bfloat16" if device.type == "cuda" else None,  # as `loss.autocast`
        )
        options: dict[str, Any] = {"limit": limit, "log_samples": False, "bootstrap_iters": 100}
        results = evaluator.simple_evaluate(wrapped, tasks=tasks.objects, task_manager=tasks.manager, **options)
    return {name: task_score(name, results) for name in results["results"]}


@torch.no_grad()
def check_finite(model: nn.Module, device: torch.device) -> None:
    """Raises a ValueError if the model answers NaN: an accuracy over NaN would look like a number."""
    with evaluating(model):
        logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are not finite numbers: it diverged or is damaged")


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


@contextlib.contextmanager
def hushed(quiet: bool) -> Iterator[None]:
    """Keeps the harness's notes to itself, and if quiet its progress bars; its errors are raised all the same."""
    logger = logging.getLogger(PACKAGE)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), silent_stderr() if quiet else contextlib.nullcontext():
            yield  # standard output is for the result
    finally:
        logger.setLevel(before)


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

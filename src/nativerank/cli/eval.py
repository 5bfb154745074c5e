"""nativerank eval: how good trained models are, on texts, questions and tasks, side by side."""

import argparse
import sys
from pathlib import Path
from typing import Any

from nativerank.cli.flags import add_device, add_quantize, add_quiet, add_step, device_of
from nativerank.cli.output import add_json, check_json, write_json

EXAMPLE = """examples:
  nativerank eval runs/demo-spectron
  nativerank eval runs/a runs/b runs/c/checkpoints/step-000300 --data.path data/book --json scores.json
  nativerank eval runs/a --data book.txt --context 256 --stride 64
  nativerank eval runs/a exported/dense --cloze questions.jsonl
  nativerank eval runs/a --tasks spectron --limit 200          # HellaSwag, PIQA, ARC-Easy; needs the extra `eval`
  nativerank eval runs/a --tasks my_task --include_path tasks/

Without --data, --cloze or --tasks a run is evaluated on the validation split of its own data, other models on the
built-in corpus if they read it. A file of questions holds one of these a line, or a JSON list of them:
  {"context": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}
"""
WIDTH, NAME, CELL = 80, 24, 18
LARGE = 1e5


def add_parser(subparsers: Any) -> None:
    """Flags of `nativerank eval`."""
    parser = subparsers.add_parser(
        "eval",
        description="Evaluate trained models side by side.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="RUN|DIR", help="run, checkpoint, or model folder")
    add_step(parser)
    parser.add_argument(
        "--data", "--data.path", action="append", default=[], metavar="FILE|DIR",
        help="text file or prepared folder: perplexity, bits per byte; may be given several times",
    )  # fmt: skip
    parser.add_argument("--split", metavar="val|train", help="of a prepared folder (default: val)")
    parser.add_argument(
        "--cloze", action="append", default=[], metavar="FILE", help="questions with choices, .json or .jsonl: accuracy"
    )
    parser.add_argument("--tasks", metavar="A,B", help="of lm-evaluation-harness, or the group spectron")
    parser.add_argument(
        "--include_path", action="append", default=[], metavar="DIR", help="with YAML files of tasks of your own"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each file and task (default: all)")
    parser.add_argument(
        "--eval_tokens", type=int, metavar="N",
        help="tokens of each text, in windows spread evenly: at least one of each (default: all)",
    )  # fmt: skip
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a window (default: as the run was trained)")
    parser.add_argument("--stride", type=int, metavar="N", help="by which a window begins later (default: the context)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="windows or choices at once (default: by memory)")
    add_quantize(parser)
    add_device(parser)
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Evaluates, then shows a table or writes JSON."""
    check_json(flags.json)
    tasks = None if flags.tasks is None else [name.strip() for name in flags.tasks.split(",") if name.strip()]
    if tasks == []:
        raise ValueError(f"--tasks {flags.tasks!r} names no task")
    from nativerank.cli.console import progress
    from nativerank.evaluate.text import Windows
    from nativerank.scores import Request, evaluate

    windows = Windows(flags.context, flags.stride, flags.batch_size, flags.eval_tokens)
    request = Request(
        models=flags.models, step=flags.step, data=flags.data, split=flags.split, cloze=flags.cloze,
        tasks=tasks or [], include=flags.include_path, limit=flags.limit, windows=windows,
        quantize=flags.quantize, quiet=flags.quiet or not sys.stderr.isatty(),
    )  # fmt: skip
    device = device_of(flags)
    done: dict[str, Any] = {}
    try:
        with progress(flags.quiet) as watch:
            evaluate(request, device, watch, keep=done.update)
    finally:  # also what was done before a model failed
        if done and not write_json(done, flags.json) and not flags.quiet:
            print("\n".join(table(done)))
    return 0


def table(result: dict[str, Any]) -> list[str]:
    """A column for each model, in blocks of as many as 80 columns hold."""
    models = result["models"]
    heads = {label: label if len(label) <= CELL - 2 else f"[{i}]" for i, label in enumerate(models, 1)}
    legend = [f"{head} {label}" for label, head in heads.items() if head != label]
    per_block = (WIDTH - NAME) // CELL
    labels = list(models)
    blocks = [block(result, heads, labels[i : i + per_block]) for i in range(0, len(labels), per_block)]
    return [*legend, *([""] if legend else []), *(line for lines in blocks for line in lines)]


def block(result: dict[str, Any], heads: dict[str, str], labels: list[str]) -> list[str]:
    """The lines of some models."""
    from nativerank.data.demo import is_prepared_demo
    from nativerank.layers.report import clipped

    scores = {label: result["models"][label]["scores"] for label in labels}
    lines = [" " * NAME + "".join(f"{heads[label]:>{CELL}}" for label in labels)]
    for name in dict.fromkeys(name for label in labels for name in scores[label]):
        found = [scores[label].get(name) for label in labels]
        first = next(score for score in found if score)
        shown = "built-in corpus" if is_prepared_demo(Path(name)) else clipped(name, WIDTH - 24)
        lines.append(shown + heading(first))
        for metric in dict.fromkeys(m for score in found if score for m in score["metrics"]):
            cells = [cell(score["metrics"].get(metric)) if score else "-" for score in found]
            lines.append(f"  {clipped(metric, NAME - 3):<{NAME - 2}}" + "".join(f"{c:>{CELL}}" for c in cells))
        for fact in ("n", "context", "stride"):
            if any(score and fact in score and score[fact] is not None for score in found):
                cells = [f"{score[fact]:,}" if score and score.get(fact) else "-" for score in found]
                shown = {"n": "tokens" if first["kind"] == "text" else "questions"}.get(fact, fact)
                lines.append(f"  {shown:<{NAME - 2}}" + "".join(f"{c:>{CELL}}" for c in cells))
    return [*lines, ""]


def heading(score: dict[str, Any]) -> str:
    """What belongs behind a name."""
    if score["kind"] == "cloze":
        return f"  (chance {score['chance']:.3f})"
    if score["kind"] == "text" and score["split"]:
        return f"  ({score['split']})"
    return ""


def cell(metric: dict[str, Any] | None) -> str:
    """A value with its standard error."""
    if metric is None or metric["value"] is None:
        return "-" if metric is None else "inf"
    value, error = metric["value"], metric["stderr"]
    text = f"{value:.3e}" if abs(value) >= LARGE else f"{value:.4f}"
    return text if error is None else f"{text} +- {error:.4f}"

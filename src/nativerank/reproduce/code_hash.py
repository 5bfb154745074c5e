"""Which program made a result: a hash of the code that decides what a run computes, blind to comments and layout.

A card whose result was made by other code is stale: it may still hold, and nobody knows.
"""

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import nativerank
from nativerank.reproduce.card import Experiments

# What a run computes and how rates are searched; not how it is shown, tracked, stored or launched.
RUNS = (
    "linalg/*.py",
    "layers/*.py",
    "optim/*.py",
    "rank/*.py",
    "data/*.py",
    "methods.py",
    "models.py",
    "config.py",
    "convert.py",
    "evaluate/loss.py",
    "evaluate/probes.py",
    "train/loop.py",
    "train/step.py",
    "train/guard.py",
    "train/resolve.py",
    "train/setup.py",
    "experiments/compare.py",
    "experiments/search.py",
)
MEASURES = ("bench/*.py", "plan/*.py", "accounting/*.py")
SWEEPS = ("scaling/*.py", "accounting/*.py", "reproduce/sweep.py")


def code_hash(experiments: Experiments | None = None, root: Path | None = None) -> str:
    """Twelve hex digits of the code that decides what experiments give.

    Args:
        experiments: whose kinds count; None stands for runs alone.
        root: folder of the program; None is the installed one.
    """
    more = experiments and (*(MEASURES if experiments.measures else ()), *(SWEEPS if experiments.sweeps else ()))
    return _hash(tuple(dict.fromkeys((*RUNS, *(more or ())))), root or Path(nativerank.__file__).parent)


@functools.cache
def _hash(patterns: tuple[str, ...], root: Path) -> str:
    total = hashlib.sha256()
    for pattern in patterns:
        files = sorted(root.glob(pattern))
        assert files, f"{pattern} names nothing"
        for file in files:
            total.update(str(file.relative_to(root)).encode())
            total.update(meaning(file.read_text(encoding="utf-8")).encode())
    return total.hexdigest()[:12]


def meaning(source: str) -> str:
    """A program without comments, docstrings and blank lines; the same for every version of Python."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for first, last in docstrings(source):
        lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def docstrings(source: str) -> Iterator[tuple[int, int]]:
    """First and last line of each."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.lineno, value.end_lineno or value.lineno

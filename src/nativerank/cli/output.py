"""The --json [FILE] of every command: whether FILE can be written is known before the work, the result comes after."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STDOUT = "-"


def add_json(parser: Any) -> None:
    """The flag; its value is None, STDOUT or a path."""
    parser.add_argument("--json", nargs="?", const=STDOUT, metavar="FILE", help="the result as JSON, to FILE or stdout")


def check_json(target: str | None) -> None:
    """Raises a ValueError if the result could not be written to this file."""
    if target in (None, STDOUT):
        return
    file = Path(target or "")
    if file.is_dir():
        raise ValueError(f"--json {file} is a folder")
    if not file.parent.is_dir():
        raise ValueError(f"--json {file}: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"--json {file} cannot be written")


def teller(flags: Any) -> Callable[[str], None]:
    """What progress is told to: lines at once, none with --quiet, on stderr where the result goes to stdout."""
    stream = sys.stderr if flags.json == STDOUT else sys.stdout

    def say(line: str) -> None:
        if not flags.quiet:
            print(line, file=stream, flush=True)

    return say


def write_json(result: dict[str, Any], target: str | None) -> bool:
    """Writes the result where it was asked for; says whether that was standard output, then for it alone."""
    if target is None:
        return False
    text = json.dumps(result, indent=1)
    if target == STDOUT:
        print(text)
        return True
    Path(target).write_text(text + "\n", encoding="utf-8")
    return False

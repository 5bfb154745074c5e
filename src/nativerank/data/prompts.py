"""Prompts out of a file: one a line, or the "prompt" of every JSON object of a .jsonl file; blank ones are skipped.

Read as training data are: also .gz and .zst, strict UTF-8, and whatever is wrong is one line with file and place.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from nativerank.data.readers import PARQUET, RECORDS, decode, file_kind, open_stream, record_documents

FIELD = "prompt"
STDIN = "-"


def read_prompts(source: str) -> list[str]:
    """All prompts of a file, or of the lines of standard input for "-".

    Raises:
        ValueError: no such file, not UTF-8, a line that is no JSON object with the field, or not a single prompt.
    """
    if source == STDIN:
        found = list(line_prompts(sys.stdin.buffer, Path("standard input")))
    elif not Path(source).is_file():
        raise ValueError(f"no such file with prompts: {source}")
    elif file_kind(Path(source)) == RECORDS:
        found = list(record_documents(Path(source), FIELD))
    elif file_kind(Path(source)) == PARQUET:
        raise ValueError(f"cannot read prompts from {source}: a text file or .jsonl is needed")
    else:
        with open_stream(Path(source)) as stream:
            found = list(line_prompts(stream, Path(source)))
    if not found:
        raise ValueError(f"{'standard input' if source == STDIN else source} holds no prompts")
    return found


def line_prompts(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    """Each line that is not blank, without its end."""
    offset = 0
    for number, line in enumerate(lines, 1):
        text = decode(line, path, offset).removeprefix("\ufeff" if number == 1 else "").rstrip("\r\n")
        offset += len(line)
        if text.strip():
            yield text

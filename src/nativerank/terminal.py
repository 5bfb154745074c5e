"""Where results and progress are shown, the same for every command.

In a pipe a line has 80 columns; NO_COLOR takes away all styles; a character that the stream's encoding lacks becomes
a question mark and no error. Rich is imported at the first use.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80


def console(stderr: bool = False, **options: Any) -> "Console":
    """A console on standard output or standard error; `options` are rich's."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    options = {"highlight": False, "width": None if stream.isatty() else WIDTH} | options
    if os.environ.get("NO_COLOR"):  # rich would leave bold and the like
        options["color_system"] = None
    return Console(stderr=stderr, **options)

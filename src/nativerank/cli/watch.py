"""nativerank watch: a run on a terminal while it goes on, read from its folder alone.

nativerank watch runs/a                  # until the run ends, or Ctrl-C
nativerank watch runs/a --once           # as it stands; so it is in a pipe
nativerank watch runs/a --json           # the same for a program
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from nativerank.cli.flags import add_quiet
from nativerank.cli.output import STDOUT, add_json, check_json, write_json
from nativerank.terminal import console as open_console

DESCRIPTION = """Shows a run on the terminal: how far it is, loss, rates, speed, spectral norms, what happened. It reads
the run folder alone, so it works beside a run, over ssh, and after it. In a pipe it prints once."""
EXAMPLE = """examples:
  nativerank watch runs/a                  # until the run ends, or Ctrl-C
  nativerank watch runs/a --every 30
  nativerank watch runs/a --once           # as it stands
  nativerank watch runs/a --json           # the same for a program
"""
EVERY_SECONDS, LEAVE_SECONDS = 2.0, 0.1


def add_parser(subparsers: Any) -> None:
    """The flags."""
    parser = subparsers.add_parser(
        "watch", description=DESCRIPTION, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder, also before its first step")
    parser.add_argument("--once", action="store_true", help="show it as it stands, and end")
    parser.add_argument("--every", type=float, default=EVERY_SECONDS, metavar="SECONDS", help="between two looks")
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(flags: Any) -> int:
    """Looks once, or until the run ends."""
    check_json(flags.json)
    if not flags.every > 0:
        raise ValueError(f"--every {flags.every:g}: the seconds between two looks must be above 0")
    if flags.quiet and flags.json is None:
        raise ValueError("--quiet leaves nothing to look at; add --json, or drop it")
    from nativerank.report.watch import watch_run

    watched = watch_run(flags.run_folder)
    if flags.json is not None:
        if write_json(watched.record(), flags.json) or flags.quiet:
            return 0

    from nativerank.cli.dashboard import Dashboard

    terminal = sys.stdout.isatty()
    console = open_console()
    if terminal and not flags.once and flags.json in (None, STDOUT):
        follow(watched, console, flags.every)
    console.print(Dashboard(watched))
    return 0


def follow(watched: Any, console: Any, every: float) -> None:
    """Draws the run on a screen of its own until it ends or Ctrl-C comes."""
    from rich.live import Live

    from nativerank.cli.dashboard import Dashboard

    # Raised as KeyboardInterrupt while the picture is drawn, Ctrl-C could be lost in it.
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: asked.append(signum))
    try:
        with Live(Dashboard(watched), console=console, screen=True, auto_refresh=False) as live:
            while not asked and watched.state != "finished":
                wait(every, asked)
                watched.update()
                live.refresh()
    finally:
        signal.signal(signal.SIGINT, before)


def wait(seconds: float, asked: list[int]) -> None:
    """Until so many seconds are over, or somebody asked to leave."""
    until = time.monotonic() + seconds
    while not asked and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, LEAVE_SECONDS))

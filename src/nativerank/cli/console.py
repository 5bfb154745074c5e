"""What a person sees while a command works: a rich progress bar on a terminal, plain lines in a pipe, or warnings."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nativerank.terminal import console as open_console

PLAIN_EVERY_SECONDS = 15.0
SHOWN_WARNINGS = 3

Watch = Callable[..., None]  # what is going on, how much of it is done, of how much (0 where that is not known)


@contextmanager
def progress(quiet: bool, still: bool = False) -> Iterator[Watch]:
    """Shows, on standard error, what a command is doing and how long it will take: a bar on a terminal, else `Lines`.

    Args:
        quiet: show nothing.
        still: draw only when told something, so that nothing runs beside what is measured.
    """
    if quiet:
        yield lambda what, done=0, total=0: None
        return
    if not sys.stderr.isatty():
        yield Lines()
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=open_console(stderr=True), transient=True, auto_refresh=not still) as bar:
        task, before = bar.add_task("", total=None), ""

        def watch(what: str, done: int = 0, total: int = 0) -> None:
            nonlocal before
            if what != before:
                bar.reset(task, description=what)  # its time is its own
            before = what
            bar.update(task, completed=done, total=total or None, refresh=still)

        yield watch


class Lines:
    """Progress where no bar can be: a line every PLAIN_EVERY_SECONDS, with the time that is left."""

    def __init__(self) -> None:
        self.what, self.first = "", 0
        self.began = self.shown = time.monotonic()

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if what != self.what:
            self.what, self.began, self.first = what, now, done
        if now - self.shown < PLAIN_EVERY_SECONDS:
            return
        self.shown = now
        text = f"{what}: {done:,} of {total:,}" if total else what
        if total and done > self.first:
            text += f", about {(now - self.began) / (done - self.first) * (total - done):.0f} s left"
        print(text, file=sys.stderr, flush=True)


class TrainConsole:
    """Listens to a run. NO_COLOR is honoured; when piped, a line every PLAIN_EVERY_SECONDS."""

    def __init__(self, quiet: bool = False, to_stderr: bool = False):
        self.quiet = quiet
        self.console = open_console(to_stderr, quiet=quiet, soft_wrap=not sys.stdout.isatty())
        self.bar: Progress | None = None
        self.task: Any = None
        self.steps, self.val_loss, self.shown, self.first = 0, "", 0.0, 0
        self.began = time.monotonic()

    def __enter__(self) -> "TrainConsole":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, facts: dict[str, Any]) -> None:
        """Two lines on what is about to run."""
        n = facts["parameters"]
        kept = f", {facts['factorized']} matrices in low rank" if facts["factorized"] else ", dense"
        if facts["factorized"] and facts["left_dense"]:
            kept += f", {facts['left_dense']} left dense"
        self.say(
            f"{facts['model']} with {facts['method']}: {n['total'] / 1e6:.2f}M parameters "
            f"({n['non_embedding'] / 1e6:.2f}M without embeddings){kept}"
        )
        self.say(
            f"{facts['steps']} steps of {facts['tokens_per_step']:,} tokens, lr {facts['lr']:g}, aux_lr "
            f"{facts['aux_lr']:g}, {facts['device']} -> {facts['out']}"
        )
        if "shards" in facts:
            from nativerank.distributed.grid import in_words

            replicas, shards = facts["replicas"], facts["shards"]
            self.say(f"{replicas * shards} processes: {in_words(replicas, shards)}")
            if uneven := facts["uneven"]:
                more = f" and {len(uneven) - 1} more" if len(uneven) > 1 else ""
                self.say(f"note: {uneven[0]}{more}: cut along rows, since {facts['shards']} does not divide d_in")
        warnings = facts["warnings"]
        for warning in warnings[:SHOWN_WARNINGS]:
            self.say(f"note: {warning}")
        if len(warnings) > SHOWN_WARNINGS:
            self.say(f"note: and {len(warnings) - SHOWN_WARNINGS} more like these, in metrics.jsonl")
        if "tracked" in facts:
            self.say("{by}: {look}".format(**facts["tracked"]))
        if facts["event"] == "resume":
            self.say(f"resumed at step {facts['step']} from {facts['checkpoint']}")
        self.steps, self.first, self.began = facts["steps"], facts["step"], time.monotonic()
        if self.console.is_terminal and not self.quiet:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("train", total=self.steps, completed=self.first, text="")

    def row(self, row: dict[str, Any]) -> None:
        """Shows a step's row, at most every PLAIN_EVERY_SECONDS when piped, but every validation."""
        if self.quiet:
            return
        if row.get("event") == "ranks":
            before, after = (sum(pair[i] for pair in row["ranks"].values()) for i in (0, 1))
            self.say(f"step {row['step']}: {len(row['ranks'])} ranks changed, their sum from {before} to {after}")
        if "loss" not in row:
            return
        if "val_loss" in row:
            self.val_loss = f"  val {row['val_loss']:.3f}"
        text = f"loss {row['loss']:.3f}{self.val_loss}  {row['tokens_per_second']:,.0f} tok/s"
        text += f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], text=text)
            return
        if "val_loss" in row or time.monotonic() - self.shown > PLAIN_EVERY_SECONDS:
            self.shown = time.monotonic()
            done = max(row["step"] - self.first, 1)
            left = (self.shown - self.began) / done * (self.steps - row["step"])
            self.console.print(f"step {row['step']}/{self.steps}  {text}  about {left:.0f} s left")

    def say(self, message: str) -> None:
        """One line above the bar."""
        self.console.print(escape(message), soft_wrap=True)  # a command that is shown must stay one line

    def warn(self, message: str) -> None:
        """One line that even a quiet run shows, then on standard error."""
        if self.quiet:
            print(message, file=sys.stderr)
        else:
            self.say(message)

    def summary(self, summary: dict[str, Any]) -> None:
        """The result: losses beside xz, a sample, where everything is."""
        if self.bar is not None:
            self.bar.stop()
        bits, xz = summary["bits_per_byte"], summary["xz_bits_per_byte"]
        beside = f"  (xz -9 on the same text: {xz:.3f}; {bits / xz - 1:+.0%})" if xz else ""
        lines = {
            "validation loss": f"{summary['val_loss']:.4f} nats/token  (perplexity {summary['perplexity']:.1f})",
            "bits per byte": f"{bits:.3f}{beside}",
            "sample": f"{summary['prompt']} ...{summary['sample']}",
            "run folder": summary["out"],
        }
        if "mfu" in summary:
            lines["MFU"] = f"{summary['mfu']:.1%} of the device's bf16 peak (exact FLOPs, recomputation not counted)"
        self.console.print()
        if not self.console.is_terminal:  # nobody's width to fill
            for name, text in lines.items():
                self.say(f"{name:<15}  {text}")
            return
        table = Table.grid(padding=(0, 2))
        for name, text in lines.items():
            table.add_row(name, escape(text))
        self.console.print(table)

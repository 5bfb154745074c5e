"""Services that show runs (`--track`): each gets every row of metrics.jsonl, behind one small protocol.

A service is a row of TRACKERS: the module that it needs, the extra that installs it, the class that opens it. All work
without a network and without an account. The numbers of a row go under slash-joined names, against its step.

metrics.jsonl stays the record. So a service that cannot be opened, or fails on the way, is left behind with one warning
and an event (tracker_failed), and training goes on. The row of a start or resume says in `tracked` what a service calls
the run, and a resumed run goes on under that name, beginning with what the service missed. What it makes again, from
its checkpoint to where it was killed, is sent again only if it comes out differently, say at another rate: it cannot be
taken back. From TensorBoard it can.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from nativerank.config import RunConfig, flat
from nativerank.extras import require
from nativerank.train.metrics import finite

PROJECT = "nativerank"  # where WANDB_PROJECT or TRACKIO_PROJECT do not name another one
WANDB_INIT_SECONDS = 30.0  # without an answer; the run is then recorded offline
WANDB_FINISH_SECONDS = 120.0  # that an upload may take at the end; `wandb sync` sends what is left
Open = Callable[[RunConfig, Path, int, str | None], "Service"]
Identity = tuple[Any, ...]


class Service(Protocol):
    """A tracked run of a service.

    Attributes:
        id: what it calls the run.
        look: how a person gets to see it.
        takes_back: opening it drops what it has of later steps.
    """

    id: str
    look: str
    takes_back: bool

    def row(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under the run folder."""

    takes_back = True

    def __init__(self, config: RunConfig, out: Path, from_step: int, id: str | None):
        from torch.utils.tensorboard import SummaryWriter

        folder = out / "tensorboard"
        self.id, self.look = folder.name, f"tensorboard --logdir {folder}"
        self.writer = SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)

    def row(self, row: dict[str, Any]) -> None:
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases: files under the run folder, sent as they come if somebody is logged in.

    WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and so on are heeded. Nobody is ever asked for a key.
    """

    takes_back = False

    def __init__(self, config: RunConfig, out: Path, from_step: int, id: str | None):
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, init_timeout=WANDB_INIT_SECONDS, finish_timeout=WANDB_FINISH_SECONDS
        )
        known: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": os.environ.get("WANDB_NAME", out.resolve().name),
            "dir": str(out),
            "config": flat(config),
            "id": id,
            "reinit": "create_new",  # leaves alone a run that whoever calls us may have
            "settings": settings,
        }
        mode: Any = wandb_mode()
        try:
            self.run = wandb.init(**known, mode=mode, resume=None if mode == "offline" else "allow")
        except wandb.errors.CommError:  # the network is away
            mode = "offline"
            self.run = wandb.init(**known, mode=mode)
        self.run.define_metric("*", step_metric="step")  # its own counter must never fall, a step may: rollbacks
        self.id = self.run.id
        self.look = f"wandb sync {Path(self.run.dir).parent}" if mode == "offline" else self.run.url or mode

    def row(self, row: dict[str, Any]) -> None:
        self.run.log({"step": row["step"]} | numbers(row))

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio: a database in TRACKIO_DIR (else the Hugging Face cache), one project for all runs."""

    takes_back = False

    def __init__(self, config: RunConfig, out: Path, from_step: int, id: str | None):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        # It finds runs by name alone, so ours is one that no other run folder has.
        self.id = id or f"{out.resolve().name}-{secrets.token_hex(3)}"
        self.look = f"trackio show --project {project}"
        self.finish = trackio.finish  # which the run's own `finish` leaves to be done again at exit
        with redirect_stdout(StringIO()):  # where the result may go
            self.run = trackio.init(
                project, name=self.id, resume="allow" if id else "never", config=flat(config), embed=False
            )

    def row(self, row: dict[str, Any]) -> None:
        self.run.log(numbers(row), step=row["step"])

    def close(self) -> None:
        with redirect_stdout(StringIO()):
            self.finish()


@dataclass(frozen=True)
class Kind:
    """A row of the table: what opens a service, and what that needs."""

    module: str
    extra: str
    open: Open


TRACKERS = {
    "tensorboard": Kind("tensorboard", "track", TensorBoard),
    "wandb": Kind("wandb", "wandb", Wandb),
    "trackio": Kind("trackio", "trackio", Trackio),
}


def check_tracker(name: str) -> None:
    """Raises a ValueError if what --track needs is not installed."""
    if name != "none":
        require(TRACKERS[name].module, TRACKERS[name].extra, f"--track {name}")


def wandb_mode() -> str:
    """WANDB_MODE, but "offline" where that needs an account and nobody is logged in."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or "online"
    asks = mode not in ("offline", "dryrun", "disabled")
    return "offline" if asks and not wandb.login(prompt=False, verify=False) else mode


class Mirror:
    """Hands rows on to the service of a run, and leaves it behind when it fails.

    Args:
        config, out, from_step: the run, and the step that it goes on from.
        before: rows that the run folder had; those after `from_step` may come again.
        complain: told of the error that it failed with.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        from_step: int,
        before: Iterable[dict[str, Any]],
        complain: Callable[[Exception], None],
    ):
        known = tracked_before(before, config.track, from_step)
        self.complain, self.sent = complain, known.sent
        self.service: Service | None = None
        with self._left_behind():
            self.service = TRACKERS[config.track].open(config, out, from_step, known.id)
            self.sent = set() if self.service.takes_back else known.sent
            for row in known.missed:
                self.row(row)

    def row(self, row: dict[str, Any]) -> None:
        if self.service and numbers(row) and identity(row) not in self.sent:
            with self._left_behind():
                self.service.row(row)

    def close(self) -> None:
        service, self.service = self.service, None
        if service:
            with self._left_behind():
                service.close()

    @contextmanager
    def _left_behind(self) -> Iterator[None]:
        """Training is worth more than its picture: whatever goes wrong in a service ends here."""
        try:
            yield
        except Exception as error:
            service, self.service = self.service, None
            with suppress(Exception):
                if service:
                    service.close()
            self.complain(error)


class Before(NamedTuple):
    """What a service knows of a run that goes on."""

    id: str | None  # None if it has not seen it
    sent: set[Identity]  # rows that are about to come again
    missed: list[dict[str, Any]]  # rows that stay, and that it has not got


def tracked_before(rows: Iterable[dict[str, Any]], name: str, from_step: int) -> Before:
    """What the service `name` knows of a run with these rows, which goes on from a step."""
    id, sent, missed, on = None, set(), [], False
    for row in rows:
        if row.get("event") in ("start", "resume"):
            tracked = row.get("tracked", {})
            on = tracked.get("by") == name
            id = tracked["id"] if on else id
        elif row.get("event") == "tracker_failed":
            on = False
        elif on and row["step"] > from_step:
            sent.add(identity(row))
        elif not on and row["step"] <= from_step:
            missed.append(row)
    return Before(id, sent, missed)


def identity(row: dict[str, Any]) -> Identity:
    """Equal for two rows of which the second says nothing new; what a clock says does not count."""
    row = finite(row)
    return row["step"], row.get("event"), row.get("loss"), frozenset(numbers(row))


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row but its step, under slash-joined names; those of an event that is no step begin with it."""
    prefix = "" if "loss" in row else f"{row['event']}/"
    return {prefix + name: value for name, value in flatten(row) if name != "step"}


def flatten(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested row under slash-joined names."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, value

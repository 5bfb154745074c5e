"""The run folder: whether it may be used, by one run at a time, and the configuration it keeps.

    config.yaml   metrics.jsonl   checkpoints/step-NNNNNN/   model/   .lock

config.yaml is the resolved configuration, below comments with versions and commit, so `--config RUN/config.yaml` makes
the same run again. A run holds .lock from before it reads its data to its end; the system frees the lock of a process
that dies. A job that torchrun starts again (--max-restarts) takes its folder up whatever --resume says.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import yaml

from nativerank.config import RunConfig, differences, to_dict
from nativerank.distributed.agree import restarts
from nativerank.train.kept_config import CONFIG, read_config
from nativerank.train.resolve import free_folder, run_name
from nativerank.train.setup import versions

PARTIAL_CONFIG = f".{CONFIG}.partial"
LOCK = ".lock"
RESTART_SECONDS = 120.0  # that a job which was started again waits for the lock of its predecessor
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # a file system without locks
# What may differ between a run and its continuation. Most of it leaves the next step's numbers alone. A device,
# torch.compile, another grid or way to the loss changes their last digits, the guard which steps count, the number of
# steps the rates that follow: whoever moves a run to another machine, saves it from spikes or extends it wants that.
FREE: tuple[str, ...] = (
    "out",
    "resume",
    "device",
    "compile",
    "track",
    "profile",
    "data.path",
    "distill.teacher",  # moved; its weights are compared
    "guard",
    "train.steps",
    "train.tokens",
    "train.loss",
    "train.recompute",
)
FREE += tuple(
    f"train.{key}"
    for key in ("eval_every", "eval_tokens", "checkpoint_every", "checkpoint_async", "keep", "probe_every", "probe")
)
FREE += tuple(
    f"parallel.{key}"
    for key in ("mode", "replicas", "shards", "algebra", "reshard_after_forward", "precision", "reduce", "timeout")
)


@contextmanager
def claim(config: RunConfig, own_name: bool) -> Iterator[RunConfig]:
    """The run folder, made and locked for the block; the configuration with the name that it got.

    Where the block leaves nothing in it, a folder that was made here goes again.

    Args:
        config: resolved.
        own_name: the user named the folder; else the next free name is taken if another run was faster.

    Raises:
        ValueError: the folder holds another run, or is in use by one.
    """
    config = after_restart(config, own_name)
    assert config.out is not None and config.method is not None
    if own_name:
        refuse_or_resume(config, Path(config.out))  # before anything is made
    out, made = _make(Path(config.out), None if own_name else run_name(config, config.method))
    with _lock(out) as lock:
        try:
            refuse_or_resume(config, out)  # again: a run may have begun and ended meanwhile
            yield replace(config, out=str(out))
        finally:
            if lock is not None and [path.name for path in out.glob("*")] == [LOCK]:
                lock.unlink()
            for folder in made:
                with suppress(OSError):  # not empty
                    folder.rmdir()


def after_restart(config: RunConfig, own_name: bool) -> RunConfig:
    """The configuration for a job that torchrun starts again by itself: it goes on from its newest checkpoint.

    Raises:
        ValueError: torchrun may start it again, and the folder that it would have to find has no name.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not own_name:
        raise ValueError("torchrun --max-restarts starts a run again, which must find its folder then; give --out")
    # A checkpoint that was asked for counts until there is one of our own.
    begun = config.resume == "never" or any(Path(config.out or "").glob("checkpoints/step-*"))
    return replace(config, resume="auto") if restarts() and begun else config


def _make(out: Path, name: str | None) -> tuple[Path, list[Path]]:
    """(the folder, every folder that had to be made, innermost first); with a name, one that nobody else made."""
    while True:
        missing = [path for path in (out, *out.parents) if not path.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            out.mkdir()
            return out, missing
        except FileExistsError:
            if name is None:
                return out, []
            out = Path(free_folder(name))


@contextmanager
def _lock(out: Path) -> Iterator[Path | None]:
    """The lock file, held; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    file = out / LOCK
    # The process before a restart may have died with its host: a file server finds that out late.
    deadline = time.monotonic() + (RESTART_SECONDS if restarts() else 0.0)
    while True:
        out.mkdir(parents=True, exist_ok=True)  # whoever held the lock may have left nothing behind
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                raise ValueError(f"{out} is in use by another run") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            # A run that ended without a trace may have removed the file between our opening and locking it.
            if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
                yield file
                return
        finally:
            os.close(handle)


def refuse_or_resume(config: RunConfig, out: Path) -> None:
    """Decides whether the run folder may be used.

    Raises:
        ValueError: it holds another run, or a run and resuming was not asked for.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose another --out")
    if not out.exists() or all(path.name in (PARTIAL_CONFIG, LOCK) for path in out.iterdir()):
        if config.resume not in ("auto", "never") and not Path(config.resume).is_dir():
            raise ValueError(f"--resume {config.resume}: no such checkpoint folder")
        return
    if not (out / CONFIG).is_file():
        raise ValueError(f"{out} exists and is not a run folder; choose another --out")
    if config.resume == "never":
        raise ValueError(f"{out} already holds a run; continue it with --resume auto, or choose another --out")
    before = read_config(out)
    changed = [key for key in differences(before, config) if not key.startswith(FREE)]
    if changed:
        raise ValueError(f"{out} holds another run, which differs in {', '.join(changed)}; choose another --out")


def write_config(config: RunConfig, out: Path) -> None:
    """Writes config.yaml, atomically."""
    header = "".join(f"# {name}: {value}\n" for name, value in versions().items())
    text = header + yaml.safe_dump(to_dict(replace(config, out=str(out))), sort_keys=False)
    partial = out / PARTIAL_CONFIG
    partial.write_text(text, encoding="utf-8")
    partial.replace(out / CONFIG)

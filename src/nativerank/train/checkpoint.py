"""Checkpoints: a folder per step that is complete or not there, of tensors and JSON only.

    checkpoints/step-000123/
        model.safetensors       weights
        optimizer.safetensors   PARAMETER/STATE for every state tensor, and the random number generators
        state.json              step, tokens, data cursor, guard, best loss, fingerprints
        manifest.json           sha256 and size of the other files, how many processes wrote them; written last

N processes write model-0000k-of-0000N.safetensors and optimizer-...: each the pieces of tensors that it holds
(`train.piece_files`), which any number of processes can read. A save goes to a temporary name, every file is fsynced
and its hash told to process 0, which writes the manifest and renames (`nativerank.files`): kill -9 of any process or a
full disk leaves at most a hidden folder, which the next save removes, and earlier checkpoints as they were (one whose
step was being saved again perhaps under a hidden name, which counts too). Reading checks every hash first, each process
a share of them, and never unpickles; a folder with a file that could hold code is refused. All functions that take a
grid are called by all of its processes, and return or raise on all of them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from nativerank.distributed.agree import Agreed, from_each, from_first, together
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.pieces import Piece, piece_of
from nativerank.files import REPLACED, named_if_full, new_folder, remove_partial, sha256_file, sync
from nativerank.hub.weights import named_tensors
from nativerank.layers import init_seed
from nativerank.train.generators import PREFIX as RANDOM
from nativerank.train.generators import random_state, set_random_state
from nativerank.train.piece_files import Stored, write_pieces

KINDS = ("model", "optimizer")
STATE = "state.json"
STATE_KEYS = ("step", "tokens", "loader", "guard", "ranks", "train_flops", "best", "data", "teacher", "optimizers")
MANIFEST = "manifest.json"
PREFIX = "step-"
MAX_PROCESSES = 99_999


@dataclass(frozen=True)
class Checkpoint:
    """A folder that claims to be the state after `step` updates."""

    path: Path
    step: int


def tensor_files(kind: str, processes: int) -> list[str]:
    """The names of the files that hold the model or the optimizer, by process."""
    if processes == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{rank:05d}-of-{processes:05d}.safetensors" for rank in range(processes)]


# -- writing ------------------------------------------------------------------------------------------------------

Contents = dict[str, list[Piece]]  # by kind


class Holder(Protocol):
    """An optimizer, as far as checkpoints need it; it is told of a load afterwards."""

    def pieces(self, names: dict[int, str]) -> list[Piece]: ...


def contents(model: nn.Module, optimizer: Holder, grid: Grid = SINGLE) -> Contents:
    """What this process holds of everything that a checkpoint keeps as tensors."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        "model": [piece_of(name, tensor, grid) for name, tensor in named_tensors(model).items()],
        "optimizer": [*optimizer.pieces(names), *random_pieces(model, grid)],
    }


def random_pieces(model: nn.Module, grid: Grid) -> list[Piece]:
    """The states of this process's generators, under names of its own where it is not alone."""
    own = f"/{grid.rank}" if grid.world > 1 else ""
    return [Piece(name + own, state, tuple(state.shape)) for name, state in random_state(model).items()]


def save(
    folder: Path,
    step: int,
    tensors: Contents,
    state: dict[str, Any],
    grid: Grid = SINGLE,
    then: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Writes checkpoints/step-NNNNNN below the run folder, atomically.

    Args:
        folder: of the run, on a disk that all processes share.
        tensors: of `contents`.
        state: plain values, equal on all processes.
        then: done by process 0 when the checkpoint is there.

    Raises:
        ValueError: the disk is full, for any process; what was there before is untouched.
    """
    target = folder / "checkpoints" / f"{PREFIX}{step:06d}"
    with ExitStack() as stack:

        def begin() -> str:
            remove_partial(target.with_name(PREFIX + "*"))
            return stack.enter_context(new_folder(target, replace=True, synced=True)).name

        def end() -> None:
            (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            files = {name: entry for own in written for name, entry in own.items()} | {STATE: _entry(partial / STATE)}
            manifest = {"step": step, "processes": grid.world, "files": files}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for name in (STATE, MANIFEST):  # the processes have seen to theirs
                sync(partial / name)
            stack.close()  # it takes its name
            then()

        partial = target.with_name(from_first(grid, begin))
        written = from_each(grid, lambda: _write_own(partial, target, tensors, grid))
        from_first(grid, end)
    return Checkpoint(target, step)


def _write_own(partial: Path, target: Path, tensors: Contents, grid: Grid) -> dict[str, Any]:
    """Writes this process's files; their entries of the manifest."""
    entries = {}
    try:
        for kind, pieces in tensors.items():
            name = tensor_files(kind, grid.world)[grid.rank]
            write_pieces(pieces, partial / name)
            sync(partial / name)
            entries[name] = _entry(partial / name)
    except FileNotFoundError:
        raise ValueError(f"{target.parent} is not on a disk that all processes share") from None
    except OSError as error:
        raise named_if_full(error, target) from None
    return entries


def _entry(file: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(file), "bytes": file.stat().st_size}


# -- reading ------------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete-looking checkpoints of a run folder, oldest first; what a killed save was about to replace is one."""
    found: dict[int, Checkpoint] = {}
    for pattern in (f".{PREFIX}*{REPLACED}", f"{PREFIX}*"):  # a step has one, under its own name if there is such
        for path in (folder / "checkpoints").glob(pattern):
            number = path.name.removeprefix(".").removeprefix(PREFIX).removesuffix(REPLACED)
            if number.isdigit():
                found[int(number)] = Checkpoint(path, int(number))
    return sorted(found.values(), key=lambda c: c.step)


def check(path: Path, grid: Grid = SINGLE, contents: bool = True) -> None:
    """Compares a checkpoint with its manifest; every process reads a share of the files.

    Args:
        contents: False compares no more than names and sizes.

    Raises:
        ValueError: a missing, truncated, altered or foreign file, named.
    """
    expected = from_first(grid, lambda: _claims(path))
    mine = list(expected.items())[grid.rank :: grid.world] if contents else []
    with together(grid):
        for name, sha256 in mine:
            if sha256_file(path / name) != sha256:
                raise ValueError(f"{path} is damaged: the hash of {name} differs from the manifest")


def _claims(path: Path) -> dict[str, str]:
    """File name -> sha256, of a folder that holds exactly the files it should in their sizes."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = [name for kind in KINDS for name in tensor_files(kind, processes_of(path))] + [STATE]
        expected = {name: (files[name]["sha256"], files[name]["bytes"]) for name in wanted}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a complete checkpoint: {MANIFEST} is missing or unreadable") from None
    foreign = sorted(p.name for p in path.iterdir() if p.name not in (*expected, MANIFEST))
    if foreign:
        raise ValueError(
            f"{path} holds {foreign[0]}; a checkpoint is safetensors and JSON only, anything else is refused"
        )
    for name, (_, size) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{path} is damaged: {name} is missing or truncated")
    return {name: sha256 for name, (sha256, _) in expected.items()}


def processes_of(path: Path) -> int:
    """How many processes wrote a checkpoint.

    Raises:
        ValueError: no number of processes.
    """
    processes = json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("processes")
    if type(processes) is not int or not 1 <= processes <= MAX_PROCESSES:
        raise ValueError(f"{path / MANIFEST} was written by {processes!r} processes")
    return processes


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that passed `check`.

    Raises:
        ValueError: it is not what `Run` writes.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        if missing := sorted(set(STATE_KEYS) - set(state)):
            raise ValueError(f"it lacks {missing[0]}")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read {path / STATE}: {error}") from None
    return state


def load(path: Path, model: nn.Module, tensors: Contents, grid: Grid = SINGLE, seed: int = 0) -> dict[str, Any]:
    """Fills a model and its optimizer, in place, from a checkpoint that passed `check`; returns its state.json.

    Args:
        model: whose generators are set.
        tensors: of `contents`, of the model and its optimizer, which is told afterwards (`optimizer.loaded`).
        seed: of the run. Where another number of processes goes on, random numbers start anew from it, the step and
            the process.

    Raises:
        ValueError: the checkpoint belongs to another model, or its hashes hold but not what they vouch for.
    """
    state, processes = from_first(grid, lambda: (read_state(path), processes_of(path)))
    for kind, pieces in tensors.items():
        own = [p for p in pieces if not p.name.startswith(RANDOM)]
        stored = _read([path / name for name in tensor_files(kind, processes)], own, grid)
    if processes == grid.world:
        with together(grid):
            _read_random(stored, model, grid)
    else:
        torch.manual_seed(init_seed(seed, f"process {grid.rank} of {grid.world} from step {state['step']}"))
    return state


def _read(files: list[Path], pieces: list[Piece], grid: Grid) -> Stored:
    """Fills this process's pieces; what is stored must be what all processes hold together."""
    stored = from_first(grid, lambda: Stored(files))
    with together(grid):
        stored.fill(pieces)
    names, here = sorted(n for n in stored.shapes if not n.startswith(RANDOM)), {p.name for p in pieces}
    held = from_each(grid, lambda: bytes(name in here for name in names))
    if nowhere := [name for name, *flags in zip(names, *held, strict=True) if not any(flags)]:
        more = f", and {len(nowhere) - 1} more" if len(nowhere) > 1 else ""
        raise ValueError(f"{stored.where} holds {nowhere[0]}, which the model does not have{more}")
    return stored


def _read_random(stored: Stored, model: nn.Module, grid: Grid) -> None:
    """Sets this process's generators; what its device has none for is left out."""
    cpu, *others = zip(random_state(model), random_pieces(model, grid), strict=True)
    found = dict([cpu, *(pair for pair in others if pair[1].name in stored.shapes)])
    stored.fill(found.values())
    set_random_state(model, {name: piece.tensor for name, piece in found.items()})


def newest_usable(
    folder: Path, complain: Callable[[str], None], grid: Grid = SINGLE, contents: bool = True
) -> Checkpoint | None:
    """The newest checkpoint that passes its check (with or without its contents), None if there is none at all.

    Each damaged newer one is named through `complain(message)`.

    Raises:
        ValueError: there are checkpoints and all are damaged.
    """
    problems: list[str] = []
    for checkpoint in reversed(from_first(grid, lambda: list_checkpoints(folder))):
        try:
            check(checkpoint.path, grid, contents)
        except ValueError as error:
            problems.append(str(error))
        else:
            for problem in problems:
                complain(f"{problem}; falling back to {checkpoint.path.name}")
            return checkpoint
    if problems:
        line = f"no usable checkpoint among {len(problems)} in {folder / 'checkpoints'}: {problems[0]}"
        raise Agreed(line, silent=grid.rank != 0)
    return None


def find(
    folder: Path, resume: str, complain: Callable[[str], None], grid: Grid = SINGLE
) -> tuple[Path | None, Checkpoint | None]:
    """(the checkpoint to go on from, if any, and the newest usable one of the run folder), both checked.

    Args:
        folder: the run folder.
        resume: "never", "auto", or the path of a checkpoint.
        complain: told about each damaged one that is newer than the newest usable.

    Raises:
        ValueError: the one asked for is damaged, or all of the folder's are.
    """
    if resume == "never":
        return None, None
    newest = newest_usable(folder, complain, grid)
    if resume == "auto":
        return (newest.path if newest else None), newest
    path = Path(resume)
    if newest is None or path.resolve() != newest.path.resolve():
        check(path, grid)
    return path, newest


def prune(folder: Path, step: int, keep: int, best_step: int | None) -> None:
    """Removes all but the newest `keep` checkpoints up to `step` and the best one.

    Those after `step` are damaged ones that a resumed run fell back from: they must not count as the newest.
    """
    checkpoints = [c for c in list_checkpoints(folder) if c.step <= step]
    for checkpoint in checkpoints[: max(0, len(checkpoints) - max(keep, 1))]:
        if checkpoint.step != best_step:
            shutil.rmtree(checkpoint.path)


def fingerprint(parts: Iterable[str]) -> str:
    """A short hash that tells two sets of strings apart."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

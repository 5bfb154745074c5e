"""Checkpoints: a folder per step that is complete or not there, of tensors and JSON only.

    checkpoints/step-000123/
        model.safetensors       weights
        optimizer.safetensors   PARAMETER/STATE for every state tensor, and the random number generator
        state.json              step, tokens, data cursor, guard, best loss, fingerprints
        manifest.json           sha256 and size of the other files, written last

A save goes to a temporary name, every file and the folder are fsynced, then renamed: kill -9 or a full disk leaves
at most a temporary folder, which the next save removes. Reading checks every hash first and never unpickles; a
folder with a file that could hold code is refused.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nativerank.hub.weights import named_tensors, read_into, write_tensors

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
PREFIX, TEMPORARY = "step-", ".partial-"
RNG = "rng/torch"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that claims to be the state after `step` updates."""

    path: Path
    step: int


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Checkpoint:
    """Writes checkpoints/step-NNNNNN below the run folder, atomically.

    Raises:
        ValueError: the disk is full; what was there before is untouched.
    """
    parent = folder / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(TEMPORARY + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    target, partial = parent / f"{PREFIX}{step:06d}", parent / f"{TEMPORARY}{step:06d}-{os.getpid()}"
    try:
        partial.mkdir()
        write_tensors(named_tensors(model), partial / FILES[0])
        write_tensors(optimizer_tensors(model, optimizer) | {RNG: torch.get_rng_state()}, partial / FILES[1])
        (partial / FILES[2]).write_text(json.dumps(state, indent=1), encoding="utf-8")
        hashes = {name: {"sha256": _sha256(partial / name), "bytes": (partial / name).stat().st_size} for name in FILES}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": hashes}, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _fsync(parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or "os error 28" in str(error)
        reason = "no space left on the device" if full else str(error)
        raise ValueError(
            f"cannot save the checkpoint of step {step} in {parent}: {reason}; earlier ones are intact"
        ) from None
    return Checkpoint(target, step)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every state tensor under PARAMETER/STATE."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete-looking checkpoints of a run folder, oldest first."""
    found = []
    for path in (folder / "checkpoints").glob(PREFIX + "*"):
        if path.name.removeprefix(PREFIX).isdigit():
            found.append(Checkpoint(path, int(path.name.removeprefix(PREFIX))))
    return sorted(found, key=lambda c: c.step)


def check(path: Path) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
        ValueError: a missing, truncated, altered or foreign file, named.
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (files[name]["sha256"], files[name]["bytes"]) for name in FILES}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a complete checkpoint: {MANIFEST} is missing or unreadable") from None
    foreign = sorted(p.name for p in path.iterdir() if p.name not in (*FILES, MANIFEST))
    if foreign:
        raise ValueError(
            f"{path} holds {foreign[0]}; a checkpoint is safetensors and JSON only, anything else is refused"
        )
    for name, (sha256, size) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{path} is damaged: {name} is missing or truncated")
        if _sha256(file) != sha256:
            raise ValueError(f"{path} is damaged: the hash of {name} differs from the manifest")


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that passed `check`."""
    state: dict[str, Any] = json.loads((path / FILES[2]).read_text(encoding="utf-8"))
    return state


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts a checkpoint into a model and its optimizer, in place; returns its state.json.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another model.
    """
    check(path)
    rng = torch.get_rng_state()
    read_into(named_tensors(model), path / FILES[0])
    read_into(optimizer_tensors(model, optimizer) | {RNG: rng}, path / FILES[1])
    torch.set_rng_state(rng)
    return read_state(path)


def newest_usable(folder: Path, complain: Any) -> Checkpoint | None:
    """The newest checkpoint that passes its check; each damaged newer one is named through `complain(message)`."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            check(checkpoint.path)
        except ValueError as error:
            complain(f"{error}; falling back to the one before")
        else:
            return checkpoint
    return None


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and the best one."""
    checkpoints = list_checkpoints(folder)
    for checkpoint in checkpoints[: max(0, len(checkpoints) - max(keep, 1))]:
        if checkpoint.step != best_step:
            shutil.rmtree(checkpoint.path)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(parts: Iterable[str]) -> str:
    """A short hash that tells two sets of strings apart."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

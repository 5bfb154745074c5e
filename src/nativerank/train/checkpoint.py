"""Checkpoints: a folder per step that is complete or not there, of tensors and JSON only.

    checkpoints/step-000123/
        model.safetensors       weights
        optimizer.safetensors   PARAMETER/STATE for every state tensor, and the random number generators
        state.json              step, tokens, data cursor, guard, best loss, fingerprints
        manifest.json           sha256 and size of the other files, written last

A save goes to a temporary name, is fsynced and renamed (`nativerank.files`): kill -9 or a full disk leaves at most a
hidden folder, which the next save removes, and earlier checkpoints as they were. Reading checks every hash first and
never unpickles; a folder with a file that could hold code is refused.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nativerank.files import new_folder, remove_partial, sha256_file
from nativerank.hub.weights import named_tensors, read_into, shapes_of, write_tensors

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
PREFIX = "step-"
RNG, CUDA_RNG = "rng/torch", "rng/cuda"


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
    target = folder / "checkpoints" / f"{PREFIX}{step:06d}"
    remove_partial(target.with_name(PREFIX + "*"))
    with new_folder(target, replace=True) as partial:
        write_tensors(named_tensors(model), partial / FILES[0])
        write_tensors(optimizer_tensors(model, optimizer) | random_state(model), partial / FILES[1])
        (partial / FILES[2]).write_text(json.dumps(state, indent=1), encoding="utf-8")
        hashes = {n: {"sha256": sha256_file(partial / n), "bytes": (partial / n).stat().st_size} for n in FILES}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": hashes}, indent=1), encoding="utf-8")
    return Checkpoint(target, step)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every state tensor under PARAMETER/STATE."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def random_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the generators that the model's dropout may draw from: the CPU's, and its CUDA device's."""
    device = next(model.parameters()).device
    cuda = {CUDA_RNG: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {RNG: torch.get_rng_state()} | cuda


def set_random_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse; what the model's device has no generator for is left out."""
    device = next(model.parameters()).device
    torch.set_rng_state(state[RNG])
    if CUDA_RNG in state and device.type == "cuda":
        torch.cuda.set_rng_state(state[CUDA_RNG], device)


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
        if sha256_file(file) != sha256:
            raise ValueError(f"{path} is damaged: the hash of {name} differs from the manifest")


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that passed `check`.

    Raises:
        ValueError: it is not what `Run` writes.
    """
    try:
        state: dict[str, Any] = json.loads((path / FILES[2]).read_text(encoding="utf-8"))
        if missing := sorted({"step", "loader", "guard", "best", "data"} - set(state)):
            raise ValueError(f"it lacks {missing[0]}")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read {path / FILES[2]}: {error}") from None
    return state


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts a checkpoint that passed `check` into a model and its optimizer, in place; returns its state.json.

    Raises:
        ValueError: the checkpoint belongs to another model, or its hashes hold but not what they vouch for.
    """
    state = read_state(path)
    read_into(named_tensors(model), path / FILES[0])
    rng, stored = random_state(model), shapes_of(path / FILES[1])
    if CUDA_RNG in stored:
        rng.setdefault(CUDA_RNG, torch.empty(stored[CUDA_RNG], dtype=torch.uint8))
    else:
        rng.pop(CUDA_RNG, None)
    read_into(optimizer_tensors(model, optimizer) | rng, path / FILES[1])
    set_random_state(model, rng)
    return state


def newest_usable(folder: Path, complain: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that passes its check, None if there is none at all.

    Each damaged newer one is named through `complain(message)`.

    Raises:
        ValueError: there are checkpoints and all are damaged.
    """
    problems: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            check(checkpoint.path)
        except ValueError as error:
            problems.append(str(error))
        else:
            for problem in problems:
                complain(f"{problem}; falling back to {checkpoint.path.name}")
            return checkpoint
    if problems:
        raise ValueError(f"no usable checkpoint among {len(problems)} in {folder / 'checkpoints'}: {problems[0]}")
    return None


def find(folder: Path, resume: str, complain: Callable[[str], None]) -> tuple[Path | None, Checkpoint | None]:
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
    newest = newest_usable(folder, complain)
    if resume == "auto":
        return (newest.path if newest else None), newest
    path = Path(resume)
    if newest is None or path.resolve() != newest.path.resolve():
        check(path)
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

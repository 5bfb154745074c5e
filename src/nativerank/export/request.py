"""What an export may be asked for, told before anything is read; nothing heavy is imported here."""

from pathlib import Path

from nativerank.files import check_free, check_writable, size_in_bytes

FORMATS = {"factored": ("none", "auto"), "dense": ("all", "auto"), "gguf": ("all",)}  # the merges, the default first
MERGES = ("none", "auto", "all")
DTYPES = ("float32", "bfloat16", "float16")
GGUF_DTYPES = ("float32", "float16")
GGUF_FILE = "model.gguf"


def check_request(out: Path, format: str, merge: str | None, dtype: str, max_shard_size: str | int = "5GB") -> str:
    """What is merged; raises a ValueError for what can be seen to be wrong before weights are read."""
    if format not in FORMATS:
        raise ValueError(f"--format is one of {', '.join(FORMATS)}, got {format!r}")
    if merge is not None and merge not in MERGES:
        raise ValueError(f"--merge is one of {', '.join(MERGES)}, got {merge!r}")
    if merge is not None and merge not in FORMATS[format]:
        raise ValueError(f"--format {format} goes with --merge {' or '.join(FORMATS[format])}, got {merge}")
    known = GGUF_DTYPES if format == "gguf" else DTYPES
    if dtype not in known:
        raise ValueError(f"--dtype of --format {format} is one of {', '.join(known)}, got {dtype!r}")
    size_in_bytes("max_shard_size", max_shard_size)
    if out.suffix == ".gguf":
        raise ValueError(f"--out {out} is to be a folder; the file in it is called {GGUF_FILE}")
    check_free(out)
    check_writable(out)
    return merge or FORMATS[format][0]

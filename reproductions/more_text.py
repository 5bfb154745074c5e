#!/usr/bin/env python3
"""Text for the larger scales from Debian packages: each package's documents as OUT/PACKAGE.jsonl.gz.

    python reproductions/more_text.py --out texts
    nativerank data prepare texts --out data/desk --tokenizer train:32000

Needs apt-get and dpkg-deb, no root. A package that only points to another one (linux-doc to linux-doc-6.1) is followed.
The licence of each stands beside its text as OUT/PACKAGE.copyright; nothing of this belongs into a repository.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

PACKAGES = ("dict-gcide", "linux-doc", "python3-doc")
PLAIN = re.compile(r"\.(txt|rst|dict)(\.gz|\.dz)?$")  # .dz is gzip with an index
PIECE = 1 << 16  # characters of a document; a dictionary is one file


def main(argv: list[str] | None = None) -> int:
    """The command; 2 where a package cannot be had."""
    parser = argparse.ArgumentParser(description="text of Debian packages for `nativerank data prepare`")
    parser.add_argument("packages", nargs="*", default=list(PACKAGES), metavar="PACKAGE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    flags = parser.parse_args(argv)
    try:
        for name in flags.packages:
            fetch(name, flags.out)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        print(f"more_text: {name}: {said.splitlines()[-1]}", file=sys.stderr)
        return 2
    return 0


def fetch(name: str, out: Path) -> None:
    """Writes the text of a package or, where it has none, of those it depends on that carry its name on.

    Raises:
        ValueError: neither has text.
        subprocess.CalledProcessError: apt-get or dpkg-deb failed.
    """
    followers = [name, *(other for other in dependencies(name) if is_version_of(other, name))]
    for package in followers:
        with tempfile.TemporaryDirectory() as folder:
            run(["apt-get", "download", "-q", package], cwd=folder)
            (deb,) = Path(folder).glob("*.deb")
            if written := unpack(package, deb, out):
                print(f"{package}: {written / 1e6:.1f} MB of text, licence in {out / package}.copyright")
                return
    raise ValueError(f"no .txt, .rst or .dict in {', '.join(followers)}")


def run(command: list[str], cwd: str | None = None) -> str:
    """What a program says."""
    environment = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    return subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True).stdout


def dependencies(name: str) -> list[str]:
    """Packages that a package depends on."""
    found = re.findall(r"^\s*Depends: ([a-z0-9.+-]+)$", run(["apt-cache", "depends", name]), re.MULTILINE)
    return list(dict.fromkeys(found))


def is_version_of(other: str, name: str) -> bool:
    """linux-doc-6.1 is one of linux-doc, python3.11-doc one of python3-doc: digits and dots come on top."""
    return other != name and re.sub(r"[-.]?[0-9.]+", "", other) == re.sub(r"[-.]?[0-9.]+", "", name)


def unpack(package: str, deb: Path, out: Path) -> int:
    """Writes a package's documents and its licence; characters of text, 0 without a file where it has none."""
    with tempfile.TemporaryDirectory() as folder:
        run(["dpkg-deb", "-x", str(deb), folder])
        texts = list(documents(Path(folder)))
        if not texts:
            return 0
        out.mkdir(parents=True, exist_ok=True)
        with gzip.open(out / f"{package}.jsonl.gz", "wt", encoding="utf-8", compresslevel=5) as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        for licence in Path(folder).glob("usr/share/doc/*/copyright"):
            (out / f"{package}.copyright").write_bytes(licence.read_bytes())
        return sum(map(len, texts))


def documents(folder: Path) -> Iterator[str]:
    """Every different text under a folder, in sorted order, in pieces that end with a paragraph."""
    seen = set()
    for path in sorted(folder.rglob("*")):
        if not PLAIN.search(path.name) or path.is_symlink() or not path.is_file():
            continue
        data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
        key = sha256(data).digest()  # sources of a manual are often there twice, packed and not
        if key not in seen:
            seen.add(key)
            yield from pieces(data.decode("utf-8", errors="replace"))


def pieces(text: str) -> Iterator[str]:
    """A text cut at empty lines into pieces of about PIECE characters; joined they are the text."""
    start = 0
    while len(text) - start > PIECE:
        end = text.find("\n\n", start + PIECE)
        if end < 0:
            break
        yield text[start : end + 2]
        start = end + 2
    if text[start:].strip():
        yield text[start:]


if __name__ == "__main__":
    sys.exit(main())

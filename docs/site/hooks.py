"""What makes these pages a site: pages that are generated, and links that work in the repository and in the site.

    configuration   from the dataclasses of nativerank.config and their docstrings
    command line    what every command's --help prints
    API             a directive of mkdocstrings per public name
    records         docstrings that say what files hold
    README, CONTRIBUTING, CHANGELOG, benchmarks/README.md, reproductions    as pages of the site

A page links to a file of the repository by its path, as on a repository's page. In the site such a file is a page or a
copy under files/, and the link is turned.
"""

import contextlib
import dataclasses
import importlib
import io
import posixpath
import re
import typing
from pathlib import Path
from typing import Any

from docstring_parser import parse
from mkdocs.structure.files import File, Files

import nativerank
from nativerank.cli.main import COMMANDS, main
from nativerank.config import RunConfig
from nativerank.reproduce.card import card_names
from nativerank.schema import described

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results": "benchmarks.md",  # a folder
    "docs": "index.md",
    "reproductions/README.md": "reproductions.md",
    **{f"reproductions/{name}/card.md": f"reproductions/{name}.md" for name in card_names(ROOT / "reproductions")},
}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
CODE = re.compile(r"(^```.*?^```|^(?: {4}[^\n]*\n)+|`[^`\n]+`)", flags=re.M | re.S)
SUBCOMMANDS = {
    "data": ("prepare", "info", "verify"),
    "scaling": ("plan", "run", "fit", "report"),
}
RECORDS = {"metrics.jsonl": "nativerank.train.metrics", "fit.json": "nativerank.scaling.fit"}


# -- events of mkdocs -------------------------------------------------------------------------------------------


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages, and copies of the files of the repository that pages link to."""
    for source, target in PAGES.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    generated = {
        "reference/configuration.md": configuration_page,
        "reference/commands.md": commands_page,
        "reference/api.md": api_page,
        "reference/records.md": records_page,
    }
    for target, make in generated.items():
        files.append(File.generated(config, target, content=make()))
    linked = {path for file in files.documentation_pages() for path in linked_files(file)}
    for path in sorted(linked):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to files of the repository into links inside the site."""
    return turned(markdown, page.file.src_uri)


# -- links ------------------------------------------------------------------------------------------------------


def turned(markdown: str, page: str) -> str:
    """The text of a page with its links as the site has them; code stays."""

    def turn(match: re.Match[str]) -> str:
        path = repository_path(match[2], page)
        if path is None or not (ROOT / path).exists():
            return match[0]
        target = site_path(path)
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(page) or '.')}{match[3]}"

    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(turn, part) for i, part in enumerate(parts))


def repository_path(link: str, page: str) -> str | None:
    """The path in the repository that a link of a page means; None for an address."""
    if "://" in link or link.startswith("mailto:"):
        return None
    origin = next((source for source, target in PAGES.items() if target == page), f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def site_path(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def linked_files(file: File) -> set[str]:
    """Files of the repository outside of docs/ that a page links to."""
    text = CODE.sub("", file.content_string)
    paths = {repository_path(match[2], file.src_uri) for match in LINK.finditer(text)}
    return {p for p in paths if p and not p.startswith("docs/") and p not in PAGES and (ROOT / p).is_file()}


# -- generated pages --------------------------------------------------------------------------------------------


def configuration_page() -> str:
    """Every key of RunConfig: type, default, meaning."""
    lines = [
        "# Configuration",
        "",
        "Every key may stand in a YAML file (`--config run.yaml`) or as a flag (`--optim.lr 0.02`); flags win. `null`",
        "is what the preset or the method says. Lengths are in tokens, batches in sequences, rates per step.",
        "",
    ]
    for name, cls in groups(RunConfig):
        lines += section(name, cls)
    return "\n".join(lines) + "\n"


def groups(cls: type, prefix: str = "") -> list[tuple[str, type]]:
    """(dotted name, dataclass) of a configuration and everything nested in it."""
    found: list[tuple[str, type]] = [(prefix, cls)]
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found += groups(hints[f.name], f"{prefix}{f.name}.")
    return found


def section(prefix: str, cls: type) -> list[str]:
    """A heading, what the group is, and a table of its keys."""
    doc, hints = parse(cls.__doc__ or ""), typing.get_type_hints(cls)
    meanings = {param.arg_name: param.description or "" for param in doc.params}
    about = " ".join(filter(None, (doc.short_description, doc.long_description)))
    rows = []
    for f in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[f.name]):
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            cells = (f"`{prefix}{f.name}`", described(hints[f.name]), f"`{shown(default)}`", meanings.get(f.name, ""))
            rows.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    title = f"## {prefix.removesuffix('.')}" if prefix else "## The run"
    return [title, "", " ".join(about.split()), "", "| key | takes | default | |", "|---|---|---|---|", *rows, ""]


def shown(value: Any) -> str:
    """A default as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)


def commands_page() -> str:
    """--help of every command."""
    lines = ["# Command line", "", "```", help_of([]), "```", ""]
    for command in COMMANDS:
        for words in ([command], *([command, sub] for sub in SUBCOMMANDS.get(command, ()))):
            text = help_of(words)
            if words == ["train"]:  # its keys have a page of their own
                text = text.partition("\nmodel")[0]
            lines += [f"## nativerank {' '.join(words)}", "", "```", text.rstrip(), "```", ""]
    return "\n".join(lines)


def help_of(words: list[str]) -> str:
    """What --help prints, in 100 columns."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*words, "--help"])
    if code:
        raise ValueError(f"nativerank {' '.join(words)} --help ended with {code}")
    return out.getvalue()


def api_page() -> str:
    """Directives for everything public, in the order of nativerank.__all__."""
    lines = ["# Python", "", "Everything public, as `import nativerank as nr` has it.", ""]
    for name in nativerank.__all__:
        if name in nativerank.HOMES:
            lines += directive(f"nr.{name}", f"{nativerank.HOMES[name]}.{name}", 2)
    for room in nativerank.ROOMS:
        module = importlib.import_module(f"nativerank.{room}")
        lines += [f"## nr.{room}", "", (module.__doc__ or "").strip(), ""]
        for name in module.__all__:
            home = getattr(getattr(module, name), "__module__", None)
            if isinstance(home, str) and home.startswith("nativerank."):
                lines += directive(f"nr.{room}.{name}", f"{home}.{name}", 3)
    return "\n".join(lines)


def directive(name: str, path: str, level: int) -> list[str]:
    """What mkdocstrings makes a heading, a signature and the docstring of."""
    options = {"heading": name, "toc_label": name, "heading_level": level}
    return [f"::: {path}", "    options:", *(f"      {key}: {value}" for key, value in options.items()), ""]


def records_page() -> str:
    """Docstrings of the modules that write files."""
    lines = ["# Records", "", "What is written, as the modules that write it say.", ""]
    for file, module in RECORDS.items():
        lines += [f"## {file}", "", "```", (importlib.import_module(module).__doc__ or "").strip(), "```", ""]
    return "\n".join(lines)

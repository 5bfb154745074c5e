"""What sentences and tables name is there: commands, flags, keys, functions, targets of make, scripts, extras.

Whole commands on lines of their own are parsed by tests/test_readme.py and run by tests/slow/test_shown_commands.py.
"""

import contextlib
import io
import pkgutil
import re
import tomllib
from functools import cache
from itertools import pairwise

import pytest
from test_readme import PAGES, ROOT
from torch.distributed.run import get_args_parser

from nativerank.cli.main import COMMANDS, main
from nativerank.config import RunConfig
from nativerank.schema import keys

ALL = [*PAGES, ROOT / "benchmarks" / "README.md"]  # the changelog may name what is gone
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
FENCE = re.compile(r"^ *```.*?^ *```", flags=re.M | re.S)
FLAG = re.compile(r"(?<![\w-])--[a-z]\w*(?:[.-]\w+)*")
ELSEWHERE = {"--logdir": "tensorboard", "--project": "trackio"}
PARENTS = ("data", "scaling", "bench")  # commands with names below them
FILES = {"gguf", "json", "safetensors"}
KEYS = set(keys(RunConfig))
GROUPS = {key.partition(".")[0] for key in KEYS if "." in key}


def code(page):
    """The pieces of code in a page's sentences and tables, on one line each."""
    return [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", page.read_text(encoding="utf-8")))]


def mentions(pattern):
    """(page, match) for every piece of code that matches from its start, once per page."""
    found = {(page.name, span): re.match(pattern, span) for page in ALL for span in code(page)}
    return [pytest.param(match, id=f"{name}: {span[:60]}") for (name, span), match in found.items() if match]


@cache
def help_of(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return out.getvalue()


def below(command):
    """The names that stand between a command and its flags: prepare, info, verify of data."""
    if command not in PARENTS:
        return []
    return re.findall(r"^(?:  |    )([a-z]\w*)(?:  |$)", help_of(command).partition("\nexample")[0], flags=re.M)


@cache
def flags_of(command):
    """Every flag of a command and of what is below it."""
    pages = [help_of(command), *(help_of(command, name) for name in below(command))]
    return {"--help", *(flag for page in pages for flag in FLAG.findall(page))}


def scripts():
    return {
        path.relative_to(ROOT).as_posix()
        for folder in ("benchmarks", "examples")
        for path in ROOT.glob(f"{folder}/**/*.py")
    }


def flags_anywhere():
    launcher = {option for action in get_args_parser()._actions for option in action.option_strings}
    of_scripts = {flag for path in scripts() for flag in FLAG.findall((ROOT / path).read_text(encoding="utf-8"))}
    return launcher.union(of_scripts, ELSEWHERE, *map(flags_of, COMMANDS))


def test_names_below_a_command():
    assert below("data") == ["prepare", "info", "verify"]
    assert below("scaling") == ["plan", "run", "fit", "report"]
    assert {"train", "conditioning", "step70b"} <= set(below("bench"))


@pytest.mark.parametrize("match", mentions(r"(?:[A-Z_]+=\S+ )?nativerank ([a-z]\S*)(.*)"))
def test_a_command_and_its_flags(match):
    command, rest = match[1], match[2]
    assert command in COMMANDS
    if command in PARENTS and rest:
        assert set(rest.split()[0].split("|")) <= set(below(command))
    assert set(FLAG.findall(rest)) <= flags_of(command)


def test_every_flag_is_one():
    known = flags_anywhere()
    for page in ALL:
        named = set(FLAG.findall(page.read_text(encoding="utf-8")))
        groups = {flag for flag in named if any(other.startswith(f"{flag}.") for other in known)}
        assert named - known - groups == set(), page.name


@pytest.mark.parametrize("match", mentions(rf"(?:{'|'.join(sorted(GROUPS))})\.[a-z_.0-9]+$"))
def test_a_key_of_the_configuration(match):
    if match[0] not in KEYS and match[0].rpartition(".")[2] not in FILES:
        assert pkgutil.resolve_name(f"nativerank.{match[0]}")


@pytest.mark.parametrize("match", mentions(r"(?:nr|nativerank)\.([a-zA-Z_.]*[a-zA-Z_])"))
def test_a_name_of_the_package(match):
    assert pkgutil.resolve_name(f"nativerank.{match[1]}")


@pytest.mark.parametrize("match", mentions(r"make ([a-z-]+)"))
def test_a_target_of_make(match):
    assert re.search(rf"^{match[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("match", mentions(r"python (\S+\.py)(.*)"))
def test_a_script_and_its_flags(match):
    assert match[1] in scripts()
    assert set(FLAG.findall(match[2])) <= set(FLAG.findall((ROOT / match[1]).read_text(encoding="utf-8")))


def test_extras_are_those_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in ALL:
        for names in re.findall(r"(?:nativerank|\.)\[([a-z,]+)\]'", page.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= extras.keys(), page.name


def test_lists_stand_apart():
    """A repository's page shows a list that follows a sentence as one; the site runs it into the sentence."""
    for page in ALL:
        lines = FENCE.sub("```", page.read_text(encoding="utf-8")).splitlines()
        for before, line in pairwise(lines):
            assert not re.match(r"- ", line) or re.match(r"$|- |  |#", before), f"{page.name}: {line}"

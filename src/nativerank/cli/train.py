"""nativerank train: flags and YAML into a RunConfig, then the loop.

nativerank train                                           # built-in corpus, minutes on two cores
nativerank train --config run.yaml --optim.lr 0.03         # a file, and a flag that wins over it
nativerank train --out runs/x --resume auto                # continue after a crash
"""

import argparse
import os
import re
import shlex
import signal
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from nativerank.allocator import give_back_freed_memory
from nativerank.cli.output import STDOUT, add_json, check_json, write_json
from nativerank.config import RunConfig, check_keys, described, from_dict, hint_of, keys, nearest, saves_memory, to_dict

DESCRIPTION = "Pretrain a model. Values come from the preset, then --config, then flags."
EXAMPLE = """examples:
  nativerank train
  nativerank train --model.preset pocket --method lowrank-muon --train.steps 300 --out runs/pocket
  nativerank train --out runs/pocket --model.preset pocket --method lowrank-muon --train.steps 600 --resume auto
"""

# A flag overrules these keys of a file, a run's config.yaml above all, in which every default is filled in: they say
# the same in another way, or mean nothing beside it.
RIVALS: dict[str, tuple[str, ...]] = {
    "rank.ratio": ("rank.value", "rank.energy"),
    "rank.value": ("rank.ratio", "rank.energy"),
    "rank.energy": ("rank.ratio", "rank.value"),
    "train.steps": ("train.tokens",),
    "train.tokens": ("train.steps",),
    "init": tuple(key for key in keys(RunConfig) if re.match(r"rank\.(?!adapt)|model\.(?!preset)", key)),
}


def add_parser(subparsers: Any) -> None:
    """Hands everything after `train` to the typed parser."""
    parser = subparsers.add_parser("train", add_help=False, prefix_chars="\0")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(run=lambda arguments: run(arguments.rest))


def build_parser(
    description: str = DESCRIPTION,
    example: str = EXAMPLE,
    prog: str = "nativerank train",
    usage: str = "",
    first: Callable[[Any], None] = lambda parser: None,
) -> Any:
    """A parser for every key of RunConfig.

    Args:
        description, example, prog: what --help says.
        usage: flags besides the keys, for the first line of --help.
        first: adds them, so that they come first in --help.
    """
    usage = f"{prog} {usage}[--config F.yaml] [--KEY VALUE ...]   (keys below; YAML files nest them)"
    parser = typed_parser(prog, usage, description, example)
    first(parser)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(RunConfig)
    parser.add_argument("--quiet", action="store_true", help="no progress, only warnings; the result in the run folder")
    add_json(parser)
    return parser


@cache
def train_parser() -> Any:
    """The parser of `nativerank train`, made once: to read all docstrings takes longer than to parse."""
    return build_parser()


def typed_parser(prog: str, usage: str, description: str, example: str) -> Any:
    """A parser without flags; errors are raised as ValueError, unknown keys name the nearest."""
    import jsonargparse

    class TypedParser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None):
            raise ValueError(explain(message, [action.dest for action in self._actions], prog))

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Types and defaults beside each key, examples as they stand."""

    return TypedParser(prog=prog, usage=usage, description=description, epilog=example, formatter_class=Formatter)


def explain(message: str, known: Collection[str], prog: str) -> str:
    """jsonargparse's message as one line; for a key that `prog` lacks, ours, with the nearest of its known ones."""
    flat = " ".join(message.split())
    unknown = re.search(r"[Uu]nrecognized arguments: --([\w.]+)", flat)
    if unknown:
        key = unknown.group(1)
        if hint_of(key) is not None and key not in known:
            return f"config key {key} has no meaning for {prog}"
        return f"unknown config key {key}{nearest(key, known)}"
    wrong = re.search(r'[Pp]arser key "([\w.]+)".*(?:Given|Got) value: (.*)$', flat)
    if wrong and (hint := hint_of(wrong.group(1))) is not None:
        return f"config key {wrong.group(1)} must be {described(hint)}, got {wrong.group(2)}"
    return re.sub(r"<class '(\w+)'>", r"\1", flat.removeprefix('Parser key "config": '))


def spelled_out(argv: list[str]) -> Iterator[str]:
    """A bare switch such as --compile as the two words --compile true."""
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):
        yield word
        if hint_of(word.removeprefix("--")) is bool and following.startswith("--"):
            yield "true"


def config_files(argv: list[str]) -> Iterator[str]:
    """What follows each --config."""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == "--config" and following:
            yield following
        elif word.startswith("--config="):
            yield word.removeprefix("--config=")


def read_config_file(file: str) -> dict[str, Any]:
    """The keys of a YAML file, nested; none if it holds nothing but comments.

    Raises:
        ValueError: naming the file: not readable, no YAML, no mapping; or a key that RunConfig lacks.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {file}: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {described(type(values))}, not keys of a configuration")
    check_keys(values)
    return values


def without_files(argv: list[str], files: set[str]) -> list[str]:
    """The words without --config FILE for these files."""
    kept: list[str] = []
    for word in argv:
        if word in files and kept and kept[-1] == "--config":
            kept.pop()
        elif word.removeprefix("--config=") not in files or not word.startswith("--config="):
            kept.append(word)
    return kept


def let_flags_win(values: dict[str, Any], flags: set[str]) -> None:
    """Sets what the flags overrule (RIVALS) back to its default, in place."""
    for flag in sorted(flags & set(RIVALS)):
        for key in set(RIVALS[flag]) - flags:
            group, name = key.split(".")
            values[group][name] = to_dict(RunConfig())[group][name]


def parse(argv: list[str], parser: Any = None) -> tuple[RunConfig, Any]:
    """(configuration, namespace with quiet and json) from flags; `parser` may know more than `build_parser`'s."""
    contents = {file: read_config_file(file) for file in config_files(argv)}
    argv = without_files(argv, {file for file, content in contents.items() if not content})
    flags = {word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")}
    namespace = (parser or train_parser()).parse_args(list(spelled_out(argv)))
    values = namespace.as_dict()
    let_flags_win(values, flags)
    config = from_dict(RunConfig, {name: values[name] for name in RunConfig.__dataclass_fields__})
    before = [content["method"] for content in contents.values() if content.get("method")]
    if before and "method" in flags and config.method not in (None, before[-1]):
        from nativerank.train.resolve import change_method

        config = change_method(config, before[-1], flags)
    return config, namespace


def parse_everywhere(argv: list[str]) -> tuple[RunConfig, Any]:
    """The same as `parse`; of the processes that torchrun started all get an answer, or none."""

    def checked() -> tuple[RunConfig, Any]:
        config, flags = parse(argv)
        check_json(flags.json)
        return config, flags

    if os.environ.get("WORLD_SIZE", "1") == "1":
        return checked()
    from nativerank.distributed.agree import together

    with together():
        return checked()


def run(argv: list[str]) -> int:
    """Trains; after a signal says how to go on. Of many processes the first one speaks."""
    config, flags = parse_everywhere(argv)
    first = os.environ.get("RANK", "0") == "0"
    if saves_memory(config) and config.device in (None, "cpu"):
        give_back_freed_memory()
    from nativerank.cli.console import TrainConsole
    from nativerank.train.loop import Interrupted, train

    with TrainConsole(quiet=flags.quiet or not first, to_stderr=flags.json == STDOUT) as console:
        try:
            summary = train(config, console)
        except Interrupted as stopped:
            if first:
                out = shlex.quote(str(stopped.out))
                console.warn(f"stopped after step {stopped.step}, saved; go on with:")
                console.warn(f"  nativerank train --config {out}/config.yaml --out {out} --resume auto")
            return 128 + stopped.signum if stopped.signum in (signal.SIGINT, signal.SIGTERM) else 1
        console.summary(summary)
        if "profile" in summary:
            console.say("\n" + (Path(summary["profile"]) / "parts.txt").read_text(encoding="utf-8"))
    if first:
        write_json(summary, flags.json)
    return 0

"""nativerank train: flags and YAML into a RunConfig, then the loop.

nativerank train                                           # built-in corpus, minutes on two cores
nativerank train --config run.yaml --optim.lr 0.03         # a file, and a flag that wins over it
nativerank train --out runs/x --resume auto                # continue after a crash
"""

import argparse
import contextlib
import json
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nativerank.config import RunConfig, check_keys, described, from_dict, hint_of, keys, nearest

DESCRIPTION = "Pretrain a model. Values come from the preset, then --config, then flags."
EXAMPLE = """examples:
  nativerank train
  nativerank train --model.preset pocket --method lowrank-muon --train.steps 300 --out runs/pocket
  nativerank train --out runs/pocket --model.preset pocket --method lowrank-muon --train.steps 600 --resume auto
"""


def add_parser(subparsers: Any) -> None:
    """Hands everything after `train` to the typed parser."""
    parser = subparsers.add_parser("train", add_help=False, prefix_chars="\0")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(run=lambda arguments: run(arguments.rest))


def build_parser(description: str = DESCRIPTION, example: str = EXAMPLE, prog: str = "nativerank train") -> Any:
    """A parser for every key of RunConfig; errors are raised as ValueError, unknown keys name the nearest."""
    import jsonargparse

    class TrainParser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None):
            raise ValueError(explain(message))

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Types and defaults beside each key, examples as they stand."""

    usage = f"{prog} [--config F.yaml] [--KEY VALUE ...]   (keys below; YAML files nest them)"
    parser = TrainParser(prog=prog, usage=usage, description=description, epilog=example, formatter_class=Formatter)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(RunConfig)
    parser.add_argument("--quiet", action="store_true", help="no progress; the result in the run folder only")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="the result as JSON, to FILE or stdout")
    return parser


def explain(message: str) -> str:
    """jsonargparse's message as one line; for an unknown key, ours, with the nearest known key."""
    flat = " ".join(message.split())
    unknown = re.search(r"[Uu]nrecognized arguments: --([\w.]+)", flat)
    if unknown:
        key = unknown.group(1)
        return f"unknown config key {key}{nearest(key, keys(RunConfig))}"
    wrong = re.search(r'[Pp]arser key "([\w.]+)".*(?:Given|Got) value: (.*)$', flat)
    if wrong and (hint := hint_of(wrong.group(1))) is not None:
        return f"config key {wrong.group(1)} must be {described(hint)}, got {wrong.group(2)}"
    return flat.removeprefix('Parser key "config": ')


def spelled_out(argv: list[str]) -> Iterator[str]:
    """A bare switch such as --compile as the two words --compile true."""
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):
        yield word
        if hint_of(word.removeprefix("--")) is bool and following.startswith("--"):
            yield "true"


def config_files(argv: list[str]) -> Iterator[str]:
    """What follows each --config."""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == "--config":
            yield following
        elif word.startswith("--config="):
            yield word.removeprefix("--config=")


def parse(argv: list[str]) -> tuple[RunConfig, Any]:
    """(configuration, namespace with quiet and json) from flags."""
    import yaml

    for file in config_files(argv):
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # the parser's own words are good enough
            check_keys(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    parser = build_parser()
    namespace = parser.parse_args(list(spelled_out(argv)))
    values = namespace.as_dict()
    return from_dict(RunConfig, {name: values[name] for name in RunConfig.__dataclass_fields__}), namespace


def run(argv: list[str]) -> int:
    """Trains; after a signal says how to go on."""
    config, flags = parse(argv)
    from nativerank.cli.console import TrainConsole
    from nativerank.train.loop import Interrupted, train

    with TrainConsole(quiet=flags.quiet, to_stderr=flags.json == "-") as console:
        try:
            summary = train(config, console)
        except Interrupted as stopped:
            out = shlex.quote(str(stopped.out))
            console.say(f"stopped after step {stopped.step}, saved; go on with:")
            console.say(f"  nativerank train --config {out}/config.yaml --out {out} --resume auto")
            return 128 + stopped.signum if stopped.signum in (signal.SIGINT, signal.SIGTERM) else 1
        console.summary(summary)
    if flags.json == "-":
        json.dump(summary, sys.stdout, indent=1)
        print()
    elif flags.json:
        Path(flags.json).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0

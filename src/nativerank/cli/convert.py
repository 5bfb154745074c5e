"""nativerank convert: a dense model into factors, with what that costs.

nativerank convert HF_DIR --rank.energy 0.95 --out DIR                      # ranks by energy, per matrix
nativerank convert HF_DIR --rank.ratio 0.25 --data text.txt --out DIR       # with the loss before and after
nativerank convert HF_DIR --rank.energy 0.95 --rank.include '["*.mlp.*"]' --out DIR
"""

import argparse
import dataclasses
import sys
from typing import Any

from nativerank.cli.flags import add_quiet
from nativerank.cli.output import add_json, check_json, write_json
from nativerank.cli.train import typed_parser
from nativerank.config import RankConfig, RunConfig, from_dict

DESCRIPTION = """Truncate the matrices of a dense model and write the factors into a folder that
`nativerank train --init DIR` goes on from. HF_DIR is any local Hugging Face model (safetensors), or a dense run."""
EXAMPLE = """examples:
  nativerank convert path/to/model --rank.energy 0.95 --out factored
  nativerank convert path/to/model --rank.energy 0.95 --rank.value 256 --kind spectral --data text.txt --out factored
  nativerank convert path/to/model --rank.ratio 0.25 --rank.include '["*.mlp.*"]' --out factored
  nativerank train --init factored --method spectron --optim.lr 0.02 --optim.aux_lr 0.0025 --data.path data/mine
  nativerank train --init factored --distill.teacher path/to/model --data.path data/mine   # learns from it too
"""
RANK_KEYS = ("ratio", "value", "energy", "rule", "include", "exclude", "overrides")


def add_parser(subparsers: Any) -> None:
    """Hands everything after `convert` to the typed parser."""
    parser = subparsers.add_parser("convert", add_help=False, prefix_chars="\0")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(run=lambda arguments: run(arguments.rest))


def parse(argv: list[str]) -> tuple[dict[str, Any], Any]:
    """(arguments of `nativerank.convert.convert`, namespace with quiet and json) from flags.

    Raises:
        ValueError: anything wrong with them.
    """
    usage = "nativerank convert HF_DIR --rank.energy E | --rank.ratio R | --rank.value K --out DIR [--KEY VALUE ...]"
    parser = typed_parser("nativerank convert", usage, DESCRIPTION, EXAMPLE)
    parser.add_argument(
        "source", nargs="?", metavar="HF_DIR", help="folder with config.json and safetensors, or a run folder"
    )
    parser.add_argument("--out", metavar="DIR", help="folder to make")
    parser.add_argument("--kind", metavar="lowrank|spectral", default="lowrank", help="A B^T or U diag(s) V^T")
    parser.add_argument("--data", metavar="FILE|DIR", help="text file or prepared folder: the loss before and after")
    parser.add_argument("--eval_tokens", type=int, metavar="N", help="how much of it, evenly spread (default: 32768)")
    skip = {f.name for f in dataclasses.fields(RankConfig)}.difference(RANK_KEYS)
    parser.add_class_arguments(RankConfig, "rank", skip=skip)
    add_quiet(parser)
    add_json(parser)
    flags = parser.parse_args(argv)
    if flags.source is None:
        raise ValueError("convert needs HF_DIR, the folder of a dense model")
    if flags.out is None:
        raise ValueError("convert needs --out DIR, the folder of the factored model")
    rank = from_dict(RankConfig, {key: flags.rank[key] for key in RANK_KEYS}, "rank.")
    given = {"eval_tokens": flags.eval_tokens} if flags.eval_tokens is not None else {}
    return {
        "source": flags.source,
        "out": flags.out,
        "rank": rank,
        "kind": flags.kind,
        "data": flags.data,
        **given,
    }, flags


def run(argv: list[str]) -> int:
    """Converts, shows what became of each matrix and of the loss."""
    arguments, flags = parse(argv)
    check_json(flags.json)
    from nativerank.cli.console import progress
    from nativerank.convert import convert

    with progress(flags.quiet) as watch:
        done = convert(**arguments, watch=watch)
    to_stdout = write_json(done.as_dict(), flags.json)
    show(done, arguments["data"], quiet=flags.quiet or to_stdout)
    return 0


def show(done: Any, data: str | None, quiet: bool) -> None:
    """Table, totals, losses and how to go on; warnings alone, on standard error, if quiet."""
    from nativerank.layers.report import detailed, saving_warnings

    warnings = saving_warnings(done.report)
    if quiet:
        for line in warnings:
            print(f"warning: {line}", file=sys.stderr)
        return
    print(detailed(done.report))
    for line in warnings:
        print(f"warning: {line}")
    before, after = (done.parameters[when]["total"] for when in ("before", "after"))
    print(f"\nwhole model    {before:,} -> {after:,} parameters ({after / before:.0%})")
    for when, loss in (("before", done.before), ("after", done.after)):
        if loss is not None:
            what = f"{loss.nats:.4f} nats/token  (perplexity {loss.perplexity:.1f}, {loss.bits_per_byte:.3f} bits/byte)"
            print(f"loss {when:<10}{what}")
    if done.before is not None:
        print(f"{'':15}on {done.before.tokens:,} tokens of {data}, context {done.context}")
    print(f"written to     {done.out}")
    if done.causal:
        print(f"train on with  nativerank train --init {done.out} {gentle(done.kind)} --data.path DATA")
    else:
        print(f"train on with  nativerank.load({done.out!r}) in a loop of yours")


def gentle(kind: str) -> str:
    """A method for this kind of layer, at a quarter of its rates: those of a fresh start undo what was learnt."""
    from nativerank.train.resolve import method_defaults

    method = {"lowrank": "spectron", "spectral": "sct"}[kind]
    rates = {key: rate for key, rate in method_defaults(RunConfig(), method).items() if key.endswith("lr") and rate}
    return f"--method {method} " + " ".join(f"--{key} {rate / 4:g}" for key, rate in rates.items())

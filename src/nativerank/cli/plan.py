"""nativerank plan: what a run would cost, before it is made.

nativerank plan                                                        # the demo, on this machine
nativerank plan --model.preset spectron-l --on h200 --price 3          # hours and cost on one H200
nativerank plan --model.preset llama3-70b --on h100-sxmx64 --train.recompute blocks
nativerank plan --train.batch_size 32 --check                          # beside two real steps
"""

import argparse
from typing import Any

from nativerank.cli.output import STDOUT, check_json, write_json
from nativerank.cli.train import build_parser, parse

DESCRIPTION = """Parameters, FLOPs, bytes and time of a training run, its dense twin beside it, before anything is made.
Takes the flags of train and needs no data; every process of a grid is planned from this one."""
EXAMPLE = """examples:
  nativerank plan
  nativerank plan --model.preset spectron-l --on h200 --price 3
  nativerank plan --model.preset llama3-70b --on h100-sxmx64 --train.recompute blocks --json plan.json
  nativerank plan --train.batch_size 32 --check

Times are a bound by the device's peaks, not a forecast; docs/plan.md says what is counted and what is left out.
"""


def add_parser(subparsers: Any) -> None:
    """Hands everything after `plan` to the typed parser."""
    parser = subparsers.add_parser("plan", add_help=False, prefix_chars="\0")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(run=lambda arguments: run(arguments.rest))


def add_flags(parser: Any) -> None:
    """What a plan takes besides the flags of train."""
    group = parser.add_argument_group("plan")
    group.add_argument("--on", metavar="DEVICE[xN]", help="device to plan for, and how many (without: this machine)")
    group.add_argument("--table", metavar="FILE", help="YAML file with more devices, see docs/plan.md")
    group.add_argument("--price", type=float, metavar="P", help="of a device hour, in any currency")
    group.add_argument("--efficiency", type=float, default=1.0, help="share of the roofline to reckon with")
    group.add_argument("--check", action="store_true", help="make two real steps in a process of their own and compare")


def run(argv: list[str]) -> int:
    """Plans, shows, writes."""
    config, flags = parse(argv, build_parser(DESCRIPTION, EXAMPLE, "nativerank plan", "[--on DEVICE] ", add_flags))
    check_json(flags.json)
    if flags.quiet and flags.json is None:
        raise ValueError("--quiet leaves nothing of a plan; add --json, or drop it")
    from nativerank.cli.console import progress
    from nativerank.plan.make import Request, make_plan

    with progress(flags.quiet) as watch:
        plan = make_plan(config, Request(flags.on, flags.table, flags.price, flags.efficiency, flags.check), watch)
    if not flags.quiet and flags.json != STDOUT:
        from nativerank.cli.plan_table import show_plan

        show_plan(plan)
    write_json(plan, flags.json)
    return 0

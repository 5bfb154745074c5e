"""nativerank bench memory|loss: flags, and how results are shown."""

import argparse
from typing import Any

from nativerank.cli.bench_race import add_rounds, add_size, show_races, threads
from nativerank.terminal import console as open_console

EXAMPLE = """examples:
  nativerank bench memory
  nativerank bench memory --policies whole blocks --json result.json
  nativerank bench loss --model.preset demo --chunks 128 256 512
"""


def memory_flags(names: Any) -> argparse.ArgumentParser:
    """The parser of `nativerank bench memory`."""
    parser = _parser(names, "memory", "peak memory of training steps, beside the dense twin under the same policies")
    parser.add_argument("--model.preset", dest="preset_name", default="spectron-s", metavar="PRESET")
    parser.add_argument("--method", default="spectron", help="low-rank method")
    parser.add_argument("--dense_method", default="dense-adamw")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["whole", "chunked", "blocks+whole", "blocks"],
        metavar="P",
        help="of both sides: chunked (nativerank train's default) or [whole|blocks|compile] joined by +",
    )
    add_size(parser)
    parser.add_argument("--context", type=int, default=512, help="tokens of one sequence")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences of a step")
    add_rounds(parser, 3, "processes of each side and policy")
    return parser


def loss_flags(names: Any) -> argparse.ArgumentParser:
    """The parser of `nativerank bench loss`."""
    parser = _parser(names, "loss", "output head and cross entropy, in chunks of tokens beside all logits at once")
    parser.add_argument("--model.preset", dest="presets", nargs="+", default=["demo", "spectron-s"], metavar="PRESET")
    parser.add_argument("--tokens", type=int, default=2048, help="of a pass")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 256, 1024], metavar="N", help="tokens of a chunk")
    add_rounds(parser, 7, "recorded passes of each", threads=True)
    return parser


def _parser(names: Any, name: str, what: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    text = f"{what[0].upper()}{what[1:]}."
    parser: argparse.ArgumentParser = names.add_parser(
        name, help=what, description=text, epilog=EXAMPLE, formatter_class=raw
    )
    return parser


def show_memory(result: dict[str, Any]) -> None:
    """Megabytes at the peak of both sides by policy."""
    from rich.table import Table

    title = "peak of {steps} steps of {preset}, {batch_size} x {context} tokens".format(**result["settings"])
    table = Table(title=title)
    for column in ("policy", "", "before, MB", "peak, MB", "/ dense", "step, s"):
        table.add_column(column, justify="left" if column in ("policy", "") else "right")
    for case in result["cases"]:
        policy = case["case"]["policy"]
        for name, peak in case["peak_bytes"].items():
            before, ratio = f"{case['base_bytes'][name] / 1e6:,.0f}", f"{case['peak_ratio'][name]:.2f}"
            table.add_row(policy, name, before, f"{peak / 1e6:,.0f}", ratio, f"{case['seconds'][name]:.2f}")
            policy = ""
    open_console().print(table)


def show_loss(result: dict[str, Any]) -> None:
    """A table for each shape and number of threads."""

    def about(case: dict[str, Any]) -> str:
        return "width {d_model}, vocabulary {vocab_size:,}, ".format(**case) + threads(case)

    show_races(result, "head and loss, {tokens:,} tokens".format(**result["settings"]), about, {})

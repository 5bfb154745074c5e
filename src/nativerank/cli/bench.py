"""nativerank bench: measurements that anyone can repeat, as ratios within one process."""

import argparse
from typing import Any

from nativerank.cli.output import add_json, check_json, write_json

EXAMPLE = """examples:
  nativerank bench train
  nativerank bench train --d_model 512 --json result.json
"""


def add_parser(subparsers: Any) -> None:
    """Flags of `nativerank bench NAME`."""
    raw = argparse.RawDescriptionHelpFormatter
    bench = subparsers.add_parser("bench", description="Measure speed.", epilog=EXAMPLE, formatter_class=raw)
    names = bench.add_subparsers(dest="benchmark", metavar="NAME", required=True)
    train = names.add_parser(
        "train",
        help="a training step in its parts, beside the dense twin's",
        description="Time a training step in its parts, low rank beside dense, steps interleaved.",
        epilog=EXAMPLE,
        formatter_class=raw,
    )
    train.add_argument("--model.preset", dest="preset_name", default="demo", metavar="PRESET")
    train.add_argument("--method", default="spectron", help="low-rank method")
    train.add_argument("--dense_method", default="dense-adamw")
    train.add_argument("--d_model", type=int, help="another width, with the preset's proportions")
    train.add_argument("--layers", type=int, help="another depth")
    train.add_argument("--batch_size", type=int, help="sequences per step (default: the preset's)")
    train.add_argument("--repeats", type=int, default=7, help="recorded steps of each side")
    train.add_argument("--device", default="cpu", choices=["cpu", "cuda", "mps"])
    add_json(train)
    train.set_defaults(run=run_train)


def run_train(flags: argparse.Namespace) -> int:
    """Measures and shows."""
    from nativerank.bench.train import bench_train

    check_json(flags.json)
    options = {k: v for k, v in vars(flags).items() if k not in ("run", "json", "benchmark")}
    result = bench_train(**options)
    if not write_json(result, flags.json):
        show(result)
    return 0


def show(result: dict[str, Any]) -> None:
    """A table of milliseconds per phase."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"d_model {result['d_model']}, {result['layers']} layers, {result['tokens_per_step']} tokens a step"
    )
    for column in ("ms", "forward", "backward", "clip", "optimizer", "step", "tokens/s"):
        table.add_column(column, justify="right")
    for side in (result["low_rank"], result["dense"]):
        milliseconds = [f"{1e3 * side['seconds'][k]:.1f}" for k in ("forward", "backward", "clip", "optimizer", "step")]
        table.add_row(side["method"], *milliseconds, f"{side['tokens_per_second']:,.0f}")
    console = Console(highlight=False)
    console.print(table)
    share, probe = (result["low_rank"][key] for key in ("optimizer_share", "probe_share"))
    console.print(
        f"low rank is {result['speedup']:.2f}x as fast; its optimizer takes {share:.1%} of the step, "
        f"its probe {probe:.2%} of the time at the default interval"
    )

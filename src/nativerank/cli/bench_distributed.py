"""nativerank bench distributed: its flags, and how its result is shown."""

import argparse
from typing import Any

from nativerank.terminal import console as open_console

EXAMPLE = """examples:
  nativerank bench distributed
  nativerank bench distributed --processes 2 --json benchmarks/results/bench-distributed.json
  nativerank bench distributed --paper
  nativerank bench distributed --paper --model.preset llama3-70b --method sct --replicas 8 --shards 64

Starts its own processes on this machine; do not call it by torchrun.
"""


def add_flags(names: Any) -> argparse.ArgumentParser:
    """The parser of `nativerank bench distributed`."""
    parser: argparse.ArgumentParser = names.add_parser(
        "distributed",
        help="several processes: seconds and bytes of a step, or of any grid on paper",
        description="Training steps on 1, 2 and 4 gloo processes, and orthogonalization and retraction of spread "
        "factors against gathering them; or bytes and r x r FLOPs of large models on large grids, on paper.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model.preset", dest="preset_name", metavar="PRESET", help="default: demo; on paper spectron-l and llama3-70b"
    )
    parser.add_argument("--method", default="spectron")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--repeats", type=int, default=7, help="recorded rounds")
    parser.add_argument("--paper", action="store_true", help="count instead of measuring, at rank ratio 0.25")
    parser.add_argument("--replicas", type=int, default=1, help="of the grid on paper, for a preset that is named")
    parser.add_argument("--shards", type=int, default=64, help="of the same grid")
    return parser


def show_distributed(result: dict[str, Any]) -> None:
    """Steps and the contest, or the cases on paper."""
    console = open_console()
    if "once" not in result:
        for case in result["cases"]:
            console.print(_paper(case))
            console.print(_rest(case))
        console.print("MB (10^6 bytes) per process of one step, means over processes; most: of any process")
        return
    console.print(_steps(result))
    if result["once"]["tasks"]:
        console.print(_once(result["once"]))


def _steps(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="{preset} with {method}, {tokens_per_step:,} tokens a step".format(**result["settings"]))
    table.add_column("processes", no_wrap=True)
    for column in ("step ms", "optimizer ms", "gradients MB", "optimizer MB", "calls"):
        table.add_column(column, justify="right")
    for row in result["cases"]:
        sent = (
            [f"{row['bytes'][part] / 1e6:.2f}" for part in ("gradients", "optimizer")] if "bytes" in row else ["", ""]
        )
        calls = str(row["collectives"]["optimizer"]) if "bytes" in row else ""
        kind = f"{row['mode']} {row['algebra']}" if "algebra" in row else ""
        seconds = [f"{1e3 * row['seconds'][part]:.1f}" for part in ("step", "optimizer")]
        table.add_row(f"{row['processes']} {kind}".strip(), *seconds, *sent, calls)
    repeats = result["settings"]["repeats"]
    table.caption = f"medians of {repeats}; MB sent by one process; calls: collectives of the optimizer"
    return table


def _once(once: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="{} factors of ({}, {})".format(*once["shape"]) + f" on {once['processes']} processes")
    for column in ("task", "way", "ms", "speed", "max |Q^T Q - I|"):
        table.add_column(column, justify="left" if column in ("task", "way") else "right")
    for row in once["tasks"]:
        task = row["task"]
        for way, seconds in row["seconds"].items():
            error = f"{row['off_orthonormal'][way]:.1e}"
            table.add_row(task, way, f"{1e3 * seconds:.1f}", f"{row['speedup'][way]:.2f}x", error)
            task = ""
    table.caption = "speed against gathering and QR on every process"
    return table


def _paper(case: dict[str, Any]) -> Any:
    from rich.table import Table

    size = f"rank {case['rank']}" if case["rank"] else f"ratio {case['ratio']}"
    table = Table(
        title=f"{case['preset']}, {case['method']}, {size}: {case['replicas']} x {case['shards']} (replicas x shards)"
    )
    for column in ("", "sent", "in", "out", "most sent", "most state", "r x r GFLOP"):
        table.add_column(column, justify="right" if column else "left")
    for way, part in case["optimizer"].items():
        moved = part["bytes"]
        sizes = [moved["total"], moved["before"] + moved["to_owners"], moved["back"], *(part.get(k) for k in LARGEST)]
        table.add_row(way, *map(_mb, sizes), f"{part['largest_r_by_r_flops'] / 1e9:,.0f}")
    less = f"; auto sends 1/{case['gather_over_auto']:.1f} of gather" if case["gather_over_auto"] else ""
    table.caption = f"MB{less}"
    return table


def _rest(case: dict[str, Any]) -> str:
    """What is the same in all algebras."""
    exchange, held = case["gradient_exchange"], case["bytes"]
    names = {
        "all_gather_forward": "gathered forward",
        "all_gather_backward": "backward",
        "reduce_scatter": "scattered",
        "replica_all_reduce": "over replicas",
    }
    moved = ", ".join(f"{word} {_mb(exchange[name])}" for name, word in names.items())
    return f"parameters {_mb(held['parameters'])}, gradients {_mb(held['gradients'])}; {moved}\n"


LARGEST = ("largest_bytes", "largest_state_bytes")


def _mb(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f}"

"""nativerank bench step70b: its flags, and how its result is shown."""

import argparse
from typing import Any

from nativerank.terminal import console as open_console

EXAMPLE = """examples:
  nativerank bench step70b --layerwise
  nativerank bench step70b --layerwise --state momentum-bf16 --attention real --gqa
  nativerank bench step70b --all --json benchmarks/results/bench-step70b.json

A plain step needs 9 GB of memory, the race against the literal form 11.
"""


def add_flags(names: Any) -> argparse.ArgumentParser:
    """The parser of `nativerank bench step70b`."""
    parser: argparse.ArgumentParser = names.add_parser(
        "step70b",
        help="memory and time of one training step of LLaMA-3-70B's matrices at rank 32",
        description="One full training step of LLaMA-3-70B's hidden matrices as U diag(s) V^T at rank 32: peak memory "
        "of a fresh process, seconds per phase, and the SCT paper's arithmetic.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--layerwise", action="store_true", help="update inside the backward pass, with recomputed blocks"
    )
    parser.add_argument(
        "--state",
        default="fp32",
        choices=["fp32", "bf16", "momentum-bf16"],
        help="Adam's moments in fp32 or bf16 (method sct), or one bf16 momentum (method stiefel-spectron)",
    )
    parser.add_argument("--gqa", action="store_true", help="8 key and value heads instead of the paper's 64")
    parser.add_argument(
        "--attention", default="simplified", choices=["simplified", "real"], help="the paper's, or transformers' Llama"
    )
    parser.add_argument("--tokens", type=int, default=16, help="of the one sequence")
    parser.add_argument("--layers", type=int, default=80, help="another depth")
    parser.add_argument("--literal", action="store_true", help="race the plain step against the paper's literal form")
    parser.add_argument("--repeats", type=int, default=3, help="recorded rounds of that race")
    parser.add_argument(
        "--all", dest="everything", action="store_true", help="every variant of the record, and the race"
    )
    return parser


def show_step70b(result: dict[str, Any]) -> None:
    """Measured memory and seconds, the race, the paper's table."""
    console = open_console()
    console.print(_variants(result["cases"]))
    for race in result["literal"]:
        console.print(
            f"plain step over its literal form (foreach AdamW, one QR after the other), threads: {race['threads']}: "
            f"{race['ratio']['step']:.2f} of the time, retraction {race['ratio']['retraction']:.2f}"
        )
    console.print(_matrices(result["arithmetic"]["matrices"]))
    for name, key in (("the paper's stack", "stack"), ("with grouped keys and values", "stack_gqa")):
        state = result["arithmetic"][key]
        console.print(
            f"{name}: {state['factored_parameters'] / 1e6:,.1f}M factor parameters, "
            f"{state['factored_bytes'] / 1e9:.2f} GB; dense {int(state['dense_bytes'] / 1e9):,} GB"
        )
    console.print(f"left out: {result['arithmetic']['left_out']}")


def _variants(variants: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    base = max(row["base_rss_bytes"] for row in variants) / 1e9
    table = Table(title="seconds of the second step, and peak memory of the process")
    phases = ("forward", "backward", "optimizer", "retraction", "step")
    table.add_column("", no_wrap=True)
    for column in ("fwd", "bwd", "update", "retract", "step", "peak GB"):
        table.add_column(column, justify="right")
    for row in variants:
        kinds = ", ".join([row["attention"], *["grouped"] * row["gqa"]])
        update = f"{'layer-wise' if row['layerwise'] else 'plain'}, {row['state']}"
        seconds = [f"{row['seconds'][phase]:.2f}" for phase in phases]
        table.add_row(f"{update}\n  {kinds}, {row['tokens']}", *seconds, f"{row['peak_rss_bytes'] / 1e9:.2f}")
    table.caption = f"attention and tokens in the second line; PyTorch alone: {base:.2f} GB"
    return table


def _matrices(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=f"one matrix with float32 Adam: 16 bytes a parameter, rank {rows[0]['rank']}")
    for column in ("", "d_in x d_out", "dense MB", "factors MB", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        sizes = [f"{row[f'{kind}_bytes'] / 1e6:,.1f}" for kind in ("dense", "factored")]
        table.add_row(row["model"], f"{row['d_in']} x {row['d_out']}", *sizes, f"{row['ratio']:.1f}")
    return table

"""nativerank bench generate: its flags, and how its result is shown."""

import argparse
from typing import Any

EXAMPLE = """examples:
  nativerank bench generate
  nativerank bench generate runs/demo-spectron --batches 1 8
  nativerank bench generate --model.preset spectron-s --rank.ratio 0.25 0.5 --json result.json

The times are kept in the user cache (NATIVERANK_CACHE), where `nativerank generate --form auto` finds them.
"""


def add_flags(names: Any) -> argparse.ArgumentParser:
    """The parser of `nativerank bench generate`."""
    parser: argparse.ArgumentParser = names.add_parser(
        "generate",
        help="tokens per second and memory of writing text, factored, merged and dense",
        description="Time and memory of generation with factors, with merged matrices and with a dense twin, by batch.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", help="run, checkpoint or factored model folder, instead of a preset")
    parser.add_argument("--model.preset", dest="preset_name", default="demo", metavar="PRESET")
    parser.add_argument(
        "--rank.ratio", dest="ratios", type=float, nargs="+", metavar="R", help="rank ratios (default: the preset's)"
    )
    parser.add_argument("--d_model", type=int, help="another width, with the preset's proportions")
    parser.add_argument("--layers", type=int, help="another depth")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="N")
    parser.add_argument("--prompt_tokens", type=int, default=64, metavar="N")
    parser.add_argument("--new_tokens", type=int, default=32, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, help="recorded generations of each form and batch")
    parser.add_argument("--no_memory", dest="memory", action="store_false", help="no fresh processes for memory")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor time, for a busy machine and one thread",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "mps"])
    return parser


def show_generate(result: dict[str, Any]) -> None:
    """Tokens per second of both phases, memory, and where factors are faster."""
    from rich.console import Console

    console = Console(highlight=False)
    for phase, what in (("decode", "after the first token"), ("prefill", "of the prompt")):
        console.print(_speed(result, phase, what))
    console.print(_memory(result))
    for one in result["speedup"]:
        faster = one["faster"]
        console.print(
            f"{name_of(one)} is faster than merged: decode {faster['decode']}, prefill {faster['prefill']}, "
            f"both {faster['whole']}"
        )
    noise = [abs(row["whole"] - 1) for row in result["merged_over_dense"]["batches"]]
    console.print(f"merged and dense have equal shapes; their times differ by up to {max(noise):.0%}: the noise")
    console.print(f"kept for `nativerank generate --form auto`: {result['remembered']}", soft_wrap=True)


def name_of(side: dict[str, Any]) -> str:
    """The form, with the rank ratio where one was asked for."""
    return side["form"] if side["ratio"] is None else f"{side['form']} {side['ratio']:g}"


def _speed(result: dict[str, Any], phase: str, what: str) -> Any:
    from rich.table import Table

    where = result["place"]
    threads = f", {where['threads']} thread{'s' * (where['threads'] != 1)}" if where["threads"] else ""
    clock = ", processor time" if result["clock"] == "cpu" else ""
    table = Table(title=f"{phase}: tokens/s {what}{threads}{clock}")
    for column in ("batch", *map(name_of, result["sides"])):
        table.add_column(column, justify="right")
    for one in result["speedup"]:
        table.add_column(f"{name_of(one)} over merged".replace("factored ", ""), justify="right")
    for i, row in enumerate(result["sides"][0]["batches"]):
        speeds = [f"{side['batches'][i][f'{phase}_tokens_per_second']:,.0f}" for side in result["sides"]]
        table.add_row(str(row["batch"]), *speeds, *(f"{s['batches'][i][phase]:.2f}x" for s in result["speedup"]))
    return table


def _memory(result: dict[str, Any]) -> Any:
    from rich.table import Table

    first, last = (result["sides"][0]["batches"][i]["batch"] for i in (0, -1))
    table = Table(title="memory in MB (10^6 bytes)")
    measured = "base_bytes" in result["sides"][0]
    table.add_column("form")
    columns = ["weights"]
    if measured:
        columns += [f"{what}, batch {batch}" for what in ("cache", "peak") for batch in (first, last)]
    for column in columns:
        table.add_column(column, justify="right")
    for side in result["sides"]:
        values = [side["weights_bytes"]]
        if measured:
            values += [side["batches"][i][f"{what}_bytes"] for what in ("cache", "peak") for i in (0, -1)]
        table.add_row(name_of(side), *(f"{value / 1e6:,.1f}" if value else "-" for value in values))
    if measured and (base := max(side["base_bytes"] or 0 for side in result["sides"])):
        table.caption = f"peak is the whole process's; PyTorch alone: {base / 1e6:,.0f}"
    return table

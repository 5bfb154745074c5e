"""nativerank bench generate: its flags, and how its result is shown."""

import argparse
from typing import Any

WIDTH = 80
EXAMPLE = """examples:
  nativerank bench generate
  nativerank bench generate runs/demo-spectron --batches 1 8
  nativerank bench generate --model.preset spectron-s --rank.ratio 0.25 0.5 --json result.json

With 3 repeats and 16 new tokens at least, the times are kept in the user cache (NATIVERANK_CACHE), where
`nativerank generate --form auto` finds them.
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
    parser.add_argument(
        "folder", nargs="?", metavar="RUN|DIR", help="run, checkpoint or factored model folder, instead of a preset"
    )
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
    """Tokens per second of both phases, memory, and where factors are faster; at most 80 columns."""
    for phase, what in (("decode", "after the first token"), ("prefill", "of the prompt")):
        print(_speed(result, phase, what), end="\n\n")
    print(_memory(result), end="\n\n")
    for one in result["speedup"]:
        print(f"{name_of(one)} is faster than merged:")
        for phase, label in (("decode", "decode"), ("prefill", "prefill"), ("whole", "both")):
            print(f"  {label:<9}{one['faster'][phase]}")
    noise = max(abs(row["whole"] - 1) for row in result["merged_over_dense"]["batches"])
    print(f"merged and dense have equal shapes; their times differ by up to {noise:.0%}")
    if result["remembered"]:
        from nativerank.hub.forms import measurements_file

        print(f"kept for `nativerank generate --form auto`: {measurements_file()}")
    else:
        print("not kept for `nativerank generate --form auto`: too few repeats or new_tokens")


def name_of(side: dict[str, Any]) -> str:
    """The form, with the rank ratio where one was asked for."""
    return side["form"] if side["ratio"] is None else f"{side['form']} {side['ratio']:g}"


def _speed(result: dict[str, Any], phase: str, what: str) -> str:
    """A row for each form, a column for each batch; then how many times as fast as merged the factors are."""
    where = result["place"]
    threads = f", {where['threads']} thread{'s' * (where['threads'] != 1)}" if where["threads"] else ""
    clock = ", processor time" if result["settings"]["clock"] == "cpu" else ""
    speeds = {
        name_of(side): [f"{row[f'{phase}_tokens_per_second']:,.0f}" for row in side["batches"]]
        for side in result["cases"]
    }
    times = {f"{name_of(one)} / merged": [f"{row[phase]:.2f}x" for row in one["batches"]] for one in result["speedup"]}
    heads = [str(row["batch"]) for row in result["cases"][0]["batches"]]
    return _table(f"{phase}: tokens/s {what}{threads}{clock}", "batch", heads, speeds | times)


def _memory(result: dict[str, Any]) -> str:
    """Weights, then cache and peak at the smallest and the largest batch where they were measured."""
    sides = result["cases"]
    measured, last = "base_bytes" in sides[0], len(sides[0]["batches"]) - 1
    ends = sorted({0, last}) if measured else []
    wanted = [(what, i) for what in ("cache", "peak") for i in ends]
    heads = ["weights", *(f"{what} b{sides[0]['batches'][i]['batch']}" for what, i in wanted)]
    rows = {}
    for side in sides:
        values = [side["weights_bytes"], *(side["batches"][i][f"{what}_bytes"] for what, i in wanted)]
        rows[name_of(side)] = [f"{value / 1e6:,.1f}" if value else "-" for value in values]
    base = max(side["base_bytes"] or 0 for side in sides) if measured else 0
    note = f"; the peak is the process's, PyTorch alone {base / 1e6:,.0f}" if base else ""
    return _table(f"memory in MB (10^6 bytes){note}", "form", heads, rows)


def _table(title: str, corner: str, heads: list[str], rows: dict[str, list[str]]) -> str:
    """Right-aligned columns, as wide as they must be, in as many parts as 80 columns need."""
    first = max(map(len, (corner, *rows)))
    widths = [2 + max(len(head), *(len(row[i]) for row in rows.values())) for i, head in enumerate(heads)]
    parts: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if parts[-1] and first + sum(widths[j] for j in parts[-1]) + width > WIDTH:
            parts.append([])
        parts[-1].append(i)
    lines = [title]
    for part in parts:
        for name, row in {corner: heads, **rows}.items():
            lines.append(f"{name:<{first}}" + "".join(f"{row[i]:>{widths[i]}}" for i in part))
    return "\n".join(lines)

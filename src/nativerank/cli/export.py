"""nativerank export: a trained model in the form that somebody else reads, checked before it is there."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from nativerank.cli.flags import add_quiet, add_step
from nativerank.cli.output import add_json, check_json, write_json
from nativerank.export.request import check_request

DESCRIPTION = """Write a trained model into a new folder, as thin factors, merged into the stock architecture, or as
GGUF. The folder is read back as its reader would, and its logits are held against the model's, before it gets its name:
within 1e-4 of the largest logit in float32, a mean KL of at most 1e-3 in bfloat16 and float16. Else there is none."""
EXAMPLE = """formats and what --merge does:
  factored   none (default): as it was trained    auto: matrices whose rank reaches break-even become dense
  dense      all (default): stock architecture    auto: the same mixed form
  gguf       all: model.gguf of a LLaMA, float32 or float16; read back and compared, not run in llama.cpp

examples:
  nativerank export runs/demo-spectron --format dense --out exported/dense
  nativerank export runs/demo-spectron --format factored --merge auto --dtype bfloat16 --out exported/mixed
  nativerank export runs/demo-spectron --step 300 --format gguf --dtype float16 --out exported/gguf
"""
NOT_RUN = "llama.cpp itself was not run: the file was read back with the gguf package, its model with transformers"


def add_parser(subparsers: Any) -> None:
    """Flags of `nativerank export`."""
    parser = subparsers.add_parser(
        "export", description=DESCRIPTION, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN|DIR", help="run, checkpoint or model folder")
    parser.add_argument("--format", required=True, metavar="factored|dense|gguf")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--merge", metavar="none|auto|all", help="which factors become dense (default: by format)")
    add_step(parser)
    parser.add_argument("--dtype", default="float32", metavar="float32|bfloat16|float16", help="default: float32")
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="of one weights file, 5GB or bytes (default: 5GB)"
    )
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Exports, shows what became of each matrix and how far the logits are apart."""
    check_json(flags.json)
    check_request(Path(flags.out), flags.format, flags.merge, flags.dtype, flags.max_shard_size)
    from nativerank.cli.console import progress
    from nativerank.export.export import export

    with progress(flags.quiet) as watch:
        done = export(
            flags.model,
            flags.out,
            flags.format,
            merge=flags.merge,
            step=flags.step,
            dtype=flags.dtype,
            max_shard_size=flags.max_shard_size,
            watch=watch,
        )
    if not write_json(done.as_dict(), flags.json) and not flags.quiet:
        show(done)
    return 0


def show(done: Any) -> None:
    """Table, totals, parity."""
    if done.matrices:
        print(table(done.matrices))
        print()
    merged = sum(entry.merged for entry in done.matrices)
    before, after = done.parameters["before"], done.parameters["after"]
    print(f"exported     {done.source}")
    print(f"form         {done.form}, {done.dtype}: {merged} of {len(done.matrices)} factored matrices merged")
    print(f"parameters   {before:,} -> {after:,}")
    print(f"parity       {done.parity}, at most {done.parity.bound:g}")
    print(f"written to   {done.out}  ({done.bytes / 1e6:.1f} MB)")
    if done.form == "gguf":
        print(f"not run      {NOT_RUN}")


def table(matrices: list[Any]) -> str:
    """At most 80 columns; equal matrices of repeated blocks share a row, `*` for the block number."""
    from nativerank.layers.report import any_block, clipped

    rows = Counter((any_block(m.name), f"{m.d_out} x {m.d_in}", m.rank, m.break_even, m.merged) for m in matrices)
    lines = [f"{'matrix':<32}{'count':>6}{'d_out x d_in':>15}{'rank':>6}{'break-even':>12}  becomes"]
    for (name, shape, rank, break_even, merged), count in rows.items():
        what = "dense" if merged else "factors"
        lines.append(f"{clipped(name, 32):<32}{count:>6}{shape:>15}{rank:>6}{break_even:>12.1f}  {what}")
    return "\n".join(lines)

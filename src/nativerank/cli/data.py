"""nativerank data: prepare text for training, look at a prepared folder, check it.

nativerank data prepare book.txt --out data/book
nativerank data info data/book
nativerank data verify data/book
"""

import argparse
import sys
from typing import Any

from nativerank.cli.output import add_json, check_json, write_json
from nativerank.terminal import console as open_console

# What the user leaves out takes the default of `prepare`, where it has its home.
PREPARE_OPTIONS = (
    "tokenizer",
    "val_fraction",
    "seed",
    "workers",
    "shard_tokens",
    "field",
    "chunk_bytes",
    "eot",
    "quiet",
)
PREPARE_EPILOG = """\
examples:
  nativerank data prepare book.txt --out data/book
  nativerank data prepare notes/ posts.jsonl.gz --out data/mine --tokenizer train:8192
  nativerank data prepare wiki.parquet::0.7 code/::0.3 --out data/mix
  nativerank data prepare "hub:HuggingFaceFW/fineweb?name=sample-10BT" --out data/fineweb --tokenizer train:32000
"""


def add_parser(subparsers: Any) -> None:
    """Adds `data` with its three commands."""
    raw = argparse.RawDescriptionHelpFormatter
    data = subparsers.add_parser(
        "data",
        help="prepare, describe and verify training data",
        description="Prepare, describe and verify training data.",
        epilog="example:\n  nativerank data prepare book.txt --out data/book",
        formatter_class=raw,
    )
    data.set_defaults(run=run_nothing)
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND")
    _add_prepare(commands.add_parser(
        "prepare", help="text to token shards", description="Turn text into a folder of token shards.",
        epilog=PREPARE_EPILOG, formatter_class=raw,
    ))  # fmt: skip
    info = commands.add_parser(
        "info", help="what a prepared folder holds", description="Show what a prepared folder holds.",
        epilog="example:\n  nativerank data info data/book --json", formatter_class=raw,
    )  # fmt: skip
    info.add_argument("path", metavar="DIR", help="folder made by data prepare")
    _add_output(info)
    info.set_defaults(run=run_info)
    verify = commands.add_parser(
        "verify", help="hash every file again", description="Hash every file again and compare with the manifest.",
        epilog="example:\n  nativerank data verify data/book", formatter_class=raw,
    )  # fmt: skip
    verify.add_argument("path", metavar="DIR", help="folder made by data prepare")
    verify.add_argument("--quiet", action="store_true", help="print nothing when all is well")
    add_json(verify)
    verify.set_defaults(run=run_verify)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=".txt, .jsonl (.gz, .zst), .parquet, a folder, or hub:OWNER/NAME?name=CONFIG&split=train; ::WEIGHT mixes",
    )
    add("--out", required=True, metavar="DIR", help="folder to make")
    add(
        "--tokenizer",
        metavar="FILE|train:N",
        help="a tokenizer.json (or its folder), or train a byte-level BPE of N tokens (default: train:4096)",
    )
    add(
        "--val_fraction",
        type=float,
        metavar="X",
        help="share of the documents kept for validation (default: 0.05)",
    )
    add("--workers", type=int, metavar="N", help="processes that encode (default: all cores)")
    add("--field", metavar="NAME", help="text field of .jsonl, .parquet and hub records (default: text)")
    add(
        "--chunk_bytes",
        type=int,
        metavar="N",
        help="cut plain text files longer than this into documents (default: 1048576, less for little text)",
    )
    add("--seed", type=int, metavar="N", help="of the validation split (default: 0)")
    add("--eot", metavar="TOKEN", help="end-of-text token of the tokenizer, if it has none of the usual names")
    add("--shard_tokens", type=int, metavar="N", help="tokens of a full shard (default: 100000000)")
    _add_output(parser)
    parser.set_defaults(run=run_prepare)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress and no table")
    add_json(parser)


def run_nothing(args: argparse.Namespace) -> int:
    """Without a command there is only a hint to give."""
    raise ValueError("data needs a command: prepare, info or verify")


def run_prepare(args: argparse.Namespace) -> int:
    """Prepares a folder and shows its summary."""
    from nativerank.data.prepare import prepare

    check_json(args.json)
    options = {name: getattr(args, name) for name in PREPARE_OPTIONS if getattr(args, name) is not None}
    result = prepare(args.inputs, args.out, **options)
    for note in result["notes"]:
        if not args.quiet:
            print(f"note: {note}", file=sys.stderr)
    _show(result, args)
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Shows the summary of a prepared folder, from its manifest alone."""
    from nativerank.data.prepare import summary

    check_json(args.json)
    _show(summary(args.path), args)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Hashes all files; a damaged one ends in ValueError with its name."""
    from nativerank.data.shards import verify

    check_json(args.json)
    dataset = verify(args.path, args.quiet)
    shards = sum(len(entry["shards"]) for entry in dataset.manifest["splits"].values())
    result = {"path": args.path, "shards": shards, "tokenizer_sha256": dataset.tokenizer_sha256}
    if not write_json(result, args.json) and not args.quiet:
        print(f"{args.path}: {shards} shards and the tokenizer are as the manifest says")
    return 0


def _show(result: dict[str, Any], args: argparse.Namespace) -> None:
    """The result as JSON where asked for, and as a table unless that went to standard output."""
    if not write_json(result, args.json) and not args.quiet:
        _table(result)


def _table(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=result["path"], title_justify="left")
    for column in ("split", "documents", "text", "tokens", "shards"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, entry in result["splits"].items():
        text = f"{entry['text_bytes'] / 1e6:,.2f} MB"
        table.add_row(name, f"{entry['documents']:,}", text, f"{entry['tokens']:,}", str(entry["shards"]))
    console = open_console()
    console.print(table)
    rest = f"vocabulary {result['vocab_size']:,}, {result['bytes_per_token']:.2f} bytes per token, {result['dtype']}"
    console.print(rest, highlight=False)

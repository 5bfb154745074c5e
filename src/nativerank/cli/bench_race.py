"""nativerank bench layer|train|optimizer|retraction: flags, and tables of cases in which contestants took turns."""

import argparse
from typing import Any

from nativerank.terminal import console as open_console

HELP_THREADS = "numbers of threads (default: 1 and PyTorch's own)"
DEVICES = ("cpu", "cuda", "mps")


def add_layer(parser: argparse.ArgumentParser) -> None:
    """Of `bench layer`."""
    parser.add_argument("--d_in", type=int, default=4096)
    parser.add_argument("--d_out", type=int, default=11008)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048, help="that go through the layer")
    add_clock(parser)
    add_rounds(parser, 9, "recorded passes of each layer", threads=True)


def add_train(parser: argparse.ArgumentParser) -> None:
    """Of `bench train`."""
    parser.add_argument("--model.preset", dest="preset_name", default="demo", metavar="PRESET")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["spectron", "lowrank-adamw", "dense-adamw", "hf-dense"],
        metavar="M",
        help="METHOD[+compile][+up|+blocks][+whole][+apart], or hf-dense: the stock model with fused AdamW",
    )
    add_size(parser)
    parser.add_argument("--context", type=int, help="tokens of one sequence (default: the preset's)")
    parser.add_argument("--tokens", type=int, help="of a step (default: the preset's sequences of one pass)")
    parser.add_argument("--vocab_size", type=int, help="default: the preset's; 64 leaves little but the blocks")
    parser.add_argument("--rank.ratio", dest="ratio", type=float, metavar="R", help="default: the preset's ranks")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own")
    add_clock(parser)
    add_rounds(parser, 7, "recorded steps of each contestant")


def add_optimizer(parser: argparse.ArgumentParser) -> None:
    """Of `bench optimizer`."""
    parser.add_argument("--model.preset", dest="preset_name", default="spectron-s", metavar="PRESET")
    parser.add_argument("--layers", type=int, help="another depth of the preset")
    parser.add_argument("--d_model", type=int, default=1024, help="width of the single layer, ranks a quarter of it")
    parser.add_argument("--tokens_per_step", type=int, default=8192, help="tokens through the single layer")
    add_clock(parser)
    add_rounds(parser, 5, "recorded calls of everything", threads=True)


def add_retraction(parser: argparse.ArgumentParser) -> None:
    """Of `bench retraction`."""
    parser.add_argument("--layers", type=int, default=2, help="layers of the 70B shape at rank 32")
    add_clock(parser)
    add_rounds(parser, 7, "recorded rounds", threads=True)


def add_clock(parser: argparse.ArgumentParser) -> None:
    """What tells the time."""
    help = "cpu: processor time, for a busy machine and one thread"
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help=help)


def add_size(parser: argparse.ArgumentParser) -> None:
    """Changes of the preset's size."""
    parser.add_argument("--d_model", type=int, help="another width, with the preset's proportions")
    parser.add_argument("--layers", type=int, help="another depth")


def add_rounds(parser: argparse.ArgumentParser, repeats: int, what: str, threads: bool = False) -> None:
    """How often, and on what."""
    parser.add_argument("--repeats", type=int, default=repeats, help=what)
    if threads:
        parser.add_argument("--threads", type=int, nargs="+", help=HELP_THREADS)
    parser.add_argument("--device", default="cpu", choices=DEVICES)


def show_layer(result: dict[str, Any]) -> None:
    """A row for each layer and number of threads."""
    title = "forward + backward, {d_in} -> {d_out}, {tokens:,} tokens".format(**result["settings"])
    extra = {
        "FLOPs": lambda case, name: f"{case['flop_share'][name]:.3f}",
        "time / FLOPs": lambda case, name: f"{case['over_flops'][name]:.3f}",
    }
    show_races(result, title, lambda case: f"{case['dtype']}, {threads(case)}", extra)


def show_retraction(result: dict[str, Any]) -> None:
    """A row for each way, with its error."""
    extra = {"max |Q^T Q - I|": lambda case, name: f"{case['off_orthonormal'][name]:.1e}"}
    show_races(result, "retraction", _stacks, extra)


def _stacks(case: dict[str, Any]) -> str:
    return ", ".join(f"{n} of ({d}, {r})" for n, d, r in case["shapes"]) + f", {threads(case)}"


def show_train(result: dict[str, Any]) -> None:
    """Milliseconds of a step and of its parts."""

    settings = result["settings"]
    layers = f"{settings['layers']} layer{'s' * (settings['layers'] > 1)}"
    about = "d_model {d_model}, {0}, context {context}, {tokens:,} tokens a step".format(layers, **settings)
    extra = {
        "FLOPs": lambda case, name: f"{case['flop_share'][name]:.2f}",
        "tokens/s": lambda case, name: f"{case['tokens_per_second'][name]:,.0f}",
    }
    show_races(result, about, threads, extra)
    (case,) = result["cases"]
    shares = ", ".join(f"{name} {share:.1%}" for name, share in case["optimizer_share"].items())
    console = open_console()
    console.print(_phases(case))
    console.print(f"optimizer, of the step: {shares}")
    for name, share in case["optimizer_adds"].items():
        console.print(f"{name} adds {share:.1%} to the step of lowrank-adamw")
    probes = ", ".join(f"{name} {share:.2%}" for name, share in case["probe_share"].items())
    console.print(f"probes at the default interval, beside the steps: {probes}")


def _phases(case: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="ms of its parts")
    columns = list(next(iter(case["phases"].values())))
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for name, phases in case["phases"].items():
        table.add_row(name, *(f"{1e3 * phases[column]:,.1f}" for column in columns))
    return table


def threads(case: dict[str, Any]) -> str:
    """How many."""
    return f"{case['threads']} thread{'s' * (case['threads'] > 1)}"


def show_races(result: dict[str, Any], title: str, describe: Any, extra: dict[str, Any]) -> None:
    """A table for each case: median and spread of seconds, their ratio to the reference's, and more columns.

    Args:
        describe: what a case is about. extra: text of a column by case and contestant.
    """
    from rich.table import Table

    console = open_console()
    for case in result["cases"]:
        table = Table(title=f"{title}; {describe(case['case'])}; medians of {result['settings']['repeats']}")
        table.add_column("", overflow="fold")
        for column in ("ms", "least - most", f"/ {case['reference']}", *extra):
            table.add_column(column, justify="right")
        for name, seconds in case["seconds"].items():
            least, most = (f"{1e3 * value:,.1f}" for value in case["spread"][name])
            cells = [f"{1e3 * seconds:,.1f}", f"{least} - {most}", f"{case['ratio'][name]:.3f}"]
            table.add_row(name, *cells, *(text(case, name) for text in extra.values()))
        console.print(table)


def show_optimizer(result: dict[str, Any]) -> None:
    """Times for each number of threads, then the FLOPs, which hold on any machine."""
    console = open_console()
    show_races(result, "optimizer", _part, {})
    console.print(_optimizer_flops(result))
    console.print("k = 5 steps on (d, r): gram 4 d r^2 + (4 k - 3) 2 r^3, plain k (4 d r^2 + 2 r^3); norm: 6 d r")


def _part(case: dict[str, Any]) -> str:
    words = {
        "orthogonalize": "Newton-Schulz of {shape}",
        "layer": "layer of width {d_model}, rank {rank}, {tokens_per_step:,} tokens",
        "step": "all {factors} factors of the preset, Muon against Spectron",
    }
    return words[case["part"]].format(**case) + f", {threads(case)}"


def _optimizer_flops(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="FLOPs: orthogonalization and norms over the matrices' forward and backward, by tokens a step")
    sizes = [row["tokens_per_step"] for row in result["flops"]["layer"]["share_of_matrices"]]
    for column in ("", "GFLOP", *(f"{n // 1024}k" for n in sizes), "1% at"):
        table.add_column(column, justify="right" if column else "left")
    for part, flops in result["flops"].items():
        name = result["settings"]["preset"] if part == "preset" else part
        for form, total in flops["per_step"].items():
            shares = [f"{row[form]:.2%}" for row in flops["share_of_matrices"]]
            tokens = f"{flops['one_percent_tokens'][form]['matrices']:,}"
            table.add_row(f"{name}, {form}", f"{total / 1e9:,.2f}", *shares, tokens)
    return table

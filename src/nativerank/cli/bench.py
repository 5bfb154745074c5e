"""nativerank bench: measurements that anyone can repeat, as ratios within one process."""

import argparse
import importlib
import statistics
from collections.abc import Callable
from typing import Any

from nativerank.cli.bench_distributed import add_flags as distributed_flags
from nativerank.cli.bench_distributed import show_distributed
from nativerank.cli.bench_generate import add_flags as generate_flags
from nativerank.cli.bench_generate import show_generate
from nativerank.cli.bench_step70b import add_flags as step70b_flags
from nativerank.cli.bench_step70b import show_step70b
from nativerank.cli.flags import add_quiet
from nativerank.cli.output import add_json, check_json, write_json

EXAMPLE = """examples:
  nativerank bench train
  nativerank bench train --d_model 512 --json result.json
  nativerank bench bound
  nativerank bench optimizer --model.preset spectron-m --threads 2
  nativerank bench retraction
  nativerank bench step70b --layerwise --state bf16
  nativerank bench conditioning runs/sct runs/spectron
  nativerank bench distributed --paper
  nativerank bench generate --model.preset spectron-s
"""


def add_parser(subparsers: Any) -> None:
    """Flags of `nativerank bench NAME`."""
    raw = argparse.RawDescriptionHelpFormatter
    bench = subparsers.add_parser("bench", description="Measure speed.", epilog=EXAMPLE, formatter_class=raw)
    names = bench.add_subparsers(dest="benchmark", metavar="NAME", required=True)

    def add(name: str, show: Callable[[dict[str, Any]], None], help: str, description: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = names.add_parser(
            name, help=help, description=description, epilog=EXAMPLE, formatter_class=raw
        )
        finish(parser, name, show)
        return parser

    train = add(
        "train",
        show,
        "a training step in its parts, beside the dense twin's",
        "Time a training step in its parts, low rank beside dense, steps interleaved.",
    )
    add_model(train, "demo")
    train.add_argument("--method", default="spectron", help="low-rank method")
    train.add_argument("--dense_method", default="dense-adamw")
    add_size(train, "sequences per step")
    add_rounds(train, 7, "recorded steps of each side")
    bound = add(
        "bound",
        show_bound,
        "the largest ||dW|| / eta of Spectron's forms, on adversarial steps and in training",
        "How near ||dW|| comes to eta: on steps made to break the bound, and in two training runs.",
    )
    add_model(bound, "pocket")
    bound.add_argument("--steps", type=int, help="length of the training runs (default: the preset's)")
    bound.add_argument("--probe_every", type=int, default=3, help="steps between measurements of every matrix")
    bound.add_argument("--seed", type=int, default=0)
    bound.add_argument("--no_train", dest="train_too", action="store_false", help="the adversarial set alone")
    optimizer = add(
        "optimizer",
        show_optimizer,
        "what Spectron's algebra costs: seconds, share of a layer's work, FLOPs",
        "Orthogonalization in r x r and plain: for one matrix, beside one layer, over a preset's factors.",
    )
    add_model(optimizer, "spectron-s")
    optimizer.add_argument("--layers", type=int, help="another depth of the preset")
    optimizer.add_argument("--d_model", type=int, default=1024, help="width of the single layer, ranks a quarter of it")
    optimizer.add_argument("--tokens_per_step", type=int, default=8192, help="tokens through the single layer")
    add_rounds(optimizer, 5, "recorded calls of everything", threads=True)
    frames = add(
        "frames",
        show_frames,
        "what orthonormal factors cost, and TSVD's cache against a QR in every forward pass",
        "Steps of several micro-batches with sct, tsvd, stiefel-spectron, and factors left alone.",
    )
    add_model(frames, "demo")
    add_size(frames, "sequences per pass")
    frames.add_argument("--micro_batches", type=int, default=8, help="passes per step")
    add_rounds(frames, 5, "recorded steps of each side")
    retraction = add(
        "retraction",
        show_retraction,
        "bringing factors back to orthonormal columns, each way against looped QR",
        "Each way of retraction on stacks of factors, against looped Householder QR with a sign fix.",
    )
    retraction.add_argument("--layers", type=int, default=2, help="layers of the 70B shape at rank 32")
    add_rounds(retraction, 7, "recorded rounds", threads=True)
    conditioning = add(
        "conditioning",
        show_conditioning,
        "norms and condition of the factors of trained models",
        "How tightly the factors of trained models bound W, and how evenly their steps move it.",
    )
    conditioning.add_argument("runs", nargs="+", metavar="RUN", help="run folders")

    for name, flags, shown in (
        ("step70b", step70b_flags, show_step70b),
        ("distributed", distributed_flags, show_distributed),
        ("generate", generate_flags, show_generate),
    ):
        finish(flags(names), name, shown)


def finish(parser: argparse.ArgumentParser, name: str, show: Callable[[dict[str, Any]], None]) -> None:
    """What all of them take, and what runs."""
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(run=runner(name, show))


def add_model(parser: argparse.ArgumentParser, preset: str) -> None:
    """Which preset's shapes."""
    parser.add_argument("--model.preset", dest="preset_name", default=preset, metavar="PRESET")


def add_size(parser: argparse.ArgumentParser, batch: str) -> None:
    """Changes of the preset's size."""
    parser.add_argument("--d_model", type=int, help="another width, with the preset's proportions")
    parser.add_argument("--layers", type=int, help="another depth")
    parser.add_argument("--batch_size", type=int, help=f"{batch} (default: the preset's)")


def add_rounds(parser: argparse.ArgumentParser, repeats: int, what: str, threads: bool = False) -> None:
    """How often, and on what."""
    parser.add_argument("--repeats", type=int, default=repeats, help=what)
    if threads:
        help = "numbers of threads (default: 1 and PyTorch's own)"
        parser.add_argument("--threads", type=int, nargs="+", help=help)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "mps"])


def runner(name: str, show: Callable[[dict[str, Any]], None]) -> Callable[[argparse.Namespace], int]:
    """What measures by bench.NAME's bench_NAME, whose arguments are the flags, and shows."""

    def run(flags: argparse.Namespace) -> int:
        check_json(flags.json)
        measure = getattr(importlib.import_module(f"nativerank.bench.{name}"), f"bench_{name}")
        result = measure(**{k: v for k, v in vars(flags).items() if k not in ("run", "json", "quiet", "benchmark")})
        if not write_json(result, flags.json) and not flags.quiet:
            show(result)
        return 0

    return run


def show_optimizer(result: dict[str, Any]) -> None:
    """Times for each number of threads, then the FLOPs, which hold on any machine."""
    from rich.console import Console

    console = Console(highlight=False)
    for part in result["measured"]:
        console.print(_optimizer_times(result, part))
    console.print(_optimizer_flops(result))
    console.print("k = 5 steps on (d, r): gram 4 d r^2 + (4 k - 3) 2 r^3, plain k (4 d r^2 + 2 r^3); norm: 6 d r")


def _optimizer_times(result: dict[str, Any], part: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"{part['threads']} thread{'s' * (part['threads'] > 1)}, medians of {result['repeats']}")
    for column in ("", "ms", ""):
        table.add_column(column, justify="right" if column else "left")

    def row(name: str, seconds: float, remark: str = "") -> None:
        table.add_row(name, f"{1e3 * seconds:,.1f}", remark)

    for one in part["orthogonalize"]:
        row("plain Newton-Schulz of ({}, {})".format(*one["shape"]), one["seconds"]["plain"])
        for form, name in (("gram", "in r x r"), ("gram_products", "in r x r, products alone")):
            row(f"  {name}", one["seconds"][form], f"{one['speedup'][form]:.2f}x as fast")
    layer, step = part["layer"], part["step"]
    what = f"layer of width {layer['d_model']}, rank {layer['rank']}, {layer['tokens_per_step']:,} tokens"
    row(f"{what}: forward, backward", layer["seconds"]["forward_backward"])
    for form, share in layer["share"].items():
        name = "orthogonalization and norms" if form == "algebra" else f"optimizer step, {form}"
        row(f"  {name}", layer["seconds"][form], f"{share:.2%}")
    row(f"{result['preset']}: Muon, one factor after the other", step["seconds"]["one_at_a_time"])
    row(f"  Spectron, all {step['factors']}", step["seconds"]["spectron"], f"{step['speedup']:.2f}x as fast")
    return table


def _optimizer_flops(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="FLOPs: orthogonalization and norms over the matrices' forward and backward, by tokens a step")
    sizes = [row["tokens_per_step"] for row in result["flops"]["layer"]["share_of_matrices"]]
    for column in ("", "GFLOP", *(f"{n // 1024}k" for n in sizes), "1% at"):
        table.add_column(column, justify="right" if column else "left")
    for part, flops in result["flops"].items():
        name = result["preset"] if part == "preset" else part
        for form, total in flops["per_step"].items():
            shares = [f"{row[form]:.2%}" for row in flops["share_of_matrices"]]
            tokens = f"{flops['one_percent_tokens'][form]['matrices']:,}"
            table.add_row(f"{name}, {form}", f"{total / 1e9:,.2f}", *shares, tokens)
    return table


def show_frames(result: dict[str, Any]) -> None:
    """Seconds of a step and what of them the frames take."""
    from rich.console import Console
    from rich.table import Table

    title = f"{result['preset']}, {result['micro_batches']} micro-batches, {result['tokens_per_step']:,} tokens a step"
    table = Table(title=title)
    for column in ("", "ms a step", "beyond free factors"):
        table.add_column(column, justify="right" if column else "left")
    for side, times in result["seconds"].items():
        table.add_row(side, f"{1e3 * statistics.median(times):,.0f}", f"{result['share'][side]:.1%}")
    Console(highlight=False).print(table)


def show_bound(result: dict[str, Any]) -> None:
    """A table of the largest ratios; the worst cases in words are in the JSON."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"largest ||dW|| / eta over {result['adversarial'][0]['cases']:,} adversarial steps")
    for column in ("form", "any power vector", "exact", "cold", "stale", "above 1"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in result["adversarial"]:
        by_vector = row["max_ratio_by_power_vector"]
        figures = [f"{value:.3f}" for value in (row["max_ratio"], *(by_vector[k] for k in ("exact", "cold", "stale")))]
        table.add_row(row["form"], *figures, f"{row['violations']:,}")
    console = Console(highlight=False)
    console.print(table)
    for run in result["training"]:
        console.print(
            f"in training, {run['form']}: largest {run['max_ratio']:.3f}, mean {run['mean_ratio']:.3f}, "
            f"{run['violations']} of {run['measurements']:,} measurements above 1 "
            f"({result['preset']}, {run['steps']} steps, validation loss {run['val_loss']:.3f})"
        )


def show_retraction(result: dict[str, Any]) -> None:
    """Times, ratios and errors, a row for each way."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"retraction, medians of {result['repeats']}")
    for column in ("matrices", "threads", "way", "ms", "speed", "max |Q^T Q - I|"):
        table.add_column(column, justify="left" if column in ("matrices", "way") else "right")
    for part in result["measured"]:
        what = ", ".join(f"{n} of ({d}, {r})" for n, d, r in part["shapes"])
        for way, seconds in part["seconds"].items():
            speed = f"{part['speedup'][way]:.2f}x" if way in part["speedup"] else ""
            error = f"{part['off_orthonormal'][way]:.1e}"
            table.add_row(what, str(part["threads"]), way, f"{1e3 * seconds:,.1f}", speed, error)
            what = ""
    Console(highlight=False).print(table)


def show_conditioning(result: dict[str, Any]) -> None:
    """A row for each group of runs: median over matrices, and in brackets the worst."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="medians over matrices (and the worst)")
    figures = {"norm bound": "norm_slack", "spread": "spread", "cond": "condition", "balanced": "balanced_condition"}
    table.add_column("runs")
    for column in figures:
        table.add_column(column, justify="right")
    for row in result["summary"]:
        run = f"{row['method']} {row['lr']}" if row["method"] else "model"
        name = f"{run}, {row['seeds']} seed{'s' * (row['seeds'] > 1)}"
        cells = [f"{row['median'][c]:.3g} ({row['worst'][c]:.3g})" for c in figures.values()]
        table.add_row(f"{name}\n{row['layer']}", *cells)
    console = Console(highlight=False)
    console.print(table)
    console.print("norm bound: known norm of W over its norm; spread: largest over smallest singular value")
    console.print("cond: of the map from steps of the factors to dW; balanced: the least of a pair with this product")


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

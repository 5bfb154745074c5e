"""nativerank bench: measurements that anyone can repeat, as ratios within one process."""

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from nativerank.cli.bench_distributed import add_flags as distributed_flags
from nativerank.cli.bench_distributed import show_distributed
from nativerank.cli.bench_generate import add_flags as generate_flags
from nativerank.cli.bench_generate import show_generate
from nativerank.cli.bench_memory import loss_flags, memory_flags, show_loss, show_memory
from nativerank.cli.bench_race import (
    add_layer,
    add_optimizer,
    add_retraction,
    add_rounds,
    add_size,
    add_train,
    show_layer,
    show_optimizer,
    show_retraction,
    show_train,
)
from nativerank.cli.bench_step70b import add_flags as step70b_flags
from nativerank.cli.bench_step70b import show_step70b
from nativerank.cli.flags import add_quiet
from nativerank.cli.output import add_json, check_json, write_json
from nativerank.terminal import console as open_console

EXAMPLE = """examples:
  nativerank bench train
  nativerank bench train --d_model 512 --json result.json
  nativerank bench train --methods spectron spectron+compile dense-adamw+compile hf-dense
  nativerank bench layer --threads 1 2
  nativerank bench bound
  nativerank bench optimizer --model.preset spectron-m --threads 2
  nativerank bench retraction
  nativerank bench step70b --layerwise --state bf16
  nativerank bench conditioning runs/sct runs/spectron
  nativerank bench distributed --paper
  nativerank bench generate --model.preset spectron-s
  nativerank bench memory --policies whole blocks
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

    add_train(
        add(
            "train",
            show_train,
            "a training step in its parts: methods, switches, dense twins by turns",
            "Time a training step in its parts, several contestants by turns on the same batches.",
        )
    )
    add_layer(
        add(
            "layer",
            show_layer,
            "one factor layer beside nn.Linear, and beside its share of the FLOPs",
            "Forward and backward pass of one layer: nn.Linear, A B^T and U diag(s) V^T by turns.",
        )
    )
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
    add_optimizer(
        add(
            "optimizer",
            show_optimizer,
            "what Spectron's algebra costs: seconds, share of a layer's work, FLOPs",
            "Orthogonalization in r x r and plain: for one matrix, beside one layer, over a preset's factors.",
        )
    )
    frames = add(
        "frames",
        show_frames,
        "what orthonormal factors cost, and TSVD's cache against a QR in every forward pass",
        "Steps of several micro-batches with sct, tsvd, stiefel-spectron, and factors left alone.",
    )
    add_model(frames, "demo")
    add_size(frames)
    frames.add_argument("--batch_size", type=int, help="sequences per pass (default: the preset's)")
    frames.add_argument("--micro_batches", type=int, default=8, help="passes per step")
    add_rounds(frames, 5, "recorded steps of each side")
    add_retraction(
        add(
            "retraction",
            show_retraction,
            "bringing factors back to orthonormal columns, each way against looped QR",
            "Each way of retraction on stacks of factors, against looped Householder QR with a sign fix.",
        )
    )
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
        ("memory", memory_flags, show_memory),
        ("loss", loss_flags, show_loss),
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


def runner(name: str, show: Callable[[dict[str, Any]], None]) -> Callable[[argparse.Namespace], int]:
    """What measures by bench.NAME's bench_NAME, whose arguments are the flags, and shows."""

    def run(flags: argparse.Namespace) -> int:
        check_json(flags.json)
        measure = getattr(importlib.import_module(f"nativerank.bench.{name}"), f"bench_{name}")
        from nativerank.bench.measure import told
        from nativerank.cli.console import progress

        settings = {k: v for k, v in vars(flags).items() if k not in ("run", "json", "quiet", "benchmark")}
        with progress(flags.quiet, still=True) as watch, told(watch):
            watch(name)
            result = measure(**settings)
        if not write_json(result, flags.json) and not flags.quiet:
            show(result)
        return 0

    return run


def show_frames(result: dict[str, Any]) -> None:
    """Seconds of a step and what of them the frames take."""
    from rich.table import Table

    (case,) = result["cases"]
    title = "{micro_batches} micro-batches, {tokens_per_step:,} tokens a step".format(**case["case"])
    title = f"{result['settings']['preset']}, {title}"
    table = Table(title=title)
    for column in ("", "ms a step", "beyond free factors"):
        table.add_column(column, justify="right" if column else "left")
    for side, seconds in case["seconds"].items():
        table.add_row(side, f"{1e3 * seconds:,.0f}", f"{case['share'][side]:.1%}")
    open_console().print(table)


def show_bound(result: dict[str, Any]) -> None:
    """A table of the largest ratios; the worst cases in words are in the JSON."""
    from rich.table import Table

    table = Table(title=f"largest ||dW|| / eta over {result['cases'][0]['cases']:,} adversarial steps")
    for column in ("form", "any power vector", "exact", "cold", "stale", "above 1"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in result["cases"]:
        by_vector = row["max_ratio_by_power_vector"]
        figures = [f"{value:.3f}" for value in (row["max_ratio"], *(by_vector[k] for k in ("exact", "cold", "stale")))]
        table.add_row(row["form"], *figures, f"{row['violations']:,}")
    console = open_console()
    console.print(table)
    for run in result["training"]:
        console.print(
            f"in training, {run['form']}: largest {run['max_ratio']:.3f}, mean {run['mean_ratio']:.3f}, "
            f"{run['violations']} of {run['measurements']:,} measurements above 1 "
            f"({result['settings']['preset']}, {run['steps']} steps, validation loss {run['val_loss']:.3f})"
        )


def show_conditioning(result: dict[str, Any]) -> None:
    """A row for each group of runs: median over matrices, and in brackets the worst."""
    from rich.table import Table

    table = Table(title="medians over matrices (and the worst)")
    figures = {"norm bound": "norm_slack", "spread": "spread", "cond": "condition", "balanced": "balanced_condition"}
    table.add_column("runs")
    for column in figures:
        table.add_column(column, justify="right")
    for row in result["cases"]:
        run = f"{row['method']} {row['lr']}" if row["method"] else "model"
        name = f"{run}, {row['seeds']} seed{'s' * (row['seeds'] > 1)}"
        cells = [f"{row['median'][c]:.3g} ({row['worst'][c]:.3g})" for c in figures.values()]
        table.add_row(f"{name}\n{row['layer']}", *cells)
    console = open_console()
    console.print(table)
    console.print("norm bound: known norm of W over its norm; spread: largest over smallest singular value")
    console.print("cond: of the map from steps of the factors to dW; balanced: the least of a pair with this product")

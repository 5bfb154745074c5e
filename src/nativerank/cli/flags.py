"""Flags that several commands share, in the same words."""

import argparse
from typing import Any

DEVICES = ("cpu", "cuda", "mps")


def add_step(parser: Any) -> None:
    """Which checkpoint of a run."""
    parser.add_argument("--step", type=int, metavar="N", help="of a run: the checkpoint of this step")


def add_quantize(parser: Any) -> None:
    """Weights as `integrations.quantize` makes them."""
    parser.add_argument("--quantize", choices=["int8"], help="weights in 8 bits, with the extra `quantize`")


def add_device(parser: Any) -> None:
    """Where a model that is used runs; see `device_of`."""
    parser.add_argument("--device", choices=DEVICES, help="default: cuda where there is one, else cpu")


def add_quiet(parser: Any) -> None:
    """No progress and no result on a terminal."""
    parser.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")


def device_of(flags: argparse.Namespace) -> Any:
    """The one that was asked for, else what training takes."""
    import torch

    from nativerank.train.setup import pick_device

    return pick_device(flags.device or ("cuda" if torch.cuda.is_available() else "cpu"))

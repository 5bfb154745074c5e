"""Seconds of forward + backward of one Llama block and of its parts: `down` products joined against apart.

    python benchmarks/joint_products.py [--threads 1] [--repeats 20] [--d_model 256 512 1024] [--json FILE]

Both run by turns in one process, and the ratio (joined over apart) is the median of pairs, with its quartiles: by the
processor's time, so that what else runs on the machine counts less, and by the clock with more threads than one. Heads
of 64, ranks d/4, f = 2.75 d, 2048 tokens (8192 at d_model 1024 and above).
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import nativerank as nr
from nativerank.bench.measure import check_sizes, measured_by, race
from nativerank.bench.record import raced, record
from nativerank.cli.output import STDOUT, add_json, check_json, write_json

CONTEXT, HEAD = 512, 64


def parts(block: Any, positions: tuple[Tensor, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is timed: a function of the block's input each."""
    attention, mlp = block.self_attn, block.mlp
    return {
        "q, k, v": lambda x: attention.q_proj(x).sum() + attention.k_proj(x).sum() + attention.v_proj(x).sum(),
        "gate, up": lambda x: mlp.gate_proj(x).sum() + mlp.up_proj(x).sum(),
        "block": lambda x: block(x, position_embeddings=positions).sum(),
    }


def once(model: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Forward and backward."""
    model.zero_grad()
    x.grad = None
    function(x * 1).backward()


def compare(d_model: int, repeats: int, threads: int, to: TextIO) -> list[dict[str, Any]]:
    """A case of the record for each part, and a line as soon as it is known."""
    torch.manual_seed(0)
    heads, tokens = d_model // HEAD, 8192 if d_model >= 1024 else 2048
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=d_model,
        intermediate_size=d_model * 11 // 4,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT,
    )
    apart = LlamaForCausalLM(config).train()
    nr.factorize(apart, rank_ratio=0.25)
    joined = copy.deepcopy(apart)
    assert len(nr.join_products(joined)) == 2
    x = torch.randn(tokens // CONTEXT, CONTEXT, d_model, requires_grad=True)
    positions = apart.model.rotary_emb(x, torch.arange(CONTEXT)[None])
    sides = {"apart": apart, "joined": joined}
    of = {name: parts(model.model.layers[0], positions) for name, model in sides.items()}
    cases = []
    for part in of["apart"]:
        calls = {name: partial(once, model, of[name][part], x) for name, model in sides.items()}
        found = race(calls, repeats + 1, x.device)
        seconds = {name: values[1:] for name, values in found.items()}  # one more that warms up
        ratios = [a / b for a, b in zip(seconds["joined"], seconds["apart"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        case = {"part": part, "d_model": d_model, "tokens": tokens, "threads": threads}
        cases.append(raced(case, "apart", seconds, ratio_quartiles={"joined": [low, high]}))
        print(
            f"d_model {d_model:5d}  {part:9s} apart {1e3 * statistics.median(seconds['apart']):8.1f} ms   "
            f"ratio {statistics.median(ratios):.3f}  quartiles {low:.3f} to {high:.3f}",
            file=to,
            flush=True,
        )
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20, help="pairs, two at least")
    parser.add_argument("--d_model", type=int, nargs="+", default=[256, 512, 1024])
    add_json(parser)
    a = parser.parse_args(arguments)
    try:
        check_json(a.json)
        check_sizes(threads=a.threads)
        if a.repeats < 2:
            raise ValueError(f"--repeats must be at least 2, for quartiles, got {a.repeats}")
        for d_model in a.d_model:
            if d_model < HEAD or d_model % HEAD:
                raise ValueError(f"--d_model must be a multiple of {HEAD}, the head size, got {d_model}")
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(a.threads)
    to = sys.stderr if a.json == STDOUT else sys.stdout
    clock = "cpu" if a.threads == 1 else "wall"
    settings = {"threads": a.threads, "repeats": a.repeats, "d_model": a.d_model, "clock": clock}
    with measured_by(clock, [a.threads], torch.device("cpu")):
        cases = [case for d_model in a.d_model for case in compare(d_model, a.repeats, a.threads, to)]
    write_json(record("joint_products", settings, cases, torch.device("cpu")), a.json)


if __name__ == "__main__":
    main()

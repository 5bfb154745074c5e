"""CPU seconds of forward + backward of one Llama block and of its parts: `down` products joined against apart.

    python benchmarks/joint_products.py [--threads 1] [--repeats 20] [--d_model 256 512 1024]

Both run by turns in one process, and the ratio (joined over apart) is the median of pairs, with its quartiles. CPU
time, so that what else runs on the machine counts less. Heads of 64, ranks d/4, f = 2.75 d, 2048 tokens (8192 at
d_model 1024 and above).
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import nativerank as nr

CONTEXT = 512


def parts(block: Any, positions: tuple[Tensor, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is timed: a function of the block's input each."""
    attention, mlp = block.self_attn, block.mlp
    return {
        "q, k, v": lambda x: attention.q_proj(x).sum() + attention.k_proj(x).sum() + attention.v_proj(x).sum(),
        "gate, up": lambda x: mlp.gate_proj(x).sum() + mlp.up_proj(x).sum(),
        "block": lambda x: block(x, position_embeddings=positions).sum(),
    }


def seconds(model: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    model.zero_grad()
    x.grad = None
    began = time.process_time()
    function(x * 1).backward()
    return time.process_time() - began


def compare(d_model: int, repeats: int) -> None:
    torch.manual_seed(0)
    heads, tokens = d_model // 64, 8192 if d_model >= 1024 else 2048
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
    of_apart, of_joined = (parts(model.model.layers[0], positions) for model in (apart, joined))
    for name in of_apart:
        ratios, times = [], []
        for turn in range(repeats + 2):
            pair = [(apart, of_apart[name]), (joined, of_joined[name])]
            order = pair if turn % 2 else pair[::-1]
            took = {id(model): seconds(model, function, x) for model, function in order}
            if turn >= 2:  # the first two warm up
                ratios.append(took[id(joined)] / took[id(apart)])
                times.append(took[id(apart)])
        low, _, high = statistics.quantiles(ratios, n=4)
        print(
            f"d_model {d_model:5d}  {name:9s} apart {1e3 * statistics.median(times):8.1f} ms   "
            f"ratio {statistics.median(ratios):.3f}  quartiles {low:.3f} to {high:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--d_model", type=int, nargs="+", default=[256, 512, 1024])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"torch {torch.__version__}, {asked.threads} threads, {asked.repeats} pairs")
    for d_model in asked.d_model:
        compare(d_model, asked.repeats)


if __name__ == "__main__":
    main()

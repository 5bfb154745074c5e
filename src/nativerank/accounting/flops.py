"""FLOPs of training a Hugging Face causal language model, per token, aware of rank.

| part | forward, per token | where it comes from |
|---|---|---|
| factor layer | 2 k n for each vector (k) times matrix (k, n): 2 r (d_in + d_out) | the layer's `gemms()` |
| linear that stayed dense | 2 d_in d_out | shape of the weight |
| expert stack that stayed dense | 2 d_in d_out times the experts that a token visits | shape of the weight, config |
| guide of self-guided training | 2 d_in d_out times how often it is computed | the layer's `guide_gemm()` |
| output head | 2 d_model vocabulary | shape of the weight |
| attention | Q K^T and A V over the whole context, 2 context heads head_dim each | config |
| embeddings, norms, activations, biases, rotary tables, routers of experts | none | |
| optimizer | none: it does not grow with the tokens of a step (`accounting.rule_flops` has it) | |

A multiply-add counts as 2, the backward pass as twice the forward pass, so training is 3 times forward. Attention is
counted full although it is causal, as PyTorch's FLOP counter does; a test holds the sum to that counter. Shapes are all
that is read, so a model on the meta device will do and a 70B is counted in seconds.

This is the convention "exact". The other one that papers use, "6ND", is 6 times the parameters that are neither
embedding nor head (`six_nd`). What is made again in the backward pass (`recomputed_flops`) is in neither of them, nor
in MFU, which is exact FLOPs over what the device could have done in the time.
"""

from typing import Any, NamedTuple

from torch import nn

from nativerank.distributed.wrap import blocks
from nativerank.layers import linear_modules
from nativerank.layers.base import Gemm
from nativerank.layers.discover import walk
from nativerank.layers.experts import active_experts

BACKWARD = 2  # times the forward pass: one product for the gradient of the input, one for that of the weight


class Flops(NamedTuple):
    """FLOPs of a forward pass per token."""

    matrices: float
    head: float
    attention: float

    @property
    def forward(self) -> float:
        return self.matrices + self.head + self.attention

    @property
    def training(self) -> float:
        """Forward and backward."""
        return (1 + BACKWARD) * self.forward


def flops_per_token(model: nn.Module, context: int, guided: float = 1.0) -> Flops:
    """What one token costs.

    Args:
        model: Hugging Face causal language model, factorized or not, on any device.
        context: tokens that a query attends to.
        guided: share of the forward passes in which the guides of a self-guided model are computed (`guided_share`).
    """
    hf: Any = model
    head = hf.get_output_embeddings()
    return Flops(
        matrices=factor_flops(model, guided) + dense_flops(model),
        head=0.0 if head is None else 2.0 * head.weight.numel(),
        attention=attention_flops(hf.config.get_text_config(), context),
    )


def factor_flops(model: nn.Module, guided: float) -> float:
    """Everything that declares its matmuls."""
    total = 0.0
    layers: list[Any] = [slot.module for slot in walk(model) if hasattr(slot.module, "gemms")]
    for layer in layers:
        gemms = layer.gemms()
        total += sum(gemm.flops for gemm in gemms)
        if hasattr(layer, "guide_gemm") and layer.guide_gemm() in gemms:
            total -= (1 - guided) * layer.guide_gemm().flops
    return total


def dense_flops(model: nn.Module) -> float:
    """Hidden matrices that are no factors; one that several modules share runs in each of them."""
    total = 0.0
    for matrix in linear_modules(model).values():
        visits = (active_experts(matrix.owners[0]) or 1) if matrix.kind == "experts" else 1
        total += 2.0 * matrix.d_in * matrix.d_out * visits * len(matrix.names)
    return total


def attention_flops(config: Any, context: int) -> float:
    """Q K^T and A V of every layer that attends; grouped keys and values meet each of their queries all the same."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attending = sum("attention" in kind and "linear" not in kind for kind in kinds)
    return 4.0 * context * heads * head_dim * attending


def guided_share(share: float, stochastic: bool) -> float:
    """Share of a run's forward passes that compute a guide, on average.

    Its weight falls from 1 to 0 along a cosine over `share` of the steps, which is 1/2 on average; a stochastic guide
    is computed with that probability, the other one always while it is there.
    """
    return share / 2 if stochastic else share


def six_nd(non_embedding: int) -> float:
    """FLOPs of training per token by the convention "6ND": 6 times the parameters without embedding and head."""
    return 6.0 * non_embedding


def recomputed_flops(model: nn.Module, context: int, policy: str, guided: float = 1.0) -> float:
    """FLOPs per token that the backward pass makes again.

    A block is run again as far as something waits for it, so its last product is left out.

    Args:
        policy: train.recompute. "blocks": all products of the blocks, and attention. "up": products (k, n) that do not
            narrow, n >= k.
        model, context, guided: as of `flops_per_token`.
    """
    if policy == "none":
        return 0.0
    again = 0.0
    for block in blocks(model):
        products = block_products(block, guided)
        again += sum(product.flops for product in products[:-1] if policy == "blocks" or product.n >= product.k)
    hf: Any = model
    return again + (attention_flops(hf.config.get_text_config(), context) if policy == "blocks" else 0.0)


def block_products(block: nn.Module, guided: float) -> list[Gemm]:
    """Every product of weights in one block, in the order of its modules."""
    found: list[Gemm] = []
    dense = {id(matrix.owners[0]): matrix for matrix in linear_modules(block).values()}
    for slot in walk(block):
        layer: Any = slot.module
        if hasattr(layer, "gemms"):
            guide = layer.guide_gemm() if hasattr(layer, "guide_gemm") else None
            found += [g._replace(count=g.count * guided) if g == guide else g for g in layer.gemms()]
        elif id(layer) in dense:
            matrix = dense[id(layer)]
            visits = (active_experts(layer) or 1) if matrix.kind == "experts" else 1
            found.append(Gemm(matrix.d_in, matrix.d_out, visits))
    return found

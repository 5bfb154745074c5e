"""Which activations wait for the backward pass, and which are made again there (activation checkpointing).

    none      all wait
    up        of each block its input, the output of every product that narrows its input, and attention's
    blocks    of each block its input

A product (tokens, k) times (k, n) narrows if n < k. In a low-rank block that is what `down` does, d_in -> r, and
nothing else but small matrices that stayed dense. Where several run as one, each narrows though their joint matrix may
not; then it is an operator of its own name, which stays too (`layers.shared`). What `up` and elementwise functions make
of it, which is most of a block's activations, is made again at the cost of one product per factor pair instead of two.
The rule reads shapes of operators and no module, so it holds inside compiled blocks, gathered shards, casts and ranks
that change. Attention's output is d_model wide and dear to make again at long contexts, so it stays too.

The backward pass sees the same numbers either way, so a run has the same bits.
"""

import functools
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

# Their second argument is the matrix; addmm's third.
PRODUCTS = {"mm": 1, "addmm": 2, "_scaled_mm": 1, "_grouped_mm": 1, "grouped_product": 1}
JOINT = "joint_product"  # of matrices that narrow, each by itself
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
}


def recompute_blocks(model: nn.Module, keep: str = "blocks") -> None:
    """Keeps less of a Hugging Face model's blocks than everything.

    Args:
        keep: "up" or "blocks", as above.

    Raises:
        ValueError: an architecture that cannot run its blocks again.
    """
    hf: Any = model
    if not hf.supports_gradient_checkpointing:
        raise ValueError(f"train.recompute: {hf.config.model_type} models cannot run their blocks again")
    # transformers 5 renamed it on the way.
    enable = getattr(hf, "activation_checkpointing_enable", None) or hf.gradient_checkpointing_enable
    chosen = {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)} if keep == "up" else {}
    enable({"use_reentrant": False, **chosen})


def policy(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether the output of one operator waits."""
    return CheckpointPolicy.MUST_SAVE if stays(op, args) else CheckpointPolicy.PREFER_RECOMPUTE


def stays(op: Any, args: tuple[Any, ...]) -> bool:
    """Attention's output, and that of a product which narrows its input, or of several that do."""
    packet = getattr(op, "overloadpacket", None)
    name = getattr(packet, "__name__", "")
    if name == JOINT or name in ATTENTION:
        return True
    if name not in PRODUCTS:
        return False
    matrix = args[PRODUCTS[name]]
    assert isinstance(matrix, Tensor)
    return matrix.shape[-1] < matrix.shape[-2]

"""Bytes of training state, as the SCT paper counts them (arXiv 2604.00733), and what that leaves out.

    bytes = 16 * parameters                              float32 weight, gradient, first and second moment of Adam
    dense matrix    d_in d_out parameters
    U diag(s) V^T   r (d_in + d_out + 1) parameters
    ratio           d_in d_out / (r (d_in + d_out + 1))

Left out, there and here: activations, embedding and head, norms, temporary tensors of optimizer and retraction, the
weights of a teacher (`distill.teacher`), the framework itself. `nativerank bench step70b` measures what a step really
takes. A megabyte is 10^6 bytes.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nativerank.layers import SpectralLinear

COPIES, FLOAT32_BYTES = 4, 4
LEFT_OUT = "activations, embedding and head, norms, temporary tensors, the framework"
SCT_RANK = 32
# (model, d_in, d_out) of one MLP matrix, as the paper lists them.
SCT_MATRICES = (
    ("SmolLM2-135M", 576, 1536),
    ("SmolLM2-360M", 1024, 4096),
    ("SmolLM2-1.7B", 2048, 8192),
    ("LLaMA-7B", 4096, 11008),
    ("Qwen-27B", 4096, 17408),
    ("LLaMA-70B", 8192, 28672),
)
Shape = tuple[int, int]  # d_in, d_out


def adam_bytes(parameters: int) -> int:
    """Weight, gradient and both moments in float32."""
    return COPIES * FLOAT32_BYTES * parameters


def state_of(shapes: Iterable[Shape], rank: int) -> dict[str, Any]:
    """Parameters and bytes of these matrices, dense and as U diag(s) V^T; the layers themselves say what they hold."""
    layers = [SpectralLinear(d_in, d_out, rank, device="meta") for d_in, d_out in shapes]
    dense, factored = sum(layer.in_features * layer.out_features for layer in layers), sum(map(_numel, layers))
    return {
        "dense_parameters": dense,
        "factored_parameters": factored,
        "dense_bytes": adam_bytes(dense),
        "factored_bytes": adam_bytes(factored),
        "ratio": dense / factored,
    }


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all parameters (tied ones once) and buffers, of quantized ones those of codes and scales."""
    return sum(_held(t) for t in (*model.parameters(), *model.buffers()))


def _held(tensor: Any) -> int:
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_held(getattr(tensor, name)) for name in names)
    return int(tensor.nbytes)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def sct_table(rank: int = SCT_RANK) -> list[dict[str, Any]]:
    """The paper's table: one matrix of each model."""
    return [
        {"model": name, "d_in": d_in, "d_out": d_out, "rank": rank, **state_of([(d_in, d_out)], rank)}
        for name, d_in, d_out in SCT_MATRICES
    ]


def llama_shapes(d_model: int, d_ffn: int, layers: int, kv_width: int) -> dict[str, Shape]:
    """The hidden matrices of a LLaMA stack by name; kv_width is d_model, or smaller with grouped keys and values."""
    block = {
        "q": (d_model, d_model),
        "k": (d_model, kv_width),
        "v": (d_model, kv_width),
        "o": (d_model, d_model),
        "gate": (d_model, d_ffn),
        "up": (d_model, d_ffn),
        "down": (d_ffn, d_model),
    }
    return {f"{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}

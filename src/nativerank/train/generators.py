"""The random number generators that a model's dropout may draw from: the CPU's, and its CUDA device's."""

import torch
from torch import Tensor, nn

PREFIX = "rng/"
RNG, CUDA_RNG = PREFIX + "torch", PREFIX + "cuda"


def random_state(model: nn.Module) -> dict[str, Tensor]:
    """Their states, by name."""
    device = next(model.parameters()).device
    cuda = {CUDA_RNG: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {RNG: torch.get_rng_state()} | cuda


def set_random_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse; what the model's device has no generator for is left out."""
    device = next(model.parameters()).device
    torch.set_rng_state(state[RNG])
    if CUDA_RNG in state and device.type == "cuda":
        torch.cuda.set_rng_state(state[CUDA_RNG], device)

"""What the factors look like while they train, from r x r problems: W is never formed.

Per probed pair W = A B^T: sigma_A, sigma_B (spectral norms of the factors), sigma_W, and the stable rank of W. A few
layers tell the story; the probe takes the first, middle and last pair of the model unless named otherwise.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nativerank.linalg.norms import spectral_norm
from nativerank.linalg.spectrum import product_spectrum, stable_rank
from nativerank.optim.roles import factor_modules


def probed_names(model: nn.Module) -> list[str]:
    """First, middle and last factorized module, or fewer."""
    names = [name for name, _ in factor_modules(model)]
    return list(dict.fromkeys(names[i] for i in (0, len(names) // 2, -1))) if names else []


@torch.no_grad()
def probe(model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """{module: {sigma_A, sigma_B, sigma_W, stable_rank}}; of a stack of experts the largest value."""
    found = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        A, B = layer.factors()
        spectrum = product_spectrum(A, B)
        values = {
            "sigma_A": spectral_norm(A),
            "sigma_B": spectral_norm(B),
            "sigma_W": spectrum[..., 0],
            "stable_rank": stable_rank(spectrum),
        }
        found[name] = {key: value.max().item() for key, value in values.items()}
    return found

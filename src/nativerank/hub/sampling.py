"""The next token from logits: greedy, or drawn with temperature, top-k and top-p.

    p = softmax(kept(logits) / T),   next = argmax_i p_i / q_i,   q_i ~ Exp(1)

argmax p / q is a draw from p (exponential races), and how `torch.multinomial` draws one number. Written out here, every
sequence of a batch has a generator of its own, so what is drawn for a prompt depends on its seed alone and not on the
prompts beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a text is continued.

    Attributes:
        max_new_tokens: at most this many, and no more than the model's context has room for.
        temperature: 0 takes the likeliest token each time.
        top_k: draw among this many tokens, 0 for all.
        top_p: draw among the likeliest tokens that together have this probability, in (0, 1]; 1 for all.
        seed: equal seeds give equal text on one machine.

    Raises:
        ValueError: a number out of range.
    """

    max_new_tokens: int = 60
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:  # NaN too
            raise ValueError(f"temperature must be >= 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit 64 bits, got {self.seed}")

    def check_num(self, num: int) -> None:
        """Raises a ValueError unless so many texts of a prompt can be made, and differ."""
        if num < 1:
            raise ValueError(f"num must be >= 1, got {num}")
        if num > 1 and not self.temperature:
            raise ValueError(f"temperature 0 gives one text per prompt, so num must be 1, got {num}")

    def filters(self) -> list[Any]:
        """Transformers' processors for temperature, top-k and top-p, as many as are needed."""
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        found: list[Any] = []
        if self.temperature not in (0, 1):
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(float(self.top_p)))
        return found


class Chooser:
    """A logits processor after which the largest score is the next token of each sequence.

    Args:
        sampling: the numbers.
        seeds: one for each sequence of the batch; unused where greedy.
        device: of the logits.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device):
        self.greedy, self.filters = not sampling.temperature, sampling.filters()
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(batch, vocabulary) logits -> scores to take the largest of.

        Raises:
            ValueError: logits that are NaN or infinite.
        """
        largest = scores.amax(-1, keepdim=True)
        if not bool(largest.isfinite().all()):
            raise ValueError("the model's logits are not finite, so no token can be chosen")
        if self.greedy:
            return scores
        scores = scores - largest  # at a tiny temperature they would overflow
        for keep in self.filters:
            scores = keep(input_ids, scores)
        p = scores.softmax(-1)
        q = torch.stack(
            [torch.empty_like(row).exponential_(generator=g) for row, g in zip(p, self.generators, strict=True)]
        )
        return p / q

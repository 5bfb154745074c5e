"""FLOPs of Spectron's algebra per step, beside those of forward and backward per token.

    orthogonalize a (d, r) factor    gram   4 d r^2 + (4 k - 3) 2 r^3      k Newton-Schulz steps in r x r
                                     plain  k (4 d r^2 + 2 r^3)            the same on the tall matrix, as published
    norm of a factor                 6 d r                                 one power iteration

The algebra costs the same for every number of tokens, so its share falls as 1 / tokens_per_step. Momentum and update
are elementwise and left out, on both sides.
"""

import math
from collections import Counter
from typing import Any

from torch import nn

from nativerank.accounting.flops import flops_per_token
from nativerank.layers.base import factor_layers
from nativerank.linalg.norms import power_iteration_flops
from nativerank.linalg.orthogonalize import orthogonalize_flops

SHARES_AT = (8_192, 65_536, 524_288, 1_048_576)  # tokens per step


def algebra_flops(model: nn.Module, context: int, steps: int = 5) -> dict[str, Any]:
    """Totals in both forms, their share of forward and backward, and where it falls below 1%.

    Args:
        model: factorized Hugging Face causal language model, on any device.
        context: tokens that a query attends to.
        steps: Newton-Schulz steps.

    Returns:
        `factors` by shape, `per_step` and `one_percent_tokens` per form. "matrices" counts the factor layers' own
        forward and backward alone, "all" adds attention and the head.
    """
    rows = factor_rows(model, steps)
    per_step = {form: sum(row["count"] * (row[form] + row["norm"]) for row in rows) for form in ("gram", "plain")}
    flops = flops_per_token(model, context)
    per_token = {"matrices": flops.training * flops.matrices / flops.forward, "all": flops.training}
    return {
        "steps": steps,
        "factors": rows,
        "per_step": per_step,
        "forward_backward_per_token": per_token,
        "one_percent_tokens": {
            form: {part: round(100 * total / cost) for part, cost in per_token.items()}
            for form, total in per_step.items()
        },
        "share_of_matrices": [
            {"tokens_per_step": n, **{form: total / (n * per_token["matrices"]) for form, total in per_step.items()}}
            for n in SHARES_AT
        ],
    }


def factor_rows(model: nn.Module, steps: int) -> list[dict[str, int]]:
    """FLOPs to orthogonalize one factor of each shape (d, r) in both forms, and to estimate its norm."""
    shapes: Counter[tuple[int, int]] = Counter()
    for layer in factor_layers(model).values():
        for *stack, d, r in (X.shape for X in layer.factors() if X.ndim > 1):
            shapes[d, r] += math.prod(stack)
    return [
        {
            "d": d,
            "r": r,
            "count": count,
            "gram": orthogonalize_flops(d, r, steps),
            "plain": orthogonalize_flops(d, r, steps, plain=True),
            "norm": power_iteration_flops(d, r),
        }
        for (d, r), count in sorted(shapes.items())
    ]

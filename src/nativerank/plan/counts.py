"""Parameters and FLOPs of a plan, in both conventions.

    exact   2 per multiply-add, rank-aware, attention (full, though causal) and head included, backward twice forward
    6ND     6 x parameters without embedding and head x tokens

What the backward pass makes again and what the optimizer does are counted beside them, in neither.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nativerank.accounting.flops import BACKWARD, flops_per_token, guided_share, recomputed_flops, six_nd
from nativerank.accounting.rule_flops import optimizer_flops
from nativerank.methods import find_method
from nativerank.models import count_parameters
from nativerank.plan.subject import Subject


def with_guides(planned: Subject) -> float:
    """Share of a run's passes that compute guides; 1 where there are none."""
    guide = planned.config.guide
    return guided_share(guide.share, guide.stochastic) if find_method(planned.config.method or "").guided else 1.0


def count_flops(planned: Subject, model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """FLOPs per token, per optimizer step and of the run, of all processes together.

    Args:
        model: whole or in shards, on the meta device.
        groups: of its optimizer.
    """
    guided = with_guides(planned)
    flops = flops_per_token(model, planned.context, guided)
    nd = six_nd(count_parameters(model)["non_embedding"])
    again = recomputed_flops(model, planned.context, planned.config.train.recompute, guided)
    rules = optimizer_flops(groups)
    step, tokens = sum(rules.values()), planned.tokens_per_step * planned.steps
    return {
        "per_token": {
            "exact": flops.training,
            "6nd": nd,
            "forward": flops.forward,
            "backward": BACKWARD * flops.forward,
            "recomputed": again,
            "of_forward": {"matrices": flops.matrices, "attention": flops.attention, "head": flops.head},
        },
        "optimizer_per_step": step,
        "optimizer_by_rule": rules,
        "per_step": {"exact": flops.training * planned.tokens_per_step, "6nd": nd * planned.tokens_per_step},
        "run": {
            "exact": flops.training * tokens,
            "6nd": nd * tokens,
            "recomputed": again * tokens,
            "optimizer": step * planned.steps,
        },
    }

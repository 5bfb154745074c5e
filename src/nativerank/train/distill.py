"""Training towards a teacher's predictions as well as towards the text (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

    loss = (1 - weight) CE + weight T^2 KL(p || q),     p = softmax(z_p / T),   q = softmax(z_q / T)

z_p (tokens, vocabulary) are the logits of the teacher, z_q those of the model; both terms are means over tokens, in
float32 at least. T^2 keeps the gradient of the second term, T (q - p), at the size that it has at T = 1.

Cost: the teacher's forward pass at every step, its weights (in every process, and in float32), and its logits until the
model's forward pass is over. The divergence and its gradient are computed together in slices of tokens, so that besides
both logits only that gradient is held, in the precision of the model's logits.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nativerank.evaluate.loss import next_token_logits, token_losses_of

SLICE_NUMBERS = 1 << 22  # of the logits of one slice


class Objective(NamedTuple):
    """Means over the tokens of a batch.

    Attributes:
        loss: what is differentiated.
        cross_entropy: nats per token of the text, detached; what is reported as `loss`, with a teacher or without.
        distill_loss: T^2 KL(p || q) in nats per token, detached; None without a teacher.
    """

    loss: Tensor
    cross_entropy: Tensor
    distill_loss: Tensor | None


@dataclass
class Teacher:
    """A frozen model, and how much it counts.

    Args:
        model: causal LM in evaluation mode on the device of training.
        weight: of its term, in [0, 1]. temperature: T > 0.
        fingerprint: tells its weights from others.
    """

    model: nn.Module
    weight: float
    temperature: float
    fingerprint: str = ""

    def objective(self, model: nn.Module, inputs: Tensor, targets: Tensor, positions: Tensor | None) -> Objective:
        """The loss of a batch; arguments as of `mean_loss`."""
        with torch.no_grad():
            taught = next_token_logits(self.model, inputs, positions)
        logits = next_token_logits(model, inputs, positions)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight < 1):
            cross_entropy = token_losses_of(logits, targets).mean()
        divergence = divergences(logits.flatten(0, 1), taught.flatten(0, 1), self.temperature).mean()
        loss = self.weight * divergence if self.weight == 1 else cross_entropy.lerp(divergence, self.weight)
        return Objective(loss, cross_entropy.detach(), divergence.detach())


def divergences(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p || q) of each token, (tokens,), in float32 at least; differentiable in `logits`.

    Args:
        logits: of the model, (tokens, vocabulary). taught: of the teacher, the same shape.
        temperature: T > 0.
    """
    found: Tensor = _Divergence.apply(logits, taught, temperature)
    return found


class _Divergence(torch.autograd.Function):
    """The gradient T (q - p) is made on the way forward, where p and q are at hand."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses, gradient = torch.empty(len(logits), dtype=wide, device=logits.device), torch.empty_like(logits)
        size = max(1, SLICE_NUMBERS // logits.shape[1])
        for begin in range(0, len(logits), size):
            rows = slice(begin, begin + size)
            log_q = (logits[rows].to(wide) / temperature).log_softmax(-1)
            log_p = (taught[rows].to(wide) / temperature).log_softmax(-1)
            p = log_p.exp()
            apart = (p * (log_p - log_q)).masked_fill_(p == 0, 0.0)  # a masked word of the teacher: 0 log 0 = 0
            losses[rows] = temperature**2 * apart.sum(-1)
            gradient[rows] = (temperature * (log_q.exp() - p)).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[:, None].to(gradient.dtype) * gradient, None, None

"""How well a model predicts text: nats per token, perplexity, bits per byte, and what a compressor needs.

    bits per byte = total nats / (ln 2 * UTF-8 bytes)

does not depend on the tokenizer, so it can stand beside `xz -9` on the same text. Every token of a split but its
first (an end-of-text id) is predicted exactly once, from at most `context` tokens before it in its own window. Windows
lie side by side, as in training, or overlap: with a smaller stride a token has more before it, at context / stride
times the cost.
"""

import lzma
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nativerank.data.loader import document_positions, sequential_batches
from nativerank.data.shards import Split
from nativerank.distributed.agree import totals
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.wrap import evaluating
from nativerank.evaluate.head_loss import IGNORED, head_gives_mean_loss, head_gives_token_losses, takes_chunks
from nativerank.layers.shared import bf16_products
from nativerank.models import check_predicts_next_token


@dataclass(frozen=True)
class Loss:
    """Summed negative log likelihood over `tokens` predictions of text that is `text_bytes` long in UTF-8."""

    total_nats: float
    tokens: int
    text_bytes: float

    @property
    def nats(self) -> float:
        """Nats per token."""
        return self.total_nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats) if self.nats < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the text."""
        return self.total_nats / math.log(2) / self.text_bytes


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 autocast on CUDA; nothing elsewhere (bf16 products are slower than fp32 on most CPUs)."""
    return bf16_products("cuda") if device.type == "cuda" else nullcontext()


def mean_loss(
    model: nn.Module, inputs: Tensor, targets: Tensor, positions: Tensor | None = None, chunked: bool = True
) -> Tensor:
    """Mean negative log likelihood of the targets, a scalar in float32 at least, to be differentiated once.

    Args:
        model: causal LM whose forward returns `.logits`.
        inputs, targets: (batch, context) token ids. Targets of -100 count for nothing, as for `F.cross_entropy`: the
            mean is over the others, `token_losses` is 0 there. Other negative ids are an error.
        positions: (batch, context) position ids that restart at each document; None lets attention cross documents.
        chunked: never hold the logits of all tokens, where the model allows it (`head_loss.takes_chunks`).
    """
    if not (chunked and takes_chunks(model)):
        losses = token_losses_of(next_token_logits(model, inputs, positions), targets)
        return losses.sum() / (targets != IGNORED).sum()
    with head_gives_mean_loss(model, targets):
        return next_token_logits(model, inputs, positions)


def token_losses(model: nn.Module, inputs: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
    """Negative log likelihood (batch, context), in float32 at least, of each target given the inputs up to it.

    Arguments as of `mean_loss`. Where gradients are on it holds the logits of all tokens.
    """
    if torch.is_grad_enabled() or not takes_chunks(model):
        return token_losses_of(next_token_logits(model, inputs, positions), targets)
    with head_gives_token_losses(model, targets):
        return next_token_logits(model, inputs, positions)


def next_token_logits(model: nn.Module, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits (batch, context, vocabulary) of what follows each token; arguments as of `mean_loss`."""
    extra: dict[str, Any] = {} if positions is None else {"position_ids": positions}
    logits: Tensor = model(input_ids=inputs, use_cache=False, **extra).logits
    return logits


def token_losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """What `token_losses` returns, from logits (batch, context, vocabulary)."""
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(wide, targets.flatten(), reduction="none")
    return flat.view_as(targets)


def check_loss(model: nn.Module, kind: str) -> None:
    """Asks the model whether its loss can be chunked, before anything is compiled.

    Args:
        kind: "auto", "chunked" or "whole", as in TrainConfig.

    Raises:
        ValueError: it has to be, and cannot.
    """
    if not takes_chunks(model) and kind == "chunked":
        config: Any = model.config
        raise ValueError(f"train.loss chunked: {config.model_type} models change what their head made; use auto")


@torch.no_grad()
def check_document_mask(model: nn.Module) -> None:
    """Raises a ValueError unless position ids that restart keep the model's attention inside documents.

    Most architectures of transformers do this, some ignore position ids; asked is the model itself, not a list.
    """
    hf: Any = model
    device = next(model.parameters()).device
    tokens = torch.arange(6, device=device).remainder(hf.get_input_embeddings().num_embeddings)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    with evaluating(model):
        packed = hf(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 3:]
        alone = hf(input_ids=tokens[:, 3:], use_cache=False).logits
    if not torch.allclose(packed, alone, rtol=1e-3, atol=1e-4):
        raise ValueError(f"data.document_mask: {hf.config.model_type} models do not keep documents in a window apart")


@torch.no_grad()
def check_predictions(model: nn.Module, label: str) -> None:
    """Raises a ValueError for a model that sees the token it is to predict, or answers NaN.

    The loss or the accuracy of either would look like a number. Asked is the model itself: a language model head on
    an encoder that looks both ways is of a class that generates.
    """
    check_predicts_next_token(model, label)
    hf: Any = model
    device = next(model.parameters()).device
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=device)  # alike but for the last
    with evaluating(model):
        logits = hf(input_ids=tokens.remainder(hf.get_input_embeddings().num_embeddings), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise ValueError(f"the logits of {label} are not finite numbers: it diverged or is damaged")
    if not torch.allclose(logits[0, :3], logits[1, :3], rtol=1e-3, atol=1e-4):
        raise ValueError(f"{label} holds a {type(model).__name__}, which sees the token that it is to predict")


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    split: Split,
    context: int,
    batch_size: int,
    *,
    stride: int | None = None,
    full_last: bool = False,
    max_tokens: int | None = None,
    mask_eot: int | None = None,
    between: Callable[[], None] = lambda: None,
    grid: Grid = SINGLE,
) -> Loss:
    """The model's loss on a split, or on a fixed evenly spread part of it.

    Args:
        model: left in the mode (train or eval) it was in.
        split: of a prepared data folder.
        context: window length in tokens. batch_size: windows at once.
        stride: by how much a window begins later than the one before it (`sequential_batches`); None: by its length.
        full_last: the last window begins earlier rather than being shorter.
        max_tokens: about how many tokens to predict; None for all.
        mask_eot: end-of-text id at which attention restarts, or None.
        between: called before each batch; what it raises ends the validation.
        grid: of the processes that share the work, all of which call this, each with the model.

    Raises:
        ValueError: a split without a token to predict.
    """
    batches = sequential_batches(split, context, batch_size, max_tokens, grid.rank, grid.world, stride, full_last)
    device = next(model.parameters()).device
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    with evaluating(model):
        for inputs, targets, valid in batches:
            between()
            positions = None if mask_eot is None else torch.from_numpy(document_positions(inputs, mask_eot)).to(device)
            with autocast(device):
                losses = token_losses(
                    model, torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), positions
                )
            mask = torch.from_numpy(valid)
            total += losses.cpu().double()[mask].sum()
            tokens += int(mask.sum())
    nats, count = totals([total, tokens], grid, torch.device("cpu"))
    tokens = round(count)
    return Loss(nats, tokens, split.text_bytes * tokens / max(split.tokens - 1, 1))


def xz_bits_per_byte(text: bytes) -> float:
    """What `xz -9` needs for the text, in bits per byte."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)

"""Cross entropy of the next token without the logits of all tokens at once.

    z = x W^T + b,   loss = mean over tokens of  log sum exp(z) - z[target]
    dz = softmax(z) - onehot(target),   dx = dz W,   dW = dz^T x,   db = sum of dz

x (tokens, d_model) is what the output head is given, W (vocabulary, d_model) its weight. Logits are made for a chunk of
tokens, turned into dz where they lie, and used up before the next chunk. So the gradient is made on the way forward,
the head's three products run once each, and dx and dW are what waits for the backward pass, instead of the logits of
all tokens and their log softmax. Products are made in the precision of autocast, softmax and the sum dW in float32 at
least. Targets of IGNORED count for nothing, as for `F.cross_entropy`.

All of this happens inside the model's own forward pass: for one call the head's `forward` gives the loss instead of
logits, so whatever gathers its weight (FSDP2) or waits for its gradient (DDP, layer-wise updates) does so as ever. A
model that does something to its logits after the head (soft caps, scales, masks) is found out by asking it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nativerank.distributed.wrap import evaluating
from nativerank.layers.shared import HOOKS, autocast_dtype

# Tokens of a chunk. On a CPU as few as leave the head's products at full speed (dW is read and written once a chunk):
# from 256 to 1024 they are about equally fast (`nativerank bench loss`). A GPU's products outrun its memory by more, so
# it takes more; not measured.
CHUNK_TOKENS = {"cpu": 256}
CHUNK_TOKENS_OF_GPUS = 2048
ASKED_TOKENS = 2
IGNORED = -100  # the target of a token whose loss is not wanted
PANEL_ROWS = 4096  # of the vocabulary, in sums of narrow products
_asked: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def chunk_tokens(tokens: int, device: torch.device) -> int:
    """Tokens of one chunk, so that chunks are about equal."""
    most = CHUNK_TOKENS.get(device.type, CHUNK_TOKENS_OF_GPUS)
    return -(-tokens // -(-tokens // most))


def inner(model: nn.Module) -> Any:
    """The Hugging Face model that DistributedDataParallel may have been put around."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The output head, if it is a linear map and nothing else has a hand in it (quantization, adapters, hooks)."""
    hf = inner(model)
    head = hf.get_output_embeddings() if hasattr(hf, "get_output_embeddings") else None
    if type(head) is not nn.Linear or "forward" in vars(head) or any(getattr(head, hooks) for hooks in HOOKS):
        return None
    return head


def takes_chunks(model: nn.Module) -> bool:
    """Whether the logits that a causal LM returns are what its output head made of each token, and nothing else.

    Asked is the model itself, once, by a forward pass over ASKED_TOKENS tokens in which the head returns a tensor that
    is looked for in the output. The answer is kept: what changes logits has to be there before. On many processes all
    of them ask.
    """
    if plain_head(model) is None:
        return False
    hf = inner(model)
    if hf not in _asked:
        with evaluating(hf), torch.inference_mode(False), torch.no_grad(), leaving_no_trace(hf):
            _asked[hf] = _returns_what_the_head_made(hf)
    return _asked[hf]


@contextmanager
def leaving_no_trace(hf: nn.Module) -> Iterator[None]:
    """Compiled blocks are not compiled for this pass, and no cast weight of it is in autocast's cache for the next.

    Blocks compiled for a second size become dynamic; a pass that finds casts made differs from its recomputation.
    """
    kind = next(hf.parameters()).device.type
    enabled = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if enabled else None
    with torch.compiler.set_stance("force_eager"), torch.autocast(kind, dtype, enabled, cache_enabled=False):
        yield


def _returns_what_the_head_made(hf: Any) -> bool:
    head = plain_head(hf)
    assert head is not None
    made: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        made.append(torch.zeros(*x.shape[:-1], head.out_features, device=x.device))  # float32: nobody widens it
        return made[-1]

    ids = torch.zeros(1, ASKED_TOKENS, dtype=torch.long, device=head.weight.device)
    with replaced(head, forward):
        logits = hf(input_ids=ids, use_cache=False).logits
    if len(made) != 1 or made[0].shape != (1, ASKED_TOKENS, head.out_features) or logits.shape != made[0].shape:
        return False
    same_place = logits.untyped_storage()._cdata == made[0].untyped_storage()._cdata
    return same_place and made[0]._version == 0  # nobody wrote into it


@contextmanager
def replaced(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The head does something else for the block."""
    head.forward = forward  # type: ignore
    try:
        yield
    finally:
        del head.forward


@contextmanager
def head_gives_mean_loss(model: nn.Module, targets: Tensor) -> Iterator[None]:
    """In the block `model(...).logits` is the mean loss, a scalar in float32 at least, to be differentiated once.

    Args:
        model: of which `takes_chunks` is true. targets: (batch, context) token ids.
    """
    head = plain_head(model)
    assert head is not None

    def forward(x: Tensor) -> Tensor:
        size = chunk_tokens(targets.numel(), x.device)
        return chunked_mean_loss(x.flatten(0, -2), head.weight, head.bias, targets.flatten(), size)

    with replaced(head, forward):
        yield


@contextmanager
def head_gives_token_losses(model: nn.Module, targets: Tensor) -> Iterator[None]:
    """In the block `model(...).logits` are the losses (batch, context), in float32 at least, without gradients.

    Args:
        model: of which `takes_chunks` is true. targets: (batch, context) token ids.
    """
    head = plain_head(model)
    assert head is not None

    def forward(x: Tensor) -> Tensor:
        size = chunk_tokens(targets.numel(), x.device)
        slices = zip(x.flatten(0, -2).split(size), targets.flatten().split(size), strict=True)
        losses = []
        for rows, picked in slices:
            z = F.linear(rows, head.weight, head.bias)
            losses.append(F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), picked, reduction="none"))
        return torch.cat(losses).view_as(targets)

    with torch.no_grad(), replaced(head, forward):
        yield


def chunked_mean_loss(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, size: int) -> Tensor:
    """The mean loss, a scalar in float32 at least, to be differentiated once.

    Args:
        x: (tokens, d_model). weight: (vocabulary, d_model). bias: (vocabulary,) or None. targets: (tokens,) ids.
        size: tokens of a chunk.
    """
    loss: Tensor = _MeanLoss.apply(x, weight, bias, targets, size)
    return loss


class _MeanLoss(torch.autograd.Function):
    """Its gradients are made on the way forward, and handed out by the first backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, size: int) -> Tensor:
        dtype = autocast_dtype(x) or weight.dtype
        low_bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            loss, *made = _loss_and_gradients(
                x.to(dtype), weight.to(dtype), low_bias, targets, size, ctx.needs_input_grad
            )
        wanted = zip(made, (x, weight, bias), strict=True)
        ctx.made = [None if g is None or t is None else (_narrower(g, t.dtype), t.dtype) for g, t in wanted]
        ctx.tokens = (targets != IGNORED).sum()
        return loss / ctx.tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        made, ctx.made = ctx.made, None
        assert made is not None, "a chunked loss is differentiated once"
        share = upstream / ctx.tokens
        return *(None if one is None else one[0].to(one[1]).mul_(share) for one in made), None, None


def _narrower(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """What waits for the backward pass: of this dtype, unless it takes less as it is."""
    return gradient.to(dtype) if dtype.itemsize <= gradient.dtype.itemsize else gradient


def _loss_and_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, size: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Sums over tokens of the loss, and of its gradients in x, weight and bias as far as they are wanted."""
    wide = torch.promote_types(x.dtype, torch.float32)
    summed = wide if size < len(x) else x.dtype  # a single chunk needs no sum: dW is no wider than a product
    loss = torch.zeros((), dtype=wide, device=x.device)
    dx = torch.empty_like(x) if wanted[0] else None
    dw = None
    db = torch.zeros(len(weight), dtype=wide, device=x.device) if bias is not None and wanted[2] else None
    buffer = x.new_empty(size, len(weight))
    for begin in range(0, len(x), size):
        rows, picked = x[begin : begin + size], targets[begin : begin + size, None]
        low = torch.mm(rows, weight.mT, out=buffer[: len(rows)])
        z = (low if bias is None else low.add_(bias)).to(wide)
        loss += _loss_to_gradient(z, picked)
        if db is not None:
            db += z.sum(0)
        dz = z if z is low else low.copy_(z)
        del z
        if dx is not None:
            torch.mm(dz, weight, out=dx[begin : begin + size])
        if wanted[1] and dw is None:
            dw = first_product(dz.mT, rows, summed)
        elif dw is not None:
            add_product(dw, dz.mT, rows)
    return loss, dx, dw, db


def _loss_to_gradient(z: Tensor, picked: Tensor) -> Tensor:
    """The summed loss of logits z (tokens, vocabulary), which become softmax(z) - onehot(picked) where they lie.

    Where `picked` is IGNORED both are 0.
    """
    ignored = picked == IGNORED
    picked = picked.masked_fill(ignored, 0)
    z.sub_(z.amax(1, keepdim=True))
    right = z.gather(1, picked)
    total = z.exp_().sum(1, keepdim=True)
    losses = (total.log() - right).masked_fill_(ignored, 0.0)
    z.div_(total.masked_fill_(ignored, torch.inf)).scatter_add_(1, picked, ignored.to(z.dtype) - 1)
    return losses.sum()


def first_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in this dtype."""
    if dtype == left.dtype:
        return left @ right
    total = torch.zeros(len(left), right.shape[1], dtype=dtype, device=left.device)
    add_product(total, left, right)
    return total


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, the sum in total's precision; of a narrow product never more than PANEL_ROWS rows."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for rows, part in zip(total.split(PANEL_ROWS), left.split(PANEL_ROWS), strict=True):
        rows += part @ right

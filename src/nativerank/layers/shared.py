"""Factor layers that read one input: their `down` products as one.

    H = x [B_1, ..., B_k] = [h_1, ..., h_k]          x (n, d_in), H (n, r_1 + ... + r_k)
    dx = D [B_1, ..., B_k]^T,   [dB_1, ..., dB_k] = x^T D,   D = [dh_1, ..., dh_k]

q, k and v of attention read the same tensor, and so do gate and up of an MLP. As separate products each makes a
gradient of x of its own, (n, d_in), and autograd adds them up; as one product there is one. The FLOPs are the same;
what is saved is memory traffic, calls and, under autocast, all casts of x but one. Parameters stay apart: they are
joined for the time of a product, r d_in numbers beside n d_in of x.

Which layers share an input is found by asking the model (`layers.reads`). Whoever
of them is called first makes the product of all, and each of the others takes its part if it is called with that very
tensor, unchanged. Parts wait on the tensor itself, so none outlives it. Readers in two repeated blocks (cross attention
on the output of an encoder) are two groups, since each block may be run again by itself in the backward pass.

For itself computes a layer whose `down` is not a plain `nn.Linear` (adapters, float8, quantized or sharded weights),
has hooks of its own or does not narrow; and so do all where x is a leaf that wants a gradient, which parts that wait on
it would keep for ever; in compiled blocks whose own input x is (q, k and v without a norm before them), where a region
that is run again may not leave anything; and in evaluation mode or without gradients: in validation little is gained,
and for a single token joining weights takes longer than using them.

The joint matrix is seen by the rule for activations (`train.recompute`) as any other while it narrows. A wider one goes
through an operator of its own name, `nativerank::joint_product`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from nativerank.layers.reads import reads_of, same_inputs, version

WAITING = "_parts_for_its_other_readers"  # attribute of a tensor
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# x (..., d_in) times (r, d_in), r >= d_in: a product by another name. `custom_op` would take longer for each call.
LIBRARY = torch.library.Library("nativerank", "FRAGMENT")
LIBRARY.define("joint_product(Tensor x, Tensor weight) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.impl("joint_product", linear, "CompositeExplicitAutograd")
joint_product = torch.ops.nativerank.joint_product


@torch.library.register_fake("nativerank::joint_product", lib=LIBRARY)
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_flop_formula(torch.ops.nativerank.joint_product)
def _joint_flops(x: torch.Size, weight: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """2 n d_in r."""
    return 2 * x.numel() * weight[0]


class JointProduct(torch.autograd.Function):
    """x (..., d_in) times several (r_i, d_in): (..., r_i) each, views of one tensor. Not differentiable twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype | None, *weights: Tensor) -> tuple[Tensor, ...]:
        """dtype: to compute in, for autocast; None for that of the arguments."""
        # An alias: else x would keep the parts that wait with it, which would keep x.
        read = x.detach() if dtype is None else x.detach().to(dtype)
        ctx.save_for_backward(read, *weights)
        ctx.set_materialize_grads(False)  # a part that nobody used has no gradient
        ctx.x_dtype = x.dtype
        weight = joined(weights, read.dtype if dtype else None)
        H = (linear if len(weight) < x.shape[-1] else joint_product)(read, weight)
        return H.split([len(w) for w in weights], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        used = [i for i, grad in enumerate(grads) if grad is not None]
        found: list[Tensor | None] = [None] * (2 + len(weights))
        if not used:
            return tuple(found)
        D = torch.cat([grad.reshape(-1, grad.shape[-1]) for grad in grads if grad is not None], dim=-1)
        if ctx.needs_input_grad[0]:
            found[0] = (D @ joined([weights[i] for i in used], D.dtype)).view(x.shape).to(ctx.x_dtype)
        if any(ctx.needs_input_grad[2 + i] for i in used):
            dW = D.mT @ x.reshape(-1, x.shape[-1])  # (sum of r_i, d_in)
            for i, part in zip(used, dW.split([len(weights[i]) for i in used]), strict=True):
                found[2 + i] = part.to(weights[i].dtype) if ctx.needs_input_grad[2 + i] else None
        return tuple(found)


def joined(weights: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    """The matrices (r_i, d_in) below each other, in another dtype if one is given."""
    return torch.cat([w if dtype is None else w.to(dtype) for w in weights])


class SharedInput:
    """A few factor layers that read the same tensor in every forward pass.

    A copy or a pickle of it is None: a copied model computes plainly until `join_products` is called for it.

    Args:
        layers: in the order in which the model calls them; each learns its place. None stands for one that has left.
        of_block: whether the tensor is given to their repeated block, and not made there.
    """

    def __init__(self, layers: Sequence[nn.Module], of_block: bool = False):
        self.layers: list[Any] = list(layers)
        self.of_block = of_block
        for place, layer in enumerate(self.layers):
            layer.shared, layer.place = self, place

    def __reduce__(self) -> tuple[Any, ...]:
        return nothing, ()

    def leave(self, place: int) -> None:
        """Forgets a layer."""
        self.layers[place].shared = None
        self.layers[place] = None

    def product(self, layer: Any, x: Tensor) -> Tensor:
        """B^T x (..., r) of a member, together with those of the others if it is the first one to ask."""
        member = self.layers[layer.place] is layer  # which DataParallel's replicas are not
        if not (member and layer.training and torch.is_grad_enabled()):
            plain: Tensor = layer.down(x)
            return plain
        if self._keeps(x):
            plain = layer.down(x)
            return plain
        h = self._take(layer, x)
        return self._make(layer, x) if h is None else h

    def _keeps(self, x: Tensor) -> bool:
        """Whether what is left with a tensor could stay there."""
        return self.of_block if torch.compiler.is_compiling() else x.requires_grad and x.is_leaf

    def _take(self, layer: Any, x: Tensor) -> Tensor | None:
        """The part that waits, if it was made of x as it is now and of the weight as it is now."""
        made = getattr(x, WAITING, None)
        if made is None or made.group is not self or made.marks != marks(x):
            return None
        h, weight_version = made.parts.pop(layer.place, (None, 0))
        if not made.parts and not torch.compiler.is_compiling():
            delattr(x, WAITING)
        return h if h is None or weight_version == version(layer.down.weight) else None

    def _make(self, layer: Any, x: Tensor) -> Tensor:
        like = layer.down.weight
        places = [i for i, other in enumerate(self.layers) if other is not None and joinable(other.down, like)]
        if len(places) < 2 or layer.place not in places:
            plain: Tensor = layer.down(x)
            return plain
        weights = [self.layers[i].down.weight for i in places]
        parts = dict(zip(places, JointProduct.apply(x, autocast_dtype(x), *weights), strict=True))
        h: Tensor = parts.pop(layer.place)
        waiting = {i: (part, version(self.layers[i].down.weight)) for i, part in parts.items()}
        setattr(x, WAITING, Made(self, marks(x), waiting))
        return h


class Made(NamedTuple):
    """What the first reader of a tensor leaves with it for the others.

    Attributes:
        group: of the readers.
        marks: of the tensor, as it was read.
        parts: (h, version of its weight) by place.
    """

    group: SharedInput
    marks: tuple[Any, ...]
    parts: dict[int, tuple[Tensor, int]]


def nothing() -> None:
    """What copies get in the place of a `SharedInput`."""


def joinable(down: nn.Module, like: Tensor) -> bool:
    """Whether a module does nothing but multiply by a matrix of the same kind as `like`, unseen by anybody."""
    if type(down) is not nn.Linear or down.bias is not None or "forward" in down.__dict__:
        return False
    if any(len(getattr(down, hooks)) for hooks in HOOKS):
        return False
    weight = down.weight
    plain = type(weight) in (nn.Parameter, Tensor) or isinstance(weight, FakeTensor)  # not sharded, not quantized
    narrows = weight.shape[0] < weight.shape[1]
    return plain and narrows and weight.dtype == like.dtype and weight.device == like.device


def bf16_products(kind: str) -> torch.autocast:
    """Products in bfloat16 on this kind of device, with no cast weight kept for a second product.

    Every weight has one per pass, so a cache would save nothing; where blocks are made again it would hold copies of
    all their weights until the forward pass ends.
    """
    return torch.autocast(kind, torch.bfloat16, cache_enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of the arguments of a product; None if it leaves them alone."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else None


def marks(x: Tensor) -> tuple[Any, ...]:
    """What may not change between the first reader of a tensor and the last, besides the weights."""
    return version(x), autocast_dtype(x)


def join_products(model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[str, ...]]:
    """Lets factor layers that read one input compute their `down` products as one, in training.

    Outputs and gradients are the same up to the last digits, parameters and names stay. Call it before the model is
    wrapped (FSDP, DDP) or compiled, and again for a copy. In training mode these are errors from then on: gradients of
    gradients, `torch.func`, and a layer that is called on a tensor when the backward pass of another reader of that
    tensor is over.

    Args:
        model: factorized, changed in place.
        *args, **kwargs: of a forward pass as small as can be; none for a Hugging Face language model. It runs on
            fake tensors, and only if the model looks at numbers on the way, on the model itself.

    Returns:
        The names of the layers of each group.
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "shared")}
    for layer in layers.values():
        if layer.shared is not None:
            layer.shared.leave(layer.place)
    if len(layers) < 2:
        return []
    reads = reads_of(model, list(layers), args, kwargs)
    given = {read.name for read in reads if read.of_block}
    groups = same_inputs(reads)
    for group in groups:
        SharedInput([layers[name] for name in group], of_block=not given.isdisjoint(group))
    return groups

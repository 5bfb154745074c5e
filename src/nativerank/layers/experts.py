"""Factored stacks of expert weights for the mixture-of-experts families of transformers.

    y_e = W_e x,   W_e = A_e B_e^T,   up (E, d_out, r) = A,   down (E, r, d_in) = B^T

A transformers 5 experts module keeps all experts of a projection in one parameter (E, d_out, d_in) and asks an
"experts interface" for its forward function. We put a `LowRankExperts` in the place of each such parameter, register
a forward function that sends the tokens of each expert through both thin factors, and point the model's config at it.
Gate and activation stay the module's own (`_apply_gate`). W_e is never formed.

Cost per token: 2 r (d_in + d_out) for each expert it visits. Covered are gated, bias-free (E, d_out, d_in) layouts
(Mixtral, Qwen-MoE, DeepSeek, OLMoE, ...); the others are told to be excluded by name.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from nativerank.layers.base import Gemm, merge
from nativerank.layers.grouped import grouped_product, row_counts
from nativerank.layers.initialize import sampled_factors
from nativerank.layers.rank import check_rank
from nativerank.linalg.resize import Resized, Side, cropped, exchange, resized_pair
from nativerank.linalg.spectrum import product_spectrum

IMPLEMENTATION = "nativerank"  # our name in the experts interface
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
ACTIVE_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


class LowRankExperts(nn.Module):
    """One projection of all experts: tokens sorted by expert, (S, d_in) -> (S, d_out).

    Args:
        num_experts: E.
        d_in, d_out, rank: as in `LowRankLinear`, for every expert.
        active: experts that one token visits; the FLOPs per token follow from it.
        device, dtype: of the parameters.
    """

    kind = "lowrank"  # its key in factorize.KINDS, kept by saved models

    def __init__(
        self,
        num_experts: int,
        d_in: int,
        d_out: int,
        rank: int,
        active: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_rank(rank, d_in, d_out, type(self).__name__)
        self.num_experts, self.in_features, self.out_features, self.active = num_experts, d_in, d_out, active
        self.up = nn.Parameter(torch.empty(num_experts, d_out, rank, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(num_experts, rank, d_in, device=device, dtype=dtype))
        self.previous_implementation: str | None = None  # what the config said before we came
        if self.up.device.type != "meta":
            self.reset_parameters()

    @classmethod
    def replacing(cls, experts: nn.Module, projection: str, rank: int) -> Self:
        """An unfilled stack of this rank, shaped like the parameter `projection` of an experts module.

        That is left as it is.
        """
        weight = getattr(experts, projection)
        num_experts, d_out, d_in = weight.shape
        active = active_experts(experts)
        assert active is not None, "check_experts has passed"
        stack = cls(num_experts, d_in, d_out, rank, active, device="meta", dtype=weight.dtype)
        stack.to_empty(device=weight.device)
        return stack.requires_grad_(weight.requires_grad).train(experts.training)

    def restore(self) -> nn.Parameter:
        """The parameter (E, d_out, d_in) that was here before, merged."""
        return nn.Parameter(self.to_dense().detach(), requires_grad=self.up.requires_grad)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws each expert as `LowRankLinear` does."""
        for expert in range(self.num_experts):
            std = (3 * self.in_features) ** -0.5
            self.fill(*sampled_factors(self.in_features, self.out_features, self.rank, std), expert=expert)

    @torch.no_grad()
    def fill(self, A: Tensor, B: Tensor, expert: int) -> None:
        """Copies factors A (d_out, r) and B (d_in, r) of one expert into the parameters, in their dtype."""
        self.up[expert].copy_(A)
        self.down[expert].copy_(B.mT)

    @torch.no_grad()
    def resize(self, rank: int, generator: torch.Generator | None = None) -> list[Resized]:
        """Another rank for every expert, in place; generator as of `LowRankLinear.resize`."""
        check_rank(rank, self.in_features, self.out_features, type(self).__name__)
        return self._take(*resized_pair(*self.factors(), rank, generator)) if rank != self.rank else []

    @torch.no_grad()
    def reshape(self, rank: int) -> list[Resized]:
        """Parameters of another rank for numbers that are loaded next."""
        check_rank(rank, self.in_features, self.out_features, type(self).__name__)
        return self._take(*(cropped(X, rank) for X in self.factors())) if rank != self.rank else []

    def _take(self, up: Side, down: Side) -> list[Resized]:
        return [exchange(self.up, up), exchange(self.down, down, down=True)]

    @property
    def rank(self) -> int:
        """Inner dimension r."""
        return self.down.shape[1]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x (S, d_in) sorted by expert, offsets (E,): where each expert's rows end. Gives (S, d_out)."""
        h = grouped_linear(x, self.down, offsets)  # (S, r)
        return grouped_linear(h, self.up, offsets)  # (S, d_out)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The tall views (A, B) of shapes (E, d_out, r) and (E, d_in, r); they share memory with the parameters."""
        return self.up, self.down.mT

    def to_dense(self) -> Tensor:
        """W (E, d_out, d_in), merged in float64 one expert at a time."""
        return merge(*self.factors())

    def gemms(self) -> list[Gemm]:
        """Both matmuls, once for each expert that a token visits."""
        return [Gemm(self.in_features, self.rank, self.active), Gemm(self.rank, self.out_features, self.active)]

    def spectrum(self) -> Tensor:
        """The singular values of every W_e, (E, r), descending, in float64."""
        return product_spectrum(*self.factors())

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.in_features}, {self.out_features}, rank={self.rank}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled in a fresh process, the config already names our implementation: make sure it is known."""
        super().__setstate__(state)
        register_implementation()


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Row s of x (S, k) times weight[e]^T (k, n), where expert e owns rows offsets[e-1] : offsets[e]. Gives (S, n)."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # which knows neither grouped_mm nor our operator
        x, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weight))
    if x.is_cuda and kernel_fits(x, weight):
        return F.grouped_mm(x, weight.mT, offs=offsets)  # one kernel, no wait for the offsets
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):  # neither knows how many rows an expert has
        whole: Tensor = grouped_product(x, weight.mT, offsets)
        return whole
    # unbind and not weight[e]: its backward writes the stacked gradient once instead of E times.
    parts = zip(x.split(row_counts(offsets)), weight.unbind(), strict=True)
    return torch.cat([F.linear(part, w) for part, w in parts])


def kernel_fits(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped matmul takes these: a new enough torch and GPU, bfloat16, rows aligned to 16 bytes."""
    aligned = all(size % 8 == 0 for size in weight.shape[1:])
    new = hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return new and aligned and x.dtype == weight.dtype == torch.bfloat16


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What an experts module runs: (tokens, d) -> (tokens, d), each projection factored or still dense.

    Args:
        experts: the experts module of a transformers model.
        hidden_states: (tokens, d).
        top_k_index, top_k_weights: (tokens, k), the experts each token visits and their weights.
    """
    num_tokens, top_k = top_k_index.shape
    sorted_ids, order = torch.sort(top_k_index.reshape(-1), stable=True)  # (tokens k,)
    bounds = torch.arange(experts.num_experts, device=sorted_ids.device)
    offsets = torch.searchsorted(sorted_ids, bounds, right=True).to(torch.int32)  # (E,)
    x = hidden_states[order // top_k]  # (tokens k, d), sorted by expert
    h = experts._apply_gate(_project(experts.gate_up_proj, x, offsets))
    y = _project(experts.down_proj, h, offsets) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    # Back in token order and summed over k: deterministic, which index_add_ on CUDA is not.
    y = y[torch.argsort(order)].view(num_tokens, top_k, y.shape[-1]).sum(dim=1)
    return y.to(hidden_states.dtype)


def _project(projection: nn.Module | Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return grouped_linear(x, projection, offsets) if isinstance(projection, Tensor) else projection(x, offsets)


def register_implementation() -> None:
    """Makes transformers know our experts implementation by name; repeating it is harmless."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def expert_projections(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's stacked expert parameters, empty if it is no experts module."""
    names = tuple(p for p in PROJECTIONS if getattr(module._parameters.get(p), "ndim", 0) == 3)
    return names if "down_proj" in names and len(names) > 1 else ()


def active_experts(experts: Any) -> int | None:
    """How many experts a token visits, from the config of the experts module; None if it does not say."""
    found = (getattr(experts.config, key, None) for key in ACTIVE_KEYS)
    return next((value for value in found if isinstance(value, int)), None)


def check_experts(experts: Any, name: str) -> None:
    """Raises a ValueError unless our forward function computes what this experts module does."""
    config = getattr(experts, "config", None)
    reasons = {
        "is not driven by transformers' experts interface": not hasattr(config, "_experts_implementation"),
        "stores its weights transposed": getattr(experts, "is_transposed", False),
        "has biases": getattr(experts, "has_bias", False),
        "has no gate": not getattr(experts, "has_gate", True) or "gate_up_proj" not in expert_projections(experts),
        "has a norm after each expert": getattr(experts, "has_post_expert_norm", False),
        "is sharded over expert-parallel processes": getattr(experts, "_is_expert_parallel", False),
        "does not say how many experts a token visits": config is not None and active_experts(experts) is None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"{name} ({type(experts).__name__}) {reason}, so its expert weights cannot be factorized; "
                f"exclude them by name, for example exclude=['{name}.*']"
            )

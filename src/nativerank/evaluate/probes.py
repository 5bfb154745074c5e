"""What one step did to a few matrices, and what they look like after it. W = A B^T is never formed.

Of a layer with factors (the largest value of a stack of experts):
    update_norm     ||dW||_2 of the step as it was taken, weight decay included
    sigma_W, stable_rank                      ||W||_2 and ||W||_F^2 / ||W||_2^2
    sigma_A, sigma_B, gauge                   spectral norms of the factors, and sigma_A / sigma_B; A = U diag(s)
    orthonormality                            of U diag(s) V^T: the larger max |Q^T Q - 1| of U and V
    output_change   RMS over tokens and features of dy = dA (B'^T x) + A (dB^T x), x what the layer reads on a fixed
                    batch with the weights of before the step
    update_ratio    ||dW||_2 / lr, for rules that record rho: there lr is the bound eta on ||dW||_2, decay apart
and whatever else the rule recorded (rho, cap_factor). Of a dense matrix update_norm, sigma_W, stable_rank and
output_change, from W itself.

All in float64 but sigma_A, sigma_B. Cost per layer: thin products and QR of d x 2 r stacks, O((d_out + d_in) r^2), and
O(r^3); a dense matrix takes two Gram matrices of its short side d, 4 d^2 max(d_out, d_in) FLOPs, and their eigenvalues.
Besides, one forward pass of TOKENS tokens.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nativerank.data.shards import Split
from nativerank.distributed.agree import from_first
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.pieces import full
from nativerank.distributed.wrap import evaluating
from nativerank.evaluate.loss import autocast
from nativerank.layers import linear_modules
from nativerank.layers.base import factor_layers
from nativerank.layers.experts import grouped_linear
from nativerank.layers.patterns import Patterns, match_all
from nativerank.linalg.change import update_norm
from nativerank.linalg.gram import gram, to_float64
from nativerank.linalg.norms import spectral_norm
from nativerank.linalg.spectrum import product_spectrum, singular_values, stable_rank

TOKENS = 128  # of the fixed batch
Weights = tuple[Tensor, ...]  # (A, B) or (U, s, V), or (W,) of a dense matrix
Calls = list[tuple[Tensor, ...]]  # what a layer was called with: (x,), or (x, offsets) of a stack of experts


def probeable(model: nn.Module) -> dict[str, Callable[[], Weights]]:
    """Every matrix that can be probed: name -> its present factors, or its dense weight (..., d_out, d_in)."""
    factors = {name: layer.factors for name, layer in factor_layers(model).items()}
    dense = {name: matrix for matrix in linear_modules(model).values() for name in matrix.names}
    return factors | {name: lambda matrix=matrix: (matrix.weight,) for name, matrix in dense.items()}


def probed_names(model: nn.Module, patterns: Patterns = ()) -> list[str]:
    """The matrices matching one of the patterns; none given, first, middle and last factorized (or dense) one.

    Raises:
        ValueError: a pattern matches nothing.
    """
    if patterns:
        return list(dict.fromkeys(match_all(patterns, probeable(model), "train.probe")))
    names = list(factor_layers(model)) or list(linear_modules(model))
    return list(dict.fromkeys(names[i] for i in (0, len(names) // 2, -1))) if names else []


def fixed_batch(split: Split, context: int) -> Tensor:
    """The first tokens of a split, as one sequence (1, T)."""
    return torch.from_numpy(split.read(0, min(TOKENS, context, split.tokens)))[None]


@dataclass(frozen=True)
class Snapshot:
    """The probed weights before a step, and what their layers read then (nothing of a dense stack of experts)."""

    weights: dict[str, Weights]
    inputs: dict[str, Calls]


class Probe:
    """Looks at some matrices of a model before and after a step; leaves model and random state as they were.

    Args:
        model: a causal LM; compiled blocks run eagerly here.
        names: of matrices, as `probed_names` has them.
        ids: (batch, context) token ids of the fixed batch.
        grid: of the processes that hold the model, all of which call the methods: probed matrices are gathered whole.
    """

    def __init__(self, model: nn.Module, names: Collection[str], ids: Tensor, grid: Grid = SINGLE):
        known = probeable(model)
        self.model, self.ids, self.grid = model, ids.to(next(model.parameters()).device), grid
        self.weights = {name: known[name] for name in names}

    @torch.no_grad()
    def before(self) -> Snapshot:
        """Copies the weights and runs the fixed batch."""
        weights = {name: tuple(full(w.detach()).clone() for w in now()) for name, now in self.weights.items()}
        return Snapshot(weights, self._inputs() if weights else {})

    @torch.no_grad()
    def after(
        self, before: Snapshot, lr: float, records: Mapping[str, Mapping[str, float]]
    ) -> dict[str, dict[str, float]]:
        """{module: {figure: value}} of the step since `before`.

        Args:
            before: from `before()`.
            lr: of the matrices in this step.
            records: what the optimizer recorded of it; empty for a step that was refused.
        """
        weights = {name: tuple(full(w.detach()) for w in now()) for name, now in self.weights.items()}
        # Where the guard decides by them, no process may see another last digit.
        return from_first(self.grid, lambda: figures(before, weights, lr, records))

    def _inputs(self) -> dict[str, Calls]:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        calls: dict[str, Calls] = {name: [] for name in self.weights if name in modules}

        def recorder(name: str) -> Callable[..., None]:
            return lambda module, args: calls[name].append(tuple(a.clone() for a in args))

        with ExitStack() as stack:
            for name in calls:
                stack.enter_context(modules[name].register_forward_pre_hook(recorder(name)))
            stack.enter_context(evaluating(self.model))
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code does not see new hooks
            stack.enter_context(autocast(self.ids.device))
            self.model(input_ids=self.ids, use_cache=False)
        return calls


def figures(
    before: Snapshot, weights: Mapping[str, Weights], lr: float, records: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """{module: {figure: value}} of a step; see `Probe.after`."""
    found = {}
    for name, new in weights.items():
        old = before.weights[name]
        tensors = dense_figures(old, new) if len(new) == 1 else pair_figures(as_pair(old), as_pair(new))
        if len(new) == 3:
            tensors["orthonormality"] = torch.stack([frame_error(new[0]), frame_error(new[2])]).amax(0)
        values = {**records.get(name, {}), **{key: value.max().item() for key, value in tensors.items()}}
        if calls := before.inputs.get(name):
            values["output_change"] = output_change(as_pair(old), as_pair(new), calls)
        if "rho" in values and lr > 0:
            values["update_ratio"] = values["update_norm"] / lr
        found[name] = values
    return found


def as_pair(weights: Weights) -> Weights:
    """(U diag(s), V) in float64 for (U, s, V); anything else as it is."""
    if len(weights) != 3:
        return weights
    U, s, V = map(to_float64, weights)
    return U * s[..., None, :], V


def frame_error(Q: Tensor) -> Tensor:
    """max |Q^T Q - 1| (...) of Q (..., d, r), in float64."""
    G = gram(to_float64(Q))
    return (G - torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)).abs().amax((-2, -1))


def pair_figures(old: Weights, new: Weights) -> dict[str, Tensor]:
    """Figures (...) of W = A B^T, A (..., d_out, r) and B (..., d_in, r) of before and after a step."""
    (A, B), (A_new, B_new) = old, new
    spectrum = product_spectrum(A_new, B_new)
    sigma_A, sigma_B = spectral_norm(A_new), spectral_norm(B_new)
    return {
        "update_norm": update_norm(A, B, A_new, B_new),
        "sigma_W": spectrum[..., 0],
        "stable_rank": stable_rank(spectrum),
        "sigma_A": sigma_A,
        "sigma_B": sigma_B,
        "gauge": sigma_A / sigma_B,
    }


def dense_figures(old: Weights, new: Weights) -> dict[str, Tensor]:
    """Figures (...) of a dense W (..., d_out, d_in) of before and after a step."""
    (W,), (W_new,) = map(to_float64, old), map(to_float64, new)
    spectrum = singular_values(W_new)
    return {
        "update_norm": spectral_norm(W_new - W),
        "sigma_W": spectrum[..., 0],
        "stable_rank": stable_rank(spectrum),
    }


def output_change(old: Weights, new: Weights, calls: Calls) -> float:
    """RMS of dy = W_new x - W x over all tokens and features, from differences of weights, never of outputs."""
    old, new = tuple(map(to_float64, old)), tuple(map(to_float64, new))
    squares, count = torch.zeros((), dtype=torch.float64, device=old[0].device), 0
    for x, *offsets in calls:
        dy = _output_difference(old, new, to_float64(x), offsets)
        squares += dy.square().sum()
        count += dy.numel()
    return (squares / max(count, 1)).sqrt().item()


def _output_difference(old: Weights, new: Weights, x: Tensor, offsets: Sequence[Tensor]) -> Tensor:
    def apply(M: Tensor, x: Tensor) -> Tensor:
        """M x, of the expert that owns the row where M is a stack."""
        return grouped_linear(x, M, *offsets) if offsets else linear(x, M)

    if len(old) == 1:
        return apply(new[0] - old[0], x)
    (A, B), (A_new, B_new) = old, new
    return apply(A_new - A, apply(B_new.mT, x)) + apply(A, apply((B_new - B).mT, x))

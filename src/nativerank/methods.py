"""The table of methods: which layer, which update of the matrices, which rates. A method is one row.

Everything that is not a hidden matrix (embedding, head, norms, biases, routers) is AdamW at its own rate, `aux_lr`,
under every method; at small scale that rate matters more than the method.

Default rates: SWEPT holds what the line search of `nativerank compare --tune` found for a preset (results in
benchmarks/results/, the first made by an earlier script with the same search); where no sweep was run, a row's own
rates stand, taken from the publication named there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from nativerank.config import nearest
from nativerank.distributed.grid import Grid
from nativerank.layers import FactorizeReport, Guides, factorize_modules, guided_layers, matrix_parameters
from nativerank.layers.base import factor_layers
from nativerank.optim.check import AUXILIARY, DEFAULTS
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.reshape import reshaped
from nativerank.optim.roles import Pair, Roles, assign_roles
from nativerank.optim.rules import RULES


@dataclass(frozen=True)
class Rates:
    """Peak rate of the matrices, peak AdamW rate of the rest, and init_scale (standard deviation * sqrt(fan_in))."""

    lr: float
    aux_lr: float
    init_scale: float = 3**-0.5  # PyTorch's default for nn.Linear


@dataclass(frozen=True)
class Method:
    """One row.

    Args:
        layer: kind of factor layer, or None for dense matrices.
        rule: update rule of the matrices, an entry of optim.rules.RULES.
        rates: defaults without a sweep. source: where these come from.
        options: this method's own defaults of rule options.
        one_frame: (layer, rule) of its form with one orthonormal factor, or None.
    """

    layer: str | None
    rule: str
    rates: Rates
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    one_frame: tuple[str, str] | None = None

    def form(self, frames: str | None) -> tuple[str | None, str]:
        """(layer kind, update rule): the row's, or with frames "one" those of A V^T.

        Raises:
            ValueError: the method has no choice of frames.
        """
        if frames is not None and self.one_frame is None:
            raise ValueError(f"frames belongs to stiefel-spectron, not to a method with rule {self.rule}")
        return self.one_frame if frames == "one" and self.one_frame else (self.layer, self.rule)

    @property
    def guided(self) -> bool:
        """Whether a dense guide leads the factors for a while."""
        return self.layer == GUIDED


GUIDED = "guided"
METHODS: dict[str, Method] = {
    "spectron": Method("lowrank", "spectron", Rates(0.07, 0.003), "lr: Spectron's code, every size; aux_lr: ours"),
    "lowrank-adamw": Method("lowrank", "adamw", Rates(1e-3, 1e-3), "Spectron's code, AdamW examples"),
    "lowrank-muon": Method("lowrank", "muon", Rates(0.01, 0.003), "pocket sweep", {"nesterov": True}),
    "adam-muon": Method(
        "lowrank",
        "adam-muon",
        Rates(0.01, 0.003),
        "ours",
        {"nesterov": True, "shape_scale": "match_rms_adamw", "update_cap": 0.15},
    ),
    "self-guided": Method(GUIDED, "adamw", Rates(1e-3, 1e-3), "Spectron's code, AdamW examples"),
    "sct": Method("spectral", "sct", Rates(4e-3, 3e-3), "ours: SCT's 5e-4 is for a converted model", {"s_lr": 0.05}),
    "tsvd": Method("spectral", "tsvd", Rates(4e-3, 3e-3), "ours: no rate of the paper is known", {"s_lr": 0.05}),
    "stiefel-spectron": Method(
        "spectral",
        "stiefel-spectron",
        Rates(0.05, 0.003),
        "ours",
        {"nesterov": True, "retraction": "polar", "s_lr": 0.05},
        ("lowrank", "frame-spectron"),
    ),
    "dense-adamw": Method(None, "adamw", Rates(1e-3, 1e-3), "common practice below 1B parameters"),
    "dense-muon": Method(
        None, "muon", Rates(0.02, 0.003), "Muon's default", {"nesterov": True, "shape_scale": "original"}
    ),
}

SWEPT: dict[str, dict[str, Rates]] = {
    "pocket": {
        "spectron": Rates(0.08, 0.01, 0.577),
        "lowrank-muon": Rates(0.0256, 0.02, 0.577),
        "lowrank-adamw": Rates(0.0048, 0.02, 0.577),
        "adam-muon": Rates(0.0109, 0.02, 0.577),
        "self-guided": Rates(0.0048, 0.02),
        "sct": Rates(0.01, 0.02, 0.577),
        "tsvd": Rates(0.01, 0.02, 0.577),
        "stiefel-spectron": Rates(0.088, 0.02, 0.577),
        "dense-muon": Rates(0.0358, 0.02, 0.0625),
        "dense-adamw": Rates(0.0048, 0.01, 0.25),
    },
    "demo": {
        "spectron": Rates(0.08, 0.01, 0.577),
        "lowrank-muon": Rates(0.016, 0.02, 0.577),
        "lowrank-adamw": Rates(0.00187, 0.02, 0.577),
    },
}


def find_method(name: str) -> Method:
    """The row of this method.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{nearest(name, METHODS)} (methods: {', '.join(METHODS)})")
    return METHODS[name]


def fitting_methods(layer: str | None) -> list[str]:
    """The methods that train this kind of layer (None: dense matrices), as flags that say which frames where there is
    a choice."""
    forms = [(name, row, f) for name, row in METHODS.items() for f in (("both", "one") if row.one_frame else (None,))]
    return [f"{name} --optim.frames {f}" if f else name for name, row, f in forms if row.form(f)[0] == layer]


def default_rates(method: str, preset: str) -> Rates:
    """The swept rates of a method for a preset, or the method's own where there was no sweep."""
    return SWEPT.get(preset, {}).get(method, find_method(method).rates)


def factorize(
    model: nn.Module,
    method: str = "spectron",
    *,
    rank_ratio: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    rank_rule: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, int] | None = None,
    init: str | None = None,
    guide: str | None = None,
    frames: str | None = None,
) -> FactorizeReport:
    """Replaces the linear maps of a model by factor layers, in place.

    Every nn.Linear, Conv1D (d_in, d_out) and batched expert stack but the embedding and output head of a Hugging Face
    model; of another module every nn.Linear unless excluded. On the meta device too.

    Args:
        model: the module whose layers are replaced.
        method: a low-rank row of the method table; it decides the layer kind.
        rank_ratio: r = int(ratio * d_in), see RankConfig; a quarter when neither ratio nor rank is given.
        rank: one rank for all.
        energy: per matrix the smallest rank that keeps this share of ||W||_F^2 (at most rank, if that is given too);
            on the meta device, where there is no W, of a Gaussian one.
        rank_rule: "auto" or "code".
        include, exclude: glob patterns over module names (or dotted suffixes of them).
        overrides: pattern -> rank.
        init: "svd" truncates the present weights (the default), "sampled" draws factors of the same spectrum, "flat"
            frames with equal singular values and the Frobenius norm of the present weights.
        guide: self-guided only: "product" (the default) starts the guide as A B^T, "dense" as the present weights.
        frames: stiefel-spectron only: "both" (the default) or "one", see OptimConfig.

    Returns:
        What became what, with ranks, parameters before and after, and warnings.

    Raises:
        ValueError: a dense method, a rank outside [1, min(d_in, d_out)], a pattern that matches nothing, no matrix
            found, or a large matrix left dense without being excluded.
    """
    row = find_method(method)
    layer, _ = row.form(frames)
    if layer is None:
        raise ValueError(f"{method} keeps dense matrices; factorize takes a low-rank method")
    if rank is not None and rank_ratio is not None:
        raise ValueError(f"give rank or rank_ratio, not both: rank={rank}, rank_ratio={rank_ratio}")
    if guide not in (None, "product", "dense") or (guide and not row.guided):
        raise ValueError(f"guide is product or dense, for self-guided only, got {guide!r} for {method}")
    return factorize_modules(
        model,
        kind=f"{layer}-dense" if guide == "dense" else layer,
        ratio=rank_ratio,
        value=rank,
        energy=energy,
        rule=rank_rule,
        include=include,
        exclude=exclude,
        overrides=overrides or {},
        init=init or "svd",
    )


def build_optimizer(
    model: nn.Module,
    method: str = "spectron",
    *,
    lr: float | None = None,
    aux_lr: float | None = None,
    weight_decay: float = 0.0,
    aux_state_dtype: str | None = None,
    matrices: Sequence[str] | None = None,
    guided_steps: int | None = None,
    stochastic_guide: bool = True,
    frames: str | None = None,
    layerwise: bool = False,
    seed: int = 0,
    grid: Grid | None = None,
    algebra: str = "auto",
    **options: Any,
) -> LowRankOptimizer:
    """The optimizer of a method for a model: hidden matrices by the method's rule, everything else by AdamW.

    Args:
        model: factorized for a low-rank method, plain for a dense one.
        method: row of the method table.
        lr: peak rate of the hidden matrices; None takes the row's.
        aux_lr: peak AdamW rate of everything else.
        weight_decay: decoupled, on the hidden matrices, times lr.
        aux_state_dtype: "fp32", "bf16" or "fp8": what AdamW's moments of the rest are kept in; None is state_dtype.
        matrices: names of the dense parameters that a dense method treats as hidden matrices; None finds them.
        guided_steps: self-guided only: updates after which the guides are gone. They follow the optimizer's steps, also
            those that a loaded state_dict has seen.
        stochastic_guide: self-guided only: compute a guide with probability alpha.
        frames: stiefel-spectron only: "both" or "one", as in factorize.
        layerwise: update inside the backward pass and free each gradient at once (`optim.layerwise`). The loop must not
            clip, scale or accumulate gradients then, and sets the rate before the backward pass.
        seed: of the draws of a stochastic guide.
        grid: the processes that train this model together, all of which build its optimizer; None asks parameters that
            FSDP2 has sharded, and else is this process alone. Whoever then writes weights by other means than its
            step() calls `optimizer.loaded()`, and saves `optimizer.pieces()` instead of its state_dict.
        algebra: how r x r problems are shared between them: "gram" moves Gram matrices, "owner" whole matrices to one
            process each, "auto" fewer bytes.
        options: rule options by keyword (optim.check.DEFAULTS), e.g. nesterov=True.

    Raises:
        ValueError: a low-rank method and a model without factor pairs, a dense method and a model with them, an
            unknown option, or a value out of range.
    """
    row = find_method(method)
    roles = trained_roles(model, method, row.form(frames)[1], matrices)
    if row.guided != (guided_steps is not None):
        raise ValueError(f"guided_steps belongs to self-guided, which needs it; got {guided_steps} for {method}")
    rule, own, common = rule_options(row, frames, options)
    matrix = {"rule": rule, "lr": row.rates.lr if lr is None else lr, "weight_decay": weight_decay, **own}
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": roles.hidden, **matrix},
        # Without names torch could not tell it from a group of nameless ones, if the guides are gone.
        {"name": Guides.GROUP, "params": roles.guides, "param_names": [], **matrix},
        {
            "name": AUXILIARY,
            "params": roles.auxiliary,
            "rule": "adamw",
            "lr": row.rates.aux_lr if aux_lr is None else aux_lr,
            **common,
            "state_dtype": aux_state_dtype or own.get("state_dtype", DEFAULTS["state_dtype"]),
        },
    ]
    kept = [g for g in groups if g["params"] or (row.guided and g["name"] == Guides.GROUP)]  # to be taken up again
    optimizer = LowRankOptimizer(kept, grid, algebra)
    if guided_steps is not None:
        surgery = partial(reshaped, optimizer, model)
        optimizer.guides = Guides(model, optimizer, guided_steps, seed, stochastic_guide, surgery)
    if layerwise:
        optimizer.update_layerwise()
    return optimizer


def trained_roles(model: nn.Module, method: str, rule: str, matrices: Sequence[str] | None) -> Roles:
    """What each parameter is to a method; raises a ValueError where the model is not one that it trains."""
    row = find_method(method)
    if row.layer is None and matrices is None:
        matrices = matrix_parameters(model)
    roles = assign_roles(model, matrices or () if row.layer is None else ())
    if row.layer and not roles.pairs:
        if factor_layers(model):
            raise ValueError(f"{method} found factors, but all of them are frozen (requires_grad is False)")
        raise ValueError(f"{method} found no factor pair in the model; call nativerank.factorize(model) first")
    if row.layer is None and roles.pairs:
        raise ValueError(f"{method} trains dense matrices, but {roles.pairs[0].name} is factorized")
    check_form(roles.pairs, rule, method)
    if not roles.hidden:
        raise ValueError(f"{method} found no hidden matrix in the model")
    if row.guided and not guided_layers(model):
        raise ValueError(f"{method} found no guide in the model; call nativerank.factorize(model, {method!r}) first")
    if roles.guides and not row.guided:
        raise ValueError(f"{roles.guides[0][0]} is the guide of self-guided training, which {method} does not know")
    return roles


Options = dict[str, Any]


def rule_options(row: Method, frames: str | None, options: Options) -> tuple[str, Options, Options]:
    """(rule of the matrices, its options, what AdamW of everything else shares of them)."""
    layer, rule = row.form(frames)
    given = {k: v for k, v in options.items() if v is not None}
    chosen: Options = {**row.options, **given}
    common: Options = {k: chosen[k] for k in ("betas", "eps") if k in chosen}
    if rule == "adamw" and layer == "lowrank" and "update_cap" in chosen:
        rule = "adamw-capped"
    if layer != row.layer:  # with one frame there is no s
        chosen = {k: v for k, v in chosen.items() if k in RULES[rule].options or k in given}
    return rule, {k: v for k, v in chosen.items() if k not in common or k in RULES[rule].options}, common


def check_form(pairs: Sequence[Pair], rule: str, method: str) -> None:
    """Raises a ValueError for factors in a form that the rule does not update: A B^T or U diag(s) V^T."""
    wanted = RULES[rule].kind == "triple"
    for pair in pairs:
        if wanted != (pair.s is not None):
            forms = ("A B^T", "U diag(s) V^T")
            raise ValueError(
                f"{method} trains factors {forms[wanted]}, but {pair.name} is {forms[not wanted]}; "
                f"factorize with method={method!r} (and the same frames) or choose another method"
            )

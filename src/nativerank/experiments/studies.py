"""The published studies at reduced size: which arms, which rates, and what is read from them.

A study sets defaults of flags (another preset or fewer steps are flags away), runs arms at rates that it searches
itself, and adds its findings to the table. Sizes are for the preset pocket, where a run of 600 steps takes a minute
with one thread; every study says how long it will take before it starts.

| study | question |
|---|---|
| ablation | what do orthogonalisation and renormalisation contribute, at three ranks? |
| lr-robustness | what does a rate above the best cost, and does the best rate carry over to other widths? |
| update-norm | how large is the step of W, and is that what hurts naive AdamW? |
| equal-flops | low rank against dense at the same training FLOPs |
| adaptive-rank | which threshold and schedule for ranks that change, and what they cost in loss |
| diloco | what does it cost that replicas meet every 5, 20 or 50 steps only? |
| frames | what do orthonormal factors give, in which form, and how wide is their window of rates? |
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nativerank.config import nearest
from nativerank.experiments.arms import AUX_LR, LR, Arm, Value, configured, parse_arm
from nativerank.experiments.compare import Comparison
from nativerank.experiments.findings import (
    Findings,
    at_multiple,
    below,
    best_of_kinds,
    lack,
    mean_loss,
    norm_findings,
    refusals,
    robustness,
    signed,
    transfer,
)
from nativerank.experiments.rank_study import adaptive_rank, rank_findings
from nativerank.experiments.replica_study import diloco, diloco_findings
from nativerank.experiments.search import search, tune
from nativerank.models import find_preset, hf_config, scaled
from nativerank.train.resolve import resolve
from nativerank.train.setup import open_data


@dataclass(frozen=True)
class Study:
    """One study.

    Args:
        what: title of its table.
        run: enters the arms and runs them. analyse: reads what ran.
        defaults: of flags, by dotted key.
        budget, seeds: as in a comparison; seeds is a default too.
    """

    what: str
    run: Callable[[Comparison], None]
    analyse: Callable[[Comparison], Findings]
    defaults: Mapping[str, Any]
    budget: str = "tokens"
    seeds: int = 1


CONFIGS = "configs"  # folder inside that of the comparison
POCKET: dict[str, Any] = {"model.preset": "pocket", "train.steps": 600}
SLOW_AUX: dict[str, Any] = {**POCKET, "optim.aux_lr": 0.003}  # where the matrices do more of the work

# -- ablation -------------------------------------------------------------------------------------------------------

RANKS = {32: "rank 32 (ratio 0.25)", 16: "rank 16 (ratio 0.125)", 51: "rank 51 (ratio 0.4)"}  # the first is searched
NO_ORTH, NO_RENORM = {"optim.orthogonalizer": "none"}, {"optim.renormalize": False}
# variant -> (method, settings, first rate at the first rank)
VARIANTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "both (spectron)": ("spectron", {}, 0.08),
    "orthogonalisation only": ("spectron", NO_RENORM, 0.026),
    "renormalisation only": ("spectron", NO_ORTH, 6.0),
    "neither (momentum)": ("spectron", {**NO_ORTH, **NO_RENORM}, 2.0),
    "neither (lowrank-adamw)": ("lowrank-adamw", {}, 0.0048),
}
# Here the step is the clipped momentum itself, a hundred times shorter than an orthogonalized one, and nobody has tuned
# its rate: searched in coarse steps first.
UNCHARTED = ("renormalisation only", "neither (momentum)")


def ablation(comparison: Comparison) -> None:
    """Every variant searched at the first rank, and from its best rate there at the others."""
    best = {name: lr for name, (_, _, lr) in VARIANTS.items()}
    for rank, group in RANKS.items():
        labels = {name: f"{name}, rank {rank}" for name in VARIANTS}
        comparison.enter(
            Arm(labels[name], method, {**settings, "rank.value": rank, LR: best[name]}, group)
            for name, (method, settings, _) in VARIANTS.items()
        )
        if rank == next(iter(RANKS)):
            search(comparison, [labels[name] for name in UNCHARTED], [(LR, 4.0)])
        tune(comparison, list(labels.values()), [(LR, 2.0)])
        best = {name: at_multiple(comparison, label, 1)[LR] for name, label in labels.items()}


def ablation_findings(comparison: Comparison) -> Findings:
    """Mean losses, and what each variant loses against both."""
    found = Findings()
    for rank, group in RANKS.items():
        means = {name: mean_loss(comparison, f"{name}, rank {rank}") for name in VARIANTS}
        full = next(iter(means.values()))
        found.numbers[str(rank)] = means
        if full is not None:
            lost = [
                f"{name} {signed(None if m is None else m - full, lack(comparison, f'{name}, rank {rank}'))}"
                for name, m in list(means.items())[1:]
            ]
            found.lines.append(f"{group}: both {full:.3f}; against it {', '.join(lost)}")
    return found


# -- learning rates -------------------------------------------------------------------------------------------------

PAPER, NESTEROV = (
    "spectron",
    "spectron[optim.nesterov=true]",
)  # Spectron as published, and with the Nesterov of its code
NAIVE = "lowrank-adamw"
STARTS = {PAPER: 0.08, NESTEROV: 0.08, NAIVE: 0.0024, "lowrank-muon": 0.02, "dense-adamw": 0.0024}  # at SLOW_AUX
MULTIPLES = (0.5, 2.0, 4.0, 5.0, 8.0)
WIDTHS = (64, 128, 256)
WIDTH_METHODS = (PAPER, NAIVE)
WIDTH_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
WIDTH_GROUP = "Transfer of the rate across widths"


def started(text: str) -> Arm:
    """An arm that is searched from its rate in STARTS."""
    arm = parse_arm(text)
    return Arm(text, arm.method, {**arm.settings, LR: STARTS[text]})


def lr_robustness(comparison: Comparison) -> None:
    """Rates up to eight times the best one; then the same rates at three widths, for half as many steps."""
    labels = comparison.enter(started(text) for text in STARTS)
    tune(comparison, labels, [(LR, 2.0)])
    seeds = range(comparison.seeds)
    comparison.run([(k, at_multiple(comparison, k, m), s) for k in labels for m in MULTIPLES for s in seeds])
    steps = max(1, comparison.contenders[labels[0]].steps // 2)
    widths = comparison.enter(width_arm(comparison, method, d, steps) for method in WIDTH_METHODS for d in WIDTHS)
    comparison.run_product(widths, {LR: [Value(m, relative=True) for m in WIDTH_MULTIPLES]})


def width_label(method: str, d_model: int) -> str:
    return f"{method}, d_model {d_model}"


def width_arm(comparison: Comparison, method: str, d_model: int, steps: int) -> Arm:
    """A method on the preset's architecture at another width, a quarter of it as rank; its config.json is written."""
    config = resolve(configured({**comparison.common, "method": method}))
    preset = find_preset(config.model.preset)
    hf = hf_config(scaled(preset, d_model, None), open_data(config, quiet=True).vocab_size, config.train.context)
    file = comparison.folder / CONFIGS / f"d{d_model}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(hf.to_dict(), indent=1) + "\n"
    if not file.exists() or file.read_text(encoding="utf-8") != text:  # a run may be reading it, beside a --plan
        file.write_text(text, encoding="utf-8")
    settings = {
        "model.config": str(file),
        "model.embedding_std": preset.embedding_std,
        "model.init_scale": 0.577,
        "rank.value": d_model // 4,
        "train.steps": steps,
        LR: STARTS[method],
    }
    return Arm(width_label(method, d_model), method, settings, WIDTH_GROUP)


def lr_findings(comparison: Comparison) -> Findings:
    """Loss increases, and the best rate per width."""
    found = robustness(comparison, list(STARTS), MULTIPLES, of=(PAPER, NESTEROV))
    by_width = {method: {d: width_label(method, d) for d in WIDTHS} for method in WIDTH_METHODS}
    moved = transfer(comparison, by_width)
    return Findings(found.lines + moved.lines, {**found.numbers, **moved.numbers})


# -- update norms ---------------------------------------------------------------------------------------------------

NORM_MULTIPLES = (1.0, 5.0, 8.0)
CAPPED = "lowrank-adamw, ||dW|| capped, at 8x"
PROBES: dict[str, Any] = {"train.probe": ["*.2.self_attn.o_proj"], "train.probe_every": 10}  # as the paper's figure


def update_norm(comparison: Comparison) -> None:
    """Each method at 1, 5 and 8 times its best rate; naive AdamW at 8 with its steps capped at Spectron's eta."""
    labels = comparison.enter(started(text) for text in STARTS)
    tune(comparison, labels, [(LR, 2.0)])
    seeds = range(comparison.seeds)
    comparison.run([(k, at_multiple(comparison, k, m), s) for k in labels for m in NORM_MULTIPLES for s in seeds])
    cap = {"optim.update_cap": at_multiple(comparison, PAPER, 1)[LR], LR: at_multiple(comparison, NAIVE, 8)[LR]}
    comparison.run_product(comparison.enter([Arm(CAPPED, NAIVE, cap)]), {})


def norm_study_findings(comparison: Comparison) -> Findings:
    """Norms per arm, the ratio of the extremes, and whether the cap cures naive AdamW."""
    labels = [label for label in comparison.contenders if label != CAPPED]
    wanted = [(label, m) for label in labels for m in NORM_MULTIPLES]
    found = norm_findings(comparison, [*wanted, (CAPPED, 1.0)])
    far, ratios = f"{NAIVE} at 8x", {}
    for near in (f"{PAPER} at 5x", f"{NESTEROV} at 5x"):
        if far in found.numbers and near in found.numbers:
            medians = [found.numbers[name]["update_norm"]["median"] for name in (far, near)]
            ratios[near] = medians[0] / medians[1]
            found.lines.append(f"median ||dW|| of {far} divided by that of {near}: {ratios[near]:.1f}")
    found.numbers["median_ratio"] = ratios
    for label in labels:
        points = {m: at_multiple(comparison, label, m) for m in NORM_MULTIPLES}
        found.lines += refusals(comparison, label, points) + below(comparison, label)
    spots = [(NAIVE, 1.0), (NAIVE, 8.0), (CAPPED, 1.0)]
    best, high, capped = losses = [mean_loss(comparison, label, m) for label, m in spots]
    shown = [
        f"{loss:.3f}" if loss is not None else f"{lack(comparison, *spot)}"
        for loss, spot in zip(losses, spots, strict=True)
    ]
    found.lines.append(f"{NAIVE}: {shown[0]} at its best rate, {shown[1]} at 8x, {shown[2]} at 8x with ||dW|| capped")
    found.numbers["cap"] = {"best": best, "at_8x": high, "at_8x_capped": capped}
    if best is not None and high is not None and capped is not None and high > best:
        share = (high - capped) / (high - best)
        found.numbers["cap"]["recovered"] = share
        found.lines.append(f"the cap at Spectron's eta takes back {share:.0%} of what the high rate cost")
    return found


# -- equal FLOPs ----------------------------------------------------------------------------------------------------

EQUAL_FLOPS = (PAPER, NESTEROV, "lowrank-muon", NAIVE, "dense-adamw", "dense-muon")


def equal_flops(comparison: Comparison) -> None:
    """Matrix and auxiliary rate searched again, for dense arms at their shorter horizon."""
    tune(comparison, comparison.enter(map(parse_arm, EQUAL_FLOPS)), [(LR, 2.0), (AUX_LR, 2.0)])


# -- orthonormal factors --------------------------------------------------------------------------------------------

S_LR = "optim.s_lr=0.05"
SCT, TSVD, STIEFEL = f"sct[{S_LR}]", f"tsvd[{S_LR}]", "stiefel-spectron"
ONE_FRAME = "stiefel-spectron[optim.frames=one]"
OURS = "adam-muon"
AUTHORS = "spectron[optim.nesterov=true;optim.shape_scale=original;optim.aux_lr=0.02]"
SWEPT_BEFORE = ("dense-muon", "lowrank-muon", NAIVE, AUTHORS)  # and therefore at their rates
SEARCHED: dict[str, dict[str, Any]] = {  # arm -> what it starts from beside the defaults
    "lowrank-muon[optim.momentum=0.9]": {},
    SCT: {},
    TSVD: {},
    STIEFEL: {},
    ONE_FRAME: {LR: 0.09},
    OURS: {},
}
OPTIONS = {  # at the plain form's rate
    SCT: ("optim.preserve=true", "optim.riemannian=true", "optim.retract_every=4"),
    STIEFEL: ("optim.preserve=true", "optim.riemannian=true", "optim.certified=true"),
    OURS: ("optim.update_cap=1e9", "optim.nesterov=false"),
}
WINDOW = (NAIVE, "lowrank-muon", AUTHORS, SCT, STIEFEL, ONE_FRAME, OURS)


def with_option(label: str, option: str) -> str:
    """An arm as it is written, with one more setting."""
    return f"{label[:-1]};{option}]" if label.endswith("]") else f"{label}[{option}]"


def frames(comparison: Comparison) -> None:
    """Every form at its own best matrix rate, its options at that rate, and some arms at four times theirs."""
    swept = comparison.enter(map(parse_arm, SWEPT_BEFORE))
    comparison.run_product(swept, {})
    arms = {text: parse_arm(text) for text in SEARCHED}
    labels = comparison.enter(Arm(t, arm.method, {**arm.settings, **SEARCHED[t]}) for t, arm in arms.items())
    tune(comparison, labels, [(LR, 1.6)])
    variants = {with_option(plain, option): plain for plain, options in OPTIONS.items() for option in options}
    rates = {text: at_multiple(comparison, plain, 1)[LR] for text, plain in variants.items()}
    arms = {text: parse_arm(text) for text in variants}
    options = comparison.enter(Arm(t, arm.method, {**arm.settings, LR: rates[t]}) for t, arm in arms.items())
    comparison.run_product(options, {})
    comparison.run([(label, at_multiple(comparison, label, 4.0), 0) for label in WINDOW])


def frames_findings(comparison: Comparison) -> Findings:
    """What four times the best rate costs."""
    return robustness(comparison, WINDOW, (4.0,), of=(SCT, STIEFEL, ONE_FRAME, OURS))


STUDIES: dict[str, Study] = {
    "ablation": Study(
        "Orthogonalisation and renormalisation, at three ranks", ablation, ablation_findings, POCKET, seeds=3
    ),
    "lr-robustness": Study("Rates above the best one", lr_robustness, lr_findings, SLOW_AUX),
    "update-norm": Study("The spectral norm of a step", update_norm, norm_study_findings, {**SLOW_AUX, **PROBES}),
    "equal-flops": Study(
        "Low rank against dense at equal FLOPs", equal_flops, best_of_kinds, POCKET, budget="flops", seeds=3
    ),
    "adaptive-rank": Study("Ranks that change", adaptive_rank, rank_findings, POCKET, seeds=3),
    "diloco": Study("Replicas that meet every H steps", diloco, diloco_findings, POCKET),
    "frames": Study("Orthonormal factors", frames, frames_findings, POCKET, seeds=3),
}


def find_study(name: str) -> Study:
    """The study of this name.

    Raises:
        ValueError: an unknown one; lists the known ones.
    """
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}{nearest(name, STUDIES)} (studies: {', '.join(STUDIES)})")
    return STUDIES[name]

"""How near ||dW||_2 comes to eta: on steps made to break the bound, and in training.

The adversarial set: factors of norm 0.3 to 300 with flat, spiked, rank-one and ill-conditioned (1e6) spectra, one of
them zero too; momenta aligned with them, concentrated on one direction, rank-deficient, zero, and of size 1e-12 to
1e12; power vectors that are exact, cold (random), or stale (a direction that has stopped mattering). Every form of
Spectron takes one step from each; what counts is the largest ||dW||_2 / eta, measured in float64.

In training: every matrix of a preset's model at every `probe_every`-th step, by the run's own records.
"""

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nativerank.bench.record import record
from nativerank.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from nativerank.linalg.change import update_norm
from nativerank.optim.directions import Options, Stack, formed
from nativerank.optim.products import spectron
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows

D_OUT, D_IN, R, ETA = 96, 64, 16, 0.1
SIZES = (0.3, 0.84, 2.5, 5.0, 20.0, 100.0, 300.0)
SPECTRA = ("flat", "spike", "rank one", "condition 1e6")
DIRECTIONS = ("aligned", *(f"mixed {seed}" for seed in range(8)), "top only", "rank deficient", "zero")
SCALES = (1e-12, 1.0, 1e12)
VECTORS = ("exact", "cold", "stale")
AUTHORS = {"nesterov": True, "shape_scale": "original"}
FORMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, exact norms": {"norm": "exact"},
    "paper, exact norms, polar-express": {"norm": "exact", "orthogonalizer": "polar-express"},
    "authors' code": AUTHORS,
    "root, exact norms": {"norm": "exact", "step": "root"},
    "certified": {"certified": True},
    "certified, authors' code": {"certified": True, **AUTHORS},
    "certified, polar-express 9": {"certified": True, "orthogonalizer": "polar-express", "orthogonalizer_steps": 9},
}


@functools.cache
def frame(d: int, seed: int) -> Tensor:
    """Orthonormal columns (d, R), float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, R, generator=g, dtype=torch.float64)).Q


def factors(spectrum: str, size: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A (D_OUT, R) and B (D_IN, R) with ||A|| = ||B|| = size."""
    s = {
        "flat": torch.ones(R),
        "spike": torch.tensor([1.0] + [1e-3] * (R - 1)),
        "rank one": torch.tensor([1.0] + [0.0] * (R - 1)),
        "condition 1e6": torch.logspace(0, -6, R),
    }[spectrum]
    return frame(D_OUT, seed) * (size * s.double()), frame(D_IN, seed + 1) * (size * s.double())


def gradients(direction: str, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients whose steps are as long as they can be for these factors; all terms of dW point the same way."""
    if direction == "aligned":
        return -scale * A, -scale * B
    if direction.startswith("mixed"):  # the momentum's singular values decide how far Newton-Schulz overshoots
        g = torch.Generator().manual_seed(int(direction.split()[1]))
        mix = scale * (0.05 + torch.rand(R, generator=g, dtype=A.dtype))
        return -A * mix, -B * mix
    if direction == "top only":
        e = torch.eye(R, dtype=A.dtype)[:1]
        return tuple(-scale * X[:, :1] / X[:, :1].norm().clamp_min(1e-300) @ e for X in (A, B))
    if direction == "rank deficient":
        G = torch.randn(D_OUT, R, generator=torch.Generator().manual_seed(0), dtype=A.dtype)
        G[:, R // 2 :] = 0
        return scale * G, scale * torch.ones(D_IN, R, dtype=A.dtype)
    assert direction == "zero", direction
    return torch.zeros_like(A), torch.zeros_like(B)


def power_vector(kind: str, X: Tensor, seed: int) -> Tensor:
    """A unit vector (d,) to start power iteration on a factor from: its first or second column, or a random one.

    The columns of `factors` are orthogonal and descend in length, so these are the left singular vectors.
    """
    if kind == "cold":
        v = torch.randn(len(X), generator=torch.Generator().manual_seed(seed), dtype=X.dtype)
    else:
        v = X[:, 0 if kind == "exact" else 1]
    return v / v.norm() if v.any() else torch.nn.functional.normalize(torch.ones_like(v), dim=0)


def change(A: Tensor, B: Tensor, G_A: Tensor, G_B: Tensor, u: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """||dW||_2 (n) of one step of each of n pairs, from zero momentum, in the dtype of A."""
    chosen: Options = {**vars(OptimConfig()), "lr": ETA, "nesterov": False, "shape_scale": "none", **options}
    stacks = []
    for X, G, v in ((A, G_A, u[0]), (B, G_B, u[1])):
        state = {"momentum": torch.zeros_like(X), "power_vector": v.clone()}
        stacks.append(Stack(G, state, (X.shape[-2], R), X))
    D_A, D_B, _ = spectron(stacks[0], stacks[1], chosen)
    return update_norm(A, B, A.double() - formed(D_A).double(), B.double() - formed(D_B).double())


def adversarial_cases() -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """(name, A, B, G_A, G_B, u_A, u_B), float64."""
    cases = product(SPECTRA, SIZES, DIRECTIONS, SCALES, VECTORS)
    for number, (spectrum, size, direction, scale, vector) in enumerate(cases):
        A, B = factors(spectrum, size)
        G_A, G_B = gradients(direction, A, B, scale)
        u = power_vector(vector, A, 2 * number), power_vector(vector, B, 2 * number + 1)
        name = f"{spectrum} spectra of norm {size:g}, {direction} momentum of size {scale:g}, {vector} power vectors"
        yield name, A, B, G_A, G_B, *u
        if direction == "aligned" and spectrum == "flat" and scale == 1.0:
            yield f"A zero, {name}", 0 * A, B, G_A, G_B, *u
            yield f"B zero, {name}", A, 0 * B, G_A, G_B, *u


def adversarial(forms: dict[str, dict[str, Any]], dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Per form the worst ||dW||/eta over the set, its case, and in how many cases it exceeds 1."""
    names, *columns = zip(*adversarial_cases(), strict=True)
    A, B, G_A, G_B, *u = (torch.stack(column).to(dtype) for column in columns)
    rows = []
    for form, options in forms.items():
        ratios = change(A, B, G_A, G_B, (u[0], u[1]), **options) / ETA
        worst = int(ratios.argmax())
        by_vector = {
            kind: ratios[[n.endswith(f"{kind} power vectors") for n in names]].max().item() for kind in VECTORS
        }
        rows.append(
            {
                "form": form,
                "cases": len(names),
                "max_ratio": ratios[worst].item(),
                "worst_case": names[worst],
                "max_ratio_by_power_vector": by_vector,
                "violations": int((ratios > 1).sum()),
            }
        )
    return rows


def in_training(form: str, preset: str, steps: int | None, probe_every: int, seed: int) -> dict[str, Any]:
    """The ratios that a run of the preset recorded, over all its matrices."""
    config = RunConfig(
        method="spectron",
        model=ModelConfig(preset=preset),
        optim=replace(OptimConfig(), **FORMS[form]),
        train=TrainConfig(
            steps=steps, probe=["*"], probe_every=probe_every, eval_every=0, checkpoint_every=0, seed=seed
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        summary = train(replace(config, out=str(Path(folder) / "run")), Silent())
        probes = [values for row in read_rows(Path(folder) / "run") for values in row.get("probes", {}).values()]
    ratios = torch.tensor([values["update_ratio"] for values in probes if "update_ratio" in values]).double()
    return {
        "form": form,
        "measurements": len(ratios),
        "max_ratio": ratios.max().item(),
        "mean_ratio": ratios.mean().item(),
        "violations": int((ratios > 1).sum()),
        "val_loss": summary["val_loss"],
        "steps": summary["step"],
    }


class Silent:
    """Nobody watches the runs of a benchmark."""

    quiet = True

    def begin(self, facts: dict[str, Any]) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...

    def warn(self, message: str) -> None: ...


def bench_bound(
    preset_name: str = "pocket", steps: int | None = None, probe_every: int = 3, seed: int = 0, train_too: bool = True
) -> dict[str, Any]:
    """The adversarial set in every form, and training in the paper's and the certified form.

    Args:
        preset_name: model and rates of the training runs. steps: their length instead of the preset's.
        probe_every: steps between measurements of all matrices.
        seed: of the runs.
        train_too: False leaves the training runs out.
    """
    if probe_every < 1:
        raise ValueError(f"--probe_every must be at least 1, got {probe_every}")
    if steps is not None and steps < probe_every:
        raise ValueError(f"--steps {steps} ends before the first measurement at step {probe_every}")
    runs = [in_training(f, preset_name, steps, probe_every, seed) for f in ("paper", "certified")] if train_too else []
    settings: dict[str, Any] = {"eta": ETA, "shape": [D_OUT, D_IN, R], "preset": preset_name, "steps": steps}
    settings |= {"probe_every": probe_every, "seed": seed, "train_too": train_too}
    return record("bound", settings, adversarial(FORMS), torch.device("cpu"), training=runs)

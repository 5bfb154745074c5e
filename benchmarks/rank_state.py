"""What becomes of AdamW's second moments when ranks change: how far off they are, and what new columns start from.

    python benchmarks/rank_state.py

Shrinking mixes the columns of a pair, G -> G T, and v = E[G^2] cannot know how. Here three linear regressions are
trained by lowrank-adamw; before a change of rank 24 to 12 the gradients of 200 steps are kept, so that the moment
E[(G T)^2] is known, and compared with what the other factor says (`optim.resize`), with v (T * T), as if columns were
uncorrelated, and with the mean of v in each row. Then planted teachers of rank 4, 8 and 16 are learned from rank 4, new
columns starting from zero or from the mean of their row.
"""

import json

import torch

from nativerank.config import AdaptConfig
from nativerank.methods import build_optimizer, factorize
from nativerank.optim import resize
from nativerank.rank.controller import RankController

D, PLANTED, STEPS = 48, (4, 8, 16), 600
RATES = {"lowrank-adamw": 0.01, "sct": 0.02, "tsvd": 0.02}
ADAPT = AdaptConfig(mode="schedule", threshold=0.99, start=0.2, every=0.05, until=0.9, min=1, multiple=4)


class Regression:
    """Layers that learn teachers of the ranks PLANTED (singular values 1 to 2), each from Gaussian inputs."""

    def __init__(self, method: str, rank: int, seed: int):
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.model = torch.nn.ModuleList(torch.nn.Linear(D, D, bias=False) for _ in PLANTED)
        factorize(self.model, method, rank=rank)
        self.targets = [self.teacher(k) for k in PLANTED]
        self.optimizer = build_optimizer(self.model, method, lr=RATES[method])

    def teacher(self, rank: int) -> torch.Tensor:
        U, V = (torch.linalg.qr(torch.randn(D, rank, generator=self.generator))[0] for _ in range(2))
        return (U * torch.linspace(1, 2, rank)) @ V.mT

    def step(self, share: float) -> float:
        """One update at this share of the rate; the loss before it."""
        self.optimizer.set_rate(share)
        x = torch.randn(64, D, generator=self.generator)
        self.optimizer.zero_grad()
        pairs = zip(self.model, self.targets, strict=True)
        loss = torch.stack([(layer(x) - x @ W.mT).square().mean() for layer, W in pairs]).sum()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def off(guess: torch.Tensor, true: torch.Tensor) -> float:
    """Median factor by which a guess is too large or too small."""
    return (guess / true).log().abs().median().exp().item()


def shrinking(seed: int) -> dict[str, float]:
    """How far both guesses are from the moments of the gradients that were, over all factors."""
    run, beta = Regression("lowrank-adamw", 24, seed), 0.95
    for _ in range(100):
        run.step(1.0)
    seen: dict[int, list[torch.Tensor]] = {}
    for _ in range(200):
        run.step(1.0)
        for p in run.model.parameters():
            assert p.grad is not None
            seen.setdefault(id(p), []).append(p.grad.clone())
    found: dict[str, list[float]] = {"other factor": [], "v (T * T)": [], "mean of the row": []}
    for layer in run.model:
        for change in layer.resize(12):
            v = run.optimizer.state[change.parameter]["exp_avg_sq"]
            v = (v.mT if change.down else v).double()
            ours = resize.second_moment(v, change)
            true = torch.zeros(v.shape[0], 12, dtype=torch.float64)
            for grad in seen[id(change.parameter)]:
                G = (grad.mT if change.down else grad).double()
                true.lerp_((G @ change.T).square(), 1 - beta)
            found["other factor"].append(off(ours, true))
            found["v (T * T)"].append(off(v @ change.T.square(), true))
            found["mean of the row"].append(off(v.mean(1, keepdim=True).expand_as(true), true))
    return {name: sum(values) / len(values) for name, values in found.items()}


def growing(method: str, seed: int) -> tuple[float, list[int]]:
    """Last loss and ranks."""
    run = Regression(method, 4, seed)
    controller = RankController(run.model, run.optimizer, ADAPT, STEPS)
    loss = 0.0
    for step in range(1, STEPS + 1):
        loss = run.step(max(0.05, 1 - step / STEPS))
        if controller.due(step):
            controller.look(step)
    return loss, list(controller.ranks.now.values())


def main() -> None:
    print("shrinking, off by a factor of (median):")
    for seed in range(3):
        print(f"  seed {seed}", json.dumps({k: round(v, 2) for k, v in shrinking(seed).items()}))
    second_moment = resize.second_moment
    starts = {
        "as it is": second_moment,
        "zero": lambda v, change: second_moment(v, change._replace(free=True)),
        "mean of the row": lambda v, change: second_moment(v, change._replace(free=False)),
    }
    print("growing, last loss and ranks by what new columns start from:")
    for method in RATES:
        for name, start in starts.items():
            resize.second_moment = start
            for seed in range(3):
                loss, ranks = growing(method, seed)
                print(f"  {method}, {name}, seed {seed}: {loss:.5f} {ranks}")


if __name__ == "__main__":
    main()

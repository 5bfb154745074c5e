"""SCT's rank sweep, each rank at its own best rate, on held-out text; from scratch and from a converted dense model."""

from nativerank.experiments.arms import LR
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.render import table
from nativerank.reproduce.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Verdict

RANKS = (3, 6, 12, 24)
RACES = ("scratch", "converted")
SAME = 0.03  # nats between means that are called one floor


def arm(rank: int) -> str:
    return f"sct[rank.value={rank}]"


def judge(seen: Seen) -> dict[str, Verdict]:
    return {"floor": floor(seen), "middle": middle(seen), "rate": rate(seen)}


def means(seen: Seen, race: str, steps: int) -> dict[int, float]:
    """Mean loss by rank, each at its own best rates."""
    return {rank: mean for rank in RANKS if (mean := seen.mean(race, steps, arm(rank))) is not None}


def floor(seen: Seen) -> Verdict:
    """Whether the largest rank ends where the smallest does."""
    words, apart, same = [], [], []
    for race in RACES:
        for steps in seen.horizons(race):
            d = seen.difference(race, steps, arm(RANKS[0]), arm(RANKS[-1]))
            if d.low is not None:
                apart.append(d.low > 0)
                same.append(d.low <= 0 and abs(d.mean) <= SAME)
                words.append(f"{race}, {steps:,} steps: {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]")
    why = f"loss at rank {RANKS[0]} minus that at rank {RANKS[-1]}, each at its own best rate: " + "; ".join(words)
    if not apart:
        return Verdict(UNTESTABLE, "did not run")
    return Verdict(NOT if all(apart) else REPRODUCED if all(same) else DIRECTION, why)


def middle(seen: Seen) -> Verdict:
    """Whether a rank between the smallest and the largest is best, and resolved below the largest."""
    words, inside = [], []
    for race in RACES:
        for steps in seen.horizons(race):
            found = means(seen, race, steps)
            if len(found) == len(RANKS):
                best = min(found, key=found.__getitem__)
                rest = ", ".join(f"{rank}: {loss:.3f}" for rank, loss in found.items())
                words.append(f"{race}, {steps:,} steps: {rest}")
                d = seen.difference(race, steps, arm(best), arm(RANKS[-1]))
                inside.append(best not in (RANKS[0], RANKS[-1]) and d.high is not None and d.high < 0)
    why = "mean loss by rank: " + "; ".join(words)
    if not inside:
        return Verdict(UNTESTABLE, "did not run")
    return Verdict(REPRODUCED if all(inside) else DIRECTION if any(inside) else NOT, why)


def rate(seen: Seen) -> Verdict:
    """What a rate four times off costs, beside what the rank does."""
    words, larger = [], []
    for steps in seen.horizons("scratch"):
        found = means(seen, "scratch", steps)
        cost = {rank: cost_of_rate(seen, steps, rank) for rank in RANKS}
        known = [value for value in cost.values() if value is not None]
        if len(found) == len(RANKS) and known:
            ranks = max(found.values()) - min(found.values())
            words.append(f"{steps:,} steps: rank {ranks:.3f}, rate {min(known):.3f} to {max(known):.3f}")
            larger.append(min(known) > ranks)
    why = "nats between the best and the worst rank, and what a quarter of the best rate costs: " + "; ".join(words)
    if not larger:
        return Verdict(UNTESTABLE, "did not run")
    return Verdict(REPRODUCED if all(larger) else DIRECTION if any(larger) else NOT, why)


def cost_of_rate(seen: Seen, steps: int, rank: int) -> float | None:
    """Mean loss at a quarter of the best rate, less that at the best one."""
    best, low = (seen.norms("scratch", steps, arm(rank), m) for m in (1.0, 0.25))
    if not best or not low or best["lack"] or low["lack"]:
        return None
    return sum(low["val_losses"]) / len(low["val_losses"]) - sum(best["val_losses"]) / len(best["val_losses"])


def tell(seen: Seen) -> list[str]:
    """The search itself: the first seed's loss at every rate that was tried, by rank."""
    lines = []
    for race in RACES:
        for steps in seen.horizons(race):
            by_rank = {rank: tried(seen, race, steps, rank) for rank in RANKS}
            rates = sorted({lr for losses in by_rank.values() for lr in losses})
            head = ["matrix rate", *(f"rank {rank}" for rank in RANKS)]
            rows = [
                [f"{lr:.3g}", *(f"{found[lr]:.4f}" if lr in found else "-" for found in by_rank.values())]
                for lr in rates
            ]
            lines += [f"{race}, {steps:,} steps, loss of the first seed by rate:", "", *table(head, rows), ""]
    return lines[:-1]


def tried(seen: Seen, race: str, steps: int, rank: int) -> dict[float, float]:
    """Rate -> loss of the first seed."""
    cells = seen.arms(race, steps).get(arm(rank), {}).get("tried", [])
    return {cell[LR]: cell["val_loss"] for cell in cells if cell["seed"] == 0 and "val_loss" in cell}

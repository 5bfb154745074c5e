"""Results as a card's experiments give them, made from losses that a test chooses."""

from nativerank.experiments.arms import LR
from nativerank.reproduce.reading import Seen
from nativerank.reproduce.store import Outcome

SEEDS = (0, 1, 2)
NOISE = (0.0, 0.004, -0.003)  # of a seed, the same for all arms, so that pairs cancel it
JITTER = (0.001, -0.001, 0.0005)


def arm(loss, steps=100, number=0, **changes):
    losses = [loss + noise + number * jitter for noise, jitter in zip(NOISE, JITTER, strict=True)]
    return {
        "method": "spectron",
        "rank": "0.25",
        "steps": steps,
        "tokens": steps * 1024,
        "flops": steps * 1e9,
        "flops_per_token": 1e6,
        "parameters": {"total": 1000, "non_embedding": 500},
        "best": {LR: 0.1, "optim.aux_lr": 0.01, "model.init_scale": 0.5},
        "seeds": list(SEEDS),
        "val_losses": losses,
        "seconds": 2.0,
        "peak_memory_bytes": 10**8,
        "edges": [],
        "diverged": 0,
        "failed": 0,
        "refused": 0,
        "refused_steps_at_best": 0,
        "tried": [],
        **changes,
    }


def at(value, lr=0.1, losses=(3.0, 3.0, 3.0), lack=None):
    """What a probe saw: the same everywhere along the run."""
    quantiles = {
        key: {"median": value, "p90": value, "max": value} for key in ("update_norm", "output_change", "sigma_W")
    }
    course = {"steps": [10, 20], **{key: [value, value] for key in quantiles}}
    return {"lr": lr, "lack": lack, "val_losses": list(losses), "quantiles": [quantiles] * 3, "course": course}


def race(by_horizon, norms=None, budget="tokens"):
    """{steps: {arm: loss or arm}} as a race; norms: {arm: {multiple: at(...)}} at every horizon."""
    horizons = {}
    for steps, losses in by_horizon.items():
        arms = {
            label: loss if isinstance(loss, dict) else arm(loss, steps, number)
            for number, (label, loss) in enumerate(losses.items())
        }
        horizons[str(steps)] = {"arms": arms} | ({"norms": norms} if norms else {})
    return {"budget": budget, "horizons": horizons}


def outcome(races=None, measures=None, sweeps=None, **changes):
    environment = {"torch": "2", "processor": "a processor", "commit": "0" * 40}
    base = {"command": "nativerank reproduce x", "commit": "0" * 40, "config_hash": "c", "code_hash": "h"}
    base |= {"environment": environment, "races": races or {}, "measures": measures or {}, "sweeps": sweeps or {}}
    return Outcome(**{**base, **changes})


def seen(races=None, measures=None, sweeps=None):
    return Seen(outcome(races, measures, sweeps))

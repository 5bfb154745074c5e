"""The rate over a run, as a multiplier of the peak rate; the same shape for every method.

    warmup    rises linearly to 1 over the first `warmup` share of the steps
    cosine    falls along half a cosine to `final_lr` at the last step
    wsd       stays at 1, then falls linearly to `final_lr` over the last `decay` share (warmup-stable-decay)
    constant  stays at 1

A pure function of the step, so that a resumed run needs no scheduler state.
"""

import math


def multiplier(
    step: int,
    steps: int,
    schedule: str = "cosine",
    warmup: float = 0.05,
    decay: float = 0.2,
    final_lr: float = 0.1,
) -> float:
    """The share of the peak rate that update number `step` (0 .. steps - 1) uses.

    Raises:
        ValueError: a share outside [0, 1], or an unknown schedule.
    """
    for name, share in (("warmup", warmup), ("decay", decay), ("final_lr", final_lr)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    last = max(steps - 1, 1)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        done = (step - rising) / max(last - rising, 1)
        return final_lr + (1 - final_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    if schedule == "wsd":
        start = last - round(decay * steps)
        done = (step - start) / max(last - start, 1)
        return 1 - (1 - final_lr) * min(max(done, 0.0), 1.0)
    raise ValueError(f"schedule must be cosine, wsd or constant, got {schedule!r}")

"""The spike guard: sees a loss or a factor norm that jumps, before or after it does harm.

    loss spike    loss > running mean + loss_jump: seen before the update, so the update can be left out ("skip")
                  or the run set back ("rollback")
    sigma spike   a probed factor norm > sigma_factor * its last value: seen after an update, so only setting back
                  to the last checkpoint helps, under either action
    bad gradient  a gradient norm that is not finite while the loss is: left out

A loss that is not finite is no spike: under "rollback" the run is set back, otherwise it stops. After `max_events`
in a row the run stops too, because then the data or the rates are wrong. The running mean is an exponential one
over `window` steps and ignores what was judged a spike; loss spikes are looked for once the first window is over.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from nativerank.config import GuardConfig


class Diverged(ValueError):
    """Training cannot go on; the message says at which step and what to do."""

    exit_code = 3  # of a command that ends by it: unlike bad input, this is a result


@dataclass
class Guard:
    """Judges steps. Its state is a few numbers that a checkpoint keeps."""

    config: GuardConfig
    mean: float = math.nan
    seen: int = 0
    in_a_row: int = 0
    refused: int = 0  # steps of the whole run, also of what was set back
    sigmas: dict[str, float] = field(default_factory=dict)

    def judge_step(self, loss: float, grad_norm: float) -> str | None:
        """None to go on, or what is wrong with this step: "loss_not_finite", "loss_spike" or "gradient_not_finite"."""
        if not math.isfinite(loss):
            return self._event("loss_not_finite")
        if self.config.action == "off":
            return None
        if not math.isfinite(grad_norm):
            return self._event("gradient_not_finite")
        if self._jumps(loss):
            return self._event("loss_spike")
        weight = 1 / min(self.seen + 1, self.config.window)
        self.mean = loss if self.seen == 0 else self.mean + weight * (loss - self.mean)
        self.seen += 1
        self.in_a_row = 0
        return None

    def judge_loss(self, loss: float) -> str | None:
        """What `judge_step` says of a loss whose gradients nobody has seen yet; of a good one nothing is kept."""
        if not math.isfinite(loss):
            return self._event("loss_not_finite")
        return self._event("loss_spike") if self.config.action != "off" and self._jumps(loss) else None

    def judge_norms(self, sigmas: dict[str, float]) -> str | None:
        """None, or "sigma_spike" if a factor norm jumped since the last call."""
        jumped = any(
            not math.isfinite(s) or s > self.config.sigma_factor * self.sigmas[name]
            for name, s in sigmas.items()
            if self.sigmas.get(name, 0) > 0
        )
        if jumped and self.config.action != "off":
            return self._event("sigma_spike")
        self.sigmas = sigmas
        return None

    def may_go_back(self, event: str) -> bool:
        """Whether this event is one to be answered by setting the run back."""
        return self.config.action == "rollback" or event == "sigma_spike"

    def response(self, event: str, checkpoint_exists: bool) -> str:
        """What to do about an event: "skip", "rollback" or "none" (nothing can be done, go on).

        Raises:
            Diverged: nothing sensible is left to do.
        """
        if self.in_a_row > self.config.max_events:
            raise Diverged(f"{self.in_a_row} spikes in a row (last: {event}); lower --optim.lr or look at the data")
        if self.may_go_back(event) and checkpoint_exists:
            return "rollback"
        if event == "loss_not_finite":
            hint = "" if self.config.action == "rollback" else ", or set --guard.action rollback"
            raise Diverged(f"the loss is not finite; lower --optim.lr{hint}")
        return "none" if event == "sigma_spike" else "skip"

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        values = asdict(self)
        del values["config"]
        values["mean"] = None if math.isnan(self.mean) else self.mean
        return values

    def load_state(self, values: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.mean = math.nan if values["mean"] is None else values["mean"]
        self.seen, self.in_a_row, self.refused = values["seen"], values["in_a_row"], values.get("refused", 0)
        self.sigmas = dict(values["sigmas"])

    def _jumps(self, loss: float) -> bool:
        return self.seen >= self.config.window and loss > self.mean + self.config.loss_jump

    def _event(self, name: str) -> str:
        self.in_a_row += 1
        return name

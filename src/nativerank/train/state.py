"""The state of a run: everything that a checkpoint holds, taken up and put down, and the ranks that change in it.

Model, optimizer, data cursor, guard, ranks, the best validation so far and the FLOPs spent. `load` on a freshly built
state gives the bits that `save` saw; `go_back` is `load` with the data going on from where they are.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nativerank.accounting.flops import flops_per_token
from nativerank.config import RunConfig
from nativerank.data.loader import Loader
from nativerank.data.shards import Dataset
from nativerank.distributed.agree import from_each, from_first
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.pieces import local
from nativerank.distributed.rewrap import let_go
from nativerank.models import count_parameters
from nativerank.rank.controller import RankController
from nativerank.train import checkpoint
from nativerank.train.diloco import check_taken_up, outer_of, replicas_apart
from nativerank.train.guard import Diverged, Guard
from nativerank.train.resolve import share_of_batch, tokens_per_step
from nativerank.train.saver import Saver
from nativerank.train.setup import Built, data_fingerprint, gradient_grid, spread
from nativerank.train.teacher import check_same_teacher


class RunState:
    """What the steps of a run change.

    Args:
        complain: is told of checkpoints that are damaged.
        grid: of the processes that train; `save`, `load`, `go_back` and `last_good` are called by all of them.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        dataset: Dataset,
        built: Built,
        complain: Callable[[str], None],
        grid: Grid = SINGLE,
    ) -> None:
        self.config, self.out, self.dataset, self.complain, self.grid = config, out, dataset, complain, grid
        self.model, self.optimizer, self.report = built.model, built.optimizer, built.report
        self.forward, self.uneven, self.teacher = built.forward, built.uneven, built.teacher
        self.optimizer.replaced = self._wrap_anew
        t = config.train
        assert t.steps and t.context and t.batch_size
        self.steps, self.tokens_per_step = t.steps, tokens_per_step(t)
        batch_size, self.accumulation = share_of_batch(t, grid.world)
        self.loader = Loader(dataset.split("train"), t.context, batch_size, t.seed, grid.rank, grid.world)
        self.guard = Guard(config.guard)
        self.step, self.best_loss = 0, float("inf")
        self.best_step: int | None = None
        self.saved_at: int | None = None
        self.rollbacks = 0
        self.outer = outer_of(config, built, grid)
        meeting = self.outer.every if self.outer else 1
        self.ranks = RankController(self.model, self.optimizer, config.rank.adapt, t.steps, t.seed, meeting)
        self.train_flops = 0.0
        self.count_flops()
        self.fingerprint = checkpoint.fingerprint(data_fingerprint(dataset))
        self.saver = Saver(out, grid, t.checkpoint_async, config.parallel.timeout)

    def agreed(self) -> bool:
        """Whether replicas that train on their own have met after this step; others are of one mind."""
        return self.outer is None or self.outer.due(self.step, self.steps)

    # -- ranks and what they cost -----------------------------------------------------------------------------

    def adapt_ranks(self) -> dict[str, Any] | None:
        """Looks at the ranks if it is time; the row of what changed.

        Raises:
            Diverged: a factor that is not finite.
        """
        if not self.ranks.due(self.step):
            return None
        try:
            change = self.ranks.look(self.step)
        except ValueError as error:
            raise Diverged(f"step {self.step}: {error}; lower --optim.lr") from None
        if change is None:
            return None
        if self.outer:
            self.outer.begin()
        # A norm may jump where the factors were balanced: the guard compares with what it sees next.
        self.guard.sigmas = {k: v for k, v in self.guard.sigmas.items() if k.rpartition(".")[0] not in change.ranks}
        self.count_flops()
        return {
            "event": "ranks",
            "step": self.step,
            "ranks": {name: list(pair) for name, pair in change.ranks.items()},
            "energy": change.energy,
            "parameters": count_parameters(self.model),
            "train_flops_per_token": self.flops_of_step(self.alpha()),
        }

    def _wrap_anew(self) -> None:
        """Where gradients are exchanged by hooks on parameters, of which some are others now: hooks on these."""
        if self.forward is not self.model:
            let_go(self.forward)
            self.forward, _ = spread(self.config, self.model, gradient_grid(self.config, self.grid))

    def alpha(self) -> float | None:
        """The weight of the guides, None without any."""
        return None if self.optimizer.guides is None else self.optimizer.guides.alpha

    def count_flops(self) -> None:
        """Training FLOPs per token of the model as it is, without its guides and with all of them, and of a teacher."""
        context = self.config.train.context
        assert context
        taught = flops_per_token(self.teacher.model, context).forward if self.teacher else 0.0
        self.flops_bounds = tuple(
            flops_per_token(self.model, context, guided).training + taught for guided in (0.0, 1.0)
        )

    def flops_of_step(self, alpha: float | None) -> float:
        """Training FLOPs per token of a step whose guides have this weight; a stochastic one is computed as often."""
        low, high = self.flops_bounds
        return low + (high - low) * (1.0 if alpha and not self.config.guide.stochastic else alpha or 0.0)

    # -- checkpoints ------------------------------------------------------------------------------------------

    def save(self, val_loss: float | None = None) -> None:
        """Saves, keeps the newest few and the best of those that were validated.

        With `train.checkpoint_async` the checkpoint is there after `saver.wait()` or at the next save.

        Raises:
            Diverged: a weight that is not finite; nothing is saved then.
            ValueError: the disk is full, now or in the save before.
        """
        self.saver.wait()
        if not all(from_each(self.grid, self._finite)):
            raise Diverged(
                f"step {self.step}: the weights are not finite any more; lower --optim.lr; "
                f"{described(self.last_good())}"
            )
        if val_loss is not None and val_loss < self.best_loss:
            self.best_loss, self.best_step = val_loss, self.step
        prune = partial(checkpoint.prune, self.out, self.step, self.config.train.keep, self.best_step)
        self.saver.save(self.step, self._tensors(), self._plain(), prune)
        self.rollbacks, self.saved_at = 0, self.step

    def _finite(self) -> bool:
        """Whether what this process holds of the weights is."""
        weights = [w for p in self.model.parameters() if (w := local(p).detach()).numel()]
        if not weights:
            return True
        largest = torch._foreach_norm(weights, math.inf)  # of the entries, so it does not overflow; one look at all
        return bool(torch.stack([n.isfinite() for n in largest]).all())

    def _tensors(self) -> checkpoint.Contents:
        """The tensors of a checkpoint, as far as this process holds them."""
        return checkpoint.contents(self.model, self.outer or self.optimizer, self.grid)

    def _plain(self) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors."""
        return {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loader": self.loader.state(),
            "guard": self.guard.state(),
            "ranks": self.ranks.state(),
            "train_flops": self.train_flops,
            "best": {"loss": None if self.best_step is None else self.best_loss, "step": self.best_step},
            "data": self.fingerprint,
            "teacher": self.teacher.fingerprint if self.teacher else None,
            "optimizers": replicas_apart(self.outer),
        }

    def load(self, path: Path, stored: dict[str, Any] | None = None) -> None:
        """Takes up a checkpoint, whose state.json may be at hand.

        Raises:
            ValueError: one of another model or of other data.
        """
        if stored is None:
            stored = from_first(self.grid, lambda: checkpoint.read_state(path))
        check_taken_up(stored, self.outer, str(path))
        if self.optimizer.guides is not None:
            self.optimizer.guides.set(stored["step"])
        self.ranks.restore(stored["ranks"], str(path))
        if self.outer:
            self.outer.begin(forget=True)
        state = checkpoint.load(path, self.model, self._tensors(), self.grid, self.config.train.seed)
        self.optimizer.loaded()
        if self.outer:
            self.outer.begin()
        self.train_flops = state["train_flops"]
        self.count_flops()
        if state["data"] != self.fingerprint:
            raise ValueError(f"{path} was trained on other data than {self.dataset.path} holds")
        self.step = state["step"]
        self.loader.load_state(state["loader"])
        self.guard.load_state(state["guard"])
        best = state["best"]
        self.best_step, self.best_loss = best["step"], float("inf") if best["loss"] is None else best["loss"]

    def resume(self, path: Path, newest: checkpoint.Checkpoint | None) -> None:
        """Takes up a checkpoint from which this run folder, whose newest is given, can go on."""
        stored = from_first(self.grid, lambda: checkpoint.read_state(path))
        if path.resolve().is_relative_to(self.out.resolve()):  # a branch may learn from whom it likes
            check_same_teacher(stored["teacher"], self.teacher, str(path))
        self.load(path, stored)
        if self.step > self.steps:
            raise ValueError(f"{path} is at step {self.step}, beyond --train.steps {self.steps}")
        if newest and newest.step > self.step:
            raise ValueError(f"{self.out} goes on to {newest.path.name} after {path}; branch off into another --out")
        self.saved_at = self.step if newest and newest.step == self.step else None

    def go_back(self, path: Path) -> None:
        """Sets the run back to a checkpoint of its own; what the guard has seen in a row stays counted."""
        cursor, in_a_row, refused = self.loader.state(), self.guard.in_a_row, self.guard.refused
        self.load(path)
        # The data go on from where the spike was: replaying the same batches would replay the spike.
        self.loader.load_state(cursor)
        self.guard.in_a_row, self.guard.refused, self.rollbacks = in_a_row, refused, self.rollbacks + 1
        self.saved_at = self.step

    def last_good(self) -> checkpoint.Checkpoint | None:
        """The newest checkpoint that is usable, None if none is; the one in flight, if any, comes to its end first."""
        self.saver.wait()
        try:
            return checkpoint.newest_usable(self.out, self.complain, self.grid)
        except ValueError:
            return None


def described(last: checkpoint.Checkpoint | None) -> str:
    """Where to go on from after a run that stopped, in words."""
    return f"the last good checkpoint is {last.path}" if last else "there is no checkpoint yet"

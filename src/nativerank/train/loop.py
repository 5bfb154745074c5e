"""The training loop.

Fill in the configuration, open the data, build the model and optimizer, take up a checkpoint if there is one. Then
for each step: set the rate, read the micro-batches, forward and backward, let the guard look at the loss, update,
record. At intervals probe what the step changed, validate, save. At the end save, validate on the whole split, export.

A run is a function of its configuration and data: step, data cursor, guard and random state are in every checkpoint,
the rate is a function of the step, so a run that was killed and resumed ends with the same bits (on one machine, at
one thread count). SIGINT and SIGTERM finish the step, save, and raise `Interrupted`; so they do in the validation at
the end, which a resumed run then makes again.

Under torchrun the same loop runs in every process (`distributed.start`): each reads its part of the batch, and whatever
decides what happens next (loss, norm, guard, signals, checkpoints) is the same on all of them to the last bit. The
first process alone writes records and the run folder and speaks to a person.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nativerank.config import RunConfig, flat
from nativerank.data.loader import document_positions
from nativerank.data.shards import Dataset
from nativerank.distributed.agree import Agreed, equal, from_first, together
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.distributed.start import start
from nativerank.distributed.watch import Watch, watching
from nativerank.evaluate.loss import Loss, check_document_mask, check_loss, validation_loss
from nativerank.evaluate.probes import Probe, fixed_batch, probed_names
from nativerank.layers import init_seed
from nativerank.linalg.scope import part
from nativerank.optim.schedule import multiplier
from nativerank.train import checkpoint
from nativerank.train.answers import GuardedRun
from nativerank.train.closing import export, sample_text, training_of
from nativerank.train.compiled import compile_blocks
from nativerank.train.diloco import check_diloco
from nativerank.train.facts import start_facts, step_row, summary_row, utilization
from nativerank.train.folder import claim, write_config
from nativerank.train.guard import Diverged
from nativerank.train.listen import Listener, Silence
from nativerank.train.profile import LEAST, Profiler
from nativerank.train.resolve import check_parallel, resolve
from nativerank.train.setup import Built, build, check_same_data, open_data, versions
from nativerank.train.signals import Interrupted, Stopping, catch_signals
from nativerank.train.step import Batch, StepResult, layerwise_step, to_device, train_step
from nativerank.train.trackers import check_tracker


def train(config: RunConfig, listener: Listener) -> dict[str, Any]:
    """Runs a configuration to its end and returns the summary (also the last row of metrics.jsonl).

    Every process that torchrun started calls this; all of them return or raise.

    Raises:
        ValueError: anything wrong with the configuration, data or checkpoint, before a step is made.
        Diverged: the loss left the road for good.
        Interrupted: a signal came; everything is saved.
    """
    own_name = bool(config.out)
    with together():
        config = resolve(config)
        check_tracker(config.track)
    settings = {key: value for key, value in flat(config).items() if key != "out"}
    equal(settings | {package: versions()[package] for package in ("nativerank", "torch", "transformers")})
    p = config.parallel
    with ExitStack() as stack:
        device_type, shared = config.device or "cpu", (Agreed, Interrupted, Diverged)
        grid = stack.enter_context(start(p.mode, p.replicas, p.shards, device_type, p.timeout, shared))
        watch = stack.enter_context(watching(p.timeout, shared))
        with together(grid):
            check_parallel(config, grid)
            check_diloco(config, grid)
        config = from_first(grid, lambda: stack.enter_context(claim(config, own_name)))
        out, listener = Path(config.out or ""), listener if grid.rank == 0 else Silence()
        with together(grid):
            dataset = open_data(config, listener.quiet)
        check_same_data(dataset, grid)
        damaged: list[str] = []
        origin, newest = checkpoint.find(out, config.resume, damaged.append, grid)
        built = build(config, dataset, origin is None, grid)
        device = next(built.model.parameters()).device
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(init_seed(config.train.seed, f"training {grid.rank}" if grid.rank else "training"))  # dropout
        with together(grid):
            run = Run(config, out, dataset, built, listener, grid)
            run.watch = watch
            stack.callback(run.close)
            run.begin(origin, newest, damaged)
        stopping = Stopping(stack.enter_context(catch_signals()), grid)
        try:
            return run.to_the_end(stopping)
        except Diverged as error:  # on all of them, and one speaks
            if grid.rank == 0:
                raise
            raise Agreed(str(error), True, error.exit_code) from error


class Run(GuardedRun):
    """One run on its way: its state, and the means to go on from there."""

    def __init__(
        self, config: RunConfig, out: Path, dataset: Dataset, built: Built, listener: Listener, grid: Grid = SINGLE
    ):
        super().__init__(config, out, dataset, built, listener, grid)
        self.device = next(self.model.parameters()).device
        t = config.train
        assert t.context
        names = probed_names(self.model, t.probe)
        self.probe = Probe(self.model, names, fixed_batch(dataset.split("val"), t.context), grid)
        self.watch = Watch()
        self.started = time.perf_counter()
        self.stepped_flops, self.stepped_seconds = 0.0, 0.0  # of the steps made here
        self.profiler: Profiler | None = None

    def begin(self, origin: Path | None, newest: checkpoint.Checkpoint | None, damaged: list[str]) -> None:
        """Takes up a checkpoint, if there is one, and makes the run folder's files.

        Args:
            origin: the checkpoint, checked. newest: the run folder's newest.
            damaged: what to say about checkpoints that had to be passed over.
        """
        config, out = self.config, self.out
        if origin:
            self.resume(origin, newest)
        if config.data.document_mask:
            check_document_mask(self.model)
        check_loss(self.model, config.train.loss)
        if self.grid.rank == 0:
            write_config(config, out)
            self._open_trackers()
        for message in damaged:
            self._complain(message)
        if config.compile:
            compile_blocks(self.model, self.listener.warn)
            if self.teacher:
                compile_blocks(self.teacher.model, self.listener.warn)
        self.profiler = self._profiler() if config.profile and self.grid.rank == 0 else None
        if self.grid.rank == 0:
            facts = start_facts(self, self.device, origin) | self.tracked()
            for tracker in self.trackers:
                tracker.row(facts)
            self.listener.begin(facts)

    def _profiler(self) -> Profiler | None:
        if self.steps - self.step < LEAST:
            self.listener.warn(
                f"profile: it takes {LEAST} steps or more, and {self.steps - self.step} are to come: none"
            )
            return None
        c, tokens = self.config, self.tokens_per_step // self.grid.world
        facts: dict[str, Any] = {
            "model": c.init or c.model.config or c.model.preset,
            "method": c.method,
            "compile": c.compile,
        }
        facts |= {"recompute": c.train.recompute, "tokens": tokens, "environment": versions()}
        assert c.train.context
        return Profiler(self.out / "profile", self.model, c.train.context, tokens, c.compile, facts)

    # -- the loop ---------------------------------------------------------------------------------------------

    def to_the_end(self, stopping: Stopping) -> dict[str, Any]:
        """Steps until the last one; returns the summary."""
        t = self.config.train

        def due(every: int, row: dict[str, Any]) -> bool:
            """Not after a rollback: the step it went back to has had its turn."""
            return bool(every) and self.step % every == 0 and "rolled_back_to" not in row

        while self.step < self.steps:
            with self.watch.in_step(self.step + 1):
                row = self._one_step(stopping)
            if not self.agreed():
                self._record(row)
                continue
            # Not after a rollback: the step it went back to has had its look.
            changed = None if "rolled_back_to" in row else self.adapt_ranks()
            if due(t.eval_every, row) and self.step < self.steps:
                row["val_loss"] = self._validate(t.eval_tokens).nats
            self._record(row)
            if changed:
                self._record(changed)
            if due(t.checkpoint_every, row) or self.step >= self.steps or stopping() is not None:
                if self.saved_at != self.step:
                    self.save(row.get("val_loss"))
            self._heed(stopping)
        if self.profiler:
            self.profiler.close()
        return self._finish(stopping)

    def _heed(self, stopping: Stopping) -> None:
        """Ends the run, whose last step is saved, if a signal came."""
        if (signum := stopping()) is not None:
            self.saver.wait()
            self._record({"event": "interrupted", "step": self.step})
            raise Interrupted(signum, self.step, self.out)

    def _one_step(self, stopping: Stopping) -> dict[str, Any]:
        """One update, or one that the guard refused, probed at its interval; advances the step and returns the row."""
        t, o = self.config.train, self.config.optim
        before = self.probe.before() if t.probe_every and (self.step + 1) % t.probe_every == 0 else None
        began = time.perf_counter()
        rate = multiplier(self.step, self.steps, o.schedule, o.warmup, o.decay, o.final_lr)
        self.optimizer.set_rate(rate)
        measured = self.device.type != "cuda" or before is not None
        guides = self.optimizer.guides
        alpha = self.alpha()
        unsaved = float(self.saver.failed)
        result, verdict = self._update(measured, [*stopping.votes(), unsaved])
        stopping.hear(result.votes)
        if (result.votes or [unsaved])[-1]:
            self.saver.wait()  # raises what went wrong, on all processes
        self.step += 1
        flops = self.tokens_per_step * self.flops_of_step(alpha)
        self.train_flops += flops
        if not result.updated:
            self.guard.refused += 1
            if guides is not None:
                guides.set(self.step)  # a step that the optimizer did not see
        if self.profiler:
            self.profiler.step()
        seconds = time.perf_counter() - began
        self.stepped_flops, self.stepped_seconds = self.stepped_flops + flops, self.stepped_seconds + seconds
        row = step_row(self, result, alpha, rate, seconds, measured) | utilization(self, flops, seconds)
        if verdict:
            self._respond(verdict, row)
        if before is not None and "rolled_back_to" not in row:
            records = self.optimizer.records() if result.updated else {}
            row["probes"] = self.probe.after(before, row["lr"], records)
            self._judge_norms(row)
        if self.outer is not None and "rolled_back_to" not in row:
            self.outer.budget += row["lr"] if result.updated else 0.0
            if self.agreed():
                row["outer"] = self.outer.step().row(self.probe.weights)
        return row

    def _update(self, measured: bool, votes: list[float]) -> tuple[StepResult, str | None]:
        """Forward, backward and the optimizer; and what the guard said if it refused."""
        verdict: list[str] = []

        def accepted(event: str | None) -> bool:
            verdict.extend([event] if event else [])
            return event is None

        def accept(loss: float, grad_norm: float) -> bool:
            return accepted(self.guard.judge_step(loss, grad_norm))

        def accept_loss(loss: float) -> bool:
            return accepted(self.guard.judge_loss(loss))

        optimizer, batches, clip = self.optimizer, self._batches(), self.config.optim.clip
        if optimizer.layerwise is None:
            result = train_step(
                self.forward,
                optimizer,
                batches,
                self.accumulation,
                clip,
                accept=accept,
                time_phases=measured,
                grid=self.grid,
                apart=self.outer is not None,
                votes=votes,
                teacher=self.teacher,
                chunked=self.config.train.loss != "whole",
            )
        else:
            result = layerwise_step(
                self.model,
                optimizer,
                batches,
                accept_loss,
                accept,
                refuse=self.guard.config.action != "off",
                time_phases=measured,
                teacher=self.teacher,
                chunked=self.config.train.loss != "whole",
            )
        return result, verdict[0] if verdict else None

    def _batches(self) -> Iterator[Batch]:
        for _ in range(self.accumulation):
            self.watch.mark()
            with part("data"):
                inputs, targets = self.loader.next()
                positions = None
                if self.config.data.document_mask:
                    positions = to_device(document_positions(inputs, self.dataset.eot_id), self.device)
                batch = to_device(inputs, self.device), to_device(targets, self.device), positions
            yield batch

    # -- validation and records -------------------------------------------------------------------------------

    def _validate(self, max_tokens: int | None, between: Callable[[], None] = lambda: None) -> Loss:
        t = self.config.train
        assert t.context and t.batch_size
        return validation_loss(
            self.model,
            self.dataset.split("val"),
            t.context,
            t.batch_size,
            max_tokens=max_tokens,
            mask_eot=self.dataset.eot_id if self.config.data.document_mask else None,
            between=between,
            grid=self.grid,
        )

    # -- begin and end ----------------------------------------------------------------------------------------

    def _finish(self, stopping: Stopping) -> dict[str, Any]:
        """The whole validation split, the factored export, a sample, the summary.

        The loss on the whole split is not compared with those on a part of it, so it says nothing about the best.
        """
        if self.saved_at != self.step:  # this run took up the last step of another one
            self.save()

        def heed() -> None:
            stopping.ask()
            self._heed(stopping)

        loss = self._validate(None, heed)
        self.saver.wait()
        training = training_of(self.config, self.dataset, loss, self.step, self.step * self.tokens_per_step)
        export(self.model, self.out, self.dataset, self.grid, training)
        prompt, sample = sample_text(self.model, self.dataset, self.config, self.grid)
        seconds = time.perf_counter() - self.started
        reached = utilization(self, self.stepped_flops, self.stepped_seconds)
        summary = from_first(self.grid, lambda: summary_row(self, self.device, loss, prompt, sample, seconds) | reached)
        if self.profiler and self.profiler.rows:
            summary["profile"] = str(self.profiler.folder)
        for tracker in self.trackers:
            tracker.row(summary)
        return summary

    def close(self) -> None:
        """Ends the records, and the save in flight if there is one."""
        self.saver.close()
        if self.profiler:
            self.profiler.close()
        for tracker in reversed(self.trackers):  # the record last: it keeps what goes wrong with a service
            tracker.close()

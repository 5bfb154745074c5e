"""The training loop.

Fill in the configuration, open the data, build the model and optimizer, take up a checkpoint if there is one. Then
for each step: set the rate, read the micro-batches, forward and backward, let the guard look at the loss, update,
record. At intervals validate, probe the factors, save. At the end validate on the whole split, save, export.

A run is a function of its configuration and data: step, data cursor, guard and random state are in every checkpoint,
the rate is a function of the step, so a run that was killed and resumed ends with the same bits (on one machine, at
one thread count). SIGINT and SIGTERM finish the step, save, and raise `Interrupted`.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from tokenizers import Tokenizer
from torch import nn

from nativerank.config import RunConfig, differences, from_dict, to_dict
from nativerank.data.loader import Loader, document_positions
from nativerank.data.shards import Dataset
from nativerank.evaluate.loss import Loss, validation_loss, xz_bits_per_byte
from nativerank.evaluate.probes import probe, probed_names
from nativerank.hub.generate import generate
from nativerank.hub.save import save as save_model
from nativerank.models import count_parameters
from nativerank.optim.schedule import multiplier
from nativerank.train import checkpoint
from nativerank.train.guard import Diverged, Guard
from nativerank.train.metrics import JsonLines, TensorBoard, Tracker
from nativerank.train.profile import Profiler
from nativerank.train.setup import (
    Built,
    build,
    data_fingerprint,
    open_data,
    resolve,
    tokens_per_step,
    versions,
)
from nativerank.train.step import Batch, train_step

CONFIG = "config.yaml"
# What may differ between a run and its continuation: none of it changes the next step's numbers, except the number
# of steps, through the schedule, which is how a finished run is extended.
FREE: tuple[str, ...] = (
    "out",
    "resume",
    "device",
    "compile",
    "track",
    "profile",
    "data.path",
    "guard",
    "train.steps",
    "train.tokens",
)
FREE += ("train.eval_every", "train.eval_tokens", "train.checkpoint_every", "train.keep", "train.probe_every")


class Listener(Protocol):
    """Who shows the run to a person."""

    def begin(self, facts: dict[str, Any]) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...

    def say(self, message: str) -> None: ...


class Interrupted(Exception):
    """A signal ended the run after a saved step."""

    def __init__(self, signum: int, step: int, out: Path):
        super().__init__(f"stopped after step {step}")
        self.signum, self.step, self.out = signum, step, out


def train(config: RunConfig, listener: Listener) -> dict[str, Any]:
    """Runs a configuration to its end and returns the summary (also the last row of metrics.jsonl).

    Raises:
        ValueError: anything wrong with the configuration, data or checkpoint, before a step is made.
        Diverged: the loss left the road for good.
        Interrupted: a signal came; everything is saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this version trains in one process; start nativerank train without torchrun")
    config = resolve(config)
    assert config.out is not None
    out = Path(config.out)
    refuse_or_resume(config, out)
    dataset = open_data(config)
    built = build(config, dataset)
    run = Run(config, out, dataset, built, listener)
    with ExitStack() as stack:
        stack.callback(run.close)
        stopping = stack.enter_context(catch_signals())
        return run.to_the_end(stopping)


def refuse_or_resume(config: RunConfig, out: Path) -> None:
    """Decides whether the run folder may be used.

    Raises:
        ValueError: it holds another run, or a run and resuming was not asked for.
    """
    if not out.exists() or not any(out.iterdir()):
        if config.resume not in ("auto", "never") and not Path(config.resume).is_dir():
            raise ValueError(f"--resume {config.resume}: no such checkpoint folder")
        return
    if not (out / CONFIG).is_file():
        raise ValueError(f"{out} exists and is not a run folder; choose another --out")
    if config.resume == "never":
        raise ValueError(f"{out} already holds a run; continue it with --resume auto, or choose another --out")
    before = from_dict(RunConfig, yaml.safe_load((out / CONFIG).read_text(encoding="utf-8")))
    changed = [key for key in differences(before, config) if not key.startswith(FREE)]
    if changed:
        raise ValueError(f"{out} holds another run: {', '.join(changed)} differ; choose another --out")


@contextmanager
def catch_signals() -> Iterator[Callable[[], int | None]]:
    """While inside, SIGINT and SIGTERM are remembered instead of obeyed; a second one acts at once."""
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def remember(signum: int, frame: Any) -> None:
        caught.append(signum)
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            previous[wanted] = signal.signal(wanted, remember)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        previous.clear()
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Run:
    """The moving parts of one run: what a checkpoint holds, and the means to go on from there."""

    def __init__(self, config: RunConfig, out: Path, dataset: Dataset, built: Built, listener: Listener):
        self.config, self.out, self.dataset, self.listener = config, out, dataset, listener
        self.model, self.optimizer, self.report = built.model, built.optimizer, built.report
        self.device = next(self.model.parameters()).device
        t = config.train
        assert t.steps and t.context and t.batch_size
        self.steps, self.tokens_per_step = t.steps, tokens_per_step(t)
        self.loader = Loader(dataset.split("train"), t.context, t.batch_size, t.seed)
        self.guard = Guard(config.guard)
        self.step, self.best_loss = 0, float("inf")
        self.best_step: int | None = None
        self.rollbacks = 0
        self.fingerprint = checkpoint.fingerprint(data_fingerprint(dataset))
        self.probed = probed_names(self.model)
        self.started = time.perf_counter()
        resumed = self._resume()
        out.mkdir(parents=True, exist_ok=True)
        self._write_config()
        self.trackers: list[Tracker] = [JsonLines(out, self.step)]
        if config.track == "tensorboard":
            self.trackers.append(TensorBoard(out))
        if config.compile:
            compile_blocks(self.model)
        self.profiler = Profiler(out, self.device) if config.profile else None
        self._announce(resumed)

    # -- the loop ---------------------------------------------------------------------------------------------

    def to_the_end(self, stopping: Callable[[], int | None]) -> dict[str, Any]:
        """Steps until the last one; returns the summary."""
        t = self.config.train
        saved_at = self.step if self.step else -1
        while self.step < self.steps:
            row = self._one_step()
            if self.probed and t.probe_every and self.step % t.probe_every == 0:
                self._probe(row)
            if t.eval_every and self.step % t.eval_every == 0 and self.step < self.steps:
                row["val_loss"] = self._validate(t.eval_tokens).nats
                self._remember_best(row["val_loss"])
            self._record(row)
            if t.checkpoint_every and self.step % t.checkpoint_every == 0 and self.step < self.steps:
                self._save()
                saved_at = self.step
            if (signum := stopping()) is not None and self.step < self.steps:
                if saved_at != self.step:
                    self._save()
                self._record({"event": "interrupted", "step": self.step})
                raise Interrupted(signum, self.step, self.out)
        return self._finish(saved_at)

    def _one_step(self) -> dict[str, Any]:
        """One update, or one that the guard refused; advances the step counter and returns the row."""
        t, o = self.config.train, self.config.optim
        began = time.perf_counter()
        rate = multiplier(self.step, self.steps, o.schedule, o.warmup, o.decay, o.final_lr)
        self.optimizer.set_rate(rate)
        measured = self.device.type != "cuda" or bool(t.probe_every and (self.step + 1) % t.probe_every == 0)
        verdict: list[str] = []

        def accept(loss: float, grad_norm: float) -> bool:
            event = self.guard.judge_step(loss, grad_norm)
            if event:
                verdict.append(event)
            return event is None

        result = train_step(
            self.model, self.optimizer, self._batches(), t.accumulation, o.clip, accept, time_phases=measured
        )
        self.step += 1
        if self.profiler:
            self.profiler.step()
        seconds = time.perf_counter() - began
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loss": result.loss,
            "lr": (o.lr or 0) * rate,
            "aux_lr": (o.aux_lr or 0) * rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": self.tokens_per_step / seconds,
            "seconds": seconds,
        }
        if measured:
            row["optimizer_share"] = result.seconds["optimizer"] / sum(result.seconds.values())
        if self.device.type == "cuda":
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if verdict:
            self._respond(verdict[0], row)
        return row

    def _batches(self) -> Iterator[Batch]:
        for _ in range(self.config.train.accumulation):
            inputs, targets = self.loader.next()
            positions = None
            if self.config.data.document_mask:
                positions = torch.from_numpy(document_positions(inputs, self.dataset.eot_id)).to(self.device)
            yield torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device), positions

    # -- the guard --------------------------------------------------------------------------------------------

    def _respond(self, event: str, row: dict[str, Any]) -> None:
        """Acts on an event: notes it in the row, and sets the run back if that is the answer."""
        last = checkpoint.newest_usable(self.out, self.listener.say)
        try:
            answer = self.guard.response(event, last is not None)
            if answer == "rollback" and self.rollbacks >= self.config.guard.max_events:
                raise Diverged(f"{self.rollbacks} rollbacks to step {last.step if last else 0}; lower --optim.lr")
        except Diverged as error:
            row.update(event=event, action="stop")
            self._record(row)
            good = f"the last good checkpoint is {last.path}" if last else "there is no checkpoint yet"
            raise Diverged(f"step {self.step}: {error}; {good}") from None
        row.update(event=event, action=answer)
        self.listener.say(f"step {self.step}: {event.replace('_', ' ')} (loss {row['loss']:.3f}): {answer}")
        if answer == "rollback" and last is not None:
            cursor, in_a_row = self.loader.state(), self.guard.in_a_row
            self._load(last.path)
            # The data go on from where the spike was: replaying the same batches would replay the spike.
            self.loader.load_state(cursor)
            self.guard.in_a_row, self.rollbacks = in_a_row, self.rollbacks + 1
            row["rolled_back_to"] = self.step

    def _probe(self, row: dict[str, Any]) -> None:
        records = self.optimizer.records()
        row["probes"] = probe(self.model, self.probed)
        sigmas = {f"{n}.{k}": v[k] for n, v in row["probes"].items() for k in ("sigma_A", "sigma_B")}
        for name, values in row["probes"].items():
            if name in records:
                values["rho"] = records[name]["rho"]
        if event := self.guard.judge_norms(sigmas):
            self._respond(event, row)

    # -- validation, records, checkpoints ---------------------------------------------------------------------

    def _validate(self, max_tokens: int | None) -> Loss:
        t = self.config.train
        assert t.context and t.batch_size
        return validation_loss(
            self.model,
            self.dataset.split("val"),
            t.context,
            t.batch_size,
            max_tokens=max_tokens,
            mask_eot=self.dataset.eot_id if self.config.data.document_mask else None,
        )

    def _remember_best(self, loss: float) -> None:
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step

    def _record(self, row: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.row(row)
        self.listener.row(row)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loader": self.loader.state(),
            "guard": self.guard.state(),
            "best": {"loss": None if self.best_step is None else self.best_loss, "step": self.best_step},
            "data": self.fingerprint,
        }

    def _save(self) -> None:
        checkpoint.save(self.out, self.step, self.model, self.optimizer, self._state())
        checkpoint.prune(self.out, self.config.train.keep, self.best_step)
        self.rollbacks = 0

    def _load(self, path: Path) -> None:
        state = checkpoint.load(path, self.model, self.optimizer)
        if state["data"] != self.fingerprint:
            raise ValueError(f"{path} was trained on other data than {self.dataset.path} holds")
        self.step = state["step"]
        self.loader.load_state(state["loader"])
        self.guard.load_state(state["guard"])
        best = state["best"]
        self.best_step, self.best_loss = best["step"], float("inf") if best["loss"] is None else best["loss"]

    def _resume(self) -> Path | None:
        if self.config.resume == "never":
            return None
        if self.config.resume != "auto":
            path = Path(self.config.resume)
        else:
            usable = checkpoint.newest_usable(self.out, self.listener.say)
            if usable is None:
                return None
            path = usable.path
        self._load(path)
        if self.step > self.steps:
            raise ValueError(f"{path} is at step {self.step}, beyond --train.steps {self.steps}")
        return path

    def _write_config(self) -> None:
        header = "".join(f"# {name}: {value}\n" for name, value in versions().items())
        text = header + yaml.safe_dump(to_dict(replace(self.config, out=str(self.out))), sort_keys=False)
        partial = self.out / f".{CONFIG}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.out / CONFIG)

    # -- begin and end ----------------------------------------------------------------------------------------

    def _announce(self, resumed: Path | None) -> None:
        c = self.config
        facts = {
            "event": "resume" if resumed else "start",
            "step": self.step,
            "method": c.method,
            "model": c.model.config or c.model.preset,
            "parameters": count_parameters(self.model),
            "factorized": len(self.report.ranks) if self.report else 0,
            "warnings": [f"{e.name}: {e.warning}" for e in self.report.entries if e.warning] if self.report else [],
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "train_tokens": self.dataset.split("train").tokens,
            "lr": c.optim.lr,
            "aux_lr": c.optim.aux_lr,
            "device": str(self.device),
            "out": str(self.out),
            "environment": versions(),
        }
        if resumed:
            facts["checkpoint"] = str(resumed)
        for tracker in self.trackers:
            tracker.row(facts)
        self.listener.begin(facts)

    def _finish(self, saved_at: int) -> dict[str, Any]:
        """The whole validation split, the last checkpoint, the factored export, a sample, the summary."""
        loss = self._validate(None)
        self._remember_best(loss.nats)
        if saved_at != self.step:
            self._save()
        tokenizer = self.dataset.tokenizer()
        self._export(tokenizer)
        val = self.dataset.split("val")
        ids = val.read(0, val.tokens)
        text: str = tokenizer.decode([int(i) for i in ids if i != self.dataset.eot_id], skip_special_tokens=False)
        prompt = tokenizer.decode([int(i) for i in ids[1:17]])
        summary = {
            "event": "end",
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "val_loss": loss.nats,
            "perplexity": loss.perplexity,
            "bits_per_byte": loss.bits_per_byte,
            "xz_bits_per_byte": xz_bits_per_byte(text.encode()),
            "val_tokens": loss.tokens,
            "prompt": prompt,
            "sample": generate(self.model, tokenizer, prompt, eot_id=self.dataset.eot_id, seed=self.config.train.seed),
            "seconds": time.perf_counter() - self.started,
            "out": str(self.out),
        }
        for tracker in self.trackers:
            tracker.row(summary)
        return summary

    def _export(self, tokenizer: Tokenizer) -> None:
        """model/: written beside and renamed, so that extending a finished run replaces it whole."""
        fresh, final = self.out / ".model-new", self.out / "model"
        shutil.rmtree(fresh, ignore_errors=True)
        save_model(self.model, fresh, tokenizer=tokenizer)
        shutil.rmtree(final, ignore_errors=True)
        fresh.rename(final)

    def close(self) -> None:
        """Ends the records."""
        if self.profiler:
            self.profiler.close()
        for tracker in self.trackers:
            tracker.close()


def compile_blocks(model: nn.Module) -> None:
    """torch.compile of each repeated block: the members of the first ModuleList, which share one compilation."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile()
            return

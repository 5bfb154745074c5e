"""What was trained, from wherever it lies: one function for every command that uses a model.

    RUN, finished             its model/
    RUN, else or with a step  the newest complete checkpoint (or that of the step); a damaged one is named and passed by
    .../checkpoints/step-N    that checkpoint, which is refused if it is damaged
    a model folder            factored or stock, as `nativerank.hub.load` reads it

A checkpoint holds weights alone, as many files as there were processes. What they belong to says the run's config.yaml:
the architecture is built on the meta device, brought to the ranks that the checkpoint names, given memory and filled.
Nothing of the optimizer is read. The data folder is asked for the tokenizer only, so a run that was moved without its
data can still be used, then without a tokenizer.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from nativerank.config import RunConfig
from nativerank.data.demo import prepared_demo
from nativerank.data.shards import Dataset, read_manifest
from nativerank.data.tokenizer import load_tokenizer, tokenizer_hash
from nativerank.distributed.pieces import Piece
from nativerank.hub.card import Training, read_training
from nativerank.hub.load import CONFIG as MODEL_CONFIG
from nativerank.hub.load import TOKENIZER, load, look, outline
from nativerank.hub.weights import named_tensors
from nativerank.layers.base import factor_layers
from nativerank.layers.guided import guided_layers
from nativerank.models import allocate, find_preset
from nativerank.rank.follow import stored_rank
from nativerank.train import checkpoint
from nativerank.train.closing import training_of
from nativerank.train.kept_config import CONFIG as RUN_CONFIG
from nativerank.train.kept_config import read_config
from nativerank.train.metrics import FILE as METRICS
from nativerank.train.metrics import read_rows
from nativerank.train.piece_files import Stored
from nativerank.train.setup import data_fingerprint, name_end_of_text, new_skeleton

CHECKPOINTS = "checkpoints"  # in a run folder
Complain = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """A model that can be used.

    Attributes:
        model: in evaluation mode on the CPU, float32.
        tokenizer: None where none is known.
        folder: that of the weights: a model folder or a checkpoint.
        label: for people, such as "runs/a at step 300".
        data: the prepared folder that it was trained on, None where that is not known or no longer the same.
        training: how it was trained, for its model card; None where nothing says so.
        context: tokens of the windows that a run was trained with; None of a model folder, also where it lies in a run.
        document_mask: whether attention restarted at each document in that run.
    """

    model: nn.Module
    tokenizer: Tokenizer | None
    folder: Path
    label: str
    data: Path | None = None
    training: Training | None = None
    context: int | None = None
    document_mask: bool = False


def to_stderr(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def open_trained(
    path: str | Path, step: int | None = None, complain: Complain = to_stderr, *, weights: bool = True
) -> Trained:
    """The model in a run, a checkpoint or a model folder.

    Args:
        path: of any of them.
        step: of a run: that of the checkpoint to take.
        complain: told of damaged checkpoints that were passed by, and of data that have changed.
        weights: False looks at all but their contents, and the model is shapes on the meta device.

    Raises:
        ValueError: no such folder, or none of these; a run without a complete checkpoint, or none at that step; the
            checkpoint that was asked for is damaged; guides that are still there.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no such folder: {path}")
    if is_checkpoint(path):
        run = path.parent.parent if path.parent.name == CHECKPOINTS else path.resolve().parent.parent
        if step is not None:
            raise ValueError(f"{path} is a checkpoint already; a step is for its run, {run}")
        if not (run / RUN_CONFIG).is_file():
            raise ValueError(f"{path} lies in no run folder, so nothing says which model it is of: no {RUN_CONFIG}")
        return from_checkpoint(path, run, complain, weights)
    if (path / RUN_CONFIG).is_file():
        if step is None and (end := finished(path)) is not None:
            return from_finished(path, end, weights)
        return from_checkpoint(chosen(path, step, complain, weights), path, complain, weights)
    if (path / MODEL_CONFIG).is_file() or (path / "model").is_dir():
        if step is not None:
            raise ValueError(f"{path} is not a run folder, so it has no checkpoint of step {step}")
        return from_model_folder(path if (path / MODEL_CONFIG).is_file() else path / "model", str(path), weights)
    raise ValueError(f"{path} is not a run, a checkpoint or a model folder")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is, or by its place should be, a checkpoint."""
    by_place = path.parent.name == CHECKPOINTS and path.name.startswith(checkpoint.PREFIX)
    return by_place or ((path / checkpoint.MANIFEST).is_file() and (path / checkpoint.STATE).is_file())


def finished(run: Path) -> dict[str, Any] | None:
    """The last row of a run that has its model/, empty if that is gone; None if it has none, or has gone on since."""
    if not (run / "model" / MODEL_CONFIG).is_file():
        return None
    if not (run / METRICS).is_file():
        return {}
    ends = [row for row in read_rows(run) if row.get("event") == "end"]
    newest = max((c.step for c in checkpoint.list_checkpoints(run)), default=0)
    if not ends:  # going on drops the row of the end
        return None if newest else {}
    for key in ("step", "tokens"):
        if type(ends[-1].get(key)) is not int:
            raise ValueError(f"{run / METRICS} is damaged: the row of the end has no {key}")
    return ends[-1] if ends[-1]["step"] >= newest else None


def chosen(run: Path, step: int | None, complain: Complain, contents: bool = True) -> Path:
    """The checkpoint of a step, or the newest one that is not damaged (by its contents, or by sizes alone).

    Raises:
        ValueError: there is none, naming those there are; or the one asked for is damaged.
    """
    if step is None:
        newest = checkpoint.newest_usable(run, complain, contents=contents)
        if newest is None:
            raise ValueError(f"the run in {run} has no complete checkpoint yet; continue it with --resume auto")
        return newest.path
    found = {c.step: c.path for c in checkpoint.list_checkpoints(run)}
    if step not in found:
        raise ValueError(f"{run} has no checkpoint of step {step}; there are: {', '.join(map(str, found)) or 'none'}")
    return found[step]


def from_finished(run: Path, end: dict[str, Any], weights: bool) -> Trained:
    """What a finished run left in model/; `end` is the last row of its records."""
    found = from_model_folder(run / "model", f"{run} at step {end['step']}" if end else str(run), weights)
    config = read_config(run)
    data = data_of(config, found.tokenizer)
    training = found.training  # which the config of a dense model does not keep
    if training is None and end:
        training = training_of(config, data, None, end["step"], end["tokens"])
    return replace(found, data=data.path if data else None, training=training, **reading_of(config))


def reading_of(config: RunConfig) -> dict[str, Any]:
    """How a run reads text: `context` and `document_mask` of `Trained`."""
    return {"context": config.train.context, "document_mask": config.data.document_mask}


def from_model_folder(folder: Path, label: str, weights: bool) -> Trained:
    """What a factored or stock folder holds."""
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None
    return Trained(load(folder) if weights else look(folder), tokenizer, folder, label, training=read_training(folder))


def from_checkpoint(path: Path, run: Path, complain: Complain, weights: bool) -> Trained:
    """The model of a checkpoint, of however many processes.

    Raises:
        ValueError: it is damaged, is not of this run's configuration, or still has guides.
    """
    checkpoint.check(path, contents=weights)
    config, state = read_config(run), checkpoint.read_state(path)
    label = f"{run} at step {state['step']}"
    stored = Stored([path / name for name in checkpoint.tensor_files("model", checkpoint.processes_of(path))])
    refuse_guides(stored, config, label)
    data, tokenizer = tokenizer_of(config, state["data"], label, complain)
    model = built(config, stored, data)
    model = allocate(model) if weights else model
    tensors = named_tensors(model)
    (stored.fill if weights else stored.check)([Piece(name, t, tuple(t.shape)) for name, t in tensors.items()])
    if extra := sorted(set(stored.shapes) - set(tensors)):
        raise ValueError(f"{path} holds {extra[0]}, which the model of {run / RUN_CONFIG} does not have")
    training = training_of(config, data, None, state["step"], state["tokens"])
    folder = data.path if data else None
    return Trained(model.eval(), tokenizer, path, label, folder, training, **reading_of(config))


def refuse_guides(stored: Stored, config: RunConfig, label: str) -> None:
    """Raises a ValueError where the guides of self-guided training are not freed: without them it is another model."""
    if any(name.endswith(".guide") for name in stored.shapes):
        freed = round(config.guide.share * (config.train.steps or 0))
        raise ValueError(
            f"{label} still has the dense guides of self-guided training, without which it is another model; "
            f"they are freed at step {freed}"
        )


def built(config: RunConfig, stored: Stored, data: Dataset | None) -> nn.Module:
    """The architecture of a run on the meta device, in the ranks that are stored."""
    if config.init:
        model: Any = beginning(config.init)
        if data is not None:
            name_end_of_text(model.config, data.eot_id)
    else:
        model, _ = new_skeleton(config, vocabulary(config, stored), data.eot_id if data else None)
    for layer in guided_layers(model).values():
        layer.free_guide()
    for name, layer in factor_layers(model).items():
        if (rank := stored_rank(stored.shapes, name)) is not None:
            layer.reshape(rank)
    if config.init:
        check_beginning(model, stored, config.init)
    return model


def beginning(init: str) -> nn.Module:
    """The architecture of the folder that a run began with; a checkpoint does not say what it is."""
    try:
        return outline(Path(init))
    except ValueError as error:
        raise ValueError(f"{error}; the run began with --init {init}, whose config its checkpoints need") from None


def check_beginning(model: nn.Module, stored: Stored, init: str) -> None:
    """Raises a ValueError unless a checkpoint holds the tensors of the folder that its run began with."""
    wanted, have = {name: tuple(t.shape) for name, t in named_tensors(model).items()}, stored.shapes
    if different := sorted(name for name in {**wanted, **have} if wanted.get(name) != have.get(name)):
        name = different[0]
        raise ValueError(
            f"--init {init} is another model now than when the run began with it: {name} has shape "
            f"{wanted.get(name)} there and {have.get(name)} in the checkpoint"
        )


def vocabulary(config: RunConfig, stored: Stored) -> int:
    """Rows of the token embedding of a preset, as they are stored."""
    rows = stored.shapes.get("model.embed_tokens.weight")
    return rows[0] if rows else find_preset(config.model.preset).vocab_size


def tokenizer_of(
    config: RunConfig, fingerprint: str, label: str, complain: Complain
) -> tuple[Dataset | None, Tokenizer | None]:
    """The data of a run, without a look at its tokens, and their tokenizer; none where they are gone or others now."""
    try:
        data = described(config)
        if checkpoint.fingerprint(data_fingerprint(data)) != fingerprint:
            raise ValueError(f"{data.path} holds other data now")
        return data, data.tokenizer()
    except ValueError as error:
        complain(f"{label} has no tokenizer: {error}")
        return None, None


def data_of(config: RunConfig, tokenizer: Tokenizer | None) -> Dataset | None:
    """The data of a run, None if they are gone or have another tokenizer by now."""
    try:
        data = described(config)
    except ValueError:
        return None
    known = tokenizer is not None and tokenizer_hash(tokenizer) == data.tokenizer_sha256
    return data if known else None


def described(config: RunConfig) -> Dataset:
    """The data of a run by their manifest, without a look at the tokens.

    Raises:
        ValueError: no prepared folder.
    """
    vocab_size = find_preset(config.model.preset).vocab_size
    folder = Path(config.data.path) if config.data.path else prepared_demo(vocab_size, quiet=True)
    return Dataset(folder, read_manifest(folder))

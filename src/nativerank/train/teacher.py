"""The teacher of a run: looked at before anything is made, read before the first step, told from others at a resume.

Its folder is any that `nativerank.hub.load` reads: a finished run, a stock folder, a factored one. It predicts the same
tokens as the model: an equal vocabulary, and where both are known the same tokenizer. Every process reads all of it.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

from torch import nn

from nativerank.config import DistillConfig, RunConfig, differences
from nativerank.data.shards import Dataset
from nativerank.distributed.agree import from_each, together
from nativerank.distributed.grid import SINGLE, Grid
from nativerank.evaluate.loss import check_document_mask, check_predictions
from nativerank.hub.load import base_config, load, model_folder, outline, tokenizer_fingerprint
from nativerank.hub.weights import named_tensors
from nativerank.models import check_predicts_next_token, context_length
from nativerank.train.distill import Teacher

SAMPLE = 1024  # numbers of each tensor, at least, that a fingerprint looks at: training changes nearly all of them


def check_distill(config: RunConfig) -> None:
    """Raises a ValueError for what cannot be seen as a teacher, by its config alone, or has no meaning without one."""
    d = config.distill
    if d.teacher is None:
        if d != DistillConfig():
            key = differences(d, DistillConfig(), "distill.")[0]
            raise ValueError(f"{key} has no meaning without --distill.teacher")
        return
    if not 0 < d.temperature < math.inf:
        raise ValueError(f"distill.temperature must be > 0, got {d.temperature:g}")
    try:
        folder = model_folder(Path(d.teacher)).resolve()
        check_predicts_next_token(outline(folder), d.teacher)
        limit = context_length(base_config(folder))
    except ValueError as error:
        raise ValueError(f"distill.teacher: {error}") from None
    out = Path(config.out).resolve() if config.out else None
    if out is not None and out in (folder, *folder.parents):
        raise ValueError(f"distill.teacher {d.teacher} lies in --out {config.out}, which this run writes")
    if limit and (config.train.context or 0) > limit:
        raise ValueError(
            f"train.context {config.train.context} exceeds the max_position_embeddings {limit} of distill.teacher "
            f"{d.teacher}"
        )


def open_teacher(config: RunConfig, dataset: Dataset, model: nn.Module, grid: Grid = SINGLE) -> Teacher | None:
    """The teacher of a resolved configuration, None if it has none.

    Args:
        dataset: what the run reads.
        model: that is to learn, on any device, whole or sharded.
        grid: of all processes, which call this together.

    Raises:
        ValueError: weights that cannot be read or predict no numbers, another vocabulary or tokenizer, or not the
            same teacher everywhere.
    """
    d = config.distill
    if d.teacher is None:
        return None
    with together(grid):
        check_tokens(d.teacher, dataset, model)
        teacher: Any = load(d.teacher)
        check_predictions(teacher, f"distill.teacher {d.teacher}")
        teacher.requires_grad_(False).to(config.device)
        if config.data.document_mask:
            check_document_mask(teacher)
    found = from_each(grid, lambda: fingerprint(teacher))
    with together(grid):
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(f"rank {rank} reads another distill.teacher than rank 0 in {d.teacher}")
    return Teacher(teacher, d.weight, d.temperature, found[0])


def check_tokens(folder: str, dataset: Dataset, model: Any) -> None:
    """Raises a ValueError unless a teacher's tokens are those of the model and the data."""
    known = tokenizer_fingerprint(Path(folder))
    if known is not None and known != dataset.tokenizer_sha256:
        raise ValueError(f"distill.teacher {folder} has another tokenizer than the data in {dataset.path}")
    size, wanted = base_config(Path(folder)).get_text_config().vocab_size, model.config.get_text_config().vocab_size
    if size != wanted:
        raise ValueError(f"distill.teacher {folder} has a vocabulary of {size}, the model one of {wanted}")


def fingerprint(model: nn.Module) -> str:
    """A hash of the names and shapes of a model's weights, and of SAMPLE evenly spread numbers of each."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(flat[:: max(1, flat.numel() // SAMPLE)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_same_teacher(stored: str | None, teacher: Teacher | None, where: str) -> None:
    """Raises a ValueError for a checkpoint of a run that learned from another teacher, or from none."""
    now = teacher.fingerprint if teacher else None
    if stored == now:
        return
    if now is None or stored is None:
        before, after = ("a", "none") if stored else ("no", "one")
        raise ValueError(f"{where} learned from {before} teacher, and distill.teacher names {after}")
    raise ValueError(f"{where} learned from another teacher than distill.teacher holds now")

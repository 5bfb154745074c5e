"""What a run leaves and says at its end besides its loss: the model, a sample, what a compressor needs for the same
text, its memory."""

import ctypes
import gc
import hashlib
import math
import re
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import nn

from nativerank.config import RunConfig
from nativerank.data.shards import Dataset
from nativerank.distributed.agree import from_first
from nativerank.distributed.grid import Grid
from nativerank.evaluate.loss import Loss, xz_bits_per_byte
from nativerank.files import remove_partial
from nativerank.hub.card import Training
from nativerank.hub.generate import generate
from nativerank.hub.save import save, whole_tensors
from nativerank.train.setup import data_fingerprint

PROMPT_TOKENS = 16  # of the validation text
XZ_BYTES = 1 << 25  # text longer than this is not handed to xz, which would take minutes


def xz_of_validation(dataset: Dataset) -> float | None:
    """Bits per byte that `xz -9` needs for the validation text, None if that is too long to ask."""
    val = dataset.split("val")
    if val.text_bytes > XZ_BYTES:
        return None
    ids = [int(i) for i in val.read(0, val.tokens) if i != dataset.eot_id]
    return xz_bits_per_byte(dataset.tokenizer().decode(ids, skip_special_tokens=False).encode())


def export(model: nn.Module, out: Path, dataset: Dataset, grid: Grid, training: Training) -> None:
    """Writes the factored model into the run folder; called by all processes, done by the first."""
    tensors = whole_tensors(model, grid) if grid.shards > 1 else None

    def write() -> None:
        remove_partial(out / "model")
        save(model, out / "model", tokenizer=dataset.tokenizer(), replace=True, tensors=tensors, training=training)

    from_first(grid, write)


def training_of(config: RunConfig, dataset: Dataset | None, loss: Loss | None, steps: int, tokens: int) -> Training:
    """What the model card says of a run.

    Args:
        config: of the run.
        dataset: None if it is not known any more.
        loss: on the whole validation split, None where a run has not ended.
        steps, tokens: that were trained.
    """
    sources = (str(source) for source in (dataset.manifest.get("sources", ()) if dataset else ()))
    metrics = (
        {
            "validation loss (nats per token)": loss.nats,
            "perplexity": loss.perplexity,
            "bits per byte": loss.bits_per_byte,
        }
        if loss
        else {}
    )
    return Training(
        method=config.method,
        # A path is nobody's business; the name of a data set on the Hub is.
        data=tuple(s if s.startswith("hub:") else Path(s).name for s in sources),
        data_sha256=hashlib.sha256("".join(data_fingerprint(dataset)).encode()).hexdigest() if dataset else None,
        tokens=tokens,
        steps=steps,
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
    )


def sample_text(model: nn.Module, dataset: Dataset, config: RunConfig, grid: Grid) -> tuple[str, str]:
    """The first tokens of the validation text and how the model goes on; empty in a context too short for both.

    Called by all processes; where the model is sharded they all have to run it.
    """
    if grid.shards > 1:
        return _sample_text(model, dataset, config, together=True)
    return from_first(grid, lambda: _sample_text(model, dataset, config, together=False))


def _sample_text(model: nn.Module, dataset: Dataset, config: RunConfig, together: bool) -> tuple[str, str]:
    val, context, tokenizer = dataset.split("val"), config.train.context, dataset.tokenizer()
    assert context
    # Text cut inside a character is encoded with up to three tokens for one, hence the quarter.
    length = min(PROMPT_TOKENS, context // 4, val.tokens - 1)
    prompt = tokenizer.decode([int(i) for i in val.read(1, length)])
    if context < 8:
        return prompt, ""
    # Generation's growing shapes would make compiled blocks compile again for every token.
    with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
        text = generate(model, tokenizer, prompt, eot_id=dataset.eot_id, seed=config.train.seed, together=together)
    return prompt, text


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that was in use: of the GPU, else of the process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # getrusage counts the process that started this one too
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def forget_peak(device: torch.device) -> None:
    """Sets the mark of the peak to what is in use now, as far as the system lets us."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(AttributeError):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # closed in some containers: the peak is then the largest since the process began
            Path("/proc/self/clear_refs").write_text("5")

"""One model out of a run into a new folder, in the form that somebody else reads.

    factored   thin factors, for nativerank; with `merge="auto"` the matrices that they do not make smaller are dense
    dense      the stock architecture, for whatever reads Hugging Face folders; with `merge="auto"` the mixed form
    gguf       model.gguf, for the readers of that format; the LLaMA architecture only

The model is asked for its logits, merged, written under a temporary name, read back as its reader would, and asked
again (`nativerank.export.parity`). The folder gets its name when both agree, else there is none.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nativerank.export.gguf_file import check_gguf, read_model, write_gguf
from nativerank.export.merge import Merged, merge_factors
from nativerank.export.parity import Batch, Parity, check, check_language_model, compare, finite, fixed_batch, logits_of
from nativerank.export.request import GGUF_FILE, check_request
from nativerank.files import new_folder
from nativerank.hub.companions import TOKENIZER_CONFIG, WORDS, beside, check_tokenizer
from nativerank.hub.load import load
from nativerank.hub.save import save
from nativerank.hub.stock import architecture_of, silence
from nativerank.layers.base import factor_layers
from nativerank.models import count_parameters, read_hf_config
from nativerank.train.trained import Complain, Trained, open_trained, to_stderr


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        source: what was exported, in words.
        form: "factored", "mixed", "dense" or "gguf": what the folder holds.
        parameters: {"before", "after"}.
        matrices: what became of every factored matrix.
        bytes: of all files.
    """

    source: str
    out: str
    form: str
    dtype: str
    parameters: dict[str, int]
    matrices: list[Merged]
    parity: Parity
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)


def export(
    path: str | Path,
    out: str | Path,
    format: str,
    *,
    merge: str | None = None,
    step: int | None = None,
    dtype: str = "float32",
    max_shard_size: str | int = "5GB",
    watch: Callable[[str], None] = lambda what: None,
    complain: Complain = to_stderr,
) -> Exported:
    """Writes a trained model into a new folder and holds its logits against those of the model.

    Args:
        path: run, checkpoint or model folder.
        out: must not exist, or be empty.
        format: "factored", "dense" or "gguf".
        merge: "none", "auto" or "all" factors become dense; what the format says if not given.
        step: of a run: that of the checkpoint to take.
        dtype: in which weights are stored: "float32", "bfloat16" or "float16".
        max_shard_size: bytes, or "5GB": more is stored in several files and an index.
        watch: told what is going on.
        complain: told of damaged checkpoints that were passed by.

    Raises:
        ValueError: whatever is wrong with the arguments or the model; logits that do not agree; a full disk.
    """
    out = Path(out)
    merge = check_request(out, format, merge, dtype, max_shard_size)
    watch("reading weights")
    trained = open_trained(path, step, complain)
    check_language_model(trained.model, trained.label)
    if format == "factored" and not factor_layers(trained.model):
        raise ValueError(f"{trained.label} has no factors; --format dense writes it")
    check_tokenizer(trained.tokenizer, trained.model, trained.label)
    companions = beside(trained.folder)
    if trained.tokenizer is None and not any(file.name in WORDS for file in companions):
        complain(f"{trained.label} has no tokenizer, so {out} gets none")
    if format == "gguf":
        check_gguf(trained)
    model, batch = trained.model, fixed_batch(trained)
    before, wanted = count_parameters(model)["total"], finite(logits_of(model, batch), trained.label)
    watch("merging")
    matrices = merge_factors(model, merge)
    form = format if format == "gguf" else form_of(model, matrices)
    watch("writing")
    found: list[Parity] = []

    def verify(written: Path) -> None:
        watch("reading it back")
        found.append(verified(written, wanted, form, getattr(torch, dtype), batch))

    if format == "gguf":
        with new_folder(out) as partial:
            write_gguf(trained, partial / GGUF_FILE, dtype)
            verify(partial)
    else:
        write_folder(trained, companions, out, getattr(torch, dtype), max_shard_size, verify)
    size = sum(file.stat().st_size for file in out.iterdir())
    parameters = {"before": before, "after": count_parameters(model)["total"]}
    return Exported(trained.label, str(out), form, dtype, parameters, matrices, found[0], size)


def form_of(model: nn.Module, matrices: list[Merged]) -> str:
    """What a folder with this model holds."""
    if not factor_layers(model):
        return "dense"
    return "mixed" if any(entry.merged for entry in matrices) else "factored"


def write_folder(
    trained: Trained,
    companions: list[Path],
    out: Path,
    dtype: torch.dtype,
    max_shard_size: str | int,
    verify: Callable[[Path], None],
) -> None:
    """A factored, mixed or dense folder, with the tokenizer in every form that the source has."""
    whole = any(file.name == TOKENIZER_CONFIG for file in companions)
    save(
        trained.model,
        out,
        tokenizer=None if whole else trained.tokenizer,
        dtype=dtype,
        max_shard_size=max_shard_size,
        companions=companions if whole or trained.tokenizer is None else (),
        training=trained.training,
        check=verify,
    )


def verified(written: Path, wanted: Tensor, form: str, dtype: torch.dtype, batch: Batch) -> Parity:
    """Reads a folder as its reader would and compares its logits.

    Raises:
        ValueError: they are further apart than the precision's bound.
    """
    if form == "gguf":
        model: nn.Module = read_model(written / GGUF_FILE)
    elif form == "dense":
        model = stock(written, dtype)
    else:
        model = load(written, dtype=dtype)
    parity = compare(wanted, logits_of(model, batch), dtype, batch)
    check(parity, f"the {form} folder in {str(dtype).removeprefix('torch.')}")
    return parity


def stock(folder: Path, dtype: torch.dtype) -> nn.Module:
    """A dense folder by transformers alone."""
    auto = architecture_of(read_hf_config(str(folder)))
    with silence():
        model: nn.Module = auto.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval()

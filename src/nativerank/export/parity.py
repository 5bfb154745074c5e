"""Whether what was written computes what was trained, on a fixed batch of token ids.

    float32            max |l' - l| / max |l| <= 1e-4           over all logits l of the batch
    bfloat16, float16  mean over positions of KL(p || p') <= 1e-3,   p = softmax(l), in nats

l are the logits of the model as it was trained, in float32; l' those of what was read back from the disk. A comparison
with NaN fails. Cost: two forward passes over POSITIONS tokens; the logits of both are held.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nativerank.data.shards import Dataset
from nativerank.distributed.wrap import original_class
from nativerank.models import context_length, predicts_next_token
from nativerank.train.trained import Trained

SEQUENCES, POSITIONS = 4, 64
MAX_LOGIT, MEAN_KL = 1e-4, 1e-3


@dataclass(frozen=True)
class Batch:
    """Token ids (sequences, positions), every one of them real, and where they are from."""

    ids: Tensor
    source: str


@dataclass(frozen=True)
class Parity:
    """How far two models are apart; `measure` names the number that is held against `bound`."""

    max_logit: float
    mean_kl: float
    measure: str
    bound: float
    tokens: int
    source: str

    @property
    def figure(self) -> float:
        """The number that decides."""
        return float(getattr(self, self.measure))

    def __str__(self) -> str:
        names = {"max_logit": "max |logit difference| {:.1e} of max |logit|", "mean_kl": "mean KL {:.1e} nats/token"}
        return f"{names[self.measure].format(self.figure)} on {self.tokens} tokens of {self.source}"


def fixed_batch(trained: Trained) -> Batch:
    """The first validation tokens of the data, where they are known; else random ids with a fixed seed."""
    hf: Any = trained.model
    context = context_length(hf.config) or POSITIONS
    shape = SEQUENCES, min(POSITIONS, context)
    if trained.data is not None:
        try:
            split = Dataset.open(trained.data).split("val")
        except ValueError:  # a shard is gone or damaged
            split = None
        if split is not None and split.tokens >= shape[0] * shape[1]:
            return Batch(torch.from_numpy(split.read(0, shape[0] * shape[1])).view(shape), "the validation data")
    rows = hf.get_input_embeddings().num_embeddings
    return Batch(torch.randint(rows, shape, generator=torch.Generator().manual_seed(0)), "random ids")


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> Tensor:
    """Logits (sequences, positions, vocabulary) of a causal LM in float32, sequence by sequence."""
    return torch.cat([model(row[None], use_cache=False).logits.float() for row in batch.ids])


def finite(logits: Tensor, label: str) -> Tensor:
    """The logits, or a ValueError where they are not numbers."""
    if not logits.isfinite().all():
        what = "NaN" if logits.isnan().any() else "infinity"
        raise ValueError(f"the logits of {label} hold {what}, so there is nothing to hold an export against")
    return logits


def compare(wanted: Tensor, found: Tensor, dtype: torch.dtype, batch: Batch) -> Parity:
    """How far logits are from the wanted ones, with the bound of the precision that is written."""
    largest = wanted.abs().max().item()
    apart = (found - wanted).abs().max().item() / (largest or 1.0)
    measure, bound = ("max_logit", MAX_LOGIT) if dtype == torch.float32 else ("mean_kl", MEAN_KL)
    return Parity(apart, mean_kl(wanted, found), measure, bound, batch.ids.numel(), batch.source)


def mean_kl(wanted: Tensor, found: Tensor) -> float:
    """KL(softmax(wanted) || softmax(found)) in nats, the mean over all positions, in float64; a sequence at a time."""
    total = 0.0
    for p, q in zip(wanted, found, strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return total / (wanted.shape[0] * wanted.shape[1])


def check(parity: Parity, what: str) -> None:
    """Raises a ValueError with the figure unless it is within its bound."""
    if not parity.figure <= parity.bound:  # not >: NaN too
        raise ValueError(
            f"{what} does not compute what was trained: {parity}, at most {parity.bound:g}; nothing was kept"
        )


def check_language_model(model: nn.Module, label: str) -> None:
    """Raises a ValueError for a model that is not asked for its logits by token ids alone."""
    if not predicts_next_token(model):
        raise ValueError(
            f"{label} is a {original_class(model).__name__}; export compares logits, "
            f"so it takes causal language models only (nativerank.save writes any model)"
        )

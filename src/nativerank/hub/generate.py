"""Text from a trained model: Hugging Face's own generation with its KV cache, one prompt or many.

Prompts of different lengths are padded on the left, the attention mask hides the padding and positions start behind it,
so a prompt's text does not depend on what stands beside it, but for the last bits of sums in another order. Sequences
of one batch all have room for equally many new tokens; a prompt near the end of the context gets a batch of its own.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from nativerank.distributed.wrap import evaluating
from nativerank.hub.sampling import Chooser, Sampling
from nativerank.hub.streaming import TextStream, continuation
from nativerank.models import context_length, predicts_next_token, start_of_text

Write = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
        prompt: as text. ids: as tokens, the start of a text first. seed: of what is drawn for it.
        room: new tokens there may be.
    """

    prompt: str
    ids: tuple[int, ...]
    seed: int
    room: int


@dataclass(frozen=True)
class Continuation:
    """What was made of a request.

    Attributes:
        prompt, seed: of the request.
        text: what follows the prompt.
        tokens: how many were made of it, the end of text left out.
        seconds: that its batch took.
    """

    prompt: str
    seed: int
    text: str
    tokens: int
    seconds: float


class Writer:
    """A model that continues texts.

    Args:
        model: Hugging Face causal LM, on any device.
        tokenizer: the one it was trained with.
        eot_id: ends a text when it is chosen, and so does whatever else the model's generation_config names.
        sampling: how tokens are chosen.
        together: the model is sharded, and all processes call this: none stops before the last one does.

    Raises:
        ValueError: the model is none that generates text.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, eot_id: int, sampling: Sampling, together: bool = False):
        hf: Any = model
        if not predicts_next_token(model):
            raise ValueError(f"{type(model).__name__} is not a model that generates text")
        self.model, self.tokenizer, self.sampling, self.together = hf, tokenizer, sampling, together
        self.eot_id, self.start_id = eot_id, start_of_text(model, tokenizer, eot_id)
        named = hf.generation_config.eos_token_id
        stops = {eot_id, *(named if isinstance(named, list) else [named])}
        self.stops = sorted(i for i in stops if i is not None and tokenizer.id_to_token(i) is not None)

    def request(self, prompt: str, seed: int) -> Request:
        """A prompt made ready; it may be empty.

        Raises:
            ValueError: it is no Unicode text, fills the context, or has tokens that the model does not know.
        """
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"the prompt {ascii(prompt)[:60]} is not UTF-8 text") from None
        ids = (self.start_id, *self.tokenizer.encode(prompt, add_special_tokens=False).ids)
        context = context_length(self.model.config)
        if context and len(ids) >= context:
            raise ValueError(f"the prompt has {len(ids) - 1} tokens and the model's context only {context}")
        rows = self.model.get_input_embeddings().num_embeddings
        if max(ids) >= rows:
            raise ValueError(f"the tokenizer makes token {max(ids)} and the model knows only {rows} tokens")
        wanted = self.sampling.max_new_tokens
        return Request(prompt, ids, seed, min(wanted, context - len(ids)) if context else wanted)

    def requests(self, prompts: Sequence[str], num: int = 1) -> list[Request]:
        """`num` requests of each prompt, with seeds that count up from the sampling's.

        Raises:
            ValueError: several greedy ones, which would be equal; or what `request` refuses, with the prompt's number.
        """
        self.sampling.check_num(num)
        found = []
        for number, prompt in enumerate(prompts, 1):
            try:
                found += [self.request(prompt, self.sampling.seed + i) for i in range(num)]
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from None
        return found

    def write_all(self, requests: Sequence[Request], batch_size: int) -> Iterator[Continuation]:
        """Continues many texts, at most batch_size at a time; in their order, each batch as it is done."""
        for _, group in groupby(requests, key=lambda request: request.room):
            alike = list(group)
            for start in range(0, len(alike), batch_size):
                yield from self.write(alike[start : start + batch_size])

    def write(self, batch: Sequence[Request], stream: Write | None = None) -> list[Continuation]:
        """Continues texts with equal room as one batch.

        Args:
            batch: what to continue.
            stream: is called with each piece of the text as soon as its characters are whole; for a batch of one.
        """
        began, room = time.perf_counter(), batch[0].room
        assert all(request.room == room for request in batch) and (stream is None or len(batch) == 1)
        streamer = stream and TextStream(self.tokenizer, batch[0].ids, self.stops, stream)
        device = next(self.model.parameters()).device
        ids, mask = padded([request.ids for request in batch], self.eot_id, device)
        chooser = Chooser(self.sampling, [request.seed for request in batch], device)
        how = {"streamer": streamer, "synced_gpus": self.together}
        output = continue_ids(self.model, ids, mask, room, chooser, self.stops, **how)[:, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - began
        made = [self._until_stop(row) for row in output]
        texts = [continuation(self.tokenizer, request.ids, new) for request, new in zip(batch, made, strict=True)]
        return [
            Continuation(request.prompt, request.seed, text, len(new), seconds)
            for request, text, new in zip(batch, texts, made, strict=True)
        ]

    def _until_stop(self, ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.stops), len(ids))]


def padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (batch, longest), padded on the left, and the mask (batch, longest) that is 0 there."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def continue_ids(
    model: nn.Module, ids: Tensor, mask: Tensor, new_tokens: int, chooser: Chooser, stops: Sequence[int], **how: Any
) -> Tensor:
    """Hugging Face's generation with a KV cache and nothing of the folder's own generation settings.

    Args:
        model: in any mode, which it is left in; evaluation mode is what runs.
        ids, mask: (batch, n), padded on the left.
        new_tokens: how many follow, fewer where all sequences have reached a stop.
        chooser: decides them.
        stops: ids that end a sequence; none lets it run on.
        how: further arguments of transformers' generate.

    Returns:
        (batch, n + new), filled with the first stop behind the end of a sequence.
    """
    from transformers import GenerationConfig

    hf: Any = model
    wanted = GenerationConfig(
        do_sample=False,  # the chooser draws
        max_new_tokens=new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else None,
        use_cache=True,
    )
    with evaluating(model), own_settings(hf), torch.no_grad():
        found: Tensor = hf.generate(
            ids, attention_mask=mask, generation_config=wanted, logits_processor=[chooser], **how
        )
    return found


@contextmanager
def own_settings(hf: Any) -> Iterator[None]:
    """Takes away a folder's generation_config (repetition penalties and the like), which transformers would mix in."""
    from transformers import GenerationConfig

    kept, hf.generation_config = hf.generation_config, GenerationConfig()
    try:
        yield
    finally:
        hf.generation_config = kept


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    eot_id: int,
    stream: Write | None = None,
    together: bool = False,
    **sampling: Any,
) -> str:
    """The prompt's continuation, without the prompt.

    Args:
        model, tokenizer, eot_id, together: see `Writer`.
        prompt: may be empty; the start of a text always stands first, as in training.
        stream: is called with each piece of it while it is written.
        sampling: see `Sampling`.

    Raises:
        ValueError: a number out of range, or a prompt that fills the context.
    """
    writer = Writer(model, tokenizer, eot_id, Sampling(**sampling), together)
    (made,) = writer.write([writer.request(prompt, writer.sampling.seed)], stream)
    return made.text

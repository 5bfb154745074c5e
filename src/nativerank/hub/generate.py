"""Text from a trained model: Hugging Face's own generation (KV cache, sampling), seeded."""

from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from nativerank.data.tokenizer import end_of_text_id


def end_of_text(model: nn.Module, tokenizer: Tokenizer) -> int:
    """The id that separates documents: the config's, else that of the tokenizer's token with a usual name.

    Raises:
        ValueError: neither has one.
    """
    hf: Any = model
    named = hf.config.get_text_config().eos_token_id  # a stock folder may name several, or one of another vocabulary
    for token_id in named if isinstance(named, list) else [named]:
        if token_id is not None and tokenizer.id_to_token(token_id) is not None:
            return int(token_id)
    return end_of_text_id(tokenizer)


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    eot_id: int,
    max_new_tokens: int = 60,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    together: bool = False,
) -> str:
    """The prompt's continuation, without the prompt.

    Args:
        model: Hugging Face causal LM.
        tokenizer: the one it was trained with.
        prompt: may be empty; an end-of-text token always stands first, as in training.
        eot_id: ends the text when sampled.
        max_new_tokens: at most this many, and no more than the model's context has room for.
        temperature: 0 takes the likeliest token each time.
        top_k: sample among this many, 0 for all.
        seed: equal seeds give equal text on one machine.
        together: the model is sharded, and all processes call this: none stops before the last one does.

    Raises:
        ValueError: a number out of range, or a prompt that fills the context.
    """
    if max_new_tokens < 1 or not temperature >= 0 or top_k < 0:  # not >=: NaN too
        raise ValueError(
            f"max_new_tokens must be >= 1, temperature and top_k >= 0; got {max_new_tokens}, {temperature}, {top_k}"
        )
    hf: Any = model
    ids = [eot_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    context = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    if context and len(ids) >= context:
        raise ValueError(f"the prompt has {len(ids) - 1} tokens and the model's context only {context}")
    room = context - len(ids) if context else max_new_tokens
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    device = next(model.parameters()).device
    inputs = torch.tensor([ids], device=device)
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        output = hf.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=min(max_new_tokens, room),
            eos_token_id=eot_id,
            pad_token_id=eot_id,
            use_cache=True,
            synced_gpus=together,
            **sampling,
        )
    model.train(was_training)
    text: str = tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True)
    return text

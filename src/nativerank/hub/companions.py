"""What lies beside the weights so that Hugging Face's classes find it: the tokenizer's files, how a model generates."""

import copy
import json
from pathlib import Path
from typing import Any

from torch import nn

from nativerank.data.tokenizer import text_begins, text_ends
from nativerank.models import context_length

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
# What belongs to a model besides config and weights: its tokenizer in every form, and how it is asked to generate.
WORDS = (TOKENIZER, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")  # any of them makes a tokenizer
ABOUT_WORDS = (
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def beside(folder: Path) -> list[Path]:
    """The files of a model folder that another one with this model needs too; nothing about a tokenizer that is gone.

    Raises:
        ValueError: one that is no JSON though its name says so.
    """
    present = [name for name in WORDS if (folder / name).is_file()]
    names = [*present, *(ABOUT_WORDS if present else ()), GENERATION_CONFIG]
    files = [folder / name for name in names if (folder / name).is_file()]
    for file in files:
        if file.suffix == ".json" and file.name != TOKENIZER:  # which was read
            try:
                json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"cannot read {file}: {error}") from None
    return files


def check_tokenizer(tokenizer: Any, model: Any, label: str) -> None:
    """Raises a ValueError for a tokenizer with ids that the model has no rows for."""
    rows, ids = model.get_input_embeddings(), tokenizer.get_vocab(with_added_tokens=True) if tokenizer else {}
    if isinstance(rows, nn.Embedding) and ids and max(ids.values()) >= rows.num_embeddings:
        raise ValueError(
            f"{label} has a tokenizer with ids up to {max(ids.values())}, and the model knows only "
            f"{rows.num_embeddings} tokens"
        )


def write_tokenizer(tokenizer: Any, model: nn.Module, folder: Path) -> None:
    """The files that `AutoTokenizer` reads.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, whose token between documents becomes the end of a text, and its beginning
            if the config names no other, or a tokenizer of transformers, which writes its own files.
        model: that was trained with it.
        folder: exists.
    """
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return
    (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")  # .save hides errors
    text = _text_config(model)
    options: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if text is not None and (context := context_length(text)):
        options["model_max_length"] = context
    options |= _around_a_text(text, tokenizer)
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def write_generation_config(model: nn.Module, folder: Path) -> None:
    """How the model generates if nothing else is said; nothing for one that does not."""
    hf: Any = model
    if not (hasattr(hf, "can_generate") and hf.can_generate()):
        return
    generation, text = copy.deepcopy(hf.generation_config), _text_config(model)
    for key in ("bos_token_id", "eos_token_id"):  # of the data, which may have come after the model was made
        if getattr(text, key, None) is not None:
            setattr(generation, key, getattr(text, key))
    if generation.pad_token_id is None:
        eos = generation.eos_token_id
        generation.pad_token_id = eos[0] if isinstance(eos, list) else eos
    generation.use_cache = True  # which training switches off
    (folder / GENERATION_CONFIG).write_text(generation.to_json_string(), encoding="utf-8")


def read_generation_config(model: nn.Module, folder: Path) -> None:
    """Makes a model generate as its folder says, if it says so.

    Raises:
        ValueError: a file that cannot be read.
    """
    hf: Any = model
    if not (hf.can_generate() and (folder / GENERATION_CONFIG).exists()):
        return
    from transformers import GenerationConfig

    try:
        hf.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read {folder / GENERATION_CONFIG}: {' '.join(str(error).split())[:200]}") from None


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _around_a_text(text: Any, tokenizer: Any) -> dict[str, str]:
    """Names of the tokens before and after a text; nothing where no token ends one.

    The end is not the padding too, where it would be masked from the labels in training.
    """
    try:
        end = text_ends(tokenizer, getattr(text, "eos_token_id", None))
    except ValueError:
        return {}
    begin = text_begins(tokenizer, getattr(text, "bos_token_id", None), end)
    return {"bos_token": tokenizer.id_to_token(begin), "eos_token": tokenizer.id_to_token(end)}

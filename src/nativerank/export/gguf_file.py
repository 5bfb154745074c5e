"""A LLaMA as a GGUF file, and back: the container that llama.cpp and its relatives read.

    model.gguf   metadata (architecture, sizes, tokenizer) | tensors under llama.cpp's names, F32 or F16

Names are those of the `gguf` package's own table. Matrices keep their (d_out, d_in) order; vectors stay F32 in an F16
file, as llama.cpp keeps them. One thing is not a matter of names: rotary embedding. Hugging Face rotates the pairs
(j, j + d/2) of a head of width d, llama.cpp's LLaMA the pairs (2j, 2j + 1) (GGML_ROPE_TYPE_NORMAL). Scores q.k do not
change if the rows of W_q and W_k are put in another order, the same for both, so row j goes to 2j and row j + d/2 to
2j + 1 within each head (`interleave`), and both rotations see the same pairs.

`read_model` goes the way back with nothing but the file: metadata to a config, tensors to a stock LlamaForCausalLM.
"""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nativerank.export.gguf_tokens import token_metadata
from nativerank.extras import require
from nativerank.train.trained import Trained

ARCH = "llama"
FILE_TYPES = {"float32": 0, "float16": 1}  # general.file_type: all F32; mostly F16
ROTATED = ("q_proj", "k_proj")


def check_gguf(trained: Trained) -> None:
    """Raises a ValueError for a missing package or a model that this file format cannot hold as we write it."""
    require("gguf", "gguf", "--format gguf")
    hf: Any = trained.model
    config, label = hf.config, trained.label
    if config.model_type != ARCH:
        raise ValueError(f"{label} is a {config.model_type}; GGUF is written of the LLaMA architecture only")
    rope = config.rope_parameters["rope_type"]
    if rope != "default" or config.hidden_act != "silu":
        raise ValueError(
            f"{label} has {rope} rotary embedding and activation {config.hidden_act}; GGUF is written of the default "
            f"rotary embedding and silu only"
        )
    if trained.tokenizer is None:
        raise ValueError(f"{label} has no tokenizer, without which no reader of GGUF can use it")
    token_metadata(trained.tokenizer, config)


def metadata(trained: Trained, dtype: str) -> dict[str, Any]:
    """Every key of the file but general.architecture, which the writer sets: str, bool, int, float or list."""
    hf: Any = trained.model
    c, base = hf.config, f"{ARCH}."
    assert trained.tokenizer is not None
    return {
        "general.name": Path(trained.label).name,  # not where it lay on this machine
        "general.file_type": FILE_TYPES[dtype],
        f"{base}vocab_size": c.vocab_size,
        f"{base}context_length": c.max_position_embeddings,
        f"{base}embedding_length": c.hidden_size,
        f"{base}block_count": c.num_hidden_layers,
        f"{base}feed_forward_length": c.intermediate_size,
        f"{base}rope.dimension_count": c.head_dim,
        f"{base}rope.freq_base": float(c.rope_parameters["rope_theta"]),
        f"{base}attention.head_count": c.num_attention_heads,
        f"{base}attention.head_count_kv": c.num_key_value_heads,
        f"{base}attention.key_length": c.head_dim,
        f"{base}attention.value_length": c.head_dim,
        f"{base}attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        **token_metadata(trained.tokenizer, c),
    }


def write_gguf(trained: Trained, file: Path, dtype: str) -> None:
    """Writes a dense LLaMA and compares every key and number of the file with what it should hold.

    Raises:
        OSError: the disk is full.
    """
    from gguf import GGUFWriter

    keys, tensors = metadata(trained, dtype), stored_tensors(trained.model, dtype)
    writer = GGUFWriter(file, ARCH)
    kinds: dict[type, Any] = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
    }
    for key, value in keys.items():
        (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        if error.errno is None:  # numpy's word for less being written than was asked for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from None
        raise
    check_written(file, keys, tensors)


def stored_tensors(model: nn.Module, dtype: str) -> dict[str, np.ndarray]:
    """The file's tensors, by its names."""
    hf: Any = model
    names, found = gguf_names(model), {}
    for name, parameter in model.named_parameters():
        value = interleave(parameter.detach(), heads_of(name, hf.config)) if is_rotated(name) else parameter.detach()
        half = dtype == "float16" and value.ndim > 1
        found[names[name]] = value.to(torch.float16 if half else torch.float32).contiguous().numpy()
    return found


def gguf_names(model: nn.Module) -> dict[str, str]:
    """Hugging Face's name of every parameter (tied ones once) -> the file's, from gguf's own table."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    hf: Any = model
    table = get_tensor_name_map(MODEL_ARCH.LLAMA, hf.config.num_hidden_layers)
    names = {}
    for name, _ in model.named_parameters():
        known = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ValueError(f"GGUF's LLaMA has no tensor for {name}")
        names[name] = known
    return names


def is_rotated(name: str) -> bool:
    """Whether the rows of this parameter are rotated by position."""
    return name.split(".")[-2] in ROTATED


def heads_of(name: str, config: Any) -> int:
    """Heads of a query or key projection."""
    return int(config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)


def interleave(x: Tensor, heads: int) -> Tensor:
    """Rows (heads d, ...) with j and j + d/2 of each head brought next to each other."""
    return x.view(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def deinterleave(x: Tensor, heads: int) -> Tensor:
    """The way back of `interleave`."""
    return x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


# -- reading back -------------------------------------------------------------------------------------------------


def check_written(file: Path, keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Raises a ValueError unless a file holds exactly these keys and numbers."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    for key, value in keys.items():
        found = reader.get_field(key)
        expected = float(np.float32(value)) if isinstance(value, float) else value
        if found is None or found.contents() != expected:
            raise ValueError(f"{file}: {key} was not written as {str(value)[:80]}")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    if stored.keys() != tensors.keys():
        raise ValueError(f"{file} does not hold the tensor {min(stored.keys() ^ tensors.keys())}")
    for name, tensor in tensors.items():
        if stored[name].dtype != tensor.dtype or not np.array_equal(stored[name], tensor):
            raise ValueError(f"{file}: {name} was not written as it is")


def read_model(file: Path) -> nn.Module:
    """The stock LlamaForCausalLM of a file that `write_gguf` wrote, in float32, from what the file says alone."""
    from gguf import GGUFReader
    from transformers import LlamaForCausalLM

    reader = GGUFReader(file)
    stored = {tensor.name: torch.from_numpy(np.array(tensor.data, dtype=np.float32)) for tensor in reader.tensors}
    model: Any = LlamaForCausalLM(config_of(reader, stored))
    with torch.no_grad():
        for name, known in gguf_names(model).items():
            parameter, value = model.get_parameter(name), stored.pop(known)
            parameter.copy_(deinterleave(value, heads_of(name, model.config)) if is_rotated(name) else value)
    if stored:
        raise ValueError(f"{file} holds {min(stored)}, which the model of its metadata does not have")
    built: nn.Module = model.eval()
    return built


def config_of(reader: Any, stored: dict[str, Tensor]) -> Any:
    """The LlamaConfig of a file's metadata; which biases there are and whether the head is tied say its tensors."""
    from transformers import LlamaConfig

    def value(key: str) -> Any:
        return reader.get_field(f"{ARCH}.{key}").contents()

    return LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        head_dim=value("attention.key_length"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        attention_bias="blk.0.attn_q.bias" in stored,
        mlp_bias="blk.0.ffn_up.bias" in stored,
        tie_word_embeddings="output.weight" not in stored,
    )

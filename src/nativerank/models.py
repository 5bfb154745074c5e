"""Which model: named presets, or any Hugging Face config; built natively in low rank.

The architecture is always a Hugging Face causal LM whose linear maps are replaced. Building goes through the meta
device: skeleton, factor layers, then memory, then each parameter seeded by (seed, name). So two methods with one
seed start from the same dense matrices W (a low-rank method from their truncations), and no dense model ever exists
for a low-rank method.

Hidden matrices start with standard deviation init_scale / sqrt(fan_in); everything else as the Hugging Face
architecture initialises itself.
"""

import copy
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from nativerank.config import nearest
from nativerank.data.tokenizer import text_begins, text_ends
from nativerank.distributed.wrap import original_class
from nativerank.layers import init_factor_layer, init_seed, linear_modules
from nativerank.layers.base import factor_layers
from nativerank.layers.pretrained import MODEL_TYPE

DENSE = "-dense"
BUILT_IN = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")  # how attention and experts are computed
SAMPLED_ABOVE = 2048  # d_model above which factors are sampled instead of truncated: an SVD there takes minutes


@dataclass(frozen=True)
class Preset:
    """A LLaMA-style architecture with the training settings that belong to it.

    Lengths in tokens; batch_size in sequences per pass; ranks as in RankConfig (at most one of ratio and value).
    """

    source: str
    d_model: int
    layers: int
    heads: int
    d_ffn: int
    vocab_size: int
    context: int
    batch_size: int
    steps: int
    accumulation: int = 1
    dense_steps: int | None = None
    kv_heads: int | None = None
    ratio: float | None = None
    value: int | None = None
    tied: bool = False
    embedding_std: float | None = None  # None: the architecture's own initializer_range
    rope_theta: float = 10000.0
    method: str = "spectron"
    ffn_multiple: int | None = None  # d_ffn of another width is rounded up to it; None rounds to the nearest 32


def _spectron(d_model: int, layers: int, heads: int, d_ffn: int, steps: int, dense_steps: int) -> Preset:
    """Spectron's S, M, L: 512 x 2048 tokens a step, embedding N(0, 1) as PyTorch draws it.

    steps are 20 tokens per dense parameter; dense_steps give the dense twin equal FLOPs.
    """
    return Preset(
        "Spectron (arXiv 2602.12429)",
        d_model,
        layers,
        heads,
        d_ffn,
        32000,
        2048,
        8,
        steps,
        64,
        dense_steps,
        ratio=0.25,
        embedding_std=1.0,
        ffn_multiple=256,
    )


def _galore(d_model: int, layers: int, heads: int, d_ffn: int, rank: int, tokens: float) -> Preset:
    """The LLaMA family of the GaLore tables: 512 x 256 tokens a step."""
    steps = round(tokens / (512 * 256))
    return Preset("GaLore (arXiv 2403.03507)", d_model, layers, heads, d_ffn, 32000, 256, 64, steps, 8, value=rank)


PRESETS: dict[str, Preset] = {
    "demo": Preset("built in: minutes on two cores", 256, 4, 4, 704, 4096, 256, 8, 640, value=64, embedding_std=0.2),
    "pocket": Preset(
        "built in: experiments on two cores", 128, 4, 4, 352, 1024, 128, 8, 600, value=32, embedding_std=0.2
    ),
    "spectron-s": _spectron(768, 12, 12, 2048, 2557, 1785),
    "spectron-m": _spectron(1280, 20, 20, 3584, 9313, 5663),
    "spectron-l": _spectron(1536, 24, 24, 4096, 14836, 8656),
    "llama-60m": _galore(512, 8, 8, 1376, 128, 1.1e9),
    "llama-130m": _galore(768, 12, 12, 2048, 256, 2.2e9),
    "llama-350m": _galore(1024, 24, 16, 2736, 256, 6.4e9),
    "llama-1b": _galore(2048, 24, 32, 5461, 512, 13.1e9),
    "smollm2-135m": Preset(
        "SmolLM2", 576, 30, 9, 1536, 49152, 2048, 16, 20000, 32, kv_heads=3, ratio=0.25, tied=True, rope_theta=1e5
    ),
    "smollm2-1.7b": Preset(
        "SmolLM2", 2048, 24, 32, 8192, 49152, 2048, 8, 32000, 64, ratio=0.25, tied=True, rope_theta=1.3e5
    ),
    "llama3-70b": Preset(
        "Llama 3", 8192, 80, 64, 28672, 128256, 8192, 1, 100000, 256, kv_heads=8, ratio=0.25, rope_theta=5e5
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of this name.

    NAME-dense is the same architecture for dense methods; NAME@WIDTH, NAME@WIDTHxLAYERS and NAME@WIDTHxLAYERSxHEADS are
    NAME at another size (`scaled`), so that models of a family are named by their shapes: pocket@96x3.

    Raises:
        ValueError: an unknown name, which lists the known ones; or sizes that do not fit.
    """
    base = PRESETS.get(family(name))
    if base is None:
        known = ", ".join(PRESETS)
        raise ValueError(
            f"unknown preset {name!r}{nearest(name, PRESETS)} (presets: {known}; each also as NAME{DENSE}, and at "
            "another size as NAME@WIDTHxLAYERS)"
        )
    _, at, size = name.removesuffix(DENSE).partition("@")
    if at:
        numbers = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?(?:x([1-9]\d*))?", size)
        if numbers is None:
            raise ValueError(f"preset {name!r}: the size is WIDTH, WIDTHxLAYERS or WIDTHxLAYERSxHEADS, got {size!r}")
        width, layers, heads = (int(number) if number else None for number in numbers.groups())
        try:
            base = scaled(base, width, layers, heads)
        except ValueError as error:
            raise ValueError(f"preset {name!r}: {error}") from None
    if name.endswith(DENSE):
        return replace(base, method="dense-adamw", steps=base.dense_steps or base.steps)
    return base


def family(name: str) -> str:
    """The name of a preset without size and -dense: pocket of pocket@96x3-dense."""
    return name.removesuffix(DENSE).partition("@")[0]


def scaled(preset: Preset, d_model: int | None, layers: int | None, heads: int | None = None) -> Preset:
    """The preset at another width (head size, FFN ratio and rank ratio kept) and depth, or with other heads.

    Raises:
        ValueError: heads that do not divide the width evenly, or a width too small for the preset's ratios.
    """
    if heads is not None:
        width = d_model or preset.d_model
        if width % (2 * heads):
            raise ValueError(f"{heads} heads do not divide width {width} into even parts")
        preset = replace(preset, heads=heads, kv_heads=preset.kv_heads and heads)
    if d_model is not None:
        head = preset.d_model // preset.heads
        if heads is None and d_model % head:
            raise ValueError(f"the width must be a multiple of the preset's head size {head}, got {d_model}")
        factor = d_model / preset.d_model
        d_ffn = preset.d_ffn * factor
        multiple = preset.ffn_multiple
        preset = replace(
            preset,
            d_model=d_model,
            heads=heads or d_model // head,
            kv_heads=heads or shared_heads(d_model // head, preset.kv_heads * factor) if preset.kv_heads else None,
            d_ffn=math.ceil(d_ffn / multiple) * multiple if multiple else round(d_ffn / 32) * 32,
            value=preset.value and max(1, round(preset.value * factor)),
        )
        if not preset.d_ffn:
            raise ValueError(f"width {d_model} leaves nothing of the preset's FFN")
    return replace(preset, layers=layers or preset.layers)


def shared_heads(heads: int, wanted: float) -> int:
    """The number of key and value heads nearest to `wanted` that divides that of the queries."""
    return min((k for k in range(1, heads + 1) if heads % k == 0), key=lambda k: abs(k - wanted))


def hf_config(preset: Preset, vocab_size: int | None = None, context: int | None = None) -> Any:
    """The preset as a transformers LlamaConfig, optionally for another vocabulary or context."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size or preset.vocab_size,
        hidden_size=preset.d_model,
        intermediate_size=preset.d_ffn,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads or preset.heads,
        max_position_embeddings=context or preset.context,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": preset.rope_theta},
        tie_word_embeddings=preset.tied,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )


def read_hf_config(path: str) -> Any:
    """A transformers config from a config.json or the folder that holds one.

    Raises:
        ValueError: no such file, no JSON, or a model type this transformers does not know.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the model config {file}: {error}") from None
    return make_hf_config(values, file)


def make_hf_config(values: Any, file: Path) -> Any:
    """The transformers config of the keys that were read from a file.

    Raises:
        ValueError: naming the file: no model type, one that this transformers does not know, or values it refuses; a
            kernel that is not built in.
    """
    from transformers import AutoConfig
    from transformers import __version__ as version
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{file} names no model_type, so it is not a Hugging Face config.json")
    if values["model_type"] == MODEL_TYPE:
        raise ValueError(f"{file} belongs to a model in low rank; train its weights on with --init {file.parent}")
    refuse_foreign_kernels(values, file)
    if values["model_type"] not in list(CONFIG_MAPPING):
        raise ValueError(f"{file}: transformers {version} knows no model_type {values['model_type']!r}")
    try:
        return AutoConfig.for_model(**values)
    except ZeroDivisionError as error:
        sizes = [key for key, value in values.items() if value == 0 and key.startswith(("num_", "n_", "hidden_"))]
        raise ValueError(f"{file} is no valid config: {' and '.join(sizes) or 'a size'} cannot be 0") from error
    except Exception as error:  # transformers raises what it likes on values it does not accept
        raise ValueError(f"{file} is no valid config: {one_line(error)}") from error


def refuse_foreign_kernels(values: Any, file: Path) -> None:
    """Raises a ValueError where a config, at any depth, names code to be fetched: "owner/kernel" makes transformers
    download and run it, and so may a name of its own whose package is missing here."""
    if isinstance(values, list):
        for value in values:
            refuse_foreign_kernels(value, file)
    for key, value in values.items() if isinstance(values, dict) else ():
        if "attn_implementation" in str(key) or "experts_implementation" in str(key):
            named = value.values() if isinstance(value, dict) else [value]
            if foreign := [name for name in named if not (name is None or type(name) is bool or name in BUILT_IN)]:
                raise ValueError(f"{file}: {key} is {foreign[0]!r}, which is none of {', '.join(BUILT_IN)}")
        else:
            refuse_foreign_kernels(value, file)


def find_architecture(name: str, config: Any) -> type[nn.Module]:
    """The transformers class of this name.

    Args:
        name: as a config.json has it under "architectures".
        config: the transformers config that it is to be built from.

    Raises:
        ValueError: transformers has no model of this name, or one that is built from another config.
    """
    import transformers

    found: Any = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"unknown architecture {name!r}: transformers {transformers.__version__} has no such model")
    if not isinstance(config, found.config_class or transformers.PreTrainedConfig):
        raise ValueError(f"a {name} is not built from a {config.model_type} config")
    return found


def skeleton(config: Any, architecture: type[nn.Module] | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a config on the meta device: shapes, no memory.

    Args:
        config: of transformers.
        architecture: class of the model; None is the config's causal language model.
        dtype: of the parameters.

    Raises:
        ValueError: the config has no causal language model, or the sizes do not fit each other.
    """
    from transformers import AutoModelForCausalLM

    build: Any = getattr(architecture, "_from_config", AutoModelForCausalLM.from_config)
    what = "causal language model" if architecture is None else architecture.__name__
    try:
        with torch.device("meta"):
            model: nn.Module = build(config, dtype=dtype)
    except Exception as error:
        raise ValueError(f"no {what} from this {config.model_type} config: {one_line(error)}") from error
    return model


def predicts_next_token(model: Any) -> bool:
    """Whether a model gives the logits of the next token for token ids alone, as causal language models do."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and bool(can_generate()) and not model.config.is_encoder_decoder


def check_predicts_next_token(model: nn.Module, label: str) -> None:
    """Raises a ValueError unless `predicts_next_token`; of an outline too."""
    if not predicts_next_token(model):
        raise ValueError(f"{label} holds a {original_class(model).__name__}, which predicts no next token")


def end_of_text(model: nn.Module, tokenizer: Tokenizer) -> int:
    """The id that separates documents: the config's, else that of the tokenizer's token with a usual name.

    Raises:
        ValueError: neither has one.
    """
    hf: Any = model
    return text_ends(tokenizer, getattr(hf.config.get_text_config(), "eos_token_id", None))


def start_of_text(model: nn.Module, tokenizer: Tokenizer, eot_id: int) -> int:
    """The id that stands before a text: the config's, if the tokenizer has it as a special token, else end of text."""
    hf: Any = model
    return text_begins(tokenizer, getattr(hf.config.get_text_config(), "bos_token_id", None), eot_id)


def context_length(config: Any) -> int | None:
    """Positions that a transformers config has for text, None where it does not say."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def allocate(model: nn.Module) -> nn.Module:
    """Memory for a meta-device Hugging Face model, in place; its parameters are to be loaded or drawn next.

    Tied weights are tied again and computed buffers (rotary tables) are right.
    """
    hf: Any = model
    model.to_empty(device="cpu")
    hf.tie_weights()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for _, module, owner in owned_modules(unfactored_twin(model)):
            if any(True for _ in module.buffers(recurse=False)):
                owner._init_weights(module)
    return model


def owned_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, module, the innermost Hugging Face model that it is part of), each module once.

    A vision tower or a language model inside another model knows its own modules alone.
    """
    owners: dict[str, Any] = {}
    for name, module in model.named_modules():
        outer = owners.get(name.rpartition(".")[0])
        owners[name] = module if hasattr(module, "_init_weights") else outer
        yield name, module, owners[name]


def unfactored_twin(model: nn.Module) -> nn.Module:
    """The stock architecture with the model's own parameters and buffers, but its hidden matrices on the meta device.

    Hugging Face initialises a block by reaching for `c_proj.weight` or `experts.gate_up_proj`. Here it finds them
    (shapes without memory), while everything else it fills belongs to the model.
    """
    hf: Any = model
    twin = skeleton(copy.deepcopy(hf.config), original_class(model))
    hidden = {id(getattr(m.owners[0], m.parameter)) for m in linear_modules(model).values()}
    own: dict[str, Any] = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in hidden}
    own |= {
        f"{n}.bias": layer.up.bias
        for n, layer in factor_layers(model).items()
        if getattr(layer.up, "bias", None) is not None
    }
    own |= dict(model.named_buffers(remove_duplicate=False))
    for name, module in twin.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key in tensors:
                tensors[key] = own.get(f"{name}.{key}" if name else key, tensors[key])
    return twin


def materialize(
    model: nn.Module, seed: int, init_scale: float, init: str = "auto", embedding_std: float | None = None
) -> nn.Module:
    """Gives a meta-device model memory and its initial weights, in place.

    Args:
        model: Hugging Face model, factorized or not.
        seed: with a parameter's name it seeds that parameter's numbers.
        init_scale: standard deviation of hidden matrices times sqrt(fan_in).
        init: "svd", "sampled", "flat", or "auto" by width.
        embedding_std: standard deviation of the token embedding, instead of the architecture's own.
    """
    hf: Any = allocate(model)
    width = getattr(hf.config.get_text_config(), "hidden_size", 0)
    init = ("sampled" if width > SAMPLED_ABOVE else "svd") if init == "auto" else init
    twin: Any = unfactored_twin(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name, module, owner in owned_modules(twin):
            torch.manual_seed(init_seed(seed, name))
            owner._init_weights(module)
            if embedding_std is not None and module is twin.get_input_embeddings():
                nn.init.normal_(module.weight, std=embedding_std)
    for name, layer in factor_layers(hf).items():
        d_in = layer.factors()[-1].shape[-2]
        init_factor_layer(layer, name, init_scale * d_in**-0.5, seed, init)
    for matrix in linear_modules(model).values():
        matrix.init_dense(init_scale * matrix.d_in**-0.5, seed)
    return model


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters in total, and without the token embedding and the output head."""
    hf: Any = model
    total = sum(p.numel() for p in model.parameters())
    ends = [m for m in (hf.get_input_embeddings(), hf.get_output_embeddings()) if m is not None]
    outer = {id(p): p for m in ends for p in m.parameters() if p.ndim > 1}  # an embedding of patches is a convolution
    return {"total": total, "non_embedding": total - sum(w.numel() for w in outer.values())}

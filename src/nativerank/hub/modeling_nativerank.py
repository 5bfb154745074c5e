"""LLaMA with matrices kept as thin factors, for folders written by nativerank; needs torch and transformers only.

    lowrank     y = up(down(x))          W = A B^T,           up.weight = A (d_out, r),   down.weight = B^T (r, d_in)
    spectral    y = up(s * down(x))      W = U diag(s) V^T,   up.weight = U,              down.weight = V^T,    s (r)

`nativerank.save` copies this file beside the weights, and config.json names it under "auto_map"; then

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

works where nativerank is not installed. What is factorized stands in the config under "nativerank". The base model does
the replacing and attention goes through transformers' table of attention functions, as serving engines ask for; a
tensor-parallel plan that names `q_proj` does not know its two halves, so there is none.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

KEPT_WIDE = r"\.s$"  # parameters that stay in float32: in bfloat16 a value of 0.5 could not move by 3e-4


class NativerankConfig(LlamaConfig):
    """A LLaMA config with `nativerank`: {"factors": {KIND: {MODULE: rank}}}; modules not named are dense."""

    model_type = "nativerank"
    base_model_tp_plan: ClassVar[Any] = None


class FactoredLinear(nn.Module):
    """Maps (..., d_in) to (..., d_out) through `rank` dimensions."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool, spectral: bool):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=bias)
        self.s = nn.Parameter(torch.ones(rank, dtype=torch.float32)) if spectral else None

    def forward(self, x):
        h = self.down(x)
        return self.up(h if self.s is None else h * self.s.to(h.dtype))

    def _apply(self, fn, recurse=True):
        before = None if self.s is None else self.s.detach()
        super()._apply(fn, recurse)
        if self.s is not None and before is not None and self.s.dtype in (torch.bfloat16, torch.float16):
            self.s.data = before.float().to(self.s.device)
        return self


class NativerankLlamaModel(LlamaModel):
    """The stock base model with its factorized linears replaced."""

    config_class = NativerankConfig
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {KEPT_WIDE}  # noqa: RUF012

    def __init__(self, config: NativerankConfig):
        super().__init__(config)
        for kind, ranks in config.nativerank["factors"].items():
            if kind not in ("lowrank", "spectral"):
                raise ValueError(f"layers of kind {kind!r} are not known here; load the folder with nativerank")
            for name, rank in ranks.items():
                self._factorize(name.removeprefix("model."), rank, kind == "spectral")

    def _factorize(self, name: str, rank: int, spectral: bool) -> None:
        parent, _, child = name.rpartition(".")
        dense: Any = self.get_submodule(name)
        layer = FactoredLinear(dense.in_features, dense.out_features, rank, dense.bias is not None, spectral)
        setattr(self.get_submodule(parent), child, layer)


class NativerankLlamaForCausalLM(LlamaForCausalLM):
    """The stock language model around the base model above."""

    config_class = NativerankConfig
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {KEPT_WIDE}  # noqa: RUF012

    def __init__(self, config: NativerankConfig):
        super().__init__(config)
        self.model = NativerankLlamaModel(config)
        self.post_init()  # ties the embeddings, if they are

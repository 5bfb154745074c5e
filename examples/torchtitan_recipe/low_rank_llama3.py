"""torchtitan 0.3: a converter that makes linears low-rank, a container for our optimizer, and a config that uses both.

    torchrun --nproc-per-node 8 -m torchtitan.train \\
        --module examples.torchtitan_recipe.low_rank_llama3 --config llama3_debugmodel_spectron

README.md beside this file says what of it was run, and where.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3 import model_registry
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module
from torchtitan.trainer import Trainer

import nativerank as nr
from nativerank.layers import init_seed, rank_from_ratio, sampled_factors


class FactorLinear(nr.layers.LowRankLinear, Module):
    """nativerank's layer as a torchtitan module: `down` and `up` are torchtitan linears, which its converters find."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        down: Linear.Config
        up: Linear.Config
        name: str  # seeds the initial factors

    def __init__(self, config: Config):
        self._config = config  # which _allocate reads
        super().__init__(config.down.in_features, config.up.out_features, config.down.out_features, bias=config.up.bias)

    def _allocate(self, rank: int, bias: bool, device: torch.device, dtype: torch.dtype | None) -> None:
        with device:
            self.down, self.up = self._config.down.build(), self._config.up.build()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The same factors on every process, each of which keeps its shards."""
        generator = torch.Generator().manual_seed(init_seed(0, self._config.name))
        std = (3 * self.in_features) ** -0.5
        A, B = sampled_factors(self.in_features, self.out_features, self.rank, std, generator)
        copy_whole(self.up.weight, A)
        copy_whole(self.down.weight, B.mT.contiguous())
        if self.up.bias is not None:
            self.up.bias.zero_()

    def parallelize(self, parallel_dims: Any) -> None:
        raise ValueError(
            "FactorLinear is cut by data parallelism alone: set parallelism.spmd_backend to partial_dtensor"
        )


def copy_whole(parameter: Tensor, whole: Tensor) -> None:
    """Copies a tensor that every process has into a parameter that may be sharded."""
    whole = whole.to(parameter.device)
    if isinstance(parameter, DTensor):
        # src_data_rank=None: cut here, asking nobody.
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)


class LowRankConverter(ModelConfigConverter):
    """Replaces the linears of all transformer blocks before the model is built, so no dense matrix is ever made."""

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        rank_ratio: float = 0.25

    def __init__(self, config: Config):
        self.config = config

    def convert(self, model_config: Module.Config) -> Module.Config:
        for name, linear, parent, place in list(model_config.traverse(Linear.Config)):
            if not name.startswith("layers."):
                continue  # the output head
            d_in, d_out = linear.in_features, linear.out_features
            rank = rank_from_ratio(self.config.rank_ratio, d_in, d_out)
            factors = FactorLinear.Config(
                down=Linear.Config(in_features=d_in, out_features=rank),
                up=Linear.Config(in_features=rank, out_features=d_out, bias=linear.bias),
                name=name,
            )
            if isinstance(parent, list):
                parent[place] = factors
            else:
                setattr(parent, place, factors)
        return model_config


class LowRankOptimizers(OptimizersContainer):
    """One optimizer of nativerank for each part of the model; parameters find their groups by what they are."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        method: str = "spectron"
        lr: float = 0.02
        aux_lr: float = 3e-3
        options: dict[str, Any] = field(default_factory=dict)
        """Other arguments of `nr.build_optimizer`."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        self.optimizers = [
            nr.build_optimizer(part, config.method, lr=config.lr, aux_lr=config.aux_lr, **config.options)
            for part in model_parts
        ]
        parameters = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        self._validate_params(parameters)
        self._post_init(parameters)

    def state_dict(self) -> dict[str, Any]:
        """What this process holds, under names of its own, sharing memory: it is loaded in place, by as many."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        found = {}
        for index, (part, optimizer) in enumerate(zip(self.model_parts, self.optimizers, strict=True)):
            names = {id(p): name for name, p in part.named_parameters()}
            found |= {f"part{index}.rank{rank}.{piece.name}": piece.tensor for piece in optimizer.pieces(names)}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, held in self.state_dict().items():
            held.copy_(state_dict[name])
        for optimizer in self.optimizers:
            optimizer.loaded()


def llama3_debugmodel_spectron() -> Trainer.Config:
    """torchtitan's smallest LLaMA 3 in low rank."""
    config = llama3_debugmodel()
    config.model_spec = model_registry("debugmodel", converters=[LowRankConverter.Config(rank_ratio=0.25)])
    config.optimizer = LowRankOptimizers.Config(method="spectron", lr=0.02, aux_lr=3e-3)
    config.parallelism.spmd_backend = "partial_dtensor"
    return config

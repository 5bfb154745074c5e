"""Spectra of factor layers that many processes hold.

    everybody   float64 Gram triangles of its rows of both factors           one exchange: each layer's to its owner
    owner       G_A = sum of A_i^T A_i, G_B;  sigma(S_A S_B^T)  (`linalg.spectrum`), O(r^3) once per layer
    everybody   all singular values, r numbers a layer                       one exchange

A spectral layer's owner gets s as well: the Gram matrix of U diag(s) is diag(s) G_U diag(s). A factor that is not cut
along its long side travels itself, and one that every process holds not at all. All processes get the same bits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nativerank.distributed.collectives import Kind, exchange
from nativerank.distributed.grid import Grid
from nativerank.distributed.pieces import bounds, cut_along, local
from nativerank.linalg.gram import gram, to_float64
from nativerank.linalg.spectrum import spectrum_of_grams
from nativerank.optim.ask import packed, symmetric, unpacked
from nativerank.optim.roles import members_of


@dataclass(frozen=True)
class Member:
    """One parameter of a layer, `down` (..., r, d_in) seen as the tall matrix it is the transpose of."""

    parameter: Tensor
    down: bool
    vector: bool

    @property
    def along(self) -> int | None:
        """The dimension it is cut along."""
        return cut_along(self.parameter)

    @property
    def in_rows(self) -> bool:
        """Whether shards are rows of the tall matrix, so that their Gram matrices add up to that of the whole."""
        return not self.vector and self.along == self.parameter.dim() - (1 if self.down else 2)

    def tall(self, stored: Tensor) -> Tensor:
        """The tall view of the whole or of a shard."""
        return stored.mT if self.down else stored

    def part(self) -> Tensor:
        """What this process sends to the owner."""
        stored = local(self.parameter.detach())
        return packed(symmetric(gram(to_float64(self.tall(stored))))) if self.in_rows else stored

    def kind(self, grid: Grid, shard: int) -> Kind:
        """What a process sends."""
        p, along = self.parameter, self.along
        if self.in_rows:
            r = p.shape[-2] if self.down else p.shape[-1]
            return (*p.shape[:-2], r * (r + 1) // 2), torch.float64
        assert along is not None
        shape = list(p.shape)
        shape[along] = bounds(p.shape[along], grid.shards, shard)[1]
        return tuple(shape), p.dtype

    def whole(self, parts: list[Tensor]) -> Tensor:
        """The Gram matrix of the whole, or for s the whole, from the parts of all shards."""
        if self.in_rows:
            return unpacked(torch.stack(parts).sum(0), "symmetric")
        if self.along is None:
            stored = local(self.parameter.detach())
        else:
            stored = torch.cat(parts, self.along)
        return to_float64(stored) if self.vector else gram(to_float64(self.tall(stored)))


def members(layer: Any) -> list[Member]:
    """up, down, and s where there is one."""
    return [Member(p, j == 1, j == 2) for j, p in enumerate(members_of(layer))]


@torch.no_grad()
def spectra(layers: Mapping[str, Any], grid: Grid) -> dict[str, Tensor]:
    """`layer.spectrum()` of every layer, on every process of the grid, all of which call this."""
    if grid.world == 1 or not layers:
        return {name: layer.spectrum() for name, layer in layers.items()}
    owners = {name: i % grid.world for i, name in enumerate(layers)}
    arrived = _to_owners(layers, owners, grid)
    mine = [_spectrum(layers[name], arrived) for name, owner in owners.items() if owner == grid.rank]
    kinds: list[list[Kind]] = [[] for _ in range(grid.world)]
    for name, owner in owners.items():
        up = members_of(layers[name])[0]
        kinds[owner].append(((*up.shape[:-2], up.shape[-1]), torch.float64))
    device = members_of(next(iter(layers.values())))[0].device
    told = [iter(found) for found in exchange([mine] * grid.world, kinds, grid.everyone, device)]
    return {name: next(told[owner]) for name, owner in owners.items()}


def _to_owners(layers: Mapping[str, Any], owners: Mapping[str, int], grid: Grid) -> list[Iterator[Tensor]]:
    """The parts of this process's layers, of one replica, by shard."""
    sends: list[list[Tensor]] = [[] for _ in range(grid.world)]
    kinds: list[list[Kind]] = [[] for _ in range(grid.world)]
    cut = [(owners[name], m) for name, layer in layers.items() for m in members(layer) if m.along is not None]
    for owner, member in cut:
        if grid.replica == 0:
            sends[owner].append(member.part())
        if owner == grid.rank:
            for shard in range(grid.shards):  # the first replica's ranks
                kinds[shard].append(member.kind(grid, shard))
    if not cut:
        return [iter(())] * grid.shards
    found = exchange(sends, kinds, grid.everyone, cut[0][1].parameter.device)
    return [iter(tensors) for tensors in found[: grid.shards]]


def _spectrum(layer: Any, arrived: list[Iterator[Tensor]]) -> Tensor:
    found = [m.whole([next(part) for part in arrived] if m.along is not None else []) for m in members(layer)]
    G_A, G_B, *s = found
    if s:
        G_A = G_A * s[0] * s[0][..., None]
    return spectrum_of_grams(G_A, G_B)

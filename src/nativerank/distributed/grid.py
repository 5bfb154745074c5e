"""The processes of a run as a grid: rows are replicas, columns are shards.

    world rank = replica * shards + shard

A parameter is cut into `shards` pieces along one dimension, and every replica holds all of them. `ddp` is a grid of one
column, `fsdp` a grid of one row, `hsdp` any other. One process is the grid of one cell, which has no process groups.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Grid:
    """Where this process stands, and the groups it belongs to.

    Attributes:
        rank, world: of all processes of the grid.
        replica, replicas, shard, shards: row and column of this process, and how many of each there are.
        mesh: (replicate, shard) of PyTorch; None for one process.
        everyone: group of the whole grid. along_shards: of this replica's shards. along_replicas: of the processes that
            hold the same shard. None for one process.
    """

    replica: int = 0
    replicas: int = 1
    shard: int = 0
    shards: int = 1
    mesh: DeviceMesh | None = None
    everyone: Group = None
    along_shards: Group = None
    along_replicas: Group = None

    @property
    def rank(self) -> int:
        """This process among all."""
        return self.replica * self.shards + self.shard

    @property
    def world(self) -> int:
        """How many processes there are."""
        return self.replicas * self.shards

    def within_replica(self) -> "Grid":
        """The shards of this replica as a grid of their own."""
        if self.shards == 1:
            return SINGLE
        return Grid(0, 1, self.shard, self.shards, self.mesh, self.along_shards, self.along_shards)


SINGLE = Grid()


def make_grid(replicas: int, shards: int, device_type: str, timeout: timedelta | None = None) -> Grid:
    """The grid of all processes of an initialised process group.

    Args:
        replicas, shards: see above. device_type: "cuda" or "cpu".
        timeout: of rows and columns; None leaves PyTorch's, whatever the whole group has.

    Raises:
        ValueError: replicas * shards is not their number.
    """
    if replicas * shards != dist.get_world_size():
        raise ValueError(f"a grid of {replicas} x {shards} does not match the {dist.get_world_size()} processes")
    grid = grid_of(init_device_mesh(device_type, (replicas, shards), mesh_dim_names=("replicate", "shard")))
    for group in (grid.along_shards, grid.along_replicas):
        if timeout is not None and group is not None:
            dist.distributed_c10d._set_pg_timeout(timeout, group)  # a mesh makes its groups without one
    return grid


def in_words(replicas: int, shards: int) -> str:
    """A grid of several processes for a person: its mode, and numbers where there are two."""
    if replicas > 1 and shards > 1:
        return f"hsdp, {replicas} replicas x {shards} shards"
    return "ddp" if shards == 1 else "fsdp"


def grid_of(mesh: DeviceMesh) -> Grid:
    """The grid of a mesh that parameters are sharded over: (shard), or (replicate, shard), all processes in order."""
    if mesh.ndim == 1:
        group = mesh.get_group()
        return Grid(0, 1, mesh.get_local_rank(), mesh.size(), mesh, group, group, None)
    if mesh.ndim != 2 or mesh.size() != dist.get_world_size():
        raise ValueError(f"a grid is (shard) or (replicate, shard) over all processes, got a mesh of {mesh.shape}")
    (replica, shard), (replicas, shards) = (mesh.get_local_rank(0), mesh.get_local_rank(1)), mesh.shape
    return Grid(replica, replicas, shard, shards, mesh, dist.group.WORLD, mesh.get_group(1), mesh.get_group(0))

"""Runs of forked processes that call `train` as torchrun's would, and what is read off their folders."""

import os
import socket

import torch
from safetensors.torch import load_file

from nativerank.train.loop import train
from nativerank.train.metrics import read_rows

DDP, FSDP = {"parallel__mode": "ddp"}, {"parallel__mode": "fsdp"}
HSDP = {"parallel__mode": "hsdp", "parallel__replicas": 2, "parallel__shards": 2}


class Quiet:
    """Hears everything and says nothing; ends its process after a step, as kill -9 does, if asked to."""

    quiet = True

    def __init__(self, crash_after=None):
        self.crash_after = crash_after

    def begin(self, facts):
        pass

    def row(self, row):
        if "loss" in row and row["step"] == self.crash_after:
            os._exit(9)

    def warn(self, message):
        pass


def train_as(rank, world, port, config, listener):
    """What one of the processes does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    train(config, listener)


def start_all(function, world, *args):
    """function(rank, world, port, *args) in as many forked processes, to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        function, (world, port, *args), world, join=False, start_method="fork"
    )
    while not context.join(timeout=120):
        pass


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def steps(folder):
    return [row for row in read_rows(folder) if "loss" in row]

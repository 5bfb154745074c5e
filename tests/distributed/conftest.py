"""Processes of a test: forked ones that talk over gloo, without ports and without a second import of torch."""

import pickle
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _child(rank, function, world, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    try:
        found = ("value", function(rank, *args))
    except BaseException:
        found = ("error", traceback.format_exc())
    (folder / f"rank-{rank}").write_bytes(pickle.dumps(found))
    if found[0] == "error":
        raise SystemExit(1)  # without waiting for the others, who wait for this one
    dist.destroy_process_group()


@pytest.fixture
def forked(tmp_path_factory):
    """forked(function, world, *args): function(rank, *args) of every rank, in their order; what one raises is raised.

    Results are pickled, so they are plain values and tensors.
    """

    def run(function, world, *args):
        folder = tmp_path_factory.mktemp("forked")
        context = mp.start_processes(_child, (function, world, folder, args), world, join=False, start_method="fork")
        try:
            while not context.join(timeout=60):
                pass
        except mp.ProcessExitedException:
            pass
        found = [pickle.loads(f.read_bytes()) for r in range(world) if (f := folder / f"rank-{r}").exists()]
        for kind, value in found:
            assert kind == "value", value
        assert len(found) == world, "a process ended without a word"
        return [value for _, value in found]

    return run

"""Every process of an exchange names the device, also one that sends nothing: else it waits at another backend."""

import ast
import inspect
from pathlib import Path

import torch

import nativerank
from nativerank.distributed import collectives
from nativerank.distributed.grid import make_grid
from nativerank.methods import build_optimizer, factorize
from nativerank.optim import outer as outer_module
from nativerank.optim.outer import Outer

SOURCE = Path(nativerank.__file__).parent


def calls_of_exchange(path):
    """Calls of `exchange` in a module that takes it from distributed.collectives."""
    tree = ast.parse(path.read_text())
    taken = any(
        isinstance(node, ast.ImportFrom)
        and node.module == collectives.__name__
        and any(alias.name == "exchange" for alias in node.names)
        for node in ast.walk(tree)
    )
    return [
        node
        for node in ast.walk(tree)
        if taken and isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "exchange"
    ]


def test_every_call_names_the_device():
    place = list(inspect.signature(collectives.exchange).parameters).index("device")
    found = {path: calls for path in SOURCE.rglob("*.py") if (calls := calls_of_exchange(path))}
    assert {"outer.py", "once.py", "move.py", "spectra.py", "sharded.py"} <= {path.name for path in found}
    for path, calls in found.items():
        for call in calls:
            named = len(call.args) > place or any(word.arg == "device" for word in call.keywords)
            assert named, f"{path.name}:{call.lineno} leaves the device to what is sent"


def rounds(rank):
    """(how many tensors were sent, the device that was named) of every exchange of an outer step."""
    grid = make_grid(3, 1, "cpu")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    factorize(model, "spectron", rank=2)
    told, original = [], outer_module.exchange

    def noted(sends, expected, group, device):
        told.append((sum(map(len, sends)), str(device)))
        return original(sends, expected, group, device)

    outer_module.exchange = noted
    Outer(model, build_optimizer(model, "spectron"), grid, 1).step()
    return told


def test_replicas_without_a_unit_name_it_too(forked):
    found = [call for rank in forked(rounds, 3) for call in rank]
    assert {device for _, device in found} == {"cpu"}
    assert 0 in {sent for sent, _ in found}, "one pair has one owner: two processes have nothing to send back"

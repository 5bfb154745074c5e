"""A process of many ends with the exit code of its command, whatever threads of PyTorch are doing at that moment."""

import os
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from nativerank.distributed import watch as watch_module
from nativerank.distributed.watch import watching

# A thread that asks for the interpreter while it shuts down, as gloo's do: a plain sys.exit(2) ends with signal 6.
BUSY = """
import atexit, sys, threading, time
import torch.distributed as dist
from nativerank.cli.main import leave

def fail(argv):
    raise RuntimeError("no command")

def talk():
    while True:
        client.set("key", "value")

server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
threading.Thread(target=talk, daemon=True).start()
time.sleep(0.1)
atexit.register(print, "at exit")
leave({command}, ["words"])
"""


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [("lambda argv: 2 * len(argv)", 2, ""), ("fail", 1, "RuntimeError: no command")],
    ids=["returns", "raises"],
)
def test_threads_that_are_busy_change_no_exit_code(command, code, said):
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", BUSY.replace("{command}", command)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == code, done.stderr
    assert done.stdout == "at exit\n" and said in done.stderr


def test_the_installed_script_leaves_as_the_module_does():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["nativerank"].partition(":")
    starting = f"import {module} as m; m.main = lambda argv: 2 * len(argv); m.{name}()"
    code = BUSY[: BUSY.index("leave({command}")] + starting
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, "words"], capture_output=True, env=environment, timeout=120)
    assert done.returncode == 2 and done.stdout == b"at exit\n", done.stderr


class Slow:
    """A store that takes its time to answer one question."""

    def __init__(self, store):
        self.store, self.asked = store, threading.Event()

    def __getattr__(self, name):
        return getattr(self.store, name)

    def check(self, keys):
        self.asked.set()
        time.sleep(0.5)
        return self.store.check(keys)


def watched(rank):
    stores = watch_module.fresh_stores
    slow = []

    def fresh():
        one, two = stores()
        slow.append(Slow(one))
        return slow[0], two

    watch_module.fresh_stores = fresh
    with watching(timeout=60.0):
        assert slow[0].asked.wait(30)
        assert {"nativerank_talk", "nativerank_look"} <= {thread.name for thread in threading.enumerate()}
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("nativerank")]


def test_nobody_talks_to_the_store_after_the_watch(forked):
    assert forked(watched, 2) == [[], []]

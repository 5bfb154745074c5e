"""Large freed tensors go back to the system, holes or not."""

import json
import os
import subprocess
import sys

import pytest

from nativerank.allocator import GIVE_BACK, HUGE_PAGES, OWN_CHOICE

# Tensors of 8 MB, each beside one of 64 KB that stays: in a heap the small ones would keep the large ones' pages.
SCRIPT = """
import json, re, sys
from pathlib import Path
from nativerank.allocator import give_back_freed_memory
if sys.argv[1] == "asked":
    give_back_freed_memory()
import torch
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
for count in (1, 12):  # the first round is what raises the threshold
    large, small = [], []
    before = resident()
    for _ in range(count):
        large.append(torch.ones(1 << 21))
        small.append(torch.ones(1 << 14))
    most = resident()
    large.clear()
print(json.dumps([before, most, resident()]))
"""


def left_over(how, **environment):
    """Share of twelve freed tensors' memory that a process still holds."""
    env = {k: v for k, v in os.environ.items() if k not in (*OWN_CHOICE, HUGE_PAGES)} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, env=env, check=True)
    before, most, after = json.loads(done.stdout)
    assert most - before > 12 * 7 << 20
    return (after - before) / (most - before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_tensors_go_back_to_the_system():
    assert left_over("asked") < 0.1
    assert left_over("not asked", **GIVE_BACK) < 0.1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_a_users_own_choice_stays():
    assert left_over("asked", MALLOC_MMAP_THRESHOLD_=str(1 << 25)) > 0.5

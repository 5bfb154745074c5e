"""nr.load of a model of 28M parameters takes at most 1.3 times the weights' memory; tests/slow has the 94M one."""

import subprocess
import sys

import pytest
import torch

import nativerank as nr
from nativerank.models import PRESETS, allocate, hf_config, skeleton

# A fresh process, since a peak never falls.
MEASURE = """
import re, sys
import torch, transformers.models.llama.modeling_llama
import nativerank.hub.register
from nativerank.hub.load import load

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

before = peak()
model = load(sys.argv[1])
weights = sum(p.nbytes for p in model.parameters())
print(weights, (peak() - before) / weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_little_above_the_weights(tmp_path):
    model = skeleton(hf_config(PRESETS["spectron-s"], vocab_size=16000))
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    nr.factorize(model, rank_ratio=0.25)
    for p in allocate(model).parameters():
        p.data.fill_(0.1)
    nr.save(model, tmp_path / "m", dtype=torch.bfloat16)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "m")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, ratio = map(float, done.stdout.splitlines()[-1].split())
    assert weights > 90e6 and ratio < 1.3, (weights, ratio)

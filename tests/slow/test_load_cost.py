"""nr.load of the 94M model: under 3 s, imports excluded, and with a peak under 1.3 times the weights."""

import json
import subprocess
import sys

import pytest
import torch

import nativerank as nr
from nativerank.models import PRESETS, allocate, hf_config, skeleton

pytestmark = pytest.mark.slow

# A fresh process, since a peak never falls; processor time, since other processes share the machine.
MEASURE = """
import json, re, sys, time
import torch, transformers.models.llama.modeling_llama
import nativerank.hub.register
from nativerank.hub.load import load

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

before, began = peak(), time.process_time()
model = load(sys.argv[1])
seconds = time.process_time() - began
weights = sum(p.nbytes for p in model.parameters())
print(json.dumps({"seconds": seconds, "ratio": (peak() - before) / weights, "weights": weights}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16, "max_shard_size": "50MB"}], ids=["fp32", "bf16 shards"]
)
def test_load_costs_little_more_than_the_weights(tmp_path, options):
    model = skeleton(hf_config(PRESETS["spectron-s"]))
    nr.factorize(model, rank_ratio=0.25)
    allocate(model)
    for p in model.parameters():
        p.data.normal_()
    nr.save(model, tmp_path / "m", **options)
    del model
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "m")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 370e6
    assert found["seconds"] < 3 and found["ratio"] < 1.3, found

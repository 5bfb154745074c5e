"""The SCT paper's arithmetic comes out of the accounting, and the accounting out of real layers and state."""

import pytest
import torch

from nativerank.accounting.memory import adam_bytes, llama_shapes, sct_table, state_of
from nativerank.layers import SpectralLinear
from nativerank.models import find_preset
from nativerank.optim.optimizer import LowRankOptimizer

PAPER = {  # dense + Adam in MB, factored in MB, ratio
    "SmolLM2-135M": ("14.2", "1.1", "13.1"),
    "SmolLM2-360M": ("67.1", "2.6", "25.6"),
    "SmolLM2-1.7B": ("268.4", "5.2", "51.2"),
    "LLaMA-7B": ("721.4", "7.7", "93.3"),
    "Qwen-27B": ("1140.9", "11.0", "103.6"),
    "LLaMA-70B": ("3758.1", "18.9", "199.1"),
}


def test_the_six_rows_of_the_paper():
    rows = {row["model"]: row for row in sct_table()}
    found = {
        name: (f"{row['dense_bytes'] / 1e6:.1f}", f"{row['factored_bytes'] / 1e6:.1f}", f"{row['ratio']:.1f}")
        for name, row in rows.items()
    }
    assert found == PAPER
    assert (rows["LLaMA-70B"]["dense_parameters"], rows["LLaMA-70B"]["factored_parameters"]) == (234_881_024, 1_179_680)


@pytest.mark.parametrize(
    ("kv_width", "factored", "factored_gb", "dense_gb"),
    [(8192, 450_905_600, "7.21", 1245), (1024, 414_205_440, "6.63", 1095)],
    ids=["paper", "grouped"],
)
def test_the_70b_stack(kv_width, factored, factored_gb, dense_gb):
    preset = find_preset("llama3-70b")
    state = state_of(llama_shapes(preset.d_model, preset.d_ffn, preset.layers, kv_width).values(), 32)
    assert state["factored_parameters"] == factored
    assert f"{state['factored_bytes'] / 1e9:.2f}" == factored_gb
    assert state["dense_bytes"] // 10**9 == dense_gb  # the paper cuts off


def test_the_grouped_width_is_the_presets():
    preset = find_preset("llama3-70b")
    assert preset.kv_heads * preset.d_model // preset.heads == 1024


def test_sixteen_bytes_are_what_layer_gradient_and_optimizer_hold():
    layer = SpectralLinear(48, 32, 4)
    layer(torch.ones(1, 48)).sum().backward()
    up, down, s = layer.up.weight, layer.down.weight, layer.s
    optimizer = LowRankOptimizer([{"params": [up, down, s], "rule": "sct"}])
    tensors = [t for p in (up, down, s) for t in (p, p.grad, *(v for v in optimizer.state[p].values() if v.dim()))]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert held == adam_bytes(state_of([(48, 32)], 4)["factored_parameters"])

"""Figures of saved models against dense matrices, and what the theory says of fresh factors."""

import json

import pytest
import torch
from torch.testing import assert_close

import nativerank
from nativerank.bench.conditioning import measure
from nativerank.linalg import retract
from nativerank.models import hf_config, materialize, scaled, skeleton


@pytest.fixture
def saved(tmp_path):
    """Folder of a tiny pocket model in a kind of layer."""
    from nativerank.models import find_preset

    def save(kind, **config):
        preset = scaled(find_preset("pocket"), 64, 1)
        model = skeleton(hf_config(preset))
        nativerank.layers.factorize_modules(model, kind=kind, ratio=0.25)
        folder = tmp_path / f"{kind}{len(config)}"
        nativerank.save(materialize(model, seed=0, init_scale=1.0), folder)
        if config:
            (folder / "config.yaml").write_text(json.dumps(config))
        return str(folder)

    return save


def test_figures_of_a_pair():
    torch.manual_seed(0)
    A, B = torch.randn(9, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    figures, sigma = measure((A, B)), torch.linalg.svdvals(A @ B.mT)[:3]
    a, b = torch.linalg.matrix_norm(A, 2), torch.linalg.matrix_norm(B, 2)
    assert_close(figures["norm_slack"], (a * b / sigma[0]).item())
    assert_close(figures["spread"], (sigma[0] / sigma[2]).item())
    assert figures["imbalance"] >= 1 and figures["condition"] >= figures["balanced_condition"]
    assert figures["smallest_turn"] is None


def test_figures_of_frames():
    torch.manual_seed(0)
    U, V = (retract(torch.randn(d, 3, dtype=torch.float64)) for d in (9, 8))
    figures = measure((U, torch.tensor([-4.0, 1, 2]), V))
    assert_close([figures[k] for k in ("sigma_max", "norm_slack", "imbalance", "condition")], [4.0, 1.0, 1.0, 4.0])
    assert_close(figures["smallest_turn"], 1 / 2**0.5 / 4)
    assert figures["off_orthonormal"] < 1e-14


def test_fresh_factors_are_balanced_and_runs_are_summarised_by_method_and_rate(saved, cli):
    sct = {"method": "sct", "optim": {"lr": 0.01, "aux_lr": 0.02}, "train": {"seed": 0, "steps": 5}}
    result = cli("bench", "conditioning", saved("lowrank"), saved("spectral", **sct), "--json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    frames, pair = sorted(record["cases"], key=lambda row: row["layer"], reverse=True)
    assert (frames["method"], frames["lr"], frames["steps"], frames["seeds"]) == ("sct", 0.01, 5, 1)
    assert (pair["method"], pair["matrices"]) == (None, 7)
    assert_close([pair["worst"][k] for k in ("norm_slack", "imbalance")], [1.0, 1.0], atol=1e-4, rtol=0)  # float32
    assert_close(pair["worst"]["condition"], pair["worst"]["balanced_condition"], rtol=1e-3, atol=0)
    assert_close(frames["worst"]["norm_slack"], 1.0, atol=1e-5, rtol=0)
    assert_close(frames["worst"]["condition"], frames["worst"]["spread"], rtol=1e-4, atol=0)
    assert frames["worst"]["off_orthonormal"] <= 1e-5


def test_the_table_and_a_folder_without_factors(saved, cli, tmp_path):
    out = cli("bench", "conditioning", saved("spectral")).out
    assert "norm bound" in out and "U diag(s) V^T" in out and "model, 1 seed" in out
    result = cli("bench", "conditioning", str(tmp_path / "none"))
    assert result.code == 2 and "none" in result.err

"""The table by parts: it adds up to the step, knows what is made again, and stands at the end of every profiled run."""

import gc
import json

import pytest
import torch

from nativerank.accounting.flops import flops_per_token
from nativerank.methods import build_optimizer, factorize
from nativerank.models import make_hf_config, materialize, read_hf_config, skeleton
from nativerank.train.parts import COMPILED, DOWN, UP, WAYS, Names, parts_of
from nativerank.train.profile import WAIT, Profiler
from nativerank.train.recompute import recompute_blocks
from nativerank.train.step import train_step

CONTEXT, BATCH, RANK = 32, 4, 8
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
}


def profiled(folder, model, method, steps=6):
    """What a profile of a few steps finds: {part: row}, and everything else that it writes."""
    optimizer = build_optimizer(model, method)
    profiler = Profiler(folder, model, CONTEXT, BATCH * CONTEXT, False, {})
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(300, (BATCH, CONTEXT + 1), generator=generator)
        train_step(model, optimizer, [(ids[:, :-1], ids[:, 1:], None)], 1, clip=1.0)
        profiler.step()
    profiler.close()
    found = json.loads((folder / "parts.json").read_text())
    return {row["part"]: row for row in found["parts"]}, found


@pytest.fixture
def make(tiny_config):
    def build(method, architecture=None):
        config = make_hf_config(dict(architecture), "test") if architecture else read_hf_config(tiny_config)
        model = skeleton(config)
        if method != "dense-adamw":
            factorize(model, method, rank=RANK)
        return materialize(model, seed=0, init_scale=1.0).train()

    return build


COMMON = {"head and loss", "attention", "norms", "activation, residuals", "clip", "gradients"}
CASES = [
    ("spectron", None, {DOWN, UP, "optimizer: orthogonalize", "optimizer: norms", "optimizer: AdamW"}),
    ("sct", None, {DOWN, UP, "optimizer: retraction"}),
    ("dense-adamw", None, {"dense matrices", "optimizer: AdamW"}),
    ("spectron", MIXTRAL, {DOWN, UP, "experts"}),
]


@pytest.mark.parametrize(("method", "architecture", "own"), CASES, ids=["spectron", "sct", "dense", "experts"])
def test_parts_add_up_to_the_step_and_to_its_flops(tmp_path, make, method, architecture, own):
    model = make(method, architecture)
    rows, found = profiled(tmp_path, model, method)
    assert set(rows) >= COMMON | own and found["steps"] == 2
    assert sum(row["total_milliseconds"] for row in rows.values()) == pytest.approx(
        found["step_milliseconds"], rel=0.02
    )
    exact = flops_per_token(model, CONTEXT).training * BATCH * CONTEXT / 1e9
    assert sum(row["gflop"] for row in rows.values()) == pytest.approx(exact)
    for name in own - {name for name in own if name.startswith("optimizer")}:
        assert rows[name]["gflop"] > 0
        assert all(rows[name]["milliseconds"][way] > 0 for way in ("forward", "backward"))
    assert all(row["milliseconds"]["again"] == 0 for row in rows.values())


def test_what_runs_again_is_told_apart(tmp_path, make):
    model = make("spectron")
    recompute_blocks(model, "up")
    rows, _ = profiled(tmp_path, model, "spectron")
    for name in (UP, "norms", "attention", "activation, residuals"):
        assert rows[name]["milliseconds"]["again"] > 0
    assert rows["head and loss"]["milliseconds"]["again"] == 0


def test_what_building_left_is_collected_before_steps_are_profiled(tmp_path, make):
    profiler, seen = Profiler(tmp_path, make("spectron"), CONTEXT, BATCH * CONTEXT, False, {}), []
    gc.callbacks.append(lambda phase, info: seen.append((profiler.steps, phase, info["generation"])))
    try:
        for _ in range(WAIT):
            profiler.step()
    finally:
        gc.callbacks.pop()
        profiler.close()
    assert (WAIT, "stop", 2) in seen


def test_layers_that_share_a_product_count_as_down(make):
    """`down` itself has no name and no hook, which would keep it out of joint products."""
    model = make("spectron")
    layer = model.model.layers[0].self_attn.q_proj
    parts = parts_of(model, compiled=False)
    assert parts[layer] == DOWN and parts[layer.up] == UP and layer.down not in parts
    names = Names(parts)
    assert layer._forward_hooks and not layer.down._forward_hooks
    names.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_compiled_blocks_are_one_part(make):
    model = make("spectron")
    parts = parts_of(model, compiled=True)
    assert [m for m, name in parts.items() if name == COMPILED] == list(model.model.layers)
    assert not any(module in parts for module in model.model.layers[0].modules() if module is not model.model.layers[0])


def test_a_run_prints_its_table_also_resumed(tmp_path, cli, flags):
    out = tmp_path / "run"
    fresh = cli("train", *flags(out=out, train__steps=10), "--profile")
    assert fresh.code == 0 and "GFLOP/s" in fresh.out and DOWN in fresh.out
    text = (out / "profile/parts.txt").read_text()
    assert text in fresh.out
    resumed = cli("train", *flags(out=out, train__steps=20, resume="auto"), "--profile")
    assert resumed.code == 0 and (out / "profile/parts.txt").read_text() != text
    assert (out / "profile/parts.txt").read_text() in resumed.out
    values = json.loads((out / "profile/parts.json").read_text())
    assert values["steps"] == 5 and values["method"] == "spectron" and "data" in {p["part"] for p in values["parts"]}
    # A few more steps make no profile, and print none that is older.
    short = cli("train", *flags(out=out, train__steps=22, resume="auto"), "--profile")
    assert short.code == 0 and "GFLOP/s" not in short.out


def test_a_layerwise_run_has_its_updates_in_the_table(tmp_path, cli, flags):
    options = {"optim__layerwise": True, "optim__clip": 0, "train__recompute": "up", "train__steps": 10}
    assert cli("train", *flags(out=tmp_path / "run", **options), "--profile").code == 0
    values = json.loads((tmp_path / "run/profile/parts.json").read_text())
    rows = {row["part"]: row["milliseconds"] for row in values["parts"]}
    updates = [row for name, row in rows.items() if name.startswith("optimizer")]
    assert {"optimizer: orthogonalize", "optimizer: AdamW"} <= set(rows)
    assert all(row["backward"] == row["again"] == 0 for row in updates)
    assert rows[UP]["again"] > 0 and set(rows[UP]) == set(WAYS)


@pytest.mark.slow  # the compiler takes half a minute
@pytest.mark.filterwarnings("ignore")  # torch's own, which its compiler raises and hides
def test_a_compiled_run_has_a_table(tmp_path, cli, flags):
    assert cli("train", *flags(out=tmp_path / "run", train__steps=10), "--profile", "--compile").code == 0
    values = json.loads((tmp_path / "run/profile/parts.json").read_text())
    rows = {row["part"]: row for row in values["parts"]}
    assert rows[COMPILED]["gflop"] > 0 and DOWN not in rows
    assert all(rows[COMPILED]["milliseconds"][way] > 0 for way in ("forward", "backward"))

"""The torchtitan recipe: without torchtitan only what can be read off the file, with it a few steps of its own classes.

The first test runs nothing of torchtitan and shows only that the file is sound and has the methods that 0.3.0 calls.
"""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "examples" / "torchtitan_recipe" / "low_rank_llama3.py"

# What the classes of torchtitan 0.3.0 call, with the arguments they give: (class here, method) -> arguments.
CALLED = {
    ("FactorLinear", "__init__"): ["self", "config"],
    ("FactorLinear", "reset_parameters"): ["self"],
    ("FactorLinear", "parallelize"): ["self", "parallel_dims"],
    ("LowRankConverter", "__init__"): ["self", "config"],
    ("LowRankConverter", "convert"): ["self", "model_config"],
    ("LowRankOptimizers", "__init__"): ["self", "config", "model_parts"],
    ("LowRankOptimizers", "state_dict"): ["self"],
    ("LowRankOptimizers", "load_state_dict"): ["self", "state_dict"],
}


def test_its_classes_have_the_methods_that_torchtitan_calls():
    tree = ast.parse(RECIPE.read_text(encoding="utf-8"))
    methods = {
        (owner.name, f.name): [a.arg for a in f.args.args + f.args.kwonlyargs]
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for f in owner.body
        if isinstance(f, ast.FunctionDef)
    }
    assert {key: methods.get(key) for key in CALLED} == CALLED


@pytest.fixture
def recipe(monkeypatch):
    pytest.importorskip("torchtitan.trainer", reason="torchtitan is not installed", exc_type=ImportError)
    spec = importlib.util.spec_from_file_location("low_rank_llama3", RECIPE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "low_rank_llama3", module)
    spec.loader.exec_module(module)
    return module


def test_with_torchtitan_its_model_trains_in_low_rank(recipe):
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention

    config = recipe.llama3_debugmodel_spectron()
    blueprint = config.model_spec.model
    for _, _, parent, place in list(blueprint.traverse(FlexAttention.Config)):
        setattr(parent, place, ScaledDotProductAttention.Config())  # which a CPU has
    torch.manual_seed(0)
    with torch.device("meta"):
        model = blueprint.build()
    model.verify_module_protocol()
    model.to_empty(device="cpu")
    model.init_states(buffer_device=torch.device("cpu"))
    assert model.layers["0"].feed_forward.w1.rank == 64
    container = config.optimizer.build(model_parts=[model])
    schedule = config.lr_scheduler.build(optimizers=container, training_steps=10)
    ids, losses = torch.randint(2048, (2, 33), generator=torch.Generator().manual_seed(0)), []
    for _ in range(4):
        logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        container.step()
        schedule.step()
        container.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    kept = {name: value.clone() for name, value in container.state_dict().items()}
    container.load_state_dict(kept)
    assert all(torch.equal(value, kept[name]) for name, value in container.state_dict().items())

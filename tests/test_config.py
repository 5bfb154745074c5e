"""The typed configuration: strict, round trips, knows what differs."""

import dataclasses

import pytest
import yaml

from nativerank.config import (
    GuardConfig,
    RunConfig,
    TrainConfig,
    check_keys,
    described,
    differences,
    from_dict,
    hint_of,
    keys,
    nearest,
    to_dict,
)


def test_to_dict_and_back_through_yaml():
    config = RunConfig(method="spectron", train=TrainConfig(steps=3, seed=7), guard=GuardConfig(action="off"))
    again = from_dict(RunConfig, yaml.safe_load(yaml.safe_dump(to_dict(config))))
    assert again == config and again.optim.betas == (0.9, 0.95)


def test_every_key_is_listed_and_has_a_type():
    listed = list(keys(RunConfig))
    assert {"method", "optim.lr", "rank.ratio", "train.checkpoint_every", "data.path", "guard.action"} <= set(listed)
    assert len(listed) == len(set(listed))
    assert all(hint_of(key) is not None for key in listed)
    assert hint_of("train.nonsense") is None and hint_of("train.steps.more") is None


def test_names_that_scripts_rely_on():
    contract = (
        "model.config rank.ratio rank.value train.tokens train.checkpoint_every train.eval_every train.seed optim.lr"
    )
    contract += " optim.aux_lr data.path device compile out resume init track profile method model.preset"
    assert set(contract.split()) <= set(keys(RunConfig))


def test_every_key_is_explained():
    """The documentation of a group names each of its keys; the help is made from it."""
    for cls in [RunConfig, *(hint_of(f.name) for f in dataclasses.fields(RunConfig))]:
        if not dataclasses.is_dataclass(cls):
            continue
        for field in dataclasses.fields(cls):
            group = dataclasses.is_dataclass(hint_of(field.name)) if cls is RunConfig else False
            assert group or f"{field.name}:" in cls.__doc__, f"{cls.__name__}.{field.name}"


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().method = "spectron"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optim": {"lrr": 1.0}}, r"unknown config key optim\.lrr; did you mean optim\.lr\?"),
        ({"trian": {}}, r"unknown config key trian; did you mean train\?"),
        ({"qqq": 1}, r"unknown config key qqq$"),
        ({"train": 3}, r"config key train holds a group of keys, got 3"),
        ({"train": {"steps": "3"}}, r"train\.steps must be a whole number, got '3'"),
        ({"train": {"steps": True}}, r"train\.steps must be a whole number, got True"),
        ({"train": {"steps": 1.0}}, r"train\.steps must be a whole number, got 1\.0"),
        ({"optim": {"lr": float("inf")}}, r"optim\.lr must be a finite number, got inf"),
        ({"optim": {"clip": None}}, r"optim\.clip must be a number, got None"),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas takes 2 values, got \[0\.9\]"),
        ({"optim": {"betas": [0.9, "x"]}}, r"optim\.betas must be a number, got 'x'"),
        ({"rank": {"include": "q_proj"}}, r"rank\.include must be a list such as .*, got 'q_proj'"),
        ({"rank": {"include": [3]}}, r"rank\.include must be a text, got 3"),
        ({"rank": {"overrides": {"q": "x"}}}, r"rank\.overrides\.q must be a whole number, got 'x'"),
        ({"compile": "yes"}, r"compile must be true or false, got 'yes'"),
        ({"guard": {"action": "pray"}}, r"guard\.action must be one of off, skip, rollback, got 'pray'"),
    ],
)
def test_what_does_not_fit_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        from_dict(RunConfig, values)


def test_whole_numbers_pass_as_numbers():
    config = from_dict(RunConfig, {"optim": {"lr": 1, "betas": [0, 0.5]}})
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float) and isinstance(config.optim.betas[0], float)


def test_check_keys_knows_groups_and_leaves_tables_alone():
    check_keys({"rank": {"overrides": {"any.pattern*": 3}}, "method": "x", "train": {"steps": 1}})
    check_keys(None)
    with pytest.raises(ValueError, match=r"unknown config key rank\.overides; did you mean rank\.overrides\?"):
        check_keys({"rank": {"overides": {}}})


def test_differences_are_dotted():
    a = RunConfig()
    b = dataclasses.replace(a, method="x", train=dataclasses.replace(a.train, seed=1))
    assert differences(a, a) == [] and differences(a, b) == ["method", "train.seed"]


def test_nearest_and_described():
    assert nearest("optmi", ["optim", "train"]) == "; did you mean optim?"
    assert nearest("zzz", ["optim"]) == ""
    assert described(hint_of("optim.schedule")) == "one of cosine, wsd, constant"
    assert described(hint_of("optim.lr")) == "a number or null"

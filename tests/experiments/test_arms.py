"""Arms and values as they are written on the command line."""

import pytest

from nativerank.experiments.arms import ONCE, Arm, Value, configured, parse_arms, parse_values, typed, with_ratios


def test_arms_with_and_without_settings():
    text = "spectron, spectron[optim.nesterov=true],self-guided[guide.init=dense; guide.share=0.25,optim.lr=1e-3]"
    plain, nesterov, guided = parse_arms(text)
    assert plain == Arm("spectron", "spectron", {})
    assert nesterov == Arm("spectron[optim.nesterov=true]", "spectron", {"optim.nesterov": True})
    assert guided.settings == {"guide.init": "dense", "guide.share": 0.25, "optim.lr": 0.001}
    assert guided.label == "self-guided[guide.init=dense;guide.share=0.25;optim.lr=0.001]"
    assert parse_arms(guided.label) == [guided]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.lr", "3", 3.0),
        ("optim.lr", "1e-3", 0.001),
        ("optim.lr", "null", None),
        ("guard.action", "off", "off"),  # which YAML takes for false
        ("optim.orthogonalizer", "none", "none"),
        ("optim.certified", "true", True),
        ("optim.betas", "[0.9, 0.99]", [0.9, 0.99]),
        ("rank.exclude", "[down_proj, '*.0.*']", ["down_proj", "*.0.*"]),
        ("model.config", "12", "12"),
    ],
)
def test_a_value_takes_the_type_of_its_key(key, text, value):
    found = typed(key, text)
    assert found == value and type(found) is type(value)
    assert configured({key: found})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("optim.clip=1000000000", "optim.clip=1e9"),
        ("optim.clip=1e9", "optim.clip=1e9"),
        ("optim.eps=1e-09", "optim.eps=1e-9"),
        ("optim.lr=0.0048", "optim.lr=0.0048"),
        ("optim.clip=3.0", "optim.clip=3"),
        ("optim.clip=123456789", "optim.clip=123456789"),
        ("optim.nesterov=null", "optim.nesterov=null"),
        ("optim.certified=true", "optim.certified=true"),
    ],
)
def test_settings_are_shown_as_one_writes_them(text, shown):
    (arm,) = parse_arms(f"spectron[{text}]")
    assert arm.label == f"spectron[{shown}]" and parse_arms(arm.label) == [arm]


def test_lists_in_brackets_are_not_torn():
    (arm,) = parse_arms("spectron[rank.exclude=[q_proj,k_proj],optim.betas=[0.9,0.99]]")
    assert arm.settings == {"rank.exclude": ["q_proj", "k_proj"], "optim.betas": [0.9, 0.99]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "--methods names no method"),
        (" , ", "--methods names no method"),
        ("spectron,spektron", "unknown method 'spektron'; did you mean spectron"),
        ("spectron,spectron", "--methods names spectron twice"),
        ("spectron[optim.lr=0.1", "brackets do not fit in --methods"),
        ("spectron]optim.lr=0.1[", "brackets do not fit in --methods"),
        ("spectron[optim.lr=0.1]x", "brackets in .* do not fit"),
        ("spectron[]", "brackets of spectron.* are empty"),
        ("spectron[fast]", "'fast' in spectron.* is no setting; write KEY=VALUE"),
        ("spectron[=3]", "'=3' in spectron.* is no setting"),
        ("spectron[optim.nestrov=true]", "unknown config key optim.nestrov; did you mean optim.nesterov"),
        ("spectron[optim=true]", "config key optim holds a group of keys"),
        ("spectron[optim.nesterov=7]", "config key optim.nesterov must be true or false, got 7"),
        ("spectron[optim.lr=fast]", "config key optim.lr must be a number, got 'fast'"),
        ("spectron[optim.step=long]", "config key optim.step must be one of paper, root, got 'long'"),
        ("spectron[optim.lr=.1;optim.lr=.2]", "sets optim.lr twice"),
        ("spectron[train.seed=3]", "cannot set train.seed: --seeds gives the seeds"),
        ("spectron[out=x]", "cannot set out"),
    ],
)
def test_what_cannot_be_read_is_said(text, said):
    with pytest.raises(ValueError, match=said):
        parse_arms(text)


def test_values_are_absolute_or_multiples():
    values = parse_values("--lrs", "0.5x, 1x,0.02")
    assert values == (Value(0.5, True), Value(1.0, True), Value(0.02)) and ONCE == values[1:2]
    assert [value.at(0.0048) for value in values] == [0.0024, 0.0048, 0.02]
    assert Value(1.6, True).at(0.012345) == 0.0198 and Value(1.0, True).at(0.012345) == 0.012345


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "--lrs is empty"),
        ("fast", "takes numbers, or multiples such as 0.5x, got 'fast'"),
        ("0.1,x", "got 'x'"),
        ("0", "positive numbers, got '0'"),
        ("-1x", "positive numbers, got '-1x'"),
        ("nan", "positive numbers"),
        ("inf", "positive numbers"),
        ("0.1,0.10", "names a value twice"),
    ],
)
def test_values_that_are_none(text, said):
    with pytest.raises(ValueError, match=said):
        parse_values("--lrs", text)


def test_ratios_multiply_low_rank_arms_only():
    arms = with_ratios(parse_arms("spectron,dense-adamw"), parse_values("--ratios", "0.125,0.25"))
    assert [arm.label for arm in arms] == ["spectron[rank.ratio=0.125]", "spectron[rank.ratio=0.25]", "dense-adamw"]
    with pytest.raises(ValueError, match=r"sets rank\.value itself"):
        with_ratios(parse_arms("spectron[rank.value=4]"), (Value(0.5),))
    for bad in (Value(0.5, True), Value(1.5)):
        with pytest.raises(ValueError, match="shares of the width"):
            with_ratios(parse_arms("spectron"), (bad,))

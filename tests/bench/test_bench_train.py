"""The benchmark runs the loop's own step and a stock model's by turns, and adds up what they say."""

import json

import pytest
import torch
from torch.testing import assert_close

from nativerank.bench import train
from nativerank.bench.contestants import PHASES, make
from nativerank.bench.train import bench_train
from nativerank.cli.main import main
from nativerank.models import find_preset, scaled
from nativerank.train.step import Stopwatch

NAMES = ["spectron", "spectron+up", "lowrank-adamw", "dense-adamw+apart+whole", "hf-dense"]


@pytest.fixture(scope="module")
def result():
    return bench_train("pocket", NAMES, layers=1, tokens=256, repeats=3)


def test_phases_shares_and_ratios_fit_together(result):
    (case,) = result["cases"]
    assert list(case["seconds"]) == NAMES and case["reference"] == "hf-dense" and case["ratio"]["hf-dense"] == 1
    for name in NAMES:
        seconds, phases, (least, most) = case["seconds"][name], case["phases"][name], case["spread"][name]
        assert all(phases[phase] > 0 for phase in PHASES) and least <= seconds <= most
        assert case["tokens_per_second"][name] == pytest.approx(256 / seconds)
        assert 0 < case["optimizer_share"][name] < 1
        assert least / case["spread"]["hf-dense"][1] <= case["ratio"][name] <= most / case["spread"]["hf-dense"][0]
    assert set(case["optimizer_adds"]) == {"spectron"}  # spectron+up has no twin here
    assert set(case["probe_share"]) == set(NAMES) - {"hf-dense"} and min(case["probe_share"].values()) > 0


def test_the_stock_twin_has_the_shapes_of_ours(result):
    (case,) = result["cases"]
    assert case["parameters"]["hf-dense"] == case["parameters"]["dense-adamw+apart+whole"]
    assert case["flop_share"]["dense-adamw+apart+whole"] == 1 > case["flop_share"]["spectron"]
    assert case["parameters"]["spectron"]["non_embedding"] < case["parameters"]["hf-dense"]["non_embedding"]


@pytest.mark.filterwarnings("ignore")  # torch's own, which its compiler raises and hides
@pytest.mark.parametrize(
    "name",
    [
        "spectron+up+whole",
        "spectron+blocks+apart",
        "hf-dense",
        pytest.param("spectron+compile", marks=pytest.mark.slow),
    ],
)
def test_every_contestant_learns(name):
    preset = scaled(find_preset("pocket"), None, 1)
    side = make(name, preset, torch.device("cpu"))
    before = [p.detach().clone() for p in side.model.parameters()]
    ids = torch.randint(preset.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    seconds = side.step((ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None))
    assert set(seconds) == set(PHASES)
    assert all((p - old).abs().max() > 0 for p, old in zip(side.model.parameters(), before, strict=True))


def test_switches_change_the_cost_and_not_the_step():
    preset = scaled(find_preset("pocket"), None, 1)
    ids = torch.randint(preset.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    steps = []
    for name in ("lowrank-adamw", "lowrank-adamw+blocks+whole+apart"):
        side = make(name, preset, torch.device("cpu"))
        side.step((ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None))
        steps.append([p.grad for p in side.model.parameters()])
    for one, other in zip(*steps, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_spectron_adds_is_its_optimizer_over_the_step_of_its_twin():
    def parts(forward, optimizer):
        return {"forward": [forward] * 3, "backward": [2.0] * 3, "clip": [0.5] * 3, "optimizer": [optimizer] * 3}

    seconds = {"spectron": parts(9.0, 0.9), "lowrank-adamw": parts(1.0, 0.5), "dense-adamw": parts(4.0, 0.5)}
    whole = {name: train.totals(one) for name, one in seconds.items()}
    assert train.optimizer_adds(seconds, whole) == {"spectron": pytest.approx(0.4 / 4)}  # not its slow forward


def test_another_width_keeps_the_proportions():
    demo = find_preset("demo")
    wide = scaled(demo, 512, None)
    assert (wide.d_model, wide.d_ffn, wide.heads, wide.value) == (512, 1408, 8, 128)
    assert wide.d_model // wide.heads == demo.d_model // demo.heads and wide.layers == demo.layers
    with pytest.raises(ValueError, match=r"multiple of the preset's head size 64, got 300"):
        scaled(demo, 300, None)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["spectron"], "two contestants at least"),
        (["spectron", "spectron"], "each once"),
        (["spectron", "hf-dense+compile"], "of hf-dense: none"),
        (["spectron+fast", "hf-dense"], "unknown switch 'fast'"),
        (["dense-adamw+up", "hf-dense"], "up is for factors"),
        (["spectrom", "hf-dense"], "unknown method 'spectrom'"),
    ],
)
def test_contestants_that_cannot_be(methods, message):
    with pytest.raises(ValueError, match=message):
        bench_train("pocket", methods)


def test_a_step_is_whole_sequences():
    with pytest.raises(ValueError, match="multiple of the context, 128, got 100"):
        bench_train("pocket", tokens=100)


def test_json_on_stdout_is_json_alone(capsys):
    flags = "--model.preset pocket --layers 1 --tokens 128 --repeats 1 --methods spectron hf-dense --json".split()
    assert main(["bench", "train", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["benchmark"] == "train"


def test_the_table_names_what_was_measured(capsys):
    flags = "--model.preset pocket --layers 1 --tokens 128 --repeats 1 --methods spectron lowrank-adamw".split()
    assert main(["bench", "train", *flags]) == 0
    out = capsys.readouterr().out
    for words in ("/ lowrank-adamw", "optimizer, of the step: spectron", "spectron adds", "probes at the default"):
        assert words in out


@pytest.mark.parametrize("name", ["repeats", "d_model", "layers", "context", "tokens", "vocab_size", "threads"])
def test_sizes_below_one_are_one_line(name, capsys):
    assert main(["bench", "train", f"--{name}", "0"]) == 2
    assert capsys.readouterr().err == f"nativerank: error: --{name} must be at least 1, got 0\n"


def test_processor_time_is_of_one_thread_and_only_inside(cli):
    sizes = "--model.preset pocket --layers 1 --tokens 128 --repeats 1 --methods spectron hf-dense".split()
    before = Stopwatch.clock
    result = cli("bench", "train", *sizes, "--threads", "1", "--clock", "cpu", "--json")
    assert result.code == 0 and json.loads(result.out)["settings"]["clock"] == "cpu"
    assert Stopwatch.clock is before
    refused = cli("bench", "train", *sizes, "--threads", "2", "--clock", "cpu")
    assert refused.code == 2 and "--clock cpu adds up the time of all threads" in refused.err


def test_what_does_not_compile_is_in_the_record_and_not_in_standard_output(monkeypatch, cli):
    monkeypatch.setattr("nativerank.bench.contestants.compile_blocks", lambda model, say: say("no single graph"))
    flags = "--model.preset pocket --layers 1 --tokens 256 --repeats 1 --methods spectron+compile dense-adamw"
    result = cli("bench", "train", *flags.split(), "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["notes"] == ["spectron+compile: no single graph"] and found["notes"][0] in result.err
    assert found["settings"]["device"] == "cpu" and found["settings"]["threads"] is None


def test_guided_factors_take_part_as_at_the_beginning_of_a_run():
    side = make("self-guided", scaled(find_preset("pocket"), None, 1), torch.device("cpu"))
    assert 0 < side.optimizer.guides.guided_steps < find_preset("pocket").steps
    ids = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    assert set(side.step((ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None))) == set(PHASES)


def test_steps_in_a_row_are_not_waited_for():
    """The mean of them."""
    waited = []

    class Side:
        def step(self, batch, wait=True):
            waited.append(wait)

    assert 0 < train.in_a_row(Side(), None, torch.device("cpu"), steps=3) < 1
    assert waited == [False] * 3


def test_ratios_are_of_whole_steps_and_shares_of_timed_phases():
    """On CUDA the two are timed apart."""
    sides = [
        make(name, scaled(find_preset("pocket"), None, 1), torch.device("cpu")) for name in ("spectron", "hf-dense")
    ]
    phases = {phase: [1.0, 1.0] for phase in PHASES}
    seconds, whole = {side.name: phases for side in sides}, {"spectron": [1.0, 1.0], "hf-dense": [2.0, 2.0]}
    case = train.summary({"tokens": 8}, sides, seconds, whole, {"spectron": [0.0, 0.0]}, 256)
    assert case["ratio"]["spectron"] == 0.5 and case["tokens_per_second"] == {"spectron": 8, "hf-dense": 4}
    assert case["optimizer_share"]["spectron"] == 0.25

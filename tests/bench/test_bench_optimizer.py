"""The optimizer's benchmark on tiny shapes: its keys and ratios, its FLOPs against PyTorch's counter, bad input."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nativerank.accounting.algebra import algebra_flops
from nativerank.bench.measure import race, ratio, rounds
from nativerank.bench.optimizer import low_rank_skeleton
from nativerank.bench.plain import PlainSpectron, plain_newton_schulz
from nativerank.layers.base import factor_layers
from nativerank.linalg import orthogonalize, orthogonalize_plain, power_iteration
from nativerank.models import PRESETS
from nativerank.optim.optimizer import LowRankOptimizer

TINY = "--model.preset pocket --layers 1 --d_model 64 --tokens_per_step 32 --repeats 2 --threads 1".split()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    from nativerank.cli.main import main

    file = tmp_path_factory.mktemp("bench") / "result.json"
    assert main(["bench", "optimizer", *TINY, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_every_time_and_ratio_is_there(result):
    small, large, layer, step = result["cases"]
    assert all(case["case"]["threads"] == 1 and min(case["seconds"].values()) > 0 for case in result["cases"])
    assert [case["case"]["shape"] for case in (small, large)] == [[64, 16], [128, 32]]
    for case in (small, large):
        assert set(case["ratio"]) == {"plain", "gram", "gram_products"} and case["ratio"]["plain"] == 1
        assert case["relative_difference"] <= 1e-3
    assert {"d_ffn": 256, "rank": 16, "tokens_per_step": 32}.items() <= layer["case"].items()
    shares = {"forward_backward", "algebra", "spectron", "certified", "exact", "plain"}
    assert set(layer["ratio"]) == shares and layer["reference"] == "forward_backward"
    assert step["case"]["factors"] == 14 and set(step["ratio"]) == {"one_at_a_time", "spectron"}
    assert set(result) == {"benchmark", "settings", "environment", "cases", "flops"}


def test_the_table_names_what_was_measured(capsys):
    from nativerank.cli.main import main

    assert main(["bench", "optimizer", *TINY]) == 0
    out = capsys.readouterr().out
    for words in ("Newton-Schulz of [64, 16]", "certified", "all 14 factors", "4 d r^2", "1% at"):
        assert words in out


@pytest.mark.parametrize("name", ["repeats", "d_model", "layers", "tokens_per_step", "threads"])
def test_sizes_below_one_are_one_line(name, capsys):
    from nativerank.cli.main import main

    assert main(["bench", "optimizer", f"--{name}", "0"]) == 2
    assert capsys.readouterr().err == f"nativerank: error: --{name} must be at least 1, got 0\n"


def test_a_width_that_is_no_multiple_of_the_head_size_is_one_line(capsys):
    from nativerank.cli.main import main

    assert main(["bench", "optimizer", "--d_model", "100"]) == 2
    assert "multiple of 64, the head size, got 100" in capsys.readouterr().err


def test_the_plain_form_is_the_textbooks():
    for shape in [(60, 12), (12, 60)]:
        M = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        assert (plain_newton_schulz(M).double() - orthogonalize_plain(M)).abs().max() < 1e-5


@pytest.mark.parametrize("stacked", [False, True])
def test_the_published_form_steps_as_ours_does(stacked):
    generator = torch.Generator().manual_seed(0)
    shapes = [(60, 12), (12, 40)] * 2
    factors = [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in factors]
    published = PlainSpectron([(factors[0], factors[1]), (factors[2], factors[3])], lr=0.1, stacked=stacked)
    ours = LowRankOptimizer([{"params": twins, "rule": "spectron", "lr": 0.1, "momentum": 0.95}])
    for _ in range(3):
        for p, twin in zip(factors, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            twin.grad = p.grad.clone()
        published.step()
        ours.step()
    for p, twin in zip(factors, twins, strict=True):
        assert (p - twin).abs().max() < 2e-3  # cold power vectors differ


def test_counted_flops_are_those_of_the_model_and_of_the_algebra():
    model = low_rank_skeleton(PRESETS["pocket"])
    counted = algebra_flops(model, context=16)
    totals = {}
    for form, run in (("gram", orthogonalize), ("plain", plain_newton_schulz)):
        with FlopCounterMode(display=False) as counter:
            for layer in factor_layers(model).values():
                for X in layer.factors():
                    run(X)
                    power_iteration(X, X[:, 0])
        totals[form] = counter.get_total_flops()
    assert counted["per_step"] == totals
    matrices = 3 * sum(gemm.flops for layer in factor_layers(model).values() for gemm in layer.gemms())
    assert counted["forward_backward_per_token"]["matrices"] == matrices
    for form, total in totals.items():
        tokens = counted["one_percent_tokens"][form]["matrices"]
        assert total / (tokens * matrices) == pytest.approx(0.01, rel=1e-3)
        row = counted["share_of_matrices"][0]
        assert row[form] == pytest.approx(total / (row["tokens_per_step"] * matrices))


def test_contestants_take_turns_and_warmups_do_not_count():
    assert list(rounds("ab", repeats=2, warmup=1)) == [(["b", "a"], False), (["a", "b"], True), (["b", "a"], True)]
    calls = []
    seconds = race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, torch.device("cpu"))
    assert "".join(calls) == "baabba" and [len(s) for s in seconds.values()] == [2, 2]
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0

"""The benchmark runs what `nativerank generate` runs, and its bytes are those of the tensors."""

import json

import pytest
import torch

import nativerank as nr
from nativerank.accounting.memory import weights_bytes
from nativerank.bench.generate import (
    LEAST_REPEATS,
    LEAST_TOKENS,
    bench_generate,
    in_words,
    noise,
)
from nativerank.bench.generate_memory import measure
from nativerank.bench.generate_sides import CLOCKS, Clock, Source
from nativerank.cli.bench_generate import _table, show_generate
from nativerank.hub.forms import MARGIN, Size, Work, choose, measurements, size_of

SMALL = dict(preset_name="pocket", layers=1, batches=[1, 3], prompt_tokens=5, new_tokens=4)
D, FFN, VOCAB, KV_WIDTH, HEAD = 128, 352, 1024, 128, 32  # of pocket, whose rank is 32


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NATIVERANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def result(cache):
    return bench_generate(**SMALL, ratios=[0.25, 0.5], repeats=2, memory=False)


@pytest.mark.parametrize(("form", "rank"), [("factored", 32), ("merged", None), ("dense", None)])
def test_bytes_are_those_of_the_tensors(form, rank):
    """Float32 matrices of one layer, embedding and head, three norms, rotary frequencies (kept twice)."""
    shapes = [(D, D)] * 4 + [(D, FFN)] * 2 + [(FFN, D)]
    hidden = sum(rank * (a + b) if rank else a * b for a, b in shapes)
    assert weights_bytes(Source(preset="pocket", layers=1).model(form, None)) == 4 * (
        hidden + 2 * VOCAB * D + 3 * D + 2 * HEAD // 2
    )


def test_speeds_ratios_and_words_fit_together(result):
    assert [(s["form"], s["ratio"]) for s in result["cases"]] == [
        ("factored", 0.25), ("factored", 0.5), ("merged", None), ("dense", None),
    ]  # fmt: skip
    for side in result["cases"]:
        for row, batch in zip(side["batches"], (1, 3), strict=True):
            assert row["batch"] == batch and row["prefill_seconds"] > 0
            assert row["prefill_tokens_per_second"] == pytest.approx(batch * 5 / row["prefill_seconds"])
            assert row["decode_tokens_per_second"] == pytest.approx(batch * 3 / row["decode_seconds"])
            assert row["tokens_per_second"] == pytest.approx(batch * 4 / row["whole_seconds"])
    assert [one["ratio"] for one in result["speedup"]] == [0.25, 0.5]
    for one in result["speedup"]:
        for phase, words in one["faster"].items():
            assert words == in_words([1, 3], [row[phase] > 1 for row in one["batches"]])


def test_the_forms_are_one_model(cache):
    source = Source(preset="pocket", layers=1)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        factored, merged, dense = (source.model(form, 0.5)(ids).logits for form in ("factored", "merged", "dense"))
    assert (factored - merged).abs().max() <= 1e-4 * merged.abs().max()
    assert dense.shape == merged.shape and (dense - merged).abs().max() > 0.1 * merged.abs().max()


def test_auto_finds_what_was_measured(cache):
    result = bench_generate(
        **SMALL | {"new_tokens": LEAST_TOKENS}, ratios=[0.25, 0.5], repeats=LEAST_REPEATS, memory=False
    )
    known = measurements()
    assert [one["share"] for one in known] == [
        size_of(Source("", "pocket", None, 1).factored(r)).share for r in (0.25, 0.5)
    ]
    for one, speedup in zip(known, result["speedup"], strict=True):
        work = Work(3, 5, LEAST_TOKENS)
        choice = choose(Size(one["dense"], one["share"]), work, torch.device("cpu"))
        assert one["noise"] == noise(result) >= 0 and "measured at batch 3" in choice.reason
        row, three = one["batches"][1], speedup["batches"][1]
        assert row["batch"] == 3 and three["batch"] == 3
        times = {f: row[f]["prefill_seconds"] + LEAST_TOKENS * row[f]["token_seconds"] for f in ("factored", "merged")}
        times["merged"] += one["merge_seconds"]
        ahead = max(times.values()) / min(times.values()) - 1 > max(noise(result), MARGIN)
        assert choice.form == (min(times, key=lambda form: times[form]) if ahead else "factored")


@pytest.mark.parametrize("quick", [{"repeats": LEAST_REPEATS - 1}, {"new_tokens": LEAST_TOKENS - 1}], ids=str)
def test_a_quick_trial_is_not_kept(cache, quick, capsys):
    enough = {"batches": [1], "new_tokens": LEAST_TOKENS, "repeats": LEAST_REPEATS}
    found = bench_generate(**SMALL | enough | quick, memory=False)
    assert found["remembered"] is False and not cache.exists()
    show_generate(found)
    assert "not kept for `nativerank generate --form auto`" in capsys.readouterr().out


def job(form, ratio=0.5, **changes):
    base = {"source": {"preset": "pocket", "layers": 1}, "form": form, "ratio": ratio, "device": "cpu"}
    return base | {"batches": [1, 3], "prompt_tokens": 5, "new_tokens": 4} | changes


@pytest.mark.parametrize("form", ["factored", "merged", "dense"])
def test_memory_of_a_form(form):
    found = measure(job(form))
    assert found["weights_bytes"] == weights_bytes(Source(preset="pocket", layers=1).model(form, 0.5))
    for batch, row in zip((1, 3), found["batches"], strict=True):
        # Keys and values of every position but the last token's, which nobody attends to.
        assert row["cache_bytes"] == 2 * batch * (5 + 4 - 1) * KV_WIDTH * 4
        assert row["peak_bytes"] is None or row["peak_bytes"] > found["weights_bytes"] + row["cache_bytes"]


@pytest.mark.parametrize("kind", ["wall", "cpu"])
def test_the_clock_tells_the_first_token_from_the_others(kind, monkeypatch):
    times = iter([1.0, 3.0, 3.5, 4.5])
    monkeypatch.setitem(CLOCKS, kind, lambda: next(times))
    clock = Clock(kind)
    for _ in range(4):
        clock.put(torch.zeros(1))
    assert clock.seconds() == {"prefill": 2.0, "decode": 1.5}


@pytest.mark.parametrize(
    ("faster", "words"),
    [
        ([1, 1, 1], "at every batch measured"),
        ([0, 0, 0], "at no batch measured"),
        ([1, 1, 0], "up to batch 2"),
        ([0, 1, 1], "from batch 2 on"),
        ([0, 1, 0], "at batch 2"),
        ([1, 0, 1], "at batch 1, 4"),
    ],
)
def test_in_words(faster, words):
    assert in_words([1, 2, 4], [bool(f) for f in faster]) == words


def test_a_folder_is_measured_as_it_is(cache, tmp_path):
    nr.save(Source(preset="pocket", layers=1).factored(0.5), tmp_path / "model")
    found = bench_generate(str(tmp_path / "model"), batches=[2], prompt_tokens=4, new_tokens=2, repeats=1, memory=False)
    assert found["settings"]["folder"] == str(tmp_path / "model") and found["cases"][0]["ratio"] is None
    nr.save(nr.load(tmp_path / "model"), tmp_path / "dense", format="dense")
    with pytest.raises(ValueError, match="dense holds no factors, so there are no forms to compare"):
        bench_generate(str(tmp_path / "dense"), memory=False)


def test_processor_time_is_of_one_thread(cache, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert bench_generate(**SMALL, repeats=1, memory=False, clock="cpu")["settings"]["clock"] == "cpu"
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="--clock cpu adds up the time of all threads"):
        bench_generate(**SMALL, memory=False, clock="cpu")


def test_the_tables_fit_a_terminal(result, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show_generate(result)
    shown = capsys.readouterr().out
    assert shown.isascii(), "no boxes"
    lines = shown.splitlines()
    assert lines[lines.index("factored 0.25 is faster than merged:") + 1].startswith("  decode   ")
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.slow
def test_the_command_measures_memory_in_fresh_processes(cli, cache, tmp_path):
    words = "--model.preset pocket --layers 1 --batches 1 --prompt_tokens 4 --new_tokens 2 --repeats 1 --json".split()
    shown = cli("bench", "generate", *words, tmp_path / "x.json")
    assert shown.code == 0 and "memory in MB" in shown.out
    for side in json.loads((tmp_path / "x.json").read_text())["cases"]:
        (row,) = side["batches"]
        assert row["cache_bytes"] == 2 * 5 * KV_WIDTH * 4
        assert side["base_bytes"] + side["weights_bytes"] < row["peak_bytes"] < 2e9


def test_quiet_prints_nothing(cli, cache):
    words = (
        "--model.preset pocket --layers 1 --batches 1 --prompt_tokens 4 --new_tokens 2 --repeats 1 --no_memory --quiet"
    )
    done = cli("bench", "generate", *words.split())
    assert (done.code, done.out, done.err) == (0, "", "")


def test_wide_tables_come_in_parts():
    rows = {"factored 0.25": ["1,234,567.8"] * 9, "merged": ["1.0"] * 9}
    lines = _table("a title", "form", [f"column {i}" for i in range(9)], rows).splitlines()
    assert all(len(line) <= 80 for line in lines) and len(lines) == 1 + 2 * 3
    assert " ".join(lines).count("column ") == 9 and " ".join(lines).count("1,234,567.8") == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batches", "0", "2"], "--batches must be at least 1, got 0"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--new_tokens", "1"], "--new_tokens must be at least 2"),
        (["--prompt_tokens", "250"], "are 282 together, the model's context only 256"),
        (["--rank.ratio", "0"], "ratio must"),
        (["--model.preset", "nothing"], "unknown preset 'nothing'"),
        (["nowhere"], "no such folder: nowhere"),
        (["nowhere", "--layers", "2"], "nowhere has its sizes and ranks"),
    ],
)
def test_bad_input_is_one_line(cli, cache, words, said):
    found = cli("bench", "generate", *words)
    assert found.code == 2 and found.err.count("\n") == 1 and said in found.err

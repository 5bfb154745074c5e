"""The benchmark of orthonormal factors on tiny shapes: a race against free factors."""

import json

TINY = "--model.preset pocket --layers 1 --batch_size 1 --micro_batches 2 --repeats 2".split()


def test_shares_are_those_of_the_race(cli, tmp_path):
    result = cli("bench", "frames", *TINY, "--json", str(tmp_path / "found.json"))
    assert result.code == 0 and "2 micro-batches, 256 tokens a step" in result.out
    found = json.loads((tmp_path / "found.json").read_text())
    (case,) = found["cases"]
    assert case["case"] == {"micro_batches": 2, "tokens_per_step": 256} and found["settings"]["preset"] == "pocket"
    assert set(case["share"]) == set(case["seconds"]) and case["share"][case["reference"]] == 0
    assert max(case["share"].values()) < 1

"""result.json: what is written is read, scale by scale; a damaged file is named."""

import pytest
from made import outcome, race

from nativerank.reproduce.code_hash import code_hash
from nativerank.reproduce.store import compact, config_hash, read, write


def test_scales_are_written_one_by_one(tmp_path):
    assert read(tmp_path) == {}
    first, second = outcome({"r": race({4: {"a": 3.0}})}), outcome(measures={"m": {"x": [1, 2]}})
    write(tmp_path, "pocket", first)
    write(tmp_path, "desk", second)
    assert read(tmp_path) == {"desk": second, "pocket": first}


@pytest.mark.parametrize("text", ["", "[]", '{"pocket": {}}', '{"pocket": 3}', "{"])
def test_a_damaged_file_is_an_error(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"result\.json"):
        read(tmp_path)


def test_other_code_and_other_experiments_make_a_result_stale(write_card, scale):
    card = write_card("ablation", [], races={"one": {"arms": ["spectron"]}})
    now = config_hash(card, "pocket", scale)
    fresh = outcome(config_hash=now, code_hash=code_hash())
    assert fresh.stale(card, "pocket", scale) == []
    assert len(outcome(config_hash=now, code_hash="other").stale(card, "pocket", scale)) == 1
    assert len(outcome(config_hash="other", code_hash="other").stale(card, "pocket", scale)) == 2


def test_the_hash_of_experiments_leaves_words_out(root, write_card, scale):
    one = write_card("ablation", [], races={"one": {"arms": ["spectron"]}}, note="so")
    two = write_card("tsvd", [], races={"one": {"arms": ["spectron"]}}, note="otherwise")
    three = write_card("ours", [], races={"one": {"arms": ["spectron", "sct"]}})
    hashes = [config_hash(card, "pocket", scale) for card in (one, two, three)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_lists_of_numbers_take_a_line():
    assert compact('{\n "a": [\n  1.0,\n  2.0\n ]\n}') == '{\n "a": [1.0, 2.0]\n}'

"""The folder format: what is written is read back, damage is named, nothing half-written carries the name."""

import builtins
import errno
import json
import os
import shutil

import numpy as np
import pytest

from nativerank.data import integrity, shards
from nativerank.data.integrity import cache_dir
from nativerank.data.shards import Dataset, ShardWriter, Split, token_dtype, verify
from nativerank.data.tokenizer import end_of_text_id, tokenizer_hash, train_bpe, vocab_size
from nativerank.files import new_folder


def write_folder(out, tokens, shard_tokens=100, val=50):
    """A prepared folder that holds the given tokens as its train split."""
    bpe = train_bpe(["some text"], 300)
    with new_folder(out) as folder:
        (folder / "tokenizer.json").write_text(bpe.to_str())
        splits = {}
        for name, part in (("train", tokens), ("val", np.arange(val))):
            with ShardWriter(folder, name, vocab_size(bpe), shard_tokens) as writer:
                for piece in np.array_split(part, 7):
                    writer.write(piece, documents=1, text_bytes=10)
                splits[name] = writer.close()
        manifest = {"dtype": "uint16", "vocab_size": vocab_size(bpe), "eot_id": end_of_text_id(bpe), "splits": splits}
        shards.write_manifest(folder, manifest | {"tokenizer_sha256": tokenizer_hash(bpe)})
    return out


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "out", np.arange(1000) % 257)


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 1000, 5000])
def test_what_is_written_is_read_across_shard_boundaries(tmp_path, shard_tokens):
    tokens = np.random.default_rng(0).integers(0, 257, 400)
    split = Dataset.open(write_folder(tmp_path / "out", tokens, shard_tokens)).split("train")
    assert (split.tokens, split.documents, split.text_bytes) == (400, 7, 70)
    assert len(list((tmp_path / "out").glob("train-*.bin"))) == -(-400 // shard_tokens)
    for start, count in [(0, 400), (0, 0), (400, 0), (399, 1), (13, 29), (95, 10), (100, 100)]:
        read = split.read(start, count)
        assert read.dtype == np.int64 and np.array_equal(read, tokens[start : start + count])
    for start, count in [(-1, 3), (398, 3), (401, 0)]:
        with pytest.raises(IndexError, match="a split with 400"):
            split.read(start, count)


@pytest.mark.parametrize("vocab, dtype, size", [(300, "uint16", 2), (65536, "uint16", 2), (65537, "uint32", 4)])
def test_large_vocabularies_take_four_little_endian_bytes(tmp_path, vocab, dtype, size):
    writer = ShardWriter(tmp_path, "train", vocab)
    writer.write(np.array([1, vocab - 1]), documents=1, text_bytes=3)
    entry = writer.close()
    last = (vocab - 1).to_bytes(size, "little")
    assert (tmp_path / "train-00000.bin").read_bytes() == b"\x01" + b"\x00" * (size - 1) + last
    assert token_dtype(vocab).name == dtype
    assert Split(tmp_path, entry, token_dtype(vocab)).read(0, 2).tolist() == [1, vocab - 1]


def test_an_empty_split_has_no_shards(tmp_path):
    split = Dataset.open(write_folder(tmp_path / "out", np.arange(5), val=0)).split("val")
    assert split.tokens == 0 and len(split.read(0, 0)) == 0
    assert not list((tmp_path / "out").glob("val-*"))


def test_a_folder_that_was_not_prepared_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"x is not a prepared data folder; make one with: nativerank data prepare"):
        Dataset.open(tmp_path / "x")


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "train-00003.bin", 150), r"train-00003\.bin is truncated or altered: 150"),
    "longer": (lambda f: os.truncate(f / "val-00000.bin", 900), r"val-00000\.bin is truncated or altered: 900"),
    "missing": (lambda f: os.remove(f / "train-00009.bin"), r"train-00009\.bin is missing"),
    "bit flip": (lambda f: flip(f / "train-00003.bin", 77), r"train-00003\.bin is damaged"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("opened_before", [False, True])
def test_a_damaged_shard_is_named(folder, damage, message, opened_before):
    if opened_before:
        Dataset.open(folder)
    damage(folder)
    for check in (Dataset.open, verify, Dataset.open):
        with pytest.raises(ValueError, match=message):
            check(folder)


def test_verify_names_every_damaged_file(folder):
    flip(folder / "train-00001.bin", 0)
    flip(folder / "val-00000.bin", 0)
    with pytest.raises(ValueError, match=r"train-00001\.bin is damaged.*val-00000\.bin is damaged"):
        verify(folder)


def test_shards_are_hashed_once(folder, monkeypatch):
    hashed = []
    real = integrity.sha256_file
    monkeypatch.setattr(integrity, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    Dataset.open(folder)
    assert len(hashed) == 11
    Dataset.open(folder)
    assert len(hashed) == 11
    os.utime(folder / "val-00000.bin")  # touched: no longer vouched for
    Dataset.open(folder)
    assert hashed[11:] == ["val-00000.bin"]
    verify(folder)
    assert len(hashed) == 23


def test_verify_sees_a_flip_that_keeps_size_and_time(folder):
    Dataset.open(folder)
    file = folder / "train-00002.bin"
    stat = file.stat()
    flip(file, 5)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    Dataset.open(folder)
    with pytest.raises(ValueError, match=r"train-00002\.bin is damaged"):
        verify(folder)


def test_a_cache_that_cannot_be_used_costs_only_time(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NATIVERANK_CACHE", str(tmp_path / "file" / "below"))
    assert Dataset.open(folder).split("train").tokens == 1000
    monkeypatch.setenv("NATIVERANK_CACHE", str(tmp_path / "cache"))
    Dataset.open(folder)
    for record in (tmp_path / "cache" / "verified").iterdir():
        record.write_text("no json")
    Dataset.open(folder)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NATIVERANK_CACHE", "/a")
    assert str(cache_dir()) == "/a"
    monkeypatch.delenv("NATIVERANK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(cache_dir()) == "/b/nativerank"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert str(cache_dir()) == "/c/.cache/nativerank"


def test_another_tokenizer_is_refused(folder):
    dataset = Dataset.open(folder)
    assert dataset.tokenizer().get_vocab_size() == dataset.vocab_size
    (folder / "tokenizer.json").write_text(train_bpe(["other text"], 300).to_str())
    for use in (lambda: Dataset.open(folder).tokenizer(), lambda: verify(folder)):
        with pytest.raises(ValueError, match="a tokenizer other than the one the shards were made with"):
            use()


def edit(**changes):
    return lambda m: m | changes


@pytest.mark.parametrize(
    "change, message",
    [
        (edit(format="other"), "format 'other'"),
        (edit(version=2), "version 2"),
        (edit(dtype="uint32"), "dtype 'uint32' for a vocabulary of"),
        (edit(splits={"train": {"tokens": 1, "shards": []}}), "the shards of train do not add up to 1"),
        (lambda m: {k: v for k, v in m.items() if k != "eot_id"}, "no 'eot_id'"),
        (lambda m: [], "is not a manifest"),
        (None, "is not a manifest"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_named(folder, change, message):
    file = folder / "manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))) if change else "{")
    with pytest.raises(ValueError, match=rf"manifest\.json .*{message}"):
        Dataset.open(folder)


def test_unknown_splits_are_refused(folder):
    with pytest.raises(ValueError, match=r"unknown split 'test'; .* has train, val"):
        Dataset.open(folder).split("test")


def test_a_folder_with_content_is_left_alone(folder, tmp_path):
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ValueError, match="out exists and is not empty"):
        write_folder(folder, np.arange(3))
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="note exists and is a file"):
        write_folder(tmp_path / "note", np.arange(3))
    assert sorted(p.name for p in folder.iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert Dataset.open(write_folder(tmp_path / "empty", np.arange(30))).split("train").tokens == 30


def test_a_folder_filled_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="filled by another process"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "theirs").read_text() == "x"


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "train-00000.bin").write_bytes(b"half")
        assert not (tmp_path / "out").exists()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("tokens", [10, 100_000])  # fails at the end, or in the middle
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch, tokens):
    def full(path, mode="r", **kwargs):
        return builtins.open("/dev/full" if str(path).endswith(".bin") else path, mode, **kwargs)

    monkeypatch.setattr(shards, "open", full, raising=False)
    with pytest.raises(ValueError, match=r"disk full while writing .*out"):
        write_folder(tmp_path / "out", np.zeros(tokens), shard_tokens=10**6)
    assert not list(tmp_path.iterdir())


def test_other_system_errors_pass_through(tmp_path):
    with pytest.raises(PermissionError), new_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no")


def test_a_moved_folder_still_opens(folder, tmp_path):
    shutil.move(folder, tmp_path / "moved")
    assert Dataset.open(tmp_path / "moved").split("train").tokens == 1000

"""prepare: the same folder for any number of processes, a split by text, a tokenizer blind to validation."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from nativerank.data import encode
from nativerank.data import prepare as prepare_module
from nativerank.data.encode import Encoder, document_draws, encode_documents
from nativerank.data.prepare import prepare
from nativerank.data.shards import Dataset
from nativerank.data.tokenizer import load_tokenizer, tokenizer_hash, train_bpe


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def corpus(tmp_path, paragraphs):
    return write_jsonl(tmp_path / "corpus.jsonl", paragraphs(600))


def decoded(dataset, name):
    """The documents of a split, from its tokens."""
    split = dataset.split(name)
    ids = split.read(0, split.tokens).tolist()
    assert not ids or ids[0] == dataset.eot_id
    documents, tokenizer = [], dataset.tokenizer()
    for token in ids:
        if token == dataset.eot_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tokenizer.decode(d, skip_special_tokens=False) for d in documents]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_every_document_comes_back_from_the_tokens(tmp_path, paragraphs):
    texts = [*paragraphs(300), "a <|endoftext|> inside", "  \ttabs\r\n\U0001f600 caf\u00e9"]
    result = prepare([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", "train:400", 0.1, quiet=True)
    dataset = Dataset.open(tmp_path / "out")
    train, val = decoded(dataset, "train"), decoded(dataset, "val")
    in_val = {t for t in texts if document_draws(t, 0)[0] < 0.1}
    assert train == [t for t in texts if t not in in_val] and val == [t for t in texts if t in in_val]
    for name, documents in (("train", train), ("val", val)):
        split = dataset.split(name)
        assert split.documents == len(documents) == result["splits"][name]["documents"]
        assert split.text_bytes == sum(len(t.encode()) for t in documents)
    assert dataset.vocab_size == result["vocab_size"] == dataset.tokenizer().get_vocab_size()
    assert dataset.manifest["sources"] == [str(tmp_path / "a.jsonl")]


def test_the_folder_is_the_same_for_any_number_of_workers(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_BYTES", 10_000)
    for workers in (1, 2, 3):
        prepare([corpus], tmp_path / str(workers), "train:400", workers=workers, shard_tokens=7000, quiet=True)
    one = contents(tmp_path / "1")
    assert len(one) > 6
    assert contents(tmp_path / "2") == one == contents(tmp_path / "3")


def test_the_split_depends_on_the_text_alone(tmp_path, paragraphs):
    texts = paragraphs(300)
    sets = {}
    for name, order in (("a", texts), ("b", texts[::-1]), ("twice", texts * 2)):
        prepare([write_jsonl(tmp_path / f"{name}.jsonl", order)], tmp_path / name, "train:300", quiet=True)
        dataset = Dataset.open(tmp_path / name)
        sets[name] = [set(decoded(dataset, split)) for split in ("train", "val")]
        assert not sets[name][0] & sets[name][1]
    assert sets["a"] == sets["b"] == sets["twice"]
    prepare([write_jsonl(tmp_path / "c.jsonl", texts)], tmp_path / "c", "train:300", seed=1, quiet=True)
    assert set(decoded(Dataset.open(tmp_path / "c"), "val")) != sets["a"][1]


def test_the_share_of_validation_is_about_what_was_asked(paragraphs):
    draws = [document_draws(text, 0) for text in paragraphs(4000)]
    for which in (0, 1):
        assert abs(sum(d[which] < 0.1 for d in draws) / 4000 - 0.1) < 0.02
    assert abs(sum(d[0] < 0.1 and d[1] < 0.5 for d in draws) / 4000 - 0.05) < 0.01


def test_the_tokenizer_never_sees_validation_documents(tmp_path, paragraphs):
    texts = paragraphs(300)
    train = [t for t in texts if document_draws(t, 0)[0] >= 0.3]
    prepare([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", "train:350", 0.3, quiet=True)
    assert (
        tokenizer_hash(tmp_path / "out")
        == tokenizer_hash(train_bpe(train, 350))
        != tokenizer_hash(train_bpe(texts, 350))
    )


def test_a_large_source_is_sampled_all_over(tmp_path, corpus, monkeypatch):
    read = []
    monkeypatch.setattr(prepare_module, "train_bpe", lambda docs, *_: read.extend(docs) or train_bpe(read, 300))
    monkeypatch.setattr(prepare_module, "SAMPLE_BYTES", os.path.getsize(corpus) // 5)
    prepare([corpus], tmp_path / "out", quiet=True)
    numbers = [int(re.search(r" (\d+)\.$", text).group(1)) for text in read]
    assert 60 < len(read) < 200 and min(numbers) < 60 and max(numbers) > 540


def test_a_given_tokenizer_is_taken_over(tmp_path, corpus):
    train_bpe(["low rank"], 300).save(str(tmp_path / "tokenizer.json"))
    prepare([corpus], tmp_path / "out", str(tmp_path / "tokenizer.json"), quiet=True)
    again = prepare([corpus], tmp_path / "again", str(tmp_path / "out"), quiet=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert again["tokenizer_sha256"] == tokenizer_hash(load_tokenizer(tmp_path / "tokenizer.json"))


def test_one_text_file_is_split_and_its_pieces_are_all_there(tmp_path, paragraphs):
    text = "\n\n".join(paragraphs(60))
    (tmp_path / "book.txt").write_text(text)
    result = prepare([str(tmp_path / "book.txt")], tmp_path / "out", "train:300", quiet=True)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.split("val").tokens and any("chunk_bytes" in note for note in result["notes"])
    assert sum(dataset.split(name).text_bytes for name in ("train", "val")) == len(text)


@pytest.mark.parametrize("seed", range(10))
def test_a_few_documents_always_give_a_validation_split(tmp_path, paragraphs, seed):
    path = write_jsonl(tmp_path / "a.jsonl", paragraphs(3))
    prepare([path], tmp_path / "out", "train:300", val_fraction=0.02, seed=seed, quiet=True)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.split("val").documents == 1 and dataset.split("train").documents == 2


def test_no_validation_is_allowed_when_asked_for(tmp_path, corpus):
    prepare([corpus], tmp_path / "out", "train:300", val_fraction=0, quiet=True)
    assert Dataset.open(tmp_path / "out").split("val").tokens == 0


def test_an_empty_split_says_how_many_documents_there_were(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ["the same text"] * 3)
    with pytest.raises(ValueError, match=r"the train split is empty: .*a\.jsonl gave 3 document\(s\)"):
        prepare([path], tmp_path / "out", "train:300", quiet=True)
    monkeypatch.setattr(prepare_module, "SCAN_BYTES", 0)  # as for a source too large to be read twice
    with pytest.raises(ValueError, match=r"the val split is empty: .*val_fraction 0\.001"):
        prepare([path], tmp_path / "out", "train:300", val_fraction=0.001, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_mixture_is_prepared_and_reported(tmp_path, paragraphs):
    inputs = [write_jsonl(tmp_path / f"{i}.jsonl", paragraphs(200, seed=i)) + f"::{w}" for i, w in enumerate((3, 1))]
    result = prepare(inputs, tmp_path / "out", "train:300", quiet=True)
    assert result["notes"] == [f"the mixture ended with {inputs[0][:-3]}, the first input to run out"]
    assert sum(entry["documents"] for entry in result["splits"].values()) in range(255, 280)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"val_fraction": 1.0}, r"val_fraction must lie in \[0, 1\), got 1.0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
        ({"chunk_bytes": 3}, "chunk_bytes must be at least 64, got 3"),
        ({"tokenizer": "train:many"}, "tokenizer must be train:N or a path, got 'train:many'"),
        ({"tokenizer": "train:100"}, "vocab_size must be at least 257"),
        ({"tokenizer": "nowhere.json"}, "no tokenizer at nowhere.json"),
        ({"eot": "<end>"}, "no token '<end>' in the tokenizer"),
        ({"field": "body"}, r"corpus\.jsonl, line 1: no field 'body'"),
    ],
)
def test_bad_options_are_named_and_leave_nothing(tmp_path, corpus, options, message):
    with pytest.raises(ValueError, match=message):
        prepare([corpus], tmp_path / "out", **{"tokenizer": "train:300", "quiet": True} | options)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_bad_line_stops_many_workers_too(tmp_path, paragraphs):
    path = write_jsonl(tmp_path / "a.jsonl", paragraphs(100))
    tokenizer = train_bpe(["text"], 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with open(path, "a") as file:
        file.write("{broken\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 101: not valid JSON"):
        prepare([path], tmp_path / "out", str(tmp_path), val_fraction=0, workers=2, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_worker_that_dies_is_one_clear_line(paragraphs, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_BYTES", 1000)
    workers = []
    monkeypatch.setattr(encode.Worker, "send", recording_send(encode.Worker.send, workers))
    encoder = Encoder(train_bpe(["text"], 300).to_str(), 300, 0, 0, 0.0)
    results = encode_documents(paragraphs(300), encoder, workers=2)
    next(results)
    workers[0].process.kill()
    with pytest.raises(ValueError, match="a worker process died"):
        list(results)
    assert all(worker.process.returncode is not None for worker in workers)


def recording_send(send, seen):
    def wrapped(self, message):
        seen.append(self)
        return send(self, message)

    return wrapped


RUN = """
import sys
from nativerank.data.prepare import prepare
prepare([sys.argv[1]], sys.argv[2], "train:300", workers=2, shard_tokens=100_000, quiet=True)
"""  # no __main__ guard on purpose: a plain script must work


def test_a_killed_prepare_leaves_nothing_that_looks_complete(tmp_path, paragraphs):
    """The workers end with it: communicate() returns only when nobody holds the pipe any more."""
    path = write_jsonl(tmp_path / "a.jsonl", [p * 20 for p in paragraphs(1500)])
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), path, str(tmp_path / "data" / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not list(tmp_path.glob("data/.out.partial-*/train-00002.bin")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (tmp_path / "data" / "out").exists()
    with pytest.raises(ValueError, match="not a prepared data folder"):
        Dataset.open(tmp_path / "data" / "out")


def test_a_plain_script_runs_workers(tmp_path, corpus):
    (tmp_path / "run.py").write_text(RUN)
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-W", "error", str(tmp_path / "run.py"), corpus, str(out)], text=True,
                          capture_output=True)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Dataset.open(out).split("train").documents > 500


def test_progress_in_a_pipe_is_plain_lines(tmp_path, corpus, capsys):
    prepare([corpus], tmp_path / "out", "train:300")
    captured = capsys.readouterr()
    assert not captured.out
    assert re.fullmatch(r"tokenizer: .* MB/s\nencode: .* MB/s\n", captured.err)


def test_the_data_room_does_not_load_torch():
    code = "import sys, nativerank.data.demo, nativerank.data.loader; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

"""Tokens: decode inverts encode, text is never control, one text gives one tokenizer."""

import json
import os
import random
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, processors

from nativerank.data.tokenizer import (
    encode_batch,
    end_of_text_id,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
    vocab_size,
)


@pytest.fixture
def bpe(paragraphs):
    return train_bpe(paragraphs(300), 400)


def random_text(seed):
    source = random.Random(seed)
    return "".join(chr(source.choice([9, 10, 13, 32, *range(33, 127), 0xE9, 0x4E2D, 0x1F600, 0])) for _ in range(300))


HARD = [
    "",
    " ",
    "  two  spaces ",
    "\r\n\r\n",
    "\ttab",
    "caf\u00e9 \U0001f468\u200d\U0001f469",
    "e\u0301 \u00e9",
    "\ufeffx",
]
HARD += ["a<|endoftext|>b", "<|endoftext|>", "\x00\x7f", *(random_text(s) for s in range(20))]


def test_decode_inverts_encode_for_any_text(bpe):
    for text, ids in zip(HARD, encode_batch(bpe, HARD), strict=True):
        assert bpe.decode(ids, skip_special_tokens=False) == text
        assert end_of_text_id(bpe) not in ids


def test_a_saved_tokenizer_encodes_the_same_and_keeps_its_hash(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe.to_str(pretty=True), encoding="utf-8")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert encode_batch(load_tokenizer(path), HARD) == encode_batch(bpe, HARD)
        assert tokenizer_hash(path) == tokenizer_hash(bpe) == tokenizer_hash(load_tokenizer(path))
    assert tokenizer_hash(train_bpe(["other text"], 300)) != tokenizer_hash(bpe)


def test_truncation_padding_and_templates_of_a_loaded_file_are_off(bpe, tmp_path):
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50)
    bpe.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    bpe.save(str(tmp_path / "tokenizer.json"))
    text = "low rank language model " * 5
    (ids,) = encode_batch(load_tokenizer(tmp_path), [text])
    assert bpe.decode(ids, skip_special_tokens=False) == text


def test_training_is_the_same_with_any_number_of_threads(paragraphs, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(paragraphs(300)))
    code = "import sys, json; from nativerank.data.tokenizer import *\n"
    code += "print(tokenizer_hash(train_bpe(json.load(open(sys.argv[1])), 400)))"
    run = [sys.executable, "-c", code, str(tmp_path / "t.json")]
    hashes = {
        subprocess.run(run, env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout
        for env in ({"TOKENIZERS_PARALLELISM": "false"}, {"RAYON_NUM_THREADS": "3"})
    }
    assert len(hashes) == 1


def test_training_reads_no_more_than_max_bytes(paragraphs):
    texts = paragraphs(50)
    read = []
    train_bpe((read.append(t) or t for t in texts), 300, max_bytes=1000)
    assert sum(map(len, read[:-1])) < 1000 <= sum(map(len, read))


def test_a_fork_after_training_neither_warns_nor_hangs():
    """As data loaders do. Versions of the library below those we accept printed a warning here."""
    code = "import os; from nativerank.data.tokenizer import *\nt = train_bpe(['a b c'] * 50, 300)\n"
    code += "encode_batch(t, ['a b c'] * 50)\npid = os.fork()\nencode_batch(t, ['a b c'] * 50)\n"
    code += "if pid: assert os.waitpid(pid, 0)[1] == 0"
    env = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    run = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]  # Python 3.12 on: fork beside threads
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_vocab_size_counts_holes():
    assert vocab_size(Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))) == 10


def test_end_of_text_is_found_by_its_usual_names_or_named():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "stop": 1}, unk_token="<unk>"))
    with pytest.raises(ValueError, match=r"none of <\|endoftext\|>, </s>.*special tokens: none"):
        end_of_text_id(tokenizer)
    tokenizer.add_special_tokens(["<pad>"])
    with pytest.raises(ValueError, match=r"no token '<end>'.*special tokens: <pad>"):
        end_of_text_id(tokenizer, "<end>")
    assert end_of_text_id(tokenizer, "stop") == 1
    tokenizer.add_special_tokens(["<eos>", "</s>"])
    assert end_of_text_id(tokenizer) == tokenizer.token_to_id("</s>")


@pytest.mark.parametrize("content", ["", "no json", '{"model": 3}', "[]"])
def test_garbage_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_missing_files_and_small_vocabularies_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .*, got 256"):
        train_bpe(["text"], 256)

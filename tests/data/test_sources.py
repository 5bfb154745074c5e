"""Reading: no byte lost, nothing held whole, every bad input named."""

import gzip
import json
import subprocess
import sys

import pytest

from nativerank.data import sources
from nativerank.data.readers import cut_point, text_documents
from nativerank.data.sources import Source, mix, open_source, open_sources


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)), encoding="utf-8")
    return path


TEXTS = {
    "blank lines": "one two\n\nthree\n\n" * 400,
    "windows": "one two\r\n\r\nthree\r\n" * 400,
    "lines": "a line of text\n" * 500,
    "no newline": "\u00e4\u4e2d\U0001f600x" * 900,
    "one short": "short",
    "leading blank": "\n\n\n" * 700 + "end",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("chunk_bytes", [64, 257, 2048, 10**6])
def test_cutting_loses_no_byte_and_keeps_the_limit(tmp_path, text, chunk_bytes):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = list(text_documents(path, chunk_bytes))
    assert "".join(pieces) == text
    assert all(0 < len(p.encode()) <= chunk_bytes for p in pieces)
    assert all(len(p.encode()) > chunk_bytes // 2 - 4 for p in pieces[:-1])


def test_cut_prefers_a_blank_line_then_a_newline():
    assert cut_point(b"aaaa\n\nbbb\ncccc", 12) == 10  # the blank line lies in the first half
    assert cut_point(b"aaaaaa\n\nb\nccccc", 12) == 8
    assert cut_point(b"aaaaaa\r\n\r\nb\nccc", 13) == 10
    assert cut_point(b"x" * 20, 12) == 12
    assert cut_point(b"xxxxxxxxxx\xf0\x9f\x98\x80yyyy", 12) == 10


def test_a_single_small_file_gives_enough_documents_for_a_validation_split(tmp_path, paragraphs):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs(1000)))
    source = open_source(str(path))
    assert len(list(source)) >= sources.FEW_DOCUMENTS
    assert "chunk_bytes" in source.notes[0]
    given = open_source(str(path), chunk_bytes=1 << 20)
    assert len(list(given)) == 1 and not given.notes


def test_all_formats_give_the_same_documents(tmp_path, paragraphs):
    texts = paragraphs(700)
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    files = [plain, tmp_path / "a.jsonl.gz", tmp_path / "a.json", tmp_path / "a.jsonl.zst", tmp_path / "a.parquet"]
    files[1].write_bytes(gzip.compress(plain.read_bytes()[:3000]) + gzip.compress(plain.read_bytes()[3000:]))
    files[2].write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n\r\n"))
    zstandard, data = pytest.importorskip("zstandard"), plain.read_bytes()
    files[3].write_bytes(zstandard.compress(data[:100_000]) + zstandard.compress(data[100_000:]))
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"id": range(len(texts)), "text": texts}), files[4], row_group_size=300)
    for file in files:
        assert list(open_source(str(file))) == texts, file


def test_a_folder_is_read_in_sorted_order_without_hidden_and_foreign_files(tmp_path):
    for name in ["b/2.txt", "b/10.txt", "a.txt", ".hidden/x.txt", "b/.x.txt", "picture.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(open_source(str(tmp_path))) == ["a.txt", "b/10.txt", "b/2.txt"]


def test_a_hub_spec_reads_a_local_folder(tmp_path):
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "part.jsonl", ["one", "", "two", "three"], field="body")
    spec = f"hub:{tmp_path}?split=train&field=body"
    assert list(open_source(spec)) == ["one", "two", "three"]
    assert list(open_source(spec + "&documents=3")) == ["one", "two"]
    with pytest.raises(ValueError, match=r"no field 'text'; the record has 'id', 'body'"):
        list(open_source(f"hub:{tmp_path}"))
    with pytest.raises(ValueError, match=r"cannot open hub:.*nowhere"):
        list(open_source(f"hub:{tmp_path}/nowhere"))


def test_missing_optional_packages_name_the_extra(tmp_path, monkeypatch):
    for module in ("datasets", "zstandard", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("a.parquet", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x")
    for spec in ("hub:a/b", f"{tmp_path}/a.parquet", f"{tmp_path}/a.jsonl.zst"):
        with pytest.raises(ValueError, match=r"pip install 'nativerank\[data\]'"):
            list(open_source(spec))


def zst(data):
    return pytest.importorskip("zstandard").compress(data)


LINE = b'{"text": "good"}\n'
BAD_FILES = [
    ("a.txt", b"good \xff bad", r"a\.txt is not UTF-8: byte 0xff at offset 5"),
    ("a.txt", b"x" * 3000 + b"\xc3", r"a\.txt is not UTF-8: byte 0xc3 at offset 3000"),
    ("a.jsonl", LINE + b'{"text": "\xff"}\n', r"a\.jsonl is not UTF-8: byte 0xff at offset 27"),
    ("a.jsonl", LINE + b'{"text": }\n', r"a\.jsonl, line 2: not valid JSON"),
    ("a.json", b'[\n{"text": "a"}\n]', r"a\.json, line 1: not valid JSON.*one object per line"),
    ("a.jsonl", LINE + b'"text"\n', r"a\.jsonl, line 2: a JSON object per line is needed, got str"),
    ("a.jsonl", LINE + b'{"body": "b", "id": 1}\n', r"a\.jsonl, line 2: no field 'text'; the record has 'body', 'id'"),
    ("a.jsonl", LINE + b'{"text": ["b"]}\n', r"a\.jsonl, line 2: field 'text' holds list, not text"),
    ("a.jsonl", LINE + b'{"text": "\\ud800"}\n', r"a\.jsonl, line 2: field 'text' holds '\\ud800'"),
    ("a.txt.gz", gzip.compress(b"hello" * 1000, mtime=0)[:-9], r"a\.txt\.gz is damaged"),
    ("a.txt.gz", b"not gzip at all", r"a\.txt\.gz is damaged"),
    ("a.txt", b"", r"no text in"),
    ("a.txt", b" \n\n\t\n", r"no text in"),
    ("a.jsonl", b'\n{"text": ""}\n{"text": null}\n', r"no text in"),
    ("a.parquet", b"PAR1 no", r"a\.parquet is damaged"),
    ("a.md", b"text", r"cannot read .*a\.md: its ending is not one of"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_bad_files_are_named(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_source(str(tmp_path / name), chunk_bytes=1024))


@pytest.mark.parametrize("cut", [1, 4, 30])
def test_a_truncated_zst_is_damaged_not_short(tmp_path, cut):
    data = zst(b"".join(b"line %d\n" % (i * i) for i in range(3000)))
    (tmp_path / "a.txt.zst").write_bytes(data[:-cut])
    with pytest.raises(ValueError, match=r"a\.txt\.zst is damaged"):
        list(open_source(str(tmp_path / "a.txt.zst")))


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([], "no input given"),
        (["missing.txt"], "no such file or folder: missing.txt"),
        (["a.txt::0.5", "a.txt"], "either every input carries a ::WEIGHT or none does; a.txt has none"),
        (["a.txt::-1"], "a weight must be a positive number"),
        (["a.txt::much"], "a weight must be a positive number"),
        (["hub:a/b?spilt=train"], "unknown key 'spilt' in hub:a/b"),
        (["hub:a/b?documents=many"], "documents must be a positive whole number"),
        (["empty"], "no text in empty"),
    ],
)
def test_bad_inputs_are_named(tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        open_sources(inputs)


def test_without_weights_inputs_follow_each_other(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [name * 3, name])
    source = open_sources([f"{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl"])
    assert list(source) == ["bbb", "b", "aaa", "a"] == list(source)


def test_a_mixture_follows_its_weights_at_every_point(paragraphs):
    parts = [paragraphs(4000, seed=1), [p * 3 for p in paragraphs(4000, seed=2)], paragraphs(4000, seed=3)]
    weights = [5.0, 3.0, 2.0]
    mixture = mix([(Source(f"s{i}", p.__iter__), w) for i, (p, w) in enumerate(zip(parts, weights, strict=True))])
    owner = {text: i for i, part in enumerate(parts) for text in part}
    longest, taken = max(map(len, owner)), [0, 0, 0]
    documents = list(mixture)
    for text in documents:
        taken[owner[text]] += len(text)
        assert all(abs(t - w / 10 * sum(taken)) <= 2 * longest for t, w in zip(taken, weights, strict=True))
    assert documents == list(mixture)
    assert mixture.notes == ["the mixture ended with s0, the first input to run out"]
    assert [t for t in documents if owner[t] == 0] == parts[0]


MEMORY = """
import sys
from nativerank.data.sources import open_source
if sys.argv[1].endswith(".parquet"): import pyarrow.parquet
# Not ru_maxrss: across a vfork it starts at the peak of the parent and would hide any growth below that.
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before, total = peak(), 0
for text in open_source(sys.argv[1]): total += len(text)
print(total, (peak() - before) * 1024)
"""


def read_in_a_process(path):
    """(characters read, growth of the peak memory in bytes)."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    return map(int, done.stdout.split())


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_200_mb_file_needs_a_few_mb(tmp_path):
    block = ("some words of text " * 50 + "\n\n").encode() * 1000
    with open(tmp_path / "big.txt", "wb") as file:
        for _ in range(200_000_000 // len(block)):
            file.write(block)
    total, growth = read_in_a_process(tmp_path / "big.txt")
    assert total == (tmp_path / "big.txt").stat().st_size > 190_000_000
    assert growth < total / 10, f"peak memory grew by {growth / 1e6:.1f} MB"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_large_parquet_file_needs_one_row_group(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": [f"{i} " + "some words of text " * 100 for i in range(1000)]})
    with parquet.ParquetWriter(
        tmp_path / "big.parquet", table.schema, compression="none", use_dictionary=False
    ) as file:
        for _ in range(100):
            file.write_table(table)
    total, growth = read_in_a_process(tmp_path / "big.parquet")
    assert total > 190_000_000
    assert growth < total / 4, f"peak memory grew by {growth / 1e6:.1f} MB"

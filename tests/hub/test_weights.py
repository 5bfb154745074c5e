"""Headers say what safetensors says; shards, precisions, damaged folders; what is loaded no longer needs its file."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import nativerank as nr
from nativerank.hub.weights import SAFETENSORS_DTYPES, read_folder_header, read_header
from nativerank.layers.base import factor_layers

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
INDEX = "model.safetensors.index.json"


def make(method="spectron", **changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()
    nr.factorize(model, method, rank_ratio=0.25)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(18).view(2, 9)).logits


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A factored LLaMA in shards; whoever alters it copies it first."""
    folder = tmp_path_factory.mktemp("sharded") / "m"
    nr.save(make(), folder, max_shard_size="10KB")
    return folder


@pytest.fixture
def copied(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "m")


def test_a_header_says_what_was_written(tmp_path):
    tensors = {name: torch.zeros(2, i, dtype=dtype) for i, (name, dtype) in enumerate(SAFETENSORS_DTYPES.items())}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    stored, words = read_header(tmp_path / "x.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {n: (t.dtype, (*t.shape,)) for n, t in tensors.items()}
    assert words == {"format": "pt"} and max(t.end for t in stored.values()) == os.path.getsize(
        tmp_path / "x.safetensors"
    )


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"", "cut short or no safetensors"),
        (b"[]", "cannot read"),
        (b"{", "cannot read"),
        (b'{"a":' * 100_000, "recursion"),
        (json.dumps(GOOD | {"a": GOOD["a"] | {"shape": [float("inf")]}}).encode(), "cannot read"),
        (json.dumps(GOOD | {"__metadata__": ["x"]}).encode(), "its __metadata__ does not hold words"),
        (json.dumps(GOOD | {"__metadata__": {"x": 1}}).encode(), "its __metadata__ does not hold words"),
        (json.dumps(GOOD | {"a": GOOD["a"] | {"dtype": "Q4"}}).encode(), "numbers of type 'Q4'"),
        (json.dumps(GOOD | {"a": GOOD["a"] | {"shape": [3]}}).encode(), "does not describe its contents"),
        (json.dumps(GOOD | {"a": GOOD["a"] | {"data_offsets": [4, 12]}}).encode(), "does not describe its contents"),
        (json.dumps(GOOD | {"b": GOOD["a"]}).encode(), "does not describe its contents"),
        (json.dumps(GOOD | {"a": {"dtype": "F32"}}).encode(), "cannot read"),
        (json.dumps({}).encode(), "it has .* bytes, and .* by its header"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, said):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=rf"cannot read .*x\.safetensors: .*{'' if said == 'cannot read' else said}"):
        read_header(file)
    file.write_bytes(struct.pack("<Q", 1 << 60) + header)
    with pytest.raises(ValueError, match="cut short or no safetensors"):
        read_header(file)


def test_shards_are_small_and_load_as_one(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 3 and all(sum(t.nbytes for t in load_file(s).values()) <= 10_000 for s in shards)
    assert torch.equal(logits(nr.load(sharded)), logits(make()))
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in make().parameters())


def index_with(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


FIRST, LAST = "model.embed_tokens.weight", "lm_head.weight"


def test_an_index_without_files_is_named(copied):
    for text, said in (
        ('{"weight_map": 5}', "its weight_map does not name a file for every tensor"),
        ('{"weight_map": {"a": 5}}', "its weight_map does not name a file for every tensor"),
        ("{}", "it holds no 'weight_map'"),
    ):
        (copied / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=rf"cannot read .*index\.json: {said}$"):
            nr.load(copied)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: m.update({FIRST: "gone.safetensors"}),
            "lacks gone.safetensors, which its index names; was it copied",
        ),
        (lambda m: m.update({FIRST: m[LAST]}), f"lacks {FIRST}, which its index promises"),
        (lambda m: m.update(extra=m[FIRST]), "lacks extra, which its index promises"),
        (lambda m: m.pop(FIRST), f"{FIRST}"),
        (lambda m: m.update({FIRST: "../m/model.safetensors"}), "cannot read .*names files outside the folder"),
        (lambda m: m.update({FIRST: 5}), "cannot read .*index"),
    ],
)
def test_an_index_that_is_not_that_of_the_shards(copied, change, said):
    index_with(copied, change)
    with pytest.raises(ValueError, match=said):
        nr.load(copied)


def test_half_copied_folders(copied):
    shards = sorted(copied.glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"cannot read .*{shards[1].name}: it has .* bytes"):
        nr.load(copied)
    shards[1].unlink()
    shards[2].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[1].name} and 1 more, which its index names"):
        nr.load(copied)
    (copied / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*index\.json"):
        nr.load(copied)
    (copied / INDEX).unlink()
    with pytest.raises(ValueError, match=r"cannot read [^:]*model\.safetensors: No such file or directory$"):
        nr.load(copied)


def test_a_loaded_model_does_not_change_with_its_file(copied):
    model = nr.load(copied)
    before = logits(model)
    for shard in copied.glob("*.safetensors"):
        with open(shard, "r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(64))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float16, torch.float64])
def test_precisions(tmp_path, stored, wanted):
    """A weight is rounded when it is stored and when it is loaded, s of a spectral layer at neither time."""
    model = make("tsvd")
    nr.save(model, tmp_path / "m", dtype=stored)
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    again, dtype = nr.load(tmp_path / "m", dtype=wanted), wanted or torch.float32
    parameters = dict(model.named_parameters())
    for name, p in again.named_parameters():
        if name.endswith(".s"):
            assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(p, parameters[name].to(p.dtype))
        else:
            assert p.dtype == dtype and torch.equal(p, parameters[name].to(stored).to(dtype))
    assert again.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_large_tensor_is_converted_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("nativerank.hub.weights.CHUNK_BYTES", 100)
    model = make()
    nr.save(model, tmp_path / "m", dtype=torch.bfloat16)
    again = nr.load(tmp_path / "m")
    assert all(
        torch.equal(a, b.bfloat16().float()) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("options", [{"dtype": torch.int8}, {"max_shard_size": "many"}, {"max_shard_size": "5 apples"}])
def test_what_cannot_be_saved_so(tmp_path, options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        nr.save(make(), tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_a_precision_that_cannot_be_loaded(sharded):
    with pytest.raises(ValueError, match=r"dtype is one of .* got torch\.int32"):
        nr.load(sharded, dtype=torch.int32)


# -- plain modules ------------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.body = torch.nn.ModuleList([torch.nn.Linear(d, 48), torch.nn.Linear(48, d), torch.nn.Linear(d, d)])
        self.norm = torch.nn.BatchNorm1d(d)
        self.register_buffer("lost", torch.zeros(3), persistent=False)

    def forward(self, x):
        for layer in self.body:
            x = layer(x).relu()
        return self.norm(x)


@pytest.fixture
def plain(tmp_path):
    """A trained plain module with factors of two kinds, and its folder."""
    torch.manual_seed(0)
    model = Network()
    nr.factorize(model, "spectron", rank=4, include="body.0")
    nr.factorize(model, "sct", rank=5, include="body.1")
    model(torch.randn(8, 32))  # moves the statistics of the norm
    nr.save(model.eval(), tmp_path / "m")
    return model, tmp_path / "m"


def test_a_plain_module_comes_back_into_one_of_its_kind(plain):
    model, folder = plain
    x = torch.randn(4, 32)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for target in (Network().eval(), nr.load(folder, into=Network().eval())):  # dense, and factorized alike
        loaded = nr.load(folder, into=target)
        assert loaded is target and torch.equal(target(x), model(x))
    wide = nr.load(folder, into=Network().eval().double())
    assert wide(x.double()).dtype == torch.float64 and torch.allclose(wide(x.double()).float(), model(x), atol=1e-5)
    assert nr.load(folder, into=Network()).training, "it keeps its mode"


def test_a_module_that_does_not_fit_is_left_as_it_was(plain):
    _, folder = plain
    with pytest.raises(
        ValueError, match="holds a Network without a Hugging Face config; make one and give it as into="
    ):
        nr.load(folder)
    other = Network(d=40)
    before = {name: p.clone() for name, p in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"body\.2\.weight has shape \(32, 32\), expected \(40, 40\)|has shape"):
        nr.load(folder, into=other)
    assert not factor_layers(other) and all(torch.equal(p, before[name]) for name, p in other.state_dict().items())
    with pytest.raises(ValueError, match=r"does not fit the model: .*'body\.0' matches none"):
        nr.load(folder, into=torch.nn.Sequential(torch.nn.Linear(3, 3)))
    nr.factorize(other, rank=4)
    with pytest.raises(ValueError, match=r"body\.1 is \('lowrank', 4\) in the module, \('spectral', 5\) here"):
        nr.load(folder, into=other)
    with pytest.raises(ValueError, match="not given with into"):
        nr.load(folder, into=other, dtype=torch.float32)


def test_into_takes_a_hugging_face_model_too(sharded):
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    assert nr.load(sharded, into=model) is model and torch.equal(logits(model), logits(make()))


def test_a_header_of_a_folder_names_the_file_of_each_tensor(sharded):
    stored = read_folder_header(sharded)
    assert len({t.file for t in stored.values()}) > 3 and set(stored) == set(dict(make().named_parameters()))


def test_files_are_as_readable_as_others_of_the_folder(tmp_path):
    """The safetensors writer makes its files private, and then nobody else of a team could load the model."""
    nr.save(make(), tmp_path / "m")
    assert {file.stat().st_mode for file in (tmp_path / "m").iterdir()} == {(tmp_path / "m/config.json").stat().st_mode}

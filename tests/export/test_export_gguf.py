"""model.gguf holds the merged model under the names, in the order and with the tokens that llama.cpp reads.

llama.cpp itself is not run. Beside the way back through transformers, an oracle here computes the logits from the file
alone as llama.cpp's LLaMA does: pairs (2j, 2j + 1) are rotated, in float64.
"""

import errno
import json
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nativerank.data.tokenizer import load_tokenizer
from nativerank.export import gguf_file
from nativerank.export.export import export
from nativerank.export.gguf_file import check_written, deinterleave, interleave, read_model
from nativerank.export.gguf_tokens import token_metadata
from nativerank.hub.save import save
from nativerank.layers import factorize_modules
from nativerank.models import end_of_text, materialize, read_hf_config, skeleton, start_of_text
from nativerank.train.trained import open_trained

gguf = pytest.importorskip("gguf")
IDS = torch.arange(7, 47)


@pytest.fixture
def llama(tmp_path, write_hf_config, prepared):
    """llama(**changes): a factored folder of a LLaMA with a tokenizer, random biases and norms."""

    def make(tokenizer=True, **changes):
        model = skeleton(read_hf_config(write_hf_config(**changes)))
        factorize_modules(model, value=8)
        materialize(model, seed=0, init_scale=1.0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(torch.randn_like(parameter) / 4)
        known = load_tokenizer(prepared) if tokenizer is True else tokenizer
        return save(model, tmp_path / "factored", tokenizer=known or None)

    return make


def opened(folder):
    reader = gguf.GGUFReader(folder / "model.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotated(x, base):
    """(T, heads, d) with the pairs (2j, 2j + 1) of position t turned by t / base^(2j / d)."""
    T, _, d = x.shape
    angle = np.arange(T)[:, None, None] * base ** (-np.arange(0, d, 2) / d)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = np.empty_like(x)
    turned[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
    turned[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return turned


def llama_logits(keys, tensors, ids):
    """The logits (T, vocabulary) of one sequence, from what the file holds."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}
    heads, kv_heads = keys["llama.attention.head_count"], keys["llama.attention.head_count_kv"]
    eps, base = keys["llama.attention.layer_norm_rms_epsilon"], keys["llama.rope.freq_base"]
    d, T = keys["llama.attention.key_length"], len(ids)

    def linear(name, x):
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)

    x = t["token_embd.weight"][ids]
    for block in range(keys["llama.block_count"]):
        b = f"blk.{block}."
        h = norm(x, t[f"{b}attn_norm.weight"], eps)
        q = rotated(linear(f"{b}attn_q", h).reshape(T, heads, d), base)
        k = rotated(linear(f"{b}attn_k", h).reshape(T, kv_heads, d), base)
        v = linear(f"{b}attn_v", h).reshape(T, kv_heads, d)
        k, v = (np.repeat(z, heads // kv_heads, axis=1) for z in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(d) + np.triu(np.full((T, T), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + linear(f"{b}attn_output", np.einsum("hts,shd->thd", weights, v).reshape(T, -1))
        h = norm(x, t[f"{b}ffn_norm.weight"], eps)
        gate = linear(f"{b}ffn_gate", h)
        x = x + linear(f"{b}ffn_down", gate / (1 + np.exp(-gate)) * linear(f"{b}ffn_up", h))
    return norm(x, t["output_norm.weight"], eps) @ t.get("output.weight", t["token_embd.weight"]).T


SHAPES = {
    "plain": {},
    "one key head to four": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_the_file_computes_what_was_trained_as_llama_cpp_reads_it(llama, tmp_path, changes):
    folder = llama(**changes)
    done = export(folder, tmp_path / "gguf", "gguf")
    assert done.form == "gguf" and done.parity.measure == "max_logit" and done.parity.figure < 1e-5
    with torch.no_grad():
        wanted = open_trained(folder).model(IDS[None]).logits[0].double().numpy()
    found = llama_logits(*opened(tmp_path / "gguf"), IDS.numpy())
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    with torch.no_grad():
        back = read_model(tmp_path / "gguf" / "model.gguf")(IDS[None]).logits[0].double().numpy()
    assert np.abs(back - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_without_the_permutation_the_oracle_sees_another_model(llama, tmp_path, monkeypatch):
    """So the agreement above is not that of two equal mistakes."""
    folder = llama()
    monkeypatch.setattr(gguf_file, "interleave", lambda x, heads: x)
    monkeypatch.setattr(gguf_file, "deinterleave", lambda x, heads: x)
    export(folder, tmp_path / "gguf", "gguf")
    with torch.no_grad():
        wanted = open_trained(folder).model(IDS[None]).logits[0].double().numpy()
    found = llama_logits(*opened(tmp_path / "gguf"), IDS.numpy())
    assert np.abs(found - wanted).max() > 1e-2 * np.abs(wanted).max()


def test_metadata_and_tensors(run, tmp_path):
    done = export(run, tmp_path / "gguf", "gguf")
    keys, tensors = opened(tmp_path / "gguf")
    assert {name: keys[name] for name in keys if not name.startswith("tokenizer")} == {
        "general.architecture": "llama",
        "general.name": "run at step 8",
        "general.file_type": 0,
        "llama.vocab_size": 300,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 48,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }
    assert len(tensors) == 2 * 9 + 3 and {value.dtype for value in tensors.values()} == {np.dtype("float32")}
    layer = open_trained(run).model.get_submodule("model.layers.1.mlp.down_proj")
    assert np.array_equal(tensors["blk.1.ffn_down.weight"], layer.to_dense().detach().numpy())
    assert done.bytes == (tmp_path / "gguf" / "model.gguf").stat().st_size


def test_half_precision_is_rounded_once_and_vectors_stay(run, tmp_path):
    export(run, tmp_path / "full", "gguf")
    done = export(run, tmp_path / "half", "gguf", dtype="float16")
    assert done.parity.measure == "mean_kl" and 0 < done.parity.figure < 1e-5
    (keys, half), (_, full) = opened(tmp_path / "half"), opened(tmp_path / "full")
    assert keys["general.file_type"] == 1 and half.keys() == full.keys()
    for name, value in half.items():
        assert value.dtype == (np.float16 if value.ndim > 1 else np.float32)
        assert np.array_equal(value, full[name].astype(value.dtype)), name


def test_the_tokens_of_the_file_are_the_tokenizers(run, tmp_path):
    export(run, tmp_path / "gguf", "gguf")
    keys, _ = opened(tmp_path / "gguf")
    t = {name.removeprefix("tokenizer.ggml."): value for name, value in keys.items() if name.startswith("tokenizer")}
    tokenizer = open_trained(run).tokenizer
    eot = tokenizer.token_to_id("<|endoftext|>")
    assert (t["model"], t["pre"]) == ("gpt2", "gpt-2")
    assert t["bos_token_id"] == t["eos_token_id"] == eot and t["add_bos_token"] is True
    assert t["tokens"] == [tokenizer.id_to_token(i) for i in range(300)]
    assert t["token_type"] == [3 if i == eot else 1 for i in range(300)]
    # a byte-level BPE built from the file alone reads text in the same way
    vocabulary = {token: i for i, token in enumerate(t["tokens"]) if t["token_type"][i] == 1}
    rebuilt = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in t["merges"]]))
    rebuilt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rebuilt.decoder = decoders.ByteLevel()
    text = "The matrix learns: 3.14 caf\u00e9s, thin\n\n factors!"
    assert rebuilt.encode(text).ids == tokenizer.encode(text).ids and rebuilt.decode(rebuilt.encode(text).ids) == text


@pytest.mark.parametrize(("bos", "eos", "found"), [(300, [9999, 0], (300, 0)), (5, 0, (0, 0)), (None, None, (0, 0))])
def test_a_text_begins_and_ends_as_in_generation(llama, tmp_path, prepared, bos, eos, found):
    tokenizer = load_tokenizer(prepared)
    tokenizer.add_special_tokens(["<start>"])  # 300; 5 is an ordinary token
    folder = llama(tokenizer, vocab_size=301, bos_token_id=bos, eos_token_id=eos)
    export(folder, tmp_path / "gguf", "gguf")
    keys, trained = opened(tmp_path / "gguf")[0], open_trained(folder)
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == found
    end = end_of_text(trained.model, trained.tokenizer)
    assert (start_of_text(trained.model, trained.tokenizer, end), end) == found
    named = json.loads((folder / "tokenizer_config.json").read_text())
    assert tuple(map(tokenizer.token_to_id, (named["bos_token"], named["eos_token"]))) == found


def test_rows_without_a_token_are_unused(llama, tmp_path):
    export(llama(vocab_size=304), tmp_path / "gguf", "gguf")
    keys, tensors = opened(tmp_path / "gguf")
    assert keys["tokenizer.ggml.tokens"][300:] == [f"[PAD{i}]" for i in range(300, 304)]
    assert keys["tokenizer.ggml.token_type"][300:] == [5] * 4 and len(tensors["token_embd.weight"]) == 304


def test_interleaving_by_hand():
    x = torch.arange(8.0)[:, None] * torch.ones(3)
    assert interleave(x, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(deinterleave(interleave(x, 2), 2), x)


def test_what_is_not_as_it_was_written_is_found(run, tmp_path):
    export(run, tmp_path / "gguf", "gguf")
    file, (keys, tensors) = tmp_path / "gguf" / "model.gguf", opened(tmp_path / "gguf")
    del keys["general.architecture"]
    check_written(file, keys, tensors)
    with pytest.raises(ValueError, match=r"llama\.block_count was not written as 3"):
        check_written(file, keys | {"llama.block_count": 3}, tensors)
    with pytest.raises(ValueError, match=r"general\.author was not written"):
        check_written(file, keys | {"general.author": "me"}, tensors)
    wrong = tensors["output.weight"].copy()
    wrong[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"output\.weight was not written as it is"):
        check_written(file, keys, tensors | {"output.weight": wrong})
    with pytest.raises(ValueError, match=r"does not hold the tensor output\.bias"):
        check_written(file, keys, tensors | {"output.bias": wrong})


def test_a_file_that_computes_something_else_is_not_kept(run, tmp_path, monkeypatch):
    true = gguf_file.interleave
    monkeypatch.setattr(gguf_file, "interleave", lambda x, heads: true(x, heads) * 1.5)
    with pytest.raises(ValueError, match="the gguf folder in float32 does not compute what was trained"):
        export(run, tmp_path / "gguf", "gguf")
    assert list(tmp_path.iterdir()) == []


def refused(folder, tmp_path, said):
    with pytest.raises(ValueError, match=said):
        export(folder, tmp_path / "gguf", "gguf")
    assert not (tmp_path / "gguf").exists()


def test_what_a_gguf_of_ours_cannot_hold_is_refused(llama, factored, tmp_path):
    refused(factored("gpt2"), tmp_path, "is a gpt2; GGUF is written of the LLaMA architecture only")
    refused(llama(tokenizer=False), tmp_path, "has no tokenizer, without which no reader of GGUF can use it")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
)
def test_another_arithmetic_is_refused(llama, tmp_path, changes):
    refused(llama(**changes), tmp_path, "GGUF is written of the default rotary embedding and silu only")


def altered(tokenizer, **parts):
    text = json.loads(tokenizer.to_str())
    text["model"] |= parts.pop("model", {})
    return Tokenizer.from_str(json.dumps(text | parts))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre-tokenizer Whitespace"),
        ({"pre_tokenizer": None}, "the pre-tokenizer None"),
        ({"model": {"byte_fallback": True}}, "a fallback to bytes"),
        ({"model": {"merges": []}}, "no merges"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "another splitting into words",
        ),
    ],
)
def test_another_tokenizer_is_refused(run, parts, said):
    trained = open_trained(run)
    with pytest.raises(ValueError, match=f"the tokenizer has {said}; GGUF is written with byte-level BPE"):
        token_metadata(altered(trained.tokenizer, **parts), trained.model.config)


def test_more_tokens_than_rows_are_refused(run):
    trained = open_trained(run)
    trained.model.config.vocab_size = 290
    with pytest.raises(ValueError, match="the tokenizer has a token 299, the model only 290 rows"):
        token_metadata(trained.tokenizer, trained.model.config)


def test_a_missing_package_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(run, tmp_path, r"--format gguf needs the extra `gguf`: pip install 'nativerank\[gguf\]'")


@pytest.mark.parametrize("error", [OSError("100 requested and 7 written"), OSError(errno.ENOSPC, "No space left")])
def test_a_full_disk_leaves_no_folder(run, tmp_path, monkeypatch, error):
    """numpy says how much was written, and not why."""

    def full(self):
        raise error

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(ValueError, match=r"disk full while writing .*gguf; nothing was kept"):
        export(run, tmp_path / "gguf", "gguf")
    assert list(tmp_path.iterdir()) == []

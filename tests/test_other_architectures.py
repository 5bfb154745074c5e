"""Not only language models: images, images with text, encoders, encoder-decoders, from factorize to a merged folder."""

import copy

import pytest
import torch
from torch.testing import assert_close

import nativerank as nr
from nativerank.hub.generate import Writer
from nativerank.hub.sampling import Sampling
from nativerank.layers import linear_modules
from nativerank.layers.base import factor_layers
from nativerank.layers.discover import embedding_parameters
from nativerank.models import predicts_next_token

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
IMAGES, WORDS = dict(image_size=16, patch_size=4), dict(vocab_size=128, max_position_embeddings=64)
IMAGE_TOKEN = 127
CHECKED = 1e-4  # of the largest logit


def random(*shape, high=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) if high is None else torch.randint(high, shape, generator=generator)


def text_with_image(places):
    """8 texts of 8 words behind the places of an image, which the loss does not count."""
    ids = torch.cat([torch.full((8, places), IMAGE_TOKEN), random(8, 8, high=120)], dim=1)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE_TOKEN, -100)}


def vit(transformers):
    """Noisy images of four classes."""
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **IMAGES, num_labels=4))
    labels = random(16, high=4)
    return model, {"pixel_values": random(4, 3, 16, 16, seed=1)[labels] + random(16, 3, 16, 16), "labels": labels}


def llava(transformers):
    vision = transformers.CLIPVisionConfig(**SIZES, **IMAGES, projection_dim=64)
    text = transformers.LlamaConfig(**SIZES, **WORDS, num_key_value_heads=1)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    model = transformers.LlavaForConditionalGeneration(config)
    return model, text_with_image(16) | {"pixel_values": random(8, 3, 16, 16)}


def smolvlm(transformers):
    vision = transformers.SmolVLMVisionConfig(**SIZES, **IMAGES)
    text = transformers.LlamaConfig(**SIZES, **WORDS, num_key_value_heads=1)
    config = dict(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, scale_factor=2)
    model = transformers.SmolVLMForConditionalGeneration(transformers.SmolVLMConfig(**config))
    return model, text_with_image(4) | {"pixel_values": random(8, 1, 3, 16, 16)}


def bert(transformers):
    model, ids = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **WORDS)), random(8, 16, high=128)
    return model, {"input_ids": ids, "labels": ids}


def t5(transformers):
    sizes = dict(vocab_size=128, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model, ids = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), random(8, 16, high=128)
    return model, {"input_ids": ids, "labels": ids}


CASES = [(build, method) for build in (vit, llava, smolvlm) for method in ("spectron", "sct")]
CASES += [(vit, "stiefel-spectron"), (bert, "spectron"), (t5, "lowrank-adamw")]


@pytest.fixture
def make():
    import transformers

    def built(build):
        torch.manual_seed(0)
        return build(transformers)

    return built


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


@pytest.mark.parametrize("build, method", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_fifty_steps_learn_and_every_saved_form_agrees(tmp_path, make, build, method):
    model, batch = make(build)
    nr.factorize(model, method=method, rank_ratio=0.25)
    assert not linear_modules(model), "no hidden matrix is left dense"
    optimizer = nr.build_optimizer(model, method=method, lr=0.02, aux_lr=3e-3)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]

    wanted = logits(model, batch)
    nr.save(model, tmp_path / "factored")
    again = nr.load(tmp_path / "factored")
    assert type(again).__name__ == type(model).__name__
    assert list(factor_layers(again)) == list(factor_layers(model))
    assert torch.equal(logits(again, batch), wanted)
    nr.save(model, tmp_path / "dense", "dense")
    for merged in (nr.load(tmp_path / "dense"), type(model).from_pretrained(tmp_path / "dense")):
        assert not factor_layers(merged)
        assert_close(logits(merged, batch), wanted, rtol=0, atol=CHECKED * wanted.abs().max().item())


@pytest.mark.parametrize("build", [vit, llava, t5], ids=lambda build: build.__name__)
def test_a_stock_folder_at_full_rank_is_itself(tmp_path, make, build):
    model, batch = make(build)
    model.save_pretrained(tmp_path / "stock")
    loaded = nr.load(tmp_path / "stock")
    wanted = logits(loaded, batch)
    report = nr.factorize(loaded, method="sct", energy=1.0)
    assert all(entry.kept_energy > 1 - 1e-9 for entry in report.entries)
    assert_close(logits(loaded, batch), wanted, rtol=0, atol=CHECKED * wanted.abs().max().item())


@pytest.mark.parametrize("build", [vit, llava, bert, t5], ids=lambda build: build.__name__)
def test_the_command_converts_them_too(tmp_path, make, cli, build):
    model, batch = make(build)
    model.save_pretrained(tmp_path / "stock")
    words = ["convert", tmp_path / "stock", "--rank.energy", "1", "--out", tmp_path / "factored"]
    done = cli(*words)
    assert done.code == 0, done.err
    loop = "nativerank train" if build is llava else "in a loop of yours"
    assert loop in done.out.splitlines()[-1]
    wanted = logits(nr.load(tmp_path / "stock"), batch)
    assert_close(
        logits(nr.load(tmp_path / "factored"), batch), wanted, rtol=0, atol=CHECKED * wanted.abs().max().item()
    )
    if build is not llava:
        refused = cli(*words[:-1], tmp_path / "other", "--data", __file__)
        assert refused.code == 2 and "which predicts no next token" in refused.err and refused.err.count("\n") == 1


def test_both_towers_of_a_vision_language_model_can_be_named_apart(make):
    model, _ = make(llava)
    language = nr.factorize(copy.deepcopy(model), include=["*.language_model.*"]).ranks
    rest = nr.factorize(copy.deepcopy(model), exclude=["*.language_model.*"]).ranks
    assert len(language) == 14 and all("language_model" in name for name in language)
    assert {name.split(".")[1] for name in rest} == {"vision_tower", "multi_modal_projector"}


def test_a_classifier_and_tables_of_positions_stay_as_they_are(make):
    """At one output per label a rank would cut classes away, and a table of positions is an embedding."""
    model, _ = make(vit)
    kept = {id(p) for p in embedding_parameters(model)}
    names = {name for name, p in model.named_parameters() if id(p) in kept}
    assert {"vit.embeddings.position_embeddings", "classifier.weight", "classifier.bias"} <= names
    assert not any("attention" in name or "mlp" in name for name in names)
    nr.factorize(model)
    assert type(model.classifier) is torch.nn.Linear


def test_code_that_asks_a_factor_layer_for_its_weight(make):
    layer = nr.layers.SpectralLinear(6, 4, 2, dtype=torch.bfloat16)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor) and weight.shape == (4, 6)
    assert weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and "UnformedWeight" in repr(weight)
    assert "weight" not in dict(layer.named_parameters(recurse=False))
    with pytest.raises(TypeError, match="never formed"):
        torch.nn.functional.linear(torch.zeros(6, dtype=torch.bfloat16), weight)


@pytest.mark.parametrize("build", [vit, llava, bert, t5], ids=lambda build: build.__name__)
def test_every_command_agrees_on_what_predicts_text(tmp_path, make, cli, build):
    """One with images reads text alone too: it is exported like any other; the rest is refused in one line."""
    model, _ = make(build)
    nr.factorize(model, method="spectron", rank_ratio=0.25)
    nr.save(model, tmp_path / "factored")
    (tmp_path / "q.json").write_text('[{"context": "a", "choices": ["b", "c"], "answer": 0}]')
    assert predicts_next_token(model) == (build is llava)
    done = cli("export", tmp_path / "factored", "--format", "dense", "--out", tmp_path / "dense")
    if build is llava:
        assert done.code == 0 and type(nr.load(tmp_path / "dense")) is type(model), done.err
    else:
        assert done.code == 2 and "takes causal language models only" in done.err and done.err.count("\n") == 1
        folder, run = str(tmp_path / "factored"), tmp_path / "run"
        for command in (
            ("eval", folder, "--data", __file__),
            ("eval", folder, "--cloze", tmp_path / "q.json"),
            ("bench", "generate", folder),
            ("train", "--init", folder, "--out", run, "--device", "cpu"),
            ("train", "--distill.teacher", folder, "--out", run, "--device", "cpu"),
        ):
            done = cli(*command)
            assert (done.code, done.out) == (2, "") and not run.exists()
            assert done.err.endswith(f"a {type(model).__name__}, which predicts no next token\n"), done.err
        with pytest.raises(ValueError, match=f"{type(model).__name__} is not a model that generates text"):
            Writer(model, None, 0, Sampling())

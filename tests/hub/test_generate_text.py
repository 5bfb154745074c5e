"""Generation: greedy is argmax, sampling depends on the seed alone."""

import pytest
import torch

from nativerank.data.shards import Dataset
from nativerank.hub.generate import generate
from nativerank.models import materialize, read_hf_config, skeleton


@pytest.fixture(scope="module")
def data(prepared):
    return Dataset.open(prepared)


@pytest.fixture(scope="module")
def model(tiny_config):
    from nativerank.methods import factorize

    model = skeleton(read_hf_config(tiny_config))
    factorize(model, "spectron", rank_ratio=0.5)
    model = materialize(model, 0, 3.0).eval()  # large weights, so that logits differ
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


def write(model, data, prompt="the low rank", **options):
    return generate(model, data.tokenizer(), prompt, eot_id=data.eot_id, **options)


def argmax_by_hand(model, data, prompt, count, context=64):
    tokenizer = data.tokenizer()
    ids = [data.eot_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            nxt = model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if nxt == data.eot_id or len(ids) == context:
            break
        ids.append(nxt)
    return tokenizer.decode(ids[start:])


@pytest.mark.parametrize("prompt", ["the low rank", "", "matrix gradient descent moves"])
def test_greedy_is_an_argmax_loop_without_a_cache(model, data, prompt):
    text = write(model, data, prompt, temperature=0, max_new_tokens=15)
    assert text == argmax_by_hand(model, data, prompt, 15) != ""


def test_equal_seeds_give_equal_text(model, data):
    texts = [write(model, data, seed=seed, max_new_tokens=20, temperature=2.0, top_k=0) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_top_k_of_one_is_greedy(model, data):
    greedy = write(model, data, temperature=0, max_new_tokens=10)
    assert write(model, data, top_k=1, temperature=5.0, max_new_tokens=10, seed=9) == greedy


def test_the_context_is_not_exceeded(model, data):
    tokenizer = data.tokenizer()
    prompt = "the " * 20
    used = 1 + len(tokenizer.encode(prompt, add_special_tokens=False).ids)
    assert used < 64
    text = write(model, data, prompt, temperature=0, max_new_tokens=1000)
    assert text == argmax_by_hand(model, data, prompt, 64 - used)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens and the model's context only 64"):
        write(model, data, "the low " * 64)


def test_mode_and_random_state_are_put_back(model, data):
    model.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    write(model, data, max_new_tokens=3)
    assert model.training and torch.equal(before, torch.get_rng_state())
    model.eval()
    write(model, data, max_new_tokens=3)
    assert not model.training


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}]
)
def test_numbers_out_of_range(model, data, options):
    with pytest.raises(ValueError, match="max_new_tokens must be >= 1, temperature and top_k >= 0"):
        write(model, data, **options)

"""Generation: greedy is argmax, sampling depends on the seed alone, and neither on the prompts beside it."""

import pytest
import torch

from nativerank.data.shards import Dataset
from nativerank.hub.generate import Writer, generate
from nativerank.hub.sampling import Sampling
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


def test_top_p_of_one_filters_nothing_and_a_tiny_one_is_greedy(model, data):
    free = {"top_k": 0, "temperature": 2.0, "max_new_tokens": 20}
    assert write(model, data, top_p=1.0, **free) == write(model, data, **free)
    assert write(model, data, top_p=0.6, **free) != write(model, data, **free)
    greedy = write(model, data, temperature=0, max_new_tokens=10)
    assert write(model, data, top_p=1e-6, max_new_tokens=10, temperature=3.0, top_k=0, seed=4) == greedy
    assert write(model, data, max_new_tokens=10, temperature=1e-40, top_k=0) == greedy  # nothing overflows


PROMPTS = ["the low rank", "", "matrix gradient descent moves thin factors", "a", "the low rank"]


def all_at_once(model, data, batch_size, num=1, prompts=PROMPTS, **sampling):
    writer = Writer(model, data.tokenizer(), data.eot_id, Sampling(**sampling))
    return list(writer.write_all(writer.requests(prompts, num), batch_size))


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_text_does_not_depend_on_what_stands_beside_it(model, data, sampling, batch_size):
    alone = [write(model, data, prompt, max_new_tokens=12, **sampling) for prompt in PROMPTS]
    made = all_at_once(model, data, batch_size, max_new_tokens=12, **sampling)
    assert [m.text for m in made] == alone and [m.prompt for m in made] == PROMPTS
    assert len(set(alone)) == 4  # the first prompt is there twice


def test_learned_positions_start_behind_the_padding(data, write_hf_config):
    """GPT-2 adds a vector per position, so a shifted prompt would be another one."""
    config = read_hf_config(write_hf_config(model_type="gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=2))
    gpt2 = materialize(skeleton(config), 0, 3.0)
    with torch.no_grad():
        gpt2.transformer.wpe.weight.mul_(50)
        gpt2.transformer.wte.weight.mul_(30)
    made = all_at_once(gpt2, data, 8, max_new_tokens=12, temperature=0)
    alone = [write(gpt2, data, prompt, max_new_tokens=12, temperature=0) for prompt in PROMPTS]
    assert [m.text for m in made] == alone and len(set(alone)) == 4


def test_near_the_end_of_the_context_each_prompt_has_its_own_room(model, data):
    lengths = [data.tokenizer().encode(p, add_special_tokens=False).ids for p in ("the " * 20, "the " * 19)]
    assert len(set(map(len, lengths))) == 2
    prompts = ["the " * 20, "the low", "the " * 19]
    made = all_at_once(model, data, 8, prompts=prompts, max_new_tokens=50, temperature=0)
    assert [m.text for m in made] == [write(model, data, p, max_new_tokens=50, temperature=0) for p in prompts]


def test_several_samples_have_seeds_that_count_up(model, data):
    made = all_at_once(model, data, 4, num=3, prompts=["the", "low"], seed=5, max_new_tokens=8, temperature=2.0)
    assert [(m.prompt, m.seed) for m in made] == [(p, s) for p in ("the", "low") for s in (5, 6, 7)]
    for m in made:
        assert m.text == write(model, data, m.prompt, seed=m.seed, max_new_tokens=8, temperature=2.0)
        assert 0 < m.tokens <= 8 and m.seconds > 0
    with pytest.raises(ValueError, match="temperature 0 gives one text per prompt, so num must be 1, got 2"):
        all_at_once(model, data, 4, num=2, temperature=0)
    with pytest.raises(ValueError, match="prompt 2: the prompt has"):
        all_at_once(model, data, 4, prompts=["a", "the " * 100])


def test_a_text_ends_where_the_folder_says_too(model, data):
    text = write(model, data, temperature=0, max_new_tokens=15)
    first = data.tokenizer().encode(text, add_special_tokens=False).ids[0]
    model.generation_config.eos_token_id = [first, 299]
    model.generation_config.repetition_penalty = 9.0  # what a folder brings along changes nothing else
    try:
        assert write(model, data, temperature=0, max_new_tokens=15) == ""
        model.generation_config.eos_token_id = None
        assert write(model, data, temperature=0, max_new_tokens=15) == text
    finally:
        model.generation_config = type(model.generation_config)()


def test_logits_that_are_not_finite_are_an_error(tiny_config, data):
    broken = materialize(skeleton(read_hf_config(tiny_config)), 0, 1.0)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="logits are not finite"):
            write(broken, data, temperature=temperature)


def test_a_prompt_that_the_model_cannot_read(write_hf_config, data):
    small = materialize(skeleton(read_hf_config(write_hf_config(vocab_size=20))), 0, 1.0)
    with pytest.raises(ValueError, match=r"the tokenizer makes token \d+ and the model knows only 20 tokens"):
        write(small, data)
    with pytest.raises(ValueError, match=r"the prompt 'a\\udcff' is not UTF-8 text"):
        write(small, data, "a\udcff")


def test_a_module_that_writes_nothing(data):
    with pytest.raises(ValueError, match="Linear is not a model that generates text"):
        generate(torch.nn.Linear(2, 2), data.tokenizer(), "", eot_id=0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -1]),
        ("temperature", [-0.1, float("nan"), float("inf")]),
        ("top_k", [-1]),
        ("top_p", [0, -0.5, 1.01, float("nan")]),
        ("seed", [2**63]),
    ],
)
def test_numbers_out_of_range(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must .*, got {value}$"):
            Sampling(**{name: value})

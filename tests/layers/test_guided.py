"""The guide leads, fades and is gone: what it computes, when, and that nothing of it stays."""

import copy
import gc
import itertools
import math
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from nativerank.hub.load import load
from nativerank.hub.save import save
from nativerank.layers.guided import DenseGuidedLinear, GuidedLinear, guide_coin, guide_weight, guided_layers
from nativerank.layers.initialize import dense_init, truncated_svd
from nativerank.layers.lowrank import LowRankLinear
from nativerank.methods import build_optimizer, factorize
from nativerank.models import make_hf_config, materialize, skeleton


def layer(kind=GuidedLinear, d_in=7, d_out=6, rank=3, **changes):
    torch.manual_seed(0)
    made = kind(d_in, d_out, rank, dtype=torch.float64, **changes)
    if kind is DenseGuidedLinear:
        made.fill_guide(torch.randn(d_out, d_in, dtype=torch.float64))
    return made


def language_model(guide="product", seed=0):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    values = {"model_type": "llama", **sizes, "num_key_value_heads": 2, "max_position_embeddings": 32}
    model = skeleton(make_hf_config(values, "test"))
    factorize(model, "self-guided", rank_ratio=0.25, guide=guide)
    return materialize(model, seed, 0.5)


def batch(seed=1):
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))


def backward(model, tokens):
    model(input_ids=tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_is_the_mixture(bias):
    made = layer(DenseGuidedLinear, bias=bias)
    x = torch.randn(4, 7, dtype=torch.float64)
    for alpha in (0.0, 0.3, 1.0):
        made.alpha = alpha
        expected = alpha * x @ made.guide.T + (1 - alpha) * x @ made.to_dense().T
        assert_close(made(x), expected if made.up.bias is None else expected + made.up.bias)
        made.eval()
        assert_close(made(x), made.train()(x))


def test_without_the_coin_training_sees_the_factors_alone_and_evaluation_still_the_mixture():
    made, x = layer(DenseGuidedLinear), torch.randn(4, 7, dtype=torch.float64)
    made.alpha = 0.5
    mixed = made(x)
    made.active = False
    assert_close(made(x), x @ made.to_dense().T)
    assert_close(made.eval()(x), mixed)


def test_a_product_guide_starts_as_the_low_rank_function():
    guided, plain = language_model(), language_model()
    for module in guided_layers(plain).values():
        module.free_guide()
    for module in guided_layers(guided).values():
        module.alpha = 0.37
        assert_close(module.guide, module.to_dense())
    assert_close(guided(input_ids=batch()).logits, plain(input_ids=batch()).logits)


def test_a_dense_guide_starts_as_the_matrix_that_the_factors_truncate():
    model = language_model("dense", seed=3)
    for name, module in guided_layers(model).items():
        W = dense_init(name, module.out_features, module.in_features, 0.5 * module.in_features**-0.5, 3)
        assert torch.equal(module.guide, W)
        assert_close(
            module.to_dense(),
            torch.matmul(*(f if i == 0 else f.mT for i, f in enumerate(truncated_svd(W, module.rank)))),
        )


def test_surgery_on_given_weights_guides_with_them():
    weight = torch.randn(8, 6)
    for guide in ("product", "dense"):
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU())
        with torch.no_grad():
            model[0].weight.copy_(weight)
        factorize(model, "self-guided", rank=2, guide=guide)
        assert_close(model[0].guide.detach(), weight if guide == "dense" else model[0].to_dense().detach())


def test_alpha_is_a_cosine_from_one_to_nothing():
    weights = [guide_weight(step, 40) for step in range(60)]
    assert weights[0] == 1 and all(a >= b for a, b in itertools.pairwise(weights))
    assert weights[20] == pytest.approx(0.5) and weights[10] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert all(w > 0 for w in weights[:40]) and not any(weights[40:])
    assert guide_weight(0, 0) == 0


def test_coins_are_fair_and_depend_on_seed_step_and_layer_alone():
    coins = {(s, t, n): guide_coin(s, t, n) for s in range(2) for t in range(400) for n in ("a", "b")}
    assert len(set(coins.values())) == len(coins) and all(0 <= c < 1 for c in coins.values())
    for p in (0.1, 0.5, 0.9):
        share = sum(c < p for c in coins.values()) / len(coins)
        assert abs(share - p) < 4 * (p * (1 - p) / len(coins)) ** 0.5
    torch.manual_seed(5)
    assert guide_coin(1, 7, "a") == coins[1, 7, "a"]


def test_micro_batches_and_recomputation_see_the_same_coins():
    model = language_model("dense")
    optimizer = build_optimizer(model, "self-guided", guided_steps=100, seed=4)
    optimizer.guides.set(50)
    coins = [module.active for module in guided_layers(model).values()]
    assert any(coins) and not all(coins)

    def gradients(run):
        model.zero_grad()
        run()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    def recomputed():
        embedded = model.get_input_embeddings()(batch())
        loss = lambda e: model(inputs_embeds=e, labels=batch()).loss  # noqa: E731
        checkpoint(loss, embedded, use_reentrant=False).backward()

    together = gradients(lambda: backward(model, torch.cat([batch(1), batch(2)])))
    apart = gradients(lambda: [backward(model, batch(seed)) for seed in (1, 2)])
    for a, b in zip(together, apart, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b / 2, rtol=1e-4, atol=1e-6)
    for a, b in zip(gradients(recomputed), gradients(lambda: backward(model, batch())), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_training_follows_the_formula():
    """Five AdamW steps against a transcription: y = alpha W x + (1 - alpha) A B^T x, alpha advanced after each."""
    made = layer(DenseGuidedLinear)
    A, B, W = (t.detach().clone().requires_grad_() for t in (*made.factors(), made.guide))
    hyper = dict(lr=0.05, betas=(0.9, 0.95), eps=1e-8)
    reference = torch.optim.AdamW([A, B, W], weight_decay=0.0, **hyper)
    model = nn.Sequential(made)
    optimizer = build_optimizer(model, "self-guided", guided_steps=8, stochastic_guide=False, **hyper)
    x, target = torch.randn(10, 7, dtype=torch.float64), torch.randn(10, 6, dtype=torch.float64)
    for step in range(5):
        alpha = (1 + math.cos(math.pi * step / 8)) / 2
        for opt, y in ((optimizer, model(x)), (reference, alpha * x @ W.T + (1 - alpha) * x @ (A @ B.T).T)):
            opt.zero_grad()
            (y - target).square().mean().backward()
            opt.step()
    assert_close([made.up.weight, made.down.weight.mT, made.guide], [A, B, W], rtol=1e-6, atol=1e-8)


def test_the_guide_its_gradient_and_its_state_are_freed():
    model = language_model()
    optimizer = build_optimizer(model, "self-guided", guided_steps=3)
    before = sum(p.numel() for p in model.parameters())
    backward(model, batch())
    guides = [m.guide for m in guided_layers(model).values()]
    held = [weakref.ref(t) for g in guides for t in (g, *optimizer.state[g].values())]
    dense = sum(g.numel() for g in guides)
    del guides
    for _ in range(3):
        optimizer.step()
    gc.collect()
    assert [ref for ref in held if ref() is not None] == []
    assert sum(p.numel() for p in model.parameters()) == before - dense
    assert not [n for n, _ in model.named_parameters() if "guide" in n]
    assert (
        sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters())) == len(optimizer.state)
    )
    optimizer.zero_grad()
    backward(model, batch())
    optimizer.step()


def test_a_copied_optimizer_still_leads_its_own_guides():
    model = language_model()
    optimizer = build_optimizer(model, "self-guided", guided_steps=2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for _ in range(2):
        twin_optimizer.step()
    assert all(m.guide is None for m in guided_layers(twin).values())
    assert all(m.guide is not None for m in guided_layers(model).values())


def test_going_back_brings_the_guides_back_to_be_filled():
    model = language_model()
    optimizer = build_optimizer(model, "self-guided", guided_steps=3)
    names = {n for n, _ in model.named_parameters()}
    optimizer.guides.set(3)
    optimizer.guides.set(1)
    assert {n for n, _ in model.named_parameters()} == names
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    backward(model, batch())
    optimizer.step()


def test_a_freed_model_saves_and_loads_as_a_low_rank_one(tmp_path):
    model = language_model()
    optimizer = build_optimizer(model, "self-guided", guided_steps=2)
    with pytest.raises(ValueError, match=r"q_proj still has its guide"):
        save(model, tmp_path / "early")
    optimizer.guides.set(2)
    loaded = load(save(model, tmp_path / "late"))
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.up_proj"), LowRankLinear)
    assert not guided_layers(loaded)
    assert torch.equal(loaded(input_ids=batch()).logits, model.eval()(input_ids=batch()).logits)


def test_gemms_hold_the_guide_as_long_as_it_is_there():
    made = layer()
    factors_only = LowRankLinear(7, 6, 3).gemms()
    assert made.gemms() == [*factors_only, made.guide_gemm()] and made.guide_gemm().flops == 2 * 6 * 7
    made.free_guide()
    assert made.gemms() == factors_only


def test_what_cannot_be_guided_is_one_clear_error():
    model = language_model()
    with pytest.raises(ValueError, match="guided_steps belongs to self-guided, which needs it; got None"):
        build_optimizer(model, "self-guided")
    with pytest.raises(ValueError, match="is the guide of self-guided training, which lowrank-adamw does not know"):
        build_optimizer(model, "lowrank-adamw")
    with pytest.raises(ValueError, match="guided_steps must be at least 0, got -1"):
        build_optimizer(model, "self-guided", guided_steps=-1)
    plain = nn.Sequential(LowRankLinear(4, 4, 2))
    with pytest.raises(ValueError, match="found no guide in the model"):
        build_optimizer(plain, "self-guided", guided_steps=4)
    with pytest.raises(ValueError, match="guided_steps belongs to self-guided"):
        build_optimizer(plain, "spectron", guided_steps=4)
    with pytest.raises(ValueError, match="guide is product or dense, for self-guided only, got 'half'"):
        factorize(nn.Sequential(nn.Linear(4, 4)), "self-guided", guide="half")
    with pytest.raises(ValueError, match="for self-guided only, got 'dense' for spectron"):
        factorize(nn.Sequential(nn.Linear(4, 4)), "spectron", guide="dense")


def test_expert_stacks_are_refused_before_anything_changes(build):
    model = build("mixtral")
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"do not cover stacks of experts such as .*experts.*; exclude them by name"):
        factorize(model, "self-guided")
    assert [n for n, _ in model.named_parameters()] == names

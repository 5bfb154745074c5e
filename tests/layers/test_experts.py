"""Expert stacks: grouped products against a plain loop, declared cost, names, mixtures of dense and factored."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from nativerank.layers.base import FactorLayer
from nativerank.layers.experts import IMPLEMENTATION, LowRankExperts, check_experts, grouped_linear
from nativerank.layers.factorize import factorize_modules, to_dense_modules

OFFSETS = torch.tensor([3, 3, 9, 13], dtype=torch.int32)  # the second expert gets no token


def test_grouped_linear_is_a_loop_over_tokens():
    x, weight = torch.randn(13, 6, dtype=torch.float64), torch.randn(4, 5, 6, dtype=torch.float64)
    owner = [0] * 3 + [2] * 6 + [3] * 4
    expected = torch.stack([weight[e] @ row for e, row in zip(owner, x, strict=True)])
    assert_close(grouped_linear(x, weight, OFFSETS), expected)


def test_the_gpu_kernel_has_the_same_meaning():
    # The kernel runs on the CPU too, so the layout we give it is checked without a GPU.
    x, weight = torch.randn(13, 16).bfloat16(), torch.randn(4, 24, 16).bfloat16()
    kernel = F.grouped_mm(x, weight.mT, offs=OFFSETS)
    assert_close(kernel, grouped_linear(x, weight, OFFSETS), atol=2e-2, rtol=2e-2)  # bfloat16 sums


def test_a_stack_is_a_factor_layer_per_expert():
    stack = LowRankExperts(3, 12, 20, 4, dtype=torch.float64)
    A, B = stack.factors()
    assert A.shape == (3, 20, 4) and B.shape == (3, 12, 4) and stack.rank == 4
    assert isinstance(stack, FactorLayer)
    assert_close(stack.to_dense(), A @ B.mT)
    expected = torch.linalg.svdvals(stack.to_dense())[:, :4]
    assert_close(stack.spectrum().detach(), expected.detach())
    x = torch.randn(5, 12, dtype=torch.float64)
    assert_close(stack(x, torch.tensor([0, 5, 5])), x @ stack.to_dense()[1].mT)


def test_declared_gemms_are_what_runs(build):
    model, tokens = build("mixtral", num_experts_per_tok=3), 14
    factorize_modules(model)
    block = model.model.layers[0].mlp
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(1, tokens, 32))
    declared = sum(g.flops for stack in (block.experts.gate_up_proj, block.experts.down_proj) for g in stack.gemms())
    router = 2 * 32 * 4
    assert counter.get_total_flops() == tokens * (declared + router)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_is_replaced_and_restored(implementation, build, tokens):
    model = build("mixtral", experts_implementation=implementation)
    expected = model(tokens).logits
    factorize_modules(model, include="*experts*", value=32)
    assert model.config._experts_implementation == IMPLEMENTATION
    assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    to_dense_modules(model)
    assert model.config._experts_implementation == implementation
    assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)


def test_dense_and_factored_projections_mix_and_two_calls_remember(build, tokens):
    model = build("mixtral")
    expected, before = model(tokens).logits, model.config._experts_implementation
    factorize_modules(model, include="layers.1.*.down_proj", value=32)
    assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    factorize_modules(model, include="layers.0.*.gate_up_proj", value=32)
    assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    to_dense_modules(model)
    assert model.config._experts_implementation == before


def test_names_in_the_state_dict(build):
    model = build("mixtral")
    factorize_modules(model, include="experts.*")
    keys = [k for k in model.state_dict() if k.startswith("model.layers.0.mlp.experts")]
    prefix = "model.layers.0.mlp.experts"
    assert keys == [f"{prefix}.{p}.{f}" for p in ("gate_up_proj", "down_proj") for f in ("up", "down")]


def test_an_expert_without_tokens_gets_a_zero_gradient_and_not_none():
    stack = LowRankExperts(4, 6, 5, 2)
    stack(torch.randn(13, 6), OFFSETS).square().sum().backward()
    assert not stack.up.grad[1].any() and stack.up.grad[0].any() and not stack.down.grad[1].any()


@pytest.mark.parametrize(
    "attribute, value, complaint",
    [
        ("is_transposed", True, "stores its weights transposed"),
        ("has_bias", True, "has biases"),
        ("has_gate", False, "has no gate"),
        ("has_post_expert_norm", True, "has a norm after each expert"),
        ("_is_expert_parallel", True, "expert-parallel"),
    ],
)
def test_other_layouts_are_told_to_be_excluded(attribute, value, complaint, build):
    model = build("mixtral")
    experts = model.model.layers[1].mlp.experts
    setattr(experts, attribute, value)
    with pytest.raises(ValueError, match=rf"layers.1.mlp.experts.*{complaint}.*exclude=\['model.layers.1"):
        factorize_modules(model)
    factorize_modules(model, exclude="model.layers.1.mlp.experts.*")


def test_a_config_without_the_number_of_active_experts_is_an_error(build):
    experts = build("mixtral").model.layers[0].mlp.experts
    experts.config = SimpleNamespace(_experts_implementation="eager")
    with pytest.raises(ValueError, match="how many experts a token visits"):
        check_experts(experts, "experts")


def test_gpt_oss_layout_is_refused_with_the_name_to_exclude():
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts.*transposed"):
        factorize_modules(model, exclude="router")


def test_autocast_is_heeded_where_experts_are_one_operator():
    """As by the products one by one, which autocast knows."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(torch.empty(6, 4), torch.empty(2, 3, 4), torch.empty(2, dtype=torch.int32))
    assert y.dtype == torch.bfloat16 and y.shape == (6, 3)

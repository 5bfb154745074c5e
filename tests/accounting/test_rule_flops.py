"""What an optimizer step and recomputation cost: counted on shapes, held to formulas and to what runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nativerank.accounting.algebra import algebra_flops
from nativerank.accounting.flops import flops_per_token, recomputed_flops, six_nd
from nativerank.accounting.rule_flops import optimizer_flops
from nativerank.linalg.norms import power_iteration_flops
from nativerank.linalg.orthogonalize import orthogonalize_flops
from nativerank.methods import METHODS, build_optimizer, factorize
from nativerank.models import count_parameters, find_preset, hf_config, make_hf_config, materialize, skeleton
from nativerank.train.recompute import recompute_blocks

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
RANK, CONTEXT = 16, 24


def built(method, **options):
    model = skeleton(make_hf_config({"model_type": "llama", **SIZES}, None))
    if METHODS[method].layer:
        factorize(model, method, rank=RANK)
    if METHODS[method].guided:
        options["guided_steps"] = 10
    return model, build_optimizer(model, method, **options)


def factor_sides():
    """(d, r) of every factor of the two blocks."""
    return 2 * [*[64] * 8, *[64, 160] * 3]


def test_spectron_costs_what_its_formula_says():
    model, optimizer = built("spectron")
    found = optimizer_flops(optimizer.param_groups)
    assert found == {"spectron": algebra_flops(model, CONTEXT)["per_step"]["gram"], "adamw": 0.0}
    expected = sum(orthogonalize_flops(d, RANK) + power_iteration_flops(d, RANK) for d in factor_sides())
    assert found["spectron"] == expected


def test_muon_orthogonalizes_dense_matrices_and_factors_alike():
    _, dense = built("dense-muon")
    matrices = 2 * ([(64, 64)] * 4 + [(160, 64)] * 3)
    assert optimizer_flops(dense.param_groups)["muon"] == sum(orthogonalize_flops(d, r) for d, r in matrices)
    _, thin = built("lowrank-muon")
    assert optimizer_flops(thin.param_groups)["muon"] == sum(orthogonalize_flops(d, RANK) for d in factor_sides())


@pytest.mark.parametrize("method", ["lowrank-adamw", "dense-adamw", "self-guided"])
def test_adamw_has_no_products(method):
    _, optimizer = built(method)
    assert sum(optimizer_flops(optimizer.param_groups).values()) == 0


def test_a_cholesky_retraction_is_a_gram_matrix_a_root_an_inverse_and_a_product():
    _, optimizer = built("sct", retraction="cholesky")
    count, r = len(factor_sides()), RANK
    roots = count * (
        r**3 / 3 + r**3 + 2 * r * r
    )  # below one panel the inverse is one solve; and |R^-1|^2 times squares
    assert optimizer_flops(optimizer.param_groups)["sct"] == sum(4 * d * r * r for d in factor_sides()) + roots


@pytest.mark.parametrize(("method", "option"), [("sct", "preserve"), ("sct", "riemannian"), ("spectron", "certified")])
def test_options_that_do_more_cost_more(method, option):
    plain, more = (sum(optimizer_flops(built(method, **{option: on})[1].param_groups).values()) for on in (False, True))
    assert more > plain


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].rule != "adamw"])
def test_every_rule_is_counted_and_grows_with_depth_alone(method):
    _, two = built(method)
    model = skeleton(make_hf_config({"model_type": "llama", **SIZES, "num_hidden_layers": 6}, None))
    if METHODS[method].layer:
        factorize(model, method, rank=RANK)
    six = build_optimizer(model, method)
    few, many = (sum(optimizer_flops(o.param_groups).values()) for o in (two, six))
    assert few > 0 and many == pytest.approx(3 * few)


@pytest.mark.parametrize(
    ("policy", "method"),
    [("up", "spectron"), ("up", "sct"), *(("blocks", m) for m in ("spectron", "sct", "dense-adamw"))],
)
def test_recomputation_is_what_the_backward_pass_does_more(policy, method):
    def backward(keep):
        model = skeleton(hf_config(find_preset("pocket"), 96, CONTEXT))
        if METHODS[method].layer:
            factorize(model, method, rank=5)
        extra = recomputed_flops(model, CONTEXT, keep)
        model = materialize(model, seed=0, init_scale=0.5).train()
        model.set_attn_implementation("eager")
        if keep != "none":
            recompute_blocks(model, keep)
        ids = torch.zeros(2, CONTEXT, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            loss = model(input_ids=ids).logits.sum()
            before = counter.get_total_flops()
            loss.backward()
        return counter.get_total_flops() - before, extra * ids.numel()

    (plain, nothing), (more, extra) = backward("none"), backward(policy)
    written_out = flops_per_token(skeleton(hf_config(find_preset("pocket"), 96, CONTEXT)), CONTEXT).attention
    # Attention written out as products is no single operator whose output could wait, so "up" makes it again here.
    assert nothing == 0 and more - plain == extra + (2 * CONTEXT * written_out if policy == "up" else 0)


def test_six_nd_leaves_embedding_and_head_out():
    model, _ = built("spectron")
    inner = count_parameters(model)["non_embedding"]
    assert six_nd(inner) == 6 * inner

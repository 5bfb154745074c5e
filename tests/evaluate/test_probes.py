"""Probes against explicit SVDs of the matrices they never form."""

import pytest
import torch

from nativerank.evaluate.probes import probe, probed_names
from nativerank.methods import factorize
from nativerank.models import make_hf_config, materialize, skeleton

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=32)


def make(family="llama", **extra):
    model = skeleton(make_hf_config({"model_type": family, **SIZES, **extra}, "test"))
    factorize(model, "spectron", rank_ratio=0.25)
    return materialize(model, 0, 1.0)


def test_first_middle_and_last_are_probed():
    names = probed_names(make())
    assert [n.split(".")[2] for n in names] == ["0", "1", "2"]
    assert probed_names(torch.nn.Linear(3, 3)) == []


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_probes_are_singular_values(family):
    model = make(family, **(dict(num_local_experts=4, num_experts_per_tok=2) if family == "mixtral" else {}))
    names = [n for n, m in model.named_modules() if hasattr(m, "factors")]
    for name, values in probe(model, names).items():
        layer = model.get_submodule(name)
        A, B = (f.detach().double() for f in layer.factors())
        S = torch.linalg.svdvals(A @ B.mT)
        stable = S.square().sum(-1) / S[..., 0].square()
        wanted = dict(
            sigma_A=torch.linalg.matrix_norm(A, 2),
            sigma_B=torch.linalg.matrix_norm(B, 2),
            sigma_W=S[..., 0],
            stable_rank=stable,
        )
        assert set(values) == set(wanted)
        for key, value in wanted.items():
            assert values[key] == pytest.approx(value.max().item(), rel=1e-4), key  # norms in float32

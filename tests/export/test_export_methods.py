"""Every method's model comes out dense within 1e-4, and factored as it was."""

import pytest
from transformers import AutoModelForCausalLM

from nativerank.export.export import export
from nativerank.layers.base import factor_layers
from nativerank.methods import METHODS
from nativerank.train.loop import train


@pytest.mark.parametrize("method", METHODS)
def test_dense_computes_what_the_method_trained(tmp_path, run_config, listen, method):
    config = run_config(out=tmp_path / "run", method=method, train__steps=5, train__checkpoint_every=0, optim__lr=0.01)
    train(config, listen())
    dense = export(tmp_path / "run", tmp_path / "dense", "dense")
    assert dense.form == "dense" and dense.parity.figure <= 1e-4 and dense.parity.mean_kl < 1e-9
    assert len(dense.matrices) == (14 if METHODS[method].layer else 0)
    assert not factor_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    if METHODS[method].layer:
        factored = export(tmp_path / "run", tmp_path / "factored", "factored")
        assert factored.parity.figure == 0 and factored.form == "factored"
    else:
        with pytest.raises(ValueError, match="has no factors; --format dense writes it"):
            export(tmp_path / "run", tmp_path / "factored", "factored")
    half = export(tmp_path / "run", tmp_path / "half", "dense", dtype="bfloat16")
    assert half.parity.figure <= 1e-3

"""A dense export is really stock: CTranslate2, which knows nothing of us, converts it and computes the same logits."""

import numpy as np
import pytest
import torch

from nativerank.export.export import export
from nativerank.train.loop import train
from nativerank.train.trained import open_trained

ct2 = pytest.importorskip("ctranslate2")


def test_ctranslate2_computes_the_logits_of_the_run(tmp_path, run_config, listen, write_hf_config):
    shape = write_hf_config(
        hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    train(run_config(out=tmp_path / "run", model__config=shape), listen())
    export(tmp_path / "run", tmp_path / "dense", "dense")
    converter = ct2.converters.TransformersConverter(str(tmp_path / "dense"))
    converter.convert(str(tmp_path / "ct2"), quantization="float32")
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = open_trained(tmp_path / "run").model(ids).logits  # of the factors
    generator = ct2.Generator(str(tmp_path / "ct2"), device="cpu", compute_type="float32", intra_threads=1)
    found = torch.from_numpy(np.array(generator.forward_batch(ids.tolist())))
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()

"""What fails on one process alone, while the others are in a collective, is named within seconds."""

import time

import pytest
import transformers.models.llama.modeling_llama  # noqa: F401  here once instead of in every child

from nativerank.cli.main import main
from nativerank.train import setup


def pretend(rank, words, where):
    """Rank 1 fails at this place, and is slow to go: the other one does not hear of it from its launcher."""

    def fail(*args, **how):
        raise RuntimeError("pretended")

    if rank == 0:
        began = time.monotonic()
        return main(words), time.monotonic() - began
    setattr(setup, where, fail)
    with pytest.raises(RuntimeError, match="pretended"):
        main(words)
    time.sleep(3)
    return None


@pytest.mark.parametrize(("where", "mode"), [("_new_model", "ddp"), ("spread", "ddp"), ("optimizer_for", "fsdp")])
def test_who_fails_while_building_is_named_with_the_reason(launched, flags, tmp_path, capfd, where, mode):
    words = ["train", "--quiet", *flags(out=tmp_path / "run", parallel__mode=mode)]
    (code, seconds), _ = launched(pretend, 2, words, where)
    assert code == 4 and seconds < 10
    assert capfd.readouterr().err.splitlines() == [
        "nativerank: error: rank 1 has left in step 0: RuntimeError: pretended"
    ]

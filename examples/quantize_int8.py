"""int8 weights by torchao: the loss and the bytes of a model before and after.

pip install 'nativerank[quantize]'
python examples/quantize_int8.py                           # trains the pocket preset for a minute first
python examples/quantize_int8.py runs/demo-spectron        # any run or checkpoint whose data are still there
"""

import argparse

from nativerank.cli.main import main
from nativerank.data.shards import Dataset
from nativerank.evaluate.loss import validation_loss
from nativerank.integrations.quantize import quantize
from nativerank.train.trained import open_trained


def compare(run: str, head: bool = False) -> tuple[float, float]:
    """Validation loss in nats per token with the weights as they are and in int8."""
    trained = open_trained(run)
    if trained.data is None:
        raise SystemExit(f"{run} does not say which data it was trained on")
    validation, context = Dataset.open(trained.data).split("val"), trained.model.config.max_position_embeddings
    before = validation_loss(trained.model, validation, context, batch_size=8).nats
    done = quantize(trained.model, "int8", head=head)
    after = validation_loss(trained.model, validation, context, batch_size=8).nats
    print(f"{trained.label}: {done}")
    print(f"validation loss {before:.4f} -> {after:.4f} nats per token ({after - before:+.5f})")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder or checkpoint")
    parser.add_argument("--head", action="store_true", help="the output head too")
    flags = parser.parse_args()
    if flags.run is None:
        flags.run = "runs/quantize-pocket"
        main(f"train --model.preset pocket --train.steps 300 --out {flags.run} --resume auto".split())
    compare(flags.run, flags.head)

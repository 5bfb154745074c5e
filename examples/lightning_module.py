"""Lightning: `configure_optimizers` returns our optimizer and any scheduler; checkpoints resume.

pip install 'nativerank[lightning]'
python examples/lightning_module.py --epochs 8
python examples/lightning_module.py --epochs 16 --resume my-lightning/last.ckpt
"""

import argparse
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import nativerank as nr

CONFIG = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)


class LowRankModule(lightning.LightningModule):
    """A factorized language model; options go to `nr.build_optimizer`."""

    def __init__(self, method: str = "spectron", **options: Any):
        super().__init__()
        self.model = LlamaForCausalLM(CONFIG)
        nr.factorize(self.model, method=method, rank_ratio=0.25)
        nr.follow_checkpoints(self.model)  # those of other ranks load too, and those without guides
        self.method, self.options = method, {"lr": 0.05, "aux_lr": 0.02, **options}

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = nr.build_optimizer(self.model, method=self.method, **self.options)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


def train(epochs: int, out: str, resume: str | None = None, **options: Any) -> lightning.Trainer:
    lightning.seed_everything(0, verbose=False)
    data = (torch.arange(64)[:, None] + torch.arange(32)) % 64  # counting up, from every number
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(out, filename="{epoch}", save_top_k=-1, save_last=True)],
    )
    trainer.fit(LowRankModule(**options), DataLoader(data, batch_size=8), ckpt_path=resume)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", default="my-lightning")
    parser.add_argument("--method", default="spectron")
    parser.add_argument("--resume")
    args = parser.parse_args()
    trainer = train(args.epochs, args.out, args.resume, method=args.method)
    nr.save(trainer.lightning_module.model, f"{args.out}/model", replace=True)
    print(f"loss {trainer.callback_metrics['loss']:.4f} after step {trainer.global_step}; checkpoints in {args.out}")

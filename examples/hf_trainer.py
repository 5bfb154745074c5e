"""Hugging Face Trainer: the optimizer goes in through `optimizers=`, a callback lets ranks follow the spectra.

pip install 'nativerank[hf]'
python examples/hf_trainer.py --steps 60
python examples/hf_trainer.py --steps 60 --resume    # goes on from the last checkpoint in --out, ranks included
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import nativerank as nr
from nativerank.integrations.hf_trainer import NativerankCallback

CONFIG = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)


class Counting(torch.utils.data.Dataset):
    """Counting up from a number, modulo the vocabulary."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + torch.arange(32)) % 64
        return {"input_ids": tokens, "labels": tokens}


def train(steps: int, out: str, resume: bool = False, method: str = "spectron") -> Trainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    nr.factorize(model, method=method, rank_ratio=0.5)
    optimizer = nr.build_optimizer(model, method=method, lr=0.05, aux_lr=0.02)
    args = TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",  # of all groups, each with its own peak rate
        warmup_steps=2,
        save_steps=max(1, steps // 2),
        logging_steps=max(1, steps // 6),
        report_to="none",
        use_cpu=True,
    )
    # Without arguments the callback changes nothing, but checkpoints of other ranks can still be resumed.
    ranks = NativerankCallback(threshold=0.9, start=0.2, every=0.2, until=0.8, min=4)
    trainer = Trainer(model, args, train_dataset=Counting(), optimizers=(optimizer, None), callbacks=[ranks])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="my-trainer")
    parser.add_argument("--method", default="spectron")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    trainer = train(args.steps, args.out, args.resume, args.method)
    again = nr.load(f"{args.out}/checkpoint-{args.steps}")  # after nr.register(), AutoModelForCausalLM reads it too
    ranks = {name: layer.rank for name, layer in again.named_modules() if hasattr(layer, "factors")}
    print(f"ranks {min(ranks.values())} to {max(ranks.values())}; checkpoints in {args.out}")

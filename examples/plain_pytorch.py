"""A plain PyTorch loop: factorize a model, take the optimizer, train, save, load. Seconds on a CPU.

python examples/plain_pytorch.py --steps 60
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nativerank as nr

CONFIG = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)


def batches(steps: int, seed: int = 0) -> torch.Tensor:
    """Counting up from a random number, modulo the vocabulary: (steps, sequences, tokens)."""
    start = torch.randint(64, (steps, 8, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(32)) % 64


def train(steps: int, method: str, out: str) -> list[float]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    print(nr.factorize(model, method=method, rank_ratio=0.25))  # in place
    optimizer = nr.build_optimizer(model, method=method, lr=0.05, aux_lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # any scheduler drives all groups
    losses = []
    for batch in batches(steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    nr.save(model, out, replace=True)  # factors as safetensors
    again = nr.load(out)  # in evaluation mode
    assert torch.equal(again(batch).logits, model.eval()(batch).logits)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--method", default="spectron")
    parser.add_argument("--out", default="my-model")
    args = parser.parse_args()
    losses = train(args.steps, args.method, args.out)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; saved in {args.out}")

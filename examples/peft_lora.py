"""PEFT: LoRA adapters on a factorized model, trained while the factors stay frozen, then merged into them.

pip install 'nativerank[hf]'
python examples/peft_lora.py --steps 40
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import nativerank as nr

CONFIG = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)


def batches(steps: int) -> torch.Tensor:
    """Counting up from a random number, modulo the vocabulary: (steps, sequences, tokens)."""
    start = torch.randint(64, (steps, 8, 1), generator=torch.Generator().manual_seed(0))
    return (start + torch.arange(32)) % 64


def finetune(steps: int, out: str) -> list[float]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG)
    nr.factorize(base, method="spectron", rank_ratio=0.25)  # or nr.load("my-model").train()
    # Both factors of every projection are nn.Linear; "q_proj.up" would name those of one projection.
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["up", "down"]))
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for batch in batches(steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(f"{out}/adapters")  # the adapters alone
    merged = model.merge_and_unload()  # a factorized model again, of the same ranks
    nr.save(merged, f"{out}/merged", replace=True)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="my-lora")
    args = parser.parse_args()
    losses = finetune(args.steps, args.out)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; adapters and merged model in {args.out}")

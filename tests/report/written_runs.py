"""Run folders written by hand, so that a test knows every number in them."""

import json
import math

MODULES = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]
LR, TOKENS = 0.08, 1024


def step_row(step, steps, **more):
    row = {
        "step": step,
        "tokens": step * TOKENS,
        "loss": 3 + 4 * math.exp(-4 * step / steps) + 0.05 * math.sin(step),
        "lr": LR * (1 - step / steps) + 1e-4,
        "aux_lr": 0.02 * (1 - step / steps) + 1e-4,
        "grad_norm": 0.5 + 0.1 * math.cos(step),
        "tokens_per_second": 20000.0 + 100 * (step % 7),
        "seconds": 0.05,
        "train_flops": 1.5e9 * step,
        "optimizer_share": 0.1,
    }
    return row | more


def probes(step, modules=MODULES):
    return {
        name: {
            "sigma_W": 1 + 0.1 * i + step / 1000,
            "sigma_A": 1.2,
            "sigma_B": 0.9,
            "stable_rank": 5.0 + i,
            "update_norm": 0.01,
            "update_ratio": 0.4 + 0.05 * i,
            "rho": 0.02,
            "gauge": 1.3,
            "output_change": 0.02,
        }
        for i, name in enumerate(modules)
    }


def start(steps, **more):
    row = {
        "event": "start",
        "step": 0,
        "method": "spectron",
        "model": "pocket",
        "parameters": {"total": 578688, "non_embedding": 316544},
        "steps": steps,
        "ranks": dict.fromkeys(MODULES, 32),
        "device": "cpu",
        "environment": {"nativerank": "0.1.0", "torch": "2.13.0", "machine": "x86_64, 2 cores, 1 threads"},
    }
    return row | more


def end(steps, **more):
    row = {
        "event": "end",
        "step": steps,
        "tokens": steps * TOKENS,
        "val_loss": 3.1,
        "perplexity": math.exp(3.1),
        "bits_per_byte": 1.5,
        "prompt": "Fellow",
        "sample": " citizens & others",
        "parameters": {"total": 578688, "non_embedding": 316544},
        "train_flops": 1.5e9 * steps,
        "ranks": dict.fromkeys(MODULES, 24),
        "seconds": 0.05 * steps + 1,
        "peak_memory_bytes": 5e8,
    }
    return row | more


def full_rows(steps=400):
    """A run with everything: probes of all matrices, validations, a spike, a rollback, ranks that change, a resume."""
    rows = [start(steps)]
    for step in range(1, steps + 1):
        row = step_row(step, steps)
        if step % 20 == 0:
            row["probes"] = probes(step)
        if step % 100 == 0 and step < steps:
            row["val_loss"] = row["loss"] + 0.1
        if step == 50:
            rows.append({**row, "loss": 9.5, "event": "loss_spike", "action": "rollback", "rolled_back_to": 40})
            rows += [step_row(s, steps) for s in range(41, 50)]
        if step == 60:
            row |= {"event": "gradient_not_finite", "action": "skip", "grad_norm": "nan"}
        rows.append(row)
        if step in (80, 160):
            before, after = (32, 28) if step == 80 else (28, 24)
            changed = MODULES if step == 160 else MODULES[:3]
            pairs = {name: [before if step == 160 and name in MODULES[:3] else 32, after] for name in changed}
            energy = dict.fromkeys(changed, 0.97)
            rows.append(
                {"event": "ranks", "step": step, "ranks": pairs, "energy": energy, "parameters": {"total": 5e5}}
            )
        if step == 200:
            rows.append(start(steps, event="resume", step=200, checkpoint="run/checkpoints/step-000200"))
    return [*rows, end(steps)]


def write_run(folder, rows, config="method: spectron\nmodel:\n  preset: pocket\n"):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(config)
    return folder

"""From what is held and what was traced to bytes by component.

| component | bytes of one process |
|---|---|
| weights, buffers | float32, or its shard |
| gradients | as the weights; with `optim.layerwise` those of one block |
| optimizer | moments, momenta, small matrices, owned copies; the mean of all processes |
| owned_copies | part of it: with shards and the `owner` algebra, whole weights that a process steps for all |
| gathered | FSDP: whole weights and gradients of the blocks at work |
| buckets | DDP on CPU: gradients once more |
| diloco | weights of the last meeting and outer momentum, spread over all processes |
| activations | what waits for the backward pass, bfloat16 copies of weights and what the loss keeps included |
| working | what a phase has beyond that at its worst moment |
| logits | part of these two: of one chunk of tokens, or of all |

    peak = everything held + the worst moment of forward, backward and optimizer

Not all components are there at once, so the peak is at most their sum. Left out: what `LEFT_OUT` says.
"""

from nativerank.plan.figures import Figures
from nativerank.plan.passes import chunk, full_chunks, resident
from nativerank.plan.subject import Subject

LEFT_OUT = (
    "the framework itself, communication buffers, what an allocator rounds up or keeps, temporary tensors of the "
    "optimizer on many processes, a teacher"
)
PERMANENT = ("weights", "optimizer", "buffers", "gathered", "buckets", "diloco")


def bytes_of(planned: Subject, found: Figures) -> dict[str, int]:
    """Bytes by component and the peak, of one process with `planned.sequences` in a pass."""
    traced, held = found.at(planned.sequences, full_chunks(planned)), found.held
    new = 0 if resident(planned) else held["gradients"]
    worst = max(traced.peak, found.update, new)
    tokens = planned.sequences * planned.context
    tokens = tokens if planned.config.train.loss == "whole" else min(tokens, chunk(planned))
    parts = {
        **held,
        "activations": traced.activations,
        "working": max(0, worst - traced.activations - new),
        "logits": 4 * tokens * found.flops["per_token"]["of_forward"]["head"] / 2 / planned.width(),
        "peak": sum(held[name] for name in PERMANENT) + held["gradients"] - new + worst,
    }
    return {name: round(size) for name, size in parts.items()}


def largest_component(parts: dict[str, int]) -> str:
    """What takes most."""
    return max((name for name in parts if name not in ("peak", "logits", "owned_copies")), key=parts.__getitem__)

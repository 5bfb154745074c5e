"""The typed configuration of a run: what a YAML file or a dotted flag may set, and nothing else.

    nativerank train --config run.yaml --optim.lr 0.02

A value of None means "what the preset or the method says"; `train.resolve.resolve` fills it in, and the filled-in
form is what a run folder keeps as `config.yaml`. Units: lengths in tokens, batches in sequences, rates per step.
No torch here, so that `--help` stays fast. Strict reading and writing of such dataclasses is `schema`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# The generic part is offered here too: who reads a configuration needs both.
from nativerank.schema import described as described
from nativerank.schema import differences as differences
from nativerank.schema import flat as flat
from nativerank.schema import from_dict as from_dict
from nativerank.schema import keys as keys
from nativerank.schema import nearest as nearest
from nativerank.schema import to_dict as to_dict


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which architecture is built.

    Args:
        preset: a named model with its training defaults; unknown names list the known ones.
        config: path of a Hugging Face config.json (or its folder), used instead of the preset's architecture.
        init_scale: factor on the initial standard deviation 1/sqrt(fan_in) of every hidden matrix.
        embedding_std: initial standard deviation of the token embedding; None leaves the architecture's own.
    """

    preset: str = "demo"
    config: str | None = None
    init_scale: float | None = None
    embedding_std: float | None = None


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Ranks that change during training, per matrix, by the energy of its spectrum. E(r) is the share of ||W||_F^2 in
    the r leading singular directions.

    Args:
        mode: "schedule" looks at the spectra again and again, "once" at `start` only: after a warm-up at the rank that
            was set, or at full rank with `--rank.ratio 1`. None is "schedule" if a threshold is given, else "off".
        threshold: a matrix shrinks to the smallest r with E(r) >= threshold. It grows where its spectrum, continued
            with the decay of its last columns, would hold more than the rest, 1 - threshold, beyond them.
        start: first look, as a share of the steps.
        every: between two looks, as a share of the steps ("schedule" only, as `until` and `hysteresis`).
        until: no look after this share of the steps.
        min: no matrix shrinks below this rank; one that is below already keeps its rank or grows.
        multiple: new ranks are multiples of this, rounded up when shrinking (bounds of a matrix go first).
        hysteresis: a matrix shrinks by at least this share of its rank, or not at all.
        grow: how much a matrix grows at one look, as a share of its rank (one `multiple` at least); 0 never grows. What
            is dropped again after it had grown is not grown again.
        max: no matrix grows beyond this rank; None is the largest at which the factors are smaller than the matrix.
    """

    mode: Literal["off", "schedule", "once"] | None = None
    threshold: float | None = None
    start: float = 0.1
    every: float = 0.2
    until: float = 0.8
    min: int = 8
    multiple: int = 4
    hysteresis: float = 0.1
    grow: float = 0.25
    max: int | None = None


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """How thin the factors are; set at most one of ratio, value and energy (value beside energy is a cap).

    Args:
        ratio: r = int(ratio * d_in), or int(ratio * min(d_in, d_out)) where that reaches break-even.
        value: one rank for every matrix.
        energy: per matrix the smallest rank that keeps this share of ||W||_F^2 of its dense initialisation, or of the
            weight that is converted.
        rule: "auto" as above; "code" keeps int(ratio * d_in) clipped to min(d_in, d_out), as Spectron's code does.
        init: "svd" truncates the dense initialisation, "sampled" draws factors with the same spectrum and never
            forms a dense matrix; "auto" is svd up to width 2048. "flat" draws frames with equal singular values and
            the Frobenius norm of the whole dense matrix, as SCT means to.
        include: only modules matching one of these glob patterns are factorized.
        exclude: modules matching one of these glob patterns stay dense.
        overrides: glob pattern -> rank, for single modules.
        adapt: ranks that change during training.
    """

    ratio: float | None = None
    value: int | None = None
    energy: float | None = None
    rule: Literal["auto", "code"] = "auto"
    init: Literal["auto", "svd", "sampled", "flat"] = "auto"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    overrides: dict[str, int] = field(default_factory=dict)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Rates, update rule options and the schedule.

    Args:
        lr: peak rate of the matrices (factors, or dense matrices of a dense method).
        aux_lr: peak AdamW rate of everything else (embedding, head, norms, biases).
        weight_decay: decoupled decay of the matrices, times the rate.
        clip: largest global gradient norm; 0 switches clipping off.
        schedule: shape of the rate over the run, the same for every method.
        warmup: share of the steps over which the rate rises linearly.
        decay: share of the steps in which "wsd" falls linearly.
        final_lr: rate at the last step as a share of the peak.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's denominator guard.
        momentum: decay rate of the momentum that Muon and Spectron orthogonalize.
        nesterov: blend the gradient into the orthogonalized momentum.
        shape_scale: factor on an orthogonalized update by its shape (rows, cols): "original" sqrt(max(1, rows/cols)),
            "match_rms_adamw" 0.2 sqrt(max(rows, cols)).
        orthogonalizer: polynomial iteration that orthogonalizes the momentum; "none", an ablation, steps along the
            momentum as it is.
        orthogonalizer_steps: iterations of it.
        norm: how Spectron gets the factors' spectral norms: warm-started power iteration, or exactly.
        step: Spectron's rho: "paper" lr / (sigma_A + sigma_B + 1), or "root", the positive root of
            rho^2 + rho (sigma_A + sigma_B) = lr, which has the same bound and is up to 1.5 times as long.
        renormalize: false, an ablation, takes rho = lr whatever the factors' norms.
        power_iterations: power iterations per factor and step.
        certified: Spectron with measured norms: the change of W stays within lr, proven, at a small cost; takes the
            place of `step`.
        layerwise: update inside the backward pass and free each gradient at once: the same bits, less memory. Takes
            clip 0 and train.accumulation 1; of a step with a bad gradient, updates made before it was seen stay.
        state_dtype: what the means of gradients and of their squares are kept in: "bf16" halves the optimizer's memory;
            vectors (norms, biases, s) stay as they are.
        aux_state_dtype: the same for embedding and head; None is state_dtype. "fp8" keeps 8 bits, with a scale per 256.
        update_cap: lowrank-adamw and adam-muon: a step whose ||dW||_2 may exceed this (times the schedule) is
            shortened; None is no cap for lowrank-adamw, 0.15 for adam-muon.
        frames: stiefel-spectron only: "both" keeps U and V of U diag(s) V^T orthonormal, "one" trains A V^T with only V
            orthonormal.
        s_lr: peak AdamW rate of s in U diag(s) V^T; None is 0.05, which is ours; SCT has lr.
        retraction: what makes the frames orthonormal again: "cholesky" and "qr" are the same map, "polar" the nearest
            frame, "cayley" a rotation.
        preserve: the retraction leaves W as it is, by an r x r SVD.
        riemannian: tangent projection of the factors' gradients, first moments transported.
        retract_every: sct only: steps between two retractions.
    """

    lr: float | None = None
    aux_lr: float | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    final_lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    nesterov: bool | None = None
    shape_scale: Literal["none", "original", "match_rms_adamw"] | None = None
    orthogonalizer: Literal["newton-schulz", "polar-express", "none"] = "newton-schulz"
    orthogonalizer_steps: int = 5
    norm: Literal["power", "exact"] = "power"
    power_iterations: int = 1
    step: Literal["paper", "root"] = "paper"
    renormalize: bool = True
    certified: bool = False
    layerwise: bool = False
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    aux_state_dtype: Literal["fp32", "bf16", "fp8"] | None = None
    update_cap: float | None = None
    frames: Literal["both", "one"] | None = None
    s_lr: float | None = None
    retraction: Literal["qr", "cholesky", "polar", "cayley"] | None = None
    preserve: bool = False
    riemannian: bool = False
    retract_every: int = 1


@dataclass(frozen=True, kw_only=True)
class GuideConfig:
    """The dense guide of `--method self-guided`, which fades out and is freed.

    Args:
        init: "product" starts it as the product of the factors (Wei et al. 2024), "dense" as the whole dense
            initialisation that the factors truncate (as Spectron's authors ran it).
        share: of the steps, over which its weight alpha falls from 1 to 0 along a cosine.
        stochastic: compute it with probability alpha only, drawn per step and layer: half the cost.
    """

    init: Literal["product", "dense"] = "product"
    share: float = 0.5
    stochastic: bool = True


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher whose predictions are learned besides the text:
    loss = (1 - weight) CE + weight temperature^2 KL(teacher || model), per token (Hinton et al. 2015).

    Args:
        teacher: run or model folder, dense or factored, with the vocabulary of the model; None is no teacher. Every
            process holds all of it, and runs it forward at every step.
        weight: share of the teacher in the loss; 1 is the teacher alone.
        temperature: both distributions are softened by it.
    """

    teacher: str | None = None
    weight: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read.

    Args:
        path: folder made by `nativerank data prepare`; None is the built-in corpus, prepared once in the user cache.
        document_mask: keep attention inside documents that share a window.
    """

    path: str | None = None
    document_mask: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        steps: optimizer steps.
        tokens: the same as a token count, rounded up to whole steps; set at most one of both.
        batch_size: sequences of one forward and backward pass.
        accumulation: passes per optimizer step; tokens_per_step = batch_size * accumulation * context. None keeps the
            preset's sequences per step at another batch_size (a larger batch than a preset without accumulation has
            is one pass).
        context: tokens of one sequence.
        recompute: activations that are not kept but made again in the backward pass: less memory, the same bits.
            "blocks": all but the inputs of the transformer blocks, a second forward pass. "up": what a factor pair's
            second product and everything elementwise make; kept are the inputs of blocks, the rank-wide outputs of
            first products and attention's output. "none": nothing.
        loss: "auto" makes logits a chunk of tokens at a time and never holds all of them, where the architecture
            returns them as its head made them and there is no teacher; "chunked" is an error where that cannot be;
            "whole" holds them all in training. The last digits of the loss differ.
        float8: multiply the factors in float8, with `torchao`, on a GPU that can (compute capability 8.9); weights,
            optimizer and what is saved stay as they are. Ranks must be multiples of 16 to take part, and stay.
        float8_emulate: with float8: round alike and multiply as ever, slowly, on any device.
        eval_every: steps between validations, 0 for the one at the end only.
        eval_tokens: tokens of a validation during the run; the one at the end reads the whole split.
        checkpoint_every: steps between checkpoints, 0 for the one at the end only.
        keep: newest checkpoints that stay, besides the best one.
        probe_every: steps between records of the factors' norms and of what a step changes, 0 for never.
        probe: glob patterns of the matrices recorded; empty takes the first, the middle and the last one.
        checkpoint_async: go on training while a checkpoint is written; it counts once it is complete.
        seed: of initialisation and data order.
    """

    steps: int | None = None
    tokens: int | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    context: int | None = None
    recompute: Literal["none", "up", "blocks"] = "none"
    loss: Literal["auto", "chunked", "whole"] = "auto"
    float8: bool = False
    float8_emulate: bool = False
    eval_every: int = 100
    eval_tokens: int = 32768
    checkpoint_every: int = 100
    keep: int = 2
    probe_every: int = 20
    probe: list[str] = field(default_factory=list)
    checkpoint_async: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens when a step looks like a spike.

    Args:
        action: "skip" leaves the update out, "rollback" returns to the last good state, "off" never looks.
        loss_jump: a loss this many nats above its running mean is a spike.
        sigma_factor: a factor norm this many times its last recorded value is a spike.
        window: steps the running mean remembers; no loss is called a spike before the first window is over (a factor
            norm may be one from its second record on).
        max_events: spikes in a row after which the run stops.
    """

    action: Literal["off", "skip", "rollback"] = "skip"
    loss_jump: float = 1.5
    sigma_factor: float = 4.0
    window: int = 50
    max_events: int = 5


@dataclass(frozen=True, kw_only=True)
class DilocoConfig:
    """Replicas that train on their own and meet now and then (DiLoCo, Douillard et al. 2023).

    Args:
        every: steps between two meetings; 0 exchanges gradients at every step.
        lr: rate of the outer Nesterov step along the mean change of the replicas.
        momentum: decay rate of the outer momentum, which remembers 1 / (1 - momentum) meetings: take less where there
            are few, or where optim.lr falls within that time.
        nesterov: look ahead along the outer momentum.
        cap: longest outer change of a matrix, ||dW||_2 as a multiple of every * optim.lr; None sets no limit.
    """

    every: int = 0
    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True
    cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes that torchrun started share a run; one process needs none of it.

    They form a grid of `replicas` x `shards`: the `shards` processes of a row share one copy of the model, and every
    matrix is cut into as many pieces. The batch of a step, and with it what is learned, does not depend on the grid.

    Args:
        mode: "ddp" (DistributedDataParallel): a copy of the model in every process. "fsdp" (FSDP2): all processes share
            one. "hsdp" (HSDP): several copies, each shared by several processes. "none" is one process. "auto" takes
            fsdp on CUDA and ddp on CPU; ddp is faster where the model fits, hsdp where nodes have slow links.
        replicas: copies of the model. None follows from the mode: 1 for fsdp, for hsdp one per node (2 on one node).
        shards: processes that share one copy of the model; None is what replicas leave. For hsdp best those of a node.
        algebra: how update rules see a matrix that is cut: "gram" adds up the shards' small Gram matrices, "owner"
            sends the shards to one process per matrix and back; "auto" takes what moves fewer bytes, per shape.
        reshard_after_forward: free the gathered weights of a block after its forward pass and gather them again for the
            backward pass, fsdp and hsdp only. False keeps them: half the gathering, for models that fit.
        precision: what weights are gathered and computed in, fsdp and hsdp only; shards stay float32. None is "bf16" on
            CUDA and "fp32" elsewhere. "fp32" on CUDA gathers twice the bytes, and products keep bfloat16 copies.
        reduce: what gradients are added up in over processes; None is "fp32".
        timeout: seconds that a process waits for the others before it gives up; more than a micro-batch ever takes.
        diloco: gradients that stay within a replica.
    """

    mode: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    replicas: int | None = None
    shards: int | None = None
    algebra: Literal["auto", "gram", "owner"] = "auto"
    reshard_after_forward: bool = True
    precision: Literal["fp32", "bf16"] | None = None
    reduce: Literal["fp32", "bf16"] | None = None
    timeout: float = 600.0
    diloco: DilocoConfig = field(default_factory=DilocoConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run.

    Args:
        method: row of the method table, e.g. spectron, lowrank-adamw, dense-muon; None is the preset's.
        out: run folder; None takes the first free runs/PRESET-METHOD, -2, -3 ...
        resume: "never", "auto" (continue what the folder holds, or start), or the path of a checkpoint.
        init: run or model folder whose weights are trained on; it decides architecture and ranks, the preset the rest.
        device: cpu, cuda or mps; None takes cuda, then cpu.
        compile: torch.compile each transformer block.
        track: show the run in a service besides metrics.jsonl; each works without network and account. "tensorboard"
            (extra `track`) and "wandb" (extra `wandb`, sent along if somebody is logged in) write into the run folder,
            "trackio" (extra `trackio`) into its own.
        profile: write a profiler trace and table of a few steps into the run folder.
    """

    method: str | None = None
    out: str | None = None
    resume: str = "never"
    init: str | None = None
    device: Literal["cpu", "cuda", "mps"] | None = None
    compile: bool = False
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    profile: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def saves_memory(config: RunConfig) -> bool:
    """Whether a run takes less memory for more time."""
    return config.train.recompute != "none" or config.optim.layerwise


def check_keys(values: Any, prefix: str = "") -> None:
    """Raises a ValueError that names the nearest key, in full, for a key in nested mappings that RunConfig lacks."""
    known = list(keys(RunConfig))
    for name, value in values.items() if isinstance(values, Mapping) else ():
        key = f"{prefix}{name}"
        if key not in known:
            raise ValueError(f"unknown config key {key}{nearest(key, known)}")
        if dataclasses.is_dataclass(hint_of(key)):
            check_keys(value, f"{key}.")


def hint_of(key: str) -> Any:
    """The annotation of a dotted key of RunConfig, or None for an unknown key."""
    cls: Any = RunConfig
    for part in key.split("."):
        cls = typing.get_type_hints(cls).get(part) if dataclasses.is_dataclass(cls) else None
    return cls

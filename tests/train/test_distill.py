"""A teacher's predictions as a second target: the formula, and runs that learn from it."""

import copy
import shutil

import pytest
import torch
from torch.nn.functional import kl_div
from torch.testing import assert_close

import nativerank as nr
from nativerank.models import make_hf_config, materialize, read_hf_config, skeleton
from nativerank.train import distill
from nativerank.train.distill import Teacher, divergences
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows
from nativerank.train.step import train_step
from nativerank.train.teacher import fingerprint as weights_hash


def drawn(config, seed):
    return materialize(skeleton(read_hf_config(config)), seed=seed, init_scale=1.0)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, write_hf_config, prepared):
    """Folders: a dense teacher with the tokenizer of `prepared`, and another one."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate(("dense", "other")):
        nr.save(drawn(write_hf_config(), 7 + seed), folder / name, "dense")
        shutil.copy(prepared / "tokenizer.json", folder / name)
    return folder


@pytest.fixture
def taught(run_config, teachers):
    """taught(**changes): the configuration of a tiny run with the dense teacher."""
    return lambda **changes: run_config(**{"distill__teacher": str(teachers / "dense")} | changes)


def losses_of(run):
    keys = ("step", "loss", "distill_loss", "grad_norm", "val_loss")
    return [tuple(row.get(key) for key in keys) for row in read_rows(run) if "loss" in row]


# -- the formula --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_divergence_and_its_gradient_in_slices(monkeypatch, temperature):
    monkeypatch.setattr(distill, "SLICE_NUMBERS", 16)  # 3 of the 7 tokens at once
    logits, taught = (5 * torch.randn(7, 5, dtype=torch.float64) for _ in range(2))
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (logits, taught))
    by_hand = temperature**2 * kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert_close(divergences(logits, taught, temperature), by_hand)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergences(z, taught, temperature), logits)


@pytest.mark.parametrize("in_both", [False, True])
def test_words_that_the_teacher_masks_are_of_no_weight(in_both):
    logits, taught = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    taught[:, 4:] = -torch.inf
    if in_both:
        logits[:, 4:] = -torch.inf
    logits.requires_grad_()
    found = divergences(logits, taught, 2.0)
    log_q, log_p = (logits / 2).log_softmax(-1)[:, :4], (taught[:, :4] / 2).log_softmax(-1)
    assert_close(found, 4 * (log_p.exp() * (log_p - log_q)).sum(-1))
    found.sum().backward()
    assert_close(logits.grad, 2 * ((logits / 2).softmax(-1) - (taught / 2).softmax(-1)))
    assert divergences(logits, taught.fill_(torch.nan), 2.0).isnan().all(), "what is no number stays visible"


def test_low_precision_logits_are_compared_in_float32():
    logits, taught = (torch.randn(9, 40).bfloat16() for _ in range(2))
    found = divergences(logits.requires_grad_(), taught, 2.0)
    assert found.dtype == torch.float32
    assert_close(found, divergences(logits.float(), taught.float(), 2.0))
    found.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_step_follows_the_gradient_of_the_formula(tiny_config, weight):
    model, teacher = (drawn(tiny_config, seed).train() for seed in (0, 1))
    twin, tokens = copy.deepcopy(model), torch.randint(0, 300, (4, 17), generator=torch.Generator().manual_seed(0))
    batches = [(half[:, :-1], half[:, 1:], None) for half in tokens.chunk(2)]
    how = Teacher(teacher.eval().requires_grad_(False), weight, 2.0)
    result = train_step(model, torch.optim.SGD(model.parameters(), 0.0), batches, 2, 0.0, teacher=how)

    q, p = (m(input_ids=tokens[:, :-1]).logits.flatten(0, 1) for m in (twin, teacher))
    text = torch.nn.functional.cross_entropy(q, tokens[:, 1:].flatten())
    divergence = 4 * kl_div((q / 2).log_softmax(-1), (p / 2).log_softmax(-1), log_target=True, reduction="batchmean")
    ((1 - weight) * text + weight * divergence).backward()
    assert result.loss == pytest.approx(text.item(), rel=1e-6)
    assert result.distill_loss == pytest.approx(divergence.item(), rel=1e-5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)  # float32 sums in another order
    assert all(p.grad is None for p in teacher.parameters())


def test_a_fingerprint_sees_a_training_step_and_nothing_else(tiny_config):
    model = drawn(tiny_config, 0)
    before = weights_hash(model)
    assert before == weights_hash(copy.deepcopy(model)) != weights_hash(drawn(tiny_config, 1))
    model.model.norm.weight.data.mul_(1.001)
    assert weights_hash(model) != before


# -- runs ---------------------------------------------------------------------------------------------------------


def test_a_weight_of_zero_is_the_plain_run(tmp_path, run_config, taught, listen, fingerprint):
    train(run_config(out=tmp_path / "plain", train__loss="whole"), listen())  # a teacher needs all logits
    listener = listen()
    train(taught(out=tmp_path / "run", distill__weight=0.0), listener)
    assert fingerprint(tmp_path / "run", 8)[:2] == fingerprint(tmp_path / "plain", 8)[:2]
    plain, watched = losses_of(tmp_path / "plain"), losses_of(tmp_path / "run")
    assert [row[:2] for row in watched] == [row[:2] for row in plain]
    assert all(row[2] > 0 for row in watched) and all(row[2] is None for row in plain)
    assert listener.facts["teacher"].endswith("dense")
    flops = [read_rows(tmp_path / name)[-1]["train_flops"] for name in ("plain", "run")]
    assert flops[0] < flops[1] < 2 * flops[0], "the teacher runs forward"


def test_a_model_comes_closer_to_its_teacher(tmp_path, taught, listen):
    words = {"train__steps": 40, "train__context": 32, "distill__weight": 1.0, "method": "lowrank-adamw"}
    train(taught(**words, out=tmp_path / "run", rank__ratio=0.5), listen())
    rows = losses_of(tmp_path / "run")
    assert sum(row[2] for row in rows[-5:]) < 0.8 * sum(row[2] for row in rows[:5])


def test_the_teacher_itself_is_at_distance_zero(tmp_path, taught, teachers, listen):
    words = {"method": "dense-adamw", "init": teachers / "dense", "distill__weight": 1.0}
    train(taught(**words, out=tmp_path / "run"), listen())
    assert losses_of(tmp_path / "run")[0][2] < 1e-9


@pytest.mark.parametrize("method", ["spectron", "sct"])
def test_resumed_and_layer_by_layer_it_is_the_same_run(tmp_path, taught, teachers, listen, crash, fingerprint, method):
    common = {"method": method, "optim__clip": 0, "train__checkpoint_every": 2, "train__eval_every": 3}
    both = {"optim__layerwise": True, "train__recompute": "up"}
    plain, layerwise = tmp_path / "plain", tmp_path / "layerwise"
    train(taught(**common, out=plain), listen())
    with pytest.raises(crash):
        train(taught(**common, **both, out=layerwise), listen(crash_after=5))
    shutil.copytree(teachers / "dense", tmp_path / "moved")
    moved = {"distill__teacher": str(tmp_path / "moved")}
    train(taught(**common, **both, **moved, out=layerwise, resume="auto"), listen())
    assert losses_of(layerwise) == losses_of(plain)
    assert fingerprint(layerwise, 8) == fingerprint(plain, 8)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"distill__teacher": "other"}, "step-000008 learned from another teacher than distill.teacher holds now"),
        ({"distill__teacher": None}, "step-000008 learned from a teacher, and distill.teacher names none"),
        ({"distill__weight": 0.9}, "which differs in distill.weight"),
    ],
)
def test_a_run_keeps_its_teacher(tmp_path, taught, teachers, listen, changes, said):
    train(taught(out=tmp_path / "run"), listen())
    if changes.get("distill__teacher"):
        changes = {"distill__teacher": str(teachers / changes["distill__teacher"])}
    with pytest.raises(ValueError, match=said):
        train(taught(**changes, out=tmp_path / "run", resume="auto", train__steps=9), listen())


def test_a_branch_may_take_a_teacher(tmp_path, run_config, taught, listen):
    train(run_config(out=tmp_path / "plain", train__checkpoint_every=4), listen())
    start = tmp_path / "plain/checkpoints/step-000004"
    train(taught(out=tmp_path / "branch", resume=start), listen())
    assert [row[0] for row in losses_of(tmp_path / "branch")] == [5, 6, 7, 8]


def test_the_guard_looks_at_the_text_alone(tmp_path, taught, listen, monkeypatch):
    """A divergence that jumps is no spike; one that is no number shows in the gradient, and the step is left out."""
    real, calls = distill.divergences, []

    def planted(*args):
        calls.append(None)
        return real(*args) * {4: 1e4, 6: float("nan")}.get(len(calls), 1.0)

    monkeypatch.setattr(distill, "divergences", planted)
    train(taught(out=tmp_path / "run", guard__window=2, train__eval_every=0), listen())
    assert [(row["step"], row["event"]) for row in read_rows(tmp_path / "run") if "loss" in row and "event" in row] == [
        (6, "gradient_not_finite")
    ]


@pytest.mark.parametrize("method", ["spectron", "self-guided"])
def test_ranks_and_guides_change_as_without_a_teacher(tmp_path, taught, listen, method):
    words = {"method": method, "rank__value": 12, "train__eval_every": 0}
    if method == "spectron":
        words |= {"rank__adapt__threshold": 0.7, "rank__adapt__min": 2, "rank__adapt__multiple": 1}
        words |= {"rank__adapt__start": 0.2, "rank__adapt__every": 0.2}
    train(taught(**words, out=tmp_path / "run"), listen())
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows if row.get("distill_loss", 0) > 0] == list(range(1, 9))
    flops = [row["train_flops"] for row in rows if "loss" in row]
    assert flops[1] - flops[0] > flops[-1] - flops[-2], "smaller ranks, or a guide that is freed"


@pytest.mark.parametrize("family", ["gpt2", "factored"])
def test_any_folder_with_the_vocabulary_can_teach(tmp_path, taught, tiny_config, listen, family):
    if family == "gpt2":
        sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
        nr.save(materialize(skeleton(make_hf_config({"model_type": "gpt2", **sizes}, "test")), 0, 1.0), tmp_path / "t")
    else:
        model = drawn(tiny_config, 3)
        nr.factorize(model, method="sct", rank=4)
        nr.save(model, tmp_path / "t")
    masked = {"data__document_mask": family != "gpt2"}
    train(taught(**masked, out=tmp_path / "run", train__steps=2, distill__teacher=str(tmp_path / "t")), listen())
    assert all(row[2] > 0 for row in losses_of(tmp_path / "run"))


def test_what_cannot_teach_is_refused_in_one_line(tmp_path, cli, flags, teachers, write_hf_config, other_prepared):
    nr.save(drawn(write_hf_config(vocab_size=301), 0), tmp_path / "larger", "dense")
    nr.save(drawn(write_hf_config(max_position_embeddings=8), 0), tmp_path / "short", "dense")
    shutil.copytree(teachers / "dense", tmp_path / "tokenizer")
    shutil.copy(other_prepared / "tokenizer.json", tmp_path / "tokenizer")
    shutil.copytree(teachers / "dense", tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes(b"cut short")
    out = tmp_path / "run"
    cases = {
        "no such folder": {"distill__teacher": tmp_path / "nowhere"},
        "has a vocabulary of 301, the model one of 300": {"distill__teacher": tmp_path / "larger"},
        "exceeds the max_position_embeddings 8 of distill.teacher": {"distill__teacher": tmp_path / "short"},
        "has another tokenizer than the data": {"distill__teacher": tmp_path / "tokenizer"},
        "cut": {"distill__teacher": tmp_path / "cut"},
        "distill.weight has no meaning without --distill.teacher": {"distill__weight": 0.2},
        "distill.temperature must be > 0, got 0": {"distill__teacher": teachers / "dense", "distill__temperature": 0.0},
        "distill.temperature must be > 0, got -1": {"distill__teacher": teachers / "dense", "distill__temperature": -1},
        "distill.weight must be in [0, 1], got 1.5": {"distill__teacher": teachers / "dense", "distill__weight": 1.5},
        "which this run writes": {"distill__teacher": teachers / "dense", "out": teachers},
    }
    for said, changes in cases.items():
        result = cli("train", *flags(**{"out": out} | changes))
        assert result.code == 2 and result.err.count("\n") == 1 and said in result.err, (said, result.err)
        assert not out.exists()


def test_a_model_that_predicts_no_token_cannot_teach(tmp_path, taught, tiny_config, listen):
    from transformers import LlamaForSequenceClassification

    nr.save(LlamaForSequenceClassification(read_hf_config(tiny_config)), tmp_path / "t", "dense")
    with pytest.raises(ValueError, match="LlamaForSequenceClassification, which predicts no next token"):
        train(taught(out=tmp_path / "run", distill__teacher=str(tmp_path / "t")), listen())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, which its compiler raises and hides
def test_compiled_it_learns_the_same(tmp_path, taught, listen):
    for compiled in (False, True):
        train(taught(out=tmp_path / str(compiled), compile=compiled, train__steps=4), listen())
    for eager, other in zip(*(losses_of(tmp_path / name) for name in ("False", "True")), strict=True):
        assert other[1:3] == pytest.approx(eager[1:3], rel=1e-4)

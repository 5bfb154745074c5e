"""Under Hugging Face's Trainer: every method trains, clips, accumulates, follows its schedule and resumes."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import nativerank as nr
from nativerank.config import AdaptConfig
from nativerank.integrations.hf_trainer import NativerankCallback, check_arguments, check_ranks
from nativerank.methods import METHODS

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
ADAPT = {"threshold": 0.9, "min": 4, "start": 0.2, "every": 0.3, "until": 1.0}


class Ids(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def built(method, rank=12, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    if METHODS[method].layer:
        nr.factorize(model, method, rank=rank)
    if METHODS[method].guided:
        options.setdefault("guided_steps", 2)
    return model, nr.build_optimizer(model, method, **options)


def trainer_of(out, model, optimizer, steps=6, callbacks=(), **arguments):
    arguments = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 3, **arguments}
    args = TrainingArguments(str(out), max_steps=steps, use_cpu=True, report_to="none", disable_tqdm=True, **arguments)
    return Trainer(model, args, train_dataset=Ids(), optimizers=(optimizer, None), callbacks=list(callbacks))


def run(out, method, resume=None, callbacks=(), options=None, rank=12, **arguments):
    model, optimizer = built(method, rank, **(options or {}))
    trainer = trainer_of(out, model, optimizer, callbacks=callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return SimpleNamespace(trainer=trainer, model=model, optimizer=optimizer)


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def same(one, other):
    weights = [done.model.state_dict() for done in (one, other)]
    states = [done.optimizer.state_dict()["state"] for done in (one, other)]
    assert weights[0].keys() == weights[1].keys() and states[0].keys() == states[1].keys()
    return all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0]) and all(
        torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i]
    )


@pytest.mark.parametrize("method", METHODS)
def test_three_steps_are_those_of_a_plain_loop(tmp_path, method):
    """Two micro-batches a step, clipping, a cosine schedule: what Trainer does, written out."""
    settings = {"steps": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine"}
    done = run(tmp_path, method, save_strategy="no", **settings)
    assert len(losses(done.trainer)) == 3

    model, optimizer = built(method)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + torch.cos(torch.tensor(step / 3 * torch.pi, dtype=torch.float64)).item()) / 2
    )
    torch.manual_seed(done.trainer.args.seed)
    loader = iter(done.trainer.get_train_dataloader())
    for _ in range(3):
        for _ in range(2):
            (model(**next(loader)).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for (name, p), q in zip(done.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert [g["lr"] for g in done.optimizer.param_groups] == pytest.approx([0.0] * len(optimizer.param_groups))


@pytest.mark.parametrize(
    ("method", "options", "adapt"),
    [
        ("spectron", {}, {}),
        ("spectron", {}, ADAPT | {"threshold": 0.8}),
        ("stiefel-spectron", {}, {}),
        ("tsvd", {}, ADAPT),
        ("self-guided", {"guided_steps": 2}, {}),  # gone at the checkpoint
        ("self-guided", {"guided_steps": 5}, {}),  # half faded there
    ],
)
def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(tmp_path, method, options, adapt):
    whole = run(tmp_path, method, callbacks=[NativerankCallback(**adapt)], options=options)
    resumed = run(tmp_path, method, tmp_path / "checkpoint-3", callbacks=[NativerankCallback(**adapt)], options=options)
    assert same(whole, resumed)
    assert losses(whole.trainer)[3:] == losses(resumed.trainer)[3:]
    if adapt:
        at_three = [layer.rank for layer in factors(nr.load(tmp_path / "checkpoint-3"))]
        assert set(at_three) != {12} and any(layer.rank != 12 for layer in factors(resumed.model))


def factors(model):
    return [module for module in model.modules() if hasattr(module, "factors")]


def test_a_checkpoint_is_a_folder_that_nativerank_and_transformers_read(tmp_path):
    done = run(tmp_path, "sct", callbacks=[NativerankCallback(**ADAPT)])
    ids = torch.arange(12)[None]
    expected = done.model.eval()(ids).logits
    assert torch.equal(nr.load(tmp_path / "checkpoint-6")(ids).logits, expected)
    nr.register()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert torch.equal(again.eval()(ids).logits, expected)


def test_the_controller_is_kept_whether_trainer_makes_callbacks_anew_or_not(tmp_path):
    callback = NativerankCallback(seed=7, **ADAPT)
    whole = run(tmp_path, "sct", callbacks=[callback])
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["NativerankCallback"]
    assert kept["args"] == {"seed": 7, **ADAPT} and set(kept["attributes"]["ranks"]["initial"].values()) == {12}
    made_anew = run(
        tmp_path,
        "sct",
        tmp_path / "checkpoint-3",
        callbacks=[NativerankCallback(seed=7, **ADAPT)],
        restore_callback_states_from_checkpoint=True,
    )
    assert same(whole, made_anew)
    assert whole.trainer.state.global_step == made_anew.trainer.state.global_step == 6


def test_the_best_checkpoint_may_have_other_ranks_than_the_last(tmp_path):
    model, optimizer = built("sct")
    callback = NativerankCallback(**ADAPT | {"start": 0.5, "every": 1.0})  # one look, at step 3
    trainer = trainer_of(tmp_path, model, optimizer, callbacks=[callback], save_steps=2)
    trainer.train()
    last = [layer.rank for layer in factors(model)]
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    trainer._load_best_model()
    assert {layer.rank for layer in factors(model)} == {12} != set(last)
    model(torch.arange(16)[None]).logits.sum().backward()
    optimizer.step()  # its state followed


def test_what_cannot_be_is_one_clear_error(tmp_path):
    model, _ = built("spectron")
    with pytest.raises(ValueError, match=r"nr.build_optimizer\(model, ...\), None\)\) is needed here, found AdamW"):
        trainer_of(tmp_path, model, torch.optim.AdamW(model.parameters()), callbacks=[NativerankCallback()])
    with pytest.raises(ValueError, match=r"rank\.adapt\.threshold"):
        NativerankCallback(threshold=1.5)
    with pytest.raises(ValueError, match=r"max_grad_norm=0 and gradient_accumulation_steps=1, got 1.0 and 2"):
        layerwise = nr.build_optimizer(model, "spectron", layerwise=True)
        trainer_of(tmp_path, model, layerwise, callbacks=[NativerankCallback()], gradient_accumulation_steps=2).train()


def test_shapes_that_change_are_refused_on_several_processes():
    _, optimizer = built("spectron")
    two = SimpleNamespace(world_size=2, max_grad_norm=1.0, gradient_accumulation_steps=1)
    check_arguments(two, optimizer, AdaptConfig())
    with pytest.raises(ValueError, match=r"rank\.adapt changes parameters, which Trainer's 2 processes do not notice"):
        check_arguments(two, optimizer, AdaptConfig(mode="once", threshold=0.9))
    with pytest.raises(ValueError, match="self-guided changes parameters"):
        check_arguments(two, built("self-guided")[1], AdaptConfig())


def test_a_checkpoint_of_another_model_is_named():
    check_ranks({"a": 3}, {"a": 3})
    with pytest.raises(ValueError, match="the checkpoint has rank 3 in a, this model 4"):
        check_ranks({"a": 3}, {"a": 4})


def test_layerwise_updates_are_those_of_whole_steps(tmp_path):
    settings = {"max_grad_norm": 0.0, "save_strategy": "no", "steps": 3}
    whole = run(tmp_path, "spectron", **settings)
    parts = run(tmp_path, "spectron", options={"layerwise": True}, callbacks=[NativerankCallback()], **settings)
    assert same(whole, parts)


def test_a_loop_with_accelerate_alone_saves_and_resumes_too(tmp_path):
    def prepared():
        model, optimizer = built("self-guided", guided_steps=3)
        nr.follow_checkpoints(model, optimizer)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        return accelerator, *accelerator.prepare(model, optimizer), optimizer

    def train(accelerator, model, wrapped, batches):
        for ids in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                wrapped.step()
                wrapped.zero_grad()

    batches = Ids().ids[:48].reshape(12, 4, 16)
    *whole, optimizer = prepared()
    train(*whole, batches[:8])
    assert optimizer.guides.step == 4  # of eight micro-batches, and the guides are gone
    whole[0].save_state(tmp_path)
    train(*whole, batches[8:])
    *resumed, twin = prepared()
    resumed[0].load_state(tmp_path)
    train(*resumed, batches[8:])
    assert same(SimpleNamespace(model=whole[1], optimizer=optimizer), SimpleNamespace(model=resumed[1], optimizer=twin))

"""What happens in the middle of a run on many processes happens on all of them."""

import json
import os
import signal

import pytest

from nativerank.cli.main import main
from nativerank.train import loop, step


def command(rank, words, disturb=None):
    """The exit code and what was printed for people; `disturb(rank)` prepares the process."""
    if disturb is not None:
        disturb(rank)
    return main(words)


def told_to_stop(rank):
    """The last process gets a SIGTERM in its third step; the others hear of it from that one."""
    original, calls = loop.train_step, []

    def stopped(*args, **how):
        calls.append(0)
        if rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **how)

    loop.train_step = stopped


def told_at_the_end(rank):
    """One process gets a SIGINT in the validation at the end."""
    original = loop.Run._validate

    def validate(self, max_tokens, *rest):
        if max_tokens is None and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, max_tokens, *rest)

    loop.Run._validate = validate


def one_bad_gradient(rank):
    """In the fourth step the loss of one process is as good as ever, but its gradient is not a number."""
    original, calls = step.mean_loss, []

    def losses(*args, **options):
        calls.append(0)
        found = original(*args, **options)
        return found + (0 * found).sqrt() if rank == 1 and len(calls) == 4 else found

    step.mean_loss = losses


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def events(out):
    return [(row["event"], row["step"]) for row in rows(out) if "event" in row]


@pytest.mark.parametrize(
    ("disturb", "number", "mode"),
    [(told_to_stop, signal.SIGTERM, "fsdp"), (told_at_the_end, signal.SIGINT, "ddp")],
)
def test_a_signal_to_one_process_ends_all_after_the_same_step(launched, flags, tmp_path, disturb, number, mode):
    own = {"parallel__mode": mode, "train__checkpoint_every": 0, "resume": "auto"}
    words = ["train", "--quiet", *flags(**own, out=tmp_path / "run")]
    assert launched(command, 2, words, disturb) == [128 + number] * 2
    stopped = events(tmp_path / "run")[-1]
    assert stopped == ("interrupted", 8 if mode == "ddp" else 4)  # the vote is cast when a step begins
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{stopped[1]:06d}"]
    assert launched(command, 2, words) == [0, 0]
    assert events(tmp_path / "run")[-2:] == [("resume", stopped[1]), ("end", 8)]
    assert launched(command, 2, ["train", "--quiet", *flags(**own, out=tmp_path / "whole")]) == [0, 0]
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("run", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_gradient_that_is_bad_on_one_process_is_refused_by_all(launched, flags, tmp_path, mode):
    words = ["train", "--quiet", *flags(out=tmp_path / "run", parallel__mode=mode)]
    assert launched(command, 2, words, one_bad_gradient) == [0, 0]
    assert ("gradient_not_finite", 4) in events(tmp_path / "run")
    assert rows(tmp_path / "run")[-1]["refused_steps"] == 1


def test_divergence_is_told_once_and_ends_all(launched, flags, tmp_path, capfd):
    words = ["train", "--quiet", *flags(out=tmp_path / "run", method="lowrank-adamw", optim__lr=1e30)]
    assert launched(command, 2, words) == [3, 3]
    said = capfd.readouterr().err
    assert said.count("nativerank: error:") == 1 and "lower --optim.lr" in said

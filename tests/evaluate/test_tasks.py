"""lm-evaluation-harness: our numbers are its numbers, and factors score as their merged dense export driven by it."""

import json
import random
import sys
from functools import cache

import pytest
import torch

import nativerank as nr
from nativerank.data.tokenizer import load_tokenizer
from nativerank.evaluate.cloze import cloze, read_questions
from nativerank.evaluate.tasks import (
    GROUPS,
    away,
    check_known,
    evaluate_tasks,
    expanded,
    named,
    open_tasks,
    unreadable,
)
from nativerank.evaluate.text import Reader, Windows, metrics, open_text, text_loss
from nativerank.models import make_hf_config, materialize, skeleton

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
WORDS = "the of low rank matrix model learns caf\u00e9 from text while every token \u2014 is read once descent".split()
CLOZE = """task: ours_cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
metadata: {{version: 1.0}}
"""
TEXT = """task: ours_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with a text, 40 questions of 4 choices, and a YAML file for each."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def some(least, most):
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    questions = [
        {"query": some(2, 16) + " " * (i % 3), "choices": [some(1, 6) for _ in range(4)], "answer": i % 4}
        for i in range(40)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    text = "\n\n".join(some(40, 60) for _ in range(7)) + "\n"
    (folder / "t.txt").write_text(text, encoding="utf-8")
    (folder / "t.jsonl").write_text(json.dumps({"page": text}) + "\n")
    (folder / "ours_cloze.yaml").write_text(CLOZE.format(file=folder / "q.jsonl"))
    (folder / "ours_text.yaml").write_text(TEXT.format(file=folder / "t.jsonl"))
    return folder


@pytest.fixture
def model():
    model = skeleton(make_hf_config({"model_type": "llama", **SIZES}, "test"))
    nr.factorize(model, method="spectron", rank_ratio=0.5)
    model = materialize(model, 0, 2.0).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # opinions strong enough that length alone does not decide
    return model


def plain(scores):
    return {(task, metric): value for task, score in scores.items() for metric, value in score.values.items()}


@pytest.fixture
def quick_harness(monkeypatch):
    """The harness reads its thousands of YAML files once, and does not list what is installed after each evaluation."""
    tasks = pytest.importorskip("lm_eval.tasks")
    read = cache(tasks.TaskManager)

    def manager(include_path=None, include_defaults=True):
        folders = (include_path,) if isinstance(include_path, str) else tuple(include_path or ())
        return read(include_path=folders, include_defaults=include_defaults)

    monkeypatch.setattr(tasks, "TaskManager", manager)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_ours_and_the_harness_on_factors_and_on_the_dense_export_agree(
    local, model, prepared, tmp_path, monkeypatch, quick_harness
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    nr.save(model, tmp_path / "dense", format="dense", tokenizer=load_tokenizer(prepared))
    hf = AutoTokenizer.from_pretrained(tmp_path / "dense")
    tasks = open_tasks(["ours_cloze", "ours_text"], [str(local)])
    factors = evaluate_tasks(model, hf, tasks)

    # The harness alone, by the path of the merged dense export.
    lm = HFLM(pretrained=str(tmp_path / "dense"), device="cpu", dtype="float32", batch_size=3)
    manager = TaskManager(include_path=str(local), include_defaults=False)
    direct = simple_evaluate(lm, tasks=list(tasks.names), task_manager=manager, bootstrap_iters=0)["results"]
    expected = {
        (task, key.removesuffix(",none")): value
        for task, row in direct.items()
        for key, value in row.items()
        if key.endswith(",none") and "_stderr" not in key
    }
    assert len(expected) == 6 and plain(factors) == pytest.approx(expected, rel=1e-6)

    # Our own evaluators, on the same files.
    reader = Reader(model, load_tokenizer(prepared), hf.bos_token_id, "ours")
    own = cloze(reader, read_questions(local / "q.jsonl"))
    assert own.values == factors["ours_cloze"].values
    assert own.stderrs == pytest.approx(factors["ours_cloze"].stderrs)
    assert own.n == factors["ours_cloze"].n == 40 and factors["ours_cloze"].version == "1.0"
    assert len(set(own.values.values())) > 1, "a file on which the three do not agree"
    with open_text(local / "t.txt", reader) as text:
        found = metrics(text_loss(reader, text, Windows(context=64)), text.words, text.split.tokens - 1)
    theirs = factors["ours_text"].values
    assert found["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-6)
    assert found["word_perplexity"] == pytest.approx(theirs["word_perplexity"], rel=1e-5)

    # A part of the questions; data that cannot be had.
    said = []
    assert {score.n for score in evaluate_tasks(model, hf, tasks, limit=7, complain=said.append).values()} == {7, 1}
    assert said == ["ours_cloze: prompts longer than the 64 tokens of the model lost their beginning"]
    with pytest.raises(ValueError, match="cannot evaluate task ours_cloze with the model's 2 tokens: AssertionError"):
        evaluate_tasks(model, hf, tasks, limit=7, context=2)
    with pytest.raises(ValueError, match=r"cannot load task hellaswag: .*huggingface\.co"):
        open_tasks(["spectron"], [str(local)])


def test_a_group_is_its_members_each_once():
    assert expanded(["piqa", "spectron", "mine"]) == ["piqa", "hellaswag", "arc_easy", "mine"]
    assert GROUPS["spectron"] == ("hellaswag", "piqa", "arc_easy")


def test_a_name_that_is_no_task_is_refused(tmp_path):
    check_known(["piqa"], ["piqa"])
    with pytest.raises(ValueError, match="unknown task 'spectrn'; did you mean spectron"):
        check_known(["spectrn"], ["piqa"])
    with pytest.raises(ValueError, match="unknown task 'my_tsk'; did you mean my_task"):
        check_known(["my_tsk"], ["piqa", "my_tsks"], own=["my_task"])
    with pytest.raises(ValueError, match=r"unknown task 'nope' \("):
        check_known(["nope"], ["nopea_x", "copa", "piqa"])
    with pytest.raises(ValueError, match=r"unknown task 'ours_clze'; did you mean ours_cloze\?.*--include_path DIR"):
        check_known(["ours_clze"], ["piqa", "ours_cloze"])
    with pytest.raises(ValueError, match=r"--tasks .*mine\.yaml: no such file"):
        check_known([str(tmp_path / "mine.yaml")], ["piqa"])
    with pytest.raises(ValueError, match=r"--include_path .*nowhere: no such folder"):
        open_tasks(["piqa"], [str(tmp_path / "nowhere")])


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"^--tasks needs the extra `eval`: pip install 'nativerank\[eval\]'$"):
        open_tasks(["piqa"], [])


@pytest.mark.parametrize("kind", [AssertionError(""), IndexError("list index out of range")])
def test_what_the_harness_raises_on_a_task_is_one_line_that_names_it(kind):
    with (
        pytest.raises(ValueError, match=r"^cannot evaluate task mine with the model's 64 tokens: [AI]"),
        named("mine", 64),
    ):
        raise kind
    with pytest.raises(MemoryError), named("mine", 64):
        raise MemoryError


def test_only_data_that_are_elsewhere_are_said_to_be():
    assert away(ConnectionError("no network")) and not away(FileNotFoundError("q.jsonl"))
    try:
        raise ValueError("no data") from ConnectionError("no network")
    except ValueError as error:
        assert away(error)


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "ok.yaml").write_text("task: a\nf: !function x.y\n")
    assert unreadable([str(tmp_path)]) is None
    (tmp_path / "bad.yaml").write_text("task: [\n")
    with pytest.raises(ValueError, match=r"unknown task 'mine' \(.*bad\.yaml cannot be read: "):
        check_known(["mine"], ["piqa"], include=[str(tmp_path)])
    with pytest.raises(ValueError, match=r"--include_path .*bad\.yaml is a file; give its folder, or --tasks "):
        open_tasks(["mine"], [str(tmp_path / "bad.yaml")])

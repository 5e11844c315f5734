"""`qkernels eval` against a second model, and on tasks of lm_eval."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import TEXT, assert_refused, invoke

from qkernels.finetune.models import load_model, load_tokenizer

pytest.importorskip("transformers")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_eval_against_another_model(llama, text):
    options = ("--scheme", "w4a8-g32", "--seq-len", 16, "--eval-blocks", 4, "--dtype", "float32", "--json")
    alone = json.loads(invoke("eval", llama, text, *options).stdout)
    result = invoke("eval", llama, text, *options, "--against", llama)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert found["kl"]["mean"] > 0 and found["tokens"] == alone["tokens"] == 60
    text_result = invoke("eval", llama, text, *options[:-1], "--against", llama)
    assert f"KL divergence from {llama}: mean {found['kl']['mean']:.3g}" in text_result.stdout


def test_tasks_without_lm_eval_say_how_to_install_it(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert_refused(invoke("eval", llama, "--tasks", "arc_easy"), "pip install 'lm_eval[hf]'")
    assert_refused(invoke("eval", llama), "text files", "--tasks")


def test_tasks_of_a_folder(llama, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    questions = [
        {"question": f"the quick brown {word}", "choices": ["fox", "dog"], "answer": at % 2}
        for at, word in enumerate(("fox", "dog", "lazy", "jumps"))
    ]
    (tmp_path / "animals.json").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "animals.yaml").write_text(
        f"task: animals\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/animals.json}}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    options = ("--tasks", "animals", "--task-folder", tmp_path, "--dtype", "float32")
    result = invoke("eval", llama, *options, "--scheme", "w8a8", "--against", llama, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (score,), (reference,) = found["tasks"], found["tasks_against"]
    assert (score["task"], score["metric"], score["samples"]) == ("animals", "acc", 4)
    assert score["higher_is_better"]
    model, tokenizer = load_model(llama, torch.float32), load_tokenizer(llama)
    right = 0
    for item in questions:
        start = tokenizer(item["question"]).input_ids
        losses = []
        for choice in item["choices"]:
            ids = torch.tensor(tokenizer(f"{item['question']} {choice}").input_ids)
            logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            losses.append(float(logs.detach()[:-1].gather(-1, ids[1:, None])[len(start) - 1 :].sum()))
        right += (losses[1] > losses[0]) == item["answer"]
    assert reference["value"] == right / 4
    limited = invoke("eval", llama, *options, "--limit", 2)
    assert limited.exit_code == 0 and "animals" in limited.stdout
    assert_refused(invoke("eval", llama, "--tasks", "no_such_task"), "no_such_task")
    assert_refused(invoke("eval", llama, "--tasks", "x", "--task-folder", tmp_path / "none"), "not a folder")

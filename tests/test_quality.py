"""`benchmarks/quality.py`: a run leaves a row and is not repeated, and the part of the loss recovered by hand."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "quality.py"
if not SCRIPT.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
for package in ("transformers", "peft", "matplotlib", "psutil"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    module = sys.modules["quality"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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

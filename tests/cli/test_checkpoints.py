"""`convert`, `inspect`, `quantize` and `merge` on tiny models: results, files, and one clear line for bad input."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import assert_refused, invoke

import qkernels as qk

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, llama):
    """A folder of ours, with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints") / "ours"
    model = qk.load(llama)
    qk.quantize_(model, "w4a16-g32-asym", skip=["lm_head"])  # whose 300 rows GPTQ has no place for
    qk.export(model, folder, "qkernels", like=llama)
    return folder


def outputs(path) -> torch.Tensor:
    with torch.no_grad():
        return qk.load(path)(torch.arange(12)[None]).logits


def as_json(result) -> dict:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


class TestConvert:
    def test_there_and_back_is_the_same_model(self, quantized, tmp_path):
        result = as_json(
            invoke("convert", quantized, tmp_path / "gptq", "--to", "gptq", "--on-loss", "report", "--json")
        )
        assert result["from"] == "qkernels" and result["schemes"] == {"w4a16-g32-asym": result["layers"]}
        (lost,) = result["lost"]
        assert lost["what"] == "scales that float16 cannot hold" and 0 < lost["largest"] < 2**-11
        done = invoke("convert", tmp_path / "gptq", tmp_path / "again", "--to", "qkernels")
        assert done.exit_code == 0 and "lost: nothing, every value is the same" in done.stdout
        assert done.stdout.splitlines()[-1].startswith("next: qkernels generate ")
        assert max(map(len, done.stdout.splitlines())) <= 200
        assert torch.equal(outputs(tmp_path / "again"), outputs(tmp_path / "gptq"))
        assert (tmp_path / "again" / "tokenizer.json").exists()

    def test_another_scheme(self, quantized, tmp_path):
        arguments = ("convert", quantized, tmp_path / "out", "--to", "qkernels", "--scheme", "w8a8")
        assert_refused(invoke(*arguments), "does not keep its integers as w8a16", "give --on-loss requantize")
        assert not (tmp_path / "out").exists()
        result = as_json(invoke(*arguments, "--on-loss", "requantize", "--json"))
        assert [*result["schemes"]] == ["w8a8"] and result["lost"][0]["tensors"] == result["layers"]

    def test_bad_input_is_one_line(self, quantized, llama, tmp_path):
        out = tmp_path / "out"
        assert_refused(invoke("convert", tmp_path / "nothing", out, "--to", "gptq"), "no such file or folder")
        assert_refused(invoke("convert", quantized, out, "--to", "gptk"), "format must be one of", "'gptk'")
        assert_refused(invoke("convert", quantized, out, "--to", "gptq"), "give --on-loss report to accept that")
        assert_refused(invoke("convert", quantized, llama, "--to", "float"), "is there already")
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        assert_refused(invoke("convert", tmp_path / "adapter", out, "--to", "float"), "is an adapter: qkernels merge")
        assert not out.exists()


class TestInspect:
    def test_json_says_what_is_in_it(self, quantized):
        found = as_json(invoke("inspect", quantized, "--json"))
        (kind,) = found["kinds"]
        assert found["format"] == "qkernels" and found["model"] == "LlamaForCausalLM" and found["lost"] == []
        assert kind["scheme"] == "w4a16-g32-asym" and kind["kernel"] and kind["reason"]
        assert kind["layers"] == sum(hasattr(layer, "scheme") for layer in qk.load(quantized).modules())
        assert found["exports"]["gptq"] == "" and found["exports"]["qkernels"] == ""
        assert found["floats"]["float32"]["tensors"] > 0

    def test_text_fits_a_terminal(self, quantized, llama, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        for path, words in ((quantized, "w4a16-g32-asym: "), (llama, "no quantized layer")):
            result = invoke("inspect", path)
            assert result.exit_code == 0 and words in result.stdout
            assert all(
                len(line) <= 80 or " " not in line.strip() for line in result.stdout.splitlines() if "/" not in line
            )
            assert result.stdout.splitlines()[-1].strip()

    def test_bad_input_is_one_line(self, tmp_path):
        assert_refused(invoke("inspect", tmp_path), "has no known format")
        (tmp_path / "model.safetensors").write_bytes(b"no")
        assert_refused(invoke("inspect", tmp_path), "safetensors")

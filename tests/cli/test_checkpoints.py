"""`convert`, `inspect`, `quantize` and `merge` on tiny models: results, files, and one clear line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import TEXT, assert_refused, invoke

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
    def test_what_has_to_be_requantized_is_inspected_all_the_same(self):
        folder = Path(__file__).parents[1] / "checkpoints" / "files" / "hqq"
        found = as_json(invoke("inspect", folder, "--json"))
        assert [line.split(":")[0] for line in found["lost"]] == ["l.0.outputs"] and len(found["kinds"]) == 7

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
        done = invoke("convert", tmp_path / "out", tmp_path / "gptq", "--to", "gptq", "--on-loss", "report")
        assert done.exit_code == 0
        assert f"GPTQ says nothing of int8 activations, which {result['layers']} layers have" in done.stderr

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


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, llama):
    """An adapter that changes what the model says."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    peft.get_peft_model(qk.load(llama), config).save_pretrained(folder)
    return folder


class TestQuantize:
    def test_plain_and_calibrated(self, llama, tmp_path):
        result = as_json(invoke("quantize", llama, "--out", tmp_path / "plain", "--json"))
        found = qk.load(tmp_path / "plain")
        assert result["quantization"]["scheme"] == "w8a8" and result["bytes"] > 0
        assert found.lm_head.scheme.name == found.model.embed_tokens.scheme.name == "w8a8"
        assert (tmp_path / "plain" / "tokenizer.json").exists()
        (tmp_path / "text.txt").write_text(TEXT)
        done = invoke(
            "quantize", llama, "--scheme", "w4a8s-g32", "--calibrate", tmp_path / "text.txt", "--seq-len", 16,
            "--out", tmp_path / "static",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines()[-1].startswith("next: qkernels generate ")
        assert qk.load(tmp_path / "static").model.layers[0].mlp.up_proj.x_scale.item() != 1

    def test_bad_input_is_one_line(self, llama, tmp_path):
        out = tmp_path / "out"
        assert_refused(invoke("quantize", llama, "--out", out, "--scheme", "w4a8s"), "give --calibrate FILE")
        assert_refused(invoke("quantize", llama, "--out", out, "--scheme", "none"), "quantizes nothing")
        assert_refused(invoke("quantize", llama, "--out", out, "--scheme", "w3a8"), "did you mean")
        assert_refused(invoke("quantize", llama, "--out", out, "--calibrate", tmp_path / "no.txt"), "w4 schemes")
        assert_refused(invoke("quantize", llama, "--out", llama), "is there already")
        assert not out.exists()


class TestMerge:
    def test_each_target_says_what_it_lost(self, llama, adapter, tmp_path):
        targets = ("f32", "w8a8", "w4a16-g32", "gptq@w4a16-g32")
        given = [part for target in targets for part in ("--to", target)]
        result = as_json(
            invoke("merge", llama, "--adapter", adapter, *given, "--out", tmp_path / "out", "--seq-len", 32,
                   "--tokens", 64, "--dtype", "float32", "--json")
        )  # fmt: skip
        rows = {row["target"]: row for row in result["written"]}
        assert [*rows] == [*targets]
        lost = {name: row["merged"]["kl"]["mean"] for name, row in rows.items()}
        assert lost["f32"] < 1e-9 < lost["w8a8"] < lost["w4a16-g32"]
        assert [tensor["what"] for tensor in rows["gptq@w4a16-g32"]["lost"]]
        assert not rows["w8a8"]["lost"] and rows["f32"]["scheme"] is None
        adapted = qk.load(llama)
        adapted.load_adapter(str(adapter))
        with torch.no_grad():
            expected = adapted(torch.arange(12)[None]).logits
        torch.testing.assert_close(outputs(tmp_path / "out" / "f32"), expected, rtol=1e-4, atol=1e-5)
        assert schemes(tmp_path / "out" / "gptq-w4a16-g32") == {"w4a16-g32"}

    def test_one_target_in_words(self, quantized, adapter, tmp_path):
        result = invoke(
            "merge", quantized, "--adapter", adapter, "--to", "qkernels", "--out", tmp_path / "out", "--seq-len", 32,
            "--tokens", 64,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "adapter kept" in result.stdout and "perplexity of B" in result.stdout
        assert result.stdout.splitlines()[-1].startswith("next: qkernels generate ")
        assert "w4a16-g32-asym" in schemes(tmp_path / "out")  # of the base

    def test_bad_input_is_one_line(self, llama, adapter, tmp_path):
        def refused(*words: str, to: str = "f32", adapter=adapter, out=tmp_path / "out") -> None:
            assert_refused(invoke("merge", llama, "--adapter", adapter, "--to", to, "--out", out), *words)

        refused("must be a folder with an adapter_config.json", adapter=tmp_path)
        refused("--to must be f32, bf16, f16, a scheme such as w8a8, or a format", to="w9a9")
        refused("needs a scheme, for the base is in float: give --to gptq@w4a16-g128", to="gptq")
        refused("is there already", out=llama)
        assert not (tmp_path / "out").exists()


def schemes(path) -> set[str]:
    return {layer.scheme.name for layer in qk.load(path).modules() if hasattr(layer, "scheme")}


class TestOtherCommands:
    """`eval`, `generate` and `finetune` on the integers of another library's checkpoint."""

    def test_eval_and_generate(self, quantized, tmp_path):
        qk.export(qk.load(quantized), tmp_path / "gptq", "gptq", like=quantized, on_loss="report")
        (tmp_path / "text.txt").write_text(TEXT)
        common = (tmp_path / "gptq", tmp_path / "text.txt", "--seq-len", 16, "--dtype", "float32", "--json")
        stored, floats = as_json(invoke("eval", *common)), as_json(invoke("eval", *common, "--scheme", "none"))
        assert (stored["scheme"], floats["scheme"]) == ("w4a16-g32-asym", "none")
        assert stored["perplexity"] == pytest.approx(floats["perplexity"], rel=1e-4)
        assert_refused(invoke("eval", *common, "--scheme", "w8a8"), "is quantized already (w4a16-g32-asym)")
        assert invoke("generate", tmp_path / "gptq", "--prompt", "a", "--max-new-tokens", 2).exit_code == 0

    def test_finetune_keeps_the_integers(self, quantized, tmp_path):
        (tmp_path / "text.txt").write_text(TEXT)
        arguments = (
            "finetune", quantized, "--text", tmp_path / "text.txt", "--steps", 2, "--seq-len", 16, "--lora-rank", 2,
            "--dtype", "float32",
        )  # fmt: skip
        done = invoke(*arguments, "--output", tmp_path / "run")
        assert done.exit_code == 0, done.output
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        assert report["settings"]["scheme"] == "w4a16-g32-asym" and set(report["perplexity"]) == {
            "quantized",
            "finetuned",
        }
        assert_refused(invoke(*arguments, "--output", tmp_path / "other", "--scheme", "w8a8"), "is quantized already")

"""`qkernels compare` on tiny models with random weights: results, files, and one clear line for bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TEXT, assert_refused, invoke

from qkernels import quantize_
from qkernels.checkpoints.losses import Losses
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.finetune.models import load_model

pytest.importorskip("transformers")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_model_with_its_quantization(llama, text, tmp_path):
    output = tmp_path / "compared"
    options = ("--text", text, "--scheme", "w4a8-g32", "--seq-len", 16, "--dtype", "float32")
    result = invoke("compare", llama, *options, "--tokens", 64, "--output", output)
    assert result.exit_code == 0, result.output
    assert all(
        len(line) <= 80 for line in result.stdout.splitlines() if not line.startswith(("A =", "written", "next"))
    )
    assert "KL divergence" in result.stdout and "perplexity of B" in result.stdout and "w4a8-g32" in result.stdout
    found = json.loads((output / "comparison.json").read_text())
    assert found["tokens"] == 4 * 15 and found["kl"]["mean"] > 0 and 0 <= found["top_1_agreement"] <= 1
    assert len(found["layers"]) == 2 * 7 + 2
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    saved = load_model(llama, torch.float32)
    quantize_(saved, "w4a8-g32")
    folder = shutil.copytree(llama, tmp_path / "saved")
    saved.save_pretrained(folder)
    plot = tmp_path / "one.svg"
    again = invoke(
        "compare", llama, folder, "--text", text, "--seq-len", 16, "--dtype", "float32", "--json", "--plot", plot
    )
    assert again.exit_code == 0 and "<svg" in plot.read_text()
    assert json.loads(again.stdout)["scheme"] == "w4a8-g32" and json.loads(again.stdout)["tokens"] > 60


def test_a_folder_of_another_library(llama, text, tmp_path):
    model = load_model(llama, torch.float32)
    quantize_(model, "w8a8", skip=["lm_head"])
    model.save_pretrained(tmp_path / "ours")
    target, _ = parse_target("compressed-tensors")
    target.write(open_checkpoint(tmp_path / "ours"), tmp_path / "theirs", Losses())
    for file in llama.glob("tokenizer*"):
        for name in ("ours", "theirs"):
            shutil.copy(file, tmp_path / name)
    options = ("--text", text, "--seq-len", 16, "--tokens", 64, "--dtype", "float32", "--json")
    result = invoke("compare", tmp_path / "ours", tmp_path / "theirs", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kl"]["mean"] == 0 and found["top_1_agreement"] == 1 and found["scheme"] == "w8a8"
    assert {row["a"] for row in found["layers"]} == {row["b"] for row in found["layers"]}


def test_merged_model_beside_base_and_adapter(llama, text, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(load_model(llama, torch.float32), config)
    model.save_pretrained(tmp_path / "adapter")
    folder = shutil.copytree(llama, tmp_path / "merged")
    model.merge_and_unload().save_pretrained(folder)
    options = ("--text", text, "--seq-len", 16, "--tokens", 64, "--dtype", "float32", "--no-layers")
    adapter = ("--adapter", tmp_path / "adapter")
    result = invoke("compare", llama, folder, *options, *adapter)
    assert result.exit_code == 0, result.output
    assert "100 ± 0 %" in result.stdout
    assert f"next: qkernels compare {llama} {folder} --text {text} --adapter" in result.stdout
    result = invoke("compare", llama, llama, *options, *adapter, "--json")
    found = json.loads(result.stdout)
    assert found["kept"]["share"] == 0 and found["merged"]["tokens"] == 60


def test_one_at_a_time_has_the_same_result(llama, text, tmp_path):
    options = ("--text", text, "--scheme", "w8a8", "--seq-len", 16, "--tokens", 64, "--dtype", "float32", "--json")
    both, one = (
        json.loads(invoke("compare", llama, *options, how).stdout) for how in ("--no-layers", "--one-at-a-time")
    )
    assert both == one and one["kl"]["mean"] > 0 and one["layers"] == []
    refused = invoke("compare", llama, llama, *options, "--one-at-a-time", "--adapter", tmp_path)
    assert_refused(refused, "--one-at-a-time", "--adapter")


def test_refused(llama, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the quick brown fox")
    assert_refused(invoke("compare", llama, "--text", text), "second model", "--scheme")
    assert_refused(invoke("compare", llama, llama, "--text", short), "shorter than --seq-len 256")
    assert_refused(invoke("compare", llama, llama, "--text", text, "--seq-len", 128), "too long", "64")
    assert_refused(invoke("compare", llama, tmp_path / "none", "--text", text), "does not exist")
    other = shutil.copytree(llama, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["q"], vocabulary["u"] = vocabulary["u"], vocabulary["q"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    refused = invoke("compare", llama, other, "--text", text, "--seq-len", 16)
    assert_refused(refused, "tokenizers differ", "'q'", "'u'")
    larger = load_model(llama, torch.float32)
    larger.resize_token_embeddings(310)
    folder = shutil.copytree(llama, tmp_path / "larger")
    larger.save_pretrained(folder)
    refused = invoke("compare", llama, folder, "--text", text, "--seq-len", 16, "--no-layers")
    assert_refused(refused, "vocabularies differ", "300", "310")


def test_a_name_in_a_file_does_not_command_the_terminal(tmp_path):
    path = tmp_path / "hostile.gguf"
    name = b"\x1b]0;gone\x07\n"
    path.write_bytes(
        b"GGUF"
        + (3).to_bytes(4, "little")
        + bytes(8)
        + (1).to_bytes(8, "little")
        + len(name).to_bytes(8, "little")
        + name
        + (99).to_bytes(4, "little")
    )
    result = invoke("inspect", path)
    assert_refused(result, "hostile.gguf", "gone")
    assert "\x1b" not in result.stderr and result.stderr.count("\n") == 1

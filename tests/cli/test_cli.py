"""The console script on tiny models with random weights: results, files, and one clear line for bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TEXT, assert_refused, invoke, layer_kinds

from qkernels import __version__, quantize_
from qkernels.finetune import InputError, read_texts, token_blocks
from qkernels.finetune.models import load_model, load_tokenizer, model_bytes, resolve_model
from qkernels.finetune.text import split_blocks
from qkernels.kernels import isa

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small lose time by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tokenizer_folder) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    shutil.copytree(tokenizer_folder, folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def small_run(model: Path, text: Path, output: Path, *more: object):
    return invoke(
        "finetune", model, "--text", text, "--output", output, "--steps", 3, "--seq-len", 16, "--batch-size", 2,
        "--lora-rank", 2, "--dtype", "float32", *more,
    )  # fmt: skip


class TestInfo:
    def test_json_names_the_isa_and_why(self):
        result = invoke("info", "--json")
        assert result.exit_code == 0, result.output
        facts = json.loads(result.stdout)
        assert facts["qkernels"] == __version__
        assert facts["isa"] == isa.current()
        assert facts["isa"] in facts["isa_reason"]
        assert facts["isas_supported"] == list(isa.supported())
        assert facts["packages"]["torch"] == torch.__version__
        assert facts["threads"] == torch.get_num_threads()
        assert facts["gpu"]["kernels"]["reason"]

    def test_table(self):
        result = invoke("info")
        assert result.exit_code == 0
        assert isa.current() in result.stdout

    def test_environment_forces_the_isa(self):
        facts = json.loads(self.run_module("scalar").stdout)
        assert facts["isa"] == "scalar"
        assert "QKERNELS_ISA" in facts["isa_reason"]

    def test_needs_no_optional_package(self):
        code = (
            "import sys\n"
            "for name in ('transformers', 'peft', 'accelerate', 'matplotlib', 'psutil', 'tqdm', 'gguf', 'triton'):\n"
            "    sys.modules[name] = None\n"
            "from qkernels.cli import main\n"
            "sys.argv[1:] = ['info']\n"
            "main()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "qkernels[triton]" in done.stdout

    def test_version(self):
        assert invoke("--version").stdout == f"qkernels {__version__}\n"

    def test_unknown_isa_is_one_line(self):
        done = self.run_module("sse9")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and "sse9" in done.stderr and done.stderr.count("\n") == 1

    @staticmethod
    def run_module(name: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "qkernels", "info", "--json"],
            env=os.environ | {"QKERNELS_ISA": name},
            capture_output=True,
            text=True,
        )


class TestFinetune:
    def test_lora_writes_adapter_and_reports(self, llama, text, tmp_path):
        output = tmp_path / "run"
        result = small_run(llama, text, output, "--scheme", "w8a8", "--lr", 0.01)
        assert result.exit_code == 0, result.output
        report = json.loads((output / "report.json").read_text())
        assert set(report["perplexity"]) == {"float", "quantized", "finetuned"}
        assert report["perplexity"]["quantized"] == pytest.approx(report["perplexity"]["float"], rel=0.1)
        assert report["perplexity"]["finetuned"] < report["perplexity"]["float"]
        assert len(report["losses"]) == len(report["seconds"]) == 3
        assert report["seconds_per_step"] > 0 and report["peak_memory_bytes"] > 0
        assert report["model"]["bytes"] < report["model"]["float_bytes"]
        assert report["quantization"]["scheme"] == "w8a8" and report["fused_loss"]
        assert report["environment"]["isa"] == isa.current()
        assert "| ... fine-tuned |" in (output / "report.md").read_text()
        assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert (output / "adapter_model.safetensors").is_file()

    def test_loss_of_a_model_that_scales_its_logits(self, llama, text, tmp_path, monkeypatch):
        def refuse(model):
            raise ValueError("scaled logits")

        monkeypatch.setattr("qkernels.finetune.train.patch_loss", refuse)
        result = small_run(llama, text, tmp_path / "own", "--scheme", "w8a8")
        assert result.exit_code == 0 and "the model's own loss is used: scaled logits" in result.output
        assert not json.loads((tmp_path / "own" / "report.json").read_text())["fused_loss"]
        asked = small_run(llama, text, tmp_path / "asked", "--scheme", "w8a8", "--fused-loss")
        assert_refused(asked, "--fused-loss does not fit this model: scaled logits")

    def test_same_seed_gives_the_same_losses(self, llama, text, tmp_path):
        losses = []
        for seed in (1, 1, 2):
            assert small_run(llama, text, tmp_path / "run", "--seed", seed, "--eval-blocks", 0).exit_code == 0
            losses.append(json.loads((tmp_path / "run" / "report.json").read_text())["losses"])
        assert losses[0] == losses[1] != losses[2]

    def test_gpt2_with_held_out_text_in_bfloat16(self, gpt2, text, tmp_path):
        output = tmp_path / "run"
        result = invoke(
            "finetune", gpt2, "--text", text, "--eval-text", text, "--output", output, "--scheme", "w4a8-g32-asym",
            "--steps", 2, "--seq-len", 16, "--dtype", "bfloat16", "--schedule", "cosine", "--no-baseline",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        report = json.loads((output / "report.json").read_text())
        assert report["dtype"] == "bfloat16"
        assert set(report["perplexity"]) == {"quantized", "finetuned"}
        schemes = {row["name"]: row["scheme"] for row in report["quantization"]["rows"]}
        assert schemes.pop("lm_head") == schemes.pop("transformer.wte") == schemes.pop("transformer.wpe") == "w8a8"
        assert set(schemes.values()) == {"w4a8-g32-asym"}

    def test_calibrated_base_is_saved_with_its_adapter(self, llama, text, tmp_path):
        output = tmp_path / "run"
        held_out = ("--eval-text", text, "--eval-blocks", 4, "--smooth")
        result = small_run(llama, text, output, "--scheme", "w4a8-g32-asym", "--calibration-blocks", 3, *held_out)
        assert result.exit_code == 0, result.output
        expected = json.loads((output / "report.json").read_text())["perplexity"]["finetuned"]
        again = invoke(
            "eval", output / "base", text, "--adapter", output, "--seq-len", 16, "--eval-blocks", 4,
            "--dtype", "float32", "--json",
        )  # fmt: skip
        assert again.exit_code == 0, again.output
        assert json.loads(again.stdout)["perplexity"] == pytest.approx(expected, rel=1e-6)
        refused = small_run(llama, text, tmp_path / "other", "--scheme", "w8a16", "--calibration-blocks", 3)
        assert_refused(refused, "--calibration-blocks", "w4", "w8a16")
        refused = small_run(llama, text, tmp_path / "other", "--scheme", "w8a8", "--calibration-blocks", 3)
        assert_refused(refused, "--calibration-blocks", "w8a8", "worse on any other", "--smooth")
        refused = small_run(llama, text, tmp_path / "other", "--scheme", "w4a16-g32", "--smooth")
        assert_refused(refused, "--smooth", "a8", "w4a16-g32")

    def test_full_writes_a_model_that_loads(self, llama, text, tmp_path):
        output = tmp_path / "run"
        result = small_run(llama, text, output, "--scheme", "none", "--method", "full", "--schedule", "constant")
        assert result.exit_code == 0, result.output
        again = invoke("eval", output, text, "--seq-len", 16, "--dtype", "float32", "--json")
        assert again.exit_code == 0, again.output
        assert json.loads(again.stdout)["perplexity"] > 1

    @pytest.mark.parametrize(
        ("scheme", "mode", "grad"), [kind for kind in layer_kinds("w8a8", "w4a8-g32") if kind[1] != "frozen"]
    )
    def test_weights_of_quantized_layers_are_trained(self, llama, text, tmp_path, scheme, mode, grad):
        options = ("--method", "full", "--scheme", scheme, "--mode", mode, "--grad-dtype", grad)
        result = small_run(llama, text, tmp_path / "run", *options, "--lr", "1e-2", "--warmup-steps", 0)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        assert report["losses"][-1] < report["losses"][0]
        evaluated = invoke(
            "eval", tmp_path / "run", text, "--seq-len", 16, "--eval-blocks", 64, "--dtype", "float32", "--json"
        )
        assert evaluated.exit_code == 0, evaluated.output
        assert json.loads(evaluated.stdout)["perplexity"] < report["perplexity"]["quantized"]

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (["--scheme", "w8a9"], ["w8a9", "did you mean", "w8a8"]),
            (["--method", "full", "--mode", "frozen"], ["--scheme none"]),
            (["--mode", "qat"], ["--method lora", "--mode qat"]),
            (["--steps", 0], ["--steps", "at least 1"]),
            (["--lr", 0], ["--lr", "positive"]),
            (["--seq-len", 4], ["at least 8"]),
            (["--seq-len", 60000], ["too short"]),
            (["--eval-text", "absent.txt"], ["absent.txt", "No such file"]),
        ],
    )
    def test_bad_settings(self, llama, text, tmp_path, more, words):
        assert_refused(small_run(llama, text, tmp_path / "run", *more), *words)
        assert not (tmp_path / "run").exists()

    def test_unknown_schedule_is_refused_by_the_parser(self, llama, text, tmp_path):
        result = small_run(llama, text, tmp_path / "run", "--schedule", "cubic")
        assert result.exit_code == 2
        assert "cubic" in result.stderr and "Traceback" not in result.stderr

    def test_bad_text_files(self, llama, tmp_path):
        binary, empty, short = tmp_path / "binary.txt", tmp_path / "empty.txt", tmp_path / "short.txt"
        binary.write_bytes(b"\xff\xfe\x00")
        empty.write_text(" \n")
        short.write_text("the quick brown fox")
        assert_refused(small_run(llama, binary, tmp_path / "run"), "binary.txt", "UTF-8")
        assert_refused(small_run(llama, empty, tmp_path / "run"), "empty.txt", "empty")
        assert_refused(small_run(llama, short, tmp_path / "run"), "too short")
        assert_refused(small_run(llama, tmp_path / "none.txt", tmp_path / "run"), "none.txt", "No such file")
        assert_refused(small_run(llama, tmp_path, tmp_path / "run"), str(tmp_path), "directory")

    def test_bad_models(self, tokenizer_folder, text, tmp_path):
        assert_refused(small_run(tmp_path / "nowhere", text, tmp_path / "run"), "nowhere", "does not exist")
        assert_refused(small_run(tmp_path, text, tmp_path / "run"), "config.json")
        other = shutil.copytree(tokenizer_folder, tmp_path / "vit")
        transformers.ViTConfig(hidden_size=32).save_pretrained(other)
        assert_refused(small_run(other, text, tmp_path / "run"), "no causal language model")
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(b"no gguf at all")
        assert_refused(small_run(broken, text, tmp_path / "run", "--cache", tmp_path / "cache"), "broken.gguf")
        assert not (tmp_path / "cache").exists()

    def test_foreign_output_folder_is_left_alone(self, llama, text, tmp_path):
        (tmp_path / "mine.doc").write_text("precious")
        assert_refused(small_run(llama, text, tmp_path), "something else")
        assert_refused(small_run(llama, text, text), "is a file")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.doc", "text.txt"]

    def test_report_without_matplotlib_has_no_plot(self, llama, text, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        result = small_run(llama, text, tmp_path / "run", "--eval-blocks", 0)
        assert result.exit_code == 0 and "no plot" in result.stderr
        assert "loss.png" not in (tmp_path / "run" / "report.md").read_text()
        assert not (tmp_path / "run" / "loss.png").exists()

    def test_accumulated_batches_are_a_larger_batch(self, llama, text, tmp_path):
        losses = []
        for size, count in ((4, 1), (2, 2)):
            options = ("--batch-size", size, "--grad-accumulation", count, "--eval-blocks", 0, "--lr", 0.01)
            result = small_run(llama, text, tmp_path / "run", "--scheme", "none", *options)
            assert result.exit_code == 0, result.output
            losses.append(json.loads((tmp_path / "run" / "report.json").read_text())["losses"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_missing_peft_is_named(self, llama, text, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        assert_refused(small_run(llama, text, tmp_path / "run"), "peft", "pip install")


class TestEvalAndGenerate:
    def test_adapter_gives_the_perplexity_of_the_report(self, llama, text, tmp_path):
        output = tmp_path / "run"
        assert small_run(llama, text, output, "--eval-text", text, "--lr", 0.01, "--eval-blocks", 9).exit_code == 0
        report = json.loads((output / "report.json").read_text())
        options = ("--seq-len", 16, "--eval-blocks", 9, "--dtype", "float32", "--json")
        for stage, more in {
            "float": (),
            "quantized": ("--scheme", "w8a8"),
            "finetuned": ("--scheme", "w8a8", "--adapter", output),
        }.items():
            result = invoke("eval", llama, text, *options, *more)
            assert result.exit_code == 0, result.output
            assert json.loads(result.stdout)["perplexity"] == pytest.approx(report["perplexity"][stage], rel=1e-6)

    def test_adapter_knows_its_scheme_and_base(self, llama, gpt2, text, tmp_path):
        output = tmp_path / "run"
        result = small_run(llama, text, output, "--scheme", "W8A16", "--lr", 0.01)
        assert result.exit_code == 0, result.output
        assert f"next: qkernels generate {llama} --adapter {output}" in result.stdout
        record = json.loads((output / "qkernels.json").read_text())
        assert (record["scheme"], record["mode"], record["grad_dtype"]) == ("w8a16", "frozen", "float")
        assert record["base"]["folder"] == str(llama) and record["versions"]["torch"] == torch.__version__
        assert load_tokenizer(output).vocab_size == load_tokenizer(llama).vocab_size

        def evaluate(model, *more):
            done = invoke(
                "eval", model, text, "--seq-len", 16, "--eval-blocks", 3, "--dtype", "float32", "--json", *more
            )
            assert done.exit_code == 0, done.output
            warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
            return json.loads(done.stdout), warnings

        by_default, silent = evaluate(llama, "--adapter", output)
        assert by_default["scheme"] == "w8a16" and not silent
        assert evaluate(llama, "--adapter", output, "--scheme", "w8a16") == (by_default, [])
        other, (warning,) = evaluate(llama, "--adapter", output, "--scheme", "none")
        assert other["scheme"] == "none" and "--scheme none" in warning and "w8a16" in warning
        assert other["perplexity"] != by_default["perplexity"]
        copy = shutil.copytree(llama, tmp_path / "copy")
        assert evaluate(copy, "--adapter", output) == (by_default, [])
        model = load_model(llama, torch.float32)
        model.model.norm.weight.data += 1
        model.save_pretrained(copy)
        _, (warning,) = evaluate(copy, "--adapter", output)
        assert "trained on another model" in warning and str(llama) in warning
        assert_refused(invoke("generate", output, "--prompt", "a"), "is an adapter", "--adapter")

    def test_quantized_folder_tells_its_scheme(self, llama, text, tmp_path):
        options = ("--method", "full", "--scheme", "w4a8_g32", "--eval-blocks", 0)
        result = small_run(llama, text, tmp_path / "run", *options)
        assert result.exit_code == 0 and "mode qat" in result.stderr, result.output
        result = invoke("eval", tmp_path / "run", text, "--seq-len", 16, "--json", "--dtype", "float32")
        assert json.loads(result.stdout)["scheme"] == "w4a8-g32", result.output
        refused = invoke("eval", tmp_path / "run", text, "--seq-len", 16, "--scheme", "w8a8")
        assert_refused(refused, "quantized already (w4a8-g32)", "w8a8")

    def test_empty_prompt(self, llama, tmp_path):
        assert invoke("generate", llama, "--prompt", "", "--max-new-tokens", 4).exit_code == 0
        without = shutil.copytree(llama, tmp_path / "without")
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (path := without / name).exists():
                values = json.loads(path.read_text())
                values.pop("bos_token", None)
                path.write_text(json.dumps(values))
        assert_refused(invoke("generate", without, "--prompt", ""), "prompt ''", "some text")

    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            ("config.json", b"{"),
            ("config.json", b"[]"),
            ("config.json", b"{}"),
            ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
            ("config.json", b'{"model_type": "llama", "hidden_size": 48}'),
            ("model.safetensors", b""),
            ("model.safetensors", b"\x08" + bytes(7) + b"not json"),
            ("tokenizer.json", b"{}"),
            ("tokenizer_config.json", b"["),
        ],
    )
    def test_damaged_models(self, llama, text, tmp_path, name, damage):
        folder = shutil.copytree(llama, tmp_path / "damaged")
        assert (folder / name).is_file()
        (folder / name).write_bytes(damage)
        assert_refused(invoke("eval", folder, text, "--seq-len", 16), str(folder))

    def test_missing_and_damaged_weights(self, llama, text, tmp_path):
        from safetensors.torch import load_file, save_file

        folder, output = shutil.copytree(llama, tmp_path / "less"), tmp_path / "run"
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert_refused(invoke("eval", folder, text, "--seq-len", 16), "lacks weights", "model.norm.weight")
        assert small_run(llama, text, output, "--eval-blocks", 0).exit_code == 0
        path = output / "adapter_model.safetensors"
        tensors = load_file(path)
        name = sorted(tensors)[0]
        damages = {
            "lacks weights": {key: value for key, value in tensors.items() if key != name},
            "must be finite": tensors | {name: tensors[name] * torch.nan},
            "cannot be put on": tensors | {name: torch.zeros(3, 3)},
        }
        for words, damaged in damages.items():
            save_file(damaged, path, metadata={"format": "pt"})
            assert_refused(invoke("eval", llama, text, "--seq-len", 16, "--adapter", output), words)
        path.write_bytes(b"")
        assert_refused(invoke("eval", llama, text, "--seq-len", 16, "--adapter", output), "cannot be put on")

    def test_perplexity_is_that_of_a_uniform_model(self, llama, text, tmp_path):
        folder = shutil.copytree(llama, tmp_path / "uniform")
        model = load_model(folder, torch.float32)
        model.lm_head.weight.data.zero_()
        model.save_pretrained(folder)
        result = invoke("eval", folder, text, "--seq-len", 16, "--dtype", "float32", "--json")
        assert json.loads(result.stdout)["perplexity"] == pytest.approx(300, rel=1e-5)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_generate(self, gpt2, beams):
        options = ("--scheme", "w8a8", "--beams", beams, "--max-new-tokens", 8)
        result = invoke("generate", gpt2, "--prompt", "the quick", *options)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("the quick")

    def test_more_tokens_than_the_model_has_positions(self, gpt2, text, tmp_path):
        assert_refused(invoke("generate", gpt2, "--prompt", "the", "--max-new-tokens", 64), "64 positions")
        assert_refused(invoke("eval", gpt2, text, "--seq-len", 65), "65 tokens", "64 positions")
        assert_refused(small_run(gpt2, text, tmp_path / "run", "--seq-len", 65), "65 tokens", "64 positions")

    def test_bad_input(self, llama, text, tmp_path):
        assert_refused(invoke("eval", llama, text, "--scheme", "int8"), "unknown scheme 'int8'")
        assert_refused(invoke("eval", llama, tmp_path / "none.txt"), "none.txt")
        assert_refused(invoke("eval", llama, text, "--adapter", tmp_path), "adapter_config.json")
        assert_refused(invoke("generate", tmp_path / "nowhere", "--prompt", "a"), "does not exist")
        for name in ("google/gemma-3-270m", "gpt2"):
            assert_refused(invoke("generate", name, "--prompt", "a"), "hub ids are not supported", f"download {name}")

    def test_hub_id_in_the_cache(self, llama, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        repo = tmp_path / "models--me--tiny"
        shutil.copytree(llama, repo / "snapshots" / "abc")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc")
        result = invoke("generate", "me/tiny", "--prompt", "the", "--max-new-tokens", 2)
        assert result.exit_code == 0, result.output


class TestParts:
    def test_blocks_hold_every_token_once_behind_bos(self, llama):
        tokenizer = load_tokenizer(llama)
        texts = [TEXT[:300], TEXT[300:501]]
        blocks = token_blocks(tokenizer, texts, 16, keep_tail=True)
        assert all(block[0] == tokenizer.bos_token_id for block in blocks)
        assert all(len(block) == 16 for block in blocks[:-1])
        content = torch.cat([block[1:] for block in blocks]).tolist()
        assert tokenizer.decode(content) == "</s>".join(texts)
        assert len(token_blocks(tokenizer, texts, 16)) == len(content) // 15

    def test_split_keeps_order_and_loses_nothing(self):
        blocks = [torch.tensor([i]) for i in range(25)]
        train, held_out = split_blocks(blocks)
        assert train + held_out == blocks and len(held_out) == 2
        with pytest.raises(InputError, match="too short"):
            split_blocks(blocks[:1])

    def test_read_texts_keeps_unicode(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("Grüße, 你好\n", encoding="utf-8")
        assert read_texts([path]) == ["Grüße, 你好\n"]

    def test_model_bytes_of_weights_that_report_another_dtype(self):
        model = torch.nn.Sequential(torch.nn.Linear(100, 1000, bias=False))
        quantize_(model, "w8a8", mode="int8")
        assert model_bytes(model) == 1000 * 100 + 4 * 1000

    def test_model_bytes_counts_a_tied_weight_once(self, gpt2):
        model = load_model(gpt2, torch.float32)
        assert model_bytes(model) == 4 * sum(p.numel() for p in model.parameters()) + sum(
            b.numel() * b.element_size() for b in model.buffers()
        )

    def test_resolve_model_takes_a_folder(self, llama, tmp_path):
        assert resolve_model(str(llama), tmp_path) == llama

"""A model from another library's checkpoint: its very integers in layers of ours, by every door; and back to a file."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers_models import build, logits

import qkernels as qk
from qkernels.checkpoints.losses import LossError, Losses
from qkernels.checkpoints.registry import FORMATS, open_checkpoint

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore:llm_int8_threshold")
TOKENS = torch.arange(20)[None]


def mixtral() -> transformers.MixtralForCausalLM:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def as_bitsandbytes(model, folder: Path) -> Path:
    """The folder that bitsandbytes writes of a model whose layers are quantized to w8a8."""
    model.save_pretrained(folder)
    tensors, written = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight").removesuffix(".weight")  # an expert has both
            written[f"{module}.weight"] = tensor
            written[f"{module}.SCB"] = tensors[name.replace("qweight", "scales")].flatten() * 127
        elif not name.endswith(".scales") and tensor.numel():
            written[name] = tensor
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["llama", "mixtral"])
def stored(request, tmp_path):
    """A quantized model, and the folder that another library could have written of it."""
    model = mixtral() if request.param == "mixtral" else build("llama")
    qk.quantize_(model, "w8a8")
    return model, as_bitsandbytes(model, tmp_path / "bnb")


def schemes(model) -> dict[str, str]:
    return {name: layer.scheme.name for name, layer in model.named_modules() if hasattr(layer, "scheme")}


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def close_integers(model, expected) -> None:
    """The same integers; scales that bitsandbytes holds as scale * 127 are within its rounding."""
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.endswith("scales"):
            torch.testing.assert_close(found[name], tensor, rtol=2**-22, atol=0)
        else:
            assert_same_bits(found[name], tensor, name)


@pytest.mark.parametrize("door", ["from_pretrained", "load"])
def test_layers_take_the_stored_integers(stored, door, tmp_path):
    expected, folder = stored
    if door == "load":
        model = qk.load(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=qk.QKernelsConfig())
    assert type(model) is type(expected) and schemes(model) == schemes(expected)
    close_integers(model, expected)
    report = model.quantization_report
    assert {row.name for row in report.quantized} == set(schemes(expected)) and report.scheme == "w8a8"
    assert all(row.note.startswith("bitsandbytes int8") for row in report.quantized)
    assert {row.reason for row in report.left} == {"in float in the checkpoint"}
    assert report.bytes_after < report.bytes_before == sum(p.numel() * 4 for p in qk.dequantize_(expected).parameters()
                                                           if p.dim() > 1)  # fmt: skip
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same_bits(outputs(again), outputs(model))
    said = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert not {"as_stored", "activations", "on_loss"} & said.keys() and said["quant_method"] == "qkernels"


def test_activations_and_schemes(stored):
    expected, folder = stored
    floats = qk.load(folder, activations="float")
    assert set(schemes(floats).values()) == {"w8a16"}
    grouped = qk.load(folder, "w8a8-ag32")
    assert set(schemes(grouped).values()) == {"w8a8-ag32"}
    close_integers(floats, expected)
    close_integers(grouped, expected)
    with pytest.raises(ValueError, match=r"activations must be one of int8, float or None, got 'int4'"):
        qk.load(folder, activations="int4")
    with pytest.raises(LossError, match=r"w8a16 does not keep its integers as w4a16-g32; pass on_loss='requantize'"):
        qk.load(folder, "w4a8-g32")
    with pytest.warns(UserWarning, match=r"weights that were quantized again as w4a16-g32 \(largest change 0.0"):
        again = qk.load(folder, "w4a8-g32", on_loss="requantize")
    assert set(schemes(again).values()) == {"w4a8-g32"}
    assert again.quantization_report.warnings
    with pytest.raises(ValueError, match=r"mode must be 'frozen' or 'int8'.*got 'qat'"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=qk.QKernelsConfig(mode="qat"))
    trained = AutoModelForCausalLM.from_pretrained(folder, quantization_config=qk.QKernelsConfig(mode="int8"))
    assert {layer.mode for layer in trained.modules() if hasattr(layer, "scheme")} == {"int8"}
    assert_same_bits(outputs(trained), outputs(qk.load(folder)))


def test_what_is_asked_for_in_float_is_dequantized(stored):
    expected, folder = stored
    everything = qk.load(folder, skip=["*"])
    assert not schemes(everything)
    pattern = "*gate_up*" if isinstance(expected, transformers.MixtralForCausalLM) else "*gate*"
    model = qk.load(folder, {pattern: None, "*": "w8a16"})
    floats = qk.load(folder, activations="float")
    assert 0 < len(schemes(model)) < len(schemes(floats))
    torch.testing.assert_close(outputs(model), outputs(floats), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(everything), outputs(floats), rtol=1e-4, atol=1e-5)
    reasons = {row.reason for row in model.quantization_report.left}
    assert reasons == {"in float in the checkpoint", "asked for in float"}


def test_the_model_below_the_head(tmp_path):
    expected = build("llama")
    qk.quantize_(expected, "w8a8", skip=["lm_head"])
    folder = as_bitsandbytes(expected, tmp_path / "bnb")
    model = AutoModel.from_pretrained(folder, quantization_config=qk.QKernelsConfig())
    close_integers(model, expected.model)


def test_a_tied_head_shares_the_embedding(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    expected = transformers.LlamaForCausalLM(config).eval()
    qk.quantize_(expected, "w8a8", embeddings=True)
    model = qk.load(as_bitsandbytes(expected, tmp_path / "bnb"))
    assert model.lm_head.qweight is model.model.embed_tokens.qweight
    close_integers(model, expected)
    of_head = next(row for row in model.quantization_report.rows if row.name == "lm_head")
    assert (of_head.bytes_before, of_head.bytes_after) == (0, 0)  # it is counted with the embedding


def test_biases(tmp_path):
    expected = build("llama")
    qk.quantize_(expected, "w8a8")
    folder = as_bitsandbytes(expected, tmp_path / "bnb")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj.bias"
    rows = tensors[name.replace("bias", "weight")].shape[0]
    save_file({**tensors, name: torch.zeros(rows)}, folder / "model.safetensors")  # as some writers add
    close_integers(qk.load(folder), expected)
    save_file({**tensors, name: torch.ones(rows)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} of the checkpoint is not zero, and Llama.* has no such bias"):
        qk.load(folder)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    expected = build("llama")
    qk.quantize_(expected, "w8a8")
    folder = as_bitsandbytes(expected, tmp_path / "bnb")
    tensors, norm = load_file(folder / "model.safetensors"), "model.norm.weight"
    save_file({name: own for name, own in tensors.items() if name != norm}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"lacks weights of LlamaForCausalLM: {norm}"):
        qk.load(folder)
    up = "model.layers.0.mlp.up_proj"
    cut = {f"{up}.weight": tensors[f"{up}.weight"][1:], f"{up}.SCB": tensors[f"{up}.SCB"][1:]}
    save_file({**tensors, **cut}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{up} of the checkpoint is \[79, 48\], and the model's layer \[80, 48\]"):
        qk.load(folder)
    save_file({**tensors, "model.layers.0.extra": torch.ones(2)}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="no place for: model.layers.0.extra"):
        qk.load(folder)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        qk.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"layers on disk is not possible while a checkpoint.* is loaded: convert"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=qk.QKernelsConfig(), device_map={"model": "disk", "lm_head": "cpu"}
        )
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        qk.load(folder)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize(
    ("scheme", "to"),
    [("w8a8s", "qkernels"), ("w4a8-g32-asym", "qkernels"), ("w8a8", "float"), ("w4a16-g32", "gptq"),
     ("w8a8", "compressed-tensors")],
)  # fmt: skip
def test_a_model_in_memory_is_written_and_loads_again(family, scheme, to, tmp_path):
    model = mixtral() if family == "mixtral" else build(family)
    batches = [{"input_ids": TOKENS}] if scheme == "w8a8s" else None
    qk.quantize_(model, scheme, calibration=batches)
    losses = qk.export(model, tmp_path / "out", to, on_loss="report")
    assert all(loss.largest < 0.001 for loss in losses)  # scales of float16
    again = qk.load(tmp_path / "out")
    assert len(schemes(again)) == (0 if to == "float" else len(schemes(model)))
    if to == "qkernels":
        assert_same_bits(outputs(again), outputs(model))
    else:
        torch.testing.assert_close(outputs(again), outputs(model), rtol=0.02, atol=0.02 if to == "float" else 0.002)


def test_what_cannot_be_exported_is_named(tmp_path):
    model = build("llama")
    with pytest.raises(TypeError, match="model must be a model of transformers, got Linear"):
        qk.export(torch.nn.Linear(2, 2), tmp_path / "out", "float")
    with pytest.raises(ValueError, match=r"format must be one of .*got 'nothing'"):
        qk.export(model, tmp_path / "out", "nothing")
    qk.quantize_(model, "w4a8", "qat")
    with pytest.raises(ValueError, match=r"q_proj is in mode 'qat', with a float weight: call qkernels.freeze_"):
        qk.export(model, tmp_path / "out", "qkernels")
    adapted = peft.get_peft_model(qk.freeze_(model) or model, peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(TypeError, match=r"got PeftModel; call merge_and_unload\(\) first"):
        qk.export(adapted, tmp_path / "out", "qkernels")
    with pytest.raises(TypeError, match=r"no adapter that is not merged, and model.layers.0.mlp.up_proj has one"):
        qk.export(adapted.base_model.model, tmp_path / "out", "qkernels")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    with pytest.raises(FileExistsError, match="is there already"):
        qk.export(build("llama"), tmp_path / "out", "float")


def test_lora_trains_on_imported_integers_and_the_merged_model_is_exported(tmp_path):
    expected = build("llama")
    qk.quantize_(expected, "w4a16-g32")
    qk.export(expected, tmp_path / "gptq", "gptq", on_loss="report")
    model = qk.load(tmp_path / "gptq", activations="int8")
    assert set(schemes(model).values()) == {"w4a8-g32"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj", "q_proj"], init_lora_weights=False))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, tensor in before.items():
        inside = name.replace("_proj.", "_proj.base_layer.") if ".up_proj" in name or ".q_proj" in name else name
        assert_same_bits(adapted.base_model.model.state_dict()[inside], tensor, name)
    with torch.no_grad():
        trained = adapted(TOKENS).logits
    merged = adapted.merge_and_unload()
    with pytest.warns(UserWarning, match="GPTQ says nothing of int8 activations, which 15 layers have"):
        qk.export(merged, tmp_path / "served", "gptq", on_loss="report")
    served = outputs(qk.load(tmp_path / "served", activations="int8"))
    torch.testing.assert_close(served, outputs(merged), rtol=0.02, atol=0.01)
    assert (served - trained).norm() < (outputs(qk.load(tmp_path / "gptq")) - trained).norm()  # it kept the adapter


def test_folders_of_floats_and_of_ours(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "float")
    assert_same_bits(logits(qk.load(tmp_path / "float")), logits(model))
    quantized = qk.load(tmp_path / "float", "w4a8-g32", embeddings="w8a8", dtype=torch.bfloat16)
    assert set(schemes(quantized).values()) == {"w4a8-g32", "w8a8"} and quantized.dtype == torch.bfloat16
    quantized.save_pretrained(tmp_path / "ours")
    assert_same_bits(logits(qk.load(tmp_path / "ours")), logits(quantized))
    floats = qk.load(tmp_path / "ours", activations="float")
    assert set(schemes(floats).values()) == {"w4a16-g32", "w8a16"}
    assert floats.quantization_report.left == [] or schemes(floats).keys() == schemes(quantized).keys()


@pytest.mark.parametrize("to", ["float", "qkernels", "compressed-tensors"])
@pytest.mark.parametrize("door", ["export", "convert"])
def test_experts_that_stay_in_float_beside_quantized_ones_keep_their_names(door, to, tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "float")
    qk.quantize_(model, "w4a16-g32-asym", skip=["*gate_up_proj*"])
    if door == "export":
        assert qk.export(model, tmp_path / "out", to) == []
    else:
        model.save_pretrained(tmp_path / "ours")
        FORMATS[to].write(open_checkpoint(tmp_path / "ours"), tmp_path / "out", Losses())
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_bits(written[name], load_file(tmp_path / "float" / "model.safetensors")[name])
    assert not any(key.endswith(".weight.weight") for key in written)
    torch.testing.assert_close(outputs(qk.load(tmp_path / "out")), outputs(model), rtol=1e-5, atol=1e-6)


def gemma3() -> transformers.Gemma3ForConditionalGeneration:
    """A language model with a vision tower, whose folders have other names than its modules."""
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config={"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def test_names_of_folders_that_are_not_those_of_modules(tmp_path):
    model = gemma3()
    qk.quantize_(model, "w4a16-g32-asym", skip=["*vision_tower*"])
    for to in ("qkernels", "compressed-tensors"):
        qk.export(model, tmp_path / to, to)
        assert any(key.startswith("language_model.model") for key in load_file(tmp_path / to / "model.safetensors"))
        assert_same_bits(outputs(qk.load(tmp_path / to)), outputs(model))
    file = tmp_path / "compressed-tensors" / "config.json"
    config = json.loads(file.read_text())
    said = config["text_config"]["quantization_config"] = config.pop("quantization_config")
    file.write_text(json.dumps(config))  # as multimodal models say it
    assert_same_bits(outputs(qk.load(file.parent)), outputs(model))
    assert "quantization_config" not in json.dumps(dict(open_checkpoint(file.parent).config))
    file.write_text(json.dumps({**config, "quantization_config": {**said, "format": "int-quantized"}}))
    with pytest.raises(ValueError, match="must have one quantization_config, got different ones"):
        open_checkpoint(file.parent)


def test_layers_whose_parts_only_we_know_are_not_exported(tmp_path):
    model = gemma3()
    qk.quantize_(model, "w8a8", include=["*vision_tower.head.attention*"])
    with pytest.raises(
        ValueError, match=r"head.attention is a MultiheadAttention, whose quantized weights only save_pr"
    ):
        qk.export(model, tmp_path / "out", "float")
    config = transformers.GptOssConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_local_experts=4,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    qk.quantize_(model, "w8a8")
    with pytest.raises(ValueError, match=r"gate_up_proj has the experts of a layer in one tensor, which only save_pr"):
        qk.export(model, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_names_is_refused(tmp_path):
    expected = build("llama")
    qk.quantize_(expected, "w8a8", skip=["lm_head"])
    file = as_bitsandbytes(expected, tmp_path / "bnb") / "model.safetensors"
    save_file({f"other.{name}": tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"no quantized layer that LlamaForCausalLM has a place for.* such as other\."):
        AutoModelForCausalLM.from_pretrained(file.parent, quantization_config=qk.QKernelsConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"skip": ["*nothing"]}, "skip pattern '*nothing' matches no layer"),
     ({"include": ["*nothing", "*up_proj"]}, "include pattern '*nothing' matches no layer"),
     ({"scheme": {"nothing": "w8a16", "*": "w8a8"}}, "scheme pattern 'nothing' matches no layer"),
     ({"embeddings": True}, "embeddings=True has no effect")],
)  # fmt: skip
def test_what_has_no_effect_is_warned_of(options, message, tmp_path):
    expected = build("llama")
    qk.quantize_(expected, "w8a8")
    folder = as_bitsandbytes(expected, tmp_path / "bnb")
    with pytest.warns(UserWarning, match=re.escape(message)):
        qk.load(folder, **options)

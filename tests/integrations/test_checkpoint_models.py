"""A model from another library's checkpoint: its very integers in layers of ours, by every door; and back to a file."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers_models import build, logits

import qkernels as qk
from qkernels.checkpoints.losses import LossError

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
    with pytest.raises(LossError, match=r"integers are those of w8a16, not of w4a16-g32; pass on_loss='requantize'"):
        qk.load(folder, "w4a8-g32")
    with pytest.warns(UserWarning, match=r"weights that w4a8-g32 rounds \(largest change 0.0"):
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

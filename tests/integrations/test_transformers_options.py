"""transformers: options of `QKernelsConfig` that are those of `quantize_`."""

import copy
import json

import pytest
import torch
from helpers import assert_same_bits, run_python

import qkernels as qk

transformers = pytest.importorskip("transformers")

MIXED = {"lm_head": None, "*.mlp.*": "w4a8-g32", "*": "w8a8"}
IDS = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("float")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def schemes(model):
    return {name: layer.scheme.name for name, layer in model.named_modules() if isinstance(layer, qk.QuantLinear)}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_schemes_by_pattern(folder, tmp_path):
    config = qk.QKernelsConfig(MIXED)
    again = qk.QKernelsConfig.from_dict(json.loads(config.to_json_string()))  # which sorts the keys of mappings
    assert again.scheme == config.scheme == [list(item) for item in MIXED.items()]
    model, expected = load(folder, quantization_config=again), load(folder)
    report = qk.quantize_(expected, MIXED)
    assert schemes(model) == schemes(expected) and model.quantization_report.rows == report.rows
    assert set(schemes(model).values()) == {"w4a8-g32", "w8a8"} and "lm_head" not in schemes(model)
    assert_same_bits(logits(model), logits(expected))
    for index, quantized in enumerate((model, expected)):
        quantized.save_pretrained(tmp_path / str(index))
        reloaded = load(tmp_path / str(index))
        assert schemes(reloaded) == schemes(model)
        assert_same_bits(logits(reloaded), logits(model))
        reloaded.save_pretrained(tmp_path / "again")
        assert_same_bits(logits(load(tmp_path / "again")), logits(model))


def test_names_of_modules_and_of_other_configurations(folder):
    model = load(folder, quantization_config=qk.QKernelsConfig(modules_to_not_convert=["model.layers.0.mlp"]))
    assert not any(".mlp." in name for name in schemes(model)) and "lm_head" in schemes(model)
    with pytest.raises(TypeError, match="modules_to_not_convert is another name of skip"):
        qk.QKernelsConfig(modules_to_not_convert=["lm_head"], skip=["lm_head"])
    with pytest.raises(TypeError, match=r"calibration needs the float model: .* quantize_"):
        qk.QKernelsConfig("w4a8-g32", calibration=[IDS])
    assert copy.deepcopy(qk.QKernelsConfig(MIXED)).scheme == qk.QKernelsConfig(MIXED).scheme


WITHOUT_QKERNELS = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "qkernels":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})
torch.save(model(torch.tensor({ids})).logits.detach(), {folder!r} + "/logits.pt")
"""


def test_a_dequantized_model_is_saved_and_loaded_without_qkernels(folder, tmp_path):
    model = load(folder, quantization_config=qk.QKernelsConfig(MIXED, embeddings=True))
    before = logits(model)
    model.dequantize()
    assert schemes(model) == {} and not hasattr(model.config, "quantization_config")
    assert torch.nn.functional.cosine_similarity(logits(model).flatten(), before.flatten(), dim=0) > 0.99
    model.save_pretrained(tmp_path)
    assert "quant" not in (tmp_path / "config.json").read_text()
    run_python(WITHOUT_QKERNELS.format(folder=str(tmp_path), ids=IDS.tolist()))
    assert_same_bits(torch.load(tmp_path / "logits.pt"), logits(model))


def offloaded(tied):
    """Maps that leave all of the model on disk, or the decoder's layers and a head of its own."""
    parts = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb"], "cpu")
    return [{"": "disk"}, {**parts, "model.layers": "disk", "lm_head": "cpu" if tied else "disk"}]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "scheme, options",
    [
        ("w8a8", {"embeddings": True}),
        pytest.param("w4a8-g32-asym", {"grad_dtype": "int8"}, marks=pytest.mark.thorough),
        pytest.param("w8a8", {"mode": "qat"}, marks=pytest.mark.thorough),
    ],
)
def test_layers_of_a_quantized_folder_stay_on_disk(scheme, options, tied, folder, tmp_path):
    model = load(folder, tie_word_embeddings=tied)
    qk.quantize_(model, scheme, **options)
    model.save_pretrained(tmp_path / "quantized")
    for index, device_map in enumerate(offloaded(tied)):
        again = load(tmp_path / "quantized", device_map=device_map, offload_folder=tmp_path / str(index))
        assert any(parameter.is_meta for parameter in again.parameters())
        assert_same_bits(logits(again), logits(model))


def test_what_cannot_be_left_on_disk_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match=r"while a float checkpoint is quantized.*load that folder"):
        load(folder, quantization_config=qk.QKernelsConfig("w8a8"), **options)
    model = load(folder)
    qk.quantize_(model, "w8a8", "int8")
    model.save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="must not offload layers of mode 'int8' to disk"):
        load(tmp_path / "int8", **options)
    qk.freeze_(model)
    model.save_pretrained(tmp_path / "frozen")
    file = tmp_path / "frozen" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.scales"][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj\.scales must be finite"):
        load(tmp_path / "frozen", **options)

"""transformers models that hold torch's attention or recurrent layers, and pruned ones: loaded, trained, saved."""

import pytest
import torch
import transformers
from helpers import assert_same_bits
from torch import nn
from torch.nn.utils import prune

import qkernels as qk


def siglip():
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    model = transformers.SiglipVisionModel(config).eval()
    return model, lambda model: model(torch.linspace(-1, 1, 768).view(1, 3, 16, 16)).pooler_output


def encodec():
    config = transformers.EncodecConfig(num_filters=4, hidden_size=16, codebook_dim=16, num_lstm_layers=2)
    model = transformers.EncodecModel(config).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.LSTM):  # which otherwise adds next to nothing
                for parameter in layer.parameters():
                    parameter.normal_(std=0.3)
    return model, lambda model: model.encoder(torch.linspace(-1, 1, 640).sin().view(1, 1, 640))


@pytest.mark.filterwarnings("ignore:skip pattern")
@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
@pytest.mark.parametrize(
    ("make", "part", "kind"), [(siglip, "attention", nn.MultiheadAttention), (encodec, "lstm", nn.LSTM)]
)
def test_layers_of_several_weights_are_loaded_trained_and_saved(make, part, kind, mode, tmp_path):
    torch.manual_seed(0)
    model, call = make()
    model.save_pretrained(tmp_path / "float")
    expected, load = call(model), type(model).from_pretrained
    config = qk.QKernelsConfig("w8a8", mode=mode, skip=["*conv*", "*patch_embedding"])
    loaded = load(tmp_path / "float", quantization_config=config).eval()
    rows = [row for row in loaded.quantization_report.rows if row.kind == kind.__name__]
    assert len(rows) >= 2 and all(f".{part}." in row.name and row.reason is None for row in rows)
    out = call(loaded)
    assert 0 < (out - expected).norm() < 0.05 * expected.norm()
    qk.quantize_(model, "w8a8", mode, skip=["*conv*", "*patch_embedding"])
    assert_same_bits(call(model), out)
    out.square().sum().backward()
    loaded.save_pretrained(tmp_path / mode)
    assert_same_bits(call(load(tmp_path / mode).eval()), out)
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again").eval()
    assert any(type(module) is kind for module in again.modules())
    assert_same_bits(call(again), call(loaded))


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_folders_of_pruned_models_hold_the_zeros_once_they_are_frozen(mode, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(6)[None]
    layer = model.model.layers[0].mlp.up_proj
    prune.l1_unstructured(layer, "weight", 0.5)
    zeros = layer.weight == 0
    qk.quantize_(model, "w8a8", mode)
    if mode != "frozen":
        with pytest.warns(UserWarning, match=r"does not restore the masks of pruned layers: .*up_proj\. Load"):
            model.save_pretrained(tmp_path / "masked")
    qk.freeze_(model).save_pretrained(tmp_path / "frozen")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "frozen")
    assert not again.model.layers[0].mlp.up_proj.dequantize()[zeros].any()
    assert_same_bits(again(ids).logits, model(ids).logits)

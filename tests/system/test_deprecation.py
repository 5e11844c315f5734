"""Former names of keyword arguments."""

import json

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.system.deprecation import renamed_keywords

CALLS = {
    "QuantLinear": lambda **options: qk.QuantLinear(4, 4, **options),
    "from_float": lambda **options: qk.QuantLinear.from_float(nn.Linear(4, 4), "w8a8", **options),
    "quantize_": lambda **options: qk.quantize_(nn.Sequential(nn.Linear(4, 4)), "w8a8", **options),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_grad_is_the_former_name_of_grad_dtype(call):
    with pytest.warns(DeprecationWarning, match="grad= is called grad_dtype= now") as caught:
        result = call(grad="int8")
    assert caught[0].filename == __file__
    assert result.grad_dtype == "int8"
    with pytest.raises(TypeError, match="give only grad_dtype"):
        call(grad="int8", grad_dtype="int8")


def test_a_config_by_the_former_name():
    pytest.importorskip("transformers")
    with pytest.warns(DeprecationWarning, match="grad= is called grad_dtype= now"):
        config = qk.QKernelsConfig(grad="int8")
    assert config.grad_dtype == "int8" and "grad" not in config.to_dict()


def test_a_folder_that_was_saved_by_the_former_name(tmp_path, recwarn):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **size)).eval()
    qk.quantize_(model, "w8a8", grad_dtype="int8")
    model.model.layers[0].mlp.up_proj.grad_dtype = "float"
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert text.count('"grad_dtype"') == 2  # of the config, and of the layer that differs
    (tmp_path / "config.json").write_text(text.replace('"grad_dtype"', '"grad"'))
    assert "grad" in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    mlp = loaded.model.layers[0].mlp
    assert (mlp.gate_proj.grad_dtype, mlp.up_proj.grad_dtype) == ("int8", "float")
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not [warning for warning in recwarn if "grad" in str(warning.message)]


def test_what_the_decorated_function_is_stays():
    @renamed_keywords(colour="color")
    def paint(color: str) -> str:
        """Paint it."""
        return color

    assert paint("red") == paint(color="red") == "red"
    assert paint.__doc__ == "Paint it."

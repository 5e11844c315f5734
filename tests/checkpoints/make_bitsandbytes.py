"""Write files/bitsandbytes-*: a layer that bitsandbytes quantized, and the float weight that it reads from it.

Run it where bitsandbytes is installed (`pip install torch bitsandbytes transformers`): python make_bitsandbytes.py
"""

import json
from pathlib import Path

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

FILES = Path(__file__).with_name("files")
IN, OUT = 96, 12
KINDS = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.bfloat16,
    ),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}


def layer(config: BitsAndBytesConfig) -> torch.nn.Module:
    """A quantized linear layer."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(IN, OUT)
    if config.load_in_8bit:
        quantized = Linear8bitLt(IN, OUT, has_fp16_weights=False)
        quantized.load_state_dict(plain.state_dict())
        return quantized.to("cpu")
    quantized = Linear4bit(IN, OUT, quant_type=config.bnb_4bit_quant_type)
    quantized.weight = Params4bit(
        plain.weight.data,
        requires_grad=False,
        quant_type=config.bnb_4bit_quant_type,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_storage=config.bnb_4bit_quant_storage,
        module=quantized,
    )
    quantized.bias = plain.bias
    return quantized.to("cpu")


def dequantized(quantized: torch.nn.Module) -> torch.Tensor:
    """What the library takes the weight for: float32 [OUT, IN]."""
    if isinstance(quantized, Linear8bitLt):
        return functional.int8_vectorwise_dequant(quantized.weight.data, quantized.weight.SCB)
    state = quantized.weight.quant_state
    state.shape = torch.Size((1, OUT * IN))  # its CPU kernel of 0.50 begins a block in each row, its quantizer does not
    return functional.dequantize_4bit(quantized.weight.data, state).float().view(OUT, IN)


for kind, config in KINDS.items():
    folder = FILES / f"bitsandbytes-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    quantized = layer(config)
    state = {f"proj.{name}": tensor.contiguous() for name, tensor in quantized.state_dict().items()}
    expected = dequantized(quantized).contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    save_file({"weight": expected}, folder / "expected.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config.to_dict()}, indent=1) + "\n")

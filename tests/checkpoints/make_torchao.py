"""Write files/torchao: layers that torchao quantized, and the float weights that it reads from them.

Run it where torchao is installed (`pip install torch torchao safetensors`): python make_torchao.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Int4Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerTensor,
    quantize_,
)

FOLDER = Path(__file__).with_name("files") / "torchao"
IN, OUT = 64, 6
ASYM = MappingType.ASYMMETRIC
CONFIGS = {
    "dynamic": Int8DynamicActivationInt8WeightConfig(),
    "static": Int8StaticActivationInt8WeightConfig(torch.tensor(0.125), granularity=PerTensor()),
    "int8": Int8WeightOnlyConfig(),
    "groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "intx4": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
    "asym": IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=ASYM),
    "intx3": IntxWeightOnlyConfig(torch.int3, PerGroup(64), mapping_type=ASYM),
    "intx8": IntxWeightOnlyConfig(torch.int8, PerAxis(0)),
    "asym8": IntxWeightOnlyConfig(torch.int8, PerGroup(32), mapping_type=ASYM),
    "mixed": Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)),
}


def int4(weight: torch.Tensor) -> Int4Tensor:
    """The class for GPUs, whose own quantizer needs one: its storage, filled here."""
    groups = weight.view(OUT, -1, 32)
    scales = groups.abs().amax(-1) / 7
    q = (groups / scales.unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8).view(OUT, IN)
    packed = (q[:, 0::2] & 15) | (q[:, 1::2] << 4)
    return Int4Tensor(packed, scales.t().contiguous(), torch.zeros(scales.shape[::-1]), [1, 32], weight.shape)


state, expected = {}, {}
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    dtype = torch.float32 if name in ("int8", "static") else torch.bfloat16
    layer = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=name == "int8")).to(dtype)
    quantize_(layer, config)
    state |= {f"{name}.{key[2:]}": tensor for key, tensor in layer.state_dict().items()}
    weight = layer[0].weight
    exact = (
        weight.to(torch.float32).dequantize() if hasattr(weight, "target_dtype") else weight.dequantize(torch.float32)
    )
    expected[name] = exact.contiguous()
torch.manual_seed(0)
state["int4.weight"] = int4(torch.nn.Linear(IN, OUT).weight.data)
tensors, metadata = flatten_tensor_state_dict(state)
FOLDER.mkdir(exist_ok=True)
(FOLDER / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}\n')
save_file(tensors, FOLDER / "model.safetensors", metadata)
save_file(expected, FOLDER / "expected.safetensors")

"""Write files/compressed-tensors: layers that compressed-tensors quantized, and the weights that it reads from them.

Run it where that is installed (`pip install torch compressed-tensors`): python make_compressed_tensors.py
"""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

FOLDER = Path(__file__).with_name("files") / "compressed-tensors"
PACKED, PLAIN, NAIVE = "pack-quantized", "int-quantized", "naive-quantized"
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
GROUP = {"num_bits": 8, "strategy": "group", "group_size": 32, "dynamic": True}
# name: N, K, format, weights, input_activations
LAYERS = {
    "four": (10, 64, PACKED, {"num_bits": 4, "group_size": 32}, None),
    "four_asym": (10, 64, PACKED, {"num_bits": 4, "group_size": 32, "symmetric": False}, None),
    "four_row": (3, 37, PACKED, {"num_bits": 4, "strategy": "channel"}, None),
    "four_tensor": (3, 40, PACKED, {"num_bits": 4, "strategy": "tensor", "symmetric": False}, None),
    "four_wide": (2, 512, PACKED, {"num_bits": 4, "group_size": 256}, None),
    "four_ag": (4, 64, PLAIN, {"num_bits": 4, "group_size": 32, "symmetric": False}, GROUP),
    "one": (3, 64, PACKED, {"num_bits": 1, "group_size": 32}, None),
    "two_asym": (10, 64, PACKED, {"num_bits": 2, "group_size": 64, "symmetric": False}, None),
    "three_asym": (33, 64, PACKED, {"num_bits": 3, "group_size": 64, "symmetric": False}, None),
    "five": (3, 64, PACKED, {"num_bits": 5, "group_size": 32}, None),
    "six_asym": (12, 37, PACKED, {"num_bits": 6, "strategy": "channel", "symmetric": False}, None),
    "seven_asym": (12, 64, PACKED, {"num_bits": 7, "group_size": 32, "symmetric": False}, None),
    "eight": (4, 64, PACKED, {"num_bits": 8, "group_size": 32}, None),
    "eight_asym": (4, 64, PACKED, {"num_bits": 8, "group_size": 32, "symmetric": False}, None),
    "w8a8": (6, 64, PLAIN, {"num_bits": 8, "strategy": "channel"}, TOKEN),
    "w8a8_tensor": (6, 64, PLAIN, {"num_bits": 8, "strategy": "tensor"}, TOKEN),
    "w8a8_static": (6, 64, PLAIN, {"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "strategy": "tensor"}),
    "naive": (6, 64, NAIVE, {"num_bits": 8, "group_size": 32}, None),
}


def parameters(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's scales and zero points of a weight."""
    groups = weight.flatten() if args.strategy == "tensor" else weight
    if args.strategy == "group":
        groups = weight.unflatten(1, (-1, args.group_size))
    low, high = groups.aminmax(dim=-1, keepdim=args.strategy == "channel")
    return calculate_qparams(low, high, args)


torch.manual_seed(0)
tensors, expected, groups = {}, {}, {}
for name, (out_features, in_features, kind, weights, inputs) in LAYERS.items():
    scheme = QuantizationScheme(targets=[f"block.{name}"], weights=weights, input_activations=inputs, format=kind)
    weight = torch.randn(out_features, in_features).to(torch.bfloat16)
    scale, zero_point = parameters(weight, scheme.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    if inputs and not scheme.input_activations.dynamic:
        state |= {"input_scale": torch.tensor([0.03125], dtype=torch.bfloat16)}
    compressor = BaseCompressor.get_value_from_registry(kind)
    compressed = compressor.compress(state, scheme)
    tensors |= {f"block.{name}.{part}": tensor.contiguous() for part, tensor in compressed.items()}
    expected[f"block.{name}"] = compressor.decompress(compressed, scheme)["weight"].contiguous()
    groups[f"group_{len(groups)}"] = scheme.model_dump(mode="json")
tensors |= {"block.four.bias": torch.randn(10).to(torch.bfloat16), "lm_head.weight": torch.randn(4, 8)}
config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "quantization_status": "compressed"}
config |= {"config_groups": groups, "ignore": ["lm_head"], "kv_cache_scheme": None, "version": "0.20.0"}
FOLDER.mkdir(parents=True, exist_ok=True)
save_file(tensors, FOLDER / "model.safetensors", {"format": "pt"})
save_file(expected, FOLDER / "expected.safetensors")
(FOLDER / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}, indent=1) + "\n")

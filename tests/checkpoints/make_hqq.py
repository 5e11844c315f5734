"""Make tests/checkpoints/files/hqq: layers of all packings as HQQ writes them.

    pip install torch hqq
    python tests/checkpoints/make_hqq.py

`expected.json` has the SHA-256 of the float32 bytes of the weights [N, K] that HQQ dequantizes in float32.
"""

import hashlib
import json
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "files" / "hqq"
LAYERS = {  # bits, group size, axis
    "l.0.four": (4, 64, 1),
    "l.0.row": (4, 128, 1),
    "l.0.eight": (8, 64, 1),
    "l.0.three": (3, 64, 1),
    "l.0.two": (2, 32, 1),
    "l.0.one": (1, 32, 1),
    "l.0.outputs": (4, 64, 0),
}

if __name__ == "__main__":
    torch.manual_seed(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    tensors, digests = {}, {}
    for name, (bits, group_size, axis) in LAYERS.items():
        settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=axis)
        layer = HQQLinear(torch.nn.Linear(128, 16, bias=bits == 4), settings, compute_dtype=torch.float16, device="cpu")
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in layer.state_dict().items()}
        meta = {**layer.meta, "compute_dtype": torch.float32}
        meta |= {key: layer.meta[key].float() for key in ("scale", "zero")}
        values = Quantizer.dequantize(layer.W_q.data, meta)
        digests[name] = hashlib.sha256((values + 0.0).contiguous().numpy().tobytes()).hexdigest()
    tensors["norm.weight"] = torch.ones(4)
    save_file(tensors, FOLDER / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "quantization_config": {"quant_method": "hqq", "quant_config": {}}}
    (FOLDER / "config.json").write_text(json.dumps(config, indent=1))
    (FOLDER / "expected.json").write_text(json.dumps(digests, indent=1))

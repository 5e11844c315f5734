"""Make tests/checkpoints/files/mlx: layers of all widths as MLX packs them.

    pip install torch mlx mlx-cpu
    python tests/checkpoints/make_mlx.py

`expected.json` has the SHA-256 of the float32 bytes of the weights [N, K] that MLX dequantizes.
"""

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np

FOLDER = Path(__file__).parent / "files" / "mlx"

if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    generator, tensors, digests = np.random.default_rng(0), {}, {}
    settings = {"group_size": 64, "bits": 4, "mode": "affine", "embed": False}
    for bits in (2, 3, 4, 5, 6, 8):
        name, group_size = f"layers.0.bits{bits}", 32 if bits == 8 else 64
        weight = mx.array(generator.standard_normal((16, 128)).astype(np.float16))
        codes, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
        tensors |= {f"{name}.weight": codes, f"{name}.scales": scales, f"{name}.biases": biases}
        if bits != 4:
            settings[name] = {"group_size": group_size, "bits": bits}
        floats = (part.astype(mx.float32) for part in (scales, biases))
        values = np.array(mx.dequantize(codes, *floats, group_size=group_size, bits=bits))
        digests[name] = hashlib.sha256((values + 0.0).tobytes()).hexdigest()
    tensors["layers.0.bits4.bias"] = mx.zeros(16, dtype=mx.float16)
    tensors["embed.weight"] = mx.ones((4, 8))
    mx.save_safetensors(str(FOLDER / "model.safetensors"), tensors, {"format": "mlx"})
    config = {"model_type": "llama", "quantization": settings, "quantization_config": settings}
    (FOLDER / "config.json").write_text(json.dumps(config, indent=1))
    (FOLDER / "expected.json").write_text(json.dumps(digests, indent=1))

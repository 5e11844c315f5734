"""Launches of every kernel at sizes of real layers, on tensors without memory."""

import torch

from qkernels import QuantScheme
from qkernels.kernels.triton import ops
from qkernels.kernels.triton.launch import Launch
from qkernels.kernels.triton.target import Target

N, K = 4096, 4096


SCHEMES = ("w8a8", "w4a8-g32-asym", "w8a16", "w4a16-g128")


def real_launches(target: Target, schemes=SCHEMES, rows=(1, 2048)) -> dict[str, Launch]:
    """By a name that says scheme, rows of x and kernel."""
    found = {}

    def add(name: str, op: str, *args, **keywords) -> None:
        for launch in ops.plan(op, args, target, **keywords).launches:
            label = launch.kernel.__name__.removesuffix("_kernel")
            found[f"{name}: {label}"] = launch

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty_strided(shape, (shape[1], 1) if len(shape) == 2 else (1,), dtype=dtype)

    for scheme in schemes:
        parsed = QuantScheme.parse(scheme)
        dtypes = {"qweight": torch.int8 if parsed.weight_bits == 8 else torch.uint8, "scales": torch.float32}
        shapes = parsed.storage_shapes(K, N)
        stored = [
            empty(*shapes[name], dtype=dtypes.get(name, torch.uint8)) if name in shapes else None
            for name in ("qweight", "scales", "zeros")
        ]
        for m in rows:
            name = f"{scheme} M={m}"
            add(name, "linear", empty(m, K), *stored, empty(N), scheme)
            if m == 1:
                continue
            add(name, "linear_grad_input", empty(m, N), *stored, K, scheme)
            columns = empty(K, dtype=torch.float32) if parsed.group_size else None
            q_grad, scales = empty(m, N, dtype=torch.int8), empty(m, dtype=torch.float32)
            if parsed.int_activations:
                add(name, "int_grad_input", q_grad, scales, *stored, K, scheme, columns, out_dtype=torch.bfloat16)
                target_of_rows = empty(m, dtype=torch.int64)
                add(name, "linear_cross_entropy", empty(m, K), target_of_rows, *stored, None, scheme, target_of_rows)
        add(scheme, "dequantize_weight", *stored, K, scheme)
        add(scheme, "column_scales", *stored, K, scheme)
        add(scheme, "quantize_weight", empty(N, K), scheme)
        if parsed.symmetric:
            add(scheme, "quantize_weight_scaled", empty(N, K), stored[1], scheme)
            add(scheme, "scale_gradient", empty(N, K), empty(N, K), stored[1], scheme)
        if parsed.weight_bits == 4:
            add(scheme, "mask_clipped", empty(N, K), empty(N, K), scheme)
    seed, factors = torch.tensor(1), empty(N, dtype=torch.float32)
    add("M=2048", "quantize_rows_stochastic", empty(2048, N), factors, seed, 0)
    add("M=2048", "quantize_columns_stochastic", empty(2048, N), empty(2048, dtype=torch.float32), seed, 1)
    stored = (empty(N, K, dtype=torch.int8), empty(N, 1, dtype=torch.float32), None)
    add("w8a8-ag128", "linear_with_saved_input", empty(2048, K), *stored, None, "w8a8-ag128")
    of_groups = [empty(N, K // 128, dtype=torch.float32) for _ in range(2)]  # scales and minima
    for m in rows:
        add(f"w8a16-g128-min M={m}", "linear", empty(m, K), stored[0], *of_groups, None, "w8a16-g128-min")
    return found

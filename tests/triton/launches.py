"""Launches of every kernel at sizes of real layers, on tensors without memory."""

import torch

from qkernels import QuantScheme
from qkernels.triton import plans
from qkernels.triton.launch import Launch, Target

N, K = 4096, 4096


SCHEMES = ("w8a8", "w4a8-g32-asym", "w8a16", "w4a16-g128")


def real_launches(target: Target, schemes=SCHEMES, rows=(1, 2048)) -> dict[str, Launch]:
    """By a name that says scheme, rows of x and kernel."""
    found = {}

    def add(name: str, launches: list[Launch]) -> None:
        for launch in launches:
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
            add(name, plans.linear(empty(m, K), *stored, empty(N), scheme, None, target)[1])
            if m == 1:
                continue
            add(name, plans.linear_grad_input(empty(m, N), *stored, K, scheme, None, target)[1])
            columns = empty(K, dtype=torch.float32) if parsed.group_size else None
            q_grad, scales = empty(m, N, dtype=torch.int8), empty(m, dtype=torch.float32)
            if parsed.int_activations:
                grad = plans.int_grad_input(q_grad, scales, tuple(stored), K, scheme, columns, torch.bfloat16, target)
                add(name, grad[1])
        add(scheme, plans.dequantize_weight(*stored, K, scheme)[1])
        add(scheme, plans.column_scales(*stored, K, scheme)[1])
    q_grad, qx = empty(2048, N, dtype=torch.int8), empty(2048, K, dtype=torch.int8)
    add("M=2048", plans.int_grad_weight(q_grad, empty(N, dtype=torch.float32), qx, None, target)[1])
    return found

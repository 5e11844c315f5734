"""What results must be; and arguments that reach every kernel: aligned rows for every size of tile, and ragged ones."""

import op_samples
import reference_ops
import torch
from bounds import assert_within_bound
from helpers import assert_same_bits

from qkernels import QuantScheme, quantize_weight

FLOAT_SCHEMES = ("w8a16", "w8a16-g64", "w4a16", "w4a16-asym", "w4a16-g32-asym", "w4a16-g128")
INT_SCHEMES = ("w8a8", "w8a8-g32-ag64", "w4a8-asym", "w4a8-g64", "w4a8-g32-asym", "w4a8-g128-asym-ag32", "w8a8-ag128")
# Rows, columns, depth: with two processors for the three tiles of integers, and the two of floats and the row.
INT_SHAPES = ((5, 100, 288), (40, 70, 512), (140, 136, 160))
FLOAT_SHAPES = ((5, 100, 288), (70, 72, 160), (1, 37, 1184))
# Of int_grad_input the depth is the columns of the weight's result.
GRADIENTS = (("w8a8", (40, 96, 80)), ("w8a8", (130, 160, 272)), ("w4a8-g32-asym", (70, 160, 140)))

CASES = [("linear", scheme, shape, torch.float32) for scheme in INT_SCHEMES for shape in INT_SHAPES]
CASES += [
    ("linear", scheme, shape, dtype)
    for scheme in FLOAT_SCHEMES
    for shape in FLOAT_SHAPES
    for dtype in (torch.bfloat16, torch.float16)
]
CASES += [("int_grad_input", scheme, shape, torch.int8) for scheme, shape in GRADIENTS]
CASES += [
    (op, scheme, (3, columns), dtype)
    for op, scheme in (
        ("quantize_activation", "w8a8"),
        ("quantize_activation", "w8a8-ag64"),
        ("quantize_rows_stochastic", "w8a8"),
    )
    for columns, dtype in ((328, torch.float32), (9000, torch.bfloat16), (328, torch.float16))
]
CASES += [("linear", scheme, (3, 9, 77), torch.float32) for scheme in ("w8a8", "w8a8-g32", "w4a8-asym", "w4a8-g64")]
CASES += [
    ("linear", scheme, (3, 9, 77), dtype)
    for scheme in ("w8a16", "w8a16-g64", "w4a16", "w4a16-g32-asym")
    for dtype in (torch.bfloat16, torch.float16)
]
CASES += [("int_grad_input", "w8a8", (5, 47, 81), torch.int8)]
CASES += [
    (op, scheme, (3, 301), dtype)
    for op, scheme in (
        ("quantize_activation", "w8a8"),
        ("quantize_activation", "w8a8-ag64"),
        ("quantize_rows_stochastic", "w8a8"),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
IDS = ["-".join(map(str, (op, scheme, *shape, str(dtype)[6:]))) for op, scheme, shape, dtype in CASES]


def sample(op: str, scheme: str, shape: tuple[int, ...], dtype: torch.dtype) -> op_samples.Sample:
    """Random arguments; of shape (rows, columns of the result, depth), or that of x where there is no weight."""
    generator = torch.Generator().manual_seed(0)
    rows, n = shape[:2]
    label = f"{op} {scheme} {list(shape)} {dtype}"
    if op == "quantize_activation":
        return op_samples.Sample((torch.randn(shape, generator=generator).to(dtype), scheme), label)
    if op == "quantize_rows_stochastic":
        x, factors = torch.randn(shape, generator=generator).to(dtype), torch.rand(shape[1], generator=generator)
        return op_samples.Sample((x, factors, torch.tensor(7), 1), label)
    if op == "int_grad_input":
        weight = quantize_weight(torch.randn(n, shape[2], generator=generator), scheme)
        q_grad = torch.randint(-127, 128, (rows, n), dtype=torch.int8, generator=generator)
        columns = (
            None if QuantScheme.parse(scheme).row_scaled else reference_ops.column_scales(*weight, shape[2], scheme)
        )
        scales = torch.rand(rows, generator=generator)
        return op_samples.Sample((q_grad, scales, *weight, shape[2], scheme, columns), label)
    weight = quantize_weight(torch.randn(n, shape[2], generator=generator), scheme)
    x = torch.randn(rows, shape[2], generator=generator).to(dtype)
    return op_samples.Sample((x, *weight, torch.randn(n, generator=generator), scheme), label)


def check(op: str, scheme: str, sample: op_samples.Sample, actual) -> None:
    """Equal bits where integers are multiplied, the bound of a float sum otherwise."""
    if op == "linear" and scheme in op_samples.FLOAT_SCHEMES:
        x, *stored, bias = sample.args[:5]
        exact = op_samples.exact_weight(*stored, x.shape[1], scheme)
        assert_within_bound(as_tuple(actual)[0], x, exact, bias, sample.label)
        return
    expected = reference_ops.call(op, *sample.args)
    for result, wanted in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert_same_bits(result, wanted, sample.label)


def as_tuple(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)

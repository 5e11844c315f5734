"""Results do not depend on the batch, on the number of threads or on the bits that pad a row."""

import op_samples
import pytest
import torch
from helpers import assert_same_bits
from op_samples import INT_SCHEMES
from tiers import tiered

from qkernels import QuantScheme
from qkernels.kernels import ops

# One of each class of grouping.
CLASSES = [
    "w8a8",
    "w8a8-g32",
    "w8a8-ag128",
    "w8a8-g64-ag32",
    "w4a8",
    "w4a8-asym",
    "w4a8-g32-asym",
    "w4a8-g128-ag64",
    "w8a8s",
]


def arguments(scheme: str, rows: int, out_features: int, in_features: int):
    draw = op_samples.Draw(f"{scheme} {rows} {out_features} {in_features}")
    x = draw.floats(rows, in_features) * torch.exp2(draw.floats(rows, 1))
    return x, draw.weight(out_features, in_features, QuantScheme.parse(scheme)), draw.floats(out_features)


def linear(x: torch.Tensor, weight, bias: torch.Tensor, scheme: str) -> torch.Tensor:
    return ops.linear(x, *weight, bias, scheme, None, op_samples.x_scale_of(scheme))


@pytest.mark.parametrize("scheme", tiered(INT_SCHEMES))
def test_batch_invariance(each_isa, scheme):
    """Row i does not depend on its companions; the counts reach every kernel for few, some and many rows."""
    x, weight, bias = arguments(scheme, 150, 37, 161)
    x[3], x[77] = torch.nan, torch.inf
    whole = linear(x, weight, bias, scheme)
    for count in (1, 2, 5, 6, 8, 9, 13, 64, 65, 149):
        for start in {0, 3, 150 - count}:
            part = linear(x[start : start + count], weight, bias, scheme)
            assert_same_bits(part, whole[start : start + count], f"{each_isa} {scheme}: rows {start} + {count}")


@pytest.mark.parametrize("scheme", CLASSES)
@pytest.mark.parametrize("shape", [(1, 700, 515), (7, 333, 301), (61, 130, 515), (200, 70, 255), (129, 5, 64)])
def test_thread_count_invariance(each_isa, scheme, shape):
    x, weight, bias = arguments(scheme, *shape)
    results = []
    x_scale = op_samples.x_scale_of(scheme)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((linear(x, weight, bias, scheme), *ops.quantize_activation(x, scheme, x_scale)))
    for other in results[1:]:
        for one, more in zip(results[0], other, strict=True):
            assert_same_bits(more, one, f"{each_isa} {scheme} {shape}")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8-g32-asym"])
def test_threads_share_large_products(scheme):
    """Large enough for each thread's share to be cut into pieces, which others may take (NOTE [shares])."""
    x, weight, bias = arguments(scheme, 150, 1210, 515)
    torch.set_num_threads(1)
    expected = linear(x, weight, bias, scheme)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert_same_bits(linear(x, weight, bias, scheme), expected, f"{scheme} {threads}")


@pytest.mark.parametrize("scheme", CLASSES)
def test_integer_gradients_depend_on_neither_batch_nor_threads(each_isa, scheme):
    for rows, out_features, in_features in ((150, 37, 161), (9, 130, 515), (61, 515, 40)):
        _, weight, _ = arguments(scheme, rows, out_features, in_features)
        columns = ops.column_scales(*weight, in_features, scheme)
        fixed = (*weight, in_features, scheme, columns if "-g" in scheme else None)
        q_grad = torch.randint(-127, 128, (rows, out_features), dtype=torch.int8)
        grad_scales = torch.rand(rows)
        torch.set_num_threads(1)
        whole = ops.int_grad_input(q_grad, grad_scales, *fixed)
        for count in (1, 5, rows - 1):
            part = ops.int_grad_input(q_grad[-count:], grad_scales[-count:], *fixed)
            assert_same_bits(part, whole[-count:], f"{each_isa} {scheme}: {count} rows")
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(ops.int_grad_input(q_grad, grad_scales, *fixed), whole, f"{each_isa} {scheme} {threads}")
            assert_same_bits(ops.column_scales(*weight, in_features, scheme), columns, f"{each_isa} {scheme}")


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16-g32", "w4a8-g32-asym"])
@pytest.mark.parametrize("rows", [1, 5, 20, 100])
def test_float_products_repeat_on_the_same_threads(each_isa, scheme, rows):
    """Sums of floats may depend on the shape, but not on the run."""
    x, weight, bias = arguments(scheme, rows, 130, 150)
    grad_out = torch.randn(rows, 130)
    for call in (
        lambda: linear(x, weight, bias, scheme),
        lambda: ops.linear_grad_input(grad_out, *weight, 150, scheme),
    ):
        first = call()
        for _ in range(3):
            assert_same_bits(call(), first, f"{each_isa} {scheme} {rows}")


@pytest.mark.parametrize("scheme", ["w4a8", "w4a8-g32", "w4a16-asym", "w4a8-g64-asym", "w4a8-asym-ag32"])
@pytest.mark.parametrize("in_features", [1, 5, 33, 127, 193])
def test_pad_nibble_is_ignored(each_isa, scheme, in_features):
    for rows in (1, 8, 70):
        x, (qweight, scales, zeros), bias = arguments(scheme, rows, 21, in_features)
        grad_out = torch.randn(rows, 21)
        results = []
        for pad in (0x00, 0x80, 0xF0):
            qweight[:, -1] = (qweight[:, -1] & 0x0F) | pad
            weight = (qweight, scales, zeros)
            results.append(
                (
                    linear(x, weight, bias, scheme),
                    ops.linear_grad_input(grad_out, *weight, in_features, scheme),
                    ops.dequantize_weight(*weight, in_features, scheme),
                )
            )
        for other in results[1:]:
            for one, more in zip(results[0], other, strict=True):
                assert_same_bits(more, one, f"{each_isa} {scheme} {rows} x {in_features}")


@pytest.mark.parametrize("scheme", CLASSES)
def test_non_finite_rows_stay_alone(each_isa, scheme):
    for rows in (1, 6, 40, 100):
        x, weight, bias = arguments(scheme, rows, 33, 200)
        clean = linear(x, weight, bias, scheme)
        for column, value in ((0, torch.nan), (100, torch.inf), (199, -torch.inf)):
            broken = x.clone()
            broken[rows // 2, column] = value
            out = linear(broken, weight, bias, scheme)
            assert out[rows // 2].isnan().all(), f"{each_isa} {scheme} {rows}"
            keep = torch.arange(rows) != rows // 2
            assert_same_bits(out[keep], clean[keep], f"{each_isa} {scheme} {rows}")


@pytest.mark.parametrize("scheme", CLASSES)
def test_empty_shapes(each_isa, scheme):
    for rows, out_features in ((0, 7), (5, 0), (0, 0)):
        x, weight, bias = arguments(scheme, rows, out_features, 40)
        assert linear(x, weight, bias, scheme).shape == (rows, out_features)
        gradient = ops.linear_grad_input(torch.ones(rows, out_features), *weight, 40, scheme)
        assert_same_bits(gradient, torch.zeros(rows, 40))
        assert ops.dequantize_weight(*weight, 40, scheme).shape == (out_features, 40)
        assert ops.quantize_activation(x, scheme, op_samples.x_scale_of(scheme))[0].shape == (rows, 40)

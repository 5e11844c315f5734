"""Every op on every instruction set against the reference: equal bits, or within the bound of a float sum."""

import inspect

import op_samples
import pytest
import reference_ops
import torch
from helpers import BFLOAT16_ISAS, assert_same_bits, assert_within_float_bound
from op_samples import (
    FLOAT_SCHEMES,
    INT_SCHEMES,
    OP_SCHEMES,
    SAMPLERS,
    SCHEMES,
    exact_weight,
    expected,
    magnitudes,
    results,
    samples,
)
from tiers import tiered

from qkernels import QuantScheme
from qkernels.formats.rules import quantize_weight
from qkernels.formats.storage import FLOAT_DTYPES
from qkernels.kernels import checks, isa, ops, reference
from qkernels.kernels.arguments import LossOptions

OPS = torch.ops.qkernels


def registered_ops() -> list[str]:
    """Names of all schemas in our namespace."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(
        {name.removeprefix("qkernels::").partition(".")[0] for name in names if name.startswith("qkernels::")}
    )


def test_all_ops_are_complete():
    """An op without reference, fake kernel, wrapper or samples must not exist."""
    assert registered_ops() == sorted(SAMPLERS)


@pytest.mark.parametrize("op", registered_ops())
def test_op_has_reference_fake_and_samples(op):
    schema = [argument.name for argument in getattr(OPS, op).default._schema.arguments]
    bundled = schema
    if "qweight" in schema:
        parts = ("scales", "zeros", "in_features", "scheme", "x_scale")
        bundled = ["weight" if name == "qweight" else name for name in schema if name not in parts]
    if op == "int_grad_input":
        bundled = ["grad", *bundled[2:]]
    if op == "linear_cross_entropy":
        bundled = [*bundled[: -len(LossOptions._fields)], "options"]
    for module in (reference, checks):
        assert list(inspect.signature(getattr(module, op)).parameters) == bundled
    assert list(inspect.signature(getattr(ops, op)).parameters) == schema
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{op}", "Meta")
    assert all(any(samples(op, scheme, 1)) for scheme in OP_SCHEMES[op])


@pytest.mark.parametrize("op", registered_ops())
def test_fake_kernel_predicts_the_result(op):
    for scheme in OP_SCHEMES[op]:
        for args, label in samples(op, scheme, 2):
            fake = results(op, tuple(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
            for a, b in zip(results(op, args), fake, strict=True):
                assert b.is_meta
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), label


@pytest.mark.parametrize("op", registered_ops())
@pytest.mark.parametrize("index", [0, -1])
def test_opcheck(op, index):
    scheme = OP_SCHEMES[op][index]
    finite = [
        args
        for args, _ in samples(op, scheme)
        if args[0].numel() < 30_000 and all(a.isfinite().all() for a in args if isinstance(a, torch.Tensor))
    ]
    assert len(finite) >= 3  # opcheck compares NaN as unequal
    for args in finite[:3]:
        torch.library.opcheck(getattr(OPS, op).default, op_samples.schema_args(args))


def assert_equals_reference(op: str, scheme: str, count: int, isa: str) -> None:
    for (args, label), expected_results in expected(op, scheme, count):
        for a, b in zip(results(op, args), expected_results, strict=True):
            assert_same_bits(a, b, f"{isa} {label}")


@pytest.mark.parametrize("scheme", tiered(INT_SCHEMES))
def test_linear_equals_reference(each_isa, scheme):
    assert_equals_reference("linear", scheme, 10, each_isa)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-ag64", "w4a8", "w4a8-g128", "w4a8-g32-asym", "w4a8-g64-ag32"])
def test_products_deeper_than_a_block_equal_reference(each_isa, scheme):
    """So deep, and of so many rows, that every driver cuts the depth and the rows into blocks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(270, 8333, generator=generator)
    stored = quantize_weight(torch.randn(70, 8333, generator=generator), QuantScheme.parse(scheme))
    assert_same_bits(ops.linear(x, *stored, None, scheme), reference_ops.linear(x, *stored, None, scheme))


@pytest.mark.parametrize("scheme", tiered([name for name in OP_SCHEMES["conv"] if name in INT_SCHEMES]))
def test_conv_equals_reference(each_isa, scheme):
    assert_equals_reference("conv", scheme, 10, each_isa)


@pytest.mark.parametrize("scheme", OP_SCHEMES["quantize_activation"])
def test_quantize_activation_equals_reference(each_isa, scheme):
    assert_equals_reference("quantize_activation", scheme, 40, each_isa)


@pytest.mark.parametrize("scheme", tiered(FLOAT_SCHEMES))
def test_dequantize_weight_equals_reference(each_isa, scheme):
    assert_equals_reference("dequantize_weight", scheme, 16, each_isa)


@pytest.mark.parametrize("scheme", tiered(FLOAT_SCHEMES))
def test_column_scales_equal_reference(each_isa, scheme):
    assert_equals_reference("column_scales", scheme, 10, each_isa)


@pytest.mark.parametrize("scheme", tiered(SCHEMES))
def test_int_grad_input_equals_reference(each_isa, scheme):
    assert_equals_reference("int_grad_input", scheme, 8, each_isa)


@pytest.mark.parametrize("scheme", tiered(INT_SCHEMES))
def test_linear_cross_entropy_equals_reference(each_isa, scheme):
    assert_equals_reference("linear_cross_entropy", scheme, 5, each_isa)


@pytest.mark.parametrize("scheme", tiered(INT_SCHEMES))
def test_linear_with_saved_input_equals_reference(each_isa, scheme):
    assert_equals_reference("linear_with_saved_input", scheme, 6, each_isa)


@pytest.mark.parametrize("scheme", tiered(FLOAT_SCHEMES))
def test_quantize_weight_equals_reference(each_isa, scheme):
    assert_equals_reference("quantize_weight", scheme, 12, each_isa)


@pytest.mark.parametrize("scheme", tiered(OP_SCHEMES["mask_clipped"]))
def test_mask_clipped_equals_reference(each_isa, scheme):
    assert_equals_reference("mask_clipped", scheme, 12, each_isa)


@pytest.mark.parametrize("op", ["quantize_weight_scaled", "scale_gradient"])
def test_given_scales_equal_reference(each_isa, op):
    for scheme in OP_SCHEMES[op]:
        assert_equals_reference(op, scheme, 12, each_isa)


def test_large_results_equal_reference(each_isa):
    """From 16 MB on results are stored past the caches, in whole lines where they are aligned."""
    for rows, depth, columns in ((4100, 5, 2112), (2050, 9, 4101)):
        q_grad = torch.randint(-127, 128, (rows, depth), dtype=torch.int8)
        qx = torch.randint(-127, 128, (depth, columns), dtype=torch.int8)
        args = (q_grad, torch.rand(rows), qx, torch.ones(depth, 1), None, columns, "w8a8")
        for dtype in (torch.float32, torch.bfloat16):
            expected = reference_ops.int_grad_input(*args, out_dtype=dtype)
            assert_same_bits(ops.int_grad_input(*args, out_dtype=dtype), expected, f"{each_isa} {rows} x {columns}")


@pytest.mark.parametrize("op", ["quantize_rows_stochastic", "quantize_columns_stochastic"])
def test_stochastic_rounding_equals_reference(each_isa, op):
    for scheme in OP_SCHEMES[op]:
        assert_equals_reference(op, scheme, 20, each_isa)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
def test_int_grad_input_rounds_to_any_dtype(each_isa, scheme, dtype):
    for args, label in samples("int_grad_input", scheme, 8):
        expected = reference_ops.int_grad_input(*args, out_dtype=dtype)
        assert_same_bits(ops.int_grad_input(*args, out_dtype=dtype), expected, f"{each_isa} {label}")
        fake = ops.int_grad_input(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args), out_dtype=dtype)
        assert (fake.dtype, fake.shape) == (dtype, expected.shape)


@pytest.mark.parametrize("scheme", ["w8a8-g32", "w4a8-g64-asym"])
def test_int_grad_input_of_a_broken_weight(each_isa, scheme):
    """A column that holds Inf or NaN becomes NaN and leaves the others alone."""
    draw = op_samples.Draw(f"broken {scheme}")
    qweight, scales, zeros = draw.weight(33, 300, QuantScheme.parse(scheme))
    scales[3, 0], scales[32, 2] = torch.inf, torch.nan
    weight = (qweight.contiguous(), scales, zeros, 300, scheme)
    columns = ops.column_scales(*weight)
    assert_same_bits(columns, reference_ops.column_scales(*weight), each_isa)
    assert columns.isnan().any() and columns.isfinite().any()
    q_grad = torch.randint(-127, 128, (70, 33), dtype=torch.int8, generator=draw.generator)
    args = (q_grad, draw.floats(70), *weight, columns)
    out = ops.int_grad_input(*args)
    assert_same_bits(out, reference_ops.int_grad_input(*args), each_isa)
    assert torch.equal(out.isnan(), columns.isnan().expand(70, -1))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-g128", "w4a8-asym"])
def test_int_grad_input_without_output_features(each_isa, scheme):
    shapes = QuantScheme.parse(scheme).storage_shapes(40, 0)
    qweight = torch.zeros(shapes["qweight"], dtype=torch.int8 if scheme.startswith("w8") else torch.uint8)
    zeros = torch.zeros(shapes["zeros"], dtype=torch.uint8) if "zeros" in shapes else None
    weight = (qweight, torch.zeros(shapes["scales"]), zeros, 40, scheme)
    columns = ops.column_scales(*weight)
    assert_same_bits(columns, torch.ones(40))
    grad_scales = torch.tensor([1.0, torch.nan])
    args = (torch.zeros(2, 0, dtype=torch.int8), grad_scales, *weight, columns if "-g" in scheme else None)
    out = ops.int_grad_input(*args)
    assert_same_bits(out, reference_ops.int_grad_input(*args), each_isa)
    assert_same_bits(out, torch.zeros(2, 40) * grad_scales[:, None], each_isa)


@pytest.mark.parametrize("scheme", tiered(FLOAT_SCHEMES))
def test_float_linear_is_within_its_bound(each_isa, scheme):
    for args, label in samples("linear", scheme, 10):
        x, *weight, bias, name, _ = args
        bias = None if bias is None else bias.to(torch.float64)
        exact = exact_weight(*weight, x.shape[1], name)
        sizes = magnitudes(*weight, x.shape[1], name)
        assert_within_float_bound(ops.linear(*args), x, exact, bias, f"{each_isa} {label}", magnitudes=sizes)


@pytest.mark.parametrize("scheme", tiered(FLOAT_SCHEMES))
def test_float_conv_is_within_its_bound(each_isa, scheme):
    """As the products of patches, group by group."""
    for args, label in samples("conv", scheme, 6):
        out = ops.conv(*args).flatten(0, 2)
        for rows, patches, exact, bias, sizes in op_samples.conv_products(args):
            assert_within_float_bound(out[:, rows], patches, exact, bias, f"{each_isa} {label}", magnitudes=sizes)


@pytest.mark.parametrize("scheme", tiered(SCHEMES))
def test_linear_grad_input_is_within_its_bound(each_isa, scheme):
    for args, label in samples("linear_grad_input", scheme, 6):
        grad_out, *weight, in_features, name, _ = args
        exact = exact_weight(*weight, in_features, name).t()
        gradient, sizes = ops.linear_grad_input(*args), magnitudes(*weight, in_features, name).t()
        words = f"{each_isa} {label}"
        assert_within_float_bound(gradient, grad_out, exact, None, words, gradient=True, magnitudes=sizes)


@pytest.mark.parametrize("name", [name for name in isa.supported() if name in BFLOAT16_ISAS])
@pytest.mark.parametrize("scheme", tiered(SCHEMES))
def test_bfloat16_gradient_rounds_the_weight_and_nothing_else(name, scheme):
    for rows, out_features, in_features in ((1, 1, 1), (13, 70, 161), (5, 1029, 40)):
        draw = op_samples.Draw(f"bfloat16 {scheme} {rows}")
        weight = draw.weight(out_features, in_features, QuantScheme.parse(scheme))
        grad_out = draw.floats(rows, out_features).bfloat16()
        with isa.force(name):
            gradient = ops.linear_grad_input(grad_out, *weight, in_features, scheme, torch.float32)
            rounded = ops.dequantize_weight(*weight, in_features, scheme).bfloat16().double()
            assert_within_float_bound(gradient, grad_out, rounded.t(), None, f"{name} {scheme}")


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32-asym"])
def test_bfloat16_around_the_smallest_normal_number(each_isa, scheme):
    """Bfloat16 instructions take subnormal numbers for zeros."""
    draw = op_samples.Draw(f"subnormal {scheme}")
    weight = draw.weight(70, 161, QuantScheme.parse(scheme))
    exact, powers = exact_weight(*weight, 161, scheme), torch.exp2(torch.arange(-140.0, -114.0, 2.0))[:, None]
    x, grad_out = (draw.floats(13, 161) * powers).bfloat16(), (draw.floats(13, 70) * powers).bfloat16()
    out = ops.linear(x, *weight, None, scheme, torch.float32)
    assert_within_float_bound(out, x, exact, None, f"{each_isa} {scheme}")
    gradient = ops.linear_grad_input(grad_out, *weight, 161, scheme, torch.float32)
    assert_within_float_bound(gradient, grad_out, exact.t(), None, f"{each_isa} {scheme}", gradient=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32-asym"])
def test_parts_of_a_float_product_give_the_bits_of_the_whole(each_isa, scheme, dtype):
    """Many rows are packed in blocks, and many of great depth in ranges of it; 16 rows are packed at once."""
    draw = op_samples.Draw(f"parts {scheme}")
    deep, wide = draw.weight(5, 45003, QuantScheme.parse(scheme)), draw.weight(33, 70, QuantScheme.parse(scheme))
    x, tall = draw.floats(400, 45003).to(dtype), draw.floats(9300, 70).to(dtype)
    for rows, weight in ((x, deep), (tall, wide)):
        out = ops.linear(rows, *weight, None, scheme, torch.float32)
        for first in (0, 100, len(rows) - 16):
            part = ops.linear(rows[first : first + 16], *weight, None, scheme, torch.float32)
            assert_same_bits(out[first : first + 16], part, f"{each_isa} {scheme} row {first}")
    grad_out, weight = draw.floats(400, 45003).to(dtype), draw.weight(45003, 5, QuantScheme.parse(scheme))
    gradient = ops.linear_grad_input(grad_out, *weight, 5, scheme, torch.float32)
    part = ops.linear_grad_input(grad_out[200:216], *weight, 5, scheme, torch.float32)
    assert_same_bits(gradient[200:216], part, f"{each_isa} {scheme} gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", tiered(FLOAT_SCHEMES))
def test_non_finite_rows_of_float_products(each_isa, scheme, dtype):
    """NaN and Inf come out where a float product has them, and nowhere else."""
    for rows, out_features, in_features in ((1, 5, 33), (9, 17, 65), (70, 33, 100)):
        draw = op_samples.Draw(f"non-finite {scheme} {rows}")
        weight = draw.weight(out_features, in_features, QuantScheme.parse(scheme))
        x = draw.floats(rows, in_features).to(dtype)
        x[0, in_features // 2], x[rows // 2, 0], x[rows - 1, -1] = torch.nan, torch.inf, -torch.inf
        actual = ops.linear(x, *weight, None, scheme, torch.float32)
        expected = x.double() @ exact_weight(*weight, in_features, scheme).t()
        broken = ~expected.isfinite()
        assert_same_bits(actual[broken], expected[broken].float(), f"{each_isa} {scheme} forward")
        assert actual[~broken].isfinite().all()

        grad_out = draw.floats(rows, out_features).to(dtype)
        grad_out[0, out_features // 2], grad_out[rows - 1, -1] = torch.nan, torch.inf
        actual = ops.linear_grad_input(grad_out, *weight, in_features, scheme, torch.float32)
        expected = grad_out.double() @ exact_weight(*weight, in_features, scheme)
        broken = ~expected.isfinite()
        assert_same_bits(actual[broken], expected[broken].float(), f"{each_isa} {scheme} backward")
        assert actual[~broken].isfinite().all()


@pytest.mark.parametrize("op", registered_ops())
def test_instruction_sets_share_no_state(op):
    """A call leaves its arguments as they were and returns fresh, contiguous memory."""
    for scheme in OP_SCHEMES[op][:: len(OP_SCHEMES[op]) // 4]:
        for args, label in samples(op, scheme, 3):
            before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            first, second = results(op, args), results(op, args)
            for a, b in zip(args, before, strict=True):
                if isinstance(a, torch.Tensor):
                    assert_same_bits(a, b, label)
            for a, b in zip(first, second, strict=True):
                assert_same_bits(a, b, label)
                assert a.is_contiguous()
                assert a.numel() == 0 or a.data_ptr() != b.data_ptr()

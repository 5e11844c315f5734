"""Products of fused experts: the bits of `linear` on each expert's rows, on every instruction set."""

import op_samples
import pytest
import reference_ops
import torch
from helpers import assert_same_bits, assert_within_float_bound
from op_samples import FLOAT_SCHEMES, INT_SCHEMES, SCHEMES, exact_weight, expected, magnitudes, results, samples
from tiers import tiered

from qkernels import QuantScheme
from qkernels.kernels import ops, reference

EXPERTS, N, K = 9, 37, 161
# Rows of each expert: none, one, few, some, many, and some more that belong to none.
COUNTS = (3, 0, 1, 70, 0, 4, 17, 2, 0)
UNUSED = 5
# One of each class of grouping.
CLASSES = ["w8a8", "w8a8-g64-ag32", "w4a8-asym", "w4a8-g32-asym"]


def of_expert(weight: tuple, expert: int) -> tuple:
    return tuple(None if tensor is None else tensor[expert] for tensor in weight)


def arguments(scheme: str, dtype: torch.dtype = torch.float32):
    draw = op_samples.Draw(f"experts {scheme}")
    offsets = torch.tensor(COUNTS).cumsum(0)
    x = (draw.floats(40, K) * torch.exp2(draw.floats(40, 1))).to(dtype)
    rows = torch.randint(40, (sum(COUNTS) + UNUSED,), generator=draw.generator)
    weight = op_samples.expert_weights(draw, EXPERTS, N, K, QuantScheme.parse(scheme))
    return x, rows, offsets, weight, draw.floats(EXPERTS, N)


def slices(offsets: torch.Tensor):
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        yield expert, slice(begin, end)
        begin = end


@pytest.mark.parametrize("scheme", tiered(INT_SCHEMES))
def test_grouped_linear_equals_reference(each_isa, scheme):
    for (args, label), wanted in expected("grouped_linear", scheme, 8):
        for a, b in zip(results("grouped_linear", args), wanted, strict=True):
            assert_same_bits(a, b, f"{each_isa} {label}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", tiered(INT_SCHEMES))
def test_grouped_linear_equals_unfused_products(each_isa, scheme, dtype):
    x, rows, offsets, weight, bias = arguments(scheme, dtype)
    x_scale = op_samples.x_scale_of(scheme)
    out = ops.grouped_linear(x, offsets, *weight, bias, scheme, rows=rows, x_scale=x_scale)
    for expert, part in slices(offsets):
        one = ops.linear(x[rows[part]], *of_expert(weight, expert), bias[expert], scheme, x_scale=x_scale)
        assert_same_bits(out[part], one, f"{each_isa} {scheme} expert {expert}")
    assert_same_bits(out[offsets[-1] :], torch.zeros(UNUSED, N, dtype=dtype))


@pytest.mark.parametrize("scheme", tiered(FLOAT_SCHEMES))
def test_grouped_float_products_are_within_their_bound(each_isa, scheme):
    for args, label in samples("grouped_linear", scheme, 6):
        x, offsets, *weight, bias, name, _, rows = args
        out = results("grouped_linear", args)[0]
        taken = x if rows is None else x[rows]
        for expert, part in slices(offsets):
            exact = exact_weight(*of_expert(weight, expert), x.shape[1], name)
            own = None if bias is None else bias[expert].double()
            words = f"{each_isa} {label} expert {expert}"
            sizes = magnitudes(*of_expert(weight, expert), x.shape[1], name)
            assert_within_float_bound(out[part], taken[part], exact, own, words, magnitudes=sizes)
        assert not out[offsets[-1] :].any()


@pytest.mark.parametrize("scheme", tiered(SCHEMES))
def test_grouped_gradient_is_within_its_bound(each_isa, scheme):
    for args, label in samples("grouped_linear_grad_input", scheme, 6):
        grad_out, offsets, *weight, in_features, name, seed, _ = args
        if seed is not None:
            continue
        out = results("grouped_linear_grad_input", args)[0]
        for expert, part in slices(offsets):
            exact = exact_weight(*of_expert(weight, expert), in_features, name).t()
            words = f"{each_isa} {label} expert {expert}"
            sizes = magnitudes(*of_expert(weight, expert), in_features, name).t()
            assert_within_float_bound(out[part], grad_out[part], exact, None, words, gradient=True, magnitudes=sizes)
        assert not out[offsets[-1] :].any()


@pytest.mark.parametrize("scheme", tiered(SCHEMES))
def test_grouped_gradient_of_integers_equals_reference(each_isa, scheme):
    rounded = 0
    for (args, label), wanted in expected("grouped_linear_grad_input", scheme, 6):
        if args[-2] is not None:
            rounded += 1
            assert_same_bits(results("grouped_linear_grad_input", args)[0], wanted[0], f"{each_isa} {label}")
    assert rounded


@pytest.mark.parametrize("scheme", op_samples.OP_SCHEMES["grouped_linear_grad_weight"])
def test_gradients_of_experts_weights(each_isa, scheme):
    """From integers: the bits of the reference; from floats: within the bound of their sum."""
    for (args, label), wanted in expected("grouped_linear_grad_weight", scheme, 8):
        grad_out, offsets, qx, x_scales, rows, seed = args
        out = results("grouped_linear_grad_weight", args)[0]
        if seed is not None:
            assert_same_bits(out, wanted[0], f"{each_isa} {label}")
            continue
        x = qx.double() * x_scales.double().unsqueeze(1)
        taken = x if rows is None else x[rows]
        for expert, part in slices(offsets):
            words = f"{each_isa} {label} expert {expert}"
            assert_within_float_bound(out[expert], grad_out[part].t(), taken[part].t(), None, words, gradient=True)


def test_gradients_of_more_terms_than_integers_can_sum(each_isa):
    """Rule 10: blocks of 65536 rows of an expert, and of output features."""
    generator = torch.Generator().manual_seed(0)
    rows, seed = reference.LONG_SUM + 70, torch.tensor(5)
    grad_out = torch.randn(rows, 3, generator=generator)
    qx = torch.randint(-127, 128, (rows, 5), dtype=torch.int8, generator=generator)
    args = (grad_out, torch.tensor([2, rows]), qx, torch.rand(rows, generator=generator), None, seed)
    out = ops.grouped_linear_grad_weight(*args, out_dtype=torch.bfloat16)
    assert_same_bits(out, reference_ops.grouped_linear_grad_weight(*args, out_dtype=torch.bfloat16), each_isa)
    wide = (qx.unsqueeze(0), torch.rand(1, rows, 1, generator=generator), None, 5, "w8a8", seed)
    args = (grad_out.t(), torch.tensor([3]), *wide)
    assert_same_bits(ops.grouped_linear_grad_input(*args), reference_ops.grouped_linear_grad_input(*args), each_isa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_outer_is_the_product_of_each_experts_rows(dtype):
    grad_out, x = torch.randn(12, 5).to(dtype), torch.randn(4, 7).to(dtype)
    rows, offsets = torch.randint(4, (12,)), torch.tensor([3, 3, 10])
    out = ops.grouped_outer(grad_out, offsets, x, rows)
    for expert, part in slices(offsets):
        torch.testing.assert_close(out[expert], grad_out[part].t() @ x[rows[part]])


@pytest.mark.parametrize("scheme", CLASSES)
def test_experts_and_threads_do_not_change_the_bits(each_isa, scheme):
    """What an expert gives depends neither on the other experts, nor on its companions, nor on the threads."""
    x, rows, offsets, weight, bias = arguments(scheme)
    whole = ops.grouped_linear(x, offsets, *weight, bias, scheme, rows=rows)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(ops.grouped_linear(x, offsets, *weight, bias, scheme, rows=rows), whole, f"{threads} threads")
    for expert, part in slices(offsets):
        for count in {1, part.stop - part.start} if part.stop > part.start else ():
            alone = torch.where(torch.arange(EXPERTS) >= expert, count, 0)
            one = ops.grouped_linear(x, alone, *weight, bias, scheme, rows=rows[part][:count])
            assert_same_bits(one, whole[part][:count], f"{each_isa} {scheme} expert {expert}, {count} rows")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w4a8-g32-asym"])
def test_no_tokens_no_experts_no_features(each_isa, scheme):
    x, rows, offsets, weight, bias = arguments(scheme)
    none = torch.zeros(EXPERTS, dtype=torch.int64)
    assert ops.grouped_linear(x[:0], none, *weight, bias, scheme).shape == (0, N)
    assert ops.grouped_linear(x, none, *weight, bias, scheme, rows=rows[:0]).shape == (0, N)
    assert_same_bits(ops.grouped_linear(x, none, *weight, bias, scheme), torch.zeros(len(x), N))
    narrow = [None if tensor is None else tensor[:, :0] for tensor in weight]
    assert ops.grouped_linear(x, offsets, *narrow, bias[:, :0], scheme, rows=rows).shape == (len(rows), 0)
    gradient = ops.grouped_linear_grad_input(torch.ones(len(rows), 0), offsets, *narrow, K, scheme)
    assert_same_bits(gradient, torch.zeros(len(rows), K))
    no_experts = [None if tensor is None else tensor[:0] for tensor in weight]
    out = ops.grouped_linear(x, none[:0], *no_experts, bias[:0], scheme)
    assert_same_bits(out, torch.zeros(len(x), N))


@pytest.mark.parametrize("value", [[1, 3, 2], [-1, 2, 3], [1, 2, 5], [1, 2, -(2**63)]])
def test_offsets_that_do_not_ascend_are_refused(value):
    weight = (torch.ones(3, 2, 4, dtype=torch.int8), torch.ones(3, 2, 1), None)
    offsets = torch.tensor(value)
    with pytest.raises(RuntimeError, match="offsets must ascend from 0 to at most 4, got"):
        ops.grouped_linear(torch.ones(4, 4), offsets, *weight, None, "w8a8")
    with pytest.raises(RuntimeError, match="offsets must ascend from 0 to at most 4, got"):
        ops.grouped_linear_grad_input(torch.ones(4, 2), offsets, *weight, 4, "w8a8")


@pytest.mark.parametrize("value", [-1, 4])
def test_rows_that_x_has_not_are_refused(value):
    weight = (torch.ones(1, 2, 4, dtype=torch.int8), torch.ones(1, 2, 1), None)
    rows = torch.tensor([0, value])
    with pytest.raises(RuntimeError, match=rf"rows must be in \[0, 4\), got {value} at position 1"):
        ops.grouped_linear(torch.ones(4, 4), torch.tensor([2]), *weight, None, "w8a8", rows=rows)

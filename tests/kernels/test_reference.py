"""The reference itself, against the numeric rules written in NumPy, and integer sums at their limits."""

import numpy as np
import numpy_rules as rules
import op_samples
import pytest
import reference_ops
import torch
from helpers import assert_same_bits, assert_within_float_bound, one_thread
from op_samples import FLOAT_SCHEMES, INT_SCHEMES
from tiers import tiered

from qkernels import QuantScheme
from qkernels.formats import philox
from qkernels.formats.storage import MAX_REDUCTION
from qkernels.kernels import ops


def to_numpy(tensor):
    return None if tensor is None else tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype)


@pytest.mark.parametrize("scheme", tiered(INT_SCHEMES))
def test_linear_follows_the_rules(scheme):
    torch.set_num_threads(1)
    for (x, qweight, scales, zeros, bias, name, _, *x_scale), label in [*op_samples.samples("linear", scheme, 6)][:-1]:
        arrays = [None if t is None else to_numpy(t).numpy() for t in (x, qweight, scales, zeros, bias)]
        arrays[0] = np.ascontiguousarray(arrays[0])
        with np.errstate(over="ignore", invalid="ignore"):
            expected = rules.linear(*arrays, QuantScheme.parse(name), *(scale.numpy() for scale in x_scale))
        args = (x, qweight, scales, zeros, bias, name)
        assert_same_bits(reference_ops.linear(*args, torch.float32, *x_scale), torch.from_numpy(expected), label)
        bits = torch.from_numpy(rules.bfloat16_bits(expected).view(np.int16)).view(torch.bfloat16)
        assert_same_bits(reference_ops.linear(*args, torch.bfloat16, *x_scale), bits, label)
        with np.errstate(over="ignore"):
            half = torch.from_numpy(expected.astype(np.float16))
        assert_same_bits(reference_ops.linear(*args, torch.float16, *x_scale), half, label)


@pytest.mark.parametrize("scheme", tiered(INT_SCHEMES))
def test_int_grad_input_follows_the_rules(scheme):
    torch.set_num_threads(1)
    for args, label in [*op_samples.samples("int_grad_input", scheme, 4)][:-1]:
        *tensors, in_features, name, _ = args
        arrays = [None if t is None else t.contiguous().numpy() for t in tensors]
        expected = rules.int_grad_input(*arrays, in_features, QuantScheme.parse(name))
        assert_same_bits(reference_ops.int_grad_input(*args), torch.from_numpy(expected), label)


# From the file kat_vectors of the Random123 library.
PHILOX_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    assert tuple(rules.philox(counter, key)) == words
    result = philox.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(word.item() for word in result) == words


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**40) - 5])
def test_stochastic_rounding_follows_the_rule(each_isa, seed):
    draw = op_samples.Draw(f"stochastic {seed}")
    x, factors = draw.floats(9, 70), draw.floats(70)
    x[1], x[4, 3], x[6] = 0.0, torch.inf, -x[6].abs()
    x[6, 0] = -127.0000153  # 127 / absmax rounds up: the value lies below -127
    for given in (None, factors):
        with np.errstate(invalid="ignore"):
            expected = rules.quantize_rows_stochastic(x.numpy(), None if given is None else given.numpy(), seed, 5)
        expected = [torch.from_numpy(array) for array in expected]
        for a, b in zip(ops.quantize_rows_stochastic(x, given, torch.tensor(seed), 5), expected, strict=True):
            assert_same_bits(a, b, each_isa)


def test_columns_use_the_random_numbers_of_their_places(each_isa):
    """With equal ranges everywhere, transposing is all there is between rows and columns."""
    x = op_samples.Draw("places").floats(70, 130).clamp(-2, 2)
    x[:, 0] = x[0] = 2.0
    seed = torch.tensor(7)
    rows, columns = (
        ops.quantize_rows_stochastic(x, None, seed, 1)[0],
        ops.quantize_columns_stochastic(x, None, seed, 1)[0],
    )
    assert_same_bits(columns, rows.t().contiguous(), each_isa)


@pytest.mark.parametrize("scheme", ["w8a8-g32", "w4a8-g32-asym", "w4a8-g128"])
def test_requantized_columns_stay_close_to_the_weight(scheme):
    """A gradient of one row of the weight reads it back, to half a step of each column."""
    draw = op_samples.Draw(f"close {scheme}")
    weight = (*draw.weight(60, 200, QuantScheme.parse(scheme)), 200, scheme)
    columns = reference_ops.column_scales(*weight)
    q_grad, grad_scales = 127 * torch.eye(60, dtype=torch.int8), torch.full((60,), 1 / 127)
    back = ops.int_grad_input(q_grad, grad_scales, *weight, columns)
    assert ((back - reference_ops.dequantize_weight(*weight)).abs() <= 0.50001 * columns).all()


@pytest.mark.parametrize("scheme", tiered(FLOAT_SCHEMES))
def test_float_products_are_within_their_bound(scheme):
    torch.set_num_threads(1)
    for args, label in op_samples.samples("linear", scheme, 4):
        x, *weight, bias, name, _ = args
        exact, bias = op_samples.exact_weight(*weight, x.shape[1], name), None if bias is None else bias.double()
        sizes = op_samples.magnitudes(*weight, x.shape[1], name)
        assert_within_float_bound(reference_ops.linear(*args), x, exact, bias, label, magnitudes=sizes)
    for args, label in op_samples.samples("linear_grad_input", scheme, 4):
        grad_out, *weight, in_features, name, _ = args
        exact, sizes = (of(*weight, in_features, name).t() for of in (op_samples.exact_weight, op_samples.magnitudes))
        gradient = reference_ops.linear_grad_input(*args)
        assert_within_float_bound(gradient, grad_out, exact, None, label, magnitudes=sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_16_bit_value_is_read_and_written_exactly(each_isa, dtype):
    """x = v as the only column and a weight of 1 gives 127 * scale; subnormals and the largest values included."""
    if dtype == torch.float32:
        values = torch.randint(-(2**31), 2**31 - 1, (2**16,), dtype=torch.int32).view(torch.float32)
    else:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    weight = (torch.tensor([[127]], dtype=torch.int8), torch.tensor([[1 / 127]]), None)
    for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
        args = (values[:, None], *weight, None, "w8a8", out_dtype)
        assert_same_bits(ops.linear(*args), reference_ops.linear(*args), f"{each_isa} {dtype} to {out_dtype}")
    q, scales = ops.quantize_activation(values[:, None], "w8a8")
    expected_q, expected_scales = reference_ops.quantize_activation(values[:, None], "w8a8")
    assert_same_bits(q, expected_q, f"{each_isa} {dtype}")
    assert_same_bits(scales, expected_scales, f"{each_isa} {dtype}")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8-asym", "w4a8-g128-asym", "w8a8-ag128"])
@pytest.mark.parametrize("rows", [1, 3, 13])
def test_sums_at_the_limit_are_exact(each_isa, scheme, rows):
    """The largest integers at the largest K: the int32 sum is up to 131072 * 127 * 128 = 2^31 - 2^24."""
    parsed, columns = QuantScheme.parse(scheme), MAX_REDUCTION
    x = torch.ones(rows, columns)
    x[rows // 2] = -1.0
    shapes = parsed.storage_shapes(columns, 3)
    if parsed.weight_bits == 8:
        qweight, extreme = torch.full(shapes["qweight"], -128, dtype=torch.int8), 128
        qweight[1] = 127
    else:
        qweight, extreme = torch.full(shapes["qweight"], 0xFF, dtype=torch.uint8), 7 if parsed.symmetric else 15
        qweight[1] = 0
    zeros = None if parsed.symmetric else torch.zeros(shapes["zeros"], dtype=torch.uint8)
    if zeros is not None:
        zeros[1] = 15
    args = (x, qweight, torch.ones(shapes["scales"]), zeros, None, scheme)
    out = ops.linear(*args)
    with one_thread():
        assert_same_bits(out, reference_ops.linear(*args), f"{each_isa} {scheme}")
    if not parsed.group_size and not parsed.act_group_size:
        top = np.float32(columns * 127 * extreme) * (np.float32(1) / np.float32(127))
        assert out[-1 if rows > 1 else 0, 0].abs().item() == top


@pytest.mark.parametrize("rows", [3, 70])
def test_sums_of_a_gradient_at_the_limit_are_exact(each_isa, rows):
    """Over as many output features: 131072 weights of -128 sum to -2^24, whose shift by 128 is 2^31."""
    qweight = torch.full((MAX_REDUCTION, 3), -128, dtype=torch.int8)
    qweight[:, 1] = 127
    q_grad = torch.full((rows, MAX_REDUCTION), 127, dtype=torch.int8)
    q_grad[rows // 2] = -127
    args = (q_grad, torch.ones(rows), qweight, torch.ones(MAX_REDUCTION, 1), None, 3, "w8a8")
    out = ops.int_grad_input(*args)
    with one_thread():
        assert_same_bits(out, reference_ops.int_grad_input(*args), each_isa)
    assert out[0].tolist() == [MAX_REDUCTION * 127.0 * w for w in (-128, 127, -128)]


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-g32"])
@pytest.mark.parametrize("rows", [1, 4, 9, 40])
def test_the_smallest_8_bit_integer_saturates_nowhere(each_isa, scheme, rows):
    """-128 in every place, or in every other one, with x of the largest magnitude and either sign."""
    columns = 301
    qweight = torch.full((35, columns), -128, dtype=torch.int8)
    qweight[1::3, ::2], qweight[2::3, 1::2] = 127, -1
    signs = torch.where(torch.arange(rows * columns).view(rows, columns) % 3 < 1, -1.0, 1.0)
    signs[::2] = signs[::2].abs()
    scales = torch.full(QuantScheme.parse(scheme).storage_shapes(columns, 35)["scales"], -0.5)
    args = (signs, qweight, scales, None, None, scheme)
    assert_same_bits(ops.linear(*args), reference_ops.linear(*args), f"{each_isa} {rows} rows")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sums_beyond_the_limit_are_refused(scheme, device):
    columns = MAX_REDUCTION + 1
    shapes = QuantScheme.parse(scheme).storage_shapes(columns, 1)
    qweight = torch.zeros(shapes["qweight"], dtype=torch.int8 if scheme == "w8a8" else torch.uint8, device=device)
    x, scales = torch.ones(1, columns, device=device), torch.ones(shapes["scales"], device=device)
    with pytest.raises(RuntimeError, match="in_features must be at most 131072"):
        ops.linear(x, qweight, scales, None, None, scheme)


def test_groups_are_added_in_ascending_order(each_isa):
    """Group sums 2^24, 1, 1, -2^24 and so on: another order, or fused additions, would give another float."""
    big, one = 127.0, 127.0 / 2**20
    x = torch.cat([torch.full((1, 32), v) for v in (big, one, one, -big, one, big, one, -big)], dim=1).repeat(70, 1)
    for rows in (1, 9, 70):
        for name in ("w8a8-g32-ag32", "w4a8-g32-asym-ag32", "w8a8-ag32"):
            scheme = QuantScheme.parse(name)
            draw = op_samples.Draw(f"order {name}")
            args = (x[:rows], *draw.weight(19, x.shape[1], scheme), None, name)
            assert_same_bits(ops.linear(*args), reference_ops.linear(*args), f"{each_isa} {name} {rows}")


def test_scales_are_multiplied_before_the_sum(each_isa):
    """acc * (x_scale * w_scale) and (acc * x_scale) * w_scale round differently for most of these values."""
    draw = op_samples.Draw("product order")
    x, weight = draw.floats(70, 40), draw.weight(50, 40, QuantScheme.parse("w8a8"))
    qx, x_scales = reference_ops.quantize_activation(x, "w8a8")
    acc = (qx.double() @ weight[0].double().t()).float()
    out = ops.linear(x, *weight, None, "w8a8")
    assert_same_bits(out, acc * (x_scales * weight[1].t()), each_isa)
    assert not torch.equal(out, (acc * x_scales) * weight[1].t())

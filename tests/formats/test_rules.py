"""The formats: `rules.py` against the NumPy rules bit for bit, special values, packing and error bounds."""

import numpy as np
import numpy_rules as rules
import pytest
import torch
from helpers import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from qkernels import QuantScheme, dequantize_weight, quantize_activation, quantize_weight
from qkernels.formats import rules as rules_of_package
from qkernels.formats.storage import weight_integers
from qkernels.formats.weight_format import INT4

SCHEMES = [QuantScheme.parse(name) for name in QuantScheme.names()]
WEIGHT_SCHEMES = [s for s in SCHEMES if s.act_bits == 16]  # one of each weight format
ACT_SCHEMES = [s for s in SCHEMES if s.int_activations and s.weight_bits == 8 and s.group_size is None]
ACT_SCHEMES = [s for s in ACT_SCHEMES if not s.static_activations]
WIDTHS = [1, 2, 31, 32, 33, 63, 65, 127, 128, 129, 257]

# |w / scale - (q - zero)| <= 1/2 in exact arithmetic. The rounded reciprocal, product and scale move w * inverse by at
# most 127 * 4 * 2^-24 < 2^-15, which can move a tie, and the product with the scale adds 127 * 2^-24 < 2^-17.
HALF_STEP = 0.5 + 2.0**-14
# 4-bit symmetric stores the extreme as -8; a value opposite to it may lie at +8 and is clamped to +7.
WHOLE_STEP = 1.0 + 2.0**-14
TINY = 2.0**-96


def by_name(schemes):
    return pytest.mark.parametrize("scheme", schemes, ids=str)


def finite_rows(columns: int) -> torch.Tensor:
    """Rows of many kinds that hold finite values only."""
    generator = torch.Generator().manual_seed(columns)
    normal = torch.randn(8, columns, generator=generator)
    outlier = normal[4].clone()
    outlier[columns // 2] = 1e4
    edge = torch.full((columns,), TINY)
    ties = torch.arange(columns) % 254 - 126.5
    ties[0] = 127.0
    rows = [
        normal[0],
        normal[1].abs(),
        -normal[2].abs(),
        normal[3] + 5.0,
        outlier,
        ties,
        -ties,
        ties * 2.0**-80,
        torch.zeros(columns),
        torch.full((columns,), -0.0),
        torch.full((columns,), 1e-42),
        normal[5] * 2.0**-100,
        edge,
        -edge,
        torch.nextafter(edge, torch.zeros(1)),
        torch.full((columns,), 0.1),
        normal[6] * 1e37,
        torch.full((columns,), torch.finfo(torch.float32).max),
        torch.full((columns,), torch.finfo(torch.float32).min),
        torch.where(torch.arange(columns) % 2 == 0, 7.0, -7.0),
        torch.where(torch.arange(columns) % 2 == 0, -7.0, 7.0),
        torch.arange(columns) % 16 / 16.0,
        normal[7].to(torch.bfloat16).to(torch.float32),
    ]
    return torch.stack(rows)


def special_rows(columns: int) -> torch.Tensor:
    """Finite rows, and rows that hold NaN and Inf at their start, middle and end."""
    finite = finite_rows(columns)
    broken = finite[:8].clone()
    values = (torch.nan, torch.inf, -torch.inf, -torch.nan)
    for row, (value, column) in enumerate((v, c) for v in values for c in (0, columns // 2)):
        broken[row, column] = value
    broken[7, -1] = torch.inf
    return torch.cat((finite, broken))


@by_name(ACT_SCHEMES)
@pytest.mark.parametrize("columns", WIDTHS)
def test_activations_follow_the_rules(scheme, columns):
    x = special_rows(columns)
    q, scales = quantize_activation(x, scheme)
    expected_q, expected_scales = rules.quantize_activation(x.numpy(), scheme.act_group_size)
    assert_same_bits(q, torch.from_numpy(expected_q), f"q {columns}")
    assert_same_bits(scales, torch.from_numpy(expected_scales), f"scales {columns}")


@by_name(WEIGHT_SCHEMES)
@pytest.mark.parametrize("columns", WIDTHS)
def test_weights_follow_the_rules(scheme, columns):
    weight = finite_rows(columns)
    got = quantize_weight(weight, scheme)
    expected = rules.quantize_weight(weight.numpy(), scheme)
    for name, actual, array in zip(("qweight", "scales", "zeros"), got, expected, strict=True):
        assert (actual is None) == (array is None), name
        if actual is not None:
            assert_same_bits(actual, torch.from_numpy(array), f"{name} {columns}")
    integers = weight_integers(got.qweight, got.zeros, columns, scheme)
    assert integers.dtype == torch.int8
    expected_integers = rules.weight_integers(expected[0], expected[2], columns, scheme)
    assert torch.equal(integers.to(torch.int64), torch.from_numpy(expected_integers))


@by_name(ACT_SCHEMES)
@given(st.lists(st.floats(width=32), min_size=1, max_size=70))
def test_activations_of_any_values(scheme, values):
    x = np.array([values], np.float32)
    q, scales = quantize_activation(torch.from_numpy(x), scheme)
    expected_q, expected_scales = rules.quantize_activation(x, scheme.act_group_size)
    assert_same_bits(q, torch.from_numpy(expected_q))
    assert_same_bits(scales, torch.from_numpy(expected_scales))


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=70),
    st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(2.0**-96, 2.0, width=32)),
)
def test_static_activations_of_any_values(values, scale):
    x, x_scale = np.array([values], np.float32), np.array([scale], np.float32)
    got = quantize_activation(torch.from_numpy(x), "w8a8s", torch.from_numpy(x_scale))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = rules.quantize_static(x, x_scale)
    for actual, array in zip(got, expected, strict=True):
        assert_same_bits(actual, torch.from_numpy(array))


def test_static_activations_saturate_and_pass_nan_on():
    x = torch.tensor([[0.0, 1.26, 1.27, 1.28, -300.0, -0.005], [0.0, torch.nan, 1.0, 1.0, 1.0, 1.0]])
    q, scales = quantize_activation(x, "w8a8s", torch.tensor([0.01]))
    assert q.tolist() == [[0, 126, 127, 127, -127, 0], [0] * 6]
    assert scales[0] == torch.tensor(0.01) and scales[1].isnan()


def test_a_static_scale_is_given_where_it_belongs():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="x_scale is required for scheme w8a8s"):
        rules_of_package.quantize_activation(x, "w8a8s")
    with pytest.raises(ValueError, match="x_scale must be None for scheme w8a8"):
        rules_of_package.quantize_activation(x, "w8a8", torch.ones(1))
    with pytest.raises(ValueError, match="x_scale is missing for w8a8s"):
        quantize_activation(x, "w8a8s")
    with pytest.raises(ValueError, match=r"x_scale must be torch.float32 of shape \[1\] for w8a8s"):
        quantize_activation(x, "w8a8s", torch.ones(()))


@by_name(WEIGHT_SCHEMES)
@given(st.lists(st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32), min_size=1, max_size=70))
def test_weights_of_any_values(scheme, values):
    weight = np.array([values], np.float32)
    got, expected = quantize_weight(torch.from_numpy(weight), scheme), rules.quantize_weight(weight, scheme)
    assert_same_bits(got.qweight, torch.from_numpy(expected[0]))
    assert_same_bits(got.scales, torch.from_numpy(expected[1]))
    assert (got.zeros is None) == (expected[2] is None)
    if got.zeros is not None:
        assert_same_bits(got.zeros, torch.from_numpy(expected[2]))


@by_name(WEIGHT_SCHEMES)
@pytest.mark.parametrize("columns", [1, 33, 129])
def test_storage_has_the_promised_shapes_and_ranges(scheme, columns):
    got = quantize_weight(finite_rows(columns), scheme)
    shapes = scheme.storage_shapes(columns, got.qweight.shape[0])
    for name, tensor in got._asdict().items():
        assert (tensor is None) == (name not in shapes)
        if tensor is not None:
            assert tuple(tensor.shape) == shapes[name] and tensor.is_contiguous() and not tensor.requires_grad
    assert got.scales.dtype == torch.float32 and got.scales.isfinite().all() and (got.scales != 0).all()
    assert got.qweight.dtype == (torch.int8 if scheme.weight_bits == 8 else torch.uint8)
    if scheme.weight_bits == 8:
        assert (got.qweight != -128).all()
    elif columns % 2:
        assert (got.qweight[:, -1] >> 4 == 0).all()
    if scheme.has_min:
        assert got.zeros.dtype == torch.float32 and got.zeros.isfinite().all()
    elif got.zeros is not None:
        assert got.zeros.dtype == torch.uint8 and (got.zeros <= 15).all()


@by_name(WEIGHT_SCHEMES)
@pytest.mark.parametrize("columns", WIDTHS)
def test_dequantize_is_within_half_a_step(scheme, columns):
    weight = finite_rows(columns)
    weight = weight[weight.abs().amax(dim=1) < torch.finfo(torch.float32).max]  # 127 * (max / 127) may overflow
    got = quantize_weight(weight, scheme)
    restored = dequantize_weight(*got, columns, scheme)
    assert restored.dtype == torch.float32 and restored.shape == weight.shape
    size = scheme.group_size or columns
    scale = got.scales.to(torch.float64).repeat_interleave(size, dim=1)[:, :columns]
    steps = weight.to(torch.float64) / scale
    bound = torch.where((scheme.weight_bits == 4) & scheme.symmetric & (steps > 7.5), WHOLE_STEP, HALF_STEP)
    error = (weight.to(torch.float64) - restored.to(torch.float64)).abs()
    if scheme.has_min:  # the minimum, the distance from it and the last sum are rounded
        minima = got.zeros.to(torch.float64).repeat_interleave(size, dim=1)[:, :columns]
        assert (error <= bound * scale.abs() + 2.0**-22 * (weight.to(torch.float64).abs() + minima.abs())).all()
        return
    assert (error <= bound * scale.abs()).all()
    group_starts = range(0, columns, size)
    tiny = torch.stack([weight[:, s : s + size].abs().amax(dim=1) < TINY / 2 for s in group_starts], dim=1)
    assert (restored[tiny.repeat_interleave(size, dim=1)[:, :columns]] == 0).all()


def test_divisions_are_ieee():
    """Ranges and ties for which `x * (127 * (1 / absmax))` rounds to another integer than `x * (127 / absmax)`."""
    absmax = (torch.rand(50_000) + 0.5) * torch.exp2(torch.randint(-90, 125, (50_000,)))
    ties = torch.randint(0, 127, (50_000,)) + 0.5
    x = torch.stack((absmax, absmax / 127 * ties), dim=1).numpy()
    q, scales = quantize_activation(torch.from_numpy(x), "w8a8")
    expected = np.rint(x[:, 1] * (np.float32(127) / x[:, 0]))
    assert_same_bits(q[:, 1].to(torch.float32), torch.from_numpy(expected))
    assert_same_bits(scales[:, 0], torch.from_numpy(x[:, 0] / np.float32(127)))
    shortcut = np.rint(x[:, 1] * ((np.float32(1) / x[:, 0]) * np.float32(127)))
    assert (expected != shortcut).any()

    w = torch.stack((absmax, absmax / 15 * (ties % 15)), dim=1).numpy()
    got = quantize_weight(torch.from_numpy(w), "w4a8-asym")
    expected = np.rint(w[:, 1] * (np.float32(15) / w[:, 0])).clip(0, 15)
    assert_same_bits(INT4.unpack(got.qweight, 2)[:, 1].to(torch.float32), torch.from_numpy(expected))
    assert_same_bits(got.scales[:, 0], torch.from_numpy(w[:, 0] / np.float32(15)))


@by_name(WEIGHT_SCHEMES)
def test_quantizing_the_dequantized_weight_reproduces_it(scheme):
    weight = torch.randn(9, 130)
    restored = dequantize_weight(*quantize_weight(weight, scheme), 130, scheme)
    again = dequantize_weight(*quantize_weight(restored, scheme), 130, scheme)
    torch.testing.assert_close(again, restored, rtol=2.0**-21, atol=0)


@pytest.mark.parametrize("scheme", ["w4a16-g32-min", "w8a16-g32-min", "w8a16-min"])
def test_minima_keep_a_constant_group_and_both_ends(scheme):
    """A group of one value, however small or large, is exact; the last group is shorter and holds no padding."""
    weight = torch.randn(6, 1).expand(6, 70) * torch.tensor([1e-40, 1e-30, 1.0, -3.0, 1e30, 0.0]).unsqueeze(1)
    got = quantize_weight(weight, scheme)
    assert_same_bits(dequantize_weight(*got, 70, scheme), weight + 0.0)
    levels = torch.tensor([0.0, 15.0, 5.0]).repeat(24)[:70] if "w4" in scheme else torch.arange(70) * 3.0 + 20
    ends = (levels - 1000.0).expand(2, 70)
    back = dequantize_weight(*quantize_weight(ends, scheme), 70, scheme)
    size = QuantScheme.parse(scheme).group_size or 70
    for start in range(0, 70, size):
        part = slice(start, start + size)
        step = (ends[:, part].max() - ends[:, part].min()) / 254
        assert back[:, part].min() == ends[:, part].min()
        assert ((back - ends)[:, part].abs() <= 0.51 * step + 2.0**-12).all()


def test_symmetric_int4_keeps_the_extreme_by_a_negative_scale():
    weight = torch.tensor([[1.0, 8.0, -4.0], [-1.0, -8.0, 4.0], [8.0, -8.0, 0.0]])
    got = quantize_weight(weight, "w4a8")
    assert got.scales.flatten().tolist() == [-1.0, 1.0, -1.0]
    restored = dequantize_weight(*got, 3, "w4a8")
    assert restored.tolist() == [[1.0, 8.0, -4.0], [-1.0, -8.0, 4.0], [8.0, -7.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_other_float_dtypes_are_widened_or_rounded_to_float32(dtype):
    x = torch.randn(5, 70).to(dtype)
    assert_same_bits(quantize_activation(x, "w8a8-ag32")[1], quantize_activation(x.float(), "w8a8-ag32")[1])
    assert_same_bits(quantize_weight(x, "w4a8-g32").qweight, quantize_weight(x.float(), "w4a8-g32").qweight)


def test_non_contiguous_input_and_empty_batch():
    x = torch.randn(40, 6).t()
    assert_same_bits(quantize_activation(x, "w8a8-ag32")[0], quantize_activation(x.contiguous(), "w8a8-ag32")[0])
    strided, contiguous = quantize_weight(x, "w4a8-g32-asym"), quantize_weight(x.contiguous(), "w4a8-g32-asym")
    for a, b in zip(strided, contiguous, strict=True):
        assert_same_bits(a, b)
    q, scales = quantize_activation(torch.empty(0, 40), "w8a8-ag32")
    assert q.shape == (0, 40) and scales.shape == (0, 2)
    assert quantize_weight(torch.empty(0, 40), "w4a8-g32").qweight.shape == (0, 20)


@given(st.integers(0, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_int4_packing_round_trip(rows, columns, seed):
    nibbles = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = INT4.pack(nibbles)
    assert torch.equal(packed, torch.from_numpy(rules.pack_int4(nibbles.numpy())))
    assert torch.equal(INT4.unpack(packed, columns), nibbles)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@by_name(WEIGHT_SCHEMES)
def test_non_finite_weights_are_refused(scheme, value):
    weight = torch.randn(3, 40)
    weight[2, 39] = value
    with pytest.raises(ValueError, match="weight must be finite"):
        quantize_weight(weight, scheme)


def test_a_range_beyond_float32_is_refused():
    weight = torch.tensor([[3e38, -3e38]])
    with pytest.raises(ValueError, match="weight range"):
        quantize_weight(weight, "w4a8-asym")
    with pytest.raises(ValueError, match="weight must be finite"):
        quantize_weight(torch.tensor([[1e300]], dtype=torch.float64), "w8a8")


@pytest.mark.parametrize(
    "wrong", [torch.ones(4), torch.ones(2, 3, 4), torch.ones(2, 0), torch.ones(2, 4, dtype=torch.int32), torch.ones(())]
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=r"weight must be a float matrix .* got torch\.\w+ of shape"):
        quantize_weight(wrong, "w8a8")
    with pytest.raises(ValueError, match=r"x must be a float matrix .* got torch\.\w+ of shape"):
        quantize_activation(wrong, "w8a8")


def test_float_activations_have_no_quantization():
    with pytest.raises(ValueError, match="scheme must be an a8 scheme, got w8a16"):
        quantize_activation(torch.ones(2, 4), "w8a16")

"""Wrong arguments: a RuntimeError that names the argument, from the kernels and from the fake kernels alike."""

import re

import op_samples
import pytest
import torch

from qkernels import QuantScheme
from qkernels.kernels import ops
from qkernels.kernels.arguments import ConvGeometry, names

OPS = torch.ops.qkernels
ROWS, N, K, EXPERTS = 3, 6, 40, 2
SCHEME, SYMMETRIC = "w4a8-g32-asym", "w4a8-g32"
RANDOMNESS = {"seed": torch.tensor(1), "rng_stream": 0}


def arguments(op: str, scheme: str = SCHEME) -> dict:
    shapes = QuantScheme.parse(scheme).storage_shapes(K, N)
    integer = torch.int8 if scheme.startswith("w8") else torch.uint8
    weight = {
        "qweight": torch.ones(shapes["qweight"], dtype=integer),
        "scales": torch.ones(shapes["scales"]),
        "zeros": torch.zeros(shapes["zeros"], dtype=torch.uint8) if "zeros" in shapes else None,
    }
    experts = {name: None if t is None else torch.stack([t] * EXPERTS) for name, t in weight.items()}
    offsets = {"offsets": torch.tensor([1, 3])}
    return {
        "quantize_activation": {"x": torch.ones(ROWS, K), "scheme": scheme},
        "grouped_linear": {
            "x": torch.ones(ROWS, K),
            **offsets,
            **experts,
            "bias": torch.ones(EXPERTS, N),
            "scheme": scheme,
            "out_dtype": None,
            "rows": torch.arange(ROWS),
        },
        "grouped_linear_grad_input": {
            "grad_out": torch.ones(ROWS, N),
            **offsets,
            **experts,
            "in_features": K,
            "scheme": scheme,
            "seed": torch.tensor(1),
            "column_scales": torch.ones(EXPERTS, K) if "-g" in scheme else None,
            "out_dtype": None,
        },
        "grouped_linear_grad_weight": {
            "grad_out": torch.ones(ROWS, N),
            **offsets,
            "qx": torch.ones(ROWS, K, dtype=torch.int8),
            "x_scales": torch.ones(ROWS),
            "rows": torch.arange(ROWS),
            "seed": torch.tensor(1),
            "out_dtype": None,
        },
        "grouped_outer": {
            "grad_out": torch.ones(ROWS, N),
            **offsets,
            "x": torch.ones(ROWS, K),
            "rows": torch.arange(ROWS),
        },
        "dequantize_weight": {**weight, "in_features": K, "scheme": scheme},
        "linear": {"x": torch.ones(ROWS, K), **weight, "bias": torch.ones(N), "scheme": scheme, "out_dtype": None},
        "linear_grad_input": {
            "grad_out": torch.ones(ROWS, N),
            **weight,
            "in_features": K,
            "scheme": scheme,
            "out_dtype": None,
        },
        "column_scales": {**weight, "in_features": K, "scheme": scheme},
        "conv": {
            "x": torch.ones(2, 5, 7, 10),
            **weight,
            "bias": torch.ones(N),
            "scheme": scheme,
            "geometry": ConvGeometry(2, 2),
            "out_dtype": None,
            "x_scale": None,
        },
        "int_grad_input": {
            "q_grad": torch.ones(ROWS, N, dtype=torch.int8),
            "grad_scales": torch.ones(ROWS),
            **weight,
            "in_features": K,
            "scheme": scheme,
            "column_scales": torch.ones(K),
            "out_dtype": None,
        },
        "linear_with_saved_input": {"x": torch.ones(ROWS, K), **weight, "bias": torch.ones(N), "scheme": scheme},
        "quantize_weight": {"weight": torch.ones(N, K), "scheme": scheme},
        "mask_clipped": {"grad": torch.ones(N, K), "weight": torch.ones(N, K), "scheme": scheme},
        "quantize_weight_scaled": {"weight": torch.ones(N, K), "scales": torch.ones(N, 2), "scheme": SYMMETRIC},
        "scale_gradient": {
            "grad": torch.ones(N, K),
            "weight": torch.ones(N, K),
            "scales": torch.ones(N, 2),
            "scheme": SYMMETRIC,
        },
        "quantize_rows_stochastic": {"x": torch.ones(ROWS, K), "column_factors": torch.ones(K), **RANDOMNESS},
        "quantize_columns_stochastic": {"x": torch.ones(ROWS, K), "row_factors": torch.ones(ROWS), **RANDOMNESS},
    }[op]


WEIGHT = [
    ("qweight", torch.ones(N, 20, dtype=torch.int8)),
    ("qweight", torch.ones(N, 20)),
    ("qweight", torch.ones(N, 19, dtype=torch.uint8)),
    ("qweight", torch.ones(N, 40, dtype=torch.uint8)),
    ("qweight", torch.ones(N * 20, dtype=torch.uint8)),
    ("qweight", torch.ones(1, N, 20, dtype=torch.uint8)),
    ("qweight", torch.ones((), dtype=torch.uint8)),
    ("scales", torch.ones(N, 2, dtype=torch.bfloat16)),
    ("scales", torch.ones(N, 2, dtype=torch.float64)),
    ("scales", torch.ones(N, 1)),
    ("scales", torch.ones(N - 1, 2)),
    ("scales", torch.ones(2 * N)),
    ("zeros", None),
    ("zeros", torch.zeros(N, 2, dtype=torch.int8)),
    ("zeros", torch.zeros(N, 1, dtype=torch.uint8)),
    ("zeros", torch.zeros(N, dtype=torch.uint8)),
]
EXPERTS_WEIGHT = [
    *(
        (name, value if value is None or value.dim() != 2 else torch.stack([value] * EXPERTS))
        for name, value in WEIGHT
        if value is None or value.dim() == 2
    ),
    ("qweight", torch.ones(N, 20, dtype=torch.uint8)),
    ("qweight", torch.ones((), dtype=torch.uint8)),
    ("scales", torch.ones(N, 2)),
    ("scales", torch.ones(EXPERTS + 1, N, 2)),
    ("zeros", torch.zeros(1, N, 2, dtype=torch.uint8)),
]
OFFSETS = [
    ("offsets", torch.tensor([1, 3], dtype=torch.int32)),
    ("offsets", torch.tensor([1, 2, 3])),
    ("offsets", torch.tensor([[1, 3]])),
    ("offsets", torch.tensor(3)),
]
WEIGHT_OPS = [
    "grouped_linear",
    "grouped_linear_grad_input",
    "dequantize_weight",
    "linear",
    "linear_with_saved_input",
    "linear_grad_input",
    "column_scales",
    "int_grad_input",
]
SCHEME_NAMES = ["w8a8", "w8a8-g32", "w4a8", "w4a8-g32-asym"]
SCHEMES = [("scheme", "w4a8-asym-g32"), ("scheme", ""), ("scheme", "w8a8u")]
IN_FEATURES = [("in_features", 0), ("in_features", -40), ("in_features", 42)]
OUT_DTYPES = [("out_dtype", torch.float64), ("out_dtype", torch.int8), ("out_dtype", torch.complex64)]


def matrix(name: str, columns: int) -> list:
    wrong = [torch.ones(ROWS, columns, dtype=d) for d in (torch.float64, torch.int32, torch.int8, torch.bool)]
    wrong += [torch.ones(columns), torch.ones(1, ROWS, columns), torch.ones(())]
    return [(name, value) for value in wrong]


SEEDS = [("seed", torch.tensor(1, dtype=torch.int32)), ("seed", torch.tensor([1])), ("seed", torch.tensor(1.0))]
RANDOM = [
    ("x", torch.ones(3, 0)),
    *SEEDS,
    ("rng_stream", -1),
    ("rng_stream", 2**32),
]

GIVEN_SCALES = [
    *SCHEMES,
    ("scheme", SCHEME),
    ("scales", torch.ones(N, 2, dtype=torch.bfloat16)),
    *(("scales", torch.ones(shape)) for shape in ((N, 1), (N - 1, 2), (2 * N,))),
]

# Of the scheme of the calls, whose activations are not static.
X_SCALE = [("x_scale", torch.ones(1))]

CASES = {
    "grouped_linear": [
        *matrix("x", K),
        *EXPERTS_WEIGHT,
        *OFFSETS,
        *SCHEMES,
        *OUT_DTYPES,
        ("rows", torch.arange(ROWS, dtype=torch.int32)),
        ("rows", torch.ones(1, ROWS, dtype=torch.int64)),
        ("rows", torch.tensor(0)),
        ("bias", torch.ones(N)),
        ("bias", torch.ones(EXPERTS, N + 1)),
        ("bias", torch.ones(EXPERTS, N, dtype=torch.float64)),
    ],
    "grouped_linear_grad_input": [
        *matrix("grad_out", N),
        *EXPERTS_WEIGHT,
        *OFFSETS,
        *SCHEMES,
        *IN_FEATURES,
        *OUT_DTYPES,
        *SEEDS,
        ("grad_out", torch.ones(ROWS, N + 1)),
        ("column_scales", None),
        ("column_scales", torch.ones(K)),
        ("column_scales", torch.ones(EXPERTS, K + 1)),
    ],
    "grouped_linear_grad_weight": [
        *matrix("grad_out", N),
        *SEEDS,
        *OUT_DTYPES,
        ("offsets", torch.tensor([1, 3], dtype=torch.int32)),
        ("offsets", torch.tensor([[1, 3]])),
        ("rows", torch.arange(ROWS + 1)),
        ("qx", torch.ones(ROWS, K)),
        ("qx", torch.ones(ROWS, 0, dtype=torch.int8)),
        ("qx", torch.ones(K, dtype=torch.int8)),
        ("x_scales", torch.ones(ROWS + 1)),
        ("x_scales", torch.ones(ROWS, dtype=torch.bfloat16)),
    ],
    "grouped_outer": [
        *matrix("grad_out", N),
        *matrix("x", K),
        ("offsets", torch.tensor([1, 3], dtype=torch.int32)),
        ("rows", torch.arange(ROWS + 1)),
    ],
    "quantize_activation": [*matrix("x", K), *SCHEMES, ("x", torch.ones(3, 0)), ("scheme", "w8a16"), *X_SCALE],
    "dequantize_weight": [*WEIGHT, *SCHEMES, *IN_FEATURES],
    "linear": [
        *matrix("x", K),
        *WEIGHT,
        *SCHEMES,
        *OUT_DTYPES,
        ("bias", torch.ones(N + 1)),
        ("bias", torch.ones(1, N)),
        ("bias", torch.ones(())),
        ("bias", torch.ones(N, dtype=torch.float64)),
        ("bias", torch.ones(N, dtype=torch.int32)),
        *X_SCALE,
    ],
    "linear_grad_input": [
        *matrix("grad_out", N),
        *WEIGHT,
        *SCHEMES,
        *IN_FEATURES,
        *OUT_DTYPES,
        ("grad_out", torch.ones(ROWS, N + 1)),
    ],
    "column_scales": [*WEIGHT, *SCHEMES, *IN_FEATURES],
    "conv": [
        *matrix("x", K),
        *WEIGHT,
        *SCHEMES,
        *OUT_DTYPES,
        ("x", torch.ones(2, 5, 7, 10, dtype=torch.float64)),
        ("x", torch.ones(2, 0, 7, 10)),
        ("scheme", "w4a8-g32-asym-ag32"),
        ("bias", torch.ones(N + 1)),
    ],
    "linear_with_saved_input": [
        *matrix("x", K),
        *WEIGHT,
        *SCHEMES,
        ("scheme", "w4a16-g32-asym"),
        ("bias", torch.ones(N + 1)),
        *X_SCALE,
    ],
    "quantize_weight": [*matrix("weight", K), *SCHEMES, ("weight", torch.ones(3, 0))],
    "mask_clipped": [
        *matrix("weight", K),
        *matrix("grad", K),
        *SCHEMES,
        ("scheme", "w8a8"),
        ("grad", torch.ones(N + 1, K)),
        ("grad", torch.ones(N, K + 1)),
    ],
    "quantize_weight_scaled": [*matrix("weight", K), *GIVEN_SCALES, ("weight", torch.ones(N, 0))],
    "scale_gradient": [*matrix("weight", K), *matrix("grad", K), *GIVEN_SCALES, ("grad", torch.ones(N + 1, K))],
    "quantize_rows_stochastic": [
        *matrix("x", K),
        *RANDOM,
        *(("column_factors", torch.ones(shape)) for shape in ((), (K + 1,), (1, K))),
        ("column_factors", torch.ones(K, dtype=torch.bfloat16)),
    ],
    "quantize_columns_stochastic": [
        *matrix("x", K),
        *RANDOM,
        *(("row_factors", torch.ones(shape)) for shape in ((), (ROWS + 1,), (1, ROWS))),
        ("row_factors", torch.ones(ROWS, dtype=torch.float64)),
    ],
    "int_grad_input": [
        ("q_grad", torch.ones(ROWS, N)),
        ("q_grad", torch.ones(ROWS, N, dtype=torch.uint8)),
        ("q_grad", torch.ones(ROWS, N + 1, dtype=torch.int8)),
        ("q_grad", torch.ones(N, dtype=torch.int8)),
        ("q_grad", torch.ones((), dtype=torch.int8)),
        *((name, torch.ones(shape)) for name in ("grad_scales", "column_scales") for shape in ((), (4,), (1, 3))),
        *((name, torch.ones(size, dtype=torch.float64)) for name, size in (("grad_scales", 3), ("column_scales", K))),
        ("column_scales", None),
        *WEIGHT,
        *SCHEMES,
        *IN_FEATURES,
        *OUT_DTYPES,
    ],
}


def describe(value) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", [op for op in op_samples.SAMPLERS if "x_scale" in names(op)])
@pytest.mark.parametrize("wrong", [None, torch.ones(()), torch.ones(2), torch.ones(1, dtype=torch.float64)], ids=str)
def test_wrong_static_scale_is_named(op, wrong, device):
    (args, _), *_ = op_samples.samples(op, "w8a8s", 1)
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in (*args[:-1], wrong)]
    expected = "is required for scheme w8a8s" if wrong is None else r"must be torch.float32 of shape \[1\], got"
    with pytest.raises(RuntimeError, match=f"x_scale {expected}"):
        op_samples.call(op, tuple(moved))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        pytest.param(op, *case, id=f"{op}-{case[0]}-{describe(case[1])}")
        for op, cases in CASES.items()
        for case in cases
    ],
)
def test_wrong_argument_is_named(op, name, value, device):
    given = {
        key: item.to(device) if isinstance(item, torch.Tensor) else item
        for key, item in {**arguments(op), name: value}.items()
    }
    # A size that no tensor fits is told by the first tensor that does not fit it.
    pattern = {"in_features": "(in_features|qweight) must", "scheme": "(unknown scheme|scheme must)"}
    with pytest.raises((RuntimeError, ValueError), match=rf"(^|, ){pattern.get(name, name + ' (must|is)')}"):
        getattr(ops, op)(**given)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", WEIGHT_OPS)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w4a16"])
def test_zeros_of_a_symmetric_scheme_are_refused(op, scheme, device):
    given = {**arguments(op, scheme), "zeros": torch.zeros(N, 2, dtype=torch.uint8)}
    given = {key: item.to(device) if isinstance(item, torch.Tensor) else item for key, item in given.items()}
    with pytest.raises(RuntimeError, match="zeros must be None"):
        getattr(ops, op)(**given)


@pytest.mark.parametrize("op", WEIGHT_OPS)
def test_tensors_on_different_devices_are_refused(op):
    names = [name for name, value in arguments(op).items() if isinstance(value, torch.Tensor)]
    for name in names:
        given = arguments(op)
        given[name] = given[name].to("meta")
        with pytest.raises(RuntimeError, match=r"\w+ must be on (cpu|meta), got (cpu|meta)"):
            getattr(ops, op)(**given)


def test_missing_columns_of_linear_are_refused():
    for device in ("cpu", "meta"):
        given = {
            "x": torch.ones(2, 0, device=device),
            "qweight": torch.ones(4, 0, dtype=torch.int8, device=device),
            "scales": torch.ones(4, 1, device=device),
        }
        with pytest.raises(RuntimeError, match=r"(x|in_features) must .*at least (1|one)"):
            ops.linear(**given, zeros=None, bias=None, scheme="w8a8")


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weight_that_is_not_finite_is_refused(scheme, value):
    weight = torch.ones(N, K)
    weight[N - 1, K - 1] = value
    with pytest.raises(RuntimeError, match="weight must be finite"):
        ops.quantize_weight(weight, scheme)


@pytest.mark.parametrize("name", ["weight", "scales"])
def test_given_scales_that_are_not_finite_are_refused(name):
    for scheme in ("w8a8", "w4a8-g32"):
        given = arguments("quantize_weight_scaled")
        given["scheme"], given["scales"] = scheme, torch.ones(N, QuantScheme.parse(scheme).weight_groups(K))
        for value in (torch.nan, -torch.inf):
            given[name][N - 1, 0] = value
            with pytest.raises(RuntimeError, match="weight and scales must be finite"):
                ops.quantize_weight_scaled(**given)


def test_range_that_overflows_is_refused():
    weight = torch.full((2, K), 3e38)
    weight[1, 1] = -3e38
    ops.quantize_weight(weight, "w4a8")
    with pytest.raises(RuntimeError, match="so must be the range of each group"):
        ops.quantize_weight(weight, "w4a8-asym")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-ag32", "w4a16-asym"])
def test_column_scales_of_an_ungrouped_weight_are_refused(scheme, device):
    given = arguments("int_grad_input", scheme)
    given = {key: item.to(device) if isinstance(item, torch.Tensor) else item for key, item in given.items()}
    with pytest.raises(RuntimeError, match=f"column_scales must be None for scheme {scheme}"):
        ops.int_grad_input(**given)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gradients_with_too_many_columns_are_refused(device):
    rows = 131073
    given = {
        "q_grad": torch.zeros(1, rows, dtype=torch.int8, device=device),
        "grad_scales": torch.ones(1, device=device),
        "qweight": torch.zeros(rows, 1, dtype=torch.int8, device=device),
        "scales": torch.ones(rows, 1, device=device),
    }
    with pytest.raises(RuntimeError, match="qweight must have at most 131072 rows for exact int32 sums"):
        ops.int_grad_input(**given, zeros=None, in_features=1, scheme="w8a16")


@pytest.mark.parametrize("op", WEIGHT_OPS)
def test_tensors_that_are_not_dense_are_refused(op):
    given = arguments(op)
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            continue
        others = [value.to_sparse(), torch.nested.nested_tensor([value, value])]
        if value.dtype == torch.float32 and value.dim() == 2:
            others.append(value.to_mkldnn())
        for other in others:
            with pytest.raises(RuntimeError, match=rf"{name} must be a dense tensor \(layout torch.strided\), got "):
                getattr(ops, op)(**{**given, name: other})


def test_what_does_not_fit_is_not_copied():
    """A wrong shape is told before anything is made contiguous: an expanded tensor stands for any number of bytes."""
    side = 2**30
    given = arguments("linear")
    huge = {
        "x": torch.ones(1, 1).expand(side, side),
        "qweight": torch.ones(1, 1, dtype=torch.uint8).expand(side, side),
        "scales": torch.ones(1, 1).expand(side, side),
        "zeros": torch.ones(1, 1, dtype=torch.uint8).expand(side, side),
        "bias": torch.ones(1).expand(side),
    }
    for name, value in huge.items():
        with pytest.raises(RuntimeError, match=f"(^|, )({name}|in_features|qweight) must"):
            ops.linear(**{**given, name: value})
    with pytest.raises(MemoryError, match=r"out of memory: \d+ bytes for (a contiguous copy of x|a result of torch)"):
        ops.linear(**{**given, "x": torch.ones(1, K).expand(2**40, K)})


@pytest.mark.parametrize("op", ["quantize_rows_stochastic", "quantize_columns_stochastic"])
def test_the_seed_lies_on_the_cpu(op):
    with pytest.raises(RuntimeError, match="seed must be on cpu, got meta"):
        getattr(ops, op)(**{**arguments(op), "seed": torch.tensor(1, device="meta")})


def test_checks_allocate_nothing():
    """They run before every call on a GPU: no tensor is made, whatever the operator."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from qkernels.kernels import checks
    from qkernels.kernels.arguments import bundle, names

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"a check calls {func}")

    calls = []
    for op in CASES:
        given = arguments(op)
        only = [argument.name for argument in getattr(OPS, op).default._schema.arguments if argument.kwarg_only]
        keywords = {name: given.pop(name) for name in only if name in given}
        calls.append((op, tuple(given[name] for name in names(op) if name in given), keywords))
    with Refuse():
        for op, args, keywords in calls:
            getattr(checks, op)(*bundle(op, args), **keywords)


def test_misaligned_storage_is_read_by_value():
    """Tensors of a file that is mapped into memory may begin at any byte."""

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        bytes_ = tensor.contiguous().view(torch.uint8).flatten()
        moved = torch.frombuffer(bytearray(b"\0" + bytes(bytes_.tolist())), dtype=tensor.dtype, offset=1)
        return moved.view(tensor.shape)

    given = arguments("linear")
    given = {**given, "x": torch.randn(ROWS, K), "scales": torch.randn(N, 2), "bias": torch.randn(N)}
    expected = ops.linear(**given)
    moved = {name: shifted(given[name]) for name in ("x", "qweight", "scales", "zeros", "bias")}
    assert moved["x"].data_ptr() % 4 != 0
    assert torch.equal(ops.linear(**{**given, **moved}), expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(({name: 0}, f"{name} must be in [1, 2147483647], got 0") for name in ("kernel_height", "groups")),
        *(({name: -1}, f"{name} must be in [1, 2147483647], got -1") for name in ("stride_width", "dilation_height")),
        *(({name: 2**63 - 1}, f"{name} must be in [1, 2147483647]") for name in ("dilation_width", "kernel_width")),
        *(({"top": value}, f"top must be in [0, 2147483647], got {value}") for value in (-1, 2**31, 2**62)),
        ({"top": 2**31 - 1, "left": 2**31 - 1}, "x must have at most 2^60 values with its padding, got shape"),
        ({"groups": 4}, "x must have a multiple of groups = 4 channels, got shape"),
        ({"dilation_width": 7}, "the dilated kernel must fit into the padded x, got shape"),
        ({"groups": 5}, "qweight must"),
    ],
)
def test_wrong_geometry_is_named(wrong, message, device):
    given = arguments("conv") | {"geometry": ConvGeometry(2, 2)._replace(**wrong)}
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.conv(**given)

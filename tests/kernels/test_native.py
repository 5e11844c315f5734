"""The NumPy doors of `qkernels._native`: the same numbers as the operators, and errors that name the argument."""

import numpy as np
import op_samples
import pytest
import reference_ops
import torch
from helpers import assert_same_bits

from qkernels import QuantScheme, _native


def to_numpy(tensor):
    return None if tensor is None else tensor.contiguous().numpy()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-g32", "w4a8-asym", "w4a16-g64"])
def test_gradient_from_integers(scheme):
    draw = op_samples.Draw(f"native {scheme}")
    weight = (*draw.weight(33, 130, QuantScheme.parse(scheme)), 130, scheme)
    arrays = (*map(to_numpy, weight[:3]), 130, scheme)
    columns = reference_ops.column_scales(*weight)
    q_grad = torch.randint(-127, 128, (9, 33), dtype=torch.int8, generator=draw.generator)
    grad_scales = draw.floats(9)
    used = columns if QuantScheme.parse(scheme).group_size else None
    expected = reference_ops.int_grad_input(q_grad, grad_scales, *weight, used)
    for threads in (1, 2):
        assert_same_bits(torch.from_numpy(_native.column_scales(*arrays, threads=threads)), columns)
        out = _native.int_grad_input(q_grad.numpy(), grad_scales.numpy(), *arrays, to_numpy(used), threads=threads)
        assert_same_bits(torch.from_numpy(out), expected)


@pytest.mark.parametrize("scheme", ["w8a8s", "w4a8s-g32-asym"])
def test_static_activations(scheme):
    draw = op_samples.Draw(f"native {scheme}")
    weight, x, x_scale = draw.weight(33, 130, QuantScheme.parse(scheme)), draw.floats(9, 130), torch.tensor([0.02])
    arrays = (x.numpy(), *map(to_numpy, weight), None, scheme)
    out = _native.linear(*arrays, threads=2, x_scale=x_scale.numpy())
    assert_same_bits(torch.from_numpy(out), reference_ops.linear(x, *weight, None, scheme, None, x_scale))
    q, _ = _native.quantize_activation(x.numpy(), scheme, x_scale=x_scale.numpy())
    assert_same_bits(torch.from_numpy(q), reference_ops.quantize_activation(x, scheme, x_scale)[0])
    with pytest.raises(ValueError, match=f"x_scale is required for scheme {scheme}"):
        _native.linear(*arrays)
    with pytest.raises(ValueError, match=r"x_scale must have shape \[1\], got \[2\]"):
        _native.linear(*arrays, x_scale=np.ones(2, np.float32))
    with pytest.raises(ValueError, match="x_scale must be None for scheme w8a8"):
        _native.quantize_activation(x.numpy(), "w8a8", x_scale=x_scale.numpy())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q_grad": np.ones((2, 5), np.int8)}, r"q_grad must have shape \[2, 3\], got \[2, 5\]"),
        ({"q_grad": np.ones(3, np.int8)}, r"q_grad must have shape \[3, 3\], got \[3\]"),
        ({"grad_scales": np.ones(3, np.float32)}, r"grad_scales must have shape \[2\], got \[3\]"),
        ({"column_scales": None}, "column_scales is required for scheme w8a8-g32"),
        ({"column_scales": np.ones(1, np.float32)}, r"column_scales must have shape \[40\], got \[1\]"),
        ({"scheme": "w8a8", "scales": np.ones((3, 1), np.float32)}, "column_scales must be None for scheme w8a8"),
    ],
)
def test_wrong_arguments_of_the_gradient_are_named(changed, message):
    given = {
        "q_grad": np.ones((2, 3), np.int8),
        "grad_scales": np.ones(2, np.float32),
        "qweight": np.ones((3, 40), np.int8),
        "scales": np.ones((3, 2), np.float32),
        "zeros": None,
        "in_features": 40,
        "scheme": "w8a8-g32",
        "column_scales": np.ones(40, np.float32),
    }
    with pytest.raises(ValueError, match=message):
        _native.int_grad_input(**{**given, **changed})

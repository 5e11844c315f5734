"""Run by test_interpreted.py in a process with TRITON_INTERPRET=1: the operators on CPU tensors against the reference.

Triton's interpreter is mended for bfloat16: it multiplies the bits as integers, truncates float32 instead of rounding
it, and takes an integer's value for its bits.
"""

import numpy as np
import op_samples
import pytest
import reference_ops
import torch
from helpers import assert_same_bits
from launch_checks import check, has_kernel
from tiers import pairwise
from triton import language as tl
from triton.runtime import interpreter

import qkernels
from qkernels import QuantLinear, QuantScheme
from qkernels.kernels import arguments, dispatch, reference
from qkernels.kernels.triton import loss_plans, ops

COUNT = 2


def bfloat16_bits(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def float32_values(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


@pytest.fixture(autouse=True)
def mended_bfloat16(monkeypatch):
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, source, to):
        if to.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return interpreter.TensorHandle(bfloat16_bits(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    def create_dot(self, a, b, *rest):
        return dot(self, float32_values(a), float32_values(b), *rest)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_ext", "create_fp_trunc"):
        monkeypatch.setattr(builder, name, cast_impl)


def run_operator(name, args, keywords):
    """The operator by Triton's kernels, with the arguments of its schema."""
    return ops.run(name, arguments.bundle(name, args), keywords)


# Every pair of values of two axes; the kernels see the axes one by one. The loss takes its logits from `linear`, and is
# slow to interpret.
SCHEMES = {op: pairwise(schemes) for op, schemes in op_samples.OP_SCHEMES.items()}
SCHEMES["linear_cross_entropy"] = op_samples.SCHEMES[::7]


@pytest.mark.parametrize(("op", "scheme"), [(op, s) for op in sorted(ops.PLANS) for s in SCHEMES[op]])
def test_operator(op, scheme):
    for sample in list(op_samples.samples(op, scheme, COUNT))[:COUNT]:
        if not has_kernel(op, sample.args):
            continue
        actual = run_operator(op, sample.args, {})
        check(op, scheme, sample, actual if isinstance(actual, tuple) else (actual,))


def small_loss(scheme):
    """Arguments with several chunks, the last one ragged."""
    draw = op_samples.Draw(scheme)
    hidden, target = draw.floats(9, 40), torch.randint(0, 2 * reference.LOSS_CHUNK + 17, (9,))
    weight = draw.weight(2 * reference.LOSS_CHUNK + 17, 40, QuantScheme.parse(scheme))
    return hidden, target, *weight, None, scheme, torch.randint(2**32, (9,))


@pytest.mark.parametrize(
    "terms",
    [
        {"softcap": 5.0, "z_loss": 0.01},
        {"softcap": 0.1},
        {"softcap": 1e6},
        {"softcap": 1e40},
        {"label_smoothing": 0.3, "z_loss": 0.01},
        {"ignore_index": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
def test_terms_of_the_loss(terms, scheme, monkeypatch):
    """Blocks of rows, too."""
    monkeypatch.setattr(loss_plans, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(loss_plans, "LEAST_ROWS", 5)
    args = small_loss(scheme)
    args[1].clamp_(min=3)
    actual = run_operator("linear_cross_entropy", args, terms)
    for result, expected in zip(actual, reference_ops.linear_cross_entropy(*args, **terms), strict=True):
        assert_same_bits(result, expected, f"{scheme} {terms}")


def test_a_target_out_of_range_gives_nan():
    args = small_loss("w8a8")
    args[1][1] = 10**6
    losses, _, grad = run_operator("linear_cross_entropy", args, {})
    assert losses.isnan().nonzero().tolist() == [[1]]
    assert grad[1].isnan().all() and grad[[0, *range(2, len(grad))]].isfinite().all()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
def test_weight_that_is_not_finite(scheme):
    weight = torch.randn(5, 70)
    weight[3, 64] = torch.inf
    with pytest.raises(RuntimeError, match="weight must be finite"):
        run_operator("quantize_weight", (weight, scheme), {})


@pytest.mark.parametrize("place", [0, 1])
def test_weight_or_scale_that_is_not_finite(place):
    args = (torch.randn(5, 70), torch.rand(5, 3))
    args[place][3, 2] = torch.nan
    with pytest.raises(RuntimeError, match="weight and scales must be finite"):
        run_operator("quantize_weight_scaled", (*args, "w4a8-g32"), {})


@pytest.mark.parametrize("grad", ["float", "int8"])
@pytest.mark.parametrize(
    ("scheme", "mode"), [("w8a8", "frozen"), ("w8a8", "qat"), ("w4a8-g32-asym-ag32", "qat"), ("w8a8", "int8")]
)
def test_training_step(scheme, mode, grad, monkeypatch):
    """A layer's output and gradients, which the CPU's kernels made first, made by Triton's."""
    torch.manual_seed(0)
    layer = QuantLinear.from_float(torch.nn.Linear(70, 19), scheme, mode=mode, grad_dtype=grad)
    x, upstream = torch.randn(9, 70, requires_grad=True), torch.randn(9, 19)

    def step():
        torch.manual_seed(1)
        out = layer(x)
        wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        return [out, *torch.autograd.grad(out, wanted, upstream)]

    expected, used = step(), set()
    for name in ops.PLANS:

        def run(*args, name=name, **keywords):
            used.add(name)
            return run_operator(name, args, keywords)

        monkeypatch.setattr(qkernels.kernels.ops, name, run)
    for actual, wanted in zip(step(), expected, strict=True):
        if grad == "int8" or actual is expected[0]:
            assert_same_bits(actual, wanted, f"{scheme} {mode} {grad}")
        else:
            torch.testing.assert_close(actual, wanted)
    assert used >= ({"linear_with_saved_input"} if mode != "frozen" else {"linear"})
    assert (grad == "int8") == ("quantize_rows_stochastic" in used)


def test_dispatch_reaches_triton():
    x = torch.randn(3, 40)
    choice = dispatch.select(dispatch.Facts("cuda", 80, triton=True))
    q, scales = dispatch.run("quantize_activation", choice, (x, QuantScheme.parse("w8a8").code), {})
    check("quantize_activation", "w8a8", op_samples.Sample((x, "w8a8"), "dispatched"), (q, scales))

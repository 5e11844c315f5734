"""What a result of an operator must be, however its launches were run."""

import op_samples
import reference_ops
from bounds import assert_loss_within_bound, assert_within_bound
from helpers import assert_same_bits

from qkernels.kernels import dispatch
from qkernels.kernels.triton import ops
from qkernels.kernels.triton.launch import Launch
from qkernels.kernels.triton.target import Target

# Where the seed stands among the arguments of operators whose gradients are of integers with it, and of floats without.
SEED = {"grouped_linear_grad_input": 7, "grouped_linear_grad_weight": 5}


def plan(op: str, args: tuple, target: Target) -> tuple[tuple, list[Launch]]:
    """Results of a sample's arguments, and the launches that fill them."""
    return ops.plan(op, args, target)


def has_kernel(op: str, args: tuple) -> bool:
    """Whether Triton computes a call."""
    facts = dispatch.Facts("cuda", 80, triton=True)
    return dispatch.select(facts, dispatch.call_of(op, op_samples.schema_args(args))).backend == "triton"


def check_experts(op: str, scheme: str, sample: op_samples.Sample, actual) -> None:
    """The bound of a float sum for the rows of each expert, and 0 in those of none."""
    x, offsets, *stored = sample.args[:5]
    gradient = op == "grouped_linear_grad_input"
    rows = None if gradient else sample.args[8]
    in_features = sample.args[5] if gradient else x.shape[1]
    x = x if rows is None else x[rows]
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        own = [None if tensor is None else tensor[expert] for tensor in stored]
        exact = op_samples.exact_weight(*own, in_features, scheme)
        bias = None if gradient or sample.args[5] is None else sample.args[5][expert]
        words = f"{sample.label}, expert {expert}"
        weight = exact.t() if gradient else exact
        assert_within_bound(actual[begin:end], x[begin:end], weight, bias, words, gradient)
        begin = end
    assert not actual[begin:].any(), sample.label


def check_experts_weights(op: str, sample: op_samples.Sample, actual) -> None:
    """The bound of a float sum for the gradient of each expert's weight."""
    if op == "grouped_outer":
        grad_out, offsets, x, rows = sample.args
        grad_out, x = grad_out.to(x.dtype), x.double()
    else:
        grad_out, offsets, x, x_scales, rows, _ = sample.args
        x = x.double() * x_scales.double().unsqueeze(1)
    x = x if rows is None else x[rows]
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        words = f"{sample.label}, expert {expert}"
        assert_within_bound(actual[expert], grad_out[begin:end].t(), x[begin:end].t(), None, words, gradient=True)
        begin = end


def check(op: str, scheme: str, sample: op_samples.Sample, actual: tuple) -> None:
    """Equal bits where integers are multiplied, the bound of a float sum otherwise."""
    if op == "linear_cross_entropy" and scheme in op_samples.FLOAT_SCHEMES:
        exact = op_samples.exact_weight(*sample.args[2:5], sample.args[0].shape[1], scheme)
        assert_loss_within_bound(actual, sample.args, exact, sample.label)
        return
    if op == "linear_grad_input" or (op == "linear" and scheme in op_samples.FLOAT_SCHEMES):
        x, *stored = sample.args[:4]
        in_features = x.shape[1] if op == "linear" else sample.args[4]
        exact = op_samples.exact_weight(*stored, in_features, scheme)
        bias = sample.args[4] if op == "linear" else None
        gradient = op == "linear_grad_input"
        assert_within_bound(actual[0], x, exact.t() if gradient else exact, bias, sample.label, gradient)
        return
    # A gradient with a seed is one of integers.
    from_floats = sample.args[SEED[op]] is None if op in SEED else scheme in op_samples.FLOAT_SCHEMES
    if from_floats and op in ("grouped_linear", "grouped_linear_grad_input"):
        check_experts(op, scheme, sample, actual[0])
        return
    if op == "grouped_outer" or (from_floats and op == "grouped_linear_grad_weight"):
        check_experts_weights(op, sample, actual[0])
        return
    if from_floats and op == "conv":
        for channels, patches, exact, bias, _ in op_samples.conv_products(sample.args):
            assert_within_bound(actual[0].flatten(0, 2)[:, channels], patches, exact, bias, sample.label)
        return
    expected = reference_ops.call(op, *sample.args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for result, wanted in zip(actual, expected, strict=True):
        assert_same_bits(result, wanted, sample.label)

"""What a result of an operator must be, however its launches were run."""

import op_samples
from bounds import assert_within_bound
from helpers import assert_same_bits

from qkernels import reference
from qkernels.triton import plans
from qkernels.triton.launch import Launch, Target


def plan(op: str, args: tuple, target: Target) -> tuple[tuple, list[Launch]]:
    """Results of a sample's arguments, and the launches that fill them."""
    if op == "int_grad_input":
        q_grad, grad_scales, qweight, scales, zeros, *rest = args
        args = (q_grad, grad_scales, (qweight, scales, zeros), *rest, None)
    elif op in ("linear", "linear_grad_input"):
        args = (*args, *(None,) * (7 - len(args)))
    else:
        *results, launches = getattr(plans, op)(*args)
        return tuple(results), launches
    *results, launches = getattr(plans, op)(*args, target)
    return tuple(results), launches


def check(op: str, scheme: str, sample: op_samples.Sample, actual: tuple) -> None:
    """Equal bits where integers are multiplied, the bound of a float sum otherwise."""
    if op == "linear_grad_input" or (op == "linear" and scheme in op_samples.FLOAT_SCHEMES):
        x, *stored = sample.args[:4]
        in_features = x.shape[1] if op == "linear" else sample.args[4]
        exact = op_samples.exact_weight(*stored, in_features, scheme)
        bias = sample.args[4] if op == "linear" else None
        gradient = op == "linear_grad_input"
        assert_within_bound(actual[0], x, exact.t() if gradient else exact, bias, sample.label, gradient)
        return
    expected = getattr(reference, op)(*sample.args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for result, wanted in zip(actual, expected, strict=True):
        assert_same_bits(result, wanted, sample.label)

"""The reference, called like `qkernels.ops`: `reference_ops.linear(x, *weight, bias, scheme)`."""

from typing import Any

from qkernels.kernels import arguments, reference


def call(operator: str, *args: Any, **keywords: Any) -> Any:
    """The reference's result for the arguments of an operator's schema, whose scheme may be a name."""
    return getattr(reference, operator)(*arguments.bundle(operator, args), **keywords)


def __getattr__(operator: str) -> Any:
    return lambda *args, **keywords: call(operator, *args, **keywords)

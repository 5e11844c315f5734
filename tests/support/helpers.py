"""Comparison to the bit, error bounds of float sums, Python in a process of its own, and the console script."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qkernels import QuantLinear
from qkernels.kernels import isa
from qkernels.nn.matrix_layer import GRAD_DTYPES, MODES

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60

INTEGER_VIEW = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
INTEGER_VIEW[torch.float16] = torch.int16

UNIT_ROUNDOFF = 2.0**-24  # of float32
# Roundings of a float product besides its n - 1 additions and n products: the scaled weight element, the scale of the
# group or of the whole sum, the sum over groups and the bias.
EXTRA_ROUNDINGS = 4

# Products of a bfloat16 matrix on these instruction sets (docs/numerics.md).
BFLOAT16_ISAS = ("scalar", "avx512bf16", "amx")
BFLOAT16_ROUNDOFF = 2.0**-8  # of a weight in the gradient
# vdpbf16ps adds the exact products of a pair to the sum in one or two steps; taking each for faithful (either
# neighbour) covers every way to do it.
BFLOAT16_SUM_ROUNDOFF = 2.0**-23
BFLOAT16_FLUSH = 2.0**-126  # what lies below, in a factor or in a sum, may become 0


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise: equal bits, or both NaN (payloads are not promised)."""
    if not a.is_floating_point():
        return a == b
    view = INTEGER_VIEW[a.dtype]
    return (a.contiguous().view(view) == b.contiguous().view(view)) | (a.isnan() & b.isnan())


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, label: str = "") -> None:
    """Fail, telling the first element that differs, unless both tensors hold the same bits."""
    assert actual.dtype == expected.dtype, f"{label}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{label}: {list(actual.shape)} instead of {list(expected.shape)}"
    differing = (~same_bits(actual, expected)).nonzero()
    if len(differing):
        first = tuple(differing[0].tolist())
        raise AssertionError(
            f"{label}: {len(differing)} of {actual.numel()} elements differ; first at {first}: "
            f"{actual[first].item()!r} instead of {expected[first].item()!r}"
        )


def layer_kinds(*schemes: str) -> list[tuple[str, str, str]]:
    """(scheme, mode, grad) of all quantized layers that exist; not every scheme can be trained in every mode."""
    kinds = []
    for scheme, mode, grad in itertools.product(schemes, MODES, GRAD_DTYPES):
        try:
            QuantLinear(1, 1, False, scheme, mode=mode, grad_dtype=grad, device="meta")
        except ValueError:
            assert mode != "frozen"
        else:
            kinds.append((scheme, mode, grad))
    return kinds


@contextmanager
def one_thread() -> Iterator[None]:
    """For the reference, whose many small operations only lose by waking another thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gamma(terms: int, roundoff: float = UNIT_ROUNDOFF) -> float:
    """The bound of the relative error after `terms` roundings (Higham, Accuracy and Stability, 3.1)."""
    return terms * roundoff / (1 - terms * roundoff)


def float_sum_bound(x: torch.Tensor, weight: torch.Tensor, magnitude: torch.Tensor, gradient: bool) -> torch.Tensor:
    """The bound of the error of a float sum whose terms have the sum of magnitudes `magnitude`."""
    terms = x.shape[1] + EXTRA_ROUNDINGS
    if x.dtype != torch.bfloat16 or isa.current() not in BFLOAT16_ISAS:
        return gamma(terms) * magnitude + terms * 2.0**-149
    relative = gamma(terms, BFLOAT16_SUM_ROUNDOFF)
    if gradient:
        relative = (1 + relative) * (1 + BFLOAT16_ROUNDOFF) - 1
    # Flushed: elements of x, of the weight, and, before a scale of at most 1, each partial sum.
    flushed = x.double().abs().sum(1, keepdim=True) + weight.abs().sum(1) + 2 * terms
    return relative * magnitude + BFLOAT16_FLUSH * flushed


def assert_within_float_bound(
    actual, x, weight, bias=None, label: str = "", gradient: bool = False, magnitudes=None
) -> None:
    """Check `actual` against `x @ weight.T + bias` computed in float in any order and rounded once at the end.

    weight [N, K] and bias are exact, in float64; x [M, K] is as it was passed to the product, and `gradient` tells
    whether it is one. Of a weight that is itself a sum, `magnitudes` [N, K] are those of its terms. The bound holds for
    any order of summation.
    """
    with one_thread():
        weights = weight.abs() if magnitudes is None else magnitudes
        exact, magnitude = x.double() @ weight.t(), x.double().abs() @ weights.t()
    if bias is not None:
        exact, magnitude = exact + bias, magnitude + bias.abs()
    bound = float_sum_bound(x, weight, magnitude, gradient)
    info = torch.finfo(actual.dtype)
    if actual.dtype != torch.float32:
        bound = bound + (exact.abs() + bound) * (info.eps / 2) + info.smallest_normal * info.eps
    error = (actual.to(torch.float64) - exact).abs()
    assert actual.isfinite().all(), f"{label}: not finite"
    if error.numel():
        worst = (error / bound.clamp(min=1e-300)).max().item()
        assert worst <= 1.0, f"{label}: error is {worst:.3g} times its bound"


def run_python(code: str, timeout: float = 120, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Run `code` in a new interpreter; `env` is added to the environment."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env={**os.environ, **env}
    )
    assert not check or result.returncode == 0, f"exit {result.returncode}\n{result.stdout}{result.stderr}"
    return result


def invoke(*arguments: object):
    """The result of the console script in this process."""
    from typer.testing import CliRunner

    from qkernels.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result, *words: str) -> None:
    """Status 2, and one line of error at the end, which holds `words`."""
    assert result.exit_code == 2, result.output
    assert not isinstance(result.exception, Exception), result.exception
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[-1]

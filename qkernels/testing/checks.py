"""Every check: a function of the layer that says whether one property holds."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .report import FAILED, SKIPPED, Outcome, all_equal, compare, equal, same_bits, verdict, worst
from .subject import ROWS, Subject, float_bound

_PARTS = (slice(0, 1), slice(5, 12), slice(3, 43))
_LEADING = ((), (1,), (2, 3), (2, 1, 5, 1))
_CLIPPED = 0.1  # share of weights whose gradient a clip mask may set to 0

CHECKS: dict[str, Callable[[Subject], Outcome]] = {}


def check(name: str) -> Callable[[Callable[[Subject], Outcome]], Callable[[Subject], Outcome]]:
    """Register a function as the check called `name`."""

    def register(function: Callable[[Subject], Outcome]) -> Callable[[Subject], Outcome]:
        CHECKS[name] = function
        return function

    return register


@check("forward")
def _forward(s: Subject) -> Outcome:
    exact = s.expected(s.x)
    return compare(s.forward(s.x), exact, s.output_bound(s.x, exact, s.dtype))


@check("dequantized weight")
def _dequantized_weight(s: Subject) -> Outcome:
    if s.weight[1].any():
        return Outcome(SKIPPED, detail="the layer has no dequantize(): the weight was read off its outputs")
    return compare(s.probe(), s.weight[0], s.probe_bound(s.weight[0]))


@check("shapes")
def _shapes(s: Subject) -> Outcome:
    outcomes = []
    for leading in _LEADING:
        rows = s.x[: math.prod(leading)]
        out = s.forward(rows.reshape(*leading, -1))
        if out.shape != (*leading, s.out_features):
            return verdict(False, f"{list(out.shape)} for an input with leading dimensions {list(leading)}")
        outcomes.append(s.same(out.reshape(len(rows), -1), s.forward(rows), rows))
    return worst(outcomes)


@check("empty batch")
def _empty_batch(s: Subject) -> Outcome:
    out, grad_x, *grads = s.run(s.x[:0], s.grad_out[:0])
    assert out is not None and grad_x is not None
    shapes = list(out.shape) == [0, s.out_features] and list(grad_x.shape) == [0, s.in_features]
    return verdict(
        shapes and not any(grad.any() for grad in grads if grad is not None),
        f"output {list(out.shape)}, gradient {list(grad_x.shape)}",
    )


@check("dtypes")
def _dtypes(s: Subject) -> Outcome:
    refused, wrong = [], []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        try:
            out = s.forward(s.x.to(dtype))
        except Exception as error:  # as nn.Linear does when its weight has another dtype
            if dtype == s.dtype:
                raise
            refused.append(f"refuses {name} ({type(error).__name__})")
            continue
        if out.dtype != dtype or not out.isfinite().all():
            wrong.append(f"{name} input gives {str(out.dtype).removeprefix('torch.')}")
    return verdict(not wrong, "; ".join(wrong + refused) or "output has the dtype of the input")


@check("autocast")
def _autocast(s: Subject) -> Outcome:
    def call(x: Tensor) -> Tensor:
        with torch.autocast(s.device.type, torch.bfloat16):
            return s.layer(x)

    out, grad_x = s.output_and_gradient(s.x, s.grad_out.to(torch.bfloat16), call)
    if out.dtype != torch.bfloat16 or grad_x.dtype != s.dtype:
        return verdict(False, f"output {out.dtype}, gradient of {s.dtype} input {grad_x.dtype}")
    exact = s.expected(s.x)
    # torch.autocast may round x to bfloat16 first, too.
    return compare(out, exact, 2 * s.output_bound(s.x, exact, torch.bfloat16))


@check("batch invariance")
def _batch_invariance(s: Subject) -> Outcome:
    whole = s.forward(s.x)
    return worst([s.same(s.forward(s.x[part]), whole[part], s.x[part]) for part in _PARTS])


@check("threads")
def _threads(s: Subject) -> Outcome:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(s.forward(s.x))
    return s.same(results[0], results[1])


@check("repeatable")
def _repeatable(s: Subject) -> Outcome:
    return all_equal(s.run(s.x, s.grad_out), s.run(s.x, s.grad_out))


@check("backward twice")
def _backward_twice(s: Subject) -> Outcome:
    x = s.x.detach().requires_grad_()
    out = s.layer(x)
    first, second = (torch.autograd.grad(out, x, s.grad_out, retain_graph=True)[0] for _ in range(2))
    return equal(first, second)


@check("inputs kept")
def _inputs_kept(s: Subject) -> Outcome:
    before = s.x.clone(), s.grad_out.clone()
    s.run(s.x, s.grad_out)
    changed = [
        name for name, old in zip(("x", "grad_out"), before, strict=True) if not same_bits(getattr(s, name), old)
    ]
    s.x.copy_(before[0])
    s.grad_out.copy_(before[1])
    return verdict(not changed, f"changed in place: {', '.join(changed)}" if changed else "unchanged")


def _layouts(matrix: Tensor) -> Iterator[Tensor]:
    """Matrices of the same values with other strides or another alignment."""
    yield matrix.t().contiguous().t()
    yield torch.stack((matrix, matrix), dim=-1)[..., 0]
    yield torch.nn.functional.pad(matrix, (1, 2))[:, 1:-2]


@check("strided inputs")
def _strided(s: Subject) -> Outcome:
    out, grad_x = s.output_and_gradient(s.x, s.grad_out)
    outcomes = []
    for x, grad_out in zip(_layouts(s.x), _layouts(s.grad_out), strict=True):
        again, gradient = s.output_and_gradient(x, grad_out)
        outcomes += [s.same(again, out), equal(gradient, grad_x) if s.exact else _near(s, gradient, grad_x)]
    expanded = s.x[:1].expand(ROWS, -1)
    outcomes.append(s.same(s.forward(expanded), s.forward(expanded.contiguous()), expanded))
    return worst(outcomes)


def _near(s: Subject, actual: Tensor, expected: Tensor) -> Outcome:
    return compare(actual, expected.double(), 2 * _grad_input_bound(s, expected.double()))


def _grad_input_bound(s: Subject, exact: Tensor) -> Tensor:
    weight, uncertain = s.weight
    grad_out = s.grad_out.double().abs()
    return float_bound(grad_out @ weight.abs(), exact, weight.shape[0], s.dtype) + grad_out @ uncertain


@check("not finite")
def _not_finite(s: Subject) -> Outcome:
    clean, others = s.forward(s.x), torch.arange(ROWS) != 7
    for column, value in ((0, math.nan), (s.in_features // 2, math.inf)):
        x = s.x.clone()
        x[7, column] = value
        out = s.forward(x)
        if out[7].isfinite().any():
            return verdict(False, f"an input row with {value} gives {int(out[7].isfinite().sum())} finite outputs")
        outcome = s.same(out[others], clean[others], s.x[others])
        if outcome.status == FAILED:
            return outcome._replace(detail=f"a row with {value} changes others: {outcome.detail}")
    return verdict(True, "a row with NaN or Inf gives no finite output and leaves other rows alone")


@check("zero row")
def _zero_row(s: Subject) -> Outcome:
    out = s.forward(torch.zeros_like(s.x[:1]))
    off = (out != s.bias.to(s.dtype)).sum().item()  # the sign of a zero is free
    return verdict(off == 0, f"{off} elements differ from the bias" if off else "gives the bias")


@check("saturation")
def _saturation(s: Subject) -> Outcome:
    if s.input_range is None:
        return Outcome(SKIPPED, detail="no static activations: each row has a scale of its own")
    beyond = 3 * s.x
    return s.same(s.forward(beyond), s.forward(beyond.clamp(-s.input_range, s.input_range)))


@check("gradient of x")
def _gradient_of_x(s: Subject) -> Outcome:
    exact = s.grad_out.double() @ s.weight[0]
    return s.gradient(1, exact, _grad_input_bound(s, exact))


def _parameter_index(s: Subject, name: str) -> int | None:
    """The place in the list of `run` of the gradient of a parameter; None: it has none."""
    wanted = [n for n, p in s.layer.named_parameters() if p.requires_grad]
    return 2 + wanted.index(name) if name in wanted else None


@check("gradient of weight")
def _gradient_of_weight(s: Subject) -> Outcome:
    index = _parameter_index(s, "weight")
    if index is None:
        return Outcome(SKIPPED, detail="the weight takes no gradient")
    x, grad_out = s.x.double(), s.grad_out.double()
    exact = grad_out.t() @ x
    actual = s.run(s.x, s.grad_out)[index]
    clipped = (actual == 0) & (exact != 0)
    if clipped.sum() > _CLIPPED * clipped.numel():
        return verdict(False, f"{int(clipped.sum())} of {clipped.numel()} gradients are 0")
    bound = float_bound(grad_out.abs().t() @ x.abs(), exact, ROWS, s.dtype)
    bound = bound + grad_out.abs().t() @ s.rounding(x).expand(ROWS, 1)
    return s.gradient(index, exact.masked_fill(clipped, 0.0), bound)


@check("gradient of bias")
def _gradient_of_bias(s: Subject) -> Outcome:
    index = _parameter_index(s, "bias")
    if index is None:
        return Outcome(SKIPPED, detail="there is no bias, or it takes no gradient")
    exact = s.grad_out.double().sum(0)
    return s.gradient(index, exact, float_bound(s.grad_out.double().abs().sum(0), exact, ROWS, s.dtype))


@check("no gradient unasked")
def _unasked(s: Subject) -> Outcome:
    trainable = any(p.requires_grad for p in s.layer.parameters())
    out = s.layer(s.x)
    return verdict(
        out.requires_grad == trainable, f"the output {'needs' if out.requires_grad else 'needs no'} gradient"
    )


@check("second derivative")
def _second_derivative(s: Subject) -> Outcome:
    x, grad_out = s.x.detach().requires_grad_(), s.grad_out.detach().requires_grad_()
    direction = torch.ones_like(x)
    try:
        (grad_x,) = torch.autograd.grad(s.layer(x), x, grad_out, create_graph=True)
        (found,) = torch.autograd.grad(grad_x, grad_out, direction)
    except RuntimeError:
        return verdict(True, "refused")
    exact = direction.double() @ s.weight[0].t()
    return compare(found, exact, s.output_bound(direction, exact, s.dtype))


@check("checkpointing")
def _checkpointing(s: Subject) -> Outcome:
    plain = s.run(s.x, s.grad_out)
    return all_equal(s.run(s.x, s.grad_out, lambda x: checkpoint(s.layer, x, use_reentrant=False)), plain)


@check("evaluation")
def _evaluation(s: Subject) -> Outcome:
    s.layer.train()
    training = s.layer(s.x).detach()
    s.layer.eval()
    with torch.inference_mode():
        return s.same(s.layer(s.x).clone(), training)


@check("deepcopy")
def _deepcopy(s: Subject) -> Outcome:
    copied = copy.deepcopy(s.layer)
    own, other = ({t.data_ptr() for t in layer.state_dict().values() if _is_plain(t)} for layer in (s.layer, copied))
    if own & other - {0}:
        return verdict(False, "the copy shares memory with the original")
    with torch.no_grad():
        return equal(copied(s.x), s.forward(s.x))


@check("pickle")
def _pickle(s: Subject) -> Outcome:
    file = io.BytesIO()
    torch.save(s.layer, file)
    file.seek(0)
    with torch.no_grad():
        return equal(torch.load(file, weights_only=False)(s.x), s.forward(s.x))


def _is_plain(tensor: object) -> bool:
    """True if a file holds it as an ordinary tensor."""
    return type(tensor) in (Tensor, nn.Parameter) or type(pickle.loads(pickle.dumps(tensor))) is Tensor


@check("state dict")
def _state_dict(s: Subject) -> Outcome:
    file = io.BytesIO()
    torch.save(s.layer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(s.layer)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if _is_plain(tensor):
                tensor.zero_()
        other.load_state_dict(torch.load(file, weights_only=False))
        return equal(other(s.x), s.forward(s.x))


@check("plain tensors")
def _plain_tensors(s: Subject) -> Outcome:
    kinds = {name: type(tensor).__name__ for name, tensor in s.layer.state_dict().items() if not _is_plain(tensor)}
    listed = ", ".join(f"{name} is a {kind}" for name, kind in kinds.items())
    return verdict(not kinds, listed or "safetensors can hold the state dict")


@check("cast to bfloat16")
def _cast(s: Subject) -> Outcome:
    x = s.x.to(torch.bfloat16)
    copied = copy.deepcopy(s.layer).to(torch.bfloat16)
    # A weight that is quantized at each call may round to other integers after the cast.
    expected = Subject(copied, torch.bfloat16, s.seed, s.input_range) if _parameter_index(s, "weight") else s
    exact = expected.expected(x)
    with torch.no_grad():
        out = copied(x)
    return compare(out, exact, expected.output_bound(x, exact, torch.bfloat16))


@check("compile")
def _compile(s: Subject) -> Outcome:
    torch.compiler.reset()  # or, after the classes and dtypes of several layers, it would give up
    with _quiet_dynamo():
        compiled = torch.compile(s.layer, backend="aot_eager", fullgraph=True, dynamic=False)
        out, grad_x = s.output_and_gradient(s.x, s.grad_out, compiled)
    expected, gradient = s.output_and_gradient(s.x, s.grad_out)
    near = equal(grad_x, gradient) if s.exact else _near(s, grad_x, gradient)
    return worst([s.same(out, expected), near])


@contextmanager
def _quiet_dynamo() -> Iterator[None]:
    """torch.compile without the log of a graph that cannot be captured; the exception says it."""
    logger = logging.getLogger("torch._dynamo")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)

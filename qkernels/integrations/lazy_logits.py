"""`LazyLogits`: the logits of a head that trains, which are made only if something other than a cross entropy asks.

What a model does to its logits on the way to its loss (slices that shift the labels, views, casts, a scale, a soft cap,
a bias) is written down; `F.cross_entropy` of the result is `linear_cross_entropy` of the hidden states. Any other
operation gets the logits that the head would have given, with their gradients. So the model's own code says what its
loss is, and all that a call knows is in its own tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the whole of Dynamo
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ..nn.linear import QuantLinear
from ..nn.loss import linear_cross_entropy

# A step from the head's output to the logits: "mul" by a number, "tanh", "add" of a tensor [N], "to" a dtype.
Step = tuple[str, Any]


@dataclass
class HeadCall:
    """A call of a head: what its logits have in common, however they are sliced.

    Attributes:
        head: the layer.
        dense: its forward.
        terms: label_smoothing and z_loss, which every cross entropy gets.
        on_made: told when the gradient of a loss reaches logits that were made in full.
        autocast: the dtype that autocast asked for.
        fused: whether a cross entropy was computed from the hidden states.
    """

    head: nn.Linear | QuantLinear
    dense: Callable[[Tensor], Tensor]
    terms: dict[str, float]
    on_made: Callable[[], None]
    autocast: torch.dtype | None
    fused: bool = False

    def context(self, device: torch.device) -> torch.autocast:
        """The autocast mode of the call, which a backward or a loss outside of it has to have too."""
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)


class LazyLogits(Tensor):
    """Logits [..., N] of hidden states [..., K], made when they are needed.

    An ordinary tensor to its user: shape, dtype, device, autograd and every operation are those of the logits. Writing
    into it in place makes it an ordinary one, or raises RuntimeError if another such tensor was sliced from it.
    """

    call: HeadCall
    hidden: Tensor
    steps: tuple[Step, ...]
    made: Tensor | None  # the logits, once something asked for them
    written: bool  # `made` is more than head and steps say
    shared: bool  # others were derived from this one, or this one from another

    @staticmethod
    def __new__(cls, call: HeadCall, hidden: Tensor, steps: tuple[Step, ...], dtype: torch.dtype) -> LazyLogits:
        shape = (*hidden.shape[:-1], call.head.out_features)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        self.call, self.hidden, self.steps = call, hidden, steps
        self.made, self.written, self.shared = None, False, False
        return self

    @staticmethod
    @_disable_dynamo
    def of(call: HeadCall, hidden: Tensor, steps: tuple[Step, ...], dtype: torch.dtype) -> LazyLogits:
        """The logits, in the graph of autograd."""
        tensors = [*call.head.parameters(), *(value for kind, value in steps if kind == "add")]
        return _Connected.apply(call, steps, dtype, hidden, *tensors)

    def derived(self, hidden: Tensor, steps: tuple[Step, ...], dtype: torch.dtype) -> LazyLogits:
        self.shared = True
        logits = LazyLogits.of(self.call, hidden, steps, dtype)
        logits.shared = True
        return logits

    def compute(self) -> Tensor:
        """What the tensor holds: the logits, without gradients."""
        if self.made is None:
            with torch.no_grad():
                self.made = _compute(self.call, self.hidden, self.steps)
        return self.made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], cls) and not args[0].written:
            result = handler(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if getattr(func, "__name__", "") in _OF_MEMORY:
            args = tree_map(_computed, args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = {}
        for argument, value in _arguments(func, args, kwargs):
            alias = argument.alias_info
            if alias is None or not isinstance(value, cls):
                continue
            if alias.is_write and value.shared:
                raise RuntimeError(
                    f"{func} cannot write into the logits of a head patched by patch_loss after they were sliced or "
                    "cast; use the operation that returns a new tensor, or patch.disabled()"
                )
            value.written = True  # by this operation, or through the view that it returns
            if alias.is_write:
                written[id(value.compute())] = value
        result = func(*tree_map(_computed, args), **tree_map(_computed, kwargs))
        return tree_map(lambda value: written.get(id(value), value), result)


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The arguments of the schema, each with every value that it was given."""
    pairs = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        pairs += [(argument, item) for item in (value if isinstance(value, list | tuple) else [value])]
    return pairs


def _computed(value: object) -> object:
    return value.compute() if isinstance(value, LazyLogits) else value


def _compute(call: HeadCall, hidden: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """As the head and the model would."""
    with call.context(hidden.device):
        logits = call.dense(hidden)
    for kind, value in steps:
        if kind == "mul":
            logits = logits * value
        elif kind == "div":
            logits = logits / value
        elif kind == "tanh":
            logits = torch.tanh(logits)
        elif kind == "add":
            logits = logits + value
        else:
            logits = logits.to(value)
    return logits


class _Connected(torch.autograd.Function):
    """Puts `LazyLogits` into the graph; the backward is for whatever was computed from the logits themselves."""

    @staticmethod
    def forward(
        ctx: Any, call: HeadCall, steps: tuple[Step, ...], dtype: torch.dtype, hidden: Tensor, *tensors: Tensor
    ) -> LazyLogits:
        ctx.call, ctx.steps = call, steps
        ctx.save_for_backward(hidden, *tensors)
        return LazyLogits(call, hidden, steps, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call.on_made()
        hidden, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        inputs = [hidden.detach().requires_grad_(wanted[0]), *tensors]
        with torch.enable_grad():
            logits = _compute(ctx.call, inputs[0], ctx.steps)
        chosen = [tensor for tensor, needed in zip(inputs, wanted, strict=True) if needed]
        grads = iter(torch.autograd.grad(logits, chosen, grad, allow_unused=True))
        return None, None, None, *(next(grads) if needed else None for needed in wanted)


def _folded(steps: tuple[Step, ...]) -> tuple[float, Tensor | None, float | None] | None:
    """(scale, bias, cap): the logits are `scale * y + bias`, then soft-capped. None: they are something else."""
    scale, bias, outer, capped = 1.0, None, 1.0, False
    for kind, value in steps:
        if kind in ("mul", "div"):
            factor = value if kind == "mul" else 1.0 / value
            if capped:
                outer *= factor
            else:
                scale, bias = scale * factor, None if bias is None else bias * factor
        elif kind == "tanh":
            if capped:
                return None
            capped = True
        elif kind == "add":
            if capped:
                return None
            bias = value if bias is None else bias + value
    if not capped:
        return scale, bias, None
    scale, bias = scale * outer, None if bias is None else bias * outer
    return (1.0 if abs(scale - 1.0) < 1e-12 else scale), bias, outer


def _cross_entropy(
    func: Any,
    logits: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    folded, terms = _folded(logits.steps), logits.call.terms
    smoothing = label_smoothing or terms.get("label_smoothing", 0.0)
    quantized = isinstance(logits.call.head, QuantLinear)
    fits = (
        folded is not None
        and (folded[2] is None or folded[2] >= 2.0**-126)
        and size_average is None
        and reduce is None
        and target.dtype == torch.int64
        and target.shape == logits.shape[:-1]
        and not (smoothing and (weight is not None or (quantized and folded[2] is not None)))
    )
    if folded is None or not fits:
        if any(terms.values()):
            raise ValueError(
                "label_smoothing and z_loss of patch_loss need a cross entropy of class indices, without weight and "
                "legacy arguments (label_smoothing of a quantized head: without soft-capped logits); set them to 0"
            )
        return NotImplemented
    scale, bias, cap = folded
    head, hidden = logits.call.head, logits.hidden
    with logits.call.context(hidden.device):
        if scale != 1.0:
            if head.bias is not None:
                bias = (scale - 1.0) * head.bias if bias is None else bias + (scale - 1.0) * head.bias
            exact = math.frexp(scale)[0] in (0.5, -0.5)
            hidden = (hidden.float() if quantized and not exact else hidden) * scale
        if not quantized and head.bias is not None:
            bias = head.bias if bias is None else bias + head.bias
        loss = linear_cross_entropy(
            hidden,
            head if isinstance(head, QuantLinear) else head.weight,
            target.to(hidden.device),
            linear_bias=None if bias is None else bias.reshape(-1),
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            softcap=cap,
            z_loss=terms.get("z_loss", 0.0),
        )
    logits.call.fused = True
    return loss


def _index(func: Any, logits: LazyLogits, index: Any) -> Tensor:
    """Slices and masks of the tokens."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, list | tuple) for item in items):
        return NotImplemented
    taken = sum(
        item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else item is not None and item is not ...
        for item in items
    )
    touches = taken >= logits.dim() or (any(item is ... for item in items) and items[-1] is not ...)
    if touches and items[-1] != slice(None):
        return NotImplemented
    return logits.derived(logits.hidden[index], logits.steps, logits.dtype)


def _reshape(func: Any, logits: LazyLogits, *args: Any, **kwargs: Any) -> Tensor:
    """Another shape of the tokens."""
    like = func(torch.empty(logits.shape, dtype=logits.dtype, device="meta"), *args, **kwargs)
    shape = like.shape
    if len(shape) == 0 or shape[-1] != logits.shape[-1] or like.dtype != logits.dtype:
        return NotImplemented
    if shape == logits.shape:
        return logits
    hidden = logits.hidden.reshape(*shape[:-1], logits.hidden.shape[-1])
    return logits.derived(hidden, logits.steps, logits.dtype)


def _contiguous(func: Any, logits: LazyLogits, *args: Any, **kwargs: Any) -> Tensor:
    return NotImplemented if args or kwargs else logits


def _cast(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda func, logits, **kwargs: NotImplemented if kwargs else _to(func, logits, dtype)


def _to(func: Any, logits: LazyLogits, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs.pop("copy", False):
        return NotImplemented
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    dtype = dtype or logits.dtype
    if device not in (None, logits.device) or layout is not None or dtype not in _DTYPES:
        return NotImplemented
    if dtype == logits.dtype:
        return logits
    return logits.derived(logits.hidden, (*logits.steps, ("to", dtype)), dtype)


def _scale(kind: str) -> Callable[..., Tensor]:
    def handler(func: Any, logits: LazyLogits, other: Any, **kwargs: Any) -> Tensor:
        number = isinstance(other, int | float) and not isinstance(other, bool) and math.isfinite(other) and other != 0
        if kwargs or not number:
            return NotImplemented
        return logits.derived(logits.hidden, (*logits.steps, (kind, float(other))), logits.dtype)

    return handler


def _tanh(func: Any, logits: LazyLogits) -> Tensor:
    return logits.derived(logits.hidden, (*logits.steps, ("tanh", None)), logits.dtype)


def _add(func: Any, logits: LazyLogits, other: Any, **kwargs: Any) -> Tensor:
    """A bias of the classes."""
    fits = (
        not kwargs
        and isinstance(other, Tensor)
        and other.is_floating_point()
        and other.device == logits.device
        and other.dim() <= logits.dim()
        and other.numel() == logits.shape[-1]
        and other.shape[-1:] == logits.shape[-1:]
    )
    if not fits:
        return NotImplemented
    dtype = torch.promote_types(logits.dtype, other.dtype)
    if dtype not in _DTYPES:
        return NotImplemented
    return logits.derived(logits.hidden, (*logits.steps, ("add", other)), dtype)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    Tensor.__getitem__: _index,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten), _reshape),
    **dict.fromkeys((Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze), _reshape),
    Tensor.contiguous: _contiguous,
    Tensor.to: _to,
    **{f: _cast(d) for f, d in zip((Tensor.float, Tensor.bfloat16, Tensor.half), _DTYPES, strict=True)},
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _scale("mul")),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div, Tensor.true_divide, torch.true_divide), _scale("div")),
    **dict.fromkeys((Tensor.tanh, torch.tanh, F.tanh), _tanh),
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), _add),
}
# What reads the memory of a tensor without an operator.
_OF_MEMORY = {"data_ptr", "untyped_storage", "storage", "numpy", "tolist", "__array__", "__dlpack__", "__reduce_ex__"}

"""`patch_loss`: let a transformers language model train through `linear_cross_entropy`, without edits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..nn.linear import QuantLinear, autocast_dtype
from ..nn.loss import check_options
from .lazy_logits import HeadCall, LazyLogits

_DISABLED: ContextVar[tuple[PatchedLoss, ...]] = ContextVar("disabled patches", default=())


class PatchedLoss:
    """A model whose training loss is fused with its head; see `patch_loss`. As a context manager it ends with `remove`.

    Attributes:
        enabled: False: the model computes logits and loss as it did before, in all threads.
    """

    def __init__(self, model: nn.Module, head: nn.Linear | QuantLinear, terms: dict[str, float]) -> None:
        self.enabled = True
        self._model, self._head, self._terms, self._warned = model, head, terms, False
        self._kind = _plain_class(head)
        head.__class__ = _LAZY[self._kind]
        head._patches = [*getattr(head, "_patches", []), self]
        self._hook = model.register_forward_hook(self._check, with_kwargs=True)

    def remove(self) -> None:
        """Give the model its own loss back; a second time nothing happens."""
        self._hook.remove()
        patches = [patch for patch in getattr(self._head, "_patches", []) if patch is not self]
        if patches:
            self._head._patches = patches
        elif type(self._head) is _LAZY[self._kind]:
            self._head.__class__ = self._kind
            del self._head._patches

    def __enter__(self) -> PatchedLoss:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model's own logits and loss inside the block; other threads go on as they were."""
        token = _DISABLED.set((*_DISABLED.get(), self))
        try:
            yield
        finally:
            _DISABLED.reset(token)

    @property
    def active(self) -> bool:
        """Whether a training forward in this thread is fused."""
        return self.enabled and self not in _DISABLED.get()

    def _check(self, model: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """Say so if the loss was not computed from the head's logits, so that this patch did nothing."""
        if torch.compiler.is_compiling() or kwargs.get("labels") is None:
            return
        if not (model.training and torch.is_grad_enabled() and self.active):
            return
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
        if any(isinstance(value, LazyLogits) and value.call.fused for value in values):
            return
        problem = (
            f"patch_loss has no effect on {type(model).__name__}: its loss is no F.cross_entropy of its head's output "
            "that could be fused, or its head was replaced or put into eval mode after patch_loss"
        )
        if any(self._terms.values()):
            raise ValueError(f"{problem}; label_smoothing and z_loss would be missing, call remove() first")
        self._warn(problem)

    def _made(self) -> None:
        terms = "; label_smoothing and z_loss of patch_loss are not in it" if any(self._terms.values()) else ""
        self._warn(
            f"the logits of {type(self._model).__name__} were made in full for a loss other than F.cross_entropy with "
            f"class indices, so that patch_loss saves nothing there{terms}"
        )

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(problem, stacklevel=2)


def patch_loss(model: nn.Module, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> PatchedLoss:
    """Fuse head and loss of a transformers language model while it trains.

    The head of the model then answers a forward in training mode, with gradients, with logits that are not made yet.
    Where the model (or a loop of one's own) takes `F.cross_entropy` of them, after shifting, scaling, soft-capping or
    adding a bias, `linear_cross_entropy` computes it from the hidden states, and tokens without a label cost nothing.
    Every other use of `outputs.logits` makes them, right, at the cost that the patch saves. Any other forward
    (evaluation, generation) is as before. Trainer's own `label_smoothing_factor` takes the labels away from the model
    and computes its loss from all logits; use the argument here instead.

    Args:
        model: a causal, masked or encoder-decoder language model, a PEFT model of one, or what `torch.compile` made of
            one, with a frozen `QuantLinear` or an `nn.Linear` as head.
        label_smoothing, z_loss: of `linear_cross_entropy`; they apply to every cross entropy of the logits.

    Returns:
        The patch: `remove()` undoes it, `with patch.disabled():` does for a block, and `with patch_loss(model):` ends
        with the block. Of several patches on a model the last one holds; they can be removed in any order.

    Raises:
        ValueError: if the model has no such head, or `label_smoothing` or `z_loss` do not fit. In a training forward
            with `labels=`: if they cannot be part of the loss of the model (without them this is a warning, once).
    """
    inner = _unwrapped(model)
    head = _head_of(inner)
    if isinstance(head, QuantLinear) and head.mode != "frozen":
        raise ValueError(f"head must be frozen or in float, got a QuantLinear in mode {head.mode!r}")
    check_options("mean", label_smoothing, None, z_loss)
    config = getattr(inner, "config", None)
    softcap = getattr(config.get_text_config() if config is not None else None, "final_logit_softcapping", None)
    if softcap and label_smoothing and isinstance(head, QuantLinear):
        raise ValueError("label_smoothing must be 0 for a quantized head with soft-capped logits")
    return PatchedLoss(inner, head, {"label_smoothing": float(label_smoothing), "z_loss": float(z_loss)})


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model in what torch.compile, PEFT and DistributedDataParallel put around it."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def _head_of(model: nn.Module) -> nn.Linear | QuantLinear:
    name = type(model).__name__
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    kind = _plain_class(head)
    if kind not in _LAZY:
        raise ValueError(f"model must have a QuantLinear or nn.Linear as its head, got {name} with {kind.__name__}")
    if "forward" in vars(head):
        raise ValueError(
            f"model's head must run its own forward, but that of {name} was replaced, as accelerate does to spread a "
            "model over devices (device_map)"
        )
    return head


class _Lazy:
    """A head whose training forward gives `LazyLogits`. Its class says so, which `torch.compile` guards."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and getattr(self, "mode", "frozen") == "frozen":
            return self._answer(input)
        return super().forward(input)

    @_disable_dynamo
    def _answer(self, input: Tensor) -> Tensor:
        """The last active patch's logits."""
        patch = next((patch for patch in reversed(self._patches) if patch.active), None)
        if patch is None or input.shape[-1:] != (self.in_features,):
            return super().forward(input)
        autocast = autocast_dtype(input.device.type)
        call = HeadCall(self, super().forward, patch._terms, patch._made, autocast)
        return LazyLogits.of(call, input, (), autocast or input.dtype)


class _LazyLinear(_Lazy, nn.Linear):
    pass


class _LazyQuantLinear(_Lazy, QuantLinear):
    pass


_LAZY: dict[type, type] = {nn.Linear: _LazyLinear, QuantLinear: _LazyQuantLinear}


def _plain_class(head: object) -> type:
    """The class of a head, patched or not."""
    return next((plain for plain, lazy in _LAZY.items() if type(head) is lazy), type(head))

"""`patch_loss`: let a transformers causal language model train through `linear_cross_entropy`, without edits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .loss import linear_cross_entropy
from .nn import QuantLinear

_ABSENT = object()


class PatchedLoss:
    """A model whose training loss is fused with its head; see `patch_loss`. As a context manager it ends with `remove`.

    Attributes:
        enabled: False: the model computes logits and loss as it did before.
    """

    def __init__(self, model: nn.Module, head: nn.Linear, softcap: float | None, terms: dict[str, float]) -> None:
        self.enabled = True
        self._model, self._head, self._softcap, self._terms = model, head, softcap, terms
        self._hidden: Tensor | None = None
        self._saved: list[tuple[nn.Module, str, object]] = []
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Give the model its own loss back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> PatchedLoss:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model's own logits and loss inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.enabled and model.training and torch.is_grad_enabled() and kwargs.get("labels") is not None:
            self._saved = _replace((self._head, "forward", self._keep), (model, "_loss_function", self._loss))

    def _end(self, *_: object) -> None:
        _restore(self._saved)
        self._saved, self._hidden = [], None

    def _keep(self, hidden: Tensor) -> Tensor:
        self._hidden = hidden
        return hidden.new_empty((*hidden.shape[:-1], 0))

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """As transformers' `ForCausalLMLoss`, from the hidden states that the head was given."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
        hidden, head = self._hidden, self._head
        quantized = isinstance(head, QuantLinear)
        loss = linear_cross_entropy(
            hidden.flatten(0, -2),
            head if quantized else head.weight,
            shift_labels.flatten().to(hidden.device),
            linear_bias=None if quantized else head.bias,
            reduction="mean" if num_items_in_batch is None else "sum",
            ignore_index=ignore_index,
            softcap=self._softcap,
            **self._terms,
        )
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def patch_loss(model: nn.Module, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> PatchedLoss:
    """Fuse head and loss of a transformers causal language model while it trains.

    A forward in training mode, with gradients and `labels=`, then computes `loss` by `linear_cross_entropy`, as
    `Trainer` does; its `logits` are empty ([B, T, 0]), because they are never made. Any other forward (evaluation,
    generation, without labels) is as before. Trainer's own `label_smoothing_factor` takes the labels away from the
    model, which therefore makes its logits; use the argument here instead.

    Args:
        model: a causal language model, or a PEFT model of one, with a `QuantLinear` or `nn.Linear` as head. Its
            `config.final_logit_softcapping` is followed.
        label_smoothing, z_loss: of `linear_cross_entropy`.

    Returns:
        The patch: `remove()` undoes it, `with patch.disabled():` does for a block, and `with patch_loss(model):` ends
        with the block.

    Raises:
        TypeError: if the model has no such head.
        ValueError: if the model makes something else of its head's output (found out by running it on two tokens), or
            the head is a `QuantLinear` whose weight is trained.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal_lm.get_output_embeddings() if hasattr(causal_lm, "get_output_embeddings") else None
    if not (isinstance(head, QuantLinear) or type(head) is nn.Linear):
        raise TypeError(f"model must have a QuantLinear or nn.Linear as its head, got {type(head).__name__}")
    if isinstance(head, QuantLinear) and head.mode != "frozen":
        raise ValueError(f"head must be frozen or in float, got a QuantLinear in mode {head.mode!r}")
    softcap = getattr(causal_lm.config.get_text_config(), "final_logit_softcapping", None)
    if softcap and label_smoothing and isinstance(head, QuantLinear):
        raise ValueError("label_smoothing must be 0 for a quantized head with soft-capped logits")
    _check_model(causal_lm, head, softcap)
    return PatchedLoss(causal_lm, head, softcap, {"label_smoothing": label_smoothing, "z_loss": z_loss})


def _check_model(model: nn.Module, head: nn.Linear, softcap: float | None) -> None:
    """Run the model on two tokens with made-up logits and look at what its loss function is given."""
    given: list[Tensor] = []

    def make_logits(hidden: Tensor) -> Tensor:
        logits = torch.linspace(-50, 50, head.out_features, device=hidden.device, dtype=hidden.dtype)
        return logits.expand(*hidden.shape[:-1], -1)

    def keep_logits(logits: Tensor, *_: object, **__: object) -> Tensor:
        given.append(logits)
        return logits.new_zeros(())

    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(head.parameters()).device)
    training = model.training
    saved = _replace((head, "forward", make_logits), (model, "_loss_function", keep_logits))
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids, labels=ids, use_cache=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"model must be a causal language model, but two tokens gave: {error}") from error
    finally:
        model.train(training)
        _restore(saved)
    expected = make_logits(torch.empty(1, 2, 1, device=ids.device, dtype=given[0].dtype)) if given else None
    if expected is not None and softcap:
        expected = softcap * torch.tanh(expected / softcap)
    if expected is None or not torch.allclose(given[0], expected, rtol=0.02, atol=0.02):
        found = "a loss of its own" if expected is None else "scaled or changed logits"
        raise ValueError(f"model must pass its head's output to loss_function, but {type(model).__name__} has {found}")


def _replace(*attributes: tuple[nn.Module, str, object]) -> list[tuple[nn.Module, str, object]]:
    """Set instance attributes; returns what `_restore` needs to undo it."""
    saved = [(module, name, vars(module).get(name, _ABSENT)) for module, name, _ in attributes]
    for module, name, value in attributes:
        vars(module)[name] = value
    return saved


def _restore(saved: list[tuple[nn.Module, str, object]]) -> None:
    for module, name, value in saved:
        if value is _ABSENT:
            del vars(module)[name]
        else:
            vars(module)[name] = value

"""`patch_loss`: let a transformers language model train through `linear_cross_entropy`, without edits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .loss import linear_cross_entropy
from .nn import QuantLinear

_ABSENT = object()
_IGNORE = -100


@dataclass(frozen=True)
class _Kind:
    """How a model computes its loss.

    Attributes:
        shifted: whether a label is predicted from the token before it (causal), or from its own (masked).
        own: whether the model's forward computes the loss itself, instead of calling `loss_function`.
    """

    shifted: bool
    own: bool


class PatchedLoss:
    """A model whose training loss is fused with its head; see `patch_loss`. As a context manager it ends with `remove`.

    Attributes:
        enabled: False: the model computes logits and loss as it did before.
    """

    def __init__(self, model: nn.Module, head: nn.Linear, kind: _Kind, terms: dict[str, float | None]) -> None:
        self.enabled = True
        self._model, self._head, self._kind, self._terms = model, head, kind, terms
        self._hidden: Tensor | None = None
        self._labels: Tensor | None = None
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

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not (self.enabled and model.training and torch.is_grad_enabled() and kwargs.get("labels") is not None):
            return None
        self._saved = _replace((self._head, "forward", self._keep), (model, "_loss_function", self._loss))
        if not self._kind.own:
            return None
        self._labels = kwargs["labels"]
        return args, kwargs | {"labels": None}

    def _end(self, model: nn.Module, args: tuple, output: object) -> object:
        _restore(self._saved)
        labels, hidden, self._saved, self._labels, self._hidden = self._labels, self._hidden, [], None, None
        if labels is None or output is None:  # None: the forward failed
            return None
        loss = self._mean(hidden, labels)
        if isinstance(output, tuple):
            return loss, *output
        return type(output)(**{"loss": loss} | {name: value for name, value in output.items() if name != "loss"})

    def _keep(self, hidden: Tensor) -> Tensor:
        self._hidden = hidden
        return hidden.new_empty((*hidden.shape[:-1], 0))

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = _IGNORE,
        shift_labels: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """As transformers' losses of causal and masked models, from the hidden states that the head was given."""
        if shift_labels is None:
            shift_labels = _shift(labels, ignore_index) if self._kind.shifted else labels
        return self._mean(self._hidden, shift_labels, num_items_in_batch, ignore_index)

    def _mean(
        self, hidden: Tensor, targets: Tensor, items: Tensor | int | None = None, ignore_index: int = _IGNORE
    ) -> Tensor:
        """The loss summed over the targets and divided by `items`; None: by their number."""
        head, quantized = self._head, isinstance(self._head, QuantLinear)
        loss = linear_cross_entropy(
            hidden.flatten(0, -2),
            head if quantized else head.weight,
            targets.flatten().to(hidden.device),
            linear_bias=None if quantized else head.bias,
            reduction="mean" if items is None else "sum",
            ignore_index=ignore_index,
            **self._terms,
        )
        return loss if items is None else loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


def patch_loss(model: nn.Module, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> PatchedLoss:
    """Fuse head and loss of a transformers causal or masked language model while it trains.

    A forward in training mode, with gradients and `labels=`, then computes `loss` by `linear_cross_entropy`, as
    `Trainer` does; its `logits` are empty ([B, T, 0]), because they are never made, and tokens without a label cost
    nothing. Any other forward (evaluation, generation, without labels) is as before. Trainer's own
    `label_smoothing_factor` takes the labels away from the model, which therefore makes its logits; use the argument
    here instead.

    Args:
        model: a causal or masked language model, or a PEFT model of one, with a `QuantLinear` or `nn.Linear` as head.
            Its `config.final_logit_softcapping` is followed.
        label_smoothing, z_loss: of `linear_cross_entropy`.

    Returns:
        The patch: `remove()` undoes it, `with patch.disabled():` does for a block, and `with patch_loss(model):` ends
        with the block.

    Raises:
        TypeError: if the model has no such head.
        ValueError: if the model's loss is not the cross entropy of its head's output (found out by running it on two
            tokens), or the head is a `QuantLinear` whose weight is trained.
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
    kind = _kind_of(causal_lm, head, softcap)
    terms = {"softcap": softcap, "label_smoothing": label_smoothing, "z_loss": z_loss}
    return PatchedLoss(causal_lm, head, kind, terms)


def _shift(labels: Tensor, ignore_index: int) -> Tensor:
    """Each token's label becomes that of the next one."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def _kind_of(model: nn.Module, head: nn.Linear, softcap: float | None) -> _Kind:
    """Run the model on two tokens with made-up logits, and see which cross entropy of them is its loss.

    Raises:
        ValueError: if it is none.
    """
    given: list[Tensor] = []
    loss_function, name, training = model.loss_function, type(model).__name__, model.training

    def make_logits(hidden: Tensor) -> Tensor:
        logits = torch.linspace(-50, 50, head.out_features, device=hidden.device, dtype=hidden.dtype)
        return logits.expand(*hidden.shape[:-1], -1)

    def keep_logits(logits: Tensor, *args: object, **kwargs: object) -> Tensor:
        given.append(logits)
        return loss_function(logits, *args, **kwargs)

    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(head.parameters()).device)
    labels = torch.tensor([[0, head.out_features - 1]], device=ids.device)
    saved = _replace((head, "forward", make_logits), (model, "_loss_function", keep_logits))
    try:
        with torch.no_grad():
            loss = model.eval()(input_ids=ids, labels=labels).loss
            own = not given
            logits = model(input_ids=ids).logits if own else given[0]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"model must be a causal or masked language model, but with two tokens {name}: {error}"
        ) from error
    finally:
        model.train(training)
        _restore(saved)
    expected = make_logits(torch.empty(1, 2, 1, device=ids.device, dtype=logits.dtype))
    if softcap:
        expected = softcap * torch.tanh(expected / softcap)
    if not _close(logits, expected):
        raise ValueError(f"model must pass its head's output to the loss, but {name} has scaled or changed logits")
    for shifted in (True, False):
        targets = _shift(labels, _IGNORE) if shifted else labels
        if _close(loss.float(), nn.functional.cross_entropy(expected[0].float(), targets[0])):
            return _Kind(shifted, own)
    raise ValueError(f"model's loss must be a cross entropy of its logits, but {name} has a loss of its own")


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.02, atol=0.02)


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

"""Who trains: torch's floats, our layers, and other libraries; each converts the float model its own way."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ...finetune.models import embedding_scheme
from ...formats.scheme import QuantScheme
from ...integrations.fused_loss import patch_loss
from ...system.host import DTYPES, fast_bf16, pick_dtype
from ..torch_baselines import onednn_float32
from .cases import FROZEN, FULL, LORA, Case, Language

GROUP = 128
FUSED = " + loss"
COMPILED = " compiled"
MODES = {FULL: ("qat", "int8"), FROZEN: ("frozen",), LORA: ("frozen",)}


class Contender:
    """A way to train. A subclass states the attributes and overrides what differs.

    Attributes:
        name: stable, unique within a case.
        ours: whether it is a layer of qkernels.
        trains: the cases it can take part in.
        module: the package it needs, or None.
        tolerance: the largest relative error of the gradient of the input (`Mlp`).
    """

    name: str
    ours = False
    trains: tuple[str, ...] = (FULL, FROZEN, LORA)
    module: str | None = None
    tolerance = 0.3

    @property
    def dtype(self) -> torch.dtype:
        """Of the model before it is converted, and of its inputs."""
        return pick_dtype("auto")

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None."""
        if self.module is not None:
            try:
                importlib.import_module(self.module)
            except Exception as error:  # a broken installation may raise anything, and is a reason too
                return f"cannot import {self.module}: {type(error).__name__}: {error}".splitlines()[0]
        return None

    def convert(self, model: nn.Module) -> nn.Module:
        return model

    def scope(self) -> AbstractContextManager[object]:
        """Settings that hold while its steps are made."""
        return nullcontext()


class Float(Contender):
    """The model as it is, parameters and optimizer in one dtype; `fused`: with our `patch_loss`, and nothing else;
    `compiled`: by `torch.compile`. `device`: where it runs, "cpu" or "cuda".
    """

    tolerance = 0.02

    def __init__(self, dtype: str, fused: bool = False, compiled: bool = False, device: str = "cpu") -> None:
        self.name = f"torch {dtype}" + (FUSED if fused else "") + (COMPILED if compiled else "")
        self._dtype, self._fused, self._compiled, self._device = DTYPES[dtype], fused, compiled, device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def unavailable(self) -> str | None:
        if self._device == "cpu" and self._dtype == torch.bfloat16 and not fast_bf16():
            return "this CPU has no bfloat16 instructions: torch would take many times as long as in float32"
        return None

    def convert(self, model: nn.Module) -> nn.Module:
        if self._fused:
            patch_loss(model)
        if self._compiled:
            model.compile()  # in place, when it is first called
        return model


class OneDnn(Float):
    """float32 through oneDNN, which may multiply in bfloat16."""

    def __init__(self) -> None:
        super().__init__("float32")
        self.name = "torch float32 oneDNN"

    def scope(self) -> AbstractContextManager[object]:
        return onednn_float32()


@dataclass
class Ours(Contender):
    """`quantize_` with a scheme, mode and gradient; `fused`: `patch_loss` too, head and loss in one product."""

    scheme: str
    mode: str
    grad_dtype: str
    fused: bool = False
    ours = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.scheme} {self.mode} {self.grad_dtype}" + (FUSED if self.fused else "")

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        return 0.05 if QuantScheme.parse(self.scheme).weight_bits == 8 else 0.3

    def unavailable(self) -> str | None:
        import qkernels

        try:
            qkernels.QuantLinear(1, 1, False, self.scheme, mode=self.mode, grad_dtype=self.grad_dtype, device="meta")
        except ValueError as error:
            return str(error)
        return None

    def convert(self, model: nn.Module) -> nn.Module:
        import qkernels

        if not self.fused:
            qkernels.quantize_(model, self.scheme, self.mode, grad_dtype=self.grad_dtype)
            return model
        # A head that is trained is tied to a float embedding and stays as it is.
        embeddings = self.mode == "frozen" and embedding_scheme(self.scheme)
        qkernels.quantize_(model, self.scheme, self.mode, grad_dtype=self.grad_dtype, embeddings=embeddings)
        patch_loss(model)
        return model


class BitsAndBytesNf4(Contender):
    """4-bit weights that are dequantized for each product; the head stays in float, as transformers leaves it."""

    name, module, trains = "bitsandbytes nf4", "bitsandbytes", (FROZEN, LORA)

    def convert(self, model: nn.Module) -> nn.Module:
        from bitsandbytes.nn import Linear4bit, Params4bit

        for name, layer in list(model.named_modules()):
            if type(layer) is not nn.Linear or name == "lm_head":
                continue
            quantized = Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, self.dtype, quant_type="nf4"
            )
            quantized.weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
            quantized.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized.to("cpu"))
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks
        return model


class TorchAoQat(Contender):
    """Fake quantization: int8 activations per token, int4 weights in groups."""

    name, module, trains = f"torchao qat int4-g{GROUP}", "torchao", (FULL,)

    def convert(self, model: nn.Module) -> nn.Module:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weight = IntxFakeQuantizeConfig(torch.int4, group_size=GROUP, is_symmetric=True)  # type: ignore[attr-defined]
        quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
        return model


class Sdnq(Contender):
    """int8 products forward and backward, quantized from float weights at each step."""

    name, module, trains = "sdnq int8", "sdnq", (FULL,)

    def convert(self, model: nn.Module) -> nn.Module:
        from sdnq.training import sdnq_training_post_load_quant

        return sdnq_training_post_load_quant(
            model, weights_dtype="int8", quantized_matmul_dtype="int8", group_size=-1, use_quantized_matmul=True,
            use_static_quantization=False, use_grad_ckpt=False,
        )  # fmt: skip


def contenders(
    case: Case,
    schemes: Sequence[str],
    grad_dtypes: Sequence[str],
    *,
    peers: bool,
    compiled: bool = False,
    device: str = "cpu",
) -> list[Contender]:
    """All for a case; whether they can run here is asked of each."""
    found: list[Contender] = [Float("float32"), Float("bfloat16", device=device)]
    found += [OneDnn()] if device == "cpu" else []
    found += [Float("bfloat16", compiled=True, device=device)] if compiled else []
    losses = (False, True) if isinstance(case, Language) else (False,)
    found += [Float(str(pick_dtype("auto")).removeprefix("torch."), fused=True)] if True in losses else []
    found += [
        Ours(scheme, mode, grad_dtype, fused)
        for scheme in schemes
        for mode in MODES[case.trains]
        for grad_dtype in grad_dtypes
        for fused in losses
    ]
    if peers:
        found += [BitsAndBytesNf4(), TorchAoQat(), Sdnq()]
    return [contender for contender in found if case.trains in contender.trains]

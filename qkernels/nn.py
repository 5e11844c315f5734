"""`QuantLinear`: the drop-in module; its state is plain tensors in the canonical storage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops, quantize
from .autograd import quant_linear
from .quantize import FLOAT_DTYPES, MAX_REDUCTION, QuantizedWeight
from .schemes import QuantScheme

MODES = ("frozen",)
GRADS = ("float",)
_STORAGE = ("qweight", "scales", "zeros")


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored as [K, N]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def float_weight(layer: nn.Module) -> Tensor:
    """The weight [N, K] of an `nn.Linear` or a transformers `Conv1D`, detached.

    Raises:
        TypeError: for any other module.
    """
    if is_conv1d(layer):
        return layer.weight.detach().t()
    if isinstance(layer, nn.Linear) and layer.weight is not None:
        return layer.weight.detach()
    raise TypeError(f"layer must be an nn.Linear or a transformers Conv1D, got {type(layer).__name__}")


class QuantLinear(nn.Linear):
    """A linear layer on an int8 or int4 weight.

    The weight is frozen: gradients flow to the input (straight through the rounding) and to the bias, which is what
    adapters such as LoRA need. `weight` is None; the state dict holds `qweight`, `scales`, `zeros` (asymmetric
    schemes) and `bias`, all plain tensors in the canonical storage that the kernels read directly.

    Shape: input float32, bfloat16 or float16 [..., in_features]; output [..., out_features] of the input's dtype, or
    of the autocast dtype under autocast. Any leading shape, also empty.

    Args:
        in_features: K, at most 131072 for `a8` schemes.
        out_features: N.
        bias: whether there is a bias [N].
        scheme: scheme name or `QuantScheme`.
        mode: "frozen".
        grad: "float": the gradient is computed with grad_out in float.
        device, dtype: of the parameters; `dtype` applies to the bias and is the layer's `compute_dtype`. The scales
            are float32 always.

    Raises:
        ValueError: for an unknown scheme, mode or grad, or a shape that cannot be computed exactly.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str | QuantScheme = "w8a8",
        *,
        mode: str = "frozen",
        grad: str = "float",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.scheme = QuantScheme.parse(scheme)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if grad not in GRADS:
            raise ValueError(f"grad must be one of {GRADS}, got {grad!r}")
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        if self.scheme.int_activations and in_features > MAX_REDUCTION:
            raise ValueError(
                f"in_features must be at most {MAX_REDUCTION} for {self.scheme} (exact int32 sums), "
                f"got {in_features}; use a w{self.scheme.weight_bits}a16 scheme"
            )
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        self.mode, self.grad = mode, grad
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = dtype
        self._scheme_name = self.scheme.name
        shapes = self.scheme.storage_shapes(in_features, out_features)
        integer = torch.int8 if self.scheme.weight_bits == 8 else torch.uint8
        for name, storage_dtype in (("qweight", integer), ("scales", torch.float32), ("zeros", torch.uint8)):
            tensor = None
            if name in shapes:
                tensor = torch.empty(shapes[name], dtype=storage_dtype, device=device)
                tensor = nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, tensor)
        self.register_parameter("weight", None)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_float(
        cls, layer: nn.Module, scheme: str | QuantScheme, *, mode: str = "frozen", grad: str = "float"
    ) -> QuantLinear:
        """Quantize an `nn.Linear` or a transformers `Conv1D`; the bias parameter is shared with `layer`.

        Raises:
            TypeError: for another kind of module.
            ValueError: if the weight holds NaN or Inf, or the scheme does not fit.
        """
        weight = float_weight(layer)
        out_features, in_features = weight.shape
        quantized = cls(
            in_features, out_features, False, scheme, mode=mode, grad=grad, device="meta", dtype=weight.dtype
        )
        quantized.set_weight(quantize.quantize_weight(weight, quantized.scheme))
        quantized.bias = layer.bias
        return quantized.train(layer.training)

    def set_weight(self, weight: QuantizedWeight) -> None:
        """Replace the quantized weight, which must be the canonical storage of this layer's scheme and shape.

        Raises:
            RuntimeError: naming the tensor that does not fit; the layer is left as it was.
        """
        if weight.qweight.shape != self.qweight.shape:
            expected, got = list(self.qweight.shape), list(weight.qweight.shape)
            raise RuntimeError(f"qweight must have shape {expected} for {self.scheme}, got {got}")
        ops.check_weight(*weight, self.in_features, self.scheme)
        for name, tensor in zip(_STORAGE, weight, strict=True):
            if tensor is not None:  # a parameter is shared with the layer that owns it
                shared = isinstance(tensor, nn.Parameter)
                setattr(self, name, tensor if shared else nn.Parameter(tensor, requires_grad=False))

    def reset_parameters(self) -> None:
        """Set the layer to the zero weight; a quantized layer has no random initialization."""
        with torch.no_grad():
            if self.zeros is not None:
                self.zeros.zero_()
            self.qweight.fill_(0x88 if self.scheme.weight_bits == 4 and self.scheme.symmetric else 0)
            self.scales.fill_(1.0)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise RuntimeError(f"input must have shape [..., {self.in_features}], got {list(x.shape)}")
        device_type = x.device.type
        autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        out_dtype = torch.get_autocast_dtype(device_type) if autocast else None
        return quant_linear(x, self.qweight, self.scales, self.zeros, self.bias, self._scheme_name, out_dtype)

    def dequantize(self) -> Tensor:
        """The weight as it is multiplied: float32 [out_features, in_features]."""
        return ops.dequantize_weight(self.qweight, self.scales, self.zeros, self.in_features, self._scheme_name)

    def storage_bytes(self) -> int:
        """Bytes of the quantized weight (without the bias)."""
        tensors = (getattr(self, name) for name in _STORAGE)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, mode={self.mode}, grad={self.grad}"
        )

    def _apply(self, fn, recurse=True):
        """Move everything, but keep the scales float32 when `fn` casts (`.half()`, `.to(torch.bfloat16)`)."""
        scales = self.scales.detach()
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.scales.device)).dtype
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            # The cast lost bits: take the values from before it, on the device it moved to.
            self.scales.data = scales.to(self.scales.device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Check the whole layer before anything is copied, so that a bad tensor leaves the layer as it was."""
        given = {name: state_dict.get(prefix + name) for name in (*_STORAGE, "bias")}
        # Only together do the three mean a weight; with none of them torch reports what is missing.
        expected = [name for name in _STORAGE if getattr(self, name) is not None]
        some = any(given[name] is not None for name in _STORAGE)
        errors = [f"{prefix}{name} is missing for {self.scheme}" for name in expected if some and given[name] is None]
        if self.zeros is None and given["zeros"] is not None:
            errors.append(f"{prefix}zeros is given, but {self.scheme} has no zero points")
        errors += [
            f"{prefix}{name} {problem}"
            for name, tensor in given.items()
            if (problem := self._problem(name, tensor)) is not None
        ]
        if prefix + "weight" in state_dict and prefix + "qweight" not in state_dict:
            errors.append(
                f"{prefix}weight is a float weight, but the layer is quantized ({self.scheme}): load it into the "
                "float model and quantize that, or load a state dict saved from the quantized model"
            )
        if errors:
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _problem(self, name: str, tensor: Tensor | None) -> str | None:
        """Why `tensor` cannot be this layer's `name`; None if it can, or either is absent."""
        own = getattr(self, name)
        if tensor is None or own is None:
            return None
        if name == "bias":
            if tensor.shape == own.shape and tensor.dtype in FLOAT_DTYPES:
                return None
            return f"must be a float vector of {self.out_features}, got {tensor.dtype} of shape {list(tensor.shape)}"
        expected = f"must be {own.dtype} of shape {list(own.shape)} for {self.scheme}"
        if tensor.dtype != own.dtype or tensor.shape != own.shape:
            return f"{expected}, got {tensor.dtype} of shape {list(tensor.shape)}"
        if tensor.is_meta:
            return None
        if name == "scales" and not tensor.isfinite().all():
            return "must be finite, got NaN or Inf"
        if name == "zeros" and (tensor > 15).any():
            return f"must be at most 15, got {tensor.max().item()}"
        if name == "qweight" and tensor.dtype == torch.int8 and (tensor == -128).any():
            return "must be in [-127, 127], got -128"
        return None


def relative_error(weight: Tensor, quantized: nn.Module) -> float:
    """Frobenius norm of (dequantized - weight) over that of the weight; 0 for a zero weight.

    Args:
        weight: float [out_features, in_features].
        quantized: a `QuantLinear` or `QuantEmbedding`.
    """
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)  # of the error, of the weight
    rows = quantize.rows_per_block(quantized.in_features)
    stored = (quantized.qweight, quantized.scales, quantized.zeros)
    for start in range(0, quantized.out_features, rows):
        block = weight[start : start + rows].to(torch.float32)
        canonical = (None if tensor is None else tensor[start : start + rows] for tensor in stored)
        dequantized = ops.dequantize_weight(*canonical, quantized.in_features, quantized.scheme.name)
        for i, part in enumerate((dequantized - block, block)):
            squares[i] += torch.linalg.vector_norm(part, dtype=torch.float64) ** 2
    error, norm = squares.sqrt().tolist()
    return error / norm if norm > 0 else error

"""transformers: tensor parallelism (`DistributedConfig(tp_plan="auto")`) of models with quantized layers.

A plan of transformers names a style for each layer, which makes DTensors of its parameters and wraps its forward. The
styles here do so for quantized layers. The layers of a saved folder are shared out before its tensors are read, so that
a process reads its own part only. A float checkpoint is read whole, a layer at a time: a row of the weight, which may
have one scale, has to be seen whole; the layer is shared out when it has been quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ColwiseParallel,
    EmbeddingParallel,
    RowwiseParallel,
    TensorParallelLayer,
)

from ..convert.layers import Layer
from ..distributed.dtensors import is_dtensor
from ..distributed.tensor_parallel import COLUMNS, ROWS, check_columns, distribute
from ..nn.embedding import QuantEmbedding
from ..nn.linear import QuantLinear
from ..nn.storage import Storage
from ..nn.stored_parameter import plain


class QuantColwiseParallel(ColwiseParallel):
    """Column plan of a `QuantLinear`: each process has some rows of the weight, with their scales."""

    dimension = ROWS

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return False

    def shard_param(self, module: nn.Module, param: str, mesh) -> None:
        _share_out(module, param, mesh, self.dimension)

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        x, *rest = args
        if not is_dtensor(x):
            from torch.distributed.tensor import DTensor

            x = DTensor.from_local(x, mesh, [self.input_layouts], run_check=False)
        return super().transform_inputs_pre_forward(module, (x, *rest), kwargs, mesh)


class QuantRowwiseParallel(RowwiseParallel):
    """Row plan of a `QuantLinear`: each process has some columns of the weight; the layer adds the products."""

    dimension = COLUMNS

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return False

    def shard_param(self, module: nn.Module, param: str, mesh) -> None:
        _share_out(module, param, mesh, self.dimension)


class QuantEmbeddingParallel(EmbeddingParallel):
    """Vocabulary plan of a `QuantEmbedding`: each process has some rows."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return False

    def shard_param(self, module: nn.Module, param: str, mesh) -> None:
        _share_out(module, param, mesh, ROWS)


def _share_out(module: nn.Module, name: str, mesh, dimension: int) -> None:
    parameter = module._parameters.get(name)
    if parameter is None or name == "x_scale":  # one for all processes
        return
    shared = nn.Parameter(distribute(module, name, mesh, dimension, source=None), parameter.requires_grad)
    if hasattr(parameter, "_is_hf_initialized"):
        shared._is_hf_initialized = parameter._is_hf_initialized
    module._parameters[name] = shared


def _check_columns(name: str, layer: QuantLinear, processes: int) -> None:
    try:
        check_columns(layer, processes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _quantized(style: TensorParallelLayer) -> TensorParallelLayer | None:
    """The style that does for a quantized layer what `style` does for a float one."""
    if type(style) is EmbeddingParallel:
        return QuantEmbeddingParallel(shard_dim=0) if style.shard_dim == 0 else None
    for ours in (QuantColwiseParallel, QuantRowwiseParallel):
        if type(style) is ours.__base__:
            layouts = {"input_layouts": style.input_layouts, "output_layouts": style.output_layouts}
            return ours(**layouts, use_local_output=style.use_local_output)
    return None


def _fits(style: TensorParallelLayer, layer: nn.Module) -> bool:
    kind = QuantEmbedding if isinstance(style, QuantEmbeddingParallel) else QuantLinear
    return isinstance(layer, kind)


_PREFIX = "qkernels_"
for _name in list(ALL_PARALLEL_STYLES):
    _style = _quantized(ALL_PARALLEL_STYLES[_name])
    if _style is not None:
        ALL_PARALLEL_STYLES.register(_PREFIX + _name, _style)


def _part_tied(model: nn.Module) -> None:
    """Give layers that share their storage one each, until transformers ties the tensors that it has read."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items() if isinstance(module, Storage) else ():
            if parameter is not None and id(parameter) in seen:
                module.register_parameter(name, nn.Parameter(plain(parameter).clone(), requires_grad=False))
            seen.add(id(parameter))


# What a plan may do to a quantized layer as to any other, because it touches no parameter.
_HARMLESS = ("replicate", "all_reduce", "mla_kv_a_proj")


def plan_of(model: PreTrainedModel, pending: Callable[[], Iterable[Layer]], options: dict[str, str]) -> Plan | None:
    """The plan of a model that is loaded in parts of tensor parallelism; None for any other.

    Raises:
        ValueError: for a kind of parallelism that is not there for quantized layers.
    """
    config = model.config.distributed_config
    asked = [name for name in ("ep_size", "pp_size", "dp_size") if (getattr(config, name, None) or 1) > 1]
    if asked:
        raise ValueError(
            f"{' and '.join(asked)} must be 1 for a model that qkernels quantizes while it is loaded: of the kinds of "
            "parallelism that from_pretrained sets up, tensor parallelism (tp_size, tp_plan) is there. Load the model "
            "without, and then use DistributedDataParallel, FSDP2 (fully_shard) or torch.distributed.pipelining"
        )
    return Plan(model, pending, options) if (config.tp_size or 1) > 1 else None


class Plan:
    """The styles of a model's quantized layers, known once the model resolves its plan.

    Args:
        model: a model that is being loaded.
        pending: gives the layers that are in float until their weight arrives.
        options: the keywords of `QuantLinear` for these.
    """

    def __init__(self, model: PreTrainedModel, pending: Callable[[], Iterable[Layer]], options: dict[str, str]) -> None:
        self._model, self._pending, self._options = model, pending, options
        self._later: dict[str, str] = {}  # name of a layer -> its style
        self._resolve = model._resolve_parallel_plans
        model._resolve_parallel_plans = self._with_our_styles

    def _with_our_styles(self, distributed_config):
        """The plans that the model has resolved, with styles of ours for quantized layers.

        Raises:
            ValueError: for a style that is not known for a quantized layer.
        """
        del self._model._resolve_parallel_plans
        tp_plan, ep_plan, fsdp_plan = self._resolve(distributed_config)
        _part_tied(self._model)
        modules, ours = dict(self._model.named_modules()), {}
        for name, style in tp_plan.items():
            layer = name if name in modules else name.rpartition(".")[0]
            now = modules[layer] if isinstance(modules[layer], Storage) else None
            quantized = now if now is not None else self._future(layer)
            if quantized is None or style in _HARMLESS:
                ours[name] = style
                continue
            known = ALL_PARALLEL_STYLES[_PREFIX + style] if _PREFIX + style in ALL_PARALLEL_STYLES else None
            if known is None or not _fits(known, quantized):
                raise ValueError(
                    f"{layer}: the plan {style!r} of tensor parallelism is not there for a {type(quantized).__name__}; "
                    f"leave it in float with skip=[{layer!r}], or change the plan with DistributedConfig(tp_plan=...)"
                )
            if isinstance(known, QuantRowwiseParallel):
                _check_columns(layer, quantized, self._model._mesh_manager.get_mesh("tp").size())
            if now is not None:
                ours[name] = _PREFIX + style
            else:
                self._later[layer] = _PREFIX + style
        return ours, ep_plan, fsdp_plan

    def _future(self, name: str) -> nn.Module | None:
        """What the float layer of this name, or with this parameter, will be: without values; None if it stays."""
        for layer in self._pending():
            if any(f"{own}.".startswith(f"{name}.") or f"{name}.".startswith(f"{own}.") for own in layer.names):
                return layer.adapter.empty(layer.module, layer.scheme, **self._options)
        return None

    def share_out(self, layers: Iterable[tuple[str, nn.Module]]) -> None:
        """Share out layers that have just been quantized, if the plan names them; what they share stays shared.

        Raises:
            ValueError: if one cannot be split so.
        """
        parts: dict[nn.Parameter, nn.Parameter] = {}
        for name, layer in layers:
            style_name = self._later.pop(name, None)
            if style_name is None or getattr(layer, "_is_hooked", False):
                continue
            style, mesh = ALL_PARALLEL_STYLES[style_name], self._model._mesh_manager.get_mesh("tp")
            for parameter, whole in list(layer.named_parameters(recurse=False)):
                if whole not in parts:
                    style.shard_param(layer, parameter, mesh)
                    parts[whole] = layer._parameters[parameter]
                layer._parameters[parameter] = parts[whole]
            style.install_forward(layer, mesh)
            layer._is_hooked = True

"""transformers: the quantizer behind `from_pretrained(..., quantization_config=...)`.

A float checkpoint is quantized while it is read: the model's layers stay as they are (on the meta device) until their
weight arrives, and each is then swapped for a `QuantLinear`, so that one float weight is in memory at a time. A folder
saved from a quantized model lists its quantized layers in `config.json`; these are swapped before the tensors are read.
"""

from __future__ import annotations

import copy
import warnings

import torch
import transformers
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..convert.dequantize import AFTER_DEQUANTIZE, dequantize_
from ..convert.layers import Layer, Split, put_in_place, rows_of
from ..convert.leftover import kept_in_float32
from ..convert.model import AFTER_FREEZE, AFTER_QUANTIZE
from ..convert.report import QuantizationReport
from ..convert.schemes import SchemeRules
from ..convert.selection import find_layers, select_layers, unexpected_results
from ..convert.watch import watch_frozen
from ..formats.storage import QuantizedWeight, storage_dtypes
from ..nn.adapters import float_twin
from ..nn.matrix_layer import MatrixLayer
from ..nn.storage import Storage
from .folders import METHOD, describe, empty_like, finish_loading, layer_entry, unclaimed
from .transformers_config import QKernelsConfig
from .transformers_experts import expect_split_x_scale, join_x_scale
from .transformers_offload import DiskTensors

_NO_DISK = (
    "device_map must not offload layers to disk while a float checkpoint is quantized: the disk holds float weights. "
    "Quantize it in memory, save_pretrained it, and load that folder with this device_map"
)
_NO_INT8_ON_DISK = (
    "device_map must not offload layers of mode 'int8' to disk, for they are trained: freeze_ the model and "
    "save it again"
)
_NO_CALIBRATION = (
    "scheme {scheme} has static activations, whose scales come from sample inputs: load the model without a "
    "quantization_config and call qkernels.quantize_(model, '{scheme}', calibration=batches); what save_pretrained "
    "then writes is loaded with its scales"
)


class _QuantizeLinear(ConversionOps):
    """Quantizes a float weight of the checkpoint that has been read, instead of handing it to the model."""

    def __init__(self, quantizer: QKernelsHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict, missing_keys=None, **kwargs):
        kept = {}
        for name, tensor in input_dict.items():
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            done = self.quantizer.quantize_parameter(name, tensor)
            if missing_keys is not None:
                missing_keys.difference_update(done)
            if not done:
                kept[name] = tensor
        return kept


@register_quantizer(METHOD)
class QKernelsHfQuantizer(HfQuantizer):
    """Quantizes a float checkpoint layer by layer, or loads a saved quantized model."""

    checks_values = True  # of a saved model, when all of it is read

    def __init__(self, quantization_config: QKernelsConfig, **kwargs) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._layers: list[Layer] = []
        self.state_dict_to_save: dict[str, torch.Tensor] | None = None
        self._mismatched: set[str] = set()  # keys of the folder whose tensors have another shape
        self._modes: dict[str, str] = {}  # of the layers of a saved folder, by their names
        self._stored_dtypes: dict[str, torch.dtype] = {}  # of the tensors of a saved folder, by their names
        self._disk = DiskTensors(None)
        self._pending: dict[str, Layer] = {}  # by the name of the weight that is still to be read
        self._names: dict[int, list[str]] = {}  # by id of a layer, these names of it
        # By the name of a parameter of a layer that may be split: that layer, the twin, and its name in both.
        self._parts: dict[str, tuple[Split, str, str]] = {}

    @property
    def rules(self) -> SchemeRules:
        return SchemeRules(self.quantization_config.scheme)

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a weight, with its share of a group; of several schemes, those of the largest."""
        group_bytes = {None: 4, "zero_point": 5, "min": 8}  # a scale, and what else a group has
        return max(
            scheme.weight_bits / 8 + (group_bytes[scheme.zeros] / scheme.group_size if scheme.group_size else 0)
            for scheme in self.rules.schemes
        )

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        self._disk = DiskTensors(device_map if isinstance(device_map, dict) else None)  # "auto" is resolved later
        if self._disk.any and not self.pre_quantized:
            raise ValueError(_NO_DISK)

    def get_state_dict_and_metadata(self, model):
        return self.state_dict_to_save, {}

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        return param_name in self._pending or param_name in self._parts

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeLinear(self)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return self.quantization_config.mode != "frozen"

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, **kwargs) -> None:
        self._model, self._plan = model, None
        if getattr(model.config, "distributed_config", None) is not None:
            from .transformers_parallel import plan_of

            options = self.quantization_config.layer_options
            self._plan = plan_of(model, lambda: self._pending.values(), options)
        saved = set(self.quantization_config.layers)
        adjust = model._adjust_missing_and_unexpected_keys

        def check_keys(loading_info) -> None:
            del model._adjust_missing_and_unexpected_keys
            self._check_unexpected(model, saved, loading_info)
            self._mismatched = {key for key, *_ in loading_info.mismatched_keys}
            self._disk.missing = set(loading_info.missing_keys)
            adjust(loading_info)

        model._adjust_missing_and_unexpected_keys = check_keys
        if self.pre_quantized:
            self._restore_layers(model)
            return
        mark = model.mark_tied_weights_as_initialized

        def rename_missing(loading_info) -> None:  # the first of what transformers does with the keys that are missing
            del model.mark_tied_weights_as_initialized
            self._rename_parts(loading_info.missing_keys)
            mark(loading_info)

        model.mark_tied_weights_as_initialized = rename_missing
        config = self.quantization_config
        for own in self.rules.schemes:
            if own.static_activations:
                raise ValueError(_NO_CALIBRATION.format(scheme=own))
        self._report = QuantizationReport(self.rules.label, **config.layer_options)
        self._layers, self._report.warnings = select_layers(
            model, self.rules, config.skip, config.include, ties=model.all_tied_weights_keys,
            embeddings=config.embeddings,
        )  # fmt: skip
        self._report.warnings += unexpected_results(self._layers, self._report, config.embeddings)
        for message in self._report.warnings:
            warnings.warn(message, stacklevel=2)
        chosen = [layer for layer in self._layers if layer.reason is None]
        self._names = {id(layer): layer.weight_names() for layer in chosen}
        self._pending = {name: layer for layer in chosen for name in self._names[id(layer)]}
        for layer in chosen:
            if layer.split is not None:
                new_names = layer.split.new_names()
                for whole in layer.aliases[1::2]:
                    self._parts.update({f"{whole}.{name}": (layer.split, name, new_names[name]) for name in new_names})

    def quantize_parameter(self, name: str, tensor: torch.Tensor) -> list[str]:
        """Swap the layer of the float weight called `name`.

        Returns:
            The names of the weight, which the model no longer misses; none if it does not fit or has no such layer.
        """
        layer = self._pending.get(name)
        if layer is None:
            return self._put_part(name, tensor)
        tied = [layer, *(other for other in layer.tied if other is not layer)]
        keys = [key for member in tied for key in self._names.get(id(member), ()) if key in self._pending]
        if layer.converted is not None:  # from the weight of a layer that it is tied to
            return keys
        parameter = layer.adapter.key
        if tensor.shape != layer.module._parameters[parameter].shape:
            for key in keys:
                del self._pending[key]
            for member in tied:
                member.reason = f"the checkpoint's weight has shape {list(tensor.shape)}"
            return []
        config = self.quantization_config
        setattr(layer.module, parameter, nn.Parameter(tensor, requires_grad=config.mode == "qat"))
        try:
            for member in tied:
                member.convert(config.layer_options)
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from error
        for parameter_name, parameter in layer.module.named_parameters():
            if parameter_name != "bias":
                parameter._is_hf_initialized = True
        for member in tied:
            _guard_from_initialization(member.module)
        if self._plan is not None:
            self._plan.share_out([(name, member.module) for member in tied for name in member.names])
        if layer.tied:
            _tie_storage(self._model)
        return keys

    def _put_part(self, name: str, tensor: torch.Tensor) -> list[str]:
        """Put what a layer that is split holds beside its quantized weights, such as a bias, where it belongs now."""
        if name not in self._parts:
            return []
        split, *keys = self._parts[name]
        parameter = nn.Parameter(tensor)
        parameter._is_hf_initialized = True
        for module, key in zip((split.layer, split.twin), keys, strict=True):
            path, _, own = key.rpartition(".")
            owner = module.get_submodule(path)
            if (expected := list(owner._parameters[own].shape)) != list(tensor.shape):
                raise ValueError(f"{name} of the checkpoint must have shape {expected}, got {list(tensor.shape)}")
            owner._parameters[own] = parameter
        return [name]

    def _rename_parts(self, missing_keys: set[str]) -> None:
        """Let the keys that the checkpoint lacks be those of the layers as they are split."""
        for name, (split, _, new) in self._parts.items():
            if split.in_place and name in missing_keys:
                missing_keys.remove(name)
                missing_keys.add(f"{name.removesuffix(self._parts[name][1])}{new}")

    def _process_model_after_weight_loading(self, model, **kwargs) -> None:
        _unguard(self._layers)
        if self.pre_quantized:
            self._check_restored()
            watch_frozen(model, ())
            return
        for layer in self._pending.values():
            if layer.converted is None:
                layer.reason = "has no weight of its own in the checkpoint"
                if layer.split is not None and layer.split.in_place:  # whose class transformers cannot initialize
                    layer.module.reset_parameters()
        for layer in self._layers:
            if isinstance(layer.module, MatrixLayer):
                if not _is_loaded(layer.module.bias):
                    layer.module.bias.data.zero_()
                layer.module.update_column_scales()
        self._report.rows = rows_of(self._layers)
        watch_frozen(model, self._layers)
        model.quantization_report = self._report
        self.quantization_config.layers = describe(model).get("layers", {})
        self._layers, self._pending, self._names, self._parts = [], {}, {}, {}

    def _check_unexpected(self, model, saved: set[str], loading_info) -> None:
        """Refuse quantized weights that no layer takes; leave out the marker for programs without qkernels."""
        unexpected = loading_info.unexpected_keys
        lost = unclaimed(unexpected, model, saved, f"{model.base_model_prefix}.")
        if lost:
            loading_info.mismatched_keys.clear()  # of which transformers would complain instead
            raise ValueError(
                f"the folder holds quantized weights that this {type(model).__name__} has no quantized layer for: "
                f"{', '.join(lost[:5])}{' and more' if lost[5:] else ''}; quantization_config.layers in config.json "
                "must name their layers (qkernels writes it when it saves a model)"
            )
        modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
        for key in [key for key in unexpected if key.endswith(".weight")]:
            name = key.removesuffix(".weight")
            found = (modules.get(known) for known in (name, prefix + name, name.removeprefix(prefix)))
            if any(isinstance(module, Storage) for module in found):
                unexpected.discard(key)

    def _dequantize(self, model, dtype=None):
        return dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)  # configs hold names too

    def _restore_layers(self, model) -> None:
        """Swap the layers that the saved model says are quantized, before their tensors are read."""
        config = self.quantization_config
        prefix = f"{model.base_model_prefix}."
        by_name = {name: layer for layer in find_layers(model, embeddings=True) for name in layer.names}
        kept = kept_in_float32(model)
        for name, entry in config.layers.items():
            # The folder may have been saved from the model with a head and be loaded without, or the reverse.
            names = (name, prefix + name, name.removeprefix(prefix))
            layer = next((by_name[candidate] for candidate in names if candidate in by_name), None)
            if layer is None or layer.is_quantized:
                continue  # the layer belongs to another head, or is known by a second name
            scheme, layer_options = layer_entry(entry, config.layer_options)
            # What transformers keeps in float32 beside float16 computes in float32, quantized too.
            dtype = torch.float32 if kept & set(layer.names) else None
            layer.replace(empty_like(layer.module, scheme, layer_options, dtype))
            expect_split_x_scale(layer.name, layer.module)
            self._modes[layer.name] = layer_options["mode"]
            _guard_from_initialization(layer.module)
            self._layers.append(layer)
        self._stored_dtypes = {
            f"{name}.{tensor}": dtype
            for layer in self._layers
            for name in layer.names
            for tensor, dtype in {**storage_dtypes(layer.module.scheme), "x_scale": torch.float32}.items()
            if layer.module.mode == "frozen" or tensor == "x_scale"
        }
        for target, source in model.all_tied_weights_keys.items():
            owner, other = (_module_of(model, key) for key in (source, target))
            if _same_format(owner, other):
                other.set_weight(QuantizedWeight(owner.qweight, owner.scales, owner.zeros))
        _tie_storage(model)
        if not self._layers:
            raise ValueError(
                f"quantization_config.layers must name linear layers of {type(model).__name__}, got "
                f"{sorted(config.layers)[:3] or 'none'}; to quantize a float checkpoint pass "
                "quantization_config=QKernelsConfig(...) to from_pretrained"
            )
        config.layers = describe(model)["layers"]

    def get_new_dtype(self, converter, param, dtype):
        """The dtype to read a tensor of a saved folder in: a quantized weight must be stored as it is."""
        name = converter.target_patterns[0]
        if isinstance(converter, WeightConverter):  # of experts, one by one: only the pattern is known
            wanted = None if dtype is None or dtype.is_floating_point else dtype
        else:
            self._disk.check(name, param, self._model)
            wanted = self._stored_dtypes.get(name)
        if wanted is None:
            return super().get_new_dtype(converter, param, dtype)
        from transformers.modeling_utils import str_to_torch_dtype  # which imports the quantizers

        stored = str_to_torch_dtype.get(param.get_dtype()) if hasattr(param, "get_dtype") else param.dtype
        if stored != wanted:
            raise ValueError(f"{self._folder()}: {name} must be {wanted}, got {stored}")
        return None

    def _folder(self) -> str:
        return getattr(self._model.config, "_name_or_path", "") or "the checkpoint"

    def _check_restored(self) -> None:
        tensors = ("qweight", "scales", "zeros", "x_scale", "weight")
        renewed = [x for x in self._layers if any(f"{x.name}.{name}" in self._mismatched for name in tensors)]
        kept = [layer for layer in self._layers if layer not in renewed]
        problems, checked = list(self._disk.problems), set()
        for layer in kept:
            module = layer.module
            if self._modes[layer.name] == "int8" and self._disk.holds(layer.name):
                problems.append(f"{layer.name}: {_NO_INT8_ON_DISK}")
            absent = [
                name
                for name, parameter in module.named_parameters()
                if not _is_loaded(parameter) and not self._disk.has_read(f"{layer.name}.{name}", self._model)
            ]
            problems += [f"{layer.name}.{name} is missing in the checkpoint, or does not fit it" for name in absent]
            if not absent and (problem := join_x_scale(module)) is not None:
                problems.append(f"{layer.name}.x_scale {problem}")
            elif self.checks_values and not absent and module.mode == "frozen" and id(module.qweight) not in checked:
                checked.add(id(module.qweight))
                problems += [f"{layer.name}.{name} {problem}" for name, problem in module.storage_problems().items()]
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"{self._folder()}: {'; '.join(problems[:5])}{more}")
        for layer in renewed:  # as ignore_mismatched_sizes=True asks for: otherwise transformers has refused it
            self._renew(layer)
        for layer in kept:
            finish_loading(layer.module, self._modes[layer.name])
        self.quantization_config.layers = describe(self._model).get("layers", {})
        self._layers, self._modes = [], {}

    def _renew(self, layer: Layer) -> None:
        """Put a new float layer in the place of one that the folder has in another shape."""
        old = layer.module
        device = next((p.device for p in self._model.parameters() if not p.is_meta), None)
        options = {"device": device, "dtype": old.compute_dtype}
        new = float_twin(old, nn.Parameter(torch.empty(old.weight_shape, **options)), plain=True)
        if getattr(new, "bias", None) is not None:
            new.bias = nn.Parameter(torch.empty(old.weight_shape[:-1], **options))
        new.reset_parameters()
        self._model._init_weights(new)
        put_in_place(new, old, layer.slots)
        warnings.warn(
            f"{layer.name} has another shape than in the folder: it is new, in float and not trained", stacklevel=2
        )


def _module_of(model: nn.Module, key: str) -> nn.Module | None:
    """The module that owns the parameter called `key`, if it is a weight."""
    name, _, parameter = key.rpartition(".")
    return model.get_submodule(name) if parameter == "weight" else None


def _same_format(a: nn.Module | None, b: nn.Module | None) -> bool:
    quantized = isinstance(a, Storage) and isinstance(b, Storage)
    if not quantized or any("input_order" in layer._buffers for layer in (a, b)):
        return False
    return a.scheme == b.scheme and a.weight_shape == b.weight_shape


def _tie_storage(model: transformers.PreTrainedModel) -> None:
    """Replace the ties of float weights in the model's mappings by those of the storage that quantized layers share."""
    ties: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        owner, other = (_module_of(model, key) for key in (source, target))
        if _same_format(owner, other) and owner.qweight is other.qweight:
            names = [name for name in ("qweight", "scales", "zeros") if getattr(owner, name) is not None]
            source, target = (key.removesuffix("weight") for key in (source, target))
            ties.update((target + name, source + name) for name in names)
        elif not any(isinstance(module, Storage) for module in (owner, other)):
            ties[target] = source  # one quantized and one float weight are no longer the same
    if ties != model.all_tied_weights_keys:
        model.all_tied_weights_keys, model._tied_weights_keys = ties, dict(ties)


def _guard_from_initialization(module: Storage) -> None:
    """Until `_unguard`, show code that initializes weights (of the layer, or from its parent) one not to be touched."""
    weight = torch.empty(module.weight_shape, dtype=module.compute_dtype, device="meta")
    weight._is_hf_initialized = module._is_hf_initialized = True
    vars(module)["weight"] = weight


def _unguard(layers: list[Layer]) -> None:
    for layer in layers:
        vars(layer.module).pop("weight", None)


def _is_loaded(parameter: nn.Parameter | None) -> bool:
    return parameter is None or getattr(parameter, "_is_hf_initialized", False)


def _our_config(model: nn.Module) -> bool:
    """Whether the model's quantization_config is of qkernels."""
    config = getattr(model.config, "quantization_config", None)
    return isinstance(config, QKernelsConfig) or (isinstance(config, dict) and config.get("quant_method") == METHOD)


def record_layers(model: transformers.PreTrainedModel) -> bool:
    """Let the config of `model` name the layers that are quantized now, so that a folder saved from it can be loaded.

    Returns:
        Whether there are quantized layers that it names.
    """
    found, existing = describe(model), getattr(model.config, "quantization_config", None)
    for part in model.modules():  # only the outermost config is looked at when a folder is loaded
        if isinstance(part, transformers.PreTrainedModel) and part.config is not model.config and _our_config(part):
            del part.config.quantization_config
    if existing is not None and not _our_config(model):
        if found:
            warnings.warn(
                "the model has another quantization_config already: a folder saved from it will not load the layers "
                "that qkernels quantized",
                stacklevel=4,
            )
        return False
    if not found:
        if existing is not None:
            forget_quantization(model)
        return False
    _tie_storage(model)
    if isinstance(existing, QKernelsConfig):
        kept = {"scheme": existing.scheme, "skip": existing.skip, "include": existing.include}
        embeddings = existing.embeddings if found["mode"] == "frozen" else False
        found = {**found, **kept, "embeddings": embeddings}
    model.config.quantization_config = QKernelsConfig(**found)
    if isinstance(getattr(model, "hf_quantizer", None), QKernelsHfQuantizer):
        model.hf_quantizer.quantization_config = model.config.quantization_config
    return True


def forget_quantization(model: transformers.PreTrainedModel) -> None:
    """Make `model` a float model to transformers; its layers are."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            vars(part.config).pop("_is_quantized", None)


def _outermost(model: nn.Module) -> list[transformers.PreTrainedModel]:
    """The transformers models below `model` that are not part of another one."""
    covered: set[int] = set()
    found = []
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and id(module) not in covered:
            covered.update(id(part) for part in module.modules())
            found.append(module)
    return found


def _record(model: nn.Module, report: QuantizationReport | None = None) -> None:
    """After `quantize_` and `freeze_`."""
    for part in _outermost(model):
        record_layers(part)


def _untie_storage(model: nn.Module) -> None:
    """After `dequantize_`: ties are those of float weights again, and nothing says that the model is quantized."""
    for part in _outermost(model):
        ties = {}
        for target, source in getattr(part, "all_tied_weights_keys", {}).items():
            if target.endswith("qweight"):
                target, source = (key.removesuffix("qweight") + "weight" for key in (target, source))
            if not target.endswith(("scales", "zeros")):
                ties[target] = source
        part.all_tied_weights_keys, part._tied_weights_keys = ties, dict(ties)
        record_layers(part)


AFTER_QUANTIZE.append(_record)
AFTER_FREEZE.append(_record)
AFTER_DEQUANTIZE.append(_untie_storage)

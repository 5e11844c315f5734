"""`Int8Weight`: a weight that is int8 and can be trained, because it passes for a float tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, SupportsIndex

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..formats import rules
from ..formats.philox import WEIGHT, draw_shared_seed, is_traced
from ..kernels import ops
from .tensor_calls import called_by, count_write, is_view, written

_aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)
_FREEZE = "qkernels.freeze_(model) makes plain tensors of it, with the same outputs"


class Int8Weight(Tensor):
    """A weight [N, K] held as int8 with a float32 scale for each row; it reports a float dtype.

    An optimizer updates it in place. Such an operation is carried out in float32 on the dequantized weight, a
    temporary, and the rows that it changed are rounded stochastically to int8, so that updates far below a step are not
    lost: the mean over the random numbers is the float result. Any other operation sees the dequantized weight and
    returns a plain tensor. Rows (`weight[2:5]`, `chunk`) are `Int8Weight`s on the same memory, other views are
    `Int8WeightView`s: what is written to either is written to the weight. What would need the memory of a float tensor,
    such as `data_ptr()`, raises NotImplementedError.

    Args:
        qweight: int8 [N, K], or an `Int8Weight` to share memory with; then `scales` and `dtype` may be left out.
        scales: float32 [N, 1].
        dtype: float, what the weight reports.
        requires_grad: as for any tensor.
        attributes: set on the new object.

    Attributes:
        qweight, scales: the stored tensors. A write into them is a write into the weight.
    """

    __slots__ = ("qweight", "scales")
    qweight: Tensor
    scales: Tensor

    @staticmethod
    def __new__(
        cls,
        qweight: Tensor,
        scales: Tensor | None = None,
        dtype: torch.dtype | None = None,
        *,
        requires_grad: bool = False,
        **attributes: Any,
    ) -> Int8Weight:
        if isinstance(qweight, Int8Weight):
            if qweight.is_meta and called_by("accelerate.utils.modeling"):
                raise NotImplementedError(f"an Int8Weight cannot be offloaded: {_FREEZE}, or move the whole model")
            scales, dtype, qweight = qweight.scales, dtype or qweight.dtype, qweight.qweight
        elif not isinstance(scales, Tensor) or dtype is None:
            raise TypeError(
                "Int8Weight takes qweight, scales and dtype, or another Int8Weight; "
                f"got {type(qweight).__name__}, {type(scales).__name__} and {dtype}"
            )
        weight = Tensor._make_wrapper_subclass(
            cls, qweight.shape, dtype=dtype, device=qweight.device, requires_grad=requires_grad
        )
        weight.qweight, weight.scales = qweight, scales
        weight.__dict__.update(attributes)
        return weight

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], list[Any]]:
        return ["qweight", "scales"], [self.dtype]

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: list[torch.dtype], outer_size: Any, outer_stride: Any
    ) -> Int8Weight:
        return cls(inner["qweight"], inner["scales"], *context)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as it is multiplied, rounded to `dtype`, by default the reported one."""
        values = ops.dequantize_weight(self.qweight, self.scales, None, self.shape[1], "w8a16")
        return values.to(dtype or self.dtype)

    def store(self, values: Tensor, seed: Tensor | None = None) -> None:
        """Take over float values [N, K]: rows that they change are rounded stochastically, the others keep their bits.

        Args:
            values: float32.
            seed: int64 of shape []; None: `philox.draw_shared_seed(values)`.
        """
        if values.shape != self.shape:
            raise RuntimeError(f"an Int8Weight cannot be resized: it is {list(self.shape)}, got {list(values.shape)}")
        changed = self._changed_rows(values)
        seed = draw_shared_seed(values) if seed is None else seed
        qweight, scales = ops.quantize_rows_stochastic(values, None, seed, WEIGHT)
        self._set(torch.where(changed, qweight, self.qweight), torch.where(changed, scales[:, None], self.scales))

    def _changed_rows(self, values: Tensor) -> Tensor:
        """bool [N, 1]: which rows differ from the weight, in the dtype of the values."""
        rows = values.shape[0] if is_traced() else rules.rows_per_block(self.shape[1])
        changed = []
        for start in range(0, values.shape[0], rows):
            old = self._rows(start, start + rows).dequantize(values.dtype)
            changed.append((old != values[start : start + rows]).any(dim=1, keepdim=True))
        return torch.cat(changed) if changed else torch.zeros_like(self.scales, dtype=torch.bool)

    def _set(self, qweight: Tensor, scales: Tensor) -> None:
        """Write both, so that a backward that needs what was there notices (autograd does not see writes from here)."""
        self.qweight.copy_(qweight)
        self.scales.copy_(scales)
        count_write(self.qweight, self.scales)

    def _take(self, values: Tensor) -> None:
        """`copy_` from floats. Rows that are integers times a scale become these, others are rounded like any."""
        unchanged = ~self._changed_rows(values)
        values = values.to(torch.float32)
        qweight, scales, exact = rules.int8_on_grid(values)
        self._set(
            torch.where(exact & ~unchanged, qweight, self.qweight),
            torch.where(exact & ~unchanged, scales, self.scales),
        )
        self.store(torch.where(unchanged | exact, self.dequantize(torch.float32), values))

    def _like(self, qweight: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> Int8Weight:
        return Int8Weight(qweight, scales, dtype or self.dtype)

    def _rows(self, start: int, end: int) -> Int8Weight:
        return self._like(self.qweight[start:end], self.scales[start:end])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    # The base class does the following without asking __torch_dispatch__.

    @property
    def data(self) -> Int8Weight:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        """An `Int8Weight` is shared, as by any tensor; floats [N, K] are copied, and rounded."""
        new: Any = value
        if not isinstance(value, Int8Weight):
            if value.shape != self.shape or not value.is_floating_point():
                raise RuntimeError(
                    f"the data of an Int8Weight must be a float tensor of shape {list(self.shape)}, "
                    f"got {value.dtype} of shape {list(value.shape)}"
                )
            if value.untyped_storage().nbytes() > value.numel() * value.element_size():
                raise NotImplementedError(
                    "the data of an Int8Weight cannot be a part of a larger tensor, such as an optimizer's bucket: its "
                    "floats would be copied, and later writes lost"
                )
            new = self.detach().clone().to(value.device, value.dtype)
            new._take(value.detach())
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.qweight, self.scales = new.qweight, new.scales

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("only leaves of the autograd graph can be deep-copied; detach() the weight first")
        result = self._like(self.qweight.clone(), self.scales.clone())
        result.requires_grad_(self.requires_grad)
        memo[id(self)] = result
        result.__dict__.update(copy.deepcopy(_attributes(self), memo))
        if self.grad is not None:
            result.grad = copy.deepcopy(self.grad, memo)
        return result

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return _rebuild, (self.qweight, self.scales, self.dtype, self.requires_grad, _attributes(self))

    def share_memory_(self) -> Int8Weight:
        self.qweight.share_memory_()
        self.scales.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.qweight.is_shared() and self.scales.is_shared()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage of `qweight`: it tells which memory this is, and holds no floats."""
        if called_by("torch._"):  # fake tensors are made of one that is empty, and this object's alone
            return Tensor.untyped_storage(self)
        return self.qweight.untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        """The dequantized weight. It is read-only: a write would not reach the weight."""
        return _read_only(self, force)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.numpy()
        return array if dtype is None or dtype == array.dtype else array.astype(dtype)

    def tolist(self) -> list[Any]:
        return self.detach().dequantize().tolist()

    def _no_memory(self: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "an Int8Weight has no memory of floats; read weight.dequantize(), write with copy_(), save state_dict(); "
            + _FREEZE
        )

    data_ptr = storage = _typed_storage = __dlpack__ = _no_memory

    # FSDP2 (fully_shard): the integers and scales are gathered, never the floats.

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int]]:
        if self.shape[1] != outer_size[1]:
            raise ValueError(f"an Int8Weight is sharded along dimension 0 only, got shards of shape {list(self.shape)}")
        ranks = mesh.size()
        rows = -(-outer_size[0] // ranks)
        pad = (0, 0, 0, rows - self.shape[0])
        qweight = torch.nn.functional.pad(self.qweight, pad)
        scales = torch.nn.functional.pad(self.scales, pad)
        if outer_size[0] % ranks:  # FSDP then wants nothing but tensors of this shape
            scales = scales.expand(-1, outer_size[1]).contiguous()
        return (qweight, scales), (outer_size[0],)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: tuple[int], param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Int8Weight, tuple[()]] | None:
        (rows,) = metadata
        if out is not None:  # which sees the same memory
            return None
        scales = outputs[1] if len(outputs) > 1 else self.scales  # one rank gathers the first tensor only
        return self._like(outputs[0][:rows], scales[:rows, :1], param_dtype), ()

    # FSDP1 marks what it flattens.

    @property
    def _fsdp_flattened(self) -> bool:
        return False

    @_fsdp_flattened.setter
    def _fsdp_flattened(self, value: bool) -> None:
        raise NotImplementedError(
            "FullyShardedDataParallel (FSDP1) cannot shard an Int8Weight; use torch.distributed.fsdp.fully_shard"
        )


class _Step(NamedTuple):
    """A view operation: its arguments but the first, and which of several results is meant."""

    func: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    place: int | None

    def __call__(self, tensor: Tensor) -> Tensor:
        result = self.func(tensor, *self.args, **dict(self.kwargs))
        return result if self.place is None else result[self.place]


class Int8WeightView(Tensor):
    """A view of an `Int8Weight` by operations such as `view` and `t`: what is written to it reaches the weight.

    Attributes:
        base: the `Int8Weight`.
        steps: the operations.
    """

    __slots__ = ("base", "steps")
    base: Int8Weight
    steps: tuple[_Step, ...]

    @staticmethod
    def __new__(cls, like: Tensor, base: Int8Weight, steps: tuple[_Step, ...]) -> Int8WeightView:
        view = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=base.dtype,
            device=base.device,
        )
        view.base, view.steps = base, steps
        return view

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], list[Any]]:
        return ["base"], [self.steps]

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Any], context: list[tuple[_Step, ...]], outer_size: Any, outer_stride: Any
    ) -> Int8WeightView:
        base, (steps,) = inner["base"], context
        return cls(_apply(steps, base.dequantize()), base, steps)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, a plain tensor of `dtype`, by default the reported one."""
        return _apply(self.steps, self.base.dequantize(dtype))

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        Int8Weight._no_memory(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.dequantize())

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.detach().dequantize().__reduce_ex__(protocol)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.base.untyped_storage()

    numpy, __array__, tolist = Int8Weight.numpy, Int8Weight.__array__, Int8Weight.tolist
    data_ptr = storage = _typed_storage = __dlpack__ = share_memory_ = is_shared = Int8Weight._no_memory


_TRANSPOSED = _Step(_aten.t.default, (), (), None)


def _apply(steps: tuple[_Step, ...], tensor: Tensor) -> Tensor:
    for step in steps:
        tensor = step(tensor)
    return tensor


def _rebuild(
    qweight: Tensor, scales: Tensor, dtype: torch.dtype, requires_grad: bool, attributes: dict[str, Any]
) -> Int8Weight:
    """Make the weight of a pickle, which calls this by name: the name is part of saved files."""
    return Int8Weight(qweight, scales, dtype, requires_grad=requires_grad, **attributes)


torch.serialization.add_safe_globals([Int8Weight, _rebuild])


def _read_only(weight: Int8Weight | Int8WeightView, force: bool) -> Any:
    if weight.requires_grad and not force:
        raise RuntimeError("numpy() is for tensors that do not require a gradient; use weight.detach().numpy()")
    array = weight.dequantize().numpy(force=force)
    array.flags.writeable = False
    return array


def _attributes(weight: Int8Weight) -> dict[str, Any]:
    """The attributes that others have set, but not how the weight is multiplied (`weight_products.follow`)."""
    return {name: value for name, value in vars(weight).items() if name not in ("product", "transposed")}


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations that keep the integers, views, and all others."""
    if (special := _SPECIAL.get(func)) is not None and args and isinstance(args[0], Int8Weight):
        result = special(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func.namespace == "c10d":
        return _communicate(func, args, kwargs)
    returns = func._schema.returns
    if args and isinstance(args[0], (Int8Weight, Int8WeightView)) and any(is_view(value) for value in returns):
        return _view(func, args, kwargs)
    return _on_floats(func, args, kwargs)


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight, *rest = args
    base, steps = (weight, ()) if isinstance(weight, Int8Weight) else (weight.base, weight.steps)
    if func is _aten.t.default and steps == (_TRANSPOSED,):
        return _detach(base)
    like = base.dequantize() if is_traced() else torch.empty(base.shape, dtype=base.dtype, device="meta")
    result = func(_apply(steps, like), *rest, **kwargs)
    first = result[0] if isinstance(result, (list, tuple)) else result
    if first.dtype != weight.dtype:
        raise NotImplementedError(f"{func} sees the memory of floats, which an Int8Weight lacks; use dequantize()")

    def one(like: Tensor, index: int | None) -> Int8WeightView:
        return Int8WeightView(like, base, (*steps, _Step(func, tuple(rest), tuple(kwargs.items()), index)))

    if isinstance(result, (list, tuple)):
        return [one(part, index) for index, part in enumerate(result)]
    return one(result, None)


def _on_floats(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on dequantized weights. If it writes to one, then in float32, and what was written is stored."""
    targets = {id(leaf) for leaf in written(func, args, kwargs)}
    leaves, spec = tree_flatten((args, kwargs))
    stores = any(id(leaf) in targets and isinstance(leaf, (Int8Weight, Int8WeightView)) for leaf in leaves)
    floats: dict[int, Tensor] = {}  # by the id of the base's integers
    kept: list[tuple[Tensor, Tensor]] = []  # what is written to, and what is in its place
    originals: dict[int, Tensor] = {}  # what a result stands for, by the id of what was written to in its place

    def value(leaf: Any) -> Any:
        if isinstance(leaf, (Int8Weight, Int8WeightView)):
            base, steps = (leaf, ()) if isinstance(leaf, Int8Weight) else (leaf.base, leaf.steps)
            if id(base.qweight) not in floats:
                exact = stores or called_by("torch.distributed.utils")  # DDP's broadcast of all parameters
                floats[id(base.qweight)] = base.dequantize(torch.float32 if exact else None)
            result = _apply(steps, floats[id(base.qweight)])
        elif stores and isinstance(leaf, Tensor) and leaf.dtype in _HALVES:
            result = leaf.float()
        else:
            return leaf
        if id(leaf) in targets:
            originals[id(result)] = leaf
            kept.append((leaf, result))
        return result

    args, kwargs = tree_unflatten([value(leaf) for leaf in leaves], spec)
    result = func(*args, **kwargs)
    for leaf, values in kept:
        if isinstance(leaf, Int8WeightView):
            if values.shape != leaf.shape:
                raise RuntimeError(f"a view of an Int8Weight cannot be resized from {list(leaf.shape)}")
            leaf.base.store(floats[id(leaf.base.qweight)])
        elif isinstance(leaf, Int8Weight):
            leaf.store(values)
        else:
            leaf.copy_(values)
        count_write(leaf)  # torch counts a write to a list of tensors for plain ones only
    return tree_map_only(Tensor, lambda tensor: originals.get(id(tensor), tensor), result)


def _communicate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Collectives of torch.distributed, whose schemas do not tell what is written."""
    name = func._schema.name.split("::")[1]
    given = [
        (argument.name, leaf)
        for argument, value in zip(func._schema.arguments, args, strict=False)
        for leaf in tree_flatten(value)[0]
        if isinstance(leaf, (Int8Weight, Int8WeightView))
    ]
    if name == "broadcast_" and len(args[0]) == 1 and (weight := _whole(args[0][0])) is not None:
        for stored in (weight.qweight, weight.scales):
            _, work = func([stored], *args[1:], **kwargs)
            if stored is weight.qweight:
                work.wait()
        return args[0], work
    if name == "scatter_" and all(isinstance(leaf, Int8Weight) for leaf in tree_flatten(args[:2])[0]):
        (output,), inputs, *options = args
        func([output.qweight], [[w.qweight for w in weights] for weights in inputs], *options, **kwargs)[1].wait()
        return [output], func([output.scales], [[w.scales for w in ws] for ws in inputs], *options, **kwargs)[1]
    if name == "send" or all(argument.startswith("input") for argument, _ in given):
        return _on_floats(func, args, kwargs)
    raise NotImplementedError(
        f"torch.distributed's {name} cannot write to an Int8Weight; call it with weight.dequantize() and copy_() the "
        "result, or with weight.qweight and weight.scales"
    )


def _whole(weight: Any) -> Int8Weight | None:
    """The weight that is seen as it is, or flat."""
    if isinstance(weight, Int8WeightView):
        flat = weight.dim() <= 2 and weight.numel() == weight.base.numel() and weight.is_contiguous()
        return weight.base if flat and all(step.func is _aten.view.default for step in weight.steps) else None
    return weight if isinstance(weight, Int8Weight) else None


def _detach(weight: Int8Weight) -> Int8Weight:
    return weight._like(weight.qweight, weight.scales)


def _clone(weight: Int8Weight, memory_format: Any = None) -> Int8Weight:
    return weight._like(weight.qweight.clone(), weight.scales.clone())


def _to_copy(weight: Int8Weight, **options: Any) -> Any:
    dtype = options.get("dtype") or weight.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    moved = {name: options[name] for name in ("device", "non_blocking") if name in options}
    qweight, scales = (_aten._to_copy.default(tensor, **moved) for tensor in (weight.qweight, weight.scales))
    return weight._like(qweight, scales, dtype)


def _copy_(weight: Int8Weight, source: Tensor, non_blocking: bool = False) -> Any:
    if isinstance(source, Int8Weight) and source.shape == weight.shape:
        weight._set(source.qweight, source.scales)
        return weight
    if type(source) is Int8WeightView:
        source = source.dequantize(torch.float32)
    if isinstance(source, Int8Weight) or source.shape != weight.shape or not source.is_floating_point():
        return NotImplemented
    weight._take(source.to(weight.device))
    return weight


def _empty_like(weight: Int8Weight, **options: Any) -> Any:
    if not (options.get("dtype") or weight.dtype).is_floating_point:
        return NotImplemented
    moved = {"device": options["device"]} if options.get("device") is not None else {}
    qweight, scales = (torch.zeros_like(tensor, **moved) for tensor in (weight.qweight, weight.scales))
    return weight._like(qweight, scales.fill_(1.0), options.get("dtype"))


def _new_zeros(weight: Int8Weight, size: Any, **options: Any) -> Any:
    """FSDP makes the memory of its shard so. Others, such as optimizers, want floats."""
    if len(size) != 2 or not called_by("torch.distributed.fsdp"):
        return NotImplemented
    qweight = weight.qweight.new_zeros(size, device=options.get("device"))
    return weight._like(qweight, weight.scales.new_ones((size[0], 1), device=options.get("device")))


def _slice(weight: Int8Weight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if dim % 2 != 0 or step != 1:
        return NotImplemented
    rows = slice(start, end)
    return weight._like(weight.qweight[rows], weight.scales[rows])


def _pad(weight: Int8Weight, pad: Any, value: float = 0.0) -> Any:
    """Rows of zeros below, with which torch makes the shards of a DTensor equal."""
    if value != 0 or len(pad) != 4 or any(pad[:3]) or pad[3] < 0:
        return NotImplemented
    pad = (0, 0, 0, pad[3])
    scales = torch.nn.functional.pad(weight.scales, pad, value=1.0)
    return weight._like(torch.nn.functional.pad(weight.qweight, pad), scales)


def _split(weight: Int8Weight, sizes: Any, dim: int = 0) -> Any:
    if dim % 2 != 0:
        return NotImplemented
    return [weight._like(*pair) for pair in zip(weight.qweight.split(sizes), weight.scales.split(sizes), strict=True)]


def _same_shape(weight: Int8Weight, size: Any, *args: Any) -> Any:
    """`view` and `as_strided` that change nothing."""
    strides_stay = not args or (tuple(args[0]) == tuple(weight.stride()) and not any(args[1:]))
    return _detach(weight) if tuple(size) == tuple(weight.shape) and strides_stay else NotImplemented


def _pin_memory(weight: Int8Weight, *args: Any) -> Int8Weight:
    return weight._like(weight.qweight.pin_memory(), weight.scales.pin_memory())


def _set_(weight: Int8Weight, *args: Any, **kwargs: Any) -> Int8Weight:
    """torch makes fake tensors so, whose memory does not matter."""
    if not is_traced() and type(weight.qweight) is Tensor:
        weight._no_memory()
    return weight


def _index_select(weight: Int8Weight, dim: int, index: Tensor) -> Any:
    if dim % 2 != 0:
        return NotImplemented
    return weight._like(weight.qweight.index_select(0, index), weight.scales.index_select(0, index)).dequantize()


_SPECIAL: dict[Any, Callable[..., Any]] = {
    _aten.index_select.default: _index_select,
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_,
    _aten.empty_like.default: _empty_like,
    _aten.new_zeros.default: _new_zeros,
    _aten.slice.Tensor: _slice,
    _aten.constant_pad_nd.default: _pad,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.view.default: _same_shape,
    _aten.as_strided.default: _same_shape,
    _aten._pin_memory.default: _pin_memory,
    _aten.is_pinned.default: lambda weight, *args: weight.qweight.is_pinned() and weight.scales.is_pinned(),
    _aten.set_.source_Tensor: _set_,
    _aten.set_.source_Storage: _set_,
    _aten.set_.source_Storage_storage_offset: _set_,
}

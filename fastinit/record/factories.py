"""torch's factories in a block: recorded where a fill says what they contain, else as fastinit.record.computed says.

A factory is called as ``factory(mode, func, *args, **kwargs)`` with all modes off. It returns NotImplemented for what
is torch's own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._device import _device_constructors

from ..execution import DTYPES, is_native
from ..layout import numel
from ..native import CONSTANT, NORMAL, UNIFORM
from ..recipe import Region, Write
from .computed import compute, device_for, from_data, new_tensor, of_other_layout, requiring, result_type, tolist
from .dispatch import RECORDED, create
from .recorded import fills_what_is_empty, is_worth_recording, refuse_beyond
from .records import in_functorch
from .tensors import Placeholder

if TYPE_CHECKING:
    from .mode import Mode

aten = torch.ops.aten

Factory = Callable[..., Any]

_OF_OTHER_LAYOUTS = (
    *(torch.sparse_coo_tensor, torch.sparse_csr_tensor, torch.sparse_csc_tensor, torch.sparse_bsr_tensor),
    *(torch.sparse_bsc_tensor, torch.sparse_compressed_tensor, torch.nested.nested_tensor),
    torch._empty_affine_quantized,
)

# Those of fastinit.record.computed, to which the ones that are recorded are added below.
FACTORIES: dict[Any, Factory] = {
    **dict.fromkeys(_device_constructors(), compute),
    **dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray), from_data),
    **dict.fromkeys(_OF_OTHER_LAYOUTS, of_other_layout),
    torch.Tensor.new_tensor: new_tensor,
    torch.Tensor.tolist: tolist,
    torch.result_type: result_type,
}


def _is(*functions: Any) -> Callable[[Factory], Factory]:
    def register(factory: Factory) -> Factory:
        for function in functions:
            FACTORIES[function] = factory
        return factory

    return register


_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


def with_torchs_dtype(options: dict[str, Any]) -> dict[str, Any]:
    """A factory's keyword arguments, with torch's name for a dtype that is given as a type of Python."""
    dtype = options.get("dtype")
    return {**options, "dtype": _DTYPES.get(dtype, dtype)} if type(dtype) is type else options


_OPTIONS = {"size", "dtype", "device", "requires_grad", "pin_memory", "layout", "memory_format", "generator", "out"}


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The size argument of a factory, or None if it is not plain integers."""
    if not args and "size" in kwargs:
        args = (kwargs["size"],)
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        args = tuple(args[0])
    try:
        size = tuple(value if type(value) is int else operator.index(value) for value in args)
    except TypeError:
        return None
    return size if all(value >= 0 for value in size) else None


def _create(
    mode: Mode, size: tuple[int, ...] | None, options: dict[str, Any], fill: tuple[int, tuple[float, ...]] | None
) -> Any:
    """A placeholder for a factory call; NotImplemented if it is to be computed."""
    if size is None or torch._C._len_torch_dispatch_stack() or not options.keys() <= _OPTIONS:
        return NotImplemented
    if in_functorch():  # whose tensors are its own: written in place, and drawn as its randomness says
        return NotImplemented
    if options.get("pin_memory") or options.get("layout") not in (None, torch.strided):
        return NotImplemented
    if options.get("out") is not None or options.get("generator") is not None:
        return NotImplemented
    block = mode.block
    dtype = options.get("dtype") or block.default_dtype
    device = device_for(mode, options)
    if fill is None and fills_what_is_empty(block):
        if not dtype.is_floating_point:
            return NotImplemented
        fill = CONSTANT, (math.nan,)
    if device.type == "meta" or (fill is None and dtype in _OPAQUE):
        return NotImplemented
    if math.prod(max(each, 1) for each in size) * dtype.itemsize >= 2**63:
        return NotImplemented  # torch's refusal
    if fill is not None and fill[0] == CONSTANT:
        refuse_beyond(dtype, numel(size), *fill[1])
    if dtype not in DTYPES and fill is not None:
        if not is_worth_recording(dtype, device, *fill):
            return NotImplemented
    elif not is_native(dtype, device) and device.type not in ("cpu", block.device.type):
        return NotImplemented
    region = None
    memory_format = options.get("memory_format")
    if memory_format not in (None, torch.contiguous_format):
        meta = torch.empty(size, device="meta", memory_format=memory_format)
        region = Region(0, size, meta.stride())
    write = None
    if fill is not None:
        stream, key = (0, None) if fill[0] == CONSTANT else block.generator.next_stream()
        write = Write(*fill, stream, key=key)
    result = create(block, size, dtype, device, write, region)
    return requiring(result, options.get("requires_grad"))


_OPAQUE = (torch.quint8, torch.qint8, torch.qint32)


def _recorded(fill: tuple[int, tuple[float, ...]] | None) -> Factory:
    def factory(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
        if "names" in kwargs:
            return compute(mode, func, *args, **kwargs)
        result = _create(mode, _size(args, kwargs), kwargs, fill)
        return compute(mode, func, *args, **kwargs) if result is NotImplemented else result

    return factory


_recorded_empty = _recorded(None)


@_is(torch.empty)
def _empty(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("pin_memory") and device_for(mode, kwargs).type == "cpu":
        # What somebody copies through, safetensors say: torch's own, at once.
        dtype = kwargs.get("dtype") or mode.block.default_dtype
        return func(*args, **{**kwargs, "dtype": dtype, "device": "cpu"})
    return _recorded_empty(mode, func, *args, **kwargs)


FACTORIES[torch.zeros] = _recorded((CONSTANT, (0.0,)))
FACTORIES[torch.ones] = _recorded((CONSTANT, (1.0,)))
FACTORIES[torch.rand] = _recorded((UNIFORM, (0.0, 1.0)))
FACTORIES[torch.randn] = _recorded((NORMAL, (0.0, 1.0)))


@_is(torch.full)
def _full(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    options = dict(kwargs)
    size, value = (*args, *(options.pop(name) for name in ("size", "fill_value") if name in options))
    # Without a dtype, torch makes whole numbers int64, and anything else the default dtype.
    if type(value) is float or (type(value) is int and options.get("dtype") is not None):
        result = _create(mode, _size((size,), {}), options, (CONSTANT, (float(value),)))
        if result is not NotImplemented:
            return result
    is_complex = value.is_complex() if isinstance(value, torch.Tensor) else isinstance(value, complex)
    if is_complex and options.get("dtype") is None and mode.block.default_dtype == torch.float64:
        kwargs = {**kwargs, "dtype": torch.complex128}  # of any other default, torch makes complex64
    return compute(mode, func, *args, **kwargs)


@_is(torch.empty_strided)
def _empty_strided(mode: Mode, func: Any, size: Any, stride: Any, **options: Any) -> Any:
    sizes, strides = _size((tuple(size),), {}), _size((tuple(stride),), {})
    block = mode.block
    plain = not torch._C._len_torch_dispatch_stack() and not fills_what_is_empty(block) and not in_functorch()
    if plain and sizes is not None and strides is not None and 0 not in sizes:
        device = device_for(mode, options)
        dtype = options.get("dtype") or block.default_dtype
        end = Region(0, sizes, strides).end
        plain = end * dtype.itemsize < 2**63 and dtype not in _OPAQUE  # what overflows is torch's to refuse
        if plain and device.type != "meta" and not options.get("pin_memory"):
            base = create(block, (end,), dtype, device, None)
            result = base.as_strided(sizes, strides)
            return requiring(result, options.get("requires_grad"))
    return compute(mode, func, size, stride, **options)


@_is(torch.empty_permuted)
def _empty_permuted(mode: Mode, func: Any, size: Any, physical_layout: Any, **options: Any) -> Any:
    strides = torch.empty_permuted(tuple(size), tuple(physical_layout), device="meta").stride()
    return _empty_strided(mode, torch.empty_strided, tuple(size), strides, **options)


@_is(torch.normal)
def _torch_normal(mode: Mode, func: Any, mean: Any, std: Any = None, size: Any = None, **kwargs: Any) -> Any:
    if (
        size is None
        or not all(type(value) in (int, float) and math.isfinite(value) for value in (mean, std))
        or std < 0
    ):
        return NotImplemented if size is None else compute(mode, func, mean, std, size, **kwargs)
    result = _create(mode, _size((size,), {}), kwargs, (NORMAL, (float(mean), float(std))))
    return compute(mode, func, mean, std, size, **kwargs) if result is NotImplemented else result


# Tensors like others: the operators of fastinit.record.dispatch, also for tensors of others.
_LIKE = {
    torch.empty_like: aten.empty_like.default,
    torch.zeros_like: aten.zeros_like.default,
    torch.ones_like: aten.ones_like.default,
    torch.rand_like: aten.rand_like.default,
    torch.randn_like: aten.randn_like.default,
    torch.full_like: aten.full_like.default,
    torch.Tensor.new_empty: aten.new_empty.default,
    torch.Tensor.new_zeros: aten.new_zeros.default,
    torch.Tensor.new_ones: aten.new_ones.default,
    torch.Tensor.new_full: aten.new_full.default,
}


def _like(overload: Any) -> Factory:
    def factory(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
        other = args[0] if args else kwargs.get("input")
        if not isinstance(other, torch.Tensor) or type(other).__torch_function__ not in _SILENT:
            return NotImplemented  # torch's to refuse, or a subclass's to answer
        if not args:
            del kwargs["input"]
        if torch._C._len_torch_dispatch_stack():
            return func(other, *args[1:], **kwargs)
        rest = args[1:]
        requires_grad = kwargs.pop("requires_grad", False)
        plain = type(other) in (torch.Tensor, torch.nn.Parameter, Placeholder)
        if plain and other.layout == torch.strided and not in_functorch():
            if overload in _SIZED:
                given = rest[:1] if overload is aten.new_full.default else rest
                size = _size(given, kwargs)
                kwargs.pop("size", None)
                if size is None:
                    return requiring(func(other, *rest, **kwargs), requires_grad)
                rest = (size, *rest[1:]) if overload is aten.new_full.default else (size,)
            result = RECORDED[overload](overload, other, *rest, **kwargs)
            if result is not NotImplemented:
                return requiring(result, requires_grad)
        return requiring(func(other, *rest, **kwargs), requires_grad)

    return factory


# What classes have that leave functions of torch to torch.
_SILENT = (torch.Tensor.__torch_function__, torch._C._disabled_torch_function_impl)

_SIZED = {aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
for _function, _overload in _LIKE.items():
    FACTORIES[_function] = _like(_overload)


@_is(torch.Tensor.new)
def _new(mode: Mode, func: Any, other: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.keys() - {"device", "size"} or other.layout != torch.strided:
        return NotImplemented
    if any(isinstance(each, torch.Tensor) for each in args):
        return NotImplemented  # another tensor of the same memory
    if torch.device(kwargs.get("device") or other.device).type != other.device.type:
        return NotImplemented  # torch's to refuse
    if len(args) == 1 and isinstance(args[0], (list, tuple)) and not isinstance(args[0], torch.Size):
        return from_data(mode, torch.tensor, args[0], dtype=other.dtype, device=other.device)
    size = _size(args or (() if "size" in kwargs else (0,)), kwargs)
    if size is not None:
        return create(mode.block, size, other.dtype, other.device, None)
    return NotImplemented


def legacy_tensor(mode: Mode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.Tensor(2, 3)``, uninitialized, ``torch.Tensor([2, 3])`` and the like, all of the default dtype."""
    options = {**kwargs, "dtype": mode.block.default_dtype}
    values = [*args, *options.pop("size", ()), *([options.pop("data")] if "data" in kwargs else ())]
    if not options.keys() <= {"dtype", "device"} or torch.device(options.get("device") or "cpu").type != "cpu":
        return NotImplemented
    data = values[0] if len(values) == 1 else None
    if isinstance(data, torch.Tensor):
        return NotImplemented  # another tensor of the same memory
    if isinstance(data, (torch.UntypedStorage, torch.TypedStorage)):
        return torch.empty(0, **options).set_(data)
    if isinstance(data, torch.Size) or not any(hasattr(value, "__len__") for value in values):
        return _create(mode, _size(tuple(values) or (0,), {}), options, None)
    return from_data(mode, torch.tensor, data, **options) if hasattr(data, "__len__") else NotImplemented

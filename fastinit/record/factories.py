"""torch's factories in a block: recorded where a fill says what they contain, else as fastinit.record.computed says.

A factory is called as ``factory(mode, func, *args, **kwargs)`` with all modes off. It returns NotImplemented for what
is torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._device import _device_constructors

from ..native import CONSTANT, NORMAL
from .computed import compute, device_for, from_data, new_tensor, of_other_layout, requiring, result_type
from .dispatch import RECORDED
from .recorded import FILLS, LIKE, NEW, Fill, filled
from .records import in_functorch
from .tensors import Placeholder

if TYPE_CHECKING:
    from .mode import Mode

aten = torch.ops.aten

Factory = Callable[..., Any]

_GEOMETRY = {"size", "stride", "physical_layout", "memory_format"}
_OPTIONS = {"dtype", "device", "requires_grad", "pin_memory", "layout", "generator", "out"}


def _on_meta(make: Any, args: tuple[Any, ...], **options: Any) -> torch.Tensor | None:
    """What torch makes of a geometry; None if it refuses that, or sizes are those of a trace, which would be bound."""
    try:
        meta: torch.Tensor = make(*args, **options, device="meta")
    except (TypeError, RuntimeError):
        return None
    return None if any(isinstance(each, torch.SymInt) for each in meta.shape) else meta


def _create(mode: Mode, make: Any, args: tuple[Any, ...], options: dict[str, Any], fill: Fill | None) -> Any:
    """A placeholder for a factory call, of the geometry that `make` gives; NotImplemented if it is to be computed."""
    if torch._C._len_torch_dispatch_stack() or not options.keys() <= _GEOMETRY | _OPTIONS:
        return NotImplemented
    if in_functorch():  # whose tensors are its own: written in place, and drawn as its randomness says
        return NotImplemented
    if options.get("out") is not None or options.get("generator") is not None:
        return NotImplemented
    dtype = options.get("dtype") or mode.block.default_dtype
    geometry = {name: options[name] for name in _GEOMETRY & options.keys()}
    meta = _on_meta(make, args, **geometry, dtype=dtype)
    if meta is None or meta.is_quantized:
        return NotImplemented
    result = filled(mode.block, tuple(meta.shape), meta.stride(), dtype, device_for(mode, options), fill, options)
    return result if result is NotImplemented else requiring(result, options.get("requires_grad"))


def _recorded(make: Any, asked: Callable[..., Any]) -> Factory:
    """A factory that is recorded, or computed.

    Args:
        make: gives the geometry.
        asked: of its arguments gives those of `make`, the options and the fill; None for what no fill says.
    """

    def factory(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
        what = asked(*args, **kwargs)
        result = NotImplemented if what is None else _create(mode, make, *what)
        return compute(mode, func, *args, **kwargs) if result is NotImplemented else result

    return factory


def _filled_with(fill: Fill | None) -> Callable[..., Any]:
    return lambda *args, **options: (args, options, fill)


def _strided(*args: Any, **options: Any) -> Any:
    strides = options["stride"] if "stride" in options else args[1] if len(args) > 1 else ()
    # On meta torch takes negative strides, which it refuses elsewhere.
    return None if any(type(each) is int and each < 0 for each in strides) else (args, options, None)


def _full(*args: Any, **options: Any) -> Any:
    size, value = (*args, *(options.pop(name) for name in ("size", "fill_value") if name in options))
    # Without a dtype, torch makes whole numbers int64, and anything else the default dtype.
    if type(value) is float or (type(value) is int and options.get("dtype") is not None):
        return (size,), options, (CONSTANT, (float(value),))
    return None


def _normal(mean: Any, std: Any, size: Any, **options: Any) -> Any:
    plain = all(type(value) in (int, float) and math.isfinite(value) for value in (mean, std)) and std >= 0
    return ((size,), options, (NORMAL, (float(mean), float(std)))) if plain else None


def _torch_normal(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    has_size = len(args) > 2 or kwargs.get("size") is not None
    return _recorded(torch.empty, _normal)(mode, func, *args, **kwargs) if has_size else NotImplemented


def _like(overload: Any, takes_size: bool) -> Factory:
    """A tensor like another one: the operator of fastinit.record.recorded, also for tensors of others."""

    def factory(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
        other = args[0] if args else kwargs.pop("input", None)
        plain = type(other) in (torch.Tensor, torch.nn.Parameter, Placeholder) and other.layout == torch.strided
        if not plain or in_functorch() or torch._C._len_torch_dispatch_stack():
            return NotImplemented  # torch's to refuse, or a subclass's or a mode's to answer
        requires_grad, rest = kwargs.pop("requires_grad", False), args[1:]
        if takes_size:
            size, rest = (rest[:1], rest[1:]) if overload is aten.new_full.default else (rest, ())
            meta = _on_meta(torch.empty, size, **({"size": kwargs.pop("size")} if "size" in kwargs else {}))
            if meta is None:
                return NotImplemented
            rest = (tuple(meta.shape), *rest)
        result = RECORDED[overload](overload, other, *rest, **kwargs)
        return result if result is NotImplemented else requiring(result, requires_grad)

    return factory


def _new(mode: Mode, func: Any, other: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.keys() - {"device", "size"} or other.layout != torch.strided:
        return NotImplemented
    if any(isinstance(each, torch.Tensor) for each in args):
        return NotImplemented  # another tensor of the same memory
    if torch.device(kwargs.get("device") or other.device).type != other.device.type:
        return NotImplemented  # torch's to refuse
    if len(args) == 1 and isinstance(args[0], (list, tuple)) and not isinstance(args[0], torch.Size):
        return from_data(mode, torch.tensor, args[0], dtype=other.dtype, device=other.device)
    size = args or (() if "size" in kwargs else (0,))
    return _create(mode, torch.empty, size, {**kwargs, "dtype": other.dtype, "device": other.device}, None)


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
        return _create(mode, torch.empty, tuple(values) or (0,), options, None)
    return from_data(mode, torch.tensor, data, **options) if hasattr(data, "__len__") else NotImplemented


_OF_OTHER_LAYOUTS = (
    *(torch.sparse_coo_tensor, torch.sparse_csr_tensor, torch.sparse_csc_tensor, torch.sparse_bsr_tensor),
    *(torch.sparse_bsc_tensor, torch.sparse_compressed_tensor, torch.nested.nested_tensor),
    torch._empty_affine_quantized,
)

# Factories of a size that are recorded, with what fills their results.
RECORDED_FACTORIES = {getattr(torch, name): fill for name, fill in FILLS.items() if name != "full"}

FACTORIES: dict[Any, Factory] = {
    **dict.fromkeys(_device_constructors(), compute),
    **dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray), from_data),
    **dict.fromkeys(_OF_OTHER_LAYOUTS, of_other_layout),
    **{each: _recorded(torch.empty, _filled_with(fill)) for each, fill in RECORDED_FACTORIES.items()},
    torch.empty_strided: _recorded(torch.empty_strided, _strided),
    torch.empty_permuted: _recorded(torch.empty_permuted, _filled_with(None)),
    **{getattr(torch, each): _like(getattr(aten, each).default, False) for each in LIKE},
    **{getattr(torch.Tensor, each): _like(getattr(aten, each).default, True) for each in NEW},
    torch.full: _recorded(torch.empty, _full),
    torch.normal: _torch_normal,
    torch.Tensor.new: _new,
    torch.Tensor.new_tensor: new_tensor,
    # torch's own refuses subclasses.
    torch.Tensor.tolist: lambda mode, func, it: it.tolist() if type(it) is Placeholder else NotImplemented,
    torch.result_type: result_type,
}

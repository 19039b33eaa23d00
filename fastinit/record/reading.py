"""What torch's operators do to unwritten tensors.

Those that write one give it memory, those that carry it elsewhere carry its recipe, and any other is refused, by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..execution import concrete
from ..native import CONSTANT
from ..recipe import Region, Write
from . import fast
from .block import current
from .dispatch import RECORDED, operator_of
from .nested import map_tensors, tensors_in
from .records import is_in_order, is_whole, lock, modes_off, view_of
from .unwritten import Rest, Unwritten, readable, refuse, region_of, rest_of, stand_for

aten = torch.ops.aten


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operator, one of whose operands is unwritten."""
    handler = _HANDLED.get(func)
    if handler is not None:
        result = handler(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    operator = operator_of(func)
    if operator.is_composite:
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if operator.is_view and type(args[0]) is Unwritten:
        return _view(func, *args, **kwargs)
    fake = _fake_mode((args, kwargs))
    if fake is not None:
        with fake:
            return func(*map_tensors(_like, args), **map_tensors(_like, kwargs))
    return _run(func, args, kwargs)


def _fake_mode(operands: Any) -> Any:
    """The mode of fake tensors among the operands: it asks for shapes and dtypes alone."""
    for each in tensors_in(operands):
        mode = getattr(each, "fake_mode", None)
        if mode is not None:
            return mode
    return None


def _like(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is not Unwritten:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


_UNSENT = (
    ", so that there is nothing for ranks to send each other: with src_data_rank=None, parallelize_module and "
    "distribute_tensor let each rank take its part of its own"
)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let torch run an operator that reads what is written, or writes over what is not."""
    written = list(_overwritten(func, args, kwargs))
    substitutes: dict[int, torch.Tensor] = {}
    originals: dict[int, torch.Tensor] = {}
    for tensor in tensors_in((args, kwargs)):
        if type(tensor) is not Unwritten:
            continue
        if any(tensor is each for each in written):
            # Another object than the memory itself, which an out= argument of another shape would resize.
            substitutes[id(tensor)] = view_of(rest_of(tensor).with_memory(), region_of(tensor)).detach()
        else:
            substitutes[id(tensor)] = readable(tensor, _UNSENT if func.namespace == "c10d" else "")
        originals[id(substitutes[id(tensor)])] = tensor
    args_read, kwargs_read = map_tensors(lambda each: substitutes.get(id(each), each), (args, kwargs))
    results = func(*args_read, **kwargs_read)
    places = _places(func, args, kwargs) if written and func in _SCATTERS else None
    for tensor in written:
        if substitutes[id(tensor)].shape != tensor.shape:
            refuse(tensor, "; an out= argument of another shape cannot take its place")
        if places is None:
            rest_of(tensor).wrote(region_of(tensor))
        else:
            rest_of(tensor).written.add_places(places)
            rest_of(tensor).settle()
    return map_tensors(lambda each: originals.get(id(each), each), results)


def _overwritten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Unwritten]:
    """The unwritten operands that an operator writes without reading them."""
    if func in _FILLS or (func in _SCATTERS and not _accumulates(func, args, kwargs)):
        first = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        yield from (each for each in first if type(each) is Unwritten)
    for argument in func._schema.arguments:
        if argument.is_out and type(kwargs.get(argument.name)) is Unwritten:
            yield kwargs[argument.name]


def _accumulates(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether index_put_ adds to what is there."""
    return func is aten.index_put_.default and bool(args[3] if len(args) > 3 else kwargs.get("accumulate"))


def _overloads(*names: str) -> set[Any]:
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    return {getattr(packet, overload) for packet in packets for overload in packet.overloads()}


# Operators that write all of their first operand, or each tensor of it, and read none.
_FILLS = _overloads(
    *"copy_ fill_ zero_ uniform_ normal_ random_ exponential_ geometric_ log_normal_ cauchy_".split(),
    *"bernoulli_ _foreach_copy_ _foreach_zero_".split(),
)

# Operators that write some elements of their first operand, with the name of what they write there.
_SCATTERS = {
    aten.index_put_.default: "values",
    aten.masked_fill_.Scalar: "value",
    aten.masked_fill_.Tensor: "value",
    aten.masked_scatter_.default: "source",
    aten.index_fill_.int_Scalar: "value",
    aten.index_fill_.int_Tensor: "value",
    aten.index_copy_.default: "source",
    aten.scatter_.src: "src",
    aten.scatter_.value: "value",
}


def _places(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The storage positions that such an operator writes to: where it leaves ones in a tensor of zeros."""
    tensor = args[0]
    hits = torch.zeros(tensor.shape, dtype=torch.uint8, device=tensor.device)

    def ones(name: str, value: Any) -> Any:
        if name != _SCATTERS[func]:
            return value
        return torch.ones_like(value, dtype=torch.uint8, device=tensor.device) if torch.is_tensor(value) else 1

    names = [argument.name for argument in func._schema.arguments]
    rest = [ones(name, value) for name, value in zip(names[1:], args[1:], strict=False)]
    func(hits, *rest, **{name: ones(name, value) for name, value in kwargs.items()})
    strides = torch.tensor(tensor.stride(), dtype=torch.int64)
    places: torch.Tensor = tensor.storage_offset() + (hits.nonzero().cpu() * strides).sum(1)
    return places


_HANDLED: dict[Any, Callable[..., Any]] = {}


def _handles(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for func in funcs:
            _HANDLED[func] = handler
        return handler

    return register


def _view(func: Any, tensor: Unwritten, *args: Any, **kwargs: Any) -> Any:
    rest = rest_of(tensor)
    sizes = [tuple(each) if type(each) is list else each for each in args]
    options = {name: tuple(each) if type(each) is list else each for name, each in kwargs.items()}
    regions = _regions(func, rest.shape, region_of(tensor), rest.dtype, *sizes, **options)
    if regions is None:
        return func(readable(tensor), *args, **kwargs)
    return [stand_for(rest, each) for each in regions] if isinstance(regions, list) else stand_for(rest, regions)


@functools.lru_cache(maxsize=4096)  # the layers of a model are alike
def _regions(
    func: Any, shape: tuple[int, ...], region: Region | None, dtype: torch.dtype, /, *args: Any, **kwargs: Any
) -> Region | list[Region] | None:
    """What views of a region of a storage show, as torch computes it on meta; None: not what lies there."""
    views = func(view_of(torch.empty(shape, dtype=dtype, device="meta"), region), *args, **kwargs)
    regions = []
    for each in [views] if isinstance(views, torch.Tensor) else views:
        if each.dtype != dtype or each.is_conj() or each.is_neg():
            return None
        regions.append(Region(int(each.storage_offset()), tuple(each.shape), each.stride()))
    return regions[0] if isinstance(views, torch.Tensor) else regions


@_handles(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _same(func: Any, tensor: Unwritten) -> Unwritten:
    return stand_for(rest_of(tensor), region_of(tensor))


@_handles(aten._to_copy.default, aten.clone.default)
def _copied(func: Any, tensor: Unwritten, **options: Any) -> Any:
    rest, region = rest_of(tensor), region_of(tensor)
    dtype, device = options.get("dtype") or tensor.dtype, concrete(options.get("device") or tensor.device)
    if rest.has(region) or not dtype.is_floating_point:
        return NotImplemented
    if not is_whole(rest, region):
        if rest.memory is not None:
            refuse(tensor)
        return _part(tensor, tuple(tensor.shape), dtype, device)
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")
    strides = func(meta, memory_format=options.get("memory_format")).stride()
    if strides == tensor.stride():
        return stand_for(rest.forked(dtype, device), region)
    if rest.memory is not None or rest.place is not None or not is_in_order(rest, region):
        refuse(tensor, ", so that its elements cannot change their order")
    place = Region(0, tuple(tensor.shape), strides)
    return stand_for(Rest(rest.origin, (tensor.numel(),), place, dtype, device), place)


def _part(tensor: Unwritten, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Unwritten:
    """A tensor of its own for the values of a part."""
    return stand_for(Rest(rest_of(tensor).origin._replace(placeless=True), shape, None, dtype, device))


@_handles(aten.constant_pad_nd.default)
def _padded(func: Any, tensor: Unwritten, pad: Any, value: Any = 0) -> Any:
    # What DTensor does to uneven parts before it scatters them.
    if rest_of(tensor).memory is not None:
        return NotImplemented
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return _part(tensor, tuple(func(meta, pad, value).shape), tensor.dtype, tensor.device)


@_handles(aten.empty_like.default)
def _empty_like(func: Any, tensor: torch.Tensor, **options: Any) -> Any:
    """The tensor again, with none of its elements written: what ``to_empty`` asks for."""
    dtype, device = options.get("dtype") or tensor.dtype, concrete(options.get("device") or tensor.device)
    if type(tensor) is not Unwritten or not dtype.is_floating_point:
        return NotImplemented
    rest, region = rest_of(tensor), region_of(tensor)
    if not is_whole(rest, region):
        return _part(tensor, tuple(tensor.shape), dtype, device)
    return stand_for(Rest(rest.origin, rest.shape, rest.place, dtype, device), region)


_ZEROS = (Write(CONSTANT, (0.0,)),)


@_handles(aten.new_zeros.default)
def _new_zeros(func: Any, tensor: Unwritten, size: Any, **options: Any) -> Any:
    # Zeros that are not in memory yet: FSDP2 makes them, and copies this rank's part of the tensor into them.
    dtype, device = options.get("dtype") or tensor.dtype, concrete(options.get("device") or tensor.device)
    if not dtype.is_floating_point or options.get("pin_memory"):
        return _like_it(func, tensor, size, **options)
    origin = rest_of(tensor).origin
    zeros = origin._replace(shape=tuple(size), recipe=_ZEROS, placeless=False, reads_nan=False, zeros=True)
    return stand_for(Rest(zeros, tuple(size), None, dtype, device))


@_handles(
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
    *(aten.rand_like.default, aten.randn_like.default, aten.new_empty.default, aten.new_empty_strided.default),
    *(aten.new_ones.default, aten.new_full.default),
)
def _like_it(func: Any, tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
    """A tensor of the dtype and device of one that has no memory; in another block, recorded there like any other."""
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if current.get() is not None and type(tensor) is Unwritten:
        there = {**options, "device": options.get("device") or rest_of(tensor).origin.device}
        result = RECORDED[func](func, meta, *args, **there)
        if result is not NotImplemented:
            return result
    return func(meta, *args, **{**options, "device": options.get("device") or tensor.device})


@_handles(aten.copy_.default)
def _copy(func: Any, tensor: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    """A copy of what is unwritten is unwritten; any other one writes."""
    if type(source) is not Unwritten or rest_of(source).has(region_of(source)):
        return NotImplemented
    if type(tensor) is not Unwritten or rest_of(tensor).memory is not None or rest_of(source).memory is not None:
        return NotImplemented
    rest, other = rest_of(tensor), rest_of(source)
    whole = is_whole(rest, region_of(tensor)) and is_whole(other, region_of(source))
    same = tensor.shape == source.shape and tensor.stride() == source.stride()
    if whole and same:
        rest.origin, rest.place = other.origin, other.place
    else:
        rest.origin, rest.place = other.origin._replace(placeless=True), None
    return tensor


Unwritten.dispatch = staticmethod(dispatch)


# --- methods --------------------------------------------------------------------------------------------------------

# What FSDP2 does to each parameter, done without the way through torch's dispatcher, which takes longer than all else.


def _is_watched(operands: tuple[Any, ...]) -> bool:
    """Whether a mode, a function transform or a graph of autograd is to see what is done to tensors."""
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return True
    records_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(operands))
    return records_graph or torch._C._functorch.peek_interpreter_stack() is not None


def _method(name: str, handler: Callable[..., Any], accepts: Callable[[Any], bool]) -> None:
    """Let a method of unwritten tensors be what its operator is, if all arguments are ones that are accepted."""
    usual = getattr(torch.Tensor, name)

    @functools.wraps(usual)
    def method(self: Unwritten, *args: Any, **kwargs: Any) -> Any:
        if fast.in_use and all(map(accepts, (*args, *kwargs.values()))) and not _is_watched((self, *args)):
            with lock, modes_off():
                result = handler(usual, self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return usual(self, *args, **kwargs)

    setattr(Unwritten, name, method)


_method("narrow", _view, lambda value: type(value) is int)
_method("view", _view, lambda value: type(value) is int)
_method("new_zeros", _new_zeros, lambda value: type(value) is torch.Size)
_method("copy_", _copy, lambda value: type(value) is Unwritten)

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
from .unwritten import Rest, Unwritten, memory_of, readable, refuse, stand_for, wrote

aten = torch.ops.aten


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operator, one of whose operands is unwritten."""
    handler = _HANDLED.get(func)
    if handler is not None and type(args[0]) is Unwritten:
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
    for each in tensors_in((args, kwargs)):
        fake = getattr(each, "fake_mode", None)
        if fake is not None:  # it asks for shapes and dtypes alone
            with fake:
                return func(*map_tensors(_like, args), **map_tensors(_like, kwargs))
    return _run(func, args, kwargs)


def _like(tensor: torch.Tensor, device: str | None = None) -> torch.Tensor:
    """A tensor with memory like one that is unwritten; or that one."""
    if type(tensor) is not Unwritten:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)


_UNSENT = (
    ", so that there is nothing for ranks to send each other: with src_data_rank=None, parallelize_module and "
    "distribute_tensor let each rank take its part of its own"
)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let torch run an operator that reads what is written, or writes over what is not."""
    written = list(_overwritten(func, args, kwargs))
    memories: list[tuple[torch.Tensor, torch.Tensor]] = []

    def memory(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is not Unwritten:
            return tensor
        if any(tensor is each for each in written):
            # Another object than the memory itself, which an out= argument of another shape would resize.
            memories.append((memory_of(tensor).detach(), tensor))
        else:
            memories.append((readable(tensor, _UNSENT if func.namespace == "c10d" else ""), tensor))
        return memories[-1][0]

    args_read, kwargs_read = map_tensors(memory, (args, kwargs))
    results = func(*args_read, **kwargs_read)
    places = _places(func, args, kwargs) if written and func in _SCATTERS else None
    for tensor in written:
        if any(each.shape != tensor.shape for each, of in memories if of is tensor):
            refuse(tensor, "; an out= argument of another shape cannot take its place")
        wrote(tensor, places)
    return map_tensors(lambda each: next((of for known, of in memories if known is each), each), results)


def _overwritten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Unwritten]:
    """The unwritten operands that an operator writes without reading them."""
    adds = func is aten.index_put_.default and (args[3] if len(args) > 3 else kwargs.get("accumulate"))
    if func in _FILLS or (func in _SCATTERS and not adds):
        yield from (each for each in tensors_in(args[0]) if type(each) is Unwritten)
    for argument in func._schema.arguments:
        if argument.is_out and type(kwargs.get(argument.name)) is Unwritten:
            yield kwargs[argument.name]


def _overloads(*names: str) -> set[Any]:
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    return {getattr(packet, overload) for packet in packets for overload in packet.overloads()}


# Operators that write all of their first operand, or each tensor of it, and read none.
_FILLS = _overloads(
    *"copy_ fill_ zero_ uniform_ normal_ random_ exponential_ geometric_ log_normal_ cauchy_".split(),
    *"bernoulli_ _foreach_copy_ _foreach_zero_".split(),
)

# Operators that write some elements of their first operand, and what they call that which they write there.
_SCATTERS = _overloads(*"index_copy_ index_fill_ index_put_ masked_fill_ masked_scatter_ scatter_".split()) - {
    *(aten.scatter_.reduce, aten.scatter_.value_reduce),
}
_SCATTERED = ("source", "src", "value", "values")


def _places(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The storage positions that such an operator writes to: where it leaves ones in a tensor of zeros."""
    tensor = args[0]
    hits = torch.zeros(tensor.shape, dtype=torch.uint8, device=tensor.device)

    def ones(name: str, value: Any) -> Any:
        if name not in _SCATTERED:
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
    rest = tensor._record
    sizes = [tuple(each) if type(each) is list else each for each in args]
    options = {name: tuple(each) if type(each) is list else each for name, each in kwargs.items()}
    regions = _regions(func, rest.shape, tensor._region, rest.dtype, *sizes, **options)
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


@_handles(aten._to_copy.default, aten.clone.default, aten.empty_like.default)
def _again(func: Any, tensor: Unwritten, **options: Any) -> Any:
    """The tensor again, of another dtype or elsewhere; ``to_empty`` asks for one with none of its elements written."""
    rest, region = tensor._record, tensor._region
    dtype, device = _kind(tensor, options)
    is_empty = func is aten.empty_like.default
    if not dtype.is_floating_point:
        return _like_it(func, tensor, **options) if is_empty else NotImplemented
    if rest.has(region) and not is_empty:
        return NotImplemented
    written = rest.memory is not None and not is_empty
    if not is_whole(rest, region):
        if written:
            refuse(tensor)
        return _part(tensor, tuple(tensor.shape), dtype, device)
    strides = func(_like(tensor, "meta"), memory_format=options.get("memory_format")).stride()
    if strides == tensor.stride():
        return stand_for(rest.forked(dtype, device, empty=is_empty), region)
    if written or rest.place is not None or not is_in_order(rest, region):
        refuse(tensor, ", so that its elements cannot change their order")
    place = Region(0, tuple(tensor.shape), strides)
    return stand_for(Rest(rest.origin, (tensor.numel(),), place, dtype, device), place)


def _kind(tensor: torch.Tensor, options: dict[str, Any]) -> tuple[torch.dtype, torch.device]:
    """The dtype and the device of a tensor that is made of another one."""
    return options.get("dtype") or tensor.dtype, concrete(options.get("device") or tensor.device)


def _part(tensor: Unwritten, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Unwritten:
    """A tensor of its own for the values of a part."""
    return stand_for(Rest(tensor._record.origin._replace(placeless=True), shape, None, dtype, device))


@_handles(aten.constant_pad_nd.default)
def _padded(func: Any, tensor: Unwritten, *args: Any) -> Any:
    # What DTensor does to uneven parts before it scatters them.
    if tensor._record.memory is not None:
        return NotImplemented
    return _part(tensor, tuple(func(_like(tensor, "meta"), *args).shape), tensor.dtype, tensor.device)


_ZEROS = (Write(CONSTANT, (0.0,)),)


@_handles(aten.new_zeros.default)
def _new_zeros(func: Any, tensor: Unwritten, size: Any, **options: Any) -> Any:
    # Zeros that are not in memory yet: FSDP2 makes them, and copies this rank's part of the tensor into them.
    dtype, device = _kind(tensor, options)
    if not dtype.is_floating_point or options.get("pin_memory"):
        return _like_it(func, tensor, size, **options)
    origin = tensor._record.origin
    zeros = origin._replace(shape=tuple(size), recipe=_ZEROS, placeless=False, reads_nan=False, zeros=True)
    return stand_for(Rest(zeros, tuple(size), None, dtype, device))


@_handles(
    *_overloads(*"full_like ones_like rand_like randint_like randn_like zeros_like".split()),
    *_overloads(*"new_empty new_empty_strided new_full new_ones".split()),
)
def _like_it(func: Any, tensor: Unwritten, *args: Any, **options: Any) -> Any:
    """A tensor of the dtype and device of one that has no memory; in another block, recorded there like any other."""
    if current.get() is not None and func in RECORDED:
        there = {**options, "device": options.get("device") or tensor._record.origin.device}
        result = RECORDED[func](func, _like(tensor, "meta"), *args, **there)
        if result is not NotImplemented:
            return result
    return func(_like(tensor, "meta"), *args, **{**options, "device": options.get("device") or tensor.device})


@_handles(aten.copy_.default)
def _copy(func: Any, tensor: Unwritten, source: torch.Tensor, non_blocking: bool = False) -> Any:
    """A copy of what is unwritten is unwritten; any other one writes."""
    rest = tensor._record
    if type(source) is not Unwritten or rest.memory is not None or source._record.memory is not None:
        return NotImplemented
    origin, place = source._record.origin._replace(placeless=True), None
    if is_whole(rest, tensor._region) and is_whole(source._record, source._region):
        if tensor.shape == source.shape and tensor.stride() == source.stride():
            origin, place = source._record.origin, source._record.place
    rest.origin, rest.place = origin, place
    return tensor


@_handles(aten.set_.source_Tensor)
def _set(func: Any, tensor: Unwritten, source: torch.Tensor) -> Any:
    if source.dtype != tensor.dtype:
        return NotImplemented
    tensor.data = source
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

"""What torch's operators do to placeholders.

`dispatch` decides it for every operator that reaches torch's dispatcher:

- a fill or a step on something pending lets its recipe grow (`RECORDED`);
- a view is a placeholder of a region of the same record;
- for anything else torch runs, on the operands' values: on the host, in fp32 for half precision, as the constructor of an
  fp32 model would; or on the final memory where that is in use already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from .. import native
from ..execution import DTYPES, allocate, can_fill
from ..layout import contiguous_strides, numel
from ..native import ADD, CLAMP, CONSTANT, DIVIDE, MULTIPLY, NORMAL, UNIFORM
from ..recipe import ERFINV, Region, Write, with_step
from .block import Block, current
from .calls import record_call
from .precision import WHOLE, result_dtypes
from .tensors import (
    HALVES,
    LARGEST_MASTER,
    Placeholder,
    Record,
    concrete,
    has_master,
    is_dense,
    is_in_order,
    is_whole,
    modes_off,
    stand_for,
    view_of,
)

aten = torch.ops.aten

_HOST = torch.device("cpu")

RECORDED: dict[Any, Callable[..., Any]] = {}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operator, one of whose operands is a placeholder."""
    recorded = RECORDED.get(func)
    if recorded is not None:
        result = recorded(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    if _is_composite(func):
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if torch.Tag.inplace_view in func.tags and func not in _TAKES_MEMORY and type(args[0]) is Placeholder:
        geometry = func(_on_meta(args[0]), *args[1:], **kwargs)
        _retarget(args[0], Region(geometry.storage_offset(), tuple(geometry.shape), geometry.stride()))
        return args[0]
    if func.is_view and type(args[0]) is Placeholder:
        result = _view(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    return run(func, args, kwargs)


_composite: dict[Any, bool] = {}


def _is_composite(func: Any) -> bool:
    """Whether torch defines an operator by others; calls from below autograd arrive here undecomposed."""
    known = _composite.get(func)
    if known is None:
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        known = _composite[func] = func.namespace == "aten" and func.has_kernel_for_dispatch_key(key)
    return known


# --- new placeholders ---------------------------------------------------------------------------------------------------


def create(
    block: Block,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    write: Write | None,
    region: Region | None = None,
) -> torch.Tensor:
    """A new tensor that one write fills, or nothing has filled; a region gives it other strides than row-major ones."""
    if 0 in shape:
        strides = contiguous_strides(shape) if region is None else region.strides
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    if region is None:
        return stand_for(Record(block, shape, dtype, device, () if write is None else (write,)))
    recipe = () if write is None else (write._replace(region=region),)
    return stand_for(Record(block, (numel(shape),), dtype, device, recipe), region)


def wrap(block: Block, values: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor whose values torch has just computed on the host; in fp32, if it is in half precision."""
    if values.layout != torch.strided or values.is_quantized or values.is_conj() or values.is_neg():
        # Rounded where it is: such a tensor has no master values.
        return values.to(dtype).to(device)
    if device.type == "cpu" and dtype not in HALVES and block.default_dtype == torch.float32:
        return values.to(dtype)
    if values.numel() == 0:
        return values.to(device=device, dtype=dtype)
    if dtype not in HALVES:
        values = values.to(dtype)
    values = values.detach()
    sizes, strides = tuple(values.shape), values.stride()
    record = Record(block, sizes, dtype, device)
    region = None
    if not is_in_order(record, Region(0, sizes, strides)):
        if is_whole(record, Region(0, sizes, strides)):
            record.shape, region = (numel(sizes),), Region(0, sizes, strides)
            values = values.as_strided(record.shape, (1,))
        else:
            values = values.contiguous()
    if values.untyped_storage().nbytes() != values.numel() * values.element_size() or values.storage_offset():
        values = values.clone()
    if record.needs_master:
        record.values = values
        block.touch(record)
    else:
        record.memory = values
    return stand_for(record, region)


# --- anything else ------------------------------------------------------------------------------------------------------


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let torch run an operator on the values of placeholders."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    placeholders = [each for each in tensors if type(each) is Placeholder]
    block = placeholders[0]._record.block
    if block.defers:
        waiting = record_call(func, args, kwargs, tensors)
        if waiting is not NotImplemented:
            return waiting
    if kwargs.get("generator") is not None and has_master(args[0]) and func._schema.is_mutable:
        return _run_in_its_dtype(func, args, kwargs)
    values: dict[int, torch.Tensor] = {}
    if not _is_in_use(func, tensors, kwargs):
        for each in placeholders:
            computed = each._record.compute()
            if each._record.memory is not None and each._record.needs_master:
                break  # too large for master values
            values[id(each)] = view_of(computed, each._region)
        else:
            return _run_on_masters(func, args, kwargs, block, placeholders, tensors, values)
    values = {id(each): view_of(each._record.materialize(), each._region) for each in placeholders}
    results = _call(func, args, kwargs, values)
    return _own(func, args, kwargs, results, values)


def _run_in_its_dtype(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A draw from a generator of the caller's: torch's own numbers, which depend on the dtype."""
    tensor = args[0]
    master = view_of(tensor._record.compute(), tensor._region)
    drawn = master.to(tensor.dtype)
    func(drawn, *args[1:], **kwargs)
    if drawn is not master:
        master.copy_(drawn)
    return tensor


def _is_in_use(func: Any, tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether an operator has to see final memory.

    Operators of others must get the dtypes that they were promised, and a caller's generator is torch's business. What
    involves data of others in half precision or on a GPU, or tensors that autograd records, is no initialisation but a
    training step, say.
    """
    if func.namespace != "aten" or kwargs.get("generator") is not None or func in _TAKES_MEMORY:
        return True
    records_graph = torch.is_grad_enabled()
    for tensor in tensors:
        if records_graph and tensor.requires_grad and not has_master(tensor):
            return True
        if type(tensor) is Placeholder:
            if tensor._record.memory is not None and tensor._record.needs_master:
                return True
        elif tensor.dim() and (tensor.dtype in HALVES or tensor.device.type not in ("cpu", "meta")):
            return True
    return False


_TAKES_MEMORY = {
    *(getattr(aten.set_, overload) for overload in aten.set_.overloads()),
    *(aten.resize_.default, aten.resize_as_.default, aten.view.dtype),
}


def _run_on_masters(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    block: Block,
    placeholders: list[Placeholder],
    tensors: list[torch.Tensor],
    values: dict[int, torch.Tensor],
) -> Any:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":
        return func(*tree_map_only(Placeholder, _on_meta, args), **tree_map_only(Placeholder, _on_meta, kwargs))
    given = dict(kwargs)
    if device is not None:
        given["device"] = _HOST
    if kwargs.get("dtype") in HALVES:
        given["dtype"] = torch.float32
    if torch.Tag.nondeterministic_seeded in func.tags:
        block.generator.resume()
    for each in tensors:
        if type(each) is not Placeholder and each.dtype in HALVES:  # a number that torch has made a tensor
            values[id(each)] = each.float()
    results = _call(func, args, given, values)
    if func._schema.is_mutable:
        return _own(func, args, kwargs, results, values)
    if not any(isinstance(each, torch.Tensor) for each in tree_flatten(results)[0]):
        return results
    if device is None:
        device = next((each.device for each in placeholders if each.device.type != "cpu"), _HOST)
    else:
        device = concrete(device)
    dtypes = iter(result_dtypes(func, args, kwargs, results, block.default_dtype))
    storages = {value.untyped_storage()._cdata: each for each, value in _with_values(placeholders, values)}

    def finish(result: torch.Tensor) -> torch.Tensor:
        dtype = next(dtypes)
        if result.layout == torch.strided and result.dtype == values_dtype(dtype):
            of = storages.get(result.untyped_storage()._cdata)
            if of is not None:
                region = Region(result.storage_offset(), tuple(result.shape), result.stride())
                return stand_for(of._record, region)
        return wrap(block, result, dtype, device)

    return tree_map_only(torch.Tensor, finish, results)


def values_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of a dtype are computed."""
    return torch.float32 if dtype in HALVES else dtype


def _with_values(
    placeholders: Iterable[Placeholder], values: dict[int, torch.Tensor]
) -> Iterable[tuple[Placeholder, torch.Tensor]]:
    return ((each, values[id(each)]) for each in placeholders)


def _on_meta(tensor: Placeholder) -> torch.Tensor:
    meta = torch.empty(tensor._record.shape, dtype=tensor.dtype, device="meta")
    return view_of(meta, tensor._region)


def _call(func: Any, args: Any, kwargs: Any, values: dict[int, torch.Tensor]) -> Any:
    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        return values.get(id(tensor), tensor)

    args, kwargs = tree_map_only(torch.Tensor, replaced, (args, kwargs))
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return func(*args, **kwargs)
    return func(*args, **kwargs)


def _own(func: Any, args: Any, kwargs: Any, results: Any, values: dict[int, torch.Tensor]) -> Any:
    """The results of an operator that ran on substitutes: where it returns what it was given, the caller's own object."""
    if not func._schema.is_mutable:
        return results
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if argument.name in kwargs:
                written.append(kwargs[argument.name])
            elif position < len(args):
                written.append(args[position])
    for each in written:
        if type(each) is Placeholder:
            _follow(func, each, values[id(each)])
    if isinstance(results, torch.Tensor):
        return written[0] if len(written) == 1 or results is not None else results
    if isinstance(results, tuple) and len(results) == len(written):
        return tuple(written)
    return results


def _follow(func: Any, tensor: Placeholder, value: torch.Tensor) -> None:
    """What an operator did to the shape of a tensor, done to its placeholder."""
    if tuple(value.shape) == tuple(tensor.shape) and value.stride() == tensor.stride():
        return
    region = Region(value.storage_offset(), tuple(value.shape), value.stride())
    record = tensor._record
    if value.untyped_storage().nbytes() != numel(record.shape) * value.element_size():
        # An out= argument that was resized: what it has now is all of it.
        record.shape = tuple(value.shape)
        if record.values is not None:
            record.values = value.detach()
        else:
            record.memory = value.detach()
    _retarget(tensor, region)


def _retarget(tensor: Placeholder, region: Region) -> None:
    """Let a placeholder stand for another region of its record."""
    with torch.no_grad(), modes_off():
        torch.Tensor.data.__set__(tensor, stand_for(tensor._record, region))  # type: ignore[attr-defined]
    tensor._region = region


# --- views --------------------------------------------------------------------------------------------------------------


def _view(func: Any, tensor: Placeholder, *args: Any, **kwargs: Any) -> Any:
    record = tensor._record
    if func in _SAME:
        return stand_for(record, tensor._region)
    geometry = func(_on_meta(tensor), *args, **kwargs)
    results = [geometry] if isinstance(geometry, torch.Tensor) else list(geometry)
    if any(each.dtype != record.dtype or each.is_conj() or each.is_neg() for each in results):
        # Memory under another dtype: the views of the tensor itself.
        return func(view_of(record.materialize(), tensor._region), *args, **kwargs)
    views = [
        stand_for(record, Region(each.storage_offset(), tuple(each.shape), each.stride()))
        if each.numel()
        else torch.empty_strided(each.shape, each.stride(), dtype=record.dtype, device=record.device)
        for each in results
    ]
    return views[0] if isinstance(geometry, torch.Tensor) else type(geometry)(views)


_SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}


# --- fills --------------------------------------------------------------------------------------------------------------


def _records(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for func in funcs:
            RECORDED[func] = handler
        return handler

    return register


def fill(tensor: Placeholder, kind: int, parameters: tuple[float, ...]) -> Any:
    """Record a fill; NotImplemented if it is torch's."""
    record, region = tensor._record, tensor._region
    whole = is_whole(record, region)
    if not record.is_native and (record.memory is not None or not whole or not records(record.dtype, kind, parameters)):
        return NotImplemented
    stream, key = (0, None) if kind == CONSTANT else record.block.generator.next_stream()
    if region is not None and any(s == 0 and n > 1 for n, s in zip(region.sizes, region.strides, strict=True)):
        return NotImplemented  # elements share memory: torch's to refuse
    if whole:
        in_order = is_in_order(record, region)
        record.overwrite((Write(kind, parameters, stream, (), None if in_order else region, key),))
    else:
        record.append(Write(kind, parameters, stream, (), region, key))
    return tensor


def records(dtype: torch.dtype, kind: int, parameters: tuple[float, ...]) -> bool:
    """Whether a fill that native code does not reach may be recorded all the same, for torch to carry out."""
    value = parameters[0]
    if dtype.is_floating_point:
        return kind == CONSTANT or (dtype == torch.float64 and kind in (UNIFORM, NORMAL))
    return kind == CONSTANT and dtype in WHOLE and float(value).is_integer() and abs(value) < 2**53


def _is_number(*values: Any) -> bool:
    return all(type(value) in (int, float, bool) for value in values)


@_records(aten.uniform_.default)
def _uniform(func: Any, tensor: Any, low: Any = 0.0, high: Any = 1.0, *, generator: Any = None) -> Any:
    if type(tensor) is not Placeholder or generator is not None or not 0.0 <= high - low < math.inf:
        return NotImplemented
    return fill(tensor, UNIFORM, (float(low), float(high)))


@_records(aten.normal_.default)
def _normal(func: Any, tensor: Any, mean: Any = 0.0, std: Any = 1.0, *, generator: Any = None) -> Any:
    if type(tensor) is not Placeholder or generator is not None or not 0.0 <= std < math.inf:
        return NotImplemented
    return fill(tensor, NORMAL, (float(mean), float(std))) if math.isfinite(mean) else NotImplemented


@_records(aten.fill_.Scalar, aten.fill_.Tensor)
def _fill(func: Any, tensor: Any, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dim() or value.is_complex() or value.is_meta or (torch.is_grad_enabled() and value.requires_grad):
            return NotImplemented
        value = value.item()
    if type(tensor) is not Placeholder or not _is_number(value):
        return NotImplemented
    return fill(tensor, CONSTANT, (float(value),))


@_records(aten.zero_.default)
def _zero(func: Any, tensor: Any) -> Any:
    return fill(tensor, CONSTANT, (0.0,))


# --- steps --------------------------------------------------------------------------------------------------------------

_Steps = tuple[tuple[int, float, float], ...]


def _stepped(tensor: Placeholder, steps: _Steps | None) -> tuple[Write, ...] | None:
    """The recipe of a whole pending tensor with more steps; None if there is no such recipe."""
    record = tensor._record
    if steps is None or not record.recipe or record.dtype not in DTYPES or not is_whole(record, tensor._region):
        return None
    recipe: tuple[Write, ...] | None = record.recipe
    for op, a, b in steps:
        recipe = with_step(recipe, op, a, b) if recipe is not None else None
    return recipe


def _step(name: str, steps_of: Callable[..., _Steps | None]) -> None:
    """Record an operator and its in-place twin as steps; steps_of gets the arguments behind the tensor."""

    def out_of_place(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if type(tensor) is not Placeholder or (torch.is_grad_enabled() and tensor.requires_grad):
            return NotImplemented
        record, steps = tensor._record, steps_of(*args, **kwargs)
        recipe = _stepped(tensor, steps) if is_in_order(record, tensor._region) else None
        if recipe is not None:
            return stand_for(Record(record.block, tuple(tensor.shape), record.dtype, record.device, recipe))
        if steps and steps[0][0] == ERFINV and _steps_natively(record):
            return _erfinv_now(stand_for(record.forked(), tensor._region))
        return NotImplemented

    def in_place(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if type(tensor) is not Placeholder:
            return NotImplemented
        record, steps = tensor._record, steps_of(*args, **kwargs)
        recipe = _stepped(tensor, steps)
        if recipe is not None:
            record.recipe = recipe
            return tensor
        if steps and steps[0][0] == ERFINV and _steps_natively(record):
            return _erfinv_now(tensor)
        return NotImplemented

    base, _, overload = name.partition(".")
    RECORDED[getattr(getattr(aten, base), overload)] = out_of_place
    RECORDED[getattr(getattr(aten, f"{base}_"), overload)] = in_place


def _steps_natively(record: Record) -> bool:
    """Whether content that began as a recipe has values in fp32, on which a step gives what the recipe would have."""
    return record.recorded and record.dtype in DTYPES and (record.memory is None or not record.needs_master)


def _erfinv_now(tensor: Placeholder) -> Any:
    """The step of a recipe on values that exist already: the native function, so that it gives the same bits."""
    values = view_of(tensor._record.compute(), tensor._region)
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return NotImplemented
    dense = values.contiguous()
    native.erfinv(dense.data_ptr(), dense.numel())
    if dense is not values:
        values.copy_(dense)
    return tensor


def _scalar(op: int) -> Callable[..., _Steps | None]:
    def steps(value: Any, **kwargs: Any) -> _Steps | None:
        return ((op, float(value), 0.0),) if not kwargs and _is_finite(value) else None

    return steps


def _is_finite(*values: Any) -> bool:
    return _is_number(*values) and all(math.isfinite(value) for value in values)


def _sum(sign: float) -> Callable[..., _Steps | None]:
    def steps(value: Any, alpha: Any = 1, **kwargs: Any) -> _Steps | None:
        return ((ADD, sign * value, 0.0),) if alpha == 1 and not kwargs and _is_finite(value) else None

    return steps


def _reversed_subtract(value: Any, alpha: Any = 1) -> _Steps | None:
    return ((MULTIPLY, -1.0, 0.0), (ADD, float(value), 0.0)) if alpha == 1 and _is_finite(value) else None


def _clamp(low: Any = None, high: Any = None, **kwargs: Any) -> _Steps | None:
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    given = [value for value in (low, high) if value is not None]
    if not given or not _is_number(*given) or any(value != value for value in given):
        return None
    return ((CLAMP, -math.inf if low is None else float(low), math.inf if high is None else float(high)),)


_step("mul.Tensor", _scalar(MULTIPLY))
_step("div.Tensor", _scalar(DIVIDE))
_step("add.Tensor", _sum(1.0))
_step("sub.Tensor", _sum(-1.0))
_step("neg.default", lambda: ((MULTIPLY, -1.0, 0.0),))
_step("clamp.default", _clamp)
_step("clamp_min.default", lambda low: _clamp(low=low))
_step("clamp_max.default", lambda high: _clamp(high=high))
_step("erfinv.default", lambda: ((ERFINV, 0.0, 0.0),))


@_records(aten.rsub.Scalar)
def _rsub(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    if type(tensor) is not Placeholder or (torch.is_grad_enabled() and tensor.requires_grad):
        return NotImplemented
    record = tensor._record
    recipe = _stepped(tensor, _reversed_subtract(*args, **kwargs)) if is_in_order(record, tensor._region) else None
    if recipe is None:
        return NotImplemented
    return stand_for(Record(record.block, tuple(tensor.shape), record.dtype, record.device, recipe))


# --- copies and conversions ---------------------------------------------------------------------------------------------


def _is_pending(tensor: Any) -> bool:
    """Whether the whole of a tensor, in its order, is a recipe with native fills."""
    if type(tensor) is not Placeholder:
        return False
    record = tensor._record
    return bool(record.recipe) and record.dtype in DTYPES and is_in_order(record, tensor._region)


def _has_recipe_for(source: Placeholder, record: Record) -> bool:
    """Whether a tensor's recipe gives another one of its size the same values."""
    origin = source._record
    if not origin.recipe or origin.block is not record.block or not is_in_order(origin, source._region):
        return False
    return origin.dtype == record.dtype or (origin.dtype == torch.float32 and record.dtype in DTYPES)


@_records(aten.copy_.default)
def _copy(func: Any, tensor: Any, source: Any, non_blocking: bool = False) -> Any:
    if type(tensor) is not Placeholder or not is_whole(tensor._record, tensor._region):
        return NotImplemented
    record = tensor._record
    if torch.is_grad_enabled() and (source.requires_grad or tensor.requires_grad):
        return NotImplemented
    computed = source.is_cpu and source.dtype not in DTYPES and not source.dtype.is_complex
    if type(source) is Placeholder:
        origin = source._record
        if origin is record:
            return tensor if source._region == tensor._region else NotImplemented
        if record.memory is None and _has_recipe_for(source, record) and source.shape == tensor.shape:
            if is_in_order(record, tensor._region):
                record.overwrite(origin.recipe or ())
                return tensor
        if record.block.defers:
            waiting = record_call(func, (tensor, source), {}, [tensor, source])
            if waiting is not NotImplemented:
                return waiting
        values = origin.compute()
        if has_master(source) != origin.needs_master:
            return NotImplemented  # too large for master values
        source, computed = view_of(values, source._region), True
    if record.memory is not None:
        return NotImplemented
    if record.needs_master and computed and numel(record.shape) * 4 <= LARGEST_MASTER:
        # Computed by the constructor, from positions in int64 say: not data of any size.
        values = allocate(record.shape, values_dtype(record.dtype), _HOST)
        view_of(values, tensor._region).copy_(source)
        record.overwrite(())
        record.values, record.recipe, record.recorded = values, None, False
        return tensor
    if source.is_meta or type(source).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return NotImplemented
    # Data from outside, a checkpoint say: converted while they are copied. What is pending is dropped after that, so
    # that a copy which torch refuses leaves it as it was.
    record.block.reserve_for_all(record.device)
    memory = allocate(record.shape, record.dtype, record.device, name_of=lambda: record.block.name_of(record))
    view_of(memory, tensor._region).copy_(source, non_blocking)
    record.overwrite(())
    record.become_resident(memory)
    return tensor


@_records(aten.clone.default)
def _clone(func: Any, tensor: Any, *, memory_format: Any = None) -> Any:
    if not _is_pending(tensor) or memory_format not in (None, torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    if torch.is_grad_enabled() and tensor.requires_grad:
        return NotImplemented
    record = tensor._record
    return stand_for(Record(record.block, tuple(tensor.shape), record.dtype, record.device, record.recipe))


@_records(aten._to_copy.default)
def _to_copy(func: Any, tensor: Any, **options: Any) -> Any:
    if not _is_pending(tensor) or (torch.is_grad_enabled() and tensor.requires_grad):
        return NotImplemented
    if options.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    record = tensor._record
    dtype, device = options.get("dtype") or record.dtype, concrete(options.get("device") or record.device)
    if not can_fill(dtype, device) or options.get("pin_memory"):
        return NotImplemented
    return stand_for(Record(record.block, tuple(tensor.shape), dtype, device, record.recipe))


# --- tensors like others ------------------------------------------------------------------------------------------------

# What factories that take dtype and device from a tensor fill theirs with; None: nothing, or what they are given.
_LIKE: dict[Any, float | None] = {
    aten.empty_like.default: None,
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.full_like.default: None,
    aten.new_empty.default: None,
    aten.new_empty_strided.default: None,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
    aten.new_full.default: None,
}
_TAKES_SHAPE = {each for each in _LIKE if "new" in each.name()}
_IS_FULL = {aten.full_like.default, aten.new_full.default}


@_records(*_LIKE)
def like(func: Any, other: torch.Tensor, *args: Any, **options: Any) -> Any:
    """A tensor of another one's dtype and device, and of its shape or a given one; NotImplemented if it is torch's."""
    constant = _LIKE[func]
    if func in _IS_FULL:
        constant = options.pop("fill_value") if "fill_value" in options else args[-1]
        args = args[: 1 if func in _TAKES_SHAPE else 0]
        if type(constant) not in (int, float):
            return NotImplemented
    write = None if constant is None else Write(CONSTANT, (float(constant),))
    return _like(func, other, args, options, write)


@_records(aten.rand_like.default, aten.randn_like.default)
def _random_like(func: Any, other: torch.Tensor, *, generator: Any = None, **options: Any) -> Any:
    kind = UNIFORM if func is aten.rand_like.default else NORMAL
    dtype = options.get("dtype") or other.dtype
    if generator is not None or not (dtype in DTYPES or records(dtype, kind, (0.0, 1.0))):
        return NotImplemented
    tensor = _like(aten.empty_like.default, other, (), options, None)
    return fill(tensor, kind, (0.0, 1.0)) if type(tensor) is Placeholder else tensor


def _like(func: Any, other: torch.Tensor, args: Any, options: dict[str, Any], write: Write | None) -> Any:
    block = other._record.block if type(other) is Placeholder else current.get()
    dtype, device = options.get("dtype") or other.dtype, concrete(options.get("device") or other.device)
    if block is None or device.type == "meta" or options.get("pin_memory"):
        return NotImplemented
    if other.layout != torch.strided or options.get("layout") not in (None, torch.strided):
        return NotImplemented
    if write is not None and dtype not in DTYPES and not records(dtype, write.kind, write.parameters):
        return NotImplemented
    if func in _TAKES_SHAPE:
        geometry = (aten.new_empty_strided if func is aten.new_empty_strided.default else aten.new_empty).default
        meta = geometry(torch.empty(0, device="meta"), *args)
    elif type(other) is Placeholder and other._region is None and options.get("memory_format") is None:
        return create(block, other._record.shape, dtype, device, write)
    else:
        like = _on_meta(other) if type(other) is Placeholder else other
        meta = torch.empty_like(like, device="meta", memory_format=options.get("memory_format") or torch.preserve_format)
    sizes, strides = tuple(meta.shape), meta.stride()
    if strides == contiguous_strides(sizes):
        return create(block, sizes, dtype, device, write)
    region = Region(0, sizes, strides)
    return create(block, sizes, dtype, device, write, region) if is_dense(region) else NotImplemented


Placeholder.dispatch = staticmethod(dispatch)

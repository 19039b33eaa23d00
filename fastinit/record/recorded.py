"""The operators that are recorded: fills, steps with numbers, copies of what is pending, tensors like others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .. import native
from ..execution import DTYPES, allocate, can_fill, concrete
from ..layout import contiguous_strides, numel
from ..native import ADD, CLAMP, CONSTANT, DIVIDE, ERFINV, MULTIPLY, NORMAL, UNIFORM
from ..recipe import COMPUTED, COPIED, Region, Write, with_step
from .block import Block, current
from .calls import record_call
from .dispatch import RECORDED, create, on_meta
from .precision import WHOLE, values_dtype
from .records import LARGEST_MASTER, Record, is_in_order, is_whole, view_of
from .tensors import Placeholder, has_master, stand_for

aten = torch.ops.aten

_HOST = torch.device("cpu")


# --- fills ----------------------------------------------------------------------------------------------------------


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
    if not record.is_fillable:
        if record.memory is not None or not whole or not records(record.dtype, kind, parameters):
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
    if kind != CONSTANT or dtype not in WHOLE or not float(value).is_integer() or abs(value) >= 2**53:
        return False
    return dtype == torch.bool or torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _is_beyond(dtype: torch.dtype, *values: float) -> bool:
    """Whether a floating-point dtype does not hold one of these finite numbers."""
    return dtype.is_floating_point and any(torch.finfo(dtype).max < abs(value) < math.inf for value in values)


def _refuse_beyond(dtype: torch.dtype, elements: int, value: float) -> None:
    """Raise what torch raises for a constant that a dtype does not hold: of one element it makes an infinite one."""
    if _is_beyond(dtype, value):
        torch.empty(min(elements, 2), dtype=dtype, device=_HOST).fill_(value)


def _is_worth_recording(dtype: torch.dtype, device: torch.device, kind: int, parameters: tuple[float, ...]) -> bool:
    """Whether a factory's fill may be recorded, and a placeholder gains anything: not for whole numbers on the host."""
    if dtype in DTYPES:
        return True
    return records(dtype, kind, parameters) and (dtype.is_floating_point or device.type != "cpu")


def _is_number(*values: Any) -> bool:
    return all(type(value) in (int, float, bool) for value in values)


@_records(aten.uniform_.default)
def _uniform(func: Any, tensor: Any, low: Any = 0.0, high: Any = 1.0, *, generator: Any = None) -> Any:
    if type(tensor) is not Placeholder or generator is not None or not 0.0 <= high - low < math.inf:
        return NotImplemented
    if _is_beyond(tensor.dtype, low, high, high - low):
        torch.empty(0, dtype=tensor.dtype, device=_HOST).uniform_(low, high)  # torch's refusal
    return fill(tensor, UNIFORM, (float(low), float(high)))


@_records(aten.normal_.default)
def _normal(func: Any, tensor: Any, mean: Any = 0.0, std: Any = 1.0, *, generator: Any = None) -> Any:
    if type(tensor) is not Placeholder or generator is not None or not 0.0 <= std < math.inf:
        return NotImplemented
    return fill(tensor, NORMAL, (float(mean), float(std))) if math.isfinite(mean) else NotImplemented


@_records(aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default)
def _fill(func: Any, tensor: Any, value: Any = 0.0) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dim() or value.is_complex() or value.is_meta or (torch.is_grad_enabled() and value.requires_grad):
            return NotImplemented
        value = value.item()
    if type(tensor) is not Placeholder or not _is_number(value):
        return NotImplemented
    if func is aten.fill_.Scalar:
        _refuse_beyond(tensor.dtype, tensor.numel(), value)
    return fill(tensor, CONSTANT, (float(value),))


# --- steps ----------------------------------------------------------------------------------------------------------

_Steps = tuple[tuple[int, float, float], ...]


def _stepped(tensor: Placeholder, steps: _Steps | None) -> tuple[Write, ...] | None:
    """The recipe of a whole pending tensor with more steps; None if there is no such recipe."""
    record = tensor._record
    if steps is None or not record.recipe or not record.is_fillable or not is_whole(record, tensor._region):
        return None
    recipe: tuple[Write, ...] | None = record.recipe
    for op, a, b in steps:
        recipe = with_step(recipe, op, a, b) if recipe is not None else None
    return recipe


def _step(name: str, steps_of: Callable[..., _Steps | None]) -> None:
    """Record an operator, and its in-place twin if it has one, as steps; steps_of gets what is behind the tensor."""

    def recorder(in_place: bool) -> Callable[..., Any]:
        def step(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if type(tensor) is not Placeholder or (not in_place and torch.is_grad_enabled() and tensor.requires_grad):
                return NotImplemented
            record, steps = tensor._record, steps_of(*args, **kwargs)
            recipe = _stepped(tensor, steps) if in_place or is_in_order(record, tensor._region) else None
            if recipe is not None:
                if not in_place:
                    return stand_for(Record(record.block, tuple(tensor.shape), record.dtype, record.device, recipe))
                record.recipe = recipe
                return tensor
            if steps and steps[0][0] == ERFINV and _steps_natively(record):
                return _erfinv_now(tensor if in_place else stand_for(record.forked(), tensor._region))
            return NotImplemented

        return step

    base, _, overload = name.partition(".")
    RECORDED[getattr(getattr(aten, base), overload)] = recorder(False)
    if hasattr(aten, f"{base}_"):
        RECORDED[getattr(getattr(aten, f"{base}_"), overload)] = recorder(True)


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
    tensor._record.did(COMPUTED)
    return tensor


def _is_finite(*values: Any) -> bool:
    return _is_number(*values) and all(math.isfinite(value) for value in values)


def _scalar(op: int, sign: float = 1.0) -> Callable[..., _Steps | None]:
    def steps(value: Any, alpha: Any = 1, **kwargs: Any) -> _Steps | None:
        return ((op, sign * value, 0.0),) if alpha == 1 and not kwargs and _is_finite(value) else None

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
_step("add.Tensor", _scalar(ADD))
_step("sub.Tensor", _scalar(ADD, -1.0))
_step("rsub.Scalar", _reversed_subtract)
_step("neg.default", lambda: ((MULTIPLY, -1.0, 0.0),))
_step("clamp.default", _clamp)
_step("clamp_min.default", _clamp)
_step("clamp_max.default", lambda high: _clamp(high=high))
_step("erfinv.default", lambda: ((ERFINV, 0.0, 0.0),))


# --- copies and conversions -----------------------------------------------------------------------------------------


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
        record.did(COMPUTED)
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
    record.did(COPIED)
    return tensor


@_records(aten._to_copy.default, aten.clone.default)
def _copied(func: Any, tensor: Any, **options: Any) -> Any:
    if type(tensor) is not Placeholder or (torch.is_grad_enabled() and tensor.requires_grad):
        return NotImplemented
    record = tensor._record
    if not record.recipe or not record.is_fillable or not is_in_order(record, tensor._region):
        return NotImplemented
    if options.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    dtype, device = options.get("dtype") or record.dtype, concrete(options.get("device") or record.device)
    if not can_fill(dtype, device) or options.get("pin_memory"):
        return NotImplemented
    if torch.float64 in (dtype, record.dtype) and dtype != record.dtype:
        return NotImplemented  # what torch draws in fp64 are other numbers
    return stand_for(Record(record.block, tuple(tensor.shape), dtype, device, record.recipe))


# --- new tensors ----------------------------------------------------------------------------------------------------

Fill = tuple[int, tuple[float, ...]]


def filled(
    block: Block,
    sizes: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill | None,
    options: dict[str, Any],
) -> Any:
    """A new tensor that one fill covers; NotImplemented if it is torch's to make.

    Args:
        sizes, strides: its geometry; no strides mean row-major ones.
        fill: the kind and the parameters; None: nobody has written it yet.
        options: what the call says about layout and pinned memory.
    """
    if device.type == "meta" or options.get("pin_memory") or options.get("layout") not in (None, torch.strided):
        return NotImplemented
    region = None if strides in (None, contiguous_strides(sizes)) else Region(0, sizes, strides or ())
    if region is not None and region.end * dtype.itemsize >= 2**63:
        return NotImplemented  # torch's to refuse
    if fill is None and fills_what_is_empty(block):
        if not dtype.is_floating_point or region is not None:
            return NotImplemented
        fill = CONSTANT, (math.nan,)
    write = None
    if fill is not None:
        kind, parameters = fill
        if kind == CONSTANT:
            _refuse_beyond(dtype, numel(sizes), *parameters)
        if not _is_worth_recording(dtype, device, kind, parameters):
            return NotImplemented
        stream, key = (0, None) if kind == CONSTANT else block.generator.next_stream()
        write = Write(kind, parameters, stream, key=key)
    return create(block, sizes, dtype, device, write, region)


def fills_what_is_empty(block: Block) -> bool:
    """Whether torch is to fill what nobody initializes, floating-point numbers with NaN, so that nothing hangs on it.

    What is to stay unwritten after the block does so.
    """
    asked = torch.are_deterministic_algorithms_enabled() and torch._C._get_deterministic_fill_uninitialized_memory()
    return asked and not block.defers


# What fills the results of factories, by their names; that of `full` is what they are given last.
FILLS: dict[str, Fill | None] = {
    "empty": None,
    "full": None,
    "zeros": (CONSTANT, (0.0,)),
    "ones": (CONSTANT, (1.0,)),
    "rand": (UNIFORM, (0.0, 1.0)),
    "randn": (NORMAL, (0.0, 1.0)),
}

# Those that take dtype and device from a tensor, and those that do not take its shape.
LIKE = {f"{name}_like": fill for name, fill in FILLS.items()}
NEW = {f"new_{name}": FILLS[name] for name in ("empty", "full", "zeros", "ones")}
_LIKE = {getattr(aten, name).default: fill for name, fill in {**LIKE, **NEW, "new_empty_strided": None}.items()}
_TAKES_SHAPE = {each for each in _LIKE if "new" in each.name()}
_IS_FULL = {aten.full_like.default, aten.new_full.default}


@_records(*_LIKE)
def _like(func: Any, other: torch.Tensor, *args: Any, generator: Any = None, **options: Any) -> Any:
    """A tensor of another one's dtype and device, and of its shape or a given one; NotImplemented if it is torch's."""
    fill = _LIKE[func]
    if func in _IS_FULL:
        constant = options.pop("fill_value") if "fill_value" in options else args[-1]
        args = args[: 1 if func in _TAKES_SHAPE else 0]
        if type(constant) not in (int, float):
            return NotImplemented
        fill = CONSTANT, (float(constant),)
    block = other._record.block if type(other) is Placeholder else current.get()
    dtype, device = options.get("dtype") or other.dtype, concrete(options.get("device") or other.device)
    if block is None or generator is not None or other.layout != torch.strided or other.is_nested or other.is_quantized:
        return NotImplemented
    if func in _TAKES_SHAPE:
        geometry = (aten.new_empty_strided if func is aten.new_empty_strided.default else aten.new_empty).default
        meta = geometry(torch.empty(0, device="meta"), *args)
    elif type(other) is Placeholder and other._region is None and options.get("memory_format") is None:
        return filled(block, other._record.shape, None, dtype, device, fill, options)
    else:
        memory_format = options.get("memory_format") or torch.preserve_format
        meta = torch.empty_like(on_meta(other), device="meta", memory_format=memory_format)
    return filled(block, tuple(meta.shape), meta.stride(), dtype, device, fill, options)

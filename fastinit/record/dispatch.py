"""What torch's operators do to placeholders.

`dispatch` decides it for every operator that reaches torch's dispatcher:

- a fill or a step on something pending lets its recipe grow (`RECORDED`);
- a view is a placeholder of a region of the same record;
- for anything else torch runs, on the operands' values: on the host, in fp32 for half precision, as the constructor of
  an fp32 model would; or on the final memory where that is in use already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..compiler import never_compiled
from ..execution import concrete
from ..layout import contiguous_strides, numel
from ..recipe import COMPUTED, Region, Write
from .block import Block
from .calls import evaluate, is_elementwise, record_call
from .nested import map_tensors, tensors_in
from .precision import SINGLE, WHOLE, in_doubles, result_dtypes, values_dtype
from .records import HALVES, Record, is_in_order, modes_off, view_of
from .tensors import Placeholder, alias_of, become_real, change_geometry, has_master, region_of, stand_for, views_of

aten = torch.ops.aten

_HOST = torch.device("cpu")

RECORDED: dict[Any, Callable[..., Any]] = {}


class _Operator(NamedTuple):
    """What is the same at each call of an operator; torch takes its time to tell.

    Attributes:
        recorded: what records it, or None.
        is_composite: torch defines it by others; calls from below autograd arrive here undecomposed.
        is_view: as its schema has it.
        is_random: it draws from a generator.
        changes_geometry: it gives its first operand other sizes or strides of the same memory.
        wants_memory: it is not torch's, or is about memory itself.
        writes: positions and names of the arguments that it writes to.
        returns_them: it returns these, or nothing, and no new tensor beside them.
        counts_writes: torch counts them as versions before it gets here.
    """

    recorded: Callable[..., Any] | None
    is_composite: bool
    is_view: bool
    is_random: bool
    changes_geometry: bool
    wants_memory: bool
    writes: tuple[tuple[int, str], ...]
    returns_them: bool
    counts_writes: bool


@functools.cache
def operator_of(func: Any) -> _Operator:
    """What there is to know of an operator."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    takes_memory = func in _TAKES_MEMORY
    return _Operator(
        recorded=RECORDED.get(func),
        is_composite=func.namespace == "aten" and func.has_kernel_for_dispatch_key(composite),
        is_view=func.is_view,
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        changes_geometry=torch.Tag.inplace_view in func.tags and not takes_memory,
        wants_memory=func.namespace not in ("aten", "prims") or takes_memory,
        writes=tuple((i, each.name) for i, each in enumerate(func._schema.arguments) if _is_written(each)),
        returns_them=all(map(_is_written, func._schema.returns)),
        counts_writes=func.has_kernel_for_dispatch_key(torch._C.DispatchKey.ADInplaceOrView),
    )


def _is_written(value: Any) -> bool:
    """Whether a schema says of an argument, or of a result, that it is written in place."""
    return value.alias_info is not None and value.alias_info.is_write


@never_compiled  # also where a compiled function is called in the block: its frames reach dispatch one by one
def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operator, one of whose operands is a placeholder."""
    if torch._C._len_torch_dispatch_stack():
        # A mode that traces or fakes has left the call to its operands' classes, of which it knows ours no more than
        # another one: it would see what is done for a placeholder here, and give its own tensors for values.
        for each in tensors_in((args, kwargs)):
            become_real(each)
        return func(*args, **kwargs)
    operator = operator_of(func)
    if operator.recorded is not None:
        result = operator.recorded(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    if operator.is_composite:
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if operator.changes_geometry and type(args[0]) is Placeholder:
        return change_geometry(args[0], func, *args[1:], **kwargs)
    if operator.is_view and type(args[0]) is Placeholder:
        return take_view(func, *args, **kwargs)
    return run(func, args, kwargs)


# --- new placeholders -----------------------------------------------------------------------------------------------


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
    return stand_for(Record(block, (region.end,), dtype, device, recipe), region)


def wrap(
    block: Block, values: torch.Tensor, dtype: torch.dtype, device: torch.device, followed: bool = False
) -> torch.Tensor:
    """A tensor whose values torch has just computed on the host; in fp32, if it is in half precision.

    Values that need no other memory are given as they are, unless what is computed of them is to be `followed`.
    """
    if values.layout != torch.strided or values.is_nested or values.is_quantized or values.is_conj() or values.is_neg():
        # Rounded where it is: such a tensor has no master values.
        return values.to(dtype).to(device)
    if torch._C._functorch.is_functorch_wrapped_tensor(values) or torch._is_functional_tensor(values):
        # A transform's own.
        return values.to(dtype).to(device)
    if device.type == "cpu" and dtype not in HALVES and not followed:
        return values.to(dtype)
    if values.numel() == 0:
        return values.to(device=device, dtype=dtype)
    if dtype not in HALVES:
        values = values.to(dtype)
    values = values.detach()
    sizes, strides = tuple(values.shape), values.stride()
    record = Record(block, sizes, dtype, device)
    region = None
    if strides != contiguous_strides(sizes):
        region = Region(0, sizes, strides)
        if not is_in_order(record, region):
            record.shape = (region.end,)
        values = values.as_strided(record.shape, contiguous_strides(record.shape))
    if values.untyped_storage().nbytes() != values.nbytes or values.storage_offset():
        values = values.clone()
    if record.needs_master:
        record.values = values
        block.touch(record)
    else:
        record.memory = values
    return stand_for(record, region)


# --- anything else --------------------------------------------------------------------------------------------------


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let torch run an operator on the values of placeholders."""
    tensors = tensors_in((args, kwargs))
    placeholders = [each for each in tensors if type(each) is Placeholder]
    if not placeholders:  # while this thread waited for the lock, another one has made them real
        return func(*args, **kwargs)
    block = placeholders[0]._record.block
    if block.defers:
        waiting = record_call(func, args, kwargs, tensors)
        if waiting is not NotImplemented:
            return waiting
    if block.ran is not None:
        block.ran[str(func.overloadpacket)] += 1
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":  # as init_empty_weights asks: no values for that
        args, kwargs = map_tensors(on_meta, (args, kwargs))
        return func(*args, **kwargs)
    operator = operator_of(func)
    if (kwargs.get("generator") is not None or func in _DRAWS_BY_DTYPE) and has_master(args[0]) and operator.writes:
        return _run_in_its_dtype(func, args, kwargs)
    values: dict[int, torch.Tensor] = {}
    if not _is_in_use(operator, tensors, kwargs):
        for each in placeholders:
            computed = each._record.compute()
            if each._record.memory is not None and each._record.needs_master:
                break  # too large for master values
            values[id(each)] = view_of(computed, each._region)
        else:
            return _run_on_masters(func, args, kwargs, block, placeholders, tensors, values)
    written = _written(func, args, kwargs)
    shares = operator.wants_memory or func.namespace != "aten"
    for each in placeholders:
        values[id(each)] = _final(each, not shares and all(each is not other for other in written))
    results = _call(func, args, kwargs, values)
    return _own(func, results, written, values)


def _final(tensor: Placeholder, only_read: bool) -> torch.Tensor:
    """A tensor's final values; where they are only read, the master values stay what the constructor goes on with."""
    record = tensor._record
    if only_read and record.values is not None and record.device.type == "cpu":
        return view_of(record.values, tensor._region).to(record.dtype)
    return view_of(record.materialize(), tensor._region)


def _run_in_its_dtype(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A draw whose numbers depend on the dtype: from a generator of the caller's, or of that dtype's whole numbers."""
    tensor = args[0]
    if kwargs.get("generator") is None:
        tensor._record.block.generator.resume()
    master = view_of(tensor._record.compute(), tensor._region)
    drawn = master.to(tensor.dtype)
    func(drawn, *args[1:], **kwargs)
    if drawn is not master:
        master.copy_(drawn)
    return tensor


def _is_in_use(operator: _Operator, tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether an operator has to see final memory.

    Operators of others must get the dtypes that they were promised, and a caller's generator is torch's business. What
    involves data of others in half precision or on a GPU, or tensors that autograd records, is no initialization but a
    training step, say.
    """
    if operator.wants_memory or kwargs.get("generator") is not None:
        return True
    records_graph = torch.is_grad_enabled()
    for tensor in tensors:
        if records_graph and tensor.requires_grad and not has_master(tensor):
            return True
        if type(tensor) is Placeholder:
            if tensor._record.memory is not None and tensor._record.needs_master:
                return True
        elif tensor.dim() and tensor.numel() and (tensor.dtype in HALVES or tensor.device.type not in ("cpu", "meta")):
            return True
    return False


_DRAWS_BY_DTYPE = {getattr(aten.random_, overload) for overload in aten.random_.overloads()}

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
    given = dict(kwargs)
    if device is not None:
        given["device"] = _HOST
    if kwargs.get("dtype") in HALVES:
        given["dtype"] = torch.float32
    operator = operator_of(func)
    if operator.is_random:
        block.generator.resume()
    for each in tensors:
        if type(each) is not Placeholder and each.dtype in HALVES:  # a number that torch has made a tensor
            values[id(each)] = each.float()
    results = _call(func, args, given, values)
    if operator.writes:
        results = _own(func, results, _written(func, args, kwargs), values)
        if operator.returns_them:
            return results
    if block.default_dtype == torch.float64 and all(each.dtype in WHOLE for each in tensors):
        # Of integers torch makes its default dtype, which is another one in the process.
        if isinstance(results, torch.Tensor) and results.dtype in SINGLE:
            results = in_doubles(
                lambda *args, **kwargs: _call(func, args, kwargs, {}), *_on_values(args, given, values)
            )
    if not tensors_in(results):
        return results
    if device is None:
        device = next((each.device for each in placeholders if each.device.type != "cpu"), _HOST)
    else:
        device = concrete(device)
    dtypes = iter(result_dtypes(func, args, kwargs, results, block.default_dtype))
    storages = {values[id(each)].untyped_storage()._cdata: each for each in placeholders}

    def finish(result: torch.Tensor) -> torch.Tensor:
        dtype = next(dtypes)
        if result.layout == torch.strided and result.dtype == values_dtype(dtype):
            of = storages.get(result.untyped_storage()._cdata)
            if of is not None:
                return stand_for(of._record, region_of(result))
        # C++ of torch reads whole numbers, lengths say, past its dispatcher.
        return wrap(block, result, dtype, device, followed and dtype not in WHOLE)

    # What a decomposition gives goes into the next function of it, which has to run as `evaluate` lets it.
    followed = not is_elementwise(func)
    return map_tensors(finish, results)


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the meta device with a placeholder's geometry; any other tensor as it is."""
    if type(tensor) is not Placeholder:
        return tensor
    meta = torch.empty(tensor._record.shape, dtype=tensor.dtype, device="meta")
    return view_of(meta, tensor._region)


def _call(func: Any, args: Any, kwargs: Any, values: dict[int, torch.Tensor]) -> Any:
    args, kwargs = _on_values(args, kwargs, values)
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return evaluate(func, args, kwargs)
    return evaluate(func, args, kwargs)


def _on_values(args: Any, kwargs: Any, values: dict[int, torch.Tensor]) -> Any:
    return map_tensors(lambda tensor: values.get(id(tensor), tensor), (args, kwargs))


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """What a call of an operator writes to, in lists, too."""
    writes = operator_of(func).writes
    return tensors_in([kwargs[n] if n in kwargs else args[i] for i, n in writes if n in kwargs or i < len(args)])


def _own(func: Any, results: Any, written: list[Any], values: dict[int, torch.Tensor]) -> Any:
    """The results of an operator that ran on substitutes: the caller's own object where it returns that."""
    for each in written:
        if type(each) is Placeholder:
            _follow(func, each, values[id(each)])
            each._record.did(COMPUTED)
            if not operator_of(func).counts_writes:
                torch.autograd.graph.increment_version(each)
        elif id(each) in values:  # one without elements, which has some now
            each.resize_(values[id(each)].shape).copy_(values[id(each)])
    if not func._schema.returns:
        return None
    if not operator_of(func).returns_them:
        return results
    return written[0] if isinstance(results, torch.Tensor) else tuple(written)


def _follow(func: Any, tensor: Placeholder, value: torch.Tensor) -> None:
    """What an operator did to the shape of a tensor, done to its placeholder."""
    if tuple(value.shape) == tuple(tensor.shape) and value.stride() == tensor.stride():
        return
    record = tensor._record
    if value.untyped_storage().nbytes() != numel(record.shape) * value.element_size():
        # An out= argument that was resized: what it has now is all of it.
        record.shape = tuple(value.shape)
        if record.values is not None:
            record.values = value.detach()
        else:
            record.memory = value.detach()
    _retarget(tensor, region_of(value))


def _retarget(tensor: Placeholder, region: Region) -> None:
    """Let a placeholder stand for another region of its record."""
    with torch.no_grad(), modes_off():
        torch.Tensor.data.__set__(tensor, stand_for(tensor._record, region))  # type: ignore[attr-defined]
    tensor._region = region


# --- views ----------------------------------------------------------------------------------------------------------


def take_view(func: Callable[..., Any], tensor: Placeholder, *args: Any, **kwargs: Any) -> Any:
    """What a function that takes views gives."""
    if func in _SAME:
        return alias_of(tensor)
    views = views_of(tensor, func, *args, **kwargs)
    if views is None:  # memory under another dtype: views of that itself
        return func(view_of(tensor._record.materialize(), tensor._region), *args, **kwargs)
    return views


_SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}


Placeholder.dispatch = staticmethod(dispatch)

"""Values for what a block left unwritten: `uninitialized` names it, `initialize` and `materialize` write it.

Each rank allocates what it holds of each parameter (a DTensor's local shard, a window, or the whole) and fills that
from the recipe. Values depend on the element's place in the whole tensor, so ranks have nothing to tell each other but
the seed.

Private: it may change with any version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .distributed import from_rank_0, is_distributed
from .execution import Timing, allocate, concrete, refuse_capture, reserve
from .layout import Box, Slices, contiguous_strides, numel, slices_of
from .recipe import Region
from .record.block import warn_never_initialized
from .record.kept import release
from .record.records import lock, modes_off, view_of
from .record.tensors import swap_in
from .record.unwritten import (
    Key,
    Origin,
    Piece,
    Rest,
    Unwritten,
    inner,
    move,
    refuse_placeless,
    region_of,
    remake,
    rest_of,
    settle,
    write_pieces,
)
from .report import Report, adding_to
from .sharding import is_dtensor, is_on_meta, local_boxes, local_tensor


class Named(NamedTuple):
    """A parameter or buffer of a model, and the unwritten tensor that it is or holds."""

    name: str
    tensor: torch.Tensor
    unwritten: Unwritten

    @property
    def rest(self) -> Rest:
        return rest_of(self.unwritten)

    @property
    def origin(self) -> Origin:
        return self.rest.origin


def unwritten_tensors(model: nn.Module, *, recurse: bool = True) -> list[Named]:
    """Those parameters and buffers of a model that are not written, or not whole; tied ones once."""
    named: dict[int, Named] = {}
    for prefix, module in model.named_modules() if recurse else (("", model),):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                tensor = _offloaded(module, name, tensor)
            unwritten = inner(tensor)
            if unwritten is None or tensor is None:
                continue
            if rest_of(unwritten).has(region_of(unwritten)):
                settle(unwritten)
            else:
                named.setdefault(id(tensor), Named(f"{prefix}.{name}" if prefix else name, tensor, unwritten))
    return list(named.values())


def _release(model: nn.Module, *, recurse: bool = True) -> None:
    """Let tensors that have their values be torch's own."""
    for _, tensor in _tensors(model, recurse=recurse):
        release(tensor)


def _require_module(function: str, model: Any) -> None:
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"fastinit.{function}: {model.__name__} is a class; pass a model, an instance of it")
    raise TypeError(f"fastinit.{function}: it takes a torch.nn.Module, not one of {type(model).__name__}")


def _offloaded(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Where Accelerate keeps the values of a tensor that it has offloaded."""
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        values = getattr(each, "weights_map", None)
        if values is not None and name in values:
            offloaded: torch.Tensor = values[name]
            return offloaded
    return tensor


def uninitialized(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that ``fastinit.on`` left without values and that are not written since.

    Whoever writes a tensor whole makes it initialized: ``load_state_dict``, ``safetensors.torch.load_model``,
    ``torch.distributed.checkpoint``, an assignment or any operation in place. One that was written in part is listed.

    Args:
        model: a module; it may be a part of the one that was created, or contain it.

    Returns:
        Full names as ``model.named_parameters()`` and ``named_buffers()`` give them, tied tensors once.

    Raises:
        TypeError: the argument is no module, but a class, say.

    Example:
        >>> with fastinit.on("cpu", empty=True):
        ...     model = torch.nn.Linear(2, 2)
        >>> model.load_state_dict({"bias": torch.zeros(2)}, strict=False).missing_keys
        ['weight']
        >>> fastinit.uninitialized(model)
        ['weight']
    """
    _require_module("uninitialized", model)
    with lock, modes_off():
        names = [each.name for each in unwritten_tensors(model)]
    if not names:
        _release(model)  # parameters that others have replaced may wait for the garbage collector
    return names


def initialize(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Run the recorded initialization of what ``fastinit.on(..., empty=True)`` created and nothing has written since.

    It gets the bits that it would have had without ``empty``, in the dtype and on the device that it has now. Of a
    tensor that was written in part, only the other elements are written.

    Args:
        model: a module; it may be a part of the one that was created, or contain it.
        names: full names of parameters and buffers, for instance the ``missing_keys`` that ``load_state_dict`` returns;
            those of them that have values are left alone. None: all that are unwritten.

    Returns:
        The names of the tensors that were written, tied tensors once.

    Raises:
        TypeError: the argument is no module, but a class, say.
        ValueError: for a name that the model does not have, or a tensor that is on the meta device.
        RuntimeError: while a CUDA graph is being captured; or torch's own when memory is short.

    Example:
        >>> with fastinit.on("cpu", empty=True, seed=0):
        ...     model = torch.nn.Linear(2, 2)
        >>> fastinit.initialize(model)
        ['weight', 'bias']
    """
    _require_module("initialize", model)
    with lock, modes_off(), torch.no_grad():
        named = unwritten_tensors(model)
        if names is not None:
            wanted = {names} if isinstance(names, str) else set(names)
            _refuse_unknown(model, wanted)
            tensors = {id(model_tensor) for name, model_tensor in _tensors(model) if name in wanted}
            named = [each for each in named if each.name in wanted or id(each.tensor) in tensors]
        on_meta = [each.name for each in named if each.unwritten.is_meta]
        if on_meta:
            raise ValueError(f"fastinit: {_listed(on_meta)} are on the meta device; use fastinit.materialize(model)")
        _give_values(_with_agreed_seeds(named))
        return [each.name for each in named]


def materialize(
    model: nn.Module,
    device: str | torch.device | None = None,
    *,
    window: Callable[[str, tuple[int, ...]], Slices | None] | None = None,
    empty: bool = False,
    report: Report | None = None,
) -> list[str]:
    """Give the parameters of a model that was created with ``fastinit.on(..., shard=True)`` their memory and values.

    Call it once the model is sharded (``fully_shard``, ``parallelize_module``, any combination), or is not to be. Each
    rank gets its local part, in the bits that the unsharded model has there. Tied parameters stay tied, every parameter
    stays the object that it is.

    Args:
        model: a module; it may be a part of the one that was created, or contain it.
        device: where to. None: that of the context, or of the parameter's device mesh; what is not on the meta device
            any more stays where it is.
        window: for parallelism of your own: called as ``window(name, shape)`` with each parameter's full name and
            global shape, it returns the slices that this rank holds, one per dimension with a step of 1, or None for
            all. Like Python's, slices end where the tensor does. The parameter becomes a plain tensor of that part.
        empty: do not give values, which a checkpoint will. `uninitialized` names what it has not supplied,
            `initialize` and this function write that.
        report: what ``fastinit.on`` gave; this call's time, memory and fills are added to it.

    Returns:
        The full names of the parameters that were given values (with ``empty``, a device).

    Raises:
        TypeError: the argument is no module, but a class, say.
        ValueError: a parameter on the meta device that no context has recorded, one whose shape was changed, a window
            that is no such tuple of slices, or a placement of DTensor whose elements no rank owns.
        RuntimeError: ranks have created different models; or torch's own when memory is short.

    Example:
        >>> with fastinit.on("cpu", "bf16", shard=True, seed=0):
        ...     model = torch.nn.Linear(4, 8)
        >>> model.weight.device
        device(type='meta')
        >>> fastinit.materialize(model, window=lambda name, shape: (slice(0, 2), *[slice(None)] * (len(shape) - 1)))
        ['weight', 'bias']
        >>> model.weight.shape
        torch.Size([2, 4])
    """
    _require_module("materialize", model)
    if empty and window is not None:
        raise ValueError(
            "fastinit.materialize: empty=True and window= exclude each other; leave empty= out, and pass the same "
            "window= to fastinit.load"
        )
    with adding_to(report) as timing, lock, modes_off(), torch.no_grad():
        named = unwritten_tensors(model)
        _refuse_unrecorded(_tensors(model), named)
        _release(model)
        named = _with_agreed_seeds(named)
        if empty:
            named = [each for each in named if each.unwritten.is_meta]
            _refuse_unfit(named)
            for each, target in [(each, _device_of(each, device)) for each in named]:
                move(each.rest, target)
                if not each.unwritten.numel():
                    each.rest.materialize()  # no checkpoint has anything for it
                if each.tensor is not each.unwritten:
                    remake(each.tensor)
        else:
            _give_values(named, device, window, timing)
        return [each.name for each in named]


def param_init_fn(module: nn.Module) -> None:
    """Give one module's own parameters their memory and values; for ``FullyShardedDataParallel(param_init_fn=...)``.

    FSDP1 calls it for each module that has parameters on the meta device, and shards a unit when all of it is there. No
    ``sync_module_states`` is needed: every rank computes the same values.

    Args:
        module: created with ``fastinit.on(..., shard=True)``; what is below it is left alone.

    Raises:
        TypeError, ValueError, RuntimeError: as `materialize`.

    Example:
        >>> with fastinit.on("cpu", shard=True):
        ...     model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> FSDP(model, param_init_fn=fastinit.param_init_fn)  # doctest: +SKIP
    """
    _require_module("param_init_fn", module)
    with lock, modes_off(), torch.no_grad():
        named = unwritten_tensors(module, recurse=False)
        _refuse_unrecorded(_tensors(module, recurse=False), named)
        _release(module, recurse=False)
        _give_values(_with_agreed_seeds(named))


def overwrite(tensors: Iterable[tuple[torch.Tensor, Origin]]) -> None:
    """Give tensors that have memory the values of what was created in their place."""
    with lock, modes_off(), torch.no_grad():
        pieces = []
        for tensor, origin in tensors:
            if is_dtensor(tensor):
                pieces.append(Piece(local_tensor(tensor), origin, local_boxes(tensor)))
            else:
                pieces.append(Piece(tensor.detach(), origin, None))
        write_pieces(pieces)


def agree_on_seeds(named: Iterable[Named]) -> None:
    """Have all ranks use rank 0's seeds, where they were drawn before ranks could agree."""
    keys: dict[Key, torch.device] = {}
    for each in named:
        if not each.origin.key.agreed:
            keys.setdefault(each.origin.key, each.origin.device)
    if keys and is_distributed():
        seeds = from_rank_0([key.seed for key in keys], next(iter(keys.values())))
        for key, seed in zip(keys, seeds, strict=True):
            key.seed, key.agreed = seed, True


def _with_agreed_seeds(named: list[Named]) -> list[Named]:
    if any(is_dtensor(each.tensor) or each.unwritten.is_meta for each in named):
        agree_on_seeds(named)
    return named


def _give_values(
    named: list[Named],
    device: str | torch.device | None = None,
    window: Callable[..., Slices | None] | None = None,
    timing: Timing | None = None,
) -> None:
    """Allocate and write what this rank holds of each tensor; after an error, all of them are as before."""
    timing = timing or Timing()
    _refuse_unfit(named)
    devices = [_device_of(each, device) for each in named]
    windows = [None if window is None else _checked_window(window, each) for each in named]
    work = list(zip(named, devices, windows, strict=True))
    for target in dict.fromkeys(devices):
        refuse_capture(target)
        with timing.allocating():
            reserve([_size(each, part) for each, where, part in work if where == target], target)
    # One memory for each storage, however many tensors of the model show it, and one for each window.
    memories: dict[int, torch.Tensor] = {}
    pieces: list[Piece] = []
    partly = []
    for each, target, part in work:
        rest, origin = each.rest, each.origin
        key = id(rest) if part is None else id(each.unwritten)
        if key in memories:
            continue
        shape = rest.shape if part is None else _extent(part)
        memory = rest.memory
        if memory is None:
            with timing.allocating():
                memory = allocate(shape, rest.dtype, target, name_of=partial(getattr, origin, "name"))
        else:
            partly.append(rest)
        memories[key] = memory
        boxes: list[Box] | None
        if is_dtensor(each.tensor):
            view = view_of(memory, region_of(each.unwritten))
            if rest.memory is None and view.numel() < memory.numel():
                memory.zero_()  # FSDP2's padding
            boxes = local_boxes(each.tensor)
        elif part is not None:
            view, boxes = memory, [_box(each, part, memory.stride())]
        else:
            view, boxes = view_of(memory, rest.place), None
        if view.numel():
            pieces.append(Piece(view, origin, boxes))
    for each in named:
        if not each.origin.recipe:
            name = each.name
            warn_never_initialized(name if "." in name else f"model.{name}", each.origin.shape)
    with ExitStack() as kept:
        for rest in partly:
            kept.enter_context(rest.keeping_what_is_written())
        write_pieces(pieces, timing)
    # Only now, when nothing is left that fails.
    rests = [each.rest for each in named]
    for each, rest, part in zip(named, rests, windows, strict=True):
        if part is not None:
            if type(each.unwritten) is Unwritten:
                swap_in(each.unwritten, memories[id(each.unwritten)], Unwritten)
            continue
        if rest.memory is None:
            rest.memory = memories[id(rest)]
        rest.wrote(None)
        settle(each.unwritten)
        if each.tensor is not each.unwritten:
            remake(each.tensor)


def _size(each: Named, part: Slices | None) -> int:
    if each.rest.memory is not None:
        return 0
    return numel(each.rest.shape if part is None else _extent(part)) * each.rest.dtype.itemsize


def _device_of(each: Named, device: str | torch.device | None) -> torch.device:
    tensor, origin = each.tensor, each.origin
    if not each.unwritten.is_meta:
        return each.unwritten.device
    if is_dtensor(tensor):
        kind = tensor.device_mesh.device_type
        if device is not None and torch.device(device).type != kind:
            raise ValueError(
                f"fastinit.materialize: device={str(device)!r}, but the model is sharded on a mesh of {kind!r} "
                "devices; leave device out, or build the mesh for it"
            )
        if device is None and origin.device.type == kind:
            return origin.device
        device = device or kind
    return concrete(origin.device if device is None else device)


def _checked_window(window: Callable[..., Any], each: Named) -> Slices | None:
    name, shape = each.name, tuple(each.tensor.shape)
    slices = slices_of(window, name, shape, "fastinit.materialize")
    if slices is None:
        return None
    if is_dtensor(each.tensor):
        raise ValueError(f"fastinit.materialize: window= was given, but {name!r} is sharded already, as a DTensor")
    if each.rest.memory is not None:
        raise ValueError(f"fastinit.materialize: window= was given, but {name!r} is written in part already")
    if each.rest.place is not None:
        raise ValueError(
            f"fastinit.materialize: window= was given, but {name!r} has been laid out anew since the block; "
            "return None for it, or materialize the model before"
        )
    return slices


def _box(each: Named, part: Slices, memory_strides: tuple[int, ...]) -> Box:
    """Where the elements of a window are in the tensor's recipe, which counts them as the storage has them."""
    shape = each.rest.shape
    region = region_of(each.unwritten) or Region(0, shape, contiguous_strides(shape))
    first = region.offset + sum(cut.start * stride for cut, stride in zip(part, region.strides, strict=True))
    return Box(first, _extent(part), region.strides, 0, memory_strides)


def _extent(part: Slices) -> tuple[int, ...]:
    return tuple(each.stop - each.start for each in part)


def _tensors(model: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from model.named_buffers(recurse=recurse, remove_duplicate=False)


def _refuse_unfit(named: Iterable[Named]) -> None:
    """Refuse tensors that are not what was recorded, or of which no rank owns elements."""
    for each in named:
        name, tensor, unwritten = each
        origin = each.origin
        if is_dtensor(tensor):
            # Of a rank without elements, FSDP2 keeps zeros that nothing was copied into.
            if tuple(tensor.shape) != origin.shape and unwritten.numel():
                raise ValueError(
                    f"fastinit: {name!r} has shape {tuple(tensor.shape)}, but was created with shape {origin.shape}; "
                    "materialize the model before it is changed, or give the parameter values yourself"
                )
            local_boxes(tensor)
        elif origin.placeless:
            refuse_placeless(origin)


def _refuse_unrecorded(tensors: Iterable[tuple[str, torch.Tensor]], named: Iterable[Named]) -> None:
    recorded = {id(each.tensor) for each in named}
    unknown = [name for name, tensor in tensors if is_on_meta(tensor) and id(tensor) not in recorded]
    if unknown:
        raise ValueError(
            f"fastinit: {_listed(unknown)} are on the meta device, and no context has recorded how they are "
            "initialized; create them inside of fastinit.on(..., shard=True), or give them memory first"
        )


def _refuse_unknown(model: nn.Module, names: set[str]) -> None:
    unknown = names - {name for name, _ in _tensors(model)}
    if unknown:
        raise ValueError(
            f"fastinit.initialize: names={_listed(sorted(unknown))} are not parameters or buffers of this "
            f"{type(model).__name__}; use the names of named_parameters() and named_buffers()"
        )


_NAMES_IN_ERRORS = 20


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_IN_ERRORS} more" if len(names) > _NAMES_IN_ERRORS else ""
    return ", ".join(names[:_NAMES_IN_ERRORS]) + more

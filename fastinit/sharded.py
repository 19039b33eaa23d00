"""`materialize`: memory and values for parameters that ``fastinit.on(..., shard=True)`` left on the meta device.

Each rank allocates what it holds of each parameter (a DTensor's local shard, a window, or the whole) and fills that
from the recipe. Values depend on the element's place in the whole tensor, so ranks have nothing to tell each other but
the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .deferred import (
    MARK,
    Deferred,
    Named,
    Piece,
    deferred_tensors,
    forget,
    initialize,
    is_on_meta,
    keep,
    kept_for,
    mark_recipe,
    once,
    replace_seeds,
    warn_about_empty_recipes,
    write_pieces,
)
from .distributed import from_rank_0, is_distributed
from .execution import allocate, reserve
from .layout import Box, Window, numel
from .sharding import is_dtensor, local_boxes, local_tensor

_modes_off = torch._C.DisableTorchFunction

Slices = tuple[slice, ...]


def materialize(
    model: nn.Module,
    device: str | torch.device | None = None,
    *,
    window: Callable[[str, tuple[int, ...]], Slices | None] | None = None,
    empty: bool = False,
) -> list[str]:
    """Give the parameters of a model that was created with ``fastinit.on(..., shard=True)`` their memory and values.

    Call it once the model is sharded (``fully_shard``, ``parallelize_module``, any combination), or is not to be. Each
    rank gets its local part, in the bits that the unsharded model has there. Tied parameters stay tied, every parameter
    stays the object that it is.

    Args:
        model: a module; it may be a part of the one that was created, or contain it.
        device: where to. None: that of the context, or of the parameter's device mesh.
        window: for parallelism of your own: called as ``window(name, shape)`` with each parameter's full name and
            global shape, it returns the slices that this rank holds, one per dimension with a step of 1, or None for
            all. Like Python's, slices end where the tensor does. The parameter becomes a plain tensor of that part.
        empty: leave the memory without values, for a checkpoint to fill. Afterwards `uninitialized` names what it has
            not supplied, `initialize` and this function write that.

    Returns:
        The full names of the parameters that were given values (with ``empty``, memory).

    Raises:
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
    if empty and window is not None:
        raise ValueError("fastinit.materialize: empty=True and window= exclude each other; load the windows yourself")
    with _modes_off(), torch.no_grad():
        deferred = list(deferred_tensors(model))
        waiting = list(once(each for each in deferred if is_on_meta(each[1])))
        _refuse_unrecorded(model, waiting)
        if not waiting:
            return [] if empty else initialize(model)
        waiting = _with_agreed_seeds(model, waiting)
        _give_values(model, waiting, device, window, empty)
        if empty:
            _note_marks(model, {id(tensor) for _, tensor, _ in waiting})
            return [name for name, _, _ in waiting]
        warn_about_empty_recipes(waiting)
        written = {name for name, _, _ in waiting}
        if any(recipe.mark is not None for _, _, recipe in deferred):
            written.update(initialize(model))  # what has memory already, but no values
        forget(model)
        return [name for name, _, _ in deferred if name in written]


def param_init_fn(module: nn.Module) -> None:
    """Give one module's own parameters their memory and values; for ``FullyShardedDataParallel(param_init_fn=...)``.

    FSDP1 calls it for each module that has parameters on the meta device, and shards a unit when all of it is there. No
    ``sync_module_states`` is needed: every rank computes the same values.

    Args:
        module: created with ``fastinit.on(..., shard=True)``; what is below it is left alone.

    Raises:
        ValueError, RuntimeError: as `materialize`.

    Example:
        >>> with fastinit.on("cpu", shard=True):
        ...     model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> FSDP(model, param_init_fn=fastinit.param_init_fn)  # doctest: +SKIP
    """
    with _modes_off(), torch.no_grad():
        own = {id(parameter) for parameter in module._parameters.values() if parameter is not None}
        named = [each for each in once(deferred_tensors(module)) if id(each[1]) in own and is_on_meta(each[1])]
        _refuse_unrecorded(module, named, recurse=False)
        named = _with_agreed_seeds(module, named)
        _give_values(module, named)
        warn_about_empty_recipes(named)


def _with_agreed_seeds(model: nn.Module, named: list[Named]) -> list[Named]:
    """The same with rank 0's seeds, where they were drawn before ranks could agree."""
    seeds = list({deferred.seed: None for _, _, deferred in named if not deferred.seed_agreed})
    if not seeds or not is_distributed():
        return named
    replace_seeds(dict(zip(seeds, from_rank_0(seeds, named[0][2].device), strict=True)))
    tensors = {id(tensor) for _, tensor, _ in named}
    return [each for each in once(deferred_tensors(model)) if id(each[1]) in tensors]


def _give_values(
    model: nn.Module,
    named: list[Named],
    device: str | torch.device | None = None,
    window: Callable[..., Slices | None] | None = None,
    empty: bool = False,
) -> None:
    """Allocate and write what this rank holds of each tensor; after an error, all of them are on meta as before."""
    _refuse_unfit(named)
    padded = _padded_by_fsdp(model)
    before = [_on_meta(tensor) for _, tensor, _ in named]
    try:
        write_pieces(_give_memory(named, padded, device, window, empty), zeros=not empty)
    except BaseException:
        for (_, tensor, _), memory in zip(named, before, strict=True):
            _put(tensor, memory, padded)
        raise


def _give_memory(
    named: list[Named],
    padded: dict[int, Any],
    device: str | torch.device | None,
    window: Callable[..., Slices | None] | None,
    empty: bool,
) -> list[Piece]:
    """Allocate what this rank holds of each tensor and put it in place; the pieces are what is to be written there."""
    devices = [_device_of(tensor, deferred, device) for _, tensor, deferred in named]
    windows = [None if window is None else _checked_window(window, *each) for each in named]
    shapes = [
        tuple(local_tensor(tensor).shape) if is_dtensor(tensor) else _extent(part) if part else deferred.shape
        for (_, tensor, deferred), part in zip(named, windows, strict=True)
    ]
    for target in dict.fromkeys(devices):
        if target.type == "cuda":
            sizes = [
                numel(shape) * tensor.dtype.itemsize
                for (_, tensor, _), shape, where in zip(named, shapes, devices, strict=True)
                if where == target
            ]
            reserve(sizes, target)
    # Shards that FSDP2 pads are copied into the padded memory: the largest first, while the others have none yet.
    order = sorted(range(len(named)), key=lambda i: -numel(shapes[i]) if id(named[i][1]) in padded else 1)
    for i in order:
        tensor = named[i][1]
        _put(tensor, allocate(shapes[i], tensor.dtype, devices[i]), padded)
    pieces = []
    for (_, tensor, deferred), part in zip(named, windows, strict=True):
        boxes: list[Box] | None = None
        if is_dtensor(tensor):
            memory = local_tensor(tensor)
            boxes = local_boxes(tensor)
        else:
            memory = tensor.detach()
            if part is not None:
                boxes = [Window(deferred.shape, _start(part)).box(_extent(part), memory.stride())]
        if memory.numel() and empty:
            pieces.append(Piece(memory, deferred._replace(recipe=mark_recipe(tuple(memory.shape), MARK)), None))
        elif memory.numel():
            pieces.append(Piece(memory, deferred, boxes))
    return pieces


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the meta device like that one, or like this rank's shard of it."""
    return torch.empty_like(local_tensor(tensor) if is_dtensor(tensor) else tensor, device="meta", requires_grad=False)


def _put(tensor: torch.Tensor, memory: torch.Tensor, padded: dict[int, Any]) -> None:
    """Give a tensor, or this rank's shard of it, other memory; it stays the same object."""
    # Not torch.utils.swap_tensors, which would exchange the attributes too.
    if is_dtensor(tensor):
        from torch.distributed.tensor import DTensor

        distributed = DTensor(memory, tensor._spec, requires_grad=tensor.requires_grad)
        torch._C._swap_tensor_impl(tensor, distributed)
        tensor._local_tensor = memory
        if id(tensor) in padded:
            padded[id(tensor)].reset_sharded_param()
    else:
        torch._C._swap_tensor_impl(tensor, memory.requires_grad_(tensor.requires_grad))


def _padded_by_fsdp(model: nn.Module) -> dict[int, Any]:
    """FSDP2's records of the parameters that it manages, by the parameter's id: they hold its memory, too."""
    records = {}
    for module in model.modules():
        get_state = getattr(module, "_get_fsdp_state", None)
        if get_state is None:
            continue
        state = get_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for record in group.fsdp_params if group is not None else ():
                records[id(record.sharded_param)] = record
    return records


def _device_of(tensor: torch.Tensor, deferred: Deferred, device: str | torch.device | None) -> torch.device:
    if is_dtensor(tensor):
        kind = tensor.device_mesh.device_type
        if device is not None and torch.device(device).type != kind:
            raise ValueError(
                f"fastinit.materialize: device={str(device)!r}, but the model is sharded on a mesh of {kind!r} "
                "devices; leave device out, or build the mesh for it"
            )
        if device is None and deferred.device.type == kind:
            return deferred.device
        device = device or kind
    device = torch.device(device) if device is not None else deferred.device
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _checked_window(window: Callable[..., Any], name: str, tensor: torch.Tensor, deferred: Deferred) -> Slices | None:
    slices = window(name, deferred.shape)
    if slices is None:
        return None
    if is_dtensor(tensor):
        raise ValueError(f"fastinit.materialize: window= was given, but {name!r} is sharded already, as a DTensor")
    shape = deferred.shape
    fits = isinstance(slices, tuple) and len(slices) == len(shape) and all(isinstance(each, slice) for each in slices)
    if not fits or any(each.step not in (None, 1) for each in slices):
        raise ValueError(
            f"fastinit.materialize: window({name!r}, {shape}) returned {slices!r}; return a tuple of {len(shape)} "
            "slices with a step of 1, or None for the whole"
        )
    ranges = [each.indices(size) for each, size in zip(slices, shape, strict=True)]
    return tuple(slice(first, max(first, last)) for first, last, _ in ranges)


def _start(part: Slices) -> tuple[int, ...]:
    return tuple(each.start for each in part)


def _extent(part: Slices) -> tuple[int, ...]:
    return tuple(each.stop - each.start for each in part)


def _note_marks(model: nn.Module, tensors: set[int]) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            deferred = kept_for(module, name)
            if deferred is not None and id(parameter) in tensors:
                keep(module, name, deferred._replace(mark=MARK, marked_as_shard=True))


def _refuse_unfit(named: Iterable[Named]) -> None:
    """Refuse tensors that are not what was recorded, or of which no rank owns elements."""
    for name, tensor, deferred in named:
        if tuple(tensor.shape) != deferred.shape:
            raise ValueError(
                f"fastinit: {name!r} has shape {tuple(tensor.shape)}, but was created with shape {deferred.shape}; "
                "materialise the model before it is changed, or give the parameter values yourself"
            )
        if is_dtensor(tensor):
            local_boxes(tensor)


def _refuse_unrecorded(model: nn.Module, named: Iterable[Named], recurse: bool = True) -> None:
    recorded = {id(tensor) for _, tensor, _ in named}
    unknown = [
        name
        for tensors in (model.named_parameters(recurse=recurse), model.named_buffers(recurse=recurse))
        for name, tensor in tensors
        if is_on_meta(tensor) and id(tensor) not in recorded
    ]
    if unknown:
        raise ValueError(
            f"fastinit: {', '.join(unknown[:20])} are on the meta device, and no context has recorded how they are "
            "initialised; create them inside of fastinit.on(..., shard=True), or give them memory first"
        )

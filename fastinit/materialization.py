"""Values for what a block left unwritten: `uninitialized` names it, `initialize` and `materialize` write it.

Each rank allocates what it holds of each parameter (a DTensor's local shard, a window, or the whole) and fills that
from the recipe. Values depend on the element's place in the whole tensor, so ranks have nothing to tell each other but
the seed.

Private: it may change with any version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from .distributed import from_rank_0, is_distributed
from .execution import Timing, allocate, concrete, refuse_capture, reserve
from .layout import Box, Slices, contiguous_strides, numel, slices_of
from .log import listed
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
    remake,
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
        return self.unwritten._record

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
            if unwritten._record.has(unwritten._region):
                settle(unwritten)
            else:
                named.setdefault(id(tensor), Named(f"{prefix}.{name}" if prefix else name, tensor, unwritten))
    return list(named.values())


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
        for _, tensor in _tensors(model):
            release(tensor)  # parameters that others have replaced may wait for the garbage collector
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
            raise ValueError(f"fastinit: {listed(on_meta)} are on the meta device; use fastinit.materialize(model)")
        agree_on_seeds(named)
        _give_values(named)
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
        named = _recorded(model)
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
        _give_values(_recorded(module, recurse=False))


def overwrite(tensors: Iterable[tuple[torch.Tensor, Origin]]) -> None:
    """Give tensors that have memory the values of what was created in their place."""
    with lock, modes_off(), torch.no_grad():
        write_pieces(
            [
                Piece(local_tensor(tensor).detach(), origin, local_boxes(tensor) if is_dtensor(tensor) else None)
                for tensor, origin in tensors
            ]
        )


def agree_on_seeds(named: list[Named]) -> None:
    """Have all ranks use rank 0's seeds for a model in shards, where they were drawn before ranks could agree."""
    if not any(is_dtensor(each.tensor) or each.unwritten.is_meta for each in named):
        return
    keys: dict[Key, torch.device] = {}
    for each in named:
        if not each.origin.key.agreed:
            keys.setdefault(each.origin.key, each.origin.device)
    if keys and is_distributed():
        seeds = from_rank_0([key.seed for key in keys], next(iter(keys.values())))
        for key, seed in zip(keys, seeds, strict=True):
            key.seed, key.agreed = seed, True


class _Part(NamedTuple):
    """What this rank is to hold of a tensor, and where; a window is a part of one that is not distributed."""

    named: Named
    rest: Rest
    device: torch.device
    window: Slices | None

    @property
    def key(self) -> int:
        """The same where one memory serves: of a storage, however many tensors of the model show it."""
        return id(self.rest if self.window is None else self.named.unwritten)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the memory."""
        return self.rest.shape if self.window is None else tuple(each.stop - each.start for each in self.window)

    def memory(self) -> torch.Tensor:
        if self.rest.memory is not None:
            return self.rest.memory
        return allocate(self.shape, self.rest.dtype, self.device, name_of=lambda: self.rest.origin.name)

    def piece(self, memory: torch.Tensor) -> Piece:
        """What is to be written of the memory."""
        rest, (_, tensor, unwritten) = self.rest, self.named
        if is_dtensor(tensor):
            local = view_of(memory, unwritten._region)
            if rest.memory is None and local.numel() < memory.numel():
                memory.zero_()  # FSDP2's padding
            return Piece(local, rest.origin, local_boxes(tensor))
        if self.window is None:
            return Piece(view_of(memory, rest.place), rest.origin, None)
        # The recipe counts elements as the storage has them.
        region = unwritten._region or Region(0, rest.shape, contiguous_strides(rest.shape))
        first = region.offset + sum(cut.start * by for cut, by in zip(self.window, region.strides, strict=True))
        return Piece(memory, rest.origin, [Box(first, self.shape, region.strides, 0, memory.stride())])

    def take(self, memory: torch.Tensor) -> None:
        """Let the tensor have the memory, which is written."""
        _, tensor, unwritten = self.named
        if self.window is not None:
            swap_in(unwritten, memory)
            return
        self.rest.memory = memory
        self.rest.wrote(None)
        settle(unwritten)
        if tensor is not unwritten:
            remake(tensor)


def _give_values(
    named: list[Named],
    device: str | torch.device | None = None,
    window: Callable[..., Slices | None] | None = None,
    timing: Timing | None = None,
) -> None:
    """Allocate and write what this rank holds of each tensor; after an error, all of them are as before."""
    timing = timing or Timing()
    _refuse_unfit(named)
    parts = [_Part(each, each.rest, _device_of(each, device), _checked_window(window, each)) for each in named]
    distinct: dict[int, _Part] = {}
    for part in parts:
        distinct.setdefault(part.key, part)
    with timing.allocating():
        for target in dict.fromkeys(part.device for part in parts):
            refuse_capture(target)
            new = [part for part in distinct.values() if part.device == target and part.rest.memory is None]
            reserve([numel(part.shape) * part.rest.dtype.itemsize for part in new], target)
        memories = {key: part.memory() for key, part in distinct.items()}
    pieces = [part.piece(memories[key]) for key, part in distinct.items()]
    for each in named:
        if not each.origin.recipe:
            warn_never_initialized(each.name if "." in each.name else f"model.{each.name}", each.origin.shape)
    with ExitStack() as kept:
        for part in distinct.values():
            kept.enter_context(part.rest.keeping_what_is_written())
        write_pieces(pieces, timing)
    # Only now, when nothing is left that fails. Windows first: what shares their storage becomes real with that.
    for part in sorted(parts, key=lambda each: each.window is None):
        part.take(memories[part.key])


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


def _checked_window(window: Callable[..., Any] | None, each: Named) -> Slices | None:
    if window is None:
        return None
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


def _recorded(model: nn.Module, *, recurse: bool = True) -> list[Named]:
    """What is unwritten of a model, as all ranks agree on it, after everything on meta has proved to be recorded."""
    named = unwritten_tensors(model, recurse=recurse)
    recorded = {id(each.tensor) for each in named}
    tensors = list(_tensors(model, recurse=recurse))
    unknown = [name for name, tensor in tensors if is_on_meta(tensor) and id(tensor) not in recorded]
    if unknown:
        raise ValueError(
            f"fastinit: {listed(unknown)} are on the meta device, and no context has recorded how they are "
            "initialized; create them inside of fastinit.on(..., shard=True), or give them memory first"
        )
    for _, tensor in tensors:
        release(tensor)
    agree_on_seeds(named)
    return named


def _refuse_unknown(model: nn.Module, names: set[str]) -> None:
    unknown = names - {name for name, _ in _tensors(model)}
    if unknown:
        raise ValueError(
            f"fastinit.initialize: names={listed(sorted(unknown))} are not parameters or buffers of this "
            f"{type(model).__name__}; use the names of named_parameters() and named_buffers()"
        )

"""What a block with `empty` or `shard` leaves unwritten: tensors without storage that outlive it with their recipe.

When such a block ends, the placeholders that a checkpoint is to fill, or that are to be sharded, become `Unwritten`
tensors. Whoever writes one, by whichever path, gives it memory, and once every element that it shows is written it is
an ordinary tensor. Conversions, copies, pickling and torch's sharding carry the recipe along. Whoever reads what nobody
has written is refused, by the name that the tensor had in its model.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..execution import DTYPES, Fills, Timing, allocate
from ..layout import Box, numel
from ..log import logger
from ..recipe import Region, Write
from ..runs import Runs
from .graphs import is_leaf
from .records import lock, modes_off, view_of
from .storageless import attributes_of, deep_copy, swap_impl, without_storage
from .tensors import become_real, swap_in


@dataclass(eq=False)
class Key:
    """The key of one block's values, which all ranks have to agree on; copies of a model refer to the same one."""

    seed: int
    agreed: bool


class Origin(NamedTuple):
    """What a tensor was created as.

    Attributes:
        name: what its model called it at the end of the block.
        shape: sizes of the row-major tensor that the recipe fills.
        recipe, key: its values.
        dtype, device: what the block has created it in, and where.
        reads_nan: who reads it gets NaN, and is not refused.
        placeless: it is a part, or a copy of a part, and what part is not known here: the placements of a distributed
            tensor have to say it.
        zeros: it is not unwritten itself: it is zeros, made of the shape and device of something unwritten.
    """

    name: str
    shape: tuple[int, ...]
    recipe: tuple[Write, ...]
    key: Key
    dtype: torch.dtype
    device: torch.device
    reads_nan: bool = False
    placeless: bool = False
    zeros: bool = False


@dataclass(eq=False)
class Rest:
    """The content of one storage of which something is unwritten.

    Attributes:
        origin: which values the unwritten elements are to get.
        shape: sizes of the storage as a row-major tensor; regions count its elements.
        place: the region of the storage where the origin's elements lie in their order; None: all of it, in its order.
        dtype, device: of its tensors; a tensor on the meta device gets its memory elsewhere.
        memory: contiguous tensor of `shape` as soon as something is written, else None.
        written: the elements of memory that are; None: all.
        tensors: those that stand for it, as far as they are known. Not weakly: torch.utils.swap_tensors refuses tensors
            that have weak references.
        refused: somebody was refused its storage.
    """

    origin: Origin
    shape: tuple[int, ...]
    place: Region | None
    dtype: torch.dtype
    device: torch.device
    memory: torch.Tensor | None = None
    written: Runs | None = field(default_factory=Runs)
    tensors: list[Unwritten] = field(default_factory=list)
    refused: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "tensors": [], "refused": False}

    def stands(self, tensor: Unwritten) -> None:
        """Note a tensor that is to become real with the others."""
        self.tensors.append(tensor)
        if len(self.tensors) % 64 == 0:
            self.tensors = self.standing()

    def standing(self) -> list[Unwritten]:
        """Those that still stand for it, without views that only the list holds: FSDP2 makes many."""
        return [
            each
            for each in self.tensors
            if type(each) is Unwritten and each._record is self and sys.getrefcount(each) > _ALONE
        ]

    def has(self, region: Region | None) -> bool:
        """Whether every element of a region is written."""
        region = region or Region(0, (numel(self.shape),), (1,))
        return self.memory is not None and (self.written is None or self.written.cover(*region))

    def forked(self, dtype: torch.dtype | None = None, device: torch.device | None = None, empty: bool = False) -> Rest:
        """A copy of it, also of what is written, unless it is to be empty; of another dtype or elsewhere, if asked."""
        dtype, device = dtype or self.dtype, device or self.device
        made = Rest(self.origin, self.shape, self.place, dtype, device)
        if self.memory is not None and not empty:
            made.memory, made.written = self.memory.to(device, dtype, copy=True), copy.copy(self.written)
        return made

    def with_memory(self) -> torch.Tensor:
        """Memory to write to; NaN is in it where reading gives that."""
        if self.memory is None:
            if self.device.type == "meta":
                raise RuntimeError(
                    f"fastinit: {self.origin.name!r} is on the meta device, and what is written to it would be lost; "
                    "give it memory first: fastinit.materialize(model, empty=True), or load with assign=True"
                )
            self.memory = allocate(self.shape, self.dtype, self.device, name_of=lambda: self.origin.name)
            if self.origin.reads_nan:
                self.memory.fill_(torch.nan)
        return self.memory

    def wrote(self, where: Region | torch.Tensor | None) -> None:
        """Note that a region of memory, or single places, are written, and let those become real that are so whole."""
        if self.written is not None and where is not None:
            self.written.add(*where) if isinstance(where, Region) else self.written.add_places(where)
        if where is None or self.has(None):
            self.written = None
        self.settle()

    def settle(self) -> None:
        """Let those tensors become real that are written whole."""
        assert self.memory is not None
        for tensor in self.standing():
            if type(tensor) is Unwritten and self.has(tensor._region):  # some are in the list twice
                swap_in(tensor, view_of(self.memory, tensor._region))
        self.tensors = self.standing()

    def materialize(self) -> None:
        """Give all that is unwritten its values, here and now; what somebody has written is kept."""
        if self.has(None):
            return
        if self.origin.placeless:
            refuse_placeless(self.origin)
        with torch.no_grad():
            memory = self.with_memory()
            with self.keeping_what_is_written():
                write_pieces([Piece(view_of(memory, self.place), self.origin, None)])
            self.wrote(None)

    @contextmanager
    def keeping_what_is_written(self) -> Iterator[None]:
        """Put back what somebody has written, whatever is written over it meanwhile, and whether that fails or not."""
        written = [] if self.memory is None or self.written is None else self.written.of(self.memory)
        values = [each.clone() for each in written]
        try:
            yield
        finally:
            for each, value in zip(written, values, strict=True):
                each.copy_(value)


# What sys.getrefcount says there of an object that nothing but the list holds.
_ALONE = min([sys.getrefcount(each) for each in [object()]])


class Piece(NamedTuple):
    """Memory to write, and which elements of the origin lie in it; boxes None: all of them, in the origin's shape."""

    memory: torch.Tensor
    origin: Origin
    boxes: list[Box] | None


def write_pieces(pieces: list[Piece], timing: Timing | None = None) -> None:
    """Give memory the values that recipes have for it, all of it together, rounded once to its dtype."""
    timing = timing or Timing()
    fills: dict[tuple[int, torch.device], Fills] = {}
    for target, origin, boxes in pieces:
        if not target.numel():
            continue
        dtype = _values_dtype(origin.dtype, target.dtype)
        if dtype != target.dtype:
            values = torch.empty_strided(target.shape, target.stride(), dtype=dtype, device="cpu").copy_(target)
            write_pieces([Piece(values, origin, boxes)], timing)
            target.copy_(values)
            continue
        seed = origin.key.seed
        each = fills.setdefault((seed, target.device), Fills(seed, target.device))
        each.write(target, origin.recipe, boxes, elements=numel(origin.shape))
        torch.autograd.graph.increment_version(target)
    for each in fills.values():
        timing.run(each)


def _values_dtype(created: torch.dtype, target: torch.dtype) -> torch.dtype:
    """The dtype in which a recipe has its values, before they are converted to another one."""
    if created == torch.float64:
        return created
    return torch.float32 if created in DTYPES and target not in DTYPES else target


def refuse(tensor: Unwritten, what: str = "", error: type[RuntimeError] = RuntimeError) -> NoReturn:
    """Say that a tensor has no values yet, by its name, and what to do about it."""
    rest = tensor._record
    how = "nothing has written it since" if rest.memory is None else "it has been written only in part since"
    remedy = (
        "Call fastinit.materialize(model), once the model is sharded or is not to be"
        if tensor.is_meta
        else "Load a checkpoint that supplies it, or call fastinit.initialize(model)"
    )
    message = (
        f"fastinit: {rest.origin.name} (shape {tuple(tensor.shape)}, {tensor.dtype}) was created without values, and "
        f"{how}{what}. {remedy}"
    )
    logger.info(message)  # TorchScript's interpreter reports an error of its own, without any message
    if error is NotImplementedError:
        rest.refused = True
    raise error(message)


def refuse_placeless(origin: Origin) -> NoReturn:
    raise ValueError(
        f"fastinit: a part of {origin.name} was copied before it had values, so that there is no telling which part "
        "this is; materialize the model first, or shard it with DTensors, whose placements say it"
    )


class Unwritten(torch.Tensor):
    """A tensor without storage that stands for a region of a `Rest`; see the module's docstring.

    Its objects were placeholders and will be ordinary tensors: this class must not add fields to Tensor's.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _record: Rest
    _region: Region | None

    # What an operator does to unwritten tensors: fastinit.record.reading, above this module, puts it here.
    dispatch: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

    def __new__(cls, data: torch.Tensor, requires_grad: bool = True) -> Any:
        """What ``type(tensor)(...)`` means: a parameter."""
        return torch.nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with lock, modes_off():
            return Unwritten.dispatch(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        with modes_off(), lock:
            return deep_copy(self, memo, stand_for)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with modes_off(), lock:
            if self._record.has(self._region):
                settle(self)
                return self.__reduce_ex__(protocol)
            warnings.warn(
                f"fastinit: {self._record.origin.name} is saved without values: nothing has written it yet; what "
                "loads it gets its recorded initialization",
                stacklevel=2,
            )
            return _loaded, (self._record, self._region, self.requires_grad, attributes_of(self))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        name = self._record.origin.name
        return f"tensor(unwritten {name!r}, size={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    def __format__(self, specification: str) -> str:
        return format(self.item(), specification) if specification and not self.dim() else repr(self)

    @property
    def data(self) -> torch.Tensor:
        with modes_off():
            return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        with modes_off(), lock:
            if type(value) is Unwritten:
                torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
                self._record, self._region = value._record, value._region
                value._record.stands(self)
            elif value.device != self.device:
                raise RuntimeError(
                    f"fastinit: {self._record.origin.name} is on {str(self.device)!r}, and the data that it is to take "
                    f"on {str(value.device)!r}; move them, or assign a new parameter"
                )
            else:
                become_real(value)
                swap_in(self, value.detach())

    def data_ptr(self) -> int:
        """Whoever asks for an address gets initialized memory there; on the meta device there is none.

        Whoever was refused the storage is refused the address, too: safetensors asks for the one, takes no for an
        answer, and saves what lies at the other.
        """
        if self.is_meta:
            return 0
        if self._record.refused:
            refuse(self)
        with modes_off(), lock:
            rest, region = self._record, self._region
            if not rest.origin.reads_nan:
                rest.materialize()
            return view_of(rest.with_memory(), region).data_ptr()

    def is_pinned(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def is_shared(self) -> bool:
        return False


def _loaded(rest: Rest, region: Region | None, requires_grad: bool, attributes: dict[str, Any]) -> torch.Tensor:
    tensor = stand_for(rest, region).requires_grad_(requires_grad)
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def _below(name: str) -> Callable[..., Any]:
    def method(self: Unwritten, *args: Any, **kwargs: Any) -> Any:
        with modes_off(), lock:
            # What torch raises for tensors without storage, and loaders expect.
            return getattr(readable(self, error=NotImplementedError), name)(*args, **kwargs)

    return method


# Methods that reach a tensor's memory below the dispatcher.
for _name in (
    *"__bool__ __complex__ __dlpack__ __dlpack_device__ __float__ __index__ __int__".split(),
    *"as_subclass numpy tolist untyped_storage".split(),
):
    setattr(Unwritten, _name, _below(_name))


def stand_for(rest: Rest, region: Region | None = None) -> Unwritten:
    """A new tensor that stands for all of a storage, or for a region of it."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return stand_for(rest, region)
    # Its storage has no bytes: TorchScript writes as many to a file as it has, from no address.
    tensor: Unwritten = without_storage(Unwritten, rest, region, 0)
    tensor._record, tensor._region = rest, region
    rest.stands(tensor)
    return tensor


def origin_of(tensor: torch.Tensor) -> Origin | None:
    """What a tensor that is unwritten was created as; None if it is written."""
    unwritten = inner(tensor)
    return None if unwritten is None else unwritten._record.origin


def move(rest: Rest, device: torch.device) -> None:
    """Let what has no memory yet be on a device."""
    rest.device = device
    for tensor in filter(is_leaf, rest.standing()):
        _exchange(tensor, stand_for(rest, tensor._region))


def memory_of(tensor: Unwritten) -> torch.Tensor:
    """The memory of a tensor, whatever is in it."""
    with lock, modes_off():
        return view_of(tensor._record.with_memory(), tensor._region)


def wrote(tensor: Unwritten, places: torch.Tensor | None = None) -> None:
    """Note that all of a tensor's memory is written, or single places of it."""
    with lock, modes_off(), torch.no_grad():
        tensor._record.wrote(tensor._region if places is None else places)
        settle(tensor)


def remake(tensor: torch.Tensor) -> None:
    """Let a wrapper subclass be what it holds now: on another device, say."""
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {name: getattr(tensor, name) for name in names}
    unflatten: Any = type(tensor).__tensor_unflatten__  # type: ignore[attr-defined]
    _exchange(tensor, unflatten(parts, context, tensor.shape, tensor.stride()))


def _exchange(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Let a leaf be like another tensor: its hooks stay with it, and a gradient, unless that one is elsewhere."""
    other.requires_grad_(tensor.requires_grad)
    hooks, post = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    grad = None if tensor._is_view() else tensor.grad
    swap_impl(tensor, other)
    if hooks is not None:
        tensor._backward_hooks = hooks
    if post is not None:
        tensor._post_accumulate_grad_hooks = post
    if grad is not None and grad.device == tensor.device:
        tensor.grad = grad


def settle(tensor: Unwritten) -> None:
    """Let a tensor become real that is written whole, also where others have exchanged objects."""
    if type(tensor) is not Unwritten:
        return
    rest = tensor._record
    rest.settle()
    if type(tensor) is Unwritten and rest.has(tensor._region):
        swap_in(tensor, memory_of(tensor))


def inner(tensor: torch.Tensor | None) -> Unwritten | None:
    """The unwritten tensor that this one is, or that a distributed or another wrapper subclass holds; or None."""
    if type(tensor) is Unwritten:
        return tensor
    if tensor is None or not is_traceable_wrapper_subclass(tensor):
        return None
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        found = inner(getattr(tensor, name))
        if found is not None:
            return found
    return None


def readable(tensor: Unwritten, what: str = "", error: type[RuntimeError] = RuntimeError) -> torch.Tensor:
    """The memory of a tensor whose elements are written; any other one is refused, for a reason of the caller's."""
    rest, region = tensor._record, tensor._region
    if not rest.origin.reads_nan and not rest.has(region):
        # Zeros that somebody made of an unwritten tensor's shape and device are not in memory yet, that is all.
        if not rest.origin.zeros or rest.device.type == "meta":
            refuse(tensor, what, error)
        rest.materialize()
    return view_of(rest.with_memory(), region)

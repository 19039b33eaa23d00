"""What a block with `empty` or `shard` leaves unwritten: tensors without storage that outlive it with their recipe.

When such a block ends, the placeholders that a checkpoint is to fill, or that are to be sharded, become `Unwritten`
tensors. Whoever writes one, by whichever path, gives it memory, and once every element that it shows is written it is
an ordinary tensor. Conversions, copies, pickling and torch's sharding carry the recipe along. Whoever reads what nobody
has written is refused, by the name that the tensor had in its model.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from .tensors import swap_in


class Key:
    """The key of one block's values, which all ranks have to agree on; copies of a model refer to the same one."""

    def __init__(self, seed: int, agreed: bool) -> None:
        self.seed = seed
        self.agreed = agreed


class Origin(NamedTuple):
    """What a tensor was created as.

    Attributes:
        name: what its model called it at the end of the block.
        shape: sizes of the row-major tensor that the recipe fills.
        recipe, key: its values.
        dtype, device: what the block has created it in, and where.
        remedy: what to do before it is used.
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
    remedy: str
    reads_nan: bool = False
    placeless: bool = False
    zeros: bool = False


class Rest:
    """The content of one storage of which something is unwritten.

    Attributes:
        origin: which values the unwritten elements are to get.
        shape: sizes of the storage as a row-major tensor; regions count its elements.
        place: the region of the storage where the origin's elements lie in their order; None: all of it, in its order.
        dtype, device: of its tensors; a tensor on the meta device gets its memory elsewhere.
        memory: contiguous tensor of `shape` as soon as something is written, else None.
        written: the elements of memory that are.
        tensors: those that stand for it, as far as they are known. Not weakly: torch.utils.swap_tensors refuses tensors
            that have weak references.
    """

    def __init__(
        self,
        origin: Origin,
        shape: tuple[int, ...],
        place: Region | None,
        dtype: torch.dtype,
        device: torch.device,
        memory: torch.Tensor | None = None,
        written: Runs | None = None,
    ) -> None:
        self.origin = origin
        self.shape = shape
        self.place = place
        self.dtype = dtype
        self.device = device
        self.memory = memory
        self.written = written or Runs()
        self.tensors: list[Unwritten] = []
        self._prune_at = 64
        self._complete = self.memory is not None and self.written.cover(*self._all())

    def __reduce__(self) -> Any:
        state = (self.origin, self.shape, self.place, self.dtype, self.device, self.memory, self.written)
        return Rest, state

    def stands(self, tensor: Unwritten) -> None:
        """Note a tensor that is to become real with the others."""
        if len(self.tensors) >= self._prune_at:
            # Views that only this list holds are gone for everybody else.
            self.tensors = [each for each in self.tensors if sys.getrefcount(each) > _ALONE]
            self._prune_at = 2 * len(self.tensors) + 64
        self.tensors.append(tensor)

    def has(self, region: Region | None) -> bool:
        """Whether every element of a region is written."""
        if self.memory is None:
            return False
        return self._complete or self.written.cover(*(region or self._all()))

    def _all(self) -> Region:
        return Region(0, (numel(self.shape),), (1,))

    def forked(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Rest:
        """A copy of it, also of what is written; of another dtype or on another device, if they are given."""
        dtype, device = dtype or self.dtype, device or self.device
        memory = None if self.memory is None else self.memory.to(device, dtype, copy=True)
        return Rest(self.origin, self.shape, self.place, dtype, device, memory, self.written.copied())

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

    def wrote(self, region: Region | None) -> None:
        """Note that a region of memory is written, and let those tensors become real that are written whole."""
        if region is None:
            self.written = Runs.of(numel(self.shape))
        else:
            self.written.add(*region)
        self._complete = region is None or self.written.cover(*self._all())
        self.settle()

    def settle(self) -> None:
        """Let those tensors become real that are written whole."""
        assert self.memory is not None
        waiting = []
        for tensor in self.tensors:
            # FSDP2 looks at the parts of all ranks: most views are gone for everybody but this list.
            if type(tensor) is Unwritten and tensor._record is self and sys.getrefcount(tensor) > _ALONE:
                if self.has(tensor._region):
                    swap_in(tensor, view_of(self.memory, tensor._region))
                else:
                    waiting.append(tensor)
        self.tensors = waiting

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
        values = [] if self.memory is None else self.written.values(self.memory)
        try:
            yield
        finally:
            if self.memory is not None:
                self.written.put(self.memory, values)


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


def refuse(tensor: Unwritten, what: str = "") -> NoReturn:
    """Say that a tensor has no values yet, by its name, and what to do about it."""
    rest = tensor._record
    how = "nothing has written it since" if rest.memory is None else "it has been written only in part since"
    message = (
        f"fastinit: {rest.origin.name} (shape {tuple(tensor.shape)}, {tensor.dtype}) was created without values, and "
        f"{how}{what}. {rest.origin.remedy}"
    )
    logger.info(message)  # TorchScript's interpreter reports an error of its own, without any message
    raise RuntimeError(message)


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
            _take(self, value)

    def set_(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        source = args[0] if len(args) + len(kwargs) == 1 and args else kwargs.get("source")
        if not isinstance(source, torch.Tensor) or source.dtype != self.dtype:
            refuse(self)
        self.data = source
        return self

    def data_ptr(self) -> int:
        """Whoever asks for an address gets initialized memory there; on the meta device there is none.

        An object that was refused its storage is refused its address, too: safetensors asks for the one, takes no for
        an answer, and saves what lies at the other.
        """
        if self.is_meta:
            return 0
        if "_fastinit_refused" in self.__dict__:
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


def _reads(name: str) -> Callable[..., Any]:
    def method(self: Unwritten, *args: Any, **kwargs: Any) -> Any:
        with modes_off(), lock:
            return getattr(readable(self), name)(*args, **kwargs)

    return method


def _stores(name: str) -> Callable[..., Any]:
    def method(self: Unwritten, *args: Any, **kwargs: Any) -> Any:
        with modes_off(), lock:
            if not self._record.has(self._region):
                self._fastinit_refused = True  # type: ignore[attr-defined]
                try:
                    refuse(self)
                except RuntimeError as error:
                    # What torch raises for tensors without storage, and loaders expect.
                    raise NotImplementedError(str(error)) from None
            return getattr(readable(self), name)(*args, **kwargs)

    return method


# Methods that reach a tensor's memory below the dispatcher.
for _name in (
    *"__array__ __bool__ __complex__ __dlpack__ __dlpack_device__ __float__ __index__ __int__".split(),
    *"as_subclass numpy share_memory_ tolist".split(),
):
    setattr(Unwritten, _name, _reads(_name))
for _name in "storage storage_type untyped_storage _typed_storage".split():
    setattr(Unwritten, _name, _stores(_name))
Unwritten.__cuda_array_interface__ = property(_reads("__cuda_array_interface__"))  # type: ignore[assignment]


def stand_for(rest: Rest, region: Region | None = None) -> Unwritten:
    """A new tensor that stands for all of a storage, or for a region of it."""
    tensor = _made(rest, region)
    tensor._record, tensor._region = rest, region
    rest.stands(tensor)
    return tensor


def _made(rest: Rest, region: Region | None) -> Unwritten:
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return _made(rest, region)
    # Its storage has no bytes: TorchScript writes as many to a file as it has, from no address.
    tensor: Unwritten = without_storage(Unwritten, rest, region, 0)
    return tensor


def _take(tensor: Unwritten, value: torch.Tensor) -> None:
    """``tensor.data = value``: the tensor leaves what it stood for."""
    if type(value) is Unwritten:
        torch.Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
        tensor._record, tensor._region = value._record, value._region
        value._record.stands(tensor)
    elif value.device != tensor.device:
        raise RuntimeError(
            f"fastinit: {tensor._record.origin.name} is on {str(tensor.device)!r}, and the data that it is to take on "
            f"{str(value.device)!r}; move them, or assign a new parameter"
        )
    else:
        swap_in(tensor, value.detach())


def origin_of(tensor: torch.Tensor) -> Origin | None:
    """What a tensor that is unwritten was created as; None if it is written."""
    unwritten = inner(tensor)
    return None if unwritten is None else unwritten._record.origin


def move(rest: Rest, device: torch.device) -> None:
    """Let what has no memory yet be on a device."""
    rest.device = device
    for tensor in rest.tensors:
        if type(tensor) is Unwritten and tensor._record is rest and is_leaf(tensor):
            _exchange(tensor, _made(rest, tensor._region))


def memory_to_write(tensor: Unwritten) -> torch.Tensor | None:
    """Memory for somebody to write whole, by other means than torch's operators, and to call `wrote`; None on meta."""
    with lock, modes_off():
        rest = tensor._record
        return None if rest.device.type == "meta" else view_of(rest.with_memory(), tensor._region)


def wrote(tensor: Unwritten) -> None:
    """Note that all of a tensor's memory is written."""
    with lock, modes_off(), torch.no_grad():
        tensor._record.wrote(tensor._region)
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
        swap_in(tensor, view_of(rest.with_memory(), tensor._region))


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


def rest_of(tensor: Unwritten) -> Rest:
    """What a tensor stands for, all of it or a part."""
    return tensor._record


def region_of(tensor: Unwritten) -> Region | None:
    """The part of that which the tensor shows; None: all of it, in its order."""
    return tensor._region


def readable(tensor: Unwritten, what: str = "") -> torch.Tensor:
    """The memory of a tensor whose elements are written; any other one is refused, for a reason of the caller's."""
    rest, region = tensor._record, tensor._region
    if not rest.origin.reads_nan and not rest.has(region):
        # Zeros that somebody made of an unwritten tensor's shape and device are not in memory yet, that is all.
        if not rest.origin.zeros or rest.device.type == "meta":
            refuse(tensor, what)
        rest.materialize()
    return view_of(rest.with_memory(), region)

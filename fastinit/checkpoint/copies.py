"""The copies that a load makes, known before they are made: from tensors of a checkpoint to those of a model.

`Stored` stands for a tensor of a checkpoint in torch's own loading code. What of it can be streamed, and into which
memory, is decided here.

Private: it may change with any version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..execution import reserve
from ..layout import Box, Slices, Window, compose, contiguous_strides
from ..record.records import modes_off
from ..record.tensors import Placeholder, new_memory, take_memory
from ..record.unwritten import Unwritten, memory_of, wrote
from ..sharding import Held, cut, held, is_dtensor
from .files import Checkpoint
from .formats import Part
from .streaming import Transfer
from .values import narrows

# Elements that are compared at a time.
_CHUNK = 1 << 18

# Shorter rows of a file are cut from a mapping: each would be read by a call of its own.
_ROW_BYTES = 512


class Stored(torch.Tensor):
    """Stands for a tensor of a checkpoint, which is read when torch computes with it."""

    key: str
    _checkpoint: Checkpoint
    _slices: Slices | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(checkpoint: Checkpoint, name: str, slices: Slices | None = None) -> Stored:
        shape, dtype, _ = checkpoint.tensors[name]
        if slices is not None:
            shape = tuple(each.stop - each.start for each in slices)
        stored: Stored = torch.Tensor._make_wrapper_subclass(Stored, shape, dtype=dtype, device=torch.device("cpu"))
        stored._checkpoint, stored.key, stored._slices = checkpoint, name, slices
        return stored

    def read(self) -> torch.Tensor:
        whole = self._checkpoint.read(self.key)
        return whole if self._slices is None else whole[self._slices]

    def streamed_to(self, part: Held) -> Streamed | None:
        """The same as rows of a file; None if that is not what it is, or files cannot be streamed to where it goes."""
        found = []
        for stored, box in self._ranges(part):
            rows = box.rows
            short = rows is not None and rows.stride > rows.length and rows.length * self.dtype.itemsize < _ROW_BYTES
            if rows is None or short:
                return None
            found.append((stored, box, rows))
        complete = sum(rows.number * rows.length for *_, rows in found) == part.memory.numel()
        memory = _memory(part.memory) if complete else None
        if memory is None:
            return None
        transfers = []
        for stored, box, (number, length, stride, memory_stride) in found:
            place = memory.storage_offset() + box.memory_offset
            target = memory.as_strided((number, length), (memory_stride, 1), place)
            offset = stored.offset + box.index_offset * self.dtype.itemsize
            gaps = stride * self.dtype.itemsize if stride > length else 0
            transfers.append(Transfer(stored.file, offset, self.dtype, target, gaps))
        return Streamed(memory, transfers)

    def _ranges(self, part: Held) -> Iterator[tuple[Part, Box]]:
        """Where in each part of a file, and where in memory, what is held of this tensor lies."""
        for stored in self._checkpoint.parts(self.key):
            boxes = [stored.box]
            if self._slices is not None:
                window = Window(self._checkpoint.tensors[self.key].shape, tuple(each.start for each in self._slices))
                boxes = compose(stored.box, window.box(self.shape, contiguous_strides(self.shape)))
            for box, place in product(boxes, part.boxes):
                yield from ((stored, each) for each in compose(box, place))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def read(value: Any) -> Any:
            return value.read() if isinstance(value, Stored) else value

        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))


class Streamed(NamedTuple):
    """What of a copy is streamed, and into which memory."""

    memory: torch.Tensor
    transfers: list[Transfer]


class Copy(NamedTuple):
    """``target.copy_(source)``, of which this process makes its part."""

    target: torch.Tensor
    source: torch.Tensor
    part: Held

    @staticmethod
    def to(target: torch.Tensor, source: torch.Tensor) -> Copy:
        return Copy(target, source, held(target))

    @property
    def name(self) -> str:
        return self.source.key if isinstance(self.source, Stored) else "a value that a hook has computed"

    @property
    def nbytes(self) -> int:
        """What this process reads for it."""
        return self.part.memory.numel() * self.source.dtype.itemsize

    @property
    def narrows(self) -> bool:
        """Whether there are finite values that the target cannot hold."""
        return narrows(self.source.dtype, self.target.dtype)

    @property
    def holds_values(self) -> bool:
        """Whether the target has values that may have to stay, or reads as NaN."""
        memory = self.part.memory
        if type(memory) is Unwritten:
            return memory._record.memory is not None or memory._record.origin.reads_nan
        return type(memory) is not Placeholder

    def whole(self) -> torch.Tensor:
        return self.source.read() if isinstance(self.source, Stored) else self.source

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """What this process holds of the source's values."""
        return whole if self.part.is_whole or is_dtensor(whole) else cut(whole, self.part)

    def values(self) -> torch.Tensor:
        return self.part_of(self.whole())

    def agrees_with(self, other: Copy) -> bool:
        """Whether two copies into one tensor leave the same bits there."""
        dtype, values = self.target.dtype, (self.whole(), other.whole())
        # torch.save stores tied tensors once.
        if values[0].data_ptr() == values[1].data_ptr() and values[0].dtype == values[1].dtype:
            return True
        pairs = zip(values[0].reshape(-1).split(_CHUNK), values[1].reshape(-1).split(_CHUNK), strict=True)
        return all(torch.equal(*(each.to(dtype).view(torch.uint8) for each in pair)) for pair in pairs)


class CopyMode(TorchFunctionMode):
    """Hands every ``tensor.copy_(source)`` to a function that makes it, or makes it later."""

    def __init__(self, copy: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self._copy = copy

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.copy_ and len(args) == 2 and not kwargs and isinstance(args[1], torch.Tensor):
            self._copy(*args)
            return args[0]
        return func(*args, **(kwargs or {}))


# Memory of targets


def is_plain(tensor: torch.Tensor) -> bool:
    return (
        not nn.parameter.is_lazy(tensor)
        and tensor.layout == torch.strided
        and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )


def _memory(tensor: torch.Tensor) -> torch.Tensor | None:
    """Memory that files can be streamed into: the tensor's, or what a placeholder gets when all of it is there."""
    if tensor.device.type not in ("cpu", "cuda"):
        return None
    if type(tensor) is Placeholder:
        return new_memory(tensor)
    ordinary = is_plain(tensor) and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
    memory = memory_of(tensor) if type(tensor) is Unwritten else tensor.detach() if ordinary else None
    return memory if memory is not None and memory.is_contiguous() else None


def give(tensor: torch.Tensor, memory: torch.Tensor) -> None:
    """Let a tensor without values have `_memory` of it, which has been written."""
    if type(tensor) is Placeholder:
        take_memory(tensor, memory)
    elif type(tensor) is Unwritten:
        wrote(tensor)


def make_room(tensors: list[torch.Tensor]) -> None:
    """Make room at once for what will get memory."""
    sizes: dict[torch.device, list[int]] = {}
    for tensor in tensors:
        if type(tensor) is Unwritten:
            sizes.setdefault(tensor.device, []).append(tensor.nbytes)
    for device, each in sizes.items():
        reserve(each, device)


def extent_of(tensor: torch.Tensor) -> tuple[Any, int, int]:
    """Which memory a tensor lies in, and from which to which byte."""
    with modes_off():
        if not is_plain(tensor) or not tensor.numel():
            return (id(tensor),), 0, 0
        size = tensor.element_size()
        steps = zip(tensor.size(), tensor.stride(), strict=True)
        start = tensor.storage_offset() * size
        end = start + (1 + sum((extent - 1) * stride for extent, stride in steps)) * size
        return (tensor.device, tensor.untyped_storage().data_ptr()), int(start), int(end)

"""Which part of a global tensor a local memory holds: shapes, offsets and boxes, without torch.

A `Box` places some elements of one row-major numbering in another. The same form says where a part of a tensor lies in
local memory (a window, a shard, a flat slice) and which elements of a tensor a stream of values goes to (the region of
a write), and `compose` chains the two.

Private: it may change with any version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple


class Rows(NamedTuple):
    """Elements that lie in rows, both in a sequence and in memory.

    Attributes:
        number: of rows.
        length: of each, in elements.
        stride: from one row's first element to the next one's in the sequence.
        memory_stride: the same in memory.
    """

    number: int
    length: int
    stride: int
    memory_stride: int


class Box(NamedTuple):
    """A rectangle of elements of a row-major sequence, and their places in a memory; all numbers are in elements.

    The element at multi-index m is element ``index_offset + sum(m * index_strides)`` of the sequence and lies at
    ``memory_offset + sum(m * memory_strides)``. Strides are positive where the size is above 1.

    Example:
        >>> Window((8, 6), start=(2, 0)).box(sizes=(2, 6), strides=(6, 1))
        Box(index_offset=12, sizes=(2, 6), index_strides=(6, 1), memory_offset=0, memory_strides=(6, 1))
    """

    index_offset: int
    sizes: tuple[int, ...]
    index_strides: tuple[int, ...]
    memory_offset: int
    memory_strides: tuple[int, ...]

    @property
    def rows(self) -> Rows | None:
        """The same as rows, if that is what it is.

        Example:
            >>> Window((8, 6), start=(2, 4)).box(sizes=(3, 2), strides=(2, 1)).rows
            Rows(number=3, length=2, stride=6, memory_stride=2)
        """
        dims = _ordered(self.sizes, self.index_strides, self.memory_strides)
        length = dims.pop()[0] if dims and dims[-1][1:] == (1, 1) else 1
        if not dims:
            return Rows(1, length, length, length)
        (number, stride, memory_stride), *others = dims
        return None if others else Rows(number, length, stride, memory_stride)


def flat_box(begin: int, end: int) -> Box:
    """Elements [begin, end) of a row-major tensor of any shape, one after the other from the start of memory.

    Example:
        >>> flat_box(10, 15)
        Box(index_offset=10, sizes=(5,), index_strides=(1,), memory_offset=0, memory_strides=(1,))
    """
    return Box(begin, (max(end - begin, 0),), (1,), 0, (1,))


@dataclass(frozen=True, slots=True)
class Window:
    """A box of a larger, row-major tensor; the local tensor's shape gives its extent.

    Args:
        shape: sizes of the global tensor.
        start: index in the global tensor of the window's first element, one per dimension.

    Raises:
        ValueError: if the lengths differ, or a size or a start is negative.

    Example:
        >>> Window(shape=(1024, 512), start=(256, 0)).check((256, 512))
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        object.__setattr__(self, "start", tuple(int(first) for first in self.start))
        if len(self.shape) != len(self.start):
            raise ValueError(
                f"window: shape={self.shape} and start={self.start} must have the same number of dimensions"
            )
        if any(size < 0 for size in self.shape) or any(first < 0 for first in self.start):
            raise ValueError(f"window: shape={self.shape} and start={self.start} must not be negative")

    def check(self, sizes: Sequence[int]) -> None:
        """Raise ValueError unless a local tensor of these sizes lies inside the global tensor."""
        if len(sizes) != len(self.shape) or any(
            first + size > total for first, size, total in zip(self.start, sizes, self.shape, strict=True)
        ):
            raise ValueError(
                f"window: a tensor of shape {tuple(sizes)} at start={self.start} does not fit into the "
                f"global shape {self.shape}; pass the global shape and the offset of this tensor in it"
            )

    @property
    def index_strides(self) -> tuple[int, ...]:
        """Row-major strides of the global tensor, in elements."""
        return contiguous_strides(self.shape)

    @property
    def index_offset(self) -> int:
        """Row-major index in the global tensor of the window's first element."""
        return sum(first * stride for first, stride in zip(self.start, self.index_strides, strict=True))

    def box(self, sizes: Sequence[int], strides: Sequence[int], memory_offset: int = 0) -> Box:
        """The window of these sizes in local memory: its first element at the offset, the others by the strides.

        Raises:
            ValueError: if a window of these sizes does not fit into the global tensor.
        """
        self.check(sizes)
        return Box(self.index_offset, tuple(sizes), self.index_strides, memory_offset, tuple(strides))


Slices = tuple[slice, ...]


def slices_of(window: Callable[..., Any], name: str, shape: tuple[int, ...], caller: str) -> Slices | None:
    """What a user's ``window(name, shape)`` returned: slices with a start and a stop, or None for the whole.

    Raises:
        ValueError: it is neither.
    """
    slices = window(name, shape)
    if slices is None:
        return None
    fits = isinstance(slices, tuple) and len(slices) == len(shape) and all(isinstance(cut, slice) for cut in slices)
    if not fits or any(cut.step not in (None, 1) for cut in slices):
        raise ValueError(
            f"{caller}: window({name!r}, {shape}) returned {slices!r}; return a tuple of {len(shape)} slices with a "
            "step of 1, or None for the whole"
        )
    ranges = [cut.indices(size) for cut, size in zip(slices, shape, strict=True)]
    return tuple(slice(first, max(first, last)) for first, last, _ in ranges)


def whole_box(sizes: Sequence[int], strides: Sequence[int]) -> Box:
    """All elements of a row-major tensor, in a memory of these strides.

    Example:
        >>> whole_box((2, 3), (1, 2))
        Box(index_offset=0, sizes=(2, 3), index_strides=(3, 1), memory_offset=0, memory_strides=(1, 2))
    """
    return Box(0, tuple(sizes), contiguous_strides(sizes), 0, tuple(strides))


def contiguous_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of a tensor of these sizes, in elements (torch's convention for empty dimensions)."""
    strides = []
    step = 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def numel(sizes: Sequence[int]) -> int:
    """Number of elements of a tensor of these sizes."""
    return prod(sizes)


# --- Boxes composed -------------------------------------------------------------------------------------------------


def compose(first: Box, second: Box) -> list[Box]:
    """Boxes that place the sequence of `first` in the memory of `second`, where the memory of `first` is the sequence
    of `second`: with a stream placed in a tensor, and that tensor in local memory, the stream placed in local memory.

    Both must be nested: the elements of an inner dimension end before the next one of the outer dimension begins, by
    the strides of the numbering that the boxes share. `nested_parts` gives such boxes.

    Returns:
        Disjoint boxes, in no particular order; none if nothing is common. Rectangles of one tensor meet in one box, and
        a flat slice meets a rectangle of n dimensions in at most 2 n - 1. A diagonal and a column, say, which have no
        grid in common, meet in one box for each element.

    Example:
        >>> column = Box(index_offset=0, sizes=(8,), index_strides=(1,), memory_offset=3, memory_strides=(6,))
        >>> compose(column, flat_box(20, 40))
        [Box(index_offset=3, sizes=(4,), index_strides=(1,), memory_offset=1, memory_strides=(6,))]
    """
    if 0 in first.sizes or 0 in second.sizes:
        return []
    return [
        Box(
            first.index_offset + index,
            tuple(size for size, _, _ in dims),
            tuple(stride for _, stride, _ in dims),
            second.memory_offset + memory,
            tuple(stride for _, _, stride in dims),
        )
        for dims, index, memory in _meet(
            _ordered(first.sizes, first.memory_strides, first.index_strides),
            _ordered(second.sizes, second.index_strides, second.memory_strides),
            second.index_offset - first.memory_offset,
        )
    ]


def nested_parts(box: Box) -> Iterator[Box]:
    """The box, or parts of it in the order of their indices, each with distinct places and fit for `compose`.

    Only a view that steps over its own elements (``as_strided``, ``unfold``) has more than one part. Where parts share
    a place, the later one is the one that lasts.
    """
    inner = 0
    for size, stride, _ in reversed(_ordered(box.sizes, box.memory_strides, box.index_strides)):
        if stride <= inner:
            break
        inner += (size - 1) * stride
    else:
        yield box
        return
    for row in _rows(box):
        yield from nested_parts(row)


def with_dims(box: Box, most: int) -> Iterator[Box]:
    """The box, or parts of it, each of so many dimensions at most."""
    if len(box.sizes) <= most:
        yield box
        return
    for row in _rows(box):
        yield from with_dims(row, most)


def _rows(box: Box) -> Iterator[Box]:
    """The parts of a box at each place of its first dimension."""
    index_offset, sizes, index_strides, memory_offset, memory_strides = box
    for i in range(sizes[0]):
        yield Box(
            index_offset + i * index_strides[0],
            sizes[1:],
            index_strides[1:],
            memory_offset + i * memory_strides[0],
            memory_strides[1:],
        )


# A dimension: its size, its stride in the numbering that two boxes share, and its stride in the box's other numbering.
_Dim = tuple[int, int, int]


def _ordered(sizes: Sequence[int], shared: Sequence[int], other: Sequence[int]) -> list[_Dim]:
    """Dimensions by falling shared stride, neighbours merged where both strides allow it; no size is 1."""
    dims: list[_Dim] = []
    for dim in sorted(zip(sizes, shared, other, strict=True), key=lambda dim: -dim[1]):
        size, stride, value = dim
        if size == 1:
            continue
        if dims and dims[-1][1:] == (size * stride, size * value):
            dim = (dims.pop()[0] * size, stride, value)
        dims.append(dim)
    return dims


def _span(dims: list[_Dim]) -> int:
    return sum((size - 1) * stride for size, stride, _ in dims)


def _meet(x: list[_Dim], y: list[_Dim], gap: int) -> Iterator[tuple[list[_Dim], int, int]]:
    """Elements with one shared number, if y's first element is `gap` behind x's first.

    Yields the dimensions of a rectangle as (size, stride in x's numbering, stride in y's), and the numbers of its first
    element relative to the first of x and of y.
    """
    if y and (not x or y[0][1] > x[0][1]):
        for dims, in_y, in_x in _meet(y, x, -gap):
            yield [(size, b, a) for size, a, b in dims], in_x, in_y
        return
    if not x:
        if gap == 0:
            yield [], 0, 0
        return
    # x is a row of slots and y one of pieces, an element of the outermost dimension each; y reaches the slots from low
    # to high.
    (count, stride, value), slot = x[0], x[1:]
    slot_span = _span(slot)
    low = max(-((slot_span - gap) // stride), 0)
    high = min((gap + _span(y)) // stride, count - 1)
    if low < high:
        (pieces, step, y_value), piece = y[0], y[1:]
        piece_span = _span(piece)
        per_slot, uneven = divmod(stride, step)
        if step == stride:
            # Piece j meets slot j + shift. There are two shifts if pieces lie across the beginnings of slots.
            for shift in range(-((slot_span - gap) // stride), (gap + piece_span) // stride + 1):
                first, last = max(shift, 0), min(count, pieces + shift) - 1
                if first <= last:
                    outer = [(last - first + 1, value, y_value)] if first < last else []
                    for dims, in_x, in_y in _meet(slot, piece, gap - shift * stride):
                        yield outer + dims, in_x + first * value, in_y + (first - shift) * y_value
            return
        if not uneven and pieces > per_slot:
            # Make a dimension of the pieces that meet one slot each. Cut y before the first piece that ends in a slot,
            # or behind its beginning: there is what comes before, as many pieces as a slot meets for each slot that
            # has all of them, and what is left.
            head = -((gap + piece_span) // step) % per_slot
            behind = (gap + piece_span + head * step) % stride
            meeting = min(max((slot_span + piece_span - behind) // step + 1, 1), per_slot)
            slots = max((pieces - head - meeting) // per_slot + 1, 0)
            rest = head + slots * per_slot
            rows = [(slots, stride, y_value * per_slot)] if slots > 1 else []
            for at, size, outer in ((0, head, []), (head, meeting if slots else 0, rows), (rest, pieces - rest, [])):
                if size > 0:
                    inner = [(size, step, y_value), *piece] if size > 1 else piece
                    for dims, in_x, in_y in _meet(x, outer + inner, gap + at * step):
                        yield dims, in_x, in_y + at * y_value
            return
    for i in range(low, high + 1):
        for dims, in_x, in_y in _meet(slot, y, gap - i * stride):
            yield dims, in_x + i * value, in_y

"""Which part of a global tensor a local tensor holds: shapes and offsets, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


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

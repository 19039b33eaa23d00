"""Which elements of a storage are written, exactly, in memory that grows with the number of pieces alone.

Private: it may change with any version.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Runs:
    """Which elements of a storage are written: sorted, disjoint runs of them.

    Example:
        >>> runs = Runs()
        >>> runs.add(0, (2, 3), (6, 1))  # the left half of a tensor of 2 x 6
        >>> runs.cover(6, (3,), (1,)), runs.cover(0, (6,), (1,))
        (True, False)
    """

    def __init__(self) -> None:
        self._bounds = torch.empty((0, 2), dtype=torch.int64)

    def add(self, offset: int, sizes: Sequence[int], strides: Sequence[int]) -> None:
        """Add a region: its first element, sizes and strides, in elements."""
        self._unite(_runs(offset, sizes, strides))

    def add_places(self, places: torch.Tensor) -> None:
        """Add single elements."""
        self._unite(torch.stack((places, places + 1), 1))

    def cover(self, offset: int, sizes: Sequence[int], strides: Sequence[int]) -> bool:
        """Whether every element of a region is among them."""
        asked = _runs(offset, sizes, strides)
        if not len(asked) or not len(self._bounds):
            return not len(asked)
        index = torch.searchsorted(self._bounds[:, 0].contiguous(), asked[:, 0].contiguous(), right=True) - 1
        return bool(((index >= 0) & (self._bounds[index.clamp(min=0), 1] >= asked[:, 1])).all())

    def of(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """These elements of a contiguous tensor, as views of it."""
        return [memory.view(-1)[begin:end] for begin, end in self._bounds.tolist()]

    def _unite(self, more: torch.Tensor) -> None:
        bounds = torch.cat((self._bounds, more))
        bounds = bounds[bounds[:, 0].argsort()]
        ends = bounds[:, 1].cummax(0).values
        if len(bounds):
            # A run begins where none of those before it reaches.
            first = torch.cat((torch.ones(1, dtype=torch.bool), bounds[1:, 0] > ends[:-1]))
            last = torch.cat((first[1:], torch.ones(1, dtype=torch.bool)))
            self._bounds = torch.stack((bounds[first, 0], ends[last]), 1)


def _runs(offset: int, sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """The runs of a region, as rows of begin and end."""
    if 0 in sizes:
        return torch.empty((0, 2), dtype=torch.int64)
    dims = sorted((stride, size) for size, stride in zip(sizes, strides, strict=True) if size > 1)
    length = 1
    while dims and dims[0][0] <= length:
        stride, size = dims.pop(0)
        length += stride * (size - 1)
    begins = torch.full((1,), offset, dtype=torch.int64)
    for stride, size in dims:
        begins = (begins[:, None] + torch.arange(size) * stride).view(-1)
    return torch.stack((begins, begins + length), 1)

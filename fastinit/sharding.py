"""Where the local shard of a distributed tensor lies in the whole: from a DTensor's placements to boxes.

torch gives the offset of a shard's first element only, and that does not describe a shard of several runs, nor one that
FSDP2 cut from the uneven shards of tensor parallelism. So the rows of each dimension are followed here through the cuts
that made the shard. torch.distributed is imported by the functions that need it.

Private: it may change with any version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch

from .layout import Box, Window, flat_box

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


class Cut(NamedTuple):
    """A dimension's division among the ranks of one mesh axis, as `torch.chunk` divides it."""

    ranks: int
    rank: int
    groups: int = 1
    """The rows are first divided into so many groups, and each of them among the ranks: torch's ``split_factor``."""


def is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is distributed. A model can only have such tensors if somebody has imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class Held(NamedTuple):
    """What this process has of a tensor.

    Attributes:
        memory: its elements, without what is padding.
        shape: of the whole.
        boxes: where they lie in the whole and in memory, as `local_boxes` gives it; of a tensor that is not distributed
            one for all of it, as if it were contiguous.
    """

    memory: torch.Tensor
    shape: tuple[int, ...]
    boxes: list[Box]

    @property
    def is_whole(self) -> bool:
        return self.memory.shape == self.shape


def held(tensor: torch.Tensor) -> Held:
    """What this process has of a tensor, which may be a DTensor or a partition of DeepSpeed's ZeRO-3.

    Raises:
        ValueError: as `local_boxes`.
    """
    if is_partition(tensor):
        described: Any = tensor
        part, total = described.ds_tensor, int(described.ds_numel)
        begin = min(torch.distributed.get_rank(described.ds_process_group) * int(part.ds_numel), total)
        end = min(begin + int(part.ds_numel), total)
        return Held(part.detach()[: end - begin], tuple(described.ds_shape), [flat_box(begin, end)])
    boxes = local_boxes(tensor) if is_dtensor(tensor) else [flat_box(0, tensor.numel())]
    return Held(local_tensor(tensor), tuple(tensor.shape), boxes)


def is_partition(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter that ZeRO-3 has divided, of which this process has a slice and nothing else."""
    described: Any = tensor
    return getattr(tensor, "ds_tensor", None) is not None and described.ds_status.name == "NOT_AVAILABLE"


@contextmanager
def with_whole_shapes(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let partitions of ZeRO-3 have the shape of the whole meanwhile, which takes no memory and holds no values."""
    with torch._C.DisableTorchFunction():  # a block around it must not record this
        freed = [(tensor, tensor.data) for tensor in tensors if is_partition(tensor)]
        for tensor, data in freed:
            described: Any = tensor
            tensor.data = data.new_zeros(()).expand(described.ds_shape)
    try:
        yield
    finally:
        with torch._C.DisableTorchFunction():
            for tensor, data in freed:
                tensor.data = data


def why_not_written(tensor: torch.Tensor, own_code: str | None) -> str | None:
    """Why values that are written to what is `held` of a tensor would be lost; None if they are not."""
    if not is_partition(tensor):
        return None
    described: Any = tensor
    gather = "use load_state_dict inside of deepspeed.zero.GatheredParameters(..., modifier_rank=0)"
    if hasattr(tensor, "_z3_optimizer"):
        return "parameters under ZeRO-3, of which an optimizer has copies; load them before deepspeed.initialize"
    if described.ds_secondary_tensor is not None:
        return f"parameters under ZeRO-3 with hpZ, whose secondary partitions are not loaded; {gather}"
    if described.ds_tensor.final_location == "nvme":
        return f"parameters under ZeRO-3 that lie on NVMe, where nothing is loaded; {gather}"
    if own_code is not None:
        return f"parameters under ZeRO-3, while {own_code} is loading code of its own, for whole tensors; {gather}"
    return None


def cut(whole: torch.Tensor, part: Held) -> torch.Tensor:
    """What a process holds of the values of a whole tensor on the CPU; of a mapped one only that is touched."""
    values = torch.empty_strided(part.memory.shape, part.memory.stride(), dtype=whole.dtype, device="cpu")
    whole = whole.reshape(part.shape).contiguous()
    for index_offset, sizes, index_strides, memory_offset, memory_strides in part.boxes:
        place = values.as_strided(sizes, memory_strides, memory_offset)
        place.copy_(whole.as_strided(sizes, index_strides, whole.storage_offset() + index_offset))
    return values


def local_boxes(tensor: DTensor) -> list[Box]:
    """Where the elements of this rank's shard lie in the whole tensor and in the memory of ``tensor.to_local()``.

    Args:
        tensor: of any number of dimensions, on a mesh of any number of axes, each with the placement Replicate, Shard
            or the strided shard that FSDP2 over tensor parallelism makes; its data is not read, it may be on meta.

    Returns:
        Boxes whose ``index_offset`` counts the elements of the whole tensor in row-major order, and whose
        ``memory_offset`` those from the local tensor's first one. One box, but for a shard of several runs; none for an
        empty shard.

    Raises:
        ValueError: for another placement, such as Partial, or a local tensor that is not what the placements say.

    Example:
        >>> mesh = torch.distributed.init_device_mesh("cpu", (2,))  # doctest: +SKIP
        >>> weight = torch.distributed.tensor.empty(6, 4, device_mesh=mesh, placements=[Shard(0)])  # doctest: +SKIP
        >>> local_boxes(weight)  # on rank 1 # doctest: +SKIP
        [Box(index_offset=12, sizes=(3, 4), index_strides=(4, 1), memory_offset=0, memory_strides=(4, 1))]
    """
    mesh, local = tensor.device_mesh, local_tensor(tensor)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return []
    layout = (tuple(tensor.placements), tuple(mesh.shape), tuple(coordinate))
    return list(_boxes(tuple(tensor.shape), tuple(local.shape), local.stride(), *layout))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a distributed tensor, or the tensor; ``to_local()`` would make a view for autograd."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def is_on_meta(tensor: torch.Tensor) -> bool:
    """Whether a tensor, or this rank's shard of it, has no memory yet."""
    return local_tensor(tensor).is_meta


@lru_cache(maxsize=1024)  # the layers of a model are alike
def _boxes(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    placements: tuple[Placement, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> tuple[Box, ...]:
    cuts_of_dims = _cuts(shape, placements, mesh_shape, coordinate)
    runs = []
    for size, local_size, cuts in zip(shape, sizes, cuts_of_dims, strict=True):
        # A strided shard stands for a cut that was made later than the order of the mesh axes says: FSDP2 divides what
        # tensor parallelism has left. Where all divides evenly, following the axes in their order comes to the same.
        # Elsewhere FSDP2's shards are the one, those that `distribute_tensor` makes of strided placements the other,
        # and the local size tells them apart; where it does not, which is rare, they are taken for FSDP2's.
        for order in (_as_made(cuts), cuts):
            found = shard_runs(size, order)
            if sum(length for _, length in found) == local_size:
                runs.append(found)
                break
        else:
            raise ValueError(
                f"fastinit: the local tensor has shape {sizes}, but placements={placements} on a mesh of "
                f"shape {mesh_shape} do not give that to the rank at {coordinate} of a tensor of shape {shape}; "
                "build it with distribute_tensor, parallelize_module or fully_shard, or fill it by hand with a window"
            )
    boxes = []
    for combination in product(*(_with_places(each) for each in runs)):
        start = tuple(first for first, _, _ in combination)
        memory_offset = sum(place * stride for (_, _, place), stride in zip(combination, strides, strict=True))
        boxes.append(Window(shape, start).box([length for _, length, _ in combination], strides, memory_offset))
    return tuple(boxes)


def shard_runs(size: int, cuts: Sequence[Cut]) -> list[tuple[int, int]]:
    """Rows of a dimension that a rank holds after cuts, each of what the one before left: (first, length) of each run.

    Example:
        >>> shard_runs(10, [Cut(ranks=4, rank=1)])
        [(3, 3)]
        >>> shard_runs(8, [Cut(ranks=2, rank=1, groups=2)])
        [(2, 2), (6, 2)]
    """
    runs = [(0, size)] if size else []
    for ranks, rank, groups in cuts:
        total = sum(length for _, length in runs)
        pieces = []
        for group in range(groups):
            begin, end = _chunk(total, groups, group)
            first, last = _chunk(end - begin, ranks, rank)
            pieces += _slice(runs, begin + first, begin + last)
        runs = _joined(pieces)
    return runs


def _chunk(size: int, chunks: int, index: int) -> tuple[int, int]:
    """Begin and end of one of torch.chunk's pieces; the last ones may be smaller, or empty."""
    length = -(-size // chunks)
    return min(index * length, size), min((index + 1) * length, size)


def _slice(runs: Sequence[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    pieces, before = [], 0
    for first, length in runs:
        low, high = max(begin - before, 0), min(end - before, length)
        if low < high:
            pieces.append((first + low, high - low))
        before += length
    return pieces


def _joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, length in runs:
        if joined and sum(joined[-1]) == first:
            first, before = joined.pop()
            length += before
        joined.append((first, length))
    return joined


def _with_places(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Runs as (first, length, place in the local dimension)."""
    return [(*run, sum(length for _, length in runs[:i])) for i, run in enumerate(runs)]


def _cuts(
    shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> list[list[Cut]]:
    """For each dimension the cuts of the mesh axes that divide it, in the order of the axes."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    cuts: list[list[Cut]] = [[] for _ in shape]
    for placement, ranks, rank in zip(placements, mesh_shape, coordinate, strict=True):
        # The type itself: what a subclass adds (padding, ragged rows) is not known here.
        if type(placement) is _StridedShard:
            cuts[placement.dim].append(Cut(ranks, rank, int(placement.split_factor)))
        elif type(placement) is Shard:
            cuts[placement.dim].append(Cut(ranks, rank))
        elif type(placement) is not Replicate:
            raise ValueError(
                f"fastinit: placements={tuple(placements)} contain {placement!r}, which has no elements of its own to "
                "fill; initialize the tensor as Shard or Replicate and redistribute it afterwards"
            )
    return cuts


def _as_made(cuts: Sequence[Cut]) -> list[Cut]:
    """The cuts in the order in which they were made, none of them strided, where split factors tell it.

    A strided shard of as many groups as later axes have made pieces was cut after them.
    """
    made: list[Cut] = []
    for cut in reversed(cuts):
        for position in range(len(made) + 1):
            if prod(other.ranks for other in made[:position]) == cut.groups:
                made.insert(position, Cut(cut.ranks, cut.rank))
                break
        else:
            return list(cuts)
    return made

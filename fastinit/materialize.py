"""Recipes carried out: fills collected into native batches, one per device and order, and run there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import native
from .layout import Box, compose, contiguous_strides, nested_parts, with_dims
from .native import CONSTANT, TRUNCATED_NORMAL
from .recipe import Region, Write, canonical

DTYPES = {torch.float32: native.FLOAT32, torch.float16: native.FLOAT16, torch.bfloat16: native.BFLOAT16}

# From here on a CPU tensor is worth huge pages: it is touched first by its fill, one page fault for each 4 KiB else.
_HUGE_PAGES_FROM = 8 << 20


def can_fill(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether native fills reach tensors of this dtype and device in this build."""
    return dtype in DTYPES and (device.type == "cpu" or (device.type == "cuda" and native.build_info()["cuda"]))


def allocate(shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised contiguous tensor from torch's allocator; huge pages are advised for large CPU ones.

    Raises:
        torch.OutOfMemoryError, RuntimeError: torch's own, with the shape, dtype, device and a remedy in front.
    """
    try:
        tensor = torch.empty(shape, dtype=dtype, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise type(error)(
            f"no memory for a tensor of shape {tuple(shape)} and dtype {dtype} on device={str(device)!r}: "
            f"choose a smaller dtype or model, free memory, or create it as shards. {error}"
        ) from error
    if tensor.nbytes >= _HUGE_PAGES_FROM and device.type == "cpu":
        native.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


# What native.Batch.add_region takes.
_MAX_DIMS = 8

_ZEROS = Write(CONSTANT, (0.0,))


class Fills:
    """Writes to tensors of one device that wait to be carried out together.

    The fills of one batch run in no particular order, so the second write of a tensor waits in a second batch.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._batches: list[native.Batch] = []
        self.count = 0

    def add(self, data_ptr: int, numel: int, dtype: torch.dtype, recipe: tuple[Write, ...]) -> None:
        """Add a recipe for the contiguous tensor of numel elements at data_ptr."""
        order = 0
        for write in recipe:
            if write.region is None:
                kind, parameters, stream, steps, _ = write
                if steps or kind == TRUNCATED_NORMAL:
                    kind, parameters, steps = canonical(kind, parameters, steps)
                self._batch(order).add(data_ptr, numel, DTYPES[dtype], kind, parameters, self._seed, stream, steps)
                order += 1
            else:
                for part in nested_parts(_region_box(write.region)):
                    self._add_boxes(order, data_ptr, dtype, write, [part])
                    order += 1
        self.count += len(recipe)

    def add_part(self, data_ptr: int, dtype: torch.dtype, recipe: tuple[Write, ...], boxes: Sequence[Box]) -> None:
        """Add a recipe for the part of a tensor that is held at data_ptr: the bits that the whole tensor has there.

        Args:
            data_ptr: address that the boxes' memory counts from.
            dtype: element type there; a key of `DTYPES`.
            recipe: that of the whole tensor. What it leaves out becomes zero, as in the whole tensor.
            boxes: where elements of the row-major whole tensor lie; disjoint in memory. Memory outside of them, such
                as the padding of a last slice, is not touched.
        """
        order = 0
        for write in recipe if recipe and recipe[0].region is None else (_ZEROS, *recipe):
            if write.region is None:
                self._add_boxes(order, data_ptr, dtype, write, boxes)
                order += 1
                continue
            for part in nested_parts(_region_box(write.region)):
                if common := [piece for box in boxes for piece in compose(part, box)]:
                    self._add_boxes(order, data_ptr, dtype, write, common)
                    order += 1
        self.count += len(recipe)

    def _batch(self, order: int) -> native.Batch:
        while order >= len(self._batches):
            self._batches.append(native.Batch())
        return self._batches[order]

    def _add_boxes(self, order: int, data_ptr: int, dtype: torch.dtype, write: Write, boxes: Sequence[Box]) -> None:
        kind, parameters, steps = canonical(write.kind, write.parameters, write.steps)
        batch = self._batch(order)
        for box in boxes:
            for index_offset, sizes, index_strides, memory_offset, memory_strides in with_dims(box, _MAX_DIMS):
                batch.add_region(
                    data_ptr + memory_offset * dtype.itemsize,
                    DTYPES[dtype],
                    kind,
                    parameters,
                    self._seed,
                    write.stream,
                    steps,
                    index_offset,
                    sizes or (1,),
                    index_strides or (1,),
                    memory_strides or (1,),
                )

    def run(self) -> None:
        """Run every batch: on a GPU on its current stream, on the CPU with torch's number of threads."""
        for batch in self._batches:
            run_batch(batch, self._device)
        self._batches.clear()


def _region_box(region: Region) -> Box:
    """Where the stream of a write to a region goes in the tensor."""
    offset, sizes, strides = region
    return Box(0, sizes, contiguous_strides(sizes), offset, strides)


def run_batch(batch: native.Batch, device: torch.device) -> None:
    """Run a native batch whose tensors lie on this device."""
    if device.type == "cuda":
        batch.run_cuda(device.index, torch.cuda.current_stream(device).cuda_stream)
    else:
        batch.run_cpu(torch.get_num_threads())

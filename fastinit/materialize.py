"""Recipes carried out: fills collected into native batches, one per device and order, and run there."""

from __future__ import annotations

import torch

from . import native
from .layout import contiguous_strides
from .native import TRUNCATED_NORMAL
from .recipe import Write, canonical

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
        for order, write in enumerate(recipe):
            kind, parameters, stream, steps, region = write
            if order == len(self._batches):
                self._batches.append(native.Batch())
            if steps or kind == TRUNCATED_NORMAL:
                kind, parameters, steps = canonical(kind, parameters, steps)
            if region is None:
                self._batches[order].add(data_ptr, numel, DTYPES[dtype], kind, parameters, self._seed, stream, steps)
            else:
                self._add_region(self._batches[order], data_ptr, dtype, write, kind, parameters, steps)
        self.count += len(recipe)

    def _add_region(self, batch, data_ptr, dtype, write, kind, parameters, steps) -> None:
        offset, sizes, strides = write.region
        batch.add_region(
            data_ptr + offset * dtype.itemsize,
            DTYPES[dtype],
            kind,
            parameters,
            self._seed,
            write.stream,
            steps,
            0,
            sizes or (1,),
            contiguous_strides(sizes) or (1,),
            strides or (1,),
        )

    def run(self) -> None:
        """Run every batch: on a GPU on its current stream, on the CPU with torch's number of threads."""
        for batch in self._batches:
            run_batch(batch, self._device)
        self._batches.clear()


def run_batch(batch: native.Batch, device: torch.device) -> None:
    """Run a native batch whose tensors lie on this device."""
    if device.type == "cuda":
        batch.run_cuda(device.index, torch.cuda.current_stream(device).cuda_stream)
    else:
        batch.run_cpu(torch.get_num_threads())

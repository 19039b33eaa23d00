"""Recipes carried out: fills collected into native batches, one per device and order, and run there."""

from __future__ import annotations

import torch

from . import native
from .layout import contiguous_strides
from .recipe import Write, canonical

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# From here on a CPU tensor is worth huge pages: the first touch of 4 KiB pages costs more than filling them.
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
    """Writes waiting to be carried out together.

    The fills of one batch run in no particular order, so the second write of a tensor waits in a second batch.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._batches: dict[tuple[torch.device, int], native.Batch] = {}
        self.count = 0

    def add(
        self, data_ptr: int, numel: int, dtype: torch.dtype, device: torch.device, recipe: tuple[Write, ...]
    ) -> None:
        """Add a recipe for the storage at data_ptr, whose numel elements of this dtype lie on this device."""
        for order, write in enumerate(recipe):
            batch = self._batches.get((device, order))
            if batch is None:
                batch = self._batches[device, order] = native.Batch()
            kind, parameters, steps = canonical(write.kind, write.parameters, write.steps)
            if write.region is None:
                batch.add(data_ptr, numel, DTYPES[dtype], kind, parameters, self._seed, write.stream, steps)
            else:
                self._add_region(batch, data_ptr, dtype, write, kind, parameters, steps)
            self.count += 1

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
        for (device, _), batch in sorted(self._batches.items(), key=lambda item: item[0][1]):
            run_batch(batch, device)
        self._batches.clear()


def run_batch(batch: native.Batch, device: torch.device) -> None:
    """Run a native batch whose tensors lie on this device."""
    if device.type == "cuda":
        batch.run_cuda(device.index, torch.cuda.current_stream(device).cuda_stream)
    else:
        batch.run_cpu(torch.get_num_threads())

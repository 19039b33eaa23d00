"""Recipes carried out: fills collected into native batches, one per device and order, and run there.

What native fills do not reach is filled all the same: on devices of other kinds the values are computed on the host and
copied, and in fp64 torch draws them.

Private: it may change with any version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from . import native
from .layout import Box, compose, contiguous_strides, flat_box, nested_parts, numel, whole_box, with_dims
from .native import ADD, CLAMP, CONSTANT, DIVIDE, ERFINV, MULTIPLY, NORMAL, TRUNCATED_NORMAL, UNIFORM
from .recipe import CALLED, Region, Write, canonical, mix

# The dtypes of stream v1.
DTYPES = {torch.float32: native.FLOAT32, torch.float16: native.FLOAT16, torch.bfloat16: native.BFLOAT16}

# The types of devices whose memory native fills write. AMD's GPUs are "cuda" to torch, too.
NATIVE_DEVICES = {"cpu", "cuda"} if native.build_info()["cuda"] and not torch.version.hip else {"cpu"}

# From here on a CPU tensor has a huge page of its own, wherever it lies, and is worth asking for them: it is touched
# first by its fill, one page fault for each 4 KiB else.
_HUGE_PAGES_FROM = 4 << 20


def concrete(device: str | int | torch.device) -> torch.device:
    """A device with its index: ``cuda`` means the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def can_fill(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether random fills reach tensors of this dtype and device, by native code or by another way."""
    return (dtype in DTYPES or dtype == torch.float64) and device.type != "meta"


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether native fills reach tensors of this dtype and device in this build."""
    return dtype in DTYPES and device.type in NATIVE_DEVICES


def allocate(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    name_of: Callable[[], str | None] = lambda: None,
) -> torch.Tensor:
    """Uninitialized contiguous tensor from torch's allocator; huge pages are advised for large CPU ones.

    Raises:
        torch.OutOfMemoryError, RuntimeError: torch's own, with the name, shape, dtype, device and a remedy in front.
    """
    try:
        if torch.is_inference_mode_enabled():
            # What belongs to a model must not be an inference tensor because a checkpoint is loaded in that mode.
            with torch.inference_mode(False):
                tensor = torch.empty(shape, dtype=dtype, device=device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        name = name_of()
        raise type(error)(
            f"no memory for a tensor of shape {tuple(shape)} and dtype {dtype} on device={str(device)!r}"
            f"{f', {name}' if name else ''}: "
            f"choose a smaller dtype or model, free memory, or create it as shards. {error}"
        ) from error
    if tensor.nbytes >= _HUGE_PAGES_FROM and tensor.device.type == "cpu":
        native.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def reserve(sizes: Iterable[int], device: torch.device) -> None:
    """Let torch's allocator hold one free segment that the next allocations of these sizes are cut from.

    Freed memory stays in the allocator's cache, so this replaces one cudaMalloc per tensor by one in all. The sum is
    exact: nothing stays reserved and unused, and the peak does not exceed what the tensors take.
    """
    if device.type != "cuda":
        return
    # The allocator rounds to 512 bytes and serves up to 1 MiB from small segments of its own.
    needed = sum((size + 511) // 512 * 512 for size in sizes if size > 1 << 20)
    if needed <= 20 << 20:
        return
    stats = torch.cuda.memory.memory_stats_as_nested_dict(device)
    cached = stats["reserved_bytes"]["all"]["current"] - stats["allocated_bytes"]["all"]["current"]
    if needed <= cached:
        return
    try:
        torch.empty(needed, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        # Memory may still do in pieces; if it does not, the tensor that fails names itself.
        return


class Timing:
    """What giving tensors memory and values takes.

    Attributes:
        executed: number of fills.
        allocation, fills: host seconds for memory, and for running fills or enqueueing them.
        watched: somebody may ask how long a GPU took.
        events: pairs of events around what was enqueued there, if somebody may.
    """

    def __init__(self, watched: bool = False) -> None:
        self.watched = watched
        self.executed = 0
        self.allocation = 0.0
        self.fills = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Count what is done here as allocation, but for the fills that are run here."""
        began, filled = time.perf_counter(), self.fills
        yield
        self.allocation += time.perf_counter() - began - (self.fills - filled)

    def run(self, fills: Fills) -> None:
        """Run collected fills, and count them."""
        began = time.perf_counter()
        timed = self.watched and fills.device.type == "cuda" and fills.count
        if timed:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record(torch.cuda.current_stream(fills.device))
        fills.run()
        if timed:
            after.record(torch.cuda.current_stream(fills.device))
            self.events.append((before, after))
        self.executed += fills.count
        fills.count = 0
        self.fills += time.perf_counter() - began


# What native.Batch.add_region takes.
_MAX_DIMS = 8

_ZEROS = Write(CONSTANT, (0.0,))


class Fills:
    """Writes to tensors of one device that wait to be carried out together.

    The fills of one batch run in no particular order, so the second write of a tensor waits in a second batch.
    """

    def __init__(self, seed: int, device: torch.device, results: dict[int, list[torch.Tensor]] | None = None) -> None:
        self._seed = seed
        self._results = results
        self.device = device
        self._batches: list[native.Batch] = []
        self._others: list[Callable[[], None]] = []  # what native fills do not reach
        self.count = 0

    def add(self, data_ptr: int, numel: int, dtype: torch.dtype, recipe: tuple[Write, ...]) -> None:
        """Add a recipe for the contiguous tensor of numel elements at data_ptr."""
        order = 0
        for write in recipe:
            if write.region is None:
                kind, parameters, stream, steps, _, key = write
                if kind == TRUNCATED_NORMAL:
                    kind, parameters, steps = canonical(kind, parameters, steps)
                seed = self._seed if key is None else key
                self._batch(order).add(data_ptr, numel, DTYPES[dtype], kind, parameters, seed, stream, steps)
                order += 1
            else:
                for part in nested_parts(_region_box(write.region)):
                    self._add_boxes(order, data_ptr, dtype, write, [part])
                    order += 1
        self.count += len(recipe)

    def add_part(
        self,
        data_ptr: int,
        dtype: torch.dtype,
        recipe: tuple[Write, ...],
        boxes: Sequence[Box],
        *,
        zeros: bool = True,
    ) -> None:
        """Add a recipe for the part of a tensor that is held at data_ptr: the bits that the whole tensor has there.

        Args:
            data_ptr: address that the boxes' memory counts from.
            dtype: element type there; a key of `DTYPES`.
            recipe: that of the whole tensor.
            boxes: where elements of the row-major whole tensor lie; disjoint in memory. Memory outside of them, such
                as the padding of a last slice, is not touched.
            zeros: put them where the recipe leaves anything out.
        """
        order = 0
        if zeros and (not recipe or recipe[0].region is not None):
            self._add_boxes(order, data_ptr, dtype, _ZEROS, boxes)
            order += 1
        for write in recipe:
            if write.region is None:
                self._add_boxes(order, data_ptr, dtype, write, boxes)
                order += 1
                continue
            for part in nested_parts(_region_box(write.region)):
                if common := [piece for box in boxes for piece in compose(part, box)]:
                    self._add_boxes(order, data_ptr, dtype, write, common)
                    order += 1
        self.count += len(recipe)

    def write(
        self,
        memory: torch.Tensor,
        recipe: tuple[Write, ...],
        boxes: Sequence[Box] | None = None,
        *,
        zeros: bool = True,
        elements: int | None = None,
    ) -> None:
        """Give a tensor the values of a recipe.

        Args:
            memory: of any dtype and device that the recipe's fills reach.
            recipe: of the whole tensor.
            boxes: the places of the whole tensor's elements, relative to the first element of memory; None: all of them
                in their order. Elements outside of the boxes keep what they have.
            zeros: put them where the recipe leaves anything out.
            elements: how many the whole tensor has, if there are boxes.
        """
        if recipe and recipe[0].kind == CALLED:
            call, index, strides = recipe[0].parameters
            # Calls share operands within a recipe; whole tensors are not kept for longer.
            results = call.results(self._seed, {} if self._results is None else self._results)
            copy_part(_in_storage_order(results[index], strides), memory, boxes)
            self.count += 1
            recipe, zeros = recipe[1:], False
        if boxes is None and not memory.is_contiguous():
            boxes, elements = [whole_box(memory.shape, memory.stride())], memory.numel()
        if not is_native(memory.dtype, memory.device):
            self.count += len(recipe)
            memory = memory.detach()
            if boxes is None:
                if zeros and not recipe:
                    memory.zero_()  # also where torch can make no number of that dtype
                    return
                boxes, elements = [flat_box(0, memory.numel())], memory.numel()
            if memory.dtype in DTYPES:
                write = partial(_write_in_pieces, memory, recipe, boxes, self._seed, zeros)
            else:
                assert elements is not None
                write = partial(_write_by_torch, memory, recipe, boxes, self._seed, zeros, elements)
            self._others.append(write)
        elif boxes is not None:
            self.add_part(memory.data_ptr(), memory.dtype, recipe, boxes, zeros=zeros)
        else:
            if zeros and (not recipe or recipe[0].region is not None):
                memory.zero_()
            self.add(memory.data_ptr(), memory.numel(), memory.dtype, recipe)

    def give_memory(self, records: list[Any], start: int, given: list[Any], limit: int) -> tuple[int, int]:
        """Give records of this device memory, from number `start` on, and add their fills, or copy their values.

        Stops before one that is not plain, or once fills are of `limit` bytes.

        Returns:
            The number of the next record, and the bytes that are filled; `given` gets each record, and behind it its
            memory.
        """
        if self.device.type not in NATIVE_DEVICES:
            return start, 0
        largest = _HUGE_PAGES_FROM - 1 if self.device.type == "cpu" else 2**63
        done, nbytes, count = native.give_memory(records, start, given, self._batch(0), self._seed, largest, limit)
        self.count += count
        return done, nbytes

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
                    self._seed if write.key is None else write.key,
                    write.stream,
                    steps,
                    index_offset,
                    sizes or (1,),
                    index_strides or (1,),
                    memory_strides or (1,),
                )

    def run(self) -> None:
        """Run every batch: on a GPU on its current stream, on the CPU with torch's number of threads.

        Raises:
            RuntimeError: the stream is being captured into a CUDA graph.
        """
        refuse_capture(self.device)
        self.run_or_be_captured()

    def run_or_be_captured(self) -> None:
        """Run every batch, also where that is to be part of a CUDA graph."""
        for batch in self._batches:
            if self.device.type == "cuda":
                batch.run_cuda(self.device.index, torch.cuda.current_stream(self.device).cuda_stream)
            else:
                batch.run_cpu(torch.get_num_threads())
        for write in self._others:
            write()
        self._batches.clear()
        self._others.clear()


def refuse_capture(device: torch.device) -> None:
    """Raise while this device's current stream is captured: replays would write the model's values, not this."""
    # A process that has not used CUDA captures nothing, and to ask would initialize it.
    if device.type == "cuda" and torch.cuda.is_initialized():
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "fastinit: the values of a model cannot be written while a CUDA graph is being captured: now they "
                    "would stay unwritten, and each replay would write them anew. Create and initialize the model "
                    "before the capture"
                )


def _region_box(region: Region) -> Box:
    """Where the stream of a write to a region goes in the tensor."""
    offset, sizes, strides = region
    return Box(0, sizes, contiguous_strides(sizes), offset, strides)


def _in_storage_order(values: torch.Tensor, strides: Sequence[int] | None) -> torch.Tensor:
    """The elements as they lie in a storage of these strides; None: in their own order."""
    if strides is None:
        return values
    laid_out = torch.empty_strided(values.shape, strides, dtype=values.dtype).copy_(values)
    return laid_out.as_strided((values.numel(),), (1,))


def copy_part(values: torch.Tensor, memory: torch.Tensor, boxes: Sequence[Box] | None) -> None:
    """Copy from a whole tensor, or a number without dimensions for all of it, what another tensor holds of it."""
    if boxes is None:
        memory.copy_(values.reshape(memory.shape))
        return
    values, start = values.contiguous(), memory.storage_offset()
    for index_offset, sizes, index_strides, memory_offset, memory_strides in boxes:
        part = memory.as_strided(sizes, memory_strides, start + memory_offset)
        part.copy_(values.as_strided(sizes, index_strides, index_offset) if values.dim() else values)


# --- what native fills do not reach ---------------------------------------------------------------------------------

# Host memory for values of a tensor that is on a device of another kind.
_PIECE_BYTES = 16 << 20

_HOST = torch.device("cpu")


def _write_in_pieces(
    memory: torch.Tensor, recipe: tuple[Write, ...], boxes: Sequence[Box], seed: int, zeros: bool
) -> None:
    """`Fills.write` for a device without native fills: the values are computed on the host, and copied."""
    end = max((_end_in_memory(box) for box in boxes), default=0)
    step = min(_PIECE_BYTES // memory.element_size(), end)
    host = torch.empty(step, dtype=memory.dtype, device=_HOST)
    for begin in range(0, end, max(step, 1)):
        piece = host[: min(step, end - begin)]
        parts = [part for box in boxes for part in compose(box, flat_box(begin, begin + piece.numel()))]
        if not parts:
            continue
        target = memory.as_strided(piece.shape, (1,), memory.storage_offset() + begin)
        if not zeros or sum(numel(part.sizes) for part in parts) < piece.numel():
            piece.copy_(target)  # what nothing writes stays
        fills = Fills(seed, _HOST)
        fills.add_part(piece.data_ptr(), memory.dtype, recipe, parts, zeros=zeros)
        fills.run()
        target.copy_(piece)


def _end_in_memory(box: Box) -> int:
    if 0 in box.sizes:
        return 0
    strides = zip(box.sizes, box.memory_strides, strict=True)
    return box.memory_offset + 1 + sum((size - 1) * stride for size, stride in strides)


def _write_by_torch(
    memory: torch.Tensor, recipe: tuple[Write, ...], boxes: Sequence[Box], seed: int, zeros: bool, elements: int
) -> None:
    """`Fills.write` for a dtype without native fills: each fill is drawn whole by torch, on the host, and copied."""
    if zeros and (not recipe or recipe[0].region is not None):
        recipe = (_ZEROS, *recipe)
    for write in recipe:
        region = write.region or Region(0, (elements,), (1,))
        values = _drawn(write, numel(region.sizes), memory.dtype, seed)
        for part in nested_parts(_region_box(region)):
            for box in boxes:
                copy_part(values, memory, compose(part, box))


def _drawn(write: Write, count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """The values of a fill, by torch's CPU generator, seeded from the key and the stream; one for all of a constant."""
    kind, parameters, stream, steps, _, key = write
    with torch._C.DisableTorchFunction():
        if kind == CONSTANT:
            values = torch.full((), parameters[0], dtype=dtype, device=_HOST)
        else:
            values = torch.empty(count, dtype=dtype, device=_HOST)
            generator = torch.Generator("cpu").manual_seed(mix(seed if key is None else key, stream))
            _DRAWS[kind](values, *parameters, generator=generator)
        for op, a, b in steps:
            _STEPS[op](values, a, b)
    return values


_DRAWS: dict[int, Callable[..., Any]] = {
    UNIFORM: torch.Tensor.uniform_,
    NORMAL: torch.Tensor.normal_,
    TRUNCATED_NORMAL: torch.nn.init.trunc_normal_,
}

_STEPS: dict[int, Callable[[torch.Tensor, float, float], Any]] = {
    MULTIPLY: lambda values, a, b: values.mul_(a),
    ADD: lambda values, a, b: values.add_(a),
    DIVIDE: lambda values, a, b: values.div_(a),
    CLAMP: lambda values, a, b: values.clamp_(a, b),
    ERFINV: lambda values, a, b: values.erfinv_(),
}

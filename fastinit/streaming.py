"""Tensors streamed from files into memory: several reads are in flight while what has arrived is copied and converted.

Threads read, the calling thread does all the rest. What agrees in dtype with a tensor on the CPU is read straight into
it. All else passes through a ring of buffers, for a GPU in pinned memory: from there it is copied to the GPU on a side
stream, and converted there. No file is mapped, so that one which shrinks is an error and not a crash.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Copying from the page cache keeps several cores busy before memory is the limit; a disk wants reads in flight.
_READERS = 16
# There is a buffer of this size for each reader, and for a GPU another one, which waits for its copy to be done.
_CHUNK_BYTES = 4 << 20

# Smaller tensors that lie this close in a file are read together.
_SMALL_BYTES = 1 << 20
_GAP_BYTES = 64 << 10


class StoredFile(NamedTuple):
    """A file as it was when its metadata was read."""

    path: Path
    version: tuple[int, ...]

    @staticmethod
    def at(path: Path) -> StoredFile:
        return StoredFile(path, _version(os.stat(path)))

    def read(self, offset: int, memory: ctypes.Array[ctypes.c_ubyte]) -> None:
        """Fill memory from the offset on.

        Raises:
            OSError: the file is gone, cannot be read, or is not what it was.
        """
        with open(self.path, "rb", buffering=0) as file:
            if _version(os.fstat(file.fileno())) != self.version:
                raise OSError(f"{str(self.path)!r} has changed since its metadata was read")
            file.seek(offset)
            view, done = memoryview(memory), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise OSError(f"{str(self.path)!r} ends at byte {offset + done} while it is being read")
                done += count


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Transfer(NamedTuple):
    """Values that a file holds, and the tensor that gets them.

    Attributes:
        file: where they are.
        offset: of the first one, in bytes. The others follow in row-major order, in the byte order of this machine.
        dtype: theirs.
        target: a contiguous tensor of as many elements, on the CPU or a CUDA device, of any dtype.
    """

    file: StoredFile
    offset: int
    dtype: torch.dtype
    target: torch.Tensor


class _Piece(NamedTuple):
    """Some elements of a target, and where in its chunk their values begin."""

    position: int
    dtype: torch.dtype
    target: torch.Tensor


@dataclass(slots=True)
class _Chunk:
    """What is read at a time: a range of a file, with the pieces that lie in it, all for one device."""

    file: StoredFile
    offset: int
    nbytes: int
    device: torch.device
    pieces: list[_Piece]

    @property
    def is_direct(self) -> bool:
        """Whether the file has the very bytes of memory that a read can reach."""
        piece = self.pieces[0]
        return self.device.type == "cpu" and len(self.pieces) == 1 and piece.dtype == piece.target.dtype


def _chunks(transfers: Iterable[Transfer]) -> Iterator[_Chunk]:
    chunk: _Chunk | None = None
    for file, offset, dtype, target in transfers:
        elements = target.detach().view(-1)
        nbytes = target.numel() * dtype.itemsize
        if (
            chunk is not None
            and (chunk.file, chunk.device) == (file, target.device)
            and nbytes < _SMALL_BYTES
            and 0 <= offset - (chunk.offset + chunk.nbytes) <= _GAP_BYTES
            and offset + nbytes - chunk.offset <= _CHUNK_BYTES
            and (offset - chunk.offset) % dtype.itemsize == 0
        ):
            chunk.pieces.append(_Piece(offset - chunk.offset, dtype, elements))
            chunk.nbytes = offset + nbytes - chunk.offset
            continue
        for part in elements.split(_CHUNK_BYTES // dtype.itemsize) if nbytes else ():
            if chunk is not None:
                yield chunk
            chunk = _Chunk(file, offset, part.numel() * dtype.itemsize, target.device, [_Piece(0, dtype, part)])
            offset += chunk.nbytes
    if chunk is not None:
        yield chunk


def _memory(tensor: torch.Tensor, nbytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    return (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())


class _Buffer:
    """Memory for one chunk, and the event after which the copies from it are done."""

    def __init__(self, pinned: bool) -> None:
        self.bytes = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self.copied: torch.cuda.Event | None = None

    def read(self, chunk: _Chunk) -> None:
        if self.copied is not None:
            self.copied.synchronize()
        chunk.file.read(chunk.offset, _memory(self.bytes, chunk.nbytes))

    def deliver(self, chunk: _Chunk, stream: torch.cuda.Stream | None) -> None:
        """Copy what was read into the targets; for a GPU on a stream of it."""
        for position, dtype, target in chunk.pieces:
            values = self.bytes[position : position + target.numel() * dtype.itemsize].view(dtype)
            if stream is not None and dtype != target.dtype:
                # A copy that converts would do so on the CPU, and wait for it.
                values = values.to(chunk.device, non_blocking=True)
            target.copy_(values, non_blocking=True)
        if stream is not None:
            if self.copied is None:
                self.copied = torch.cuda.Event(blocking=True)
            self.copied.record(stream)


def _read_directly(chunk: _Chunk) -> None:
    chunk.file.read(chunk.offset, _memory(chunk.pieces[0].target, chunk.nbytes))


class _SideStreams:
    """One stream for each GPU, which begins after all that is queued there, and which all later work there awaits."""

    def __init__(self, until: ExitStack) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._until = until

    def of(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type == "cpu":
            return None
        stream = self._streams.get(device)
        if stream is None:
            current = torch.cuda.current_stream(device)
            stream = self._streams[device] = torch.cuda.Stream(device)
            stream.wait_stream(current)
            # After an error, too: the targets' memory may be used for something else then.
            self._until.callback(current.wait_stream, stream)
            self._until.callback(stream.synchronize)
        return stream


def stream(transfers: Sequence[Transfer], advance: Callable[[int], Any] = lambda count: None) -> None:
    """Carry out transfers, in no particular order; it returns when the last one is done.

    Args:
        transfers: those of one file in the order in which they lie there, so that it is read from front to back. No two
            targets may share memory.
        advance: is called with numbers of bytes that have been read, which add up to those of the stored values.

    Raises:
        OSError: from a file. Some targets have their values then, and some a part of them; nothing is being read or
            copied any more.
    """
    with torch._C.DisableTorchFunction(), ExitStack() as until:
        streams = _SideStreams(until)
        readers = until.enter_context(ThreadPoolExecutor(_READERS, "fastinit.load"))
        until.callback(readers.shutdown, cancel_futures=True)  # after an error, nothing more is begun
        free: dict[bool, deque[_Buffer]] = {True: deque(), False: deque()}
        reading: deque[tuple[_Chunk, _Buffer | None, Future[None]]] = deque()

        def finish_one() -> None:
            chunk, buffer, done = reading.popleft()
            done.result()
            if buffer is not None:
                side = streams.of(chunk.device)
                with torch.cuda.stream(side) if side is not None else nullcontext():
                    buffer.deliver(chunk, side)
                free[side is not None].append(buffer)
            advance(sum(target.numel() * dtype.itemsize for _, dtype, target in chunk.pieces))

        for chunk in _chunks(transfers):
            pinned = chunk.device.type == "cuda"
            while len(reading) >= (2 * _READERS if pinned else _READERS):
                finish_one()
            buffer = None
            if not chunk.is_direct:
                buffer = free[pinned].popleft() if free[pinned] else _Buffer(pinned)
            reading.append((chunk, buffer, readers.submit(buffer.read if buffer else _read_directly, chunk)))
        while reading:
            finish_one()
    for transfer in transfers:
        torch.autograd.graph.increment_version(transfer.target)

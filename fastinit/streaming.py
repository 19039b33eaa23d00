"""Tensors streamed from files into memory: several reads are in flight while what has arrived is copied and converted.

Threads read. What agrees in dtype with a tensor on the CPU goes straight into it; what does not passes through a
buffer, from which the thread that has read it converts it. What a GPU gets passes through a ring of pinned buffers: the
calling thread has it copied on a side stream, and converted on the GPU. No file is mapped, so that one which shrinks is
an error and not a crash.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Copying from the page cache keeps several cores busy before memory is the limit; a disk wants reads in flight.
_READERS = 16
# There is a buffer of this size for each reader, and for a GPU another one, which waits for its copy to be done.
_CHUNK_BYTES = 4 << 20
# torch copies fewer elements than 32,768 on the thread that asks for it. More would have every reader keep threads of
# its own for that.
_SERIAL = 32_767

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


def _fill(chunk: _Chunk, memory: torch.Tensor) -> None:
    chunk.file.read(chunk.offset, (ctypes.c_ubyte * chunk.nbytes).from_address(memory.data_ptr()))


def _read_directly(chunk: _Chunk) -> None:
    _fill(chunk, chunk.pieces[0].target)


class _Buffer:
    """Memory for one chunk on its way to where it is wanted."""

    def __init__(self, pinned: bool) -> None:
        self._bytes = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self._copied: torch.cuda.Event | None = None

    def _values(self, piece: _Piece) -> torch.Tensor:
        nbytes = piece.target.numel() * piece.dtype.itemsize
        return self._bytes[piece.position : piece.position + nbytes].view(piece.dtype)

    def read_and_convert(self, chunk: _Chunk) -> None:
        """Carry out a chunk for the CPU."""
        _fill(chunk, self._bytes)
        for piece in chunk.pieces:
            torch._foreach_copy_(piece.target.split(_SERIAL), self._values(piece).split(_SERIAL))

    def read(self, chunk: _Chunk) -> None:
        """Read a chunk for a GPU, once what was here before has left."""
        if self._copied is not None:
            self._copied.synchronize()
        _fill(chunk, self._bytes)

    def copy(self, chunk: _Chunk, stream: torch.cuda.Stream) -> None:
        """Have a chunk that was read copied and converted."""
        with torch.cuda.stream(stream):
            for piece in chunk.pieces:
                values = self._values(piece)
                if piece.dtype != piece.target.dtype:
                    # First as it is: torch would convert it on the CPU, and wait for the copy.
                    values = values.to(chunk.device, non_blocking=True)
                piece.target.copy_(values, non_blocking=True)
            if self._copied is None:
                self._copied = torch.cuda.Event(blocking=True)
            self._copied.record(stream)


class _SideStreams:
    """One stream for each GPU, which begins after all that is queued there, and which all later work there awaits."""

    def __init__(self, until: ExitStack) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._until = until

    def of(self, device: torch.device) -> torch.cuda.Stream:
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
            pinned = chunk.device.type == "cuda"
            if buffer is not None:
                if pinned:
                    buffer.copy(chunk, streams.of(chunk.device))
                free[pinned].append(buffer)
            advance(sum(piece.target.numel() * piece.dtype.itemsize for piece in chunk.pieces))

        for chunk in _chunks(transfers):
            pinned = chunk.device.type == "cuda"
            while len(reading) >= (2 * _READERS if pinned else _READERS):
                finish_one()
            if chunk.is_direct:
                reading.append((chunk, None, readers.submit(_read_directly, chunk)))
            else:
                buffer = free[pinned].popleft() if free[pinned] else _Buffer(pinned)
                read = buffer.read if pinned else buffer.read_and_convert
                reading.append((chunk, buffer, readers.submit(read, chunk)))
        while reading:
            finish_one()
    for transfer in transfers:
        torch.autograd.graph.increment_version(transfer.target)

"""Tensors streamed from files into memory: several threads read, copy and convert, each a chunk at a time.

What agrees in dtype with a tensor on the CPU is read straight into it. All else passes through a buffer that each
thread has. For a GPU that is pinned memory, from which the thread copies on a stream of its own, in one native call;
the GPU converts. While one thread waits for its copy the others read, and hardly any of it holds Python's lock. No
file is mapped, so that one which shrinks is an error and not a crash.

Private: it may change with any version.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple

import torch

from .. import native

# Whether reading for a GPU and the copy there are a single call without Python's lock, for which sixteen threads wait
# otherwise. They are not where the module was built without CUDA, while torch has GPUs, also AMD's; nor with
# FASTINIT_FAST=0 in the environment.
_NATIVE = native.build_info()["cuda"] and os.environ.get("FASTINIT_FAST", "1") != "0"

# Copying from the page cache keeps several cores busy before memory is the limit; a disk wants reads in flight.
_READERS = 16
# What a reader does in Python for a chunk is small beside the milliseconds that reading this much takes.
# The pinned buffers together are 128 MiB.
_CHUNK_BYTES = 8 << 20
# What the CPU converts is best still in its cache. These buffers are 32 MiB.
_CONVERTED_BYTES = 2 << 20
# What a GPU converts or takes apart lies in memory of its own first, for little longer than the reading of it takes: so
# few chunks, 32 MiB.
_STAGED_CHUNKS = 4
# torch copies fewer elements than 32,768 on the thread that asks for it. More would have every reader keep threads of
# its own for that.
_SERIAL = 32_767

# Smaller tensors that lie this close in a file are read together.
_SMALL_BYTES = 1 << 20
_GAP_BYTES = 64 << 10

_SECONDS_BETWEEN_REPORTS = 0.1


class StoredFile(NamedTuple):
    """A file as it was when its metadata was read."""

    path: Path
    version: tuple[int, int]

    @staticmethod
    def at(path: Path) -> StoredFile:
        return StoredFile(path, _version(os.stat(path)))

    def check(self, file: BinaryIO | None = None) -> None:
        """Raise OSError unless it is, or an open file of it is, still what it was."""
        if _version(os.stat(self.path) if file is None else os.fstat(file.fileno())) != self.version:
            raise OSError(f"{str(self.path)!r} has changed since its metadata was read")


def _version(status: os.stat_result) -> tuple[int, int]:
    # Not its inode: overlay file systems may tell another one for an open file than for its path.
    return status.st_size, status.st_mtime_ns


class Transfer(NamedTuple):
    """Values that a file holds, and the tensor that gets them.

    Attributes:
        file: where they are.
        offset: of the first one, in bytes. The others follow in row-major order, in the byte order of this machine.
        dtype: theirs.
        target: what gets them, on the CPU or a CUDA device, of any dtype: contiguous, or a matrix of contiguous rows.
        stride: from one row of the matrix to the next one in the file, in bytes; 0 if there is nothing between them.
    """

    file: StoredFile
    offset: int
    dtype: torch.dtype
    target: torch.Tensor
    stride: int = 0

    def split(self, nbytes: int) -> Iterator[Transfer]:
        """Parts of so many bytes at most, each of whole rows or of a part of one."""
        target, itemsize = self.target.detach(), self.dtype.itemsize
        matrix = target if self.stride or not target.is_contiguous() else target.view(1, -1)
        length, most = matrix.shape[1], nbytes // itemsize
        stride = self.stride or length * itemsize
        if length <= most:
            step = most // length
            for row, part in zip(range(0, len(matrix), step), matrix.split(step), strict=True):
                yield self._replace(offset=self.offset + row * stride, target=part)
            return
        for row, whole in enumerate(matrix):
            for place, part in zip(range(0, length, most), whole.split(most), strict=True):
                yield Transfer(self.file, self.offset + row * stride + place * itemsize, self.dtype, part)


class _Piece(NamedTuple):
    """Some elements of a target, and where in its chunk their values begin."""

    position: int
    dtype: torch.dtype
    target: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.target.numel() * self.dtype.itemsize

    def values_in(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.position : self.position + self.nbytes].view(self.dtype).view(self.target.shape)

    def copy_on_this_thread(self, buffer: torch.Tensor) -> None:
        """Give the target its values, both on the CPU."""
        target, values = self.target, self.values_in(buffer)
        if target.is_contiguous():
            target, values = target.view(-1), values.view(-1)
        step = max(_SERIAL // target[0].numel(), 1)
        torch._foreach_copy_(target.split(step), values.split(step))


@dataclass(slots=True)
class _Chunk:
    """What is read at a time: a range of a file with the pieces that lie in it, all for one device; or rows."""

    file: StoredFile
    offset: int
    row_nbytes: int
    rows: int
    stride: int
    device: torch.device
    pieces: list[_Piece]

    @property
    def nbytes(self) -> int:
        return self.row_nbytes * self.rows

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where it is in the file, as the native reads take it."""
        return self.offset, self.row_nbytes, self.rows, self.stride

    @property
    def is_direct(self) -> bool:
        """Whether the file has the very bytes of the target, and nothing else between them."""
        piece, *others = self.pieces
        return not others and piece.dtype == piece.target.dtype and piece.target.is_contiguous()


def _chunks(transfers: Iterable[Transfer]) -> Iterator[_Chunk]:
    chunk: _Chunk | None = None
    for transfer in transfers:
        file, offset, dtype, target, stride = transfer
        nbytes = target.numel() * dtype.itemsize
        if not nbytes:
            continue
        buffered = _CHUNK_BYTES if target.is_cuda else _CONVERTED_BYTES
        if (
            chunk is not None
            and (chunk.file, chunk.device) == (file, target.device)
            and chunk.stride == stride == 0
            and nbytes < _SMALL_BYTES
            and 0 <= offset - (chunk.offset + chunk.nbytes) <= _GAP_BYTES
            and offset + nbytes - chunk.offset <= buffered
            and (offset - chunk.offset) % dtype.itemsize == 0
        ):
            chunk.pieces.append(_Piece(offset - chunk.offset, dtype, target.detach()))
            chunk.row_nbytes = offset + nbytes - chunk.offset
            continue
        most = _CHUNK_BYTES if target.dtype == dtype and target.is_contiguous() else buffered
        for part in transfer.split(most):
            if chunk is not None:
                yield chunk
            piece = _Piece(0, dtype, part.target)
            rows = len(part.target) if part.stride else 1
            chunk = _Chunk(file, part.offset, piece.nbytes // rows, rows, part.stride, target.device, [piece])
    if chunk is not None:
        yield chunk


class _Lane(NamedTuple):
    """What a reader has of a GPU: a stream, and a share in memory for chunks that are not direct."""

    stream: torch.cuda.Stream
    staging: SimpleQueue[torch.Tensor]


class _Reader:
    """One thread's part, with its buffers and the file that it has open."""

    def __init__(self, lanes: dict[torch.device, _Lane]) -> None:
        self.done = 0
        self._lanes = lanes
        self._pinned: torch.Tensor | None = None
        self._pageable: torch.Tensor | None = None
        self._stored: StoredFile | None = None
        self._file: Any = None

    def run(self, chunks: deque[_Chunk]) -> None:
        """Carry out chunks until there is none."""
        try:
            while (chunk := _next(chunks)) is not None:
                if chunk.device.type == "cuda":
                    self._carry_to_gpu(chunk)
                elif chunk.is_direct:
                    self._read(chunk, chunk.pieces[0].target)
                else:
                    if self._pageable is None:
                        self._pageable = torch.empty(_CONVERTED_BYTES, dtype=torch.uint8, device="cpu")
                    buffer = self._pageable
                    self._read(chunk, buffer)
                    for piece in chunk.pieces:
                        piece.copy_on_this_thread(buffer)
                self.done += sum(piece.nbytes for piece in chunk.pieces)
        finally:
            if self._file is not None:
                self._file.close()

    def _open(self, chunk: _Chunk) -> None:
        """Have the file of a chunk open; OSError if it is gone, or is not what it was."""
        if self._stored != chunk.file:
            if self._file is not None:
                self._file.close()
            self._stored, self._file = chunk.file, open(chunk.file.path, "rb", buffering=0)
            chunk.file.check(self._file)

    def _read(self, chunk: _Chunk, memory: torch.Tensor) -> None:
        """Read a chunk into memory of the CPU."""
        self._open(chunk)
        _check_read(chunk, native.read(self._file.fileno(), *chunk.place, memory.data_ptr()))

    def _read_to_gpu(self, chunk: _Chunk, memory: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Read a chunk into memory of a GPU, by way of a pinned buffer."""
        if self._pinned is None:
            self._pinned = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        if not _NATIVE:
            self._read(chunk, self._pinned)
            memory.view(-1).view(torch.uint8)[: chunk.nbytes].copy_(self._pinned[: chunk.nbytes], non_blocking=True)
            return
        self._open(chunk)
        addresses = self._pinned.data_ptr(), memory.data_ptr(), chunk.device.index, stream.cuda_stream
        _check_read(chunk, native.read_cuda(self._file.fileno(), *chunk.place, *addresses))

    def _carry_to_gpu(self, chunk: _Chunk) -> None:
        stream, staging = self._lanes[chunk.device]
        torch.cuda.set_stream(stream)  # of this thread; pinned memory is of its device, too
        staged = None if chunk.is_direct else staging.get()
        try:
            self._read_to_gpu(chunk, chunk.pieces[0].target if staged is None else staged, stream)
            if staged is not None:
                for piece in chunk.pieces:
                    piece.target.copy_(piece.values_in(staged), non_blocking=True)
        finally:
            # Then the buffers may be used again, and the memory of the targets for something else.
            stream.synchronize()
            if staged is not None:
                staging.put(staged)


def _check_read(chunk: _Chunk, nbytes: int) -> None:
    """Raise OSError unless all bytes of a chunk have been read."""
    if nbytes < chunk.nbytes:
        row, behind = divmod(nbytes, chunk.row_nbytes)
        end = chunk.offset + row * chunk.stride + behind
        raise OSError(f"{str(chunk.file.path)!r} ends at byte {end} while it is being read")


def _next(chunks: deque[_Chunk]) -> _Chunk | None:
    try:
        return chunks.popleft()
    except IndexError:
        return None


def _readers(chunks: Sequence[_Chunk], count: int) -> list[_Reader]:
    """So many readers, whose streams are behind the current ones."""
    lanes: list[dict[torch.device, _Lane]] = [{} for _ in range(count)]
    for device in {chunk.device for chunk in chunks if chunk.device.type == "cuda"}:
        current = torch.cuda.current_stream(device)
        staged = any(chunk.device == device and not chunk.is_direct for chunk in chunks)
        staging: SimpleQueue[torch.Tensor] = SimpleQueue()
        # One piece of memory of the current stream, which is of use to others later.
        for part in torch.empty((_STAGED_CHUNKS if staged else 0, _CHUNK_BYTES), dtype=torch.uint8, device=device):
            staging.put(part)
        for lane in lanes:
            lane[device] = _Lane(torch.cuda.Stream(device), staging)
            lane[device].stream.wait_stream(current)
    return [_Reader(lane) for lane in lanes]


def stream(transfers: Sequence[Transfer], advance: Callable[[int], Any] = lambda count: None) -> None:
    """Carry out transfers, in no particular order, behind what is queued on the current streams of their GPUs.

    It returns when the last one is done.

    Args:
        transfers: those of one file in the order in which they lie there, so that it is read from front to back. No two
            targets may share memory.
        advance: is called with numbers of bytes that have been read, which add up to those of the stored values.

    Raises:
        OSError: from a file, also one that is not what it was when it is opened; whether it changes later is the
            caller's to check. Some targets have their values then, and some a part of them; nothing is being read or
            copied any more.
    """
    with torch._C.DisableTorchFunction(), torch.inference_mode(False):
        chunks = deque(_chunks(transfers))
        readers = _readers(chunks, min(_READERS, len(chunks)))
    if not readers:
        return
    reported = 0
    with ThreadPoolExecutor(len(readers), "fastinit.load") as threads:
        try:
            waiting = {threads.submit(reader.run, chunks) for reader in readers}
            while waiting:
                ended, waiting = wait(waiting, _SECONDS_BETWEEN_REPORTS, FIRST_EXCEPTION)
                for each in ended:
                    each.result()
                done = sum(reader.done for reader in readers)
                if done > reported:
                    advance(done - reported)
                    reported = done
        finally:
            chunks.clear()  # after an error, nobody begins another
    for transfer in transfers:
        torch.autograd.graph.increment_version(transfer.target)

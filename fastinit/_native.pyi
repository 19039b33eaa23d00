"""fastinit's fill kernels, and the fast path of fastinit.record. Import them from fastinit.native."""

from collections.abc import Sequence
from typing import Any, TypedDict, final

import torch

_Step = tuple[int, float, float]

class _BuildInfo(TypedDict):
    cuda: bool
    cuda_version: str | None
    cuda_architectures: list[str]
    compiler: str

@final
class Batch:
    """Fills that are executed together, in no particular order. It runs once and is empty afterwards.

    Memory belongs to the caller, who keeps it alive until the fills are written. A ``ValueError`` names the argument
    that a fill was refused for; the batch is then as before.
    """

    def __init__(self) -> None: ...
    def add(
        self,
        data_ptr: int,
        numel: int,
        dtype: int,
        kind: int,
        parameters: Sequence[float],
        seed: int,
        stream: int,
        steps: Sequence[_Step] = ...,
    ) -> None:
        """Fill a whole contiguous tensor: element k of memory is element k of the stream."""

    def add_region(
        self,
        data_ptr: int,
        dtype: int,
        kind: int,
        parameters: Sequence[float],
        seed: int,
        stream: int,
        steps: Sequence[_Step],
        index_offset: int,
        sizes: Sequence[int],
        index_strides: Sequence[int],
        memory_strides: Sequence[int],
    ) -> None:
        """Fill a box of 1 to 8 dimensions of a larger tensor.

        The element at multi-index m is written to ``data_ptr + itemsize * sum(m * memory_strides)`` and is element
        ``index_offset + sum(m * index_strides)`` of the stream. Strides are in elements and positive where the size is
        above 1; distinct elements must have distinct memory.
        """

    def __len__(self) -> int: ...
    @property
    def elements(self) -> int:
        """How many elements the fills will write."""

    def run_cpu(self, threads: int, isa: str | None = None) -> None:
        """Write all fills and return. At most ``threads`` threads take part, the calling one included; the GIL is
        released. ``isa`` is one of :func:`cpu_isas`; None means :func:`cpu_isa`. It never changes a bit."""

    def run_cuda(self, device: int, stream: int) -> None:
        """Enqueue all fills on the ``cudaStream_t`` handle ``stream`` of GPU ``device`` and return at once.

        Raises ``RuntimeError`` naming the CUDA error, or saying that CUDA was not built.
        """

def read(file: int, offset: int, nbytes: int, count: int, stride: int, target: int) -> int:
    """Read ``count`` ranges of ``nbytes`` of the open file, whose beginnings are ``stride`` bytes apart, one behind the
    other into host memory at address ``target``, without the GIL. Returns how many bytes there were: fewer than that
    where the file ends. Raises ``OSError`` from the file."""

def read_cuda(
    file: int, offset: int, nbytes: int, count: int, stride: int, buffer: int, target: int, device: int, stream: int
) -> int:
    """The same into GPU memory at address ``target``, through pinned memory of as many bytes at ``buffer``, behind what
    is queued on the ``cudaStream_t`` handle ``stream``. It returns when all is there.

    Raises ``RuntimeError`` naming the CUDA error, or saying that CUDA was not built; ``OSError`` from the file.
    """

def apply_steps(value: float, steps: Sequence[_Step]) -> float:
    """``value`` rounded to float32 and taken through the steps, exactly as a fill computes it."""

def erfinv(data_ptr: int, numel: int) -> None:
    """Take ``numel`` floats in host memory through the step of that name, in place and without the GIL."""

def advise_huge_pages(data_ptr: int, nbytes: int) -> bool:
    """Ask the system to back the 2 MiB-aligned inside of the range with huge pages. False where it does not."""

def cpu_isa() -> str:
    """The instruction set of CPU fills: the environment variable FASTINIT_CPU_ISA as it was at the first use, or the
    best of :func:`cpu_isas`. ``ValueError`` if the variable names another."""

def cpu_isas() -> list[str]:
    """The instruction sets that this machine can run, best first: "avx512", "avx2", "portable"."""

def build_info() -> _BuildInfo:
    """What was compiled in: CUDA, its version and architectures, and the C++ compiler."""

class Record:
    """The fields of fastinit.record.records.Record, which explains them. All begin as None or False."""

    block: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    recipe: tuple[Any, ...] | None
    values: torch.Tensor | None
    memory: torch.Tensor | None
    owner: Any
    tensors: Any
    executed: tuple[Any, ...] | None
    replaced: tuple[Any, ...] | None
    recorded: bool
    deferred: bool
    @property
    def nbytes(self) -> int: ...
    def set_aside(self) -> None:
        """Move what it has executed and what is pending to what has been replaced."""

class Block:
    """The fields of fastinit.record.block.Block that the fast path uses."""

    device: torch.device
    default_dtype: torch.dtype
    records: Any
    generator: Any
    modules: Any
    dropped: int

class Generator:
    """The fields of fastinit.record.generator.Generator that the fast path uses."""

    _seed: int
    streams: int

class Mode:
    """The field of fastinit.record.mode.Mode."""

    block: Any

def turn() -> Any:
    """The generator of a block that has torch's generators."""

def give_turn(generator: Generator | None) -> None:
    """Say which one has them from here on."""

def connect(**connected: Any) -> tuple[dict[str, Any], Any, Any]:
    """Connect the fast path to fastinit.record and to torch, once in a process; see csrc/recorder/recorder.h.

    Returns:
        Methods of Placeholder by name, ``Mode.__torch_function__``, and the hook of registrations.
    """

def new_placeholder(record: Any) -> Any:
    """A new placeholder for the whole of a record; not in inference mode."""

def around_handle(original: Any) -> Any:
    """``torch.overrides.handle_torch_function`` for the time of a block, around torch's own."""

def use(fast: bool) -> None:
    """Whether what is not a method of a class is to be fast, too."""

def count_functionalizing(more: int) -> None:
    """Note that so many threads more functionalize what they do: factories leave the fast path."""

def around_make_subclass(wrapper: Any) -> Any:
    """``torch.Tensor._make_subclass``, around the wrapper in fastinit.record.guest."""

def type_of(value: Any, /) -> type:
    """What ``type`` is for torch.nn.parameter in a block: the one of a placeholder is torch.Tensor."""

def waiting(block: Any) -> list[Any]:
    """The records of a block that placeholders still stand for, in the order of their creation; dead ones go."""

def give_memory(
    segment: list[Any],
    start: int,
    given: list[Any],
    batch: Batch,
    seed: int,
    largest: int,
    limit: int,
) -> tuple[int, int, int]:
    """Give memory to the records of a segment, from number ``start`` on, and fill them by a batch, or copy values.

    Stops before one that is not plain or has more than ``largest`` bytes, and once ``limit`` bytes are to be filled.
    ``given`` gets each record, and behind it its memory.

    Returns:
        The number of the next record, and how many bytes and fills are in the batch.
    """

def swap_in(given: list[Any]) -> list[Any]:
    """Let placeholders have the memory that `give_memory` has made; the records that have others yet, not so plain."""

def tally(block: Any) -> tuple[int, int]:
    """Elements and bytes of the parameters of the modules that a block has seen, and of those below, each once."""

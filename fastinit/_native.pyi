"""fastinit's fill kernels, and the recorder's hot path. Import them from fastinit.native."""

import weakref
from collections.abc import Callable, Sequence
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

class Entry:
    """The fields of fastinit.recorder.Entry, which explains them. All but the four begin as None, 0 or False."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    recipe: Any
    refs: list[weakref.ref[torch.Tensor]]
    shadow: Any
    storage_key: Any
    storage_weak: Any
    name: Any
    nbytes: int
    data_ptr: int
    again: bool
    resident: bool
    filled: bool
    deferred: bool

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, recipe: Any) -> None: ...

def connect(
    recorder: type,
    entry: type,
    thread: Any,
    handlers: dict[Any, Any],
    pass_: Any,
    write: type,
    is_plain: Callable[[type[torch.nn.Module]], bool],
    plain_types: set[type],
) -> tuple[Any, dict[str, Any], Any]:
    """Connect the hot path to the recorder, once in a process.

    Args:
        recorder, entry, write: the classes of these names.
        thread: its attribute ``recorder`` is the calling thread's recorder, or None.
        handlers, pass_: fastinit.interception.HANDLERS and PASS.
        is_plain: whether a class of modules assigns attributes as torch.nn.Module does.
        plain_types: of attributes that are neither tensors nor modules.

    Returns:
        ``Recorder.__torch_function__``, methods of torch.nn.Module by their names, and ``new_parameter(original, cls,
        data, requires_grad)`` for ``Parameter.__new__``.
    """

def forget_classes() -> None:
    """Keep no references to classes of modules any longer."""

def set_method(cls: type, name: str, method: Any) -> None:
    """``setattr(cls, name, method)``, quick for a class of many subclasses that has such a method already."""

def record(tensor: torch.Tensor, kind: int, *parameters: float) -> bool:
    """Record a fill of a tensor that is a whole entry without memory. False, and nothing done, for any other one."""

def pending_shape(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The shape of a tensor that is a whole entry without memory."""

def waiting(by_id: dict[int, tuple[weakref.ref[torch.Tensor], Any, Any]]) -> list[Any]:
    """The entries that any living tensor stands for, in the order of creation."""

def tally(refs: list[weakref.ref[torch.Tensor]]) -> tuple[int, int]:
    """The number of elements and the bytes of the living tensors, each counted once."""

def settle(
    segment: list[Any],
    start: int,
    by_id: dict[int, tuple[weakref.ref[torch.Tensor], Any, Any]],
    given: list[Any],
    batch: Batch,
    seed: int,
    prototypes: dict[torch.dtype, torch.Tensor],
    dtypes: dict[torch.dtype, int],
    largest: int,
    limit: int,
) -> tuple[int, int, int]:
    """Give memory to the entries of a segment and add their fills to a batch, from number ``start`` on.

    Stops before one that is not plain or has more than ``largest`` bytes, and once ``limit`` bytes are reached.
    ``given`` gets each entry before it has memory.

    Returns:
        The number of the next entry, and how many bytes and fills there were.
    """

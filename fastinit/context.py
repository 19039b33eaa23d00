"""`on`: the context in which models are created.

Private: it may change with any version.
"""

from __future__ import annotations

# Not `signal`, which learns by two exceptions that a handler is a function and no number: 28 % of an empty block.
import _signal  # type: ignore[import-not-found]
import copy
import functools
import importlib
import inspect
import logging
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .compiler import go_on_compiling, not_compiled, stop_compiling
from .distributed import from_rank_0, is_distributed
from .execution import NATIVE_DEVICES, Timing, concrete, refuse_capture
from .log import logger
from .record import guest
from .record.block import Block, Empty, current
from .record.kept import keep_values
from .record.mode import Mode
from .record.names import name_streams
from .record.pending import leave_unwritten
from .record.records import modes_off
from .record.unwritten import Origin, origin_of
from .report import Report, finish, look, start

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "32": torch.float32,
    "32-true": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "16-true": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "fp64": torch.float64,
    "float64": torch.float64,
    "double": torch.float64,
    "64": torch.float64,
    "64-true": torch.float64,
}


class Partitioner(Protocol):
    """What `on(shard=...)` takes for engines that partition parameters when they are created."""

    def begin(self) -> Callable[[], None]:
        """Prepare for a context that is being entered; what is returned undoes that, when it is left."""

    def place(
        self, parameters: list[tuple[torch.nn.Module, str, torch.nn.Parameter, Origin | None]], timing: Timing
    ) -> None:
        """Take over the parameters of a context that has just ended.

        They come as (owner, name there, parameter, recipe), in one order on every rank, tied ones with each of their
        owners. A parameter is on the meta device with a recipe, or has the values that the constructor computed.
        The time of memory and fills goes to `timing`.
        """


class _Entered(NamedTuple):
    """A block that a thread or coroutine is in."""

    context: on
    block: Block
    mode: Mode
    report: Report | None  # held if it is to be logged
    token: Token[Block | None]
    compiler: Any
    undo: ExitStack  # what entering has changed


_F = TypeVar("_F", bound=Callable[..., Any])
# Their bodies run after the call that the decorator would put into a block.
_SUSPENDED: dict[str, Callable[[Any], bool]] = {
    "coroutine": inspect.iscoroutinefunction,
    "asynchronous generator": inspect.isasyncgenfunction,
    "generator": inspect.isgeneratorfunction,
}
_DECORATE_A_FUNCTION = (
    'decorate a function that returns the model, or write "with fastinit.on(...):" around what creates it'
)

# Not on the context object, which several threads may enter.
_entered: ContextVar[tuple[_Entered, ...]] = ContextVar("fastinit_entered", default=())


class on:
    """Create the modules of a ``with`` block on a device, in a precision, with fused initialization.

    The modules are those that the same code gives under ``torch.device(device)`` and
    ``torch.set_default_dtype(dtype)``: same names, shapes, dtypes, ties and buffers. Their values are those of the
    fp32 model, rounded once; random ones are a function of the seed, the ordinal of the fill in the block (or a name,
    see `streams`), and the element's index, and so the same on every device. Nothing is ever allocated in a wider dtype
    or elsewhere first.

    Args:
        device: "cpu", "cuda", "cuda:1", or a ``torch.device``; any that torch has here but "meta". Where this build has
            no native fills ("mps", "xpu", GPUs of AMD), values are computed on the host and copied: the same bits.
        dtype: ``torch.float32``, ``torch.float16``, ``torch.bfloat16``, ``torch.float64`` or one of "fp32", "fp16",
            "bf16", "fp64", "float32", "float16", "bfloat16", "float64", "half", "double", "32-true", "16-true",
            "bf16-true", "64-true", in any case. None keeps torch's default dtype. Random values in fp64 are drawn by
            torch, and are no roundings of those of the other dtypes.
        seed: 64-bit key of the random values. None draws it from torch's default CPU generator, so that
            ``torch.manual_seed`` decides it; that one draw is all that the block does to torch's generators.
        empty: True leaves the parameters and persistent buffers that are random without values, for a checkpoint to
            supply, also those that are computed of random fills alone, as `orthogonal_` does; constants and what else
            the constructor computes are there as ever. They have no memory, and their recipes go where they go:
            `uninitialized` names what nothing has written since, `initialize` writes it, and whoever reads it is
            refused by its name. "nan" lets readers see NaN instead. "unchecked" leaves raw memory and records
            nothing. A checkpoint that is loaded inside the block needs none of this.
        shard: True leaves parameters on the meta device with their initialization recorded, for `materialize` to give
            each rank its part once the model is sharded; buffers and what the constructor computes are there as ever.
            `fastinit.deepspeed.zero3(config)` makes them partitions of ZeRO-3. If torch.distributed is initialized,
            the key is rank 0's: every rank has to enter the block, or to pass the same `seed`.
        streams: what tells the random fills of one seed apart. "order": the ordinal of the fill in the block. "name":
            the name of its parameter or buffer in the model, and its place among the fills of that. So a stage that is
            built alone has the weights that it has in the whole model, and a layer that is added leaves the others as
            they were. A function from that name to the one that decides does so for parts that have other names by
            themselves: ``lambda name: f"layers.3.{name}"``. What the constructor reads before the names are known
            keeps its order, and a warning names it; docs/stream-v1.md has the details.

    Returns:
        The context manager, which is also a decorator. Entering it gives a report of parameters, bytes, fills, time
        and memory, complete when the block ends.

    Raises:
        ValueError: unknown device, dtype, `empty`, `shard` or `streams`, both `empty` and `shard`, or a seed that is
            not a 64-bit integer.
        TypeError: a decorator without arguments, or one of a class, a generator or a coroutine.
        RuntimeError: no such device, or a CUDA graph that is being captured.

    Example:
        >>> with fastinit.on("cpu", "bf16", seed=0) as init:
        ...     model = torch.nn.Linear(4, 2)
        >>> model.weight.dtype, init.parameters
        (torch.bfloat16, 10)
    """

    @not_compiled
    def __init__(
        self,
        device: str | torch.device = "cuda",
        dtype: str | torch.dtype | None = None,
        *,
        seed: int | None = None,
        empty: bool | Literal["nan", "unchecked"] = False,
        shard: bool | Partitioner = False,
        streams: Literal["order", "name"] | Callable[[str], str] = "order",
    ) -> None:
        self._device = _parse_device(device)
        self._dtype = _parse_dtype(dtype)
        self._seed = _parse_seed(seed)
        self._empty = _parse_empty(empty)
        self._shard = _parse_shard(shard, self._empty)
        self._rename = _parse_streams(streams)

    @not_compiled
    def __call__(self, func: _F) -> _F:
        if isinstance(func, type):
            raise TypeError(f"fastinit.on: it cannot decorate the class {func.__name__}; {_DECORATE_A_FUNCTION}")
        if not callable(func):
            raise TypeError(f"fastinit.on: it cannot decorate {func!r}; {_DECORATE_A_FUNCTION}")
        for kind, check in _SUSPENDED.items():
            if check(func):
                name = getattr(func, "__name__", repr(func))
                raise TypeError(f"fastinit.on: it cannot decorate the {kind} {name}; {_DECORATE_A_FUNCTION}")

        @functools.wraps(func)
        def decorated(*args: Any, **kwargs: Any) -> Any:
            # It may call itself or run in several threads: each call gets a context of its own.
            with copy.copy(self):
                return func(*args, **kwargs)

        return decorated  # type: ignore[return-value]

    @not_compiled
    def __enter__(self) -> Report:
        before = _entered.get()
        compiler = stop_compiling()
        try:
            with _interrupts_later():
                return self._enter(compiler)
        except BaseException:
            go_on_compiling(compiler)
            if _entered.get() is not before:  # interrupted once all was in place: nobody else will leave
                self._exit(*sys.exc_info())
            raise

    def _enter(self, compiler: Any) -> Report:
        with modes_off():
            device = _available_device(self._device)
            refuse_capture(device)
        dtype = self._dtype or _supported_default(torch.get_default_dtype())
        seed, agreed = (_draw_seed(), False) if self._seed is None else (self._seed, True)
        if self._shard is not False and not agreed and is_distributed():
            (seed,), agreed = from_rank_0([seed], device), True
        if self._shard is not False and torch.distributed.is_available() and torch.distributed.is_initialized():
            # What the block may shard with: it has to find the functions of that, to replace them.
            for name in ("fsdp", "tensor.parallel"):
                importlib.import_module(f"torch.distributed.{name}")
        outer = current.get()
        if outer is not None:
            outer.settle()  # what it has pending may be read in here
        block = Block(device, dtype, seed, self._empty, self._shard is not False, self._rename, outer)
        block.seed_agreed = agreed
        if logger.isEnabledFor(logging.INFO):
            block.ran = Counter()
        report = start(device, dtype, seed, "order" if self._rename is None else "name")
        block.report = weakref.ref(report)  # nobody but the caller holds it: without "as", nothing has to be reported
        kept = None if block.ran is None else report
        with ExitStack() as undo:
            if not isinstance(self._shard, bool):
                undo.callback(self._shard.begin())
            guest.install()
            undo.callback(guest.remove)
            undo.callback(block.generator.leave, None if outer is None else outer.generator)
            block.generator.enter()
            mode = Mode(block)
            mode.__enter__()  # type: ignore[no-untyped-call]
            entered = _Entered(self, block, mode, kept, current.set(block), compiler, undo.pop_all())
        _entered.set((*_entered.get(), entered))
        return report

    @not_compiled
    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        before = _entered.get()
        try:
            with _interrupts_later():
                self._exit(exc_type, exc_value, traceback)
        except BaseException:
            if _entered.get() is before and before and before[-1].context is self:  # interrupted before it began
                self._exit(exc_type, exc_value, traceback)
            raise

    def _exit(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        entered = _entered.get()
        if not entered or entered[-1].context is not self:
            raise RuntimeError(
                "fastinit.on: left where it was not entered, or before a block inside of it; use it in a with "
                "statement, in the thread and coroutine that enter it"
            )
        _, block, mode, _, token, compiler, undo = entered[-1]
        _entered.set(entered[:-1])
        mode.__exit__()
        current.reset(token)
        report = None if block.report is None else block.report()
        block.timing.watched = report is not None
        block.report = None  # what becomes real from here on is known to it
        try:
            # Also after an exception: what the code in the block has handed out is to have its values.
            name_streams(block)
            if report is not None:
                look(report, block)
            key = leave_unwritten(block) if block.shard or block.empty else None
            block.settle()
            if key is not None and self._shard is True:
                keep_values(block, key)
            del key  # which lives as long as something is unwritten
            if exc_type is None and not isinstance(self._shard, bool):
                with modes_off():
                    self._shard.place(
                        [
                            (module, name, parameter, origin_of(parameter))
                            for module in block.seen_modules()
                            for name, parameter in module._parameters.items()
                            if parameter is not None
                        ],
                        block.timing,
                    )
            if exc_type is None:
                block.warn_of_order()
        finally:
            undo.close()
            if report is not None:
                finish(report, block)
                if block.ran is not None:
                    _log(report, block.ran)
            go_on_compiling(compiler)


def _log(report: Report, ran: Counter[str]) -> None:
    logger.info("%s", report)
    if ran:
        calls = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in ran.most_common())
        logger.info("torch itself ran %s", calls)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Let a Ctrl-C wait until torch is whole again: in the middle, what is replaced would stay so."""
    handler = _signal.getsignal(_signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[Any] = []
    _signal.signal(_signal.SIGINT, lambda *arguments: waiting.append(arguments))
    try:
        yield
    finally:
        _signal.signal(_signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])


def _parse_device(device: Any) -> torch.device:
    if callable(device) and not isinstance(device, torch.device):
        raise TypeError(
            f"fastinit.on: it was given {device!r} for a device; a decorator is spelled with its arguments, as in "
            '@fastinit.on("cuda", "bf16")'
        )
    if device in ("gpu", "auto"):
        raise ValueError(
            f'fastinit.on: device={device!r} is not a device of torch; use "cuda" for a GPU, or '
            '"cuda" if torch.cuda.is_available() else "cpu"'
        )
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'fastinit.on: device={device!r} is not a device; use "cpu", "cuda" or "cuda:<index>". '
            f"{str(error).partition(chr(10))[0]}"
        ) from error
    if parsed.type == "meta":
        raise ValueError(
            f"fastinit.on: device={device!r} has no memory for values; name the device that the model will be on, as "
            "'cpu' or 'cuda', with shard=True for memory or empty=True for values that come later"
        )
    return parsed


def _parse_dtype(dtype: Any) -> torch.dtype | None:
    named: Any = dtype
    if isinstance(dtype, str):
        name = dtype.lower().removeprefix("torch.")
        if name.endswith("-mixed"):
            raise ValueError(
                f"fastinit.on: dtype={dtype!r} computes in half precision and keeps parameters in fp32; use "
                'dtype="fp32" here and torch.autocast, or the framework\'s precision, for the training'
            )
        named = _DTYPES.get(name, dtype)
    if named is None or named in _DTYPES.values():
        parsed: torch.dtype | None = named
        return parsed
    names = ", ".join(repr(name) for name in ("fp32", "fp16", "bf16", "fp64", "16-true", "bf16-true", "32-true"))
    raise ValueError(
        f"fastinit.on: dtype={dtype!r} is not supported; use torch.float32, torch.float16, torch.bfloat16, "
        f"torch.float64, one of {names}, or None for torch's default"
    )


def _supported_default(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _DTYPES.values():
        raise ValueError(
            f"fastinit.on: dtype=None means torch's default dtype, which is {dtype} and not supported; "
            "pass dtype='fp32', 'fp16', 'bf16' or 'fp64'"
        )
    return dtype


def _parse_seed(seed: Any) -> int | None:
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"fastinit.on: seed={seed!r} must be a 64-bit integer, or None to follow torch.manual_seed")
    return seed % 2**64


def _parse_empty(empty: Any) -> Empty | None:
    if empty is False:
        return None
    if empty is True or empty == "nan" or empty == "unchecked":
        parsed: Empty = empty
        return parsed
    raise ValueError(f'fastinit.on: empty={empty!r} must be True, False, "nan" or "unchecked"')


def _parse_shard(shard: Any, empty: Empty | None) -> bool | Partitioner:
    if not isinstance(shard, bool) and not (hasattr(shard, "begin") and hasattr(shard, "place")):
        raise ValueError(f"fastinit.on: shard={shard!r} must be True, False or fastinit.deepspeed.zero3(config)")
    if shard is not False and empty is not None:
        raise ValueError(
            f"fastinit.on: shard={shard!r} and empty={empty!r} exclude each other; for a sharded model that a "
            "checkpoint will fill, use shard=True and fastinit.materialize(model, empty=True)"
        )
    parsed: bool | Partitioner = shard
    return parsed


def _parse_streams(streams: Any) -> Callable[[str], str] | None:
    if streams == "order":
        return None
    if streams == "name":
        return str
    if callable(streams):
        renamed: Callable[[str], str] = streams
        return renamed
    raise ValueError(
        f'fastinit.on: streams={streams!r} must be "order", "name", or a function from a tensor\'s name in the block '
        "to the name that decides its values"
    )


def _draw_seed() -> int:
    # A fake tensor has no value to draw.
    with modes_off(), _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext():
        return int(torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None).item()) % 2**64


def _available_device(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return torch.device("cpu")
    name = str(device)
    if device.type != "cuda":
        try:
            device = torch.empty(0, device=device).device
        except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
            raise RuntimeError(
                f"fastinit.on: device={name!r} is none that torch {torch.__version__} can use here; use device='cpu'. "
                f"{str(error).partition('. ')[0]}"
            ) from error
        logger.info("values are computed on the host and copied: there are no native fills for %s", device)
        return device
    if not torch.cuda.is_available():
        other = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
        raise RuntimeError(
            f"fastinit.on: device={name!r}, but torch {torch.__version__} sees no GPU; check the driver and that torch "
            f"is a CUDA build (python -m fastinit doctor), or use device={other!r}"
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise RuntimeError(
            f"fastinit.on: device={name!r} does not exist; this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}"
        )
    torch.cuda.init()
    if "cuda" not in NATIVE_DEVICES:
        _tell_of_build()
    return concrete(device)


@functools.cache
def _tell_of_build() -> None:
    if torch.version.hip:
        logger.info("values are computed on the host and copied: there are no native fills for GPUs of AMD")
    else:
        logger.warning(
            "values are computed on the host and copied: this build of fastinit has no CUDA; for fills on the GPU "
            "install a CUDA compiler (nvcc) and reinstall torch-fastinit with FASTINIT_CUDA=1"
        )

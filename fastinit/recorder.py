"""The recorder: a TorchFunctionMode that sees every initialisation and defers it.

While a recorder is active, a factory such as ``torch.empty`` returns a *placeholder*: a tensor of the right shape,
dtype and device whose strides are zero over a single element, so that it costs no memory and an in-place write that
the recorder does not see raises instead of corrupting memory. What the tensor is to contain is its *entry*:

- a recipe (fastinit.recipe): the fills that have been asked for and not been executed, or
- a *shadow*: an fp32 tensor with the values as the fp32 model would have them, for half-precision tensors that were
  computed, or that the constructor reads. Operations run on shadows, so no value is ever the result of a computation
  in half precision; the shadow is rounded once, when the tensor gets its memory.

An fp32 tensor needs no shadow: it gets its memory and values as soon as torch has to compute with it, and is then an
ordinary tensor that the recorder forgets. Everything is settled when the context ends, or when a module is called under
autograd. On a GPU, parameters of a large model get memory and values before that, while the constructor runs; their
recipes are kept, in case the constructor still reads them.

A tensor object stands for its entry by identity (`_by_id`) while it is a placeholder, and by its storage
(`_by_storage`) afterwards, because views of it share that.
"""

from __future__ import annotations

import gc
import math
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType, TracebackType
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from . import native
from .deferred import MARK, Deferred, keep, kept_for, mark_recipe, warn_never_initialised
from .execution import DTYPES, Fills, advise_huge_pages, allocate, reserve
from .interception import HANDLERS, IN_PLACE, INIT_HANDLERS, PASS
from .layout import contiguous_strides, numel
from .native import CONSTANT
from .recipe import Region, Write

# Handlers work below every mode: neither an outer context nor an outer device context may see what they do.
_modes_off = torch._C.DisableTorchFunction

_HALVES = (torch.float16, torch.bfloat16)

# Shadows are kept until the context ends, so that a chain of operations rounds once, but not more of them than this
# in all: contract 4 grants 64 MiB beyond the model.
_SHADOW_BYTES = 32 << 20

# A tensor that is written piece by piece, in more pieces than this, gets its memory at once. (Not one that is to be
# sharded: each rank would hold all of it.)
_MAX_WRITES = 8

# Device memory is reserved in segments of up to this size: one cudaMalloc per parameter would cost more than the fills.
_SEGMENT_BYTES = 8 << 30

# A GPU starts to fill while the constructor runs when so many bytes are ready the first time, and a segment later on.
_FIRST_BYTES = 2 << 30

# Tensors of so many bytes are filled in one go, so that a GPU starts before all of them have their memory.
_BATCH_BYTES = 1 << 30


class _Thread(threading.local):
    recorder: Recorder | None = None  # the innermost one that is active in this thread


_thread = _Thread()

Empty = Literal[True, "nan", "unchecked"]

# By the id of a tensor: itself, its entry, and the shadow that torch sees in its place.
_Substitutes = dict[int, tuple[torch.Tensor, "Entry", torch.Tensor]]

_ZERO_STRIDES = (0,) * 64  # torch has no tensors of more dimensions


def _without_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    strides = _ZERO_STRIDES[: len(shape)]
    if torch.is_inference_mode_enabled():
        # An inference tensor is of no use outside of that mode; a model's should be, whenever it was made.
        with torch.inference_mode(False):
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


class Entry(native.Entry):
    """What one tensor is to contain, and where, once it has memory.

    Attributes:
        shape, dtype, device: the tensor's.
        recipe: tuple of writes; None: the shadow or the memory has the values.
        shadow: fp32 tensor of the values, or None.
        refs: weak references to the placeholders that stand for it, while it has no memory.
        storage_key, storage_weak, data_ptr: its storage, once it has memory.
        again: its recipe replaced another one.
        resident: its tensors have memory already, though they are still found by identity.
        filled: the memory has the values of the recipe, which is kept because they may be wanted in fp32.
        deferred: the recipe has gone to the modules that own the tensor; what is left of it marks the memory.
        name: class of the module that owns it, and the name there; or None.
    """

    __slots__ = ()

    @property
    def allocated(self) -> bool:
        return self.storage_key is not None

    @property
    def alive(self) -> bool:
        if self.allocated:
            return not torch.UntypedStorage._expired(self.storage_weak)
        return any(ref() is not None for ref in self.refs)


class Recorder(TorchFunctionMode):
    """Records the initialisations of one context; see the module's docstring."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        empty: Empty | None = None,
        shard: bool = False,
    ) -> None:
        super().__init__()
        self.device = device
        self.default_dtype = dtype
        self.seed = seed
        self.empty = empty
        self.shard = shard
        self.defers = bool(empty) or shard
        self.seed_agreed = False  # all ranks have it
        self.streams = 0
        self.executed = 0
        self.dropped = 0
        self.deferred = 0
        # Host time for giving tensors memory, and for running fills or enqueueing them, and what these take on a GPU.
        self.allocation_seconds = 0.0
        self.run_seconds = 0.0
        self.fill_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.module_parameters: list[weakref.ref[torch.Tensor]] = []
        # A placeholder may stand for a part of its entry, a view of it: the region says which.
        self._by_id: dict[int, tuple[weakref.ref[torch.Tensor], Entry, Region | None]] = {}
        self._purge_at = 10_000
        # A tensor of each dtype on the context's device, from which torch makes another one sooner than from scratch.
        self._prototypes: dict[torch.dtype, torch.Tensor] = {}
        self._by_storage: dict[int, Entry] = {}
        self._shadows: OrderedDict[Entry, None] = OrderedDict()
        self._outer: Recorder | None = None
        self._outer_device_context: Any = None
        self._suspended = False
        self._modules: dict[int, weakref.ref[torch.nn.Module]] = {}  # those that were seen, if they may keep recipes
        # On a GPU, fills run while the constructor goes on: entries that are ready for it, and their size.
        self._overlap = device.type == "cuda" and not self.defers
        self._ready: list[Entry] = []
        self._ready_bytes = 0
        self._ready_limit = _FIRST_BYTES
        self._given: list[Entry] = []
        self._reserved_for = 0
        self.entered_from = 0  # id of the frame that has entered the context
        self._marks: dict[torch.device, Fills] = {}
        self._marked: list[torch.Tensor] = []

    # --- entering and leaving -----------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        outer = _thread.recorder
        if outer is not None:
            # What the outer context has pending may be read in here, where it does not look.
            with _modes_off():  # or the outer one would see, and record, its own settling
                outer.settle_all()
            outer._suspended = True
        self._outer = outer
        self._outer_device_context = _device_context()
        _thread.recorder = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]
        _thread.recorder = self._outer
        if self._outer is not None:
            self._outer._suspended = False
        # Also after an exception: what the code in the context has handed out must not be left as raw memory.
        with _modes_off():
            if self.shard:
                self._defer_to_shards()
            elif self.empty:
                self._defer()
            self.settle_all()

    # --- dispatch ------------------------------------------------------------------------------------------------

    # __torch_function__ itself is native (see the end of this file): it serves the plain calls and hands others over.

    def _dispatch(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._suspended:
            return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is None and type(func) is FunctionType and "tensor" in kwargs:
            handler = INIT_HANDLERS.get(func.__name__)
        if handler is not None:
            with _modes_off():
                if handler is PASS:
                    return func(*args, **kwargs)
                result = handler(self, func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.run_in_torch(func, args, kwargs)

    # --- the state of tensors ------------------------------------------------------------------------------------

    def find(self, tensor: torch.Tensor) -> Entry | None:
        """The entry that a tensor, or a view of it, belongs to."""
        known = self._by_id.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        if not self._by_storage:
            return None
        try:
            key = tensor.untyped_storage()._cdata
        except (RuntimeError, NotImplementedError):  # sparse and wrapper tensors have no storage
            return None
        return self._by_storage.get(key)

    def is_whole(self, entry: Entry, tensor: torch.Tensor) -> bool:
        """Whether a tensor of this entry covers all of it, in its order."""
        region = self.region(entry, tensor)
        return region is None or (
            numel(region.sizes) == numel(entry.shape) and region.strides == contiguous_strides(region.sizes)
        )

    def region(self, entry: Entry, tensor: torch.Tensor) -> Region | None:
        """Where in its entry a tensor lies; None: it is the whole, in its shape."""
        if entry.storage_key is None:
            return self._by_id[id(tensor)][2]
        return Region(int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride())

    def factory_device(self) -> torch.device:
        """Where a factory without a device argument puts its result: an inner ``torch.device`` context wins."""
        if torch._C._len_torch_function_stack():
            context = _device_context()
            if context is not None and context is not self._outer_device_context:
                return concrete(context.device)
        return self.device

    def placeholder(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        recipe: tuple[Write, ...] | None,
    ) -> torch.Tensor:
        """A new tensor without memory; the recipe says what it contains."""
        tensor = _without_memory(shape, dtype, device)
        self.stand_for(tensor, Entry(shape, dtype, device, recipe))
        if len(self._by_id) > self._purge_at:
            self._purge()
        if dtype not in self._prototypes and device == self.device and not torch.is_inference_mode_enabled():
            self._prototypes[dtype] = torch.empty(1, dtype=dtype, device=device)
        return tensor

    def _purge(self) -> None:
        self._by_id = {key: known for key, known in self._by_id.items() if known[0]() is not None}
        self._purge_at = 2 * len(self._by_id) + 10_000

    def stand_for(self, tensor: torch.Tensor, entry: Entry, region: Region | None = None) -> None:
        """Let a tensor without memory stand for an entry, or for a region of it."""
        # A tensor that died leaves its id in the table, which another tensor may have by now: find() compares.
        ref = weakref.ref(tensor)
        self._by_id[id(tensor)] = (ref, entry, region)
        entry.refs.append(ref)

    def view(self, entry: Entry, region: Region) -> torch.Tensor:
        """A view of an entry that has no memory yet."""
        tensor = _without_memory(region.sizes, entry.dtype, entry.device)
        self.stand_for(tensor, entry, region)
        return tensor

    def leave(self, tensor: torch.Tensor) -> None:
        """A tensor that gets other memory no longer stands for its entry."""
        known = self._by_id.get(id(tensor))
        if known is not None and known[0]() is tensor:
            del self._by_id[id(tensor)]
            known[1].refs = [ref for ref in known[1].refs if ref is not known[0]]  # == would compare the tensors

    def let_go(self, tensor: torch.Tensor) -> bool:
        """Give a tensor its values and hold no weak reference to it; whether a module had it as a parameter."""
        entry = self.find(tensor)
        if entry is not None:
            self.settle([entry])
        before = len(self.module_parameters)
        self.module_parameters = [ref for ref in self.module_parameters if ref() is not tensor]
        return len(self.module_parameters) < before

    def next_stream(self) -> int:
        """Ordinal of the next random fill."""
        stream = self.streams
        self.streams += 1
        return stream

    def give_memory(self, entry: Entry) -> None:
        """Allocate an entry's tensor in its final dtype; what it is to contain stays pending."""
        if entry.allocated:
            return
        self.make_resident(entry)
        storage = self._leave_all(entry).untyped_storage()
        entry.storage_key = storage._cdata
        entry.storage_weak = storage._weak_ref()
        entry.data_ptr = storage.data_ptr()
        self._by_storage[entry.storage_key] = entry

    def make_resident(self, entry: Entry) -> None:
        """Allocate an entry's tensor, which is still found by identity; what it is to contain stays pending."""
        if entry.resident or entry.allocated:
            return
        started = time.perf_counter()
        if entry.device.type == "cuda":
            self._reserve_for_all()
        self._point(entry, self._allocate(entry))
        entry.resident = True
        self.allocation_seconds += time.perf_counter() - started

    def _allocate(self, entry: Entry, *, huge_pages: bool = True) -> torch.Tensor:
        return allocate(
            entry.shape, entry.dtype, entry.device, huge_pages=huge_pages, name_of=lambda: self._name_of(entry)
        )

    def _name_of(self, entry: Entry) -> str | None:
        """What a model calls an entry's tensor, for a message; None if no module has it."""
        tensors = {id(tensor) for ref in entry.refs if (tensor := ref()) is not None}
        modules = [each for each in gc.get_objects() if issubclass(type(each), torch.nn.Module)]
        below = {id(child) for module in modules for child in module.__dict__.get("_modules", {}).values()}
        for root in modules:
            if id(root) not in below and "_modules" in root.__dict__:
                for prefix, module in root.named_modules():
                    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                        if id(tensor) in tensors:
                            return f"{prefix}{'.' if prefix else ''}{name} of {type(root).__name__}"
        return None

    def _leave_all(self, entry: Entry) -> torch.Tensor:
        """Find an entry's tensors by identity no more; returns one of them."""
        tensors = [tensor for ref in entry.refs if (tensor := ref()) is not None]
        for tensor in tensors:
            del self._by_id[id(tensor)]
        return tensors[0]

    def _point(self, entry: Entry, memory: torch.Tensor) -> None:
        """Let the tensors that stand for an entry have its memory."""
        for ref in entry.refs:
            tensor = ref()
            if tensor is not None:
                region = self._by_id[id(tensor)][2]
                tensor.data = (
                    memory if region is None else memory.as_strided(region.sizes, region.strides, region.offset)
                )

    def _reserve_for_all(self) -> None:
        """Reserve for whatever waits for memory now: the others will get theirs one by one, too, when a checkpoint is
        copied into a model."""
        if len(self._by_id) < self._reserved_for:
            return
        waiting = {entry for ref, entry, _ in self._by_id.values() if ref() is not None and not entry.resident}
        # Not before there is twice as much again: a constructor may take many views, of one new tensor each.
        self._reserved_for = 2 * len(self._by_id)
        for device in {entry.device for entry in waiting}:
            reserve([e.nbytes for e in waiting if e.device == device], device)

    def _memory(self, entry: Entry) -> torch.Tensor:
        """A tensor over an allocated entry's memory."""
        storage = torch.UntypedStorage._new_with_weak_ptr(entry.storage_weak)
        memory: torch.Tensor
        memory = torch.empty(0, dtype=entry.dtype, device=entry.device).set_(storage, 0, entry.shape)  # type: ignore[call-overload]
        return memory

    def _untrack(self, entry: Entry) -> None:
        self._shadows.pop(entry, None)
        entry.shadow = None
        # A dead placeholder may hold the entry for a while, and torch swaps no tensors that have weak references.
        entry.refs.clear()
        if entry.allocated:
            del self._by_storage[entry.storage_key]
            torch.UntypedStorage._free_weak_ref(entry.storage_weak)

    def overwrite(self, entry: Entry, recipe: tuple[Write, ...]) -> None:
        """Replace all that an entry is to contain."""
        if entry.recipe:
            entry.again = True
            if not entry.filled:
                self.dropped += len(entry.recipe)
        entry.filled = False
        if entry.shadow is not None:
            self._shadows.pop(entry, None)
            entry.shadow = None
        entry.recipe = recipe

    def replace_by_real(self, entry: Entry) -> None:
        """Forget an entry whose tensor torch is about to overwrite whole."""
        self.overwrite(entry, ())
        if entry.resident and not entry.allocated:
            self._leave_all(entry)
            entry.refs.clear()
            return
        self.give_memory(entry)
        self._untrack(entry)

    def overwrite_by_shadow(self, entry: Entry, shadow: torch.Tensor) -> None:
        """Replace all that a half-precision entry is to contain by these fp32 values."""
        self.overwrite(entry, ())
        self._keep_shadow(entry, shadow)

    # --- fills ---------------------------------------------------------------------------------------------------

    def fill(self, tensor: torch.Tensor, kind: int, parameters: tuple[float, ...]) -> bool:
        """Record a fill of a tensor of any origin, or execute it at once where it cannot be deferred.

        Returns False, and counts the stream all the same, where no native fill reaches the tensor.
        """
        if native.record(tensor, kind, *parameters):
            return True
        stream = 0 if kind == CONSTANT else self.next_stream()
        # What Write(kind, parameters, stream) does, without the call of its constructor.
        write = tuple.__new__(Write, (kind, parameters, stream, (), None))
        entry = self.find(tensor)
        if entry is None:
            return self._fill_now(tensor, write)
        region = self.region(entry, tensor)
        if region is None or self.is_whole(entry, tensor):
            self.overwrite(entry, (write,))
            return True
        if any(stride == 0 and size > 1 for size, stride in zip(region.sizes, region.strides, strict=True)):
            return False
        if entry.recipe is not None and (len(entry.recipe) < _MAX_WRITES or self.shard):
            if tensor.numel():
                entry.recipe += (write._replace(region=region),)
                entry.filled = False
            return True
        if entry.dtype in _HALVES:
            return self._fill_now(self._shadow_view(entry, tensor), write)
        self.settle([entry])
        return self._fill_now(tensor, write)

    def _fill_now(self, tensor: torch.Tensor, write: Write) -> bool:
        if (
            tensor.dtype not in DTYPES
            or tensor.layout != torch.strided
            or type(tensor).__torch_dispatch__ is not _PLAIN
        ):
            return False
        if tensor.device.type not in ("cpu", self.device.type):
            return False
        sizes, strides = tuple(tensor.size()), tensor.stride()
        if any(stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True)) or _other_dispatch():
            return False
        if tensor.numel() == 0:
            return True
        region = None if tensor.is_contiguous() else Region(0, sizes, strides)
        fills = Fills(self.seed, tensor.device)
        fills.add(tensor.data_ptr(), tensor.numel(), tensor.dtype, (write._replace(region=region),))
        self._run(fills)
        torch.autograd.graph.increment_version(tensor)
        return True

    def _run(self, fills: Fills) -> None:
        started = time.perf_counter()
        on_gpu = fills.device.type == "cuda" and fills.count
        events = _timing_events(fills.device) if on_gpu else None
        fills.run()
        if events is not None:
            events[1].record(torch.cuda.current_stream(fills.device))
            self.fill_events.append(events)
        self.executed += fills.count
        fills.count = 0
        self.run_seconds += time.perf_counter() - started

    # --- shadows -------------------------------------------------------------------------------------------------

    def shadow(self, entry: Entry) -> torch.Tensor:
        """The fp32 values of a half-precision entry, made from its recipe at the first use."""
        if entry.shadow is None:
            shadow = torch.empty(entry.shape, dtype=torch.float32, device=entry.device)
            fills = Fills(self.seed, shadow.device)
            fills.write(shadow, entry.recipe)
            self._run(fills)
            entry.recipe = None
            self._keep_shadow(entry, shadow)
        elif entry in self._shadows:
            self._shadows.move_to_end(entry)
        values: torch.Tensor = entry.shadow
        return values

    def _keep_shadow(self, entry: Entry, shadow: torch.Tensor) -> None:
        entry.shadow = shadow
        entry.recipe = None
        entry.filled = False
        self._shadows[entry] = None

    def _trim_shadows(self) -> None:
        """Settle the oldest shadows while there are too many, but not the newest: the next operation may need it."""
        if sum(numel(entry.shape) for entry in self._shadows) * 4 <= _SHADOW_BYTES:
            return
        for entry in [entry for entry in self._shadows if not entry.alive]:
            self._untrack_dead(entry)
        excess = sum(numel(entry.shape) for entry in self._shadows) * 4 - _SHADOW_BYTES
        oldest = []
        for entry in list(self._shadows)[:-1]:
            if excess <= 0:
                break
            oldest.append(entry)
            excess -= numel(entry.shape) * 4
        self.settle(oldest)

    def _untrack_dead(self, entry: Entry) -> None:
        if entry.allocated:
            self._untrack(entry)
        else:
            self._shadows.pop(entry, None)

    def _shadow_view(self, entry: Entry, tensor: torch.Tensor) -> torch.Tensor:
        """The part of an entry's shadow that a tensor of the entry covers."""
        shadow, region = self.shadow(entry), self.region(entry, tensor)
        return shadow if region is None else shadow.as_strided(region.sizes, region.strides, region.offset)

    def wrap(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A half-precision tensor whose fp32 values were just computed."""
        if values.numel() == 0:
            return values.to(dtype)
        shadow = values.detach()
        if not shadow.is_contiguous():
            strides = shadow.stride()
            in_memory = shadow.permute(sorted(range(shadow.dim()), key=lambda dim: -strides[dim]))
            if in_memory.is_contiguous():
                # As torch lays it out: a view of what lies there one after the other.
                base = self.wrap(in_memory, dtype)
                return self.view(self._by_id[id(base)][1], Region(0, tuple(shadow.shape), strides))
        if not shadow.is_contiguous() or shadow.untyped_storage().nbytes() != shadow.numel() * 4:
            shadow = shadow.clone(memory_format=torch.contiguous_format)
        tensor = self.placeholder(tuple(shadow.shape), dtype, shadow.device, None)
        self._keep_shadow(self._by_id[id(tensor)][1], shadow)
        return tensor

    # --- operations that torch executes --------------------------------------------------------------------------

    def run_in_torch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let torch execute a function: on shadows for half-precision tensors of ours, on settled memory otherwise."""
        substitutes: _Substitutes = {}
        tensors: list[torch.Tensor] = []
        with _modes_off():
            if self._shadows:
                self._trim_shadows()
            _collect(args, tensors)
            if kwargs:
                _collect(kwargs, tensors)
            entries = [self.find(tensor) for tensor in tensors]
            if any(entries):
                substitutes = self._prepare(func, args, kwargs, tensors, entries)
            if substitutes:
                replaced = {key: substitute for key, (_, _, substitute) in substitutes.items()}
                args = _replace(args, replaced)
                kwargs = _replace(kwargs, replaced)
        result = func(*args, **kwargs)
        if not substitutes and self.default_dtype not in _HALVES:
            return result
        with _modes_off():
            return self._map_result(result, tensors, substitutes, _names_dtype(args, kwargs))

    def _prepare(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        entries: list[Entry | None],
    ) -> _Substitutes:
        """Settle what torch is to see itself, and make the shadows that it is to see instead of the rest."""
        written = _written(func, args, kwargs)
        others = [tensor for tensor, entry in zip(tensors, entries, strict=True) if entry is None]
        # What involves half-precision data of others, or tensors of others that autograd records, is no initialisation
        # but a training step, say: torch's own business.
        in_use = any(
            (tensor.requires_grad and torch.is_grad_enabled()) or (tensor.dtype in _HALVES and tensor.dim())
            for tensor in others
        )
        if in_use or getattr(func, "__name__", "").startswith(("_foreach", "_fused")):
            self.settle([entry for entry in entries if entry is not None])
            return {}
        self.settle([entry for entry in entries if entry is not None and entry.dtype not in _HALVES])
        substitutes: _Substitutes = {}
        for tensor, entry in zip(tensors, entries, strict=True):
            if entry is not None and entry.dtype in _HALVES and id(tensor) not in substitutes:
                substitutes[id(tensor)] = (tensor, entry, self._shadow_view(entry, tensor))
        if torch.is_grad_enabled() and any(tensor.requires_grad and tensor.is_leaf for tensor in written):
            # A substitute is no leaf; let torch raise what it raises for one.
            torch.zeros(1, requires_grad=True).zero_()
        return substitutes

    def _map_result(
        self, result: Any, tensors: list[torch.Tensor], substitutes: _Substitutes, dtype_named: bool
    ) -> Any:
        if isinstance(result, torch.Tensor):
            return self._map_tensor(result, tensors, substitutes, dtype_named)
        if type(result) in (list, tuple):
            return type(result)(self._map_result(item, tensors, substitutes, dtype_named) for item in result)
        if isinstance(result, tuple) and type(result).__module__ == "torch.return_types":
            return type(result)([self._map_result(item, tensors, substitutes, dtype_named) for item in result])
        return result

    def _map_tensor(
        self, result: torch.Tensor, tensors: list[torch.Tensor], substitutes: _Substitutes, dtype_named: bool
    ) -> torch.Tensor:
        for original, _, substitute in substitutes.values():
            if result is substitute:
                return original
        if result.dtype != torch.float32 or result.layout != torch.strided:
            return result
        if substitutes:
            key = result.untyped_storage()._cdata
            for _, entry, substitute in substitutes.values():
                if substitute.untyped_storage()._cdata == key:
                    # A view: the caller gets the same view of the tensor itself.
                    self.give_memory(entry)
                    return self._memory(entry).as_strided(result.size(), result.stride(), result.storage_offset())
        if dtype_named or result.requires_grad or _other_dispatch():
            return result
        dtype = self._promoted(tensors)
        return self.wrap(result, dtype) if dtype in _HALVES else result

    def _promoted(self, tensors: list[torch.Tensor]) -> torch.dtype:
        """The dtype that torch's promotion gives the result of an operation on these tensors."""
        floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
        if not floats:
            return self.default_dtype
        dimensioned = [t.dtype for t in floats if t.dim()] or [t.dtype for t in floats]
        dtype = dimensioned[0]
        for other in dimensioned[1:]:
            dtype = torch.promote_types(dtype, other)
        return dtype

    # --- leaving initialisations to later --------------------------------------------------------------------------

    def _defer(self) -> None:
        """Hand the recipes of what a state dict holds to the modules that own it, and leave out the random fills."""
        for entry, owners in self._owned().items():
            recipe, mark = entry.recipe, None
            if not recipe or any(write.kind != CONSTANT for write in recipe):
                mark = math.nan if self.empty == "nan" else MARK
                entry.recipe = () if self.empty == "unchecked" else mark_recipe(entry.shape, mark)
                entry.deferred = True
                self.deferred += len(recipe)
            if self.empty != "unchecked":
                self._keep(entry, owners, recipe, mark)

    def _defer_to_shards(self) -> None:
        """Hand the recipes of parameters to the modules that own them, and leave the parameters on the meta device.

        Those whose values were computed, or that have memory because the constructor asked for it, stay what they are.
        """
        for entry, owners in self._owned().items():
            are_parameters = all(module._parameters.get(name) is not None for module, name in owners)
            if entry.allocated or entry.resident or not are_parameters:
                continue
            self._keep(entry, owners, entry.recipe, None)
            self.deferred += len(entry.recipe)
            for ref in entry.refs:
                tensor = ref()
                if tensor is not None:
                    _move_to_meta(tensor, self._by_id.pop(id(tensor))[2])

    def _owned(self) -> dict[Entry, list[tuple[torch.nn.Module, str]]]:
        """What modules own whole, a state dict holds, and is still a recipe: the owners, and their names for it."""
        owned: dict[Entry, list[tuple[torch.nn.Module, str]]] = {}
        parts = set()
        for module in self.seen_modules():
            for name, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is None or name in module._non_persistent_buffers_set:
                    continue
                entry = self.find(tensor)
                if entry is None or entry.recipe is None:
                    continue
                owned.setdefault(entry, []).append((module, name))
                if not (self.is_whole(entry, tensor) and tuple(tensor.shape) == entry.shape):
                    parts.add(entry)
        return {entry: owners for entry, owners in owned.items() if entry not in parts}

    def _keep(
        self,
        entry: Entry,
        owners: list[tuple[torch.nn.Module, str]],
        recipe: tuple[Write, ...],
        mark: float | None,
    ) -> None:
        deferred = Deferred(entry.shape, entry.dtype, self.seed, recipe, mark, entry.device, self.seed_agreed)
        for module, name in owners:
            keep(module, name, deferred)

    def seen_modules(self) -> Iterator[torch.nn.Module]:
        """The modules that the context has seen, and those below them, in one order on every rank."""
        waiting = deque(module for ref in self._modules.values() if (module := ref()) is not None)
        seen = set(map(id, waiting))
        while waiting:
            module = waiting.popleft()
            yield module
            for child in module._modules.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)

    def parameters(self) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter, Deferred | None]]:
        """The parameters of all modules that the context has seen, with the recipes that were deferred."""
        for module in self.seen_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield module, name, parameter, kept_for(module, name)

    def _mark(self, entry: Entry, data_ptr: int) -> None:
        if entry.device not in self._marks:
            self._marks[entry.device] = Fills(self.seed, entry.device)
        self._marks[entry.device].add(data_ptr, numel(entry.shape), entry.dtype, entry.recipe)

    # --- giving tensors their memory and values ------------------------------------------------------------------

    def settle(self, entries: list[Entry]) -> None:
        """Give entries their memory and final values, and forget them."""
        # Those that are not tracked have been settled. Until all have memory and values, an error leaves all tracked.
        entries = [e for e in dict.fromkeys(entries) if not e.allocated or e.storage_key in self._by_storage]
        for entry in entries:
            self.give_memory(entry)
        fills: dict[torch.device, Fills] = {}
        for entry in entries:
            if entry.shadow is not None:
                self._memory(entry).copy_(entry.shadow)
            elif entry.deferred:
                self._mark(entry, entry.data_ptr)
            elif entry.recipe is not None and not entry.filled:
                if entry.device not in fills:
                    fills[entry.device] = Fills(self.seed, entry.device)
                fills[entry.device].write(self._memory(entry), entry.recipe)
        for each in fills.values():
            self._run(each)
        for entry in entries:
            self._untrack(entry)

    def settle_all(self) -> None:
        """Give everything that is still alive its memory and values, as a rule in the order of creation."""
        try:
            entries = native.waiting(self._by_id)
            self._settle_new([entry for entry in entries if not entry.resident])
            for entry in entries:
                if entry.resident and not entry.filled:
                    self.give_memory(entry)
            self.settle([entry for entry in list(self._by_storage.values()) if entry.alive])
            for marks in self._marks.values():
                marks.run()
            # Only now: a mark must not fetch a huge page, which is cleared whole, for a few bytes.
            for memory in self._marked:
                advise_huge_pages(memory)
        except BaseException:
            # Nothing half-made stays behind: give the memory back.
            for entry in self._given:
                for ref in entry.refs:
                    tensor = ref()
                    if tensor is not None:
                        tensor.data = torch.empty(0, dtype=entry.dtype, device=entry.device)
            raise
        finally:
            for entry in list(self._by_storage.values()):
                self._untrack(entry)
            self._by_id.clear()
            self._shadows.clear()
            self._given.clear()
            self._marks.clear()
            self._marked.clear()
            self._ready, self._ready_bytes = [], 0

    def _fill_ready(self) -> None:
        """Let the GPU fill parameters that are initialised, since they are worth a segment, while the constructor runs.

        Values stay what they would be in any case: the recipe is kept, and what comes later overwrites what was filled.
        """
        with _modes_off():
            ready = {e: None for e in self._ready if e.alive and not (e.allocated or e.resident) and e.recipe}
            if self._loads_later():
                ready, self._overlap = {}, False
            elif _initialises_at_the_end():
                ready = {e: None for e in ready if e.again}
            self._ready, self._ready_bytes = [], 0
            self._ready_limit = _SEGMENT_BYTES
            self._settle_new(list(ready))
            for other in ready:
                other.resident = other.filled = True

    def _loads_later(self) -> bool:
        """Whether the code that creates the model, from the context down, also mentions how checkpoints are loaded.

        This is a guess, like that of `_initialises_at_the_end`: a fill that a checkpoint overwrites is wasted time.
        """
        frame: Any = sys._getframe(1)
        while frame is not None:
            if not _LOADERS.isdisjoint(frame.f_code.co_names):
                return True
            frame = None if id(frame) == self.entered_from else frame.f_back
        return False

    def _settle_new(self, entries: list[Entry]) -> None:
        """Give entries that have no memory theirs, and fill it."""
        for segment in self._segments(entries):
            self._settle_segment(segment)

    def _segments(self, entries: list[Entry]) -> Iterator[list[Entry]]:
        """Entries of one device each, in groups for which memory is reserved in one step."""
        segment: list[Entry] = []
        reserved = 0
        for entry in entries:
            nbytes = entry.nbytes
            if segment and (reserved + nbytes > _SEGMENT_BYTES or entry.device != segment[0].device):
                yield segment
                segment, reserved = [], 0
            segment.append(entry)
            reserved += nbytes
        if segment:
            yield segment

    def _settle_segment(self, segment: list[Entry]) -> None:
        started, ran = time.perf_counter(), self.run_seconds
        device = segment[0].device
        if device.type == "cuda":
            reserve([entry.nbytes for entry in segment], device)
        fills, size = Fills(self.seed, device), 0
        prototypes = self._prototypes if device == self.device and not torch.is_inference_mode_enabled() else {}
        done = 0
        while done < len(segment):
            # The plain ones natively, all of them as a rule, and then the one that is not.
            done, nbytes = fills.settle(segment, done, self._by_id, self._given, prototypes, _BATCH_BYTES - size)
            size += nbytes
            if size >= _BATCH_BYTES:
                self._run(fills)
                size = 0
                continue
            if done == len(segment):
                break
            entry = segment[done]
            done += 1
            if not (self._given and self._given[-1] is entry):
                self._given.append(entry)
            memory = self._allocate(entry, huge_pages=not entry.deferred)
            self._point(entry, memory)
            recipe = entry.recipe
            if entry.shadow is not None:
                memory.copy_(entry.shadow)
                self._shadows.pop(entry, None)
                entry.shadow = None
                continue
            if entry.deferred:
                self._mark(entry, memory.data_ptr())
                self._marked.append(memory)
                continue
            if not recipe:
                # Raw memory is for those alone who asked for it with torch.empty and keep it outside of a module, and
                # not for parameters: Module.to_empty puts them in their places without a word.
                if entry.name is not None:
                    warn_never_initialised(f"{entry.name[0].__name__}.{entry.name[1]}", entry.shape)
                elif any(isinstance(ref(), torch.nn.Parameter) for ref in entry.refs):
                    warn_never_initialised("a parameter", entry.shape)
                else:
                    continue
            fills.write(memory, recipe)
            size += entry.nbytes
            if size >= _BATCH_BYTES:
                self._run(fills)
                size = 0
        self._run(fills)
        self.allocation_seconds += time.perf_counter() - started - (self.run_seconds - ran)

    # --- what modules own ----------------------------------------------------------------------------------------

    def registered(self, module: torch.nn.Module, name: str, tensor: torch.Tensor, is_parameter: bool) -> None:
        """A module has taken a tensor as a parameter or a buffer."""
        if is_parameter:
            self.module_parameters.append(weakref.ref(tensor))
        if self.defers:
            self.saw(module)
        known = self._by_id.get(id(tensor))
        if known is not None and known[0]() is tensor:
            known[1].name = (type(module), name)
            return
        with _modes_off():
            if tensor.layout == torch.strided and not _other_dispatch():
                self._adopt(tensor)

    def saw(self, module: torch.nn.Module) -> None:
        """A module has been given something, a child perhaps: it, or what is below it, may own what is deferred."""
        known = self._modules.get(id(module))
        if known is None or known() is not module:
            # An id that a dead module had must not put this one in its place in the order.
            self._modules.pop(id(module), None)
            self._modules[id(module)] = weakref.ref(module)

    def _adopt(self, tensor: torch.Tensor) -> None:
        """Recognise a tensor that was made from a placeholder without the recorder seeing it."""
        if tensor.numel() < 2 or any(tensor.stride()) or (not tensor.is_cpu and not tensor.is_cuda):
            return
        key = tensor.untyped_storage()._cdata
        for ref, entry, region in list(self._by_id.values()):
            other = ref()
            if other is not None and other.untyped_storage()._cdata == key:
                self.stand_for(tensor, entry, region)
                return


_PLAIN = torch.Tensor.__torch_dispatch__


def _timing_events(device: torch.device) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events before and after what is enqueued next; the first has been recorded."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record(torch.cuda.current_stream(device))
    return before, after


def concrete(device: str | int | torch.device) -> torch.device:
    """A device with its index: ``cuda`` means the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _move_to_meta(tensor: torch.Tensor, region: Region | None) -> None:
    """Make a placeholder, or the view of one, a tensor on the meta device, which stays the same object."""
    strides = contiguous_strides(tensor.shape) if region is None else region.strides
    meta = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta")
    # No .data: torch takes none of another kind of device. And not torch.utils.swap_tensors, which would exchange the
    # attributes too and refuses tensors that have weak references.
    torch._C._swap_tensor_impl(tensor, meta.requires_grad_(tensor.requires_grad))


def _device_context() -> DeviceContext | None:
    # torch keeps the only device context at the bottom of its mode stack.
    if torch._C._len_torch_function_stack():
        mode = torch._C._get_function_stack_at(0)
        if isinstance(mode, DeviceContext):
            return mode
    return None


def _other_dispatch() -> bool:
    """Whether a mode below autograd (fake tensors, say) is active: its tensors have no memory to fill."""
    return torch._C._len_torch_dispatch_stack() > 0


def _collect(values: Iterable[Any], tensors: list[torch.Tensor]) -> None:
    if isinstance(values, dict):
        values = values.values()
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple, dict)):
            _collect(value, tensors)


def _replace(values: Any, replaced: dict[int, torch.Tensor]) -> Any:
    if isinstance(values, torch.Tensor):
        return replaced.get(id(values), values)
    if isinstance(values, dict):
        return {key: _replace(value, replaced) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(_replace(value, replaced) for value in values)
    return values


def _written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a function writes to."""
    written: list[torch.Tensor] = []
    if func in IN_PLACE:
        _collect(args[:1], written)
    if kwargs.get("out") is not None:
        _collect((kwargs["out"],), written)
    return written


def _names_dtype(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.dtype) for value in args) or isinstance(kwargs.get("dtype"), torch.dtype)


# Methods by which model classes initialise, at the end of their constructor, what its modules have initialised before.
_OWN_INITIALISERS = ("_init_weights", "init_weights", "post_init", "initialize_weights", "_initialize_weights")


# Names by which code mentions that it loads a checkpoint.
_LOADERS = frozenset(
    ("load_state_dict", "load_from_checkpoint", "load_model", "load_checkpoint", "vector_to_parameters")
)


def _initialises_at_the_end() -> bool:
    """Whether a module under construction brings an initialiser of its own, so that fills may be dropped yet.

    This is a guess that costs or saves time alone: a fill that was executed too early is executed again.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            module = frame.f_locals.get("self")
            if isinstance(module, torch.nn.Module) and any(hasattr(type(module), name) for name in _OWN_INITIALISERS):
                return True
        frame = frame.f_back
    return False


# torch's own. Accelerate's init_empty_weights, for one, replaces it for a while.
_register_parameter = torch.nn.Module.register_parameter


def _is_plain(cls: type[torch.nn.Module]) -> bool:
    """Whether torch's Module.__setattr__ is all that assigns attributes of a class of modules."""
    bases = cls.__mro__[cls.__mro__.index(torch.nn.Module) + 1 :]
    return (
        bases == (object,)
        and cls.__getattribute__ is object.__getattribute__
        and cls.__getattr__ is torch.nn.Module.__getattr__
        and cls.register_parameter is _register_parameter
    )


# Attributes of these types are neither tensors nor modules.
_PLAIN_TYPES = {int, float, bool, str, type(None), tuple, list, dict, set, FunctionType, torch.dtype, torch.device}

# patches.py puts the latter two in the place of torch.nn.Module's methods and of Parameter.__new__ during a context.
_torch_function, module_methods, new_parameter = native.connect(
    Recorder, Entry, _thread, HANDLERS, PASS, Write, _is_plain, _PLAIN_TYPES
)
Recorder.__torch_function__ = _torch_function  # type: ignore[method-assign]


# Where torch's code is that turns parameters into DTensors. It may have been imported long before.
_SHARDING_CODE = ("torch.distributed.fsdp._fully_shard.", "torch.distributed.tensor.")


class ShardRecorder(Recorder):
    """A recorder that steps aside where a model is sharded inside of its context."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(_SHARDING_CODE):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        kwargs = kwargs or {}
        if not self._suspended:
            with _modes_off():
                self._leave_to_sharding(args, kwargs)
        return func(*args, **kwargs)

    def _leave_to_sharding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """FSDP2 and DTensor have to find parameters on meta, and other tensors real."""
        tensors: list[torch.Tensor] = []
        _collect(args, tensors)
        _collect(kwargs, tensors)
        if any(entry is not None and entry.recipe is not None for entry in map(self.find, tensors)):
            self._defer_to_shards()
        self.settle([entry for entry in map(self.find, tensors) if entry is not None])

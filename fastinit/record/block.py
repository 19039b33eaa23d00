"""The state of one ``with fastinit.on(...)`` block: its key and streams, its records, and how they become real."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .. import native
from ..execution import Fills, Timing, allocate, reserve
from ..log import listed
from ..recipe import COMPUTED, Write
from . import fast
from .calls import streams_in
from .generator import Generator
from .names import models_of, tensors_of
from .records import Record, lock, modes_off
from .tensors import take_record_memory

Empty = Literal[True, "nan", "unchecked"]

# The innermost block of the running thread or coroutine.
current: ContextVar[Block | None] = ContextVar("fastinit_block", default=None)

# Master values are kept until the block ends, so that a chain of operations rounds once, but not more than this in all:
# contract 5 grants 64 MiB beyond the model.
_MASTER_BYTES = 48 << 20

# So many tensors are named in a warning.
_NOTED = 10

# Device memory is reserved in segments of up to this size: one cudaMalloc per parameter would cost more than the fills.
_SEGMENT_BYTES = 8 << 30

# Tensors of so many bytes are filled in one go, so that a GPU starts before all of them have their memory.
_BATCH_BYTES = 1 << 30


class History(NamedTuple):
    """What has written a tensor, and what it wrote over, in the order of time."""

    writes: tuple[Write, ...]
    replaced: tuple[Write, ...]


class Block(native.Block):
    """One entered block.

    Attributes:
        device, seed: where its models go, and the key of their values.
        default_dtype: what a factory without a dtype gives; code in the block may change it.
        empty, shard: as given to `on`.
        rename: from a tensor's name to the one that decides its streams; None if their order does.
        defers: operators on what is random wait with it.
        seed_agreed: all ranks have the seed.
        timing: of memory and values, with the number of fills that were executed.
        dropped, deferred: numbers of other fills.
        ran: how often torch itself ran which operation; None where nobody wants to know.
        by_name: streams that names have decided.
        by_order: other streams, though names were to decide them, and what each was for; None: for nothing of note.
        records: weak references, in the order of creation.
        modules: weak references to those that have been given a tensor or a child, by id, in the order of the first
        time.
        mode: weak reference to its mode.
        report: weak reference to the report that somebody may read, or None.
        outer: the block around it, whose report tells of its tensors, too.
        histories: of tensors that have become real, with their version at the time; shared with the outer block.
    """

    generator: Generator
    records: list[weakref.ref[Record]]
    modules: dict[int, weakref.ref[torch.nn.Module]]
    mode: weakref.ref[Any]

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        empty: Empty | None = None,
        shard: bool = False,
        rename: Callable[[str], str] | None = None,
        outer: Block | None = None,
    ) -> None:
        self.device = device
        self.default_dtype = dtype
        self.seed = seed
        self.empty = empty
        self.shard = shard
        self.rename = rename
        # Names are known at the end, and what is computed from random values cannot be before they are.
        self.defers = shard or bool(empty) or rename is not None
        self.seed_agreed = False
        self.timing = Timing(watched=True)
        self.dropped = 0
        self.deferred = 0
        self.ran: Counter[str] | None = None
        self.by_name: set[int] = set()
        self.by_order: dict[int, str | None] = {}
        self.records = []
        self.generator = Generator(seed)
        self._masters: dict[Record, None] = {}
        self._master_bytes = 0
        self.modules = {}
        self._reserved_for = 0
        self._existing: dict[int, tuple[int, int]] = {}
        self._had_compiler = "torch._dynamo" in sys.modules
        self.report: weakref.ref[Any] | None = None
        self.outer = outer
        self.histories: dict[StorageWeakRef, tuple[int, History]] = {} if outer is None else outer.histories

    # --- fills --------------------------------------------------------------------------------------------------

    def execute(self, record: Record, memory: torch.Tensor, recipe: tuple[Write, ...], *, zeros: bool = True) -> None:
        """Give contiguous memory the values of a record's recipe, or zeros where it leaves anything out."""
        if memory.numel() == 0:
            return
        self.keep_order(recipe, record)
        record.did(*recipe)
        fills = Fills(self.seed, memory.device)
        fills.write(memory, recipe, zeros=zeros)
        self.timing.run(fills)

    # --- streams by name ------------------------------------------------------------------------------------------

    def keep_order(self, recipe: tuple[Write, ...], record: Record, *, used: bool = True) -> None:
        """Note that the streams of a recipe are what they are from here on, by default because values are used."""
        if self.rename is None:
            return
        for stream in streams_in(recipe):
            if stream not in self.by_name and stream not in self.by_order:
                self.by_order[stream] = record.what() or ("a tensor" if used else None)

    def warn_of_order(self) -> None:
        """Say which draws have the streams of their order, where names were to decide them."""
        noted = list(dict.fromkeys(what for what in self.by_order.values() if what))
        if noted:
            warnings.warn(
                f"fastinit.on: names decide what is drawn, but not of {listed(noted, _NOTED)}: their values "
                "were used before the block ended, or no module of the block has them, so that their order decides. "
                "docs/stream-v1.md says more.",
                stacklevel=4,
            )

    # --- master values ------------------------------------------------------------------------------------------

    def touch(self, record: Record) -> None:
        """Note that master values are in use; the oldest ones are rounded if there are too many."""
        if record not in self._masters:
            assert record.values is not None
            self._master_bytes += record.values.nbytes
        self._masters.pop(record, None)
        self._masters[record] = None
        if self._master_bytes <= _MASTER_BYTES:
            return
        kept = [(each, each.values.nbytes) for each in self._masters if each.values is not None and each.placeholders()]
        size = sum(nbytes for _, nbytes in kept)
        while size > _MASTER_BYTES and len(kept) > 1:
            oldest, nbytes = kept.pop(0)
            size -= nbytes
            oldest.materialize()
        self._masters, self._master_bytes = dict.fromkeys(each for each, _ in kept), size

    # --- modules ------------------------------------------------------------------------------------------------

    def saw(self, module: torch.nn.Module) -> None:
        """A module has been given a tensor or a child."""
        known = self.modules.get(id(module))
        if known is None or known() is not module:
            # An id that a dead module had must not put this one in its place in the order.
            self.modules.pop(id(module), None)
            self.modules[id(module)] = weakref.ref(module)

    def seen_modules(self) -> Iterator[torch.nn.Module]:
        """The modules that the block has seen, and those below them, in one order on every rank."""
        waiting = deque(module for ref in list(self.modules.values()) if (module := ref()) is not None)
        seen = set(map(id, waiting))
        while waiting:
            module = waiting.popleft()
            yield module
            for child in module._modules.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)

    def initialized(self, tensor: torch.Tensor) -> None:
        """A parameter that was there before the block has been initialized in it."""
        if isinstance(tensor, torch.nn.Parameter):
            self._existing[id(tensor)] = (tensor.numel(), tensor.numel() * tensor.element_size())

    def name_of(self, record: Record) -> str | None:
        """What a model calls a record's tensor, for a message; None if no module has it."""
        tensors = set(map(id, record.placeholders()))
        for model in models_of(self.seen_modules()):
            for name, _, _, tensor in tensors_of(model):
                if id(tensor) in tensors:
                    return f"{name} of {type(model[0][1]).__name__}"
        return None

    def parameters(self) -> tuple[int, int]:
        """Elements and bytes of the parameters of all modules that the block has seen, and of others that it filled."""
        with modes_off():
            if fast.in_use and not self._existing:
                return native.tally(self)
            tensors = {id(p): p for module in self.seen_modules() for p in module._parameters.values() if p is not None}
            sizes = {key: (p.numel(), p.numel() * p.element_size()) for key, p in tensors.items()}
            sizes = {**self._existing, **sizes}
        return sum(elements for elements, _ in sizes.values()), sum(nbytes for _, nbytes in sizes.values())

    # --- histories ----------------------------------------------------------------------------------------------

    def is_reported(self) -> bool:
        """Whether anybody has kept the report, or that of a block around this one."""
        return bool(self.report and self.report()) or bool(self.outer and self.outer.is_reported())

    def keep_history(self, tensor: torch.Tensor, writes: tuple[Write, ...], replaced: tuple[Write, ...] = ()) -> None:
        """Note what has written a tensor that has memory now, for a report that somebody may read."""
        if not self.is_reported():
            return
        key = StorageWeakRef(tensor.untyped_storage())
        if key in self.histories:
            _, before = self.histories[key]
            replaced = (*before.replaced, *before.writes, *replaced)
        self.histories[key] = tensor._version, History(writes, replaced)

    def history_of(self, record: Record) -> History:
        """What has written a record's content, or is to."""
        writes = (*(record.executed or ()), *(record.recipe or ()))
        return History(writes if writes or record.recipe == () else (COMPUTED,), record.replaced or ())

    # --- becoming real ------------------------------------------------------------------------------------------

    def waiting(self) -> list[Record]:
        """Records that placeholders still stand for, in the order of their creation."""
        if fast.in_use:
            waiting: list[Record] = native.waiting(self)
            return waiting
        alive = [record for ref in self.records if (record := ref()) is not None]
        self.records = [weakref.ref(record) for record in alive]
        return [record for record in alive if record.placeholders()]

    def reserve_for_all(self, device: torch.device) -> None:
        """Reserve for whatever waits for memory: the others get theirs one by one, too, while a checkpoint loads."""
        if device.type != "cuda" or len(self.records) < self._reserved_for:
            return
        self._reserved_for = 2 * len(self.records)
        reserve([each.nbytes for each in self.waiting() if each.memory is None and each.device == device], device)

    def settle(self) -> None:
        """Make every placeholder an ordinary tensor with its memory and values, or leave all as they are."""
        if not self.records:
            return
        if not self._had_compiler and "torch._dynamo" in sys.modules:
            # torch has imported it for an operator on meta. Exceptions that it caught meanwhile hold the constructor's
            # frames, with placeholders that nobody else has, until the garbage collector finds them.
            gc.collect()
        with lock, modes_off(), torch.no_grad():
            records = self.waiting()
            if self.rename is not None:
                for record in records:
                    self.keep_order(record.recipe or (), record, used=False)
            unwritten = [(r.what(), r.shape) for r in records if r.recipe == () and not r.deferred]
            resident = [record for record in records if record.memory is not None]
            # Versions are those of the tensors, whose memory is another object.
            histories = [(each.placeholders(), self.history_of(each)) for each in records] if self.is_reported() else []
            given: list[tuple[Record, torch.Tensor]] = []
            plain: list[Record | torch.Tensor] = []
            for segment in _segments([record for record in records if record.memory is None]):
                with self.timing.allocating():
                    self._give_memory(segment, given, plain)
            # Only now, when nothing is left that fails.
            for record, memory in given:
                record.become_resident(memory)
            for record in (*resident, *(record for record, _ in given), *native.swap_in(plain)):
                take_record_memory(record, record.placeholders())
            for tensors, history in histories:
                parameters = [each for each in tensors if isinstance(each, torch.nn.Parameter)]
                self.keep_history((parameters or tensors)[0], *history)
            self._masters.clear()
            for what, shape in unwritten:
                if what is not None:
                    warn_never_initialized(what, shape)

    def _give_memory(
        self, segment: list[Record], given: list[tuple[Record, torch.Tensor]], plain: list[Record | torch.Tensor]
    ) -> None:
        """Add records of one device with their memory to `given`, or to `plain` what the fast path serves."""
        device = segment[0].device
        reserve(map(attrgetter("nbytes"), segment), device)
        fills, size = Fills(self.seed, device), 0
        done = 0
        while done < len(segment):
            if fast.in_use:
                done, nbytes = fills.give_memory(segment, done, plain, _BATCH_BYTES - size)
                size += nbytes
            if done < len(segment) and size < _BATCH_BYTES:
                size += self._give_memory_to(segment[done], given, fills)
                done += 1
            if size >= _BATCH_BYTES:
                self.timing.run(fills)
                size = 0
        self.timing.run(fills)

    def _give_memory_to(self, record: Record, given: list[tuple[Record, torch.Tensor]], fills: Fills) -> int:
        """Give one record memory; the bytes that its fills add to the batch."""
        if record.values is not None and not record.needs_master:
            given.append((record, record.values))
            return 0
        memory = allocate(record.shape, record.dtype, record.device, name_of=lambda: self.name_of(record))
        given.append((record, memory))
        if record.deferred:
            return 0
        if record.values is not None:
            record.copy_values(memory)
            return 0
        fills.write(memory, record.recipe or ())
        return record.nbytes


def warn_never_initialized(what: str, shape: tuple[int, ...]) -> None:
    """Say that a tensor, of a module as a rule, is one that the constructor does not initialize."""
    warnings.warn(
        f"fastinit: {what} of shape {tuple(shape)} is never initialized by its module; it was filled with "
        "zeros instead of being left as raw memory. Initialize it in the constructor, or load a checkpoint that "
        "supplies it inside the context.",
        stacklevel=3,
    )


def _segments(records: list[Record]) -> Iterator[list[Record]]:
    """Records of one device each, in groups for which memory is reserved in one step."""
    for device, group in groupby(records, attrgetter("device")):
        segment = list(group)
        if device.type == "cpu" or sum(map(attrgetter("nbytes"), segment)) <= _SEGMENT_BYTES:
            yield segment
            continue
        rest, segment, reserved = segment, [], 0
        for record in rest:
            if segment and reserved + record.nbytes > _SEGMENT_BYTES:
                yield segment
                segment, reserved = [], 0
            segment.append(record)
            reserved += record.nbytes
        yield segment

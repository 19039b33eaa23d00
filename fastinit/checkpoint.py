"""`load`: a checkpoint streamed into a model, whole or not at all.

Three steps. The files are opened, and their metadata gives the name, shape and dtype of every tensor (`Checkpoint`).
Then torch's own loading code, the ``_load_from_state_dict`` of each module, is run over stand-ins for those tensors
(`_Stored`), and the copies that it would make are noted instead (`_Copies`): so names, hooks, versions and lazy modules
mean what they mean to ``load_state_dict``, and whatever can be known without values is refused before anything is
written. Last, the copies are made: those between contiguous memory and bytes of a file are streamed (`streaming`), the
others follow in the order of the files, one tensor in memory at a time.

A model that brings loading code of its own may look at values while it is loaded. It gets what ``load_state_dict``
would give it: tensors that are mapped from the files, copied at once.

Private: it may change with any version.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX, _IncompatibleKeys
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .checkpoint_files import Checkpoint, CheckpointError, Part
from .context import on
from .execution import reserve
from .layout import Box, Slices, Window, compose, contiguous_strides, slices_of
from .materialization import initialize
from .record.records import modes_off
from .record.tensors import Placeholder, new_memory, take_memory
from .record.unwritten import Unwritten, memory_to_write, wrote
from .report import readable
from .sharding import Held, cut, held, is_dtensor, why_not_written, with_whole_shapes
from .streaming import Transfer, stream

# Elements that are compared or searched at a time.
_CHUNK = 1 << 18

# Shorter rows of a file are cut from a mapping: each would be read by a call of its own.
_ROW_BYTES = 512

_NAMES_IN_WARNINGS = 10

# Loading code in these modules of torch copies tensors and edits names. It does not look at what was copied.
_KNOWN_CODE = ("torch.nn.", "torch.distributed.fsdp._fully_shard.", "torch.distributed.algorithms._checkpoint.")


@dataclass(slots=True)
class LoadReport:
    """What one `load` did; complete once it has returned.

    Attributes:
        missing: names of the model's state that the checkpoint does not supply, not even by the name of a tied tensor.
        unexpected: names in the checkpoint that the model does not have.
        converted: dtype in the checkpoint and in the model of each tensor whose dtype differs, by its name there.
        bytes: size in the checkpoint of the tensors that were loaded.
        seconds: wall time, with the creation of the model if `load` did that.

    Example:
        >>> print(fastinit.LoadReport(missing=["head.weight"], bytes=3 << 20, seconds=0.5))
        loaded 3 MiB in 0.50 s: 1 missing, 0 unexpected, 0 converted
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    converted: dict[str, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"loaded {readable(self.bytes)} in {self.seconds:.2f} s: {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.converted)} converted"
        )


def load(
    model: nn.Module | Callable[[], nn.Module],
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    seed: int | None = None,
    window: Callable[[str, tuple[int, ...]], Slices | None] | None = None,
    strict: bool = True,
    progress: bool = True,
    report: LoadReport | None = None,
) -> nn.Module:
    """Load a checkpoint into a model, which is created for it if a function is given.

    The model is created under ``fastinit.on(device, dtype, seed=seed, empty=True)``, so that no value is computed that
    the checkpoint supplies. Several threads read the files, straight into the memory of parameters and buffers, or
    through buffers (of 32 MiB; of 128 MiB pinned memory for a GPU), and what arrives is converted to their dtype
    while other parts are read. What lies in another order than in memory is mapped and copied, one tensor at a time. So
    beside the model there is never more in memory than the largest tensor, or the buffers.
    (torch.distributed.checkpoint reads a tensor into memory and copies it there, which takes up to three times that.
    Files of torch before 1.6 are read whole.) torch keeps the pinned buffers for the next load.

    Of a DTensor, of a parameter under DeepSpeed's ZeRO-3 before ``deepspeed.initialize``, and with ``window``, this
    process has its own part, and waits for no other one. It reads no more than that, unless what lies side by side in a
    file is less than 512 bytes of it, or nothing is streamed.

    What a state dict means to ``load_state_dict`` it means here: hooks, versions and extra state included. Loading
    code that the model's own classes bring runs as it would there. Such a model may be left with part of a checkpoint
    that turns out not to fit, and the files stay mapped until it is loaded.

    Args:
        model: a module, or a function (a class, say) that creates one when it is called without arguments.
        path: a .safetensors file; a file written by ``torch.save`` that holds a state dict, plain or under the key
            "state_dict" as Lightning writes it; the index.json of such a checkpoint in several files; a directory with
            one of these; or a directory written by ``torch.distributed.checkpoint``. Nothing in a checkpoint is run:
            torch files are unpickled with ``weights_only=True``, and so are the objects of a distributed checkpoint,
            whose metadata may hold what torch writes there and nothing else. No file outside of its directory is read.
        device, dtype, seed: as for `fastinit.on`, for a model that is created here; device None means "cuda".
        window: for a model with parallelism of your own, the one that `materialize` was given: called with the name of
            each parameter and its shape in the checkpoint, it returns the slices that the model has, or None for all.
        strict: raise if names are missing or unexpected, or if one memory would get two different tensors. False: what
            is missing gets its recorded initialisation, with the bits that it would have without the checkpoint, or
            keeps its value if it has one; what is unexpected is left out; and without a report there is a warning.
        progress: show a bar in bytes, if tqdm is installed.
        report: is filled with names, dtypes, bytes and seconds.

    Returns:
        The model, every tensor of which has its values.

    Raises:
        CheckpointError: for a file that is missing, truncated, corrupt or refused by ``weights_only``; for names (if
            strict), shapes and kinds of dtype that do not fit, all of them in one message; for a finite value that the
            model's dtype cannot hold. A model that was passed has its old values then, except that a file which fails
            after its metadata has been read and found right leaves the model with a part of it.
        ValueError: a path that is none of the above; device, dtype or seed together with a module; a window that is no
            such tuple of slices.
        FileNotFoundError: a path that does not exist.
        ImportError: a .safetensors file without the safetensors package.

    Example:
        >>> torch.save({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, "checkpoint.pt")
        >>> model = fastinit.load(lambda: torch.nn.Linear(2, 1), "checkpoint.pt", "cpu", "bf16")
        >>> model.weight
        Parameter containing:
        tensor([[1., 1.]], dtype=torch.bfloat16, requires_grad=True)
    """
    started = time.perf_counter()
    if isinstance(model, nn.Module):
        if not (device is None and dtype is None and seed is None):
            raise ValueError(
                f"fastinit.load: device={device!r}, dtype={dtype!r}, seed={seed!r} are for a model that is created "
                "here; the one that was passed has its own. Leave them out, or pass a function that creates the model"
            )
        checkpoint, made, new = Checkpoint(Path(path)), model, False
    elif callable(model):
        context = on("cuda" if device is None else device, dtype, seed=seed, empty=True)
        checkpoint, made, new = Checkpoint(Path(path)), _created(model, context), True
    else:
        raise TypeError(f"fastinit.load: model={model!r} must be a module, or a function that returns one")
    loading = _Loading(made, checkpoint, strict, new, window)
    with _bar(loading.bytes, progress, checkpoint.path) as bar:
        loading.run(bar.update if bar is not None else lambda count: None)
    initialize(made)  # what the checkpoint has not
    done = loading.report
    done.seconds = time.perf_counter() - started
    if report is not None:
        for each in fields(done):
            setattr(report, each.name, getattr(done, each.name))
    elif done.missing or done.unexpected:
        warnings.warn(
            f"fastinit.load: {str(checkpoint.path)!r} and {type(made).__name__} differ: {len(done.missing)} names "
            f"missing in the checkpoint ({_some(done.missing)}), {len(done.unexpected)} unexpected "
            f"({_some(done.unexpected)}). Pass report=fastinit.LoadReport() to have them without this warning",
            stacklevel=2,
        )
    return made


def _created(factory: Callable[[], nn.Module], context: on) -> nn.Module:
    with context:
        model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastinit.load: model={factory!r} returned a {type(model).__name__}, not a module")
    return model


# --- loading --------------------------------------------------------------------------------------------------------


class _Stored(torch.Tensor):
    """Stands for a tensor of a checkpoint, which is read when torch computes with it."""

    _checkpoint: Checkpoint
    key: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _slices: Slices | None

    @staticmethod
    def of(checkpoint: Checkpoint, name: str, slices: Slices | None = None) -> _Stored:
        shape, dtype, _ = checkpoint.tensors[name]
        if slices is not None:
            shape = tuple(each.stop - each.start for each in slices)
        stored: _Stored = torch.Tensor._make_wrapper_subclass(_Stored, shape, dtype=dtype, device=torch.device("cpu"))
        stored._checkpoint, stored.key, stored._slices = checkpoint, name, slices
        return stored

    def read(self) -> torch.Tensor:
        whole = self._checkpoint.read(self.key)
        return whole if self._slices is None else whole[self._slices]

    def streamed_to(self, part: Held) -> _Streamed | None:
        """The same as rows of a file; None if that is not what it is, or files cannot be streamed to where it goes."""
        found = []
        for stored, box in self._ranges(part):
            rows = box.rows
            short = rows is not None and rows.stride > rows.length and rows.length * self.dtype.itemsize < _ROW_BYTES
            if rows is None or short:
                return None
            found.append((stored, box, rows))
        complete = sum(rows.number * rows.length for *_, rows in found) == part.memory.numel()
        memory = _memory(part.memory) if complete else None
        if memory is None:
            return None
        transfers = []
        for stored, box, (number, length, stride, memory_stride) in found:
            place = memory.storage_offset() + box.memory_offset
            target = memory.as_strided((number, length), (memory_stride, 1), place)
            offset = stored.offset + box.index_offset * self.dtype.itemsize
            gaps = stride * self.dtype.itemsize if stride > length else 0
            transfers.append(Transfer(stored.file, offset, self.dtype, target, gaps))
        return _Streamed(memory, transfers)

    def _ranges(self, part: Held) -> Iterator[tuple[Part, Box]]:
        """Where in each part of a file, and where in memory, what is held of this tensor lies."""
        for stored in self._checkpoint.parts(self.key):
            boxes = [stored.box]
            if self._slices is not None:
                window = Window(self._checkpoint.tensors[self.key].shape, tuple(each.start for each in self._slices))
                boxes = compose(stored.box, window.box(self.shape, contiguous_strides(self.shape)))
            for box, place in product(boxes, part.boxes):
                yield from ((stored, each) for each in compose(box, place))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def read(value: Any) -> Any:
            return value.read() if isinstance(value, _Stored) else value

        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))


class _Copy(NamedTuple):
    target: torch.Tensor
    source: torch.Tensor
    part: Held

    @staticmethod
    def to(target: torch.Tensor, source: torch.Tensor) -> _Copy:
        return _Copy(target, source, held(target))

    def values(self, whole: torch.Tensor) -> torch.Tensor:
        """What this process holds of the source's values."""
        return whole if self.part.is_whole or is_dtensor(whole) else cut(whole, self.part)

    def read(self) -> torch.Tensor:
        return self.values(self.source.read() if isinstance(self.source, _Stored) else self.source)


class _Streamed(NamedTuple):
    """What of a copy is streamed, and into which memory."""

    memory: torch.Tensor
    transfers: list[Transfer]


class _Copies(TorchFunctionMode):
    """Hands every ``tensor.copy_(source)`` to a function that makes it, or makes it later."""

    def __init__(self, copy: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self._copy = copy

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.copy_ and len(args) == 2 and not kwargs and isinstance(args[1], torch.Tensor):
            self._copy(*args)
            return args[0]
        return func(*args, **(kwargs or {}))


class _Loading:
    """One load of a checkpoint into a model: what is to be copied where, and what does not fit."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        strict: bool,
        new: bool,
        window: Callable[..., Any] | None,
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.strict = strict
        self.new = new
        self.report = LoadReport()
        self.copies: list[_Copy] = []
        self._extra_states: dict[str, nn.Module] = {}
        self._last_hooks: list[tuple[Callable[..., Any], nn.Module]] = []
        self._problems: list[str] = []
        self._state = dict(_tensors(model, persistent_only=True))
        self._own_code = _own_loading_code(model)
        self._check_targets()
        self._slices = {} if window is None else self._checked_windows(window)
        if self._own_code is None:
            self._plan()
            self._refuse_problems()

    @property
    def bytes(self) -> int:
        """Bytes that `run` reads."""
        if self._own_code is not None:
            return sum(info.nbytes for info in self.checkpoint.tensors.values())
        passes = 1 if self.new else 2
        return sum(_read_bytes(copy) * (passes if _narrows(copy) else 1) for copy in self.copies)

    def run(self, advance: Callable[[int], Any]) -> None:
        """Copy everything; before that, unless the model is new, look for values that its dtypes cannot hold."""
        # Read before anything is written: one of them may be refused.
        extra_states = [(module, self.checkpoint.read_object(name)) for name, module in self._extra_states.items()]
        if self._own_code is not None:
            self._run_own_code(advance)
        elif self.new:
            self._stream(advance, check=True, write=True)
        else:
            self._stream(advance, check=True, write=False)
            self._refuse_problems()
            self._stream(advance, check=False, write=True)
        self._refuse_problems()
        self.report.bytes = sum(copy.source.nbytes for copy in self.copies if isinstance(copy.source, _Stored))
        for module, state in extra_states:
            module.set_extra_state(state)
        for hook, module in self._last_hooks:
            hook(module, _IncompatibleKeys(self.report.missing, self.report.unexpected))

    # What fits ---------------------------------------------------------------------------------------------------

    def _check_targets(self) -> None:
        on_meta = [name for name, tensor in self._state.items() if tensor.is_meta]
        if on_meta:
            self._problems.append(
                f"on the meta device: {', '.join(on_meta)}. Pass the function that creates the model, or give it "
                "memory first: model.to_empty(device=...)"
            )
        reasons = {why_not_written(tensor, self._own_code) for tensor in self._state.values()}
        self._problems.extend(sorted(reason for reason in reasons if reason is not None))
        self._refuse_problems()

    def _checked_windows(self, window: Callable[..., Any]) -> dict[str, Slices]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        found = {
            name: slices_of(window, name, info.shape, "fastinit.load")
            for name, info in self.checkpoint.tensors.items()
            if name in parameters
        }
        return {name: slices for name, slices in found.items() if slices is not None}

    def _plan(self) -> None:
        """Let torch's own code say what goes where, for a model without loading code of its own."""
        values: dict[str, Any] = {
            name: _Stored.of(self.checkpoint, name, self._slices.get(name)) for name in self.checkpoint.tensors
        }
        values.update(dict.fromkeys(self.checkpoint.objects))
        targets = {id(tensor) for _, tensor in _tensors(self.model)}

        def copy(target: torch.Tensor, source: torch.Tensor) -> None:
            if id(target) in targets:
                self.copies.append(_Copy.to(target, source))
            else:
                target.copy_(source)

        missing: list[str] = []
        unexpected: list[str] = []
        with _Copies(copy), with_whole_shapes(self._state.values()):
            self._visit(self.model, values, "", missing, unexpected)
        for each in self.copies:
            self._check_dtype(each)
        self._judge(missing, unexpected)
        self._resolve_ties()
        self._sort()

    def _visit(
        self, module: nn.Module, values: dict[str, Any], prefix: str, missing: list[str], unexpected: list[str]
    ) -> None:
        """What load_state_dict does for a module and those below it; extra state and last hooks are put off."""
        extra_state = prefix + _EXTRA_STATE_KEY_SUFFIX
        if type(module).set_extra_state is not nn.Module.set_extra_state and extra_state in values:
            # It changes the module in ways that nobody can foresee: last.
            self._extra_states[extra_state] = module
            del values[extra_state]
        version = dict((self.checkpoint.versions or {}).get(prefix[:-1], {}))
        module._load_from_state_dict(values, prefix, version, True, missing, unexpected, self._problems)
        below: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            if key.startswith(prefix):
                below.setdefault(key[len(prefix) :].partition(".")[0], {})[key] = value
        for name, child in module._modules.items():
            if child is not None:
                self._visit(child, below.get(name, {}), f"{prefix}{name}.", missing, unexpected)
        self._last_hooks.extend((hook, module) for hook in module._load_state_dict_post_hooks.values())

    def _check_dtype(self, copy: _Copy) -> None:
        found, wanted = copy.source.dtype, copy.target.dtype
        if found == wanted or not isinstance(copy.source, _Stored):
            return
        if _kind(found) != _kind(wanted):
            self._problems.append(
                f"dtype mismatch for {copy.source.key}: {found} in the checkpoint, {wanted} in the model"
            )
        self.report.converted[copy.source.key] = (found, wanted)

    def _judge(self, missing: Iterable[str], unexpected: Iterable[str]) -> None:
        """Note and, if strict, refuse what is missing or unexpected."""
        supplied: dict[Any, list[tuple[int, int]]] = {}
        for copy in self.copies:
            memory, start, end = _extent(copy.target)
            supplied.setdefault(memory, []).append((start, end))

        def is_supplied(name: str) -> bool:
            if name not in self._state:
                return self._has_extra_state(name)
            # Files that cannot hold a tensor twice, safetensors, have a tied one, or the whole of which it is a part.
            memory, start, end = _extent(self._state[name])
            return any(first <= start and end <= last for first, last in supplied.get(memory, ()))

        self.report.missing = missing = [name for name in dict.fromkeys(missing) if not is_supplied(name)]
        self.report.unexpected = unexpected = list(dict.fromkeys(unexpected))
        if self.strict and missing:
            self._problems.append(f"missing in the checkpoint: {', '.join(missing)}. strict=False initialises them")
        if self.strict and unexpected:
            self._problems.append(f"unexpected in the checkpoint: {', '.join(unexpected)}. strict=False skips them")

    def _has_extra_state(self, name: str) -> bool:
        """Whether a module of several names has its extra state under one of them."""
        if name in self._extra_states:
            return True
        owner, _, leaf = name.rpartition(".")
        return leaf == _EXTRA_STATE_KEY_SUFFIX and self.model.get_submodule(owner) in self._extra_states.values()

    def _resolve_ties(self) -> None:
        """Keep of several copies into one memory the last, as load_state_dict would; if strict they have to agree."""
        last: dict[Any, _Copy] = {}
        for copy in self.copies:
            place = (*_extent(copy.target), copy.target.stride() if _is_plain(copy.target) else None)
            other = last.pop(place, None)
            last[place] = copy
            if self.strict and not self._problems and other is not None and not _agree(other, copy):
                names = f"{_name(other)} and {_name(copy)}"
                self._problems.append(
                    f"{names} are one tensor in the model, and two in the checkpoint. strict=False takes the last"
                )
        self.copies = list(last.values())

    def _sort(self) -> None:
        """Order the copies as the files have them, except that tensors which share memory keep their order."""
        position = {name: index for index, name in enumerate(self.checkpoint.tensors)}
        last: dict[Any, int] = {}
        keys = {}
        for copy in self.copies:
            memory = _extent(copy.target)[0]
            key = position[copy.source.key] if isinstance(copy.source, _Stored) else len(position)
            keys[id(copy)] = last[memory] = max(key, last.get(memory, 0))
        self.copies.sort(key=lambda copy: keys[id(copy)])

    # Values ------------------------------------------------------------------------------------------------------

    def _stream(self, advance: Callable[[int], Any], check: bool, write: bool) -> None:
        streamed = self._streamed() if write else {}
        self.checkpoint.close()  # what is mapped would count beside the buffers
        try:
            transfers = [transfer for each in streamed.values() for transfer in each.transfers]
            stream(sorted(transfers, key=lambda each: (each.file, each.offset)), advance)
        except OSError as error:
            raise self.checkpoint.failed(error) from error
        for copy in self.copies:
            narrows = _narrows(copy)
            if id(copy) in streamed:
                _give(copy.part.memory, streamed[id(copy)].memory)
                if check and narrows:
                    self._refuse_lost(copy, copy.read, copy.part.memory)
            elif write or narrows:
                # In a call of its own, at the end of which nothing holds on to what was read.
                self._carry_out(copy, check and narrows, write)
                advance(_read_bytes(copy))

    def _streamed(self) -> dict[int, _Streamed]:
        """What can be streamed, by the copy's id. What shares memory with anything else is copied in its order."""
        users = Counter(_extent(copy.target)[0] for copy in self.copies)
        _reserve([copy.part.memory for copy in self.copies])
        streamed = {}
        for copy in self.copies:
            if isinstance(copy.source, _Stored) and users[_extent(copy.target)[0]] == 1:
                each = copy.source.streamed_to(copy.part)
                if each is not None:
                    streamed[id(copy)] = each
        return streamed

    def _carry_out(self, copy: _Copy, check: bool, write: bool) -> None:
        tensor, memory = copy.read(), copy.part.memory
        if write:
            with torch.no_grad():
                (copy.target if is_dtensor(tensor) else memory).copy_(tensor)
        if check:
            # A GPU looks faster at what was written than the CPU at what was read.
            self._refuse_lost(copy, lambda: tensor, memory if write and not memory.is_cpu else tensor)

    def _refuse_lost(self, copy: _Copy, read: Callable[[], torch.Tensor], same: torch.Tensor) -> None:
        value = _first_lost(read, copy.target, same)
        if value is not None:
            self._problems.append(_lost_message(_name(copy), value, copy.source.dtype, copy.target.dtype))

    def _run_own_code(self, advance: Callable[[int], Any]) -> None:
        state = self.checkpoint.read_all()
        if self.checkpoint.versions is not None:
            state._metadata = self.checkpoint.versions  # type: ignore[attr-defined]
        for name, slices in self._slices.items():
            state[name] = state[name][slices]
        names = {id(value): name for name, value in state.items()}

        def carry_out(target: torch.Tensor, source: torch.Tensor) -> None:
            name = names.get(id(source))
            if name is None:
                target.copy_(source)
                return
            if _kind(source.dtype) != _kind(target.dtype):
                raise TypeError(f"{source.dtype} in the checkpoint, {target.dtype} in the model")
            copy = _Copy.to(target, _Stored.of(self.checkpoint, name, self._slices.get(name)))
            values = copy.values(source)
            if _narrows(copy):
                value = _first_lost(lambda: values, target, values)
                if value is not None:
                    raise ValueError(_lost_message(name, value, source.dtype, target.dtype))
            self.copies.append(copy)
            self._check_dtype(copy)
            copy.part.memory.copy_(values)
            advance(source.nbytes)

        try:
            with _Copies(carry_out):
                result = self.model.load_state_dict(state, strict=False)
        except CheckpointError:
            raise
        except RuntimeError as error:
            self._problems.append(str(error))
            raise self._refusal() from error
        self._judge(getattr(result, "missing_keys", ()), getattr(result, "unexpected_keys", ()))

    # Refusals ----------------------------------------------------------------------------------------------------

    def _refuse_problems(self) -> None:
        if self._problems:
            raise self._refusal()

    def _refusal(self) -> CheckpointError:
        problems = "".join(f"\n  {problem}" for problem in self._problems)
        partly = ""
        if self._own_code is not None and not self.new:
            partly = f"\n  The model may hold a part of the checkpoint: {self._own_code} is loading code of its own."
        return CheckpointError(
            f"fastinit.load: {str(self.checkpoint.path)!r} does not fit {type(self.model).__name__}:{problems}{partly}"
        )


def _own_loading_code(model: nn.Module) -> str | None:
    """The first method or hook by which a model takes part in load_state_dict and that is not torch's."""
    for module in model.modules():
        for function in (
            module.load_state_dict,
            module._load_from_state_dict,
            *module._load_state_dict_pre_hooks.values(),
            *module._load_state_dict_post_hooks.values(),
        ):
            function = getattr(function, "hook", function)
            origin = getattr(function, "__module__", None) or ""
            if not origin.startswith(_KNOWN_CODE):
                return f"{type(module).__name__}.{getattr(function, '__name__', type(function).__name__)}"
    return None


def _tensors(model: nn.Module, persistent_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by its full name, tied ones under each of their names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None and not (persistent_only and name in module._non_persistent_buffers_set):
                    yield f"{prefix}.{name}" if prefix else name, tensor


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        not nn.parameter.is_lazy(tensor)
        and tensor.layout == torch.strided
        and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )


def _memory(tensor: torch.Tensor) -> torch.Tensor | None:
    """Memory that files can be streamed into: the tensor's, or what a placeholder gets when all of it is there."""
    if tensor.device.type not in ("cpu", "cuda"):
        return None
    if type(tensor) is Placeholder:
        return new_memory(tensor)
    if type(tensor) is Unwritten:
        memory = memory_to_write(tensor)
    else:
        ordinary = _is_plain(tensor) and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        memory = tensor.detach() if ordinary else None
    return memory if memory is not None and memory.is_contiguous() else None


def _give(tensor: torch.Tensor, memory: torch.Tensor) -> None:
    """Let a tensor without values have `_memory` of it, which has been written."""
    if type(tensor) is Placeholder:
        take_memory(tensor, memory)
    elif type(tensor) is Unwritten:
        wrote(tensor)


def _reserve(tensors: list[torch.Tensor]) -> None:
    """Make room at once for what will get memory."""
    sizes: dict[torch.device, list[int]] = {}
    for tensor in tensors:
        if type(tensor) is Unwritten:
            sizes.setdefault(tensor.device, []).append(tensor.nbytes)
    for device, each in sizes.items():
        reserve(each, device)


def _read_bytes(copy: _Copy) -> int:
    """What this process reads for a copy."""
    return copy.part.memory.numel() * copy.source.dtype.itemsize


def _extent(tensor: torch.Tensor) -> tuple[Any, int, int]:
    """Which memory a tensor lies in, and from which to which byte."""
    with modes_off():
        if not _is_plain(tensor) or not tensor.numel():
            return (id(tensor),), 0, 0
        size = tensor.element_size()
        steps = zip(tensor.size(), tensor.stride(), strict=True)
        start = tensor.storage_offset() * size
        end = start + (1 + sum((extent - 1) * stride for extent, stride in steps)) * size
        return (tensor.device, tensor.untyped_storage().data_ptr()), int(start), int(end)


def _name(copy: _Copy) -> str:
    return copy.source.key if isinstance(copy.source, _Stored) else "a value that a hook has computed"


def _agree(first: _Copy, second: _Copy) -> bool:
    """Whether two copies into one tensor leave the same bits there."""
    dtype = first.target.dtype
    values = [copy.source.read() if isinstance(copy.source, _Stored) else copy.source for copy in (first, second)]
    # torch.save stores tied tensors once.
    if values[0].data_ptr() == values[1].data_ptr() and values[0].dtype == values[1].dtype:
        return True
    pairs = zip(values[0].reshape(-1).split(_CHUNK), values[1].reshape(-1).split(_CHUNK), strict=True)
    return all(torch.equal(*(part.to(dtype).view(torch.uint8) for part in pair)) for pair in pairs)


# --- what dtypes can hold -------------------------------------------------------------------------------------------


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "boolean"
    return "complex" if dtype.is_complex else "floating point" if dtype.is_floating_point else "integer"


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    info = torch.finfo(dtype) if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype)
    return info.min, info.max


def _narrows(copy: _Copy) -> bool:
    """Whether the source's dtype has finite values beyond the range of the target's."""
    source, target = copy.source.dtype, copy.target.dtype
    if source == target or _kind(source) != _kind(target):
        return False
    (low, high), (lowest, highest) = _limits(source), _limits(target)
    return low < lowest or high > highest


def _first_lost(read: Callable[[], torch.Tensor], target: torch.Tensor, same: torch.Tensor) -> float | None:
    """The first finite value of a tensor that a target's dtype, of the same kind, cannot hold.

    `same` is the tensor, or what became of it in that dtype: it is looked at first, and as a rule suffices. A buffer
    may have the most extreme values of the checkpoint's dtype, which masks are made of: they become infinite.
    """
    dtype = target.dtype
    same = _local_real(same.detach())
    if not same.numel():
        return None
    low, high = _limits(dtype)
    if same.is_floating_point():
        least, greatest = torch.aminmax(same)
        # NaN and infinities fail this too. A value beyond the greatest finite one may still be rounded to it.
        if low <= least.item() and greatest.item() <= high:
            return None
    tensor = _local_real(read())
    real = dtype.to_real()
    for part in tensor.reshape(-1).split(_CHUNK):
        if part.is_floating_point():
            lost = part.isfinite() & ~part.to(real).double().isfinite()
            if not isinstance(target, nn.Parameter):
                lost &= part.abs() != torch.finfo(part.dtype).max
        else:
            lost = (part.long() < low) | (part.long() > high)
        if lost.any():
            first: float = part[lost][0].item()
            return first
    return None


def _local_real(tensor: torch.Tensor) -> torch.Tensor:
    if is_dtensor(tensor):
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _lost_message(name: str, value: float, source: torch.dtype, target: torch.dtype) -> str:
    return (
        f"{name} has the value {value:g} in {source}, beyond the range of the model's {target}, {_limits(target)[0]:g} "
        f"to {_limits(target)[1]:g}. Choose a dtype with a wider range"
    )


def _bar(total: int, progress: bool, path: Path) -> Any:
    if progress and total:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=path.name)
    return nullcontext()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_IN_WARNINGS} more" if len(names) > _NAMES_IN_WARNINGS else ""
    return ", ".join(names[:_NAMES_IN_WARNINGS]) + more

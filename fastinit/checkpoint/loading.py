"""One load of a checkpoint into a model: what is to be copied where, what does not fit, and the copies.

Torch's own loading code, the ``_load_from_state_dict`` of each module, is run over stand-ins for the stored tensors,
and the copies that it would make are noted instead (`copies`): so names, hooks, versions and lazy modules mean what
they mean to ``load_state_dict``, and whatever can be known without values is refused before anything is written. Then
the copies are made: those between rows of a file and rows of memory are streamed (`streaming`), the others follow in
the order of the files, one tensor in memory at a time.

A model that brings loading code of its own may look at values while it is loaded. It gets what ``load_state_dict``
would give it: tensors that are mapped from the files, copied at once.

Private: it may change with any version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX, _IncompatibleKeys

from ..layout import Slices, slices_of
from ..report import readable
from ..sharding import is_dtensor, why_not_written, with_whole_shapes
from .copies import Copy, CopyMode, Stored, Streamed, extent_of, give, is_plain, make_room
from .files import Checkpoint, CheckpointError
from .streaming import stream
from .values import first_lost, kind_of, lost_message

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


class Loading:
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
        self.copies: list[Copy] = []
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
        return sum(copy.nbytes * (2 if self._is_checked_before(copy) else 1) for copy in self.copies)

    def run(self, advance: Callable[[int], Any]) -> None:
        """Copy everything, unless there are values that the model's dtypes cannot hold."""
        # Read before anything is written: one of them may be refused.
        extra_states = [(module, self.checkpoint.read_object(name)) for name, module in self._extra_states.items()]
        if self._own_code is not None:
            self._run_own_code(advance)
        else:
            self._carry_out(advance)
        self.checkpoint.check()
        self._refuse_problems()
        self.report.bytes = sum(copy.source.nbytes for copy in self.copies if isinstance(copy.source, Stored))
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
            name: Stored.of(self.checkpoint, name, self._slices.get(name)) for name in self.checkpoint.tensors
        }
        values.update(dict.fromkeys(self.checkpoint.objects))
        targets = {id(tensor) for _, tensor in _tensors(self.model)}

        def copy(target: torch.Tensor, source: torch.Tensor) -> None:
            if id(target) in targets:
                self.copies.append(Copy.to(target, source))
            else:
                target.copy_(source)

        missing: list[str] = []
        unexpected: list[str] = []
        with CopyMode(copy), with_whole_shapes(self._state.values()):
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

    def _check_dtype(self, copy: Copy) -> None:
        found, wanted = copy.source.dtype, copy.target.dtype
        if found == wanted or not isinstance(copy.source, Stored):
            return
        if kind_of(found) != kind_of(wanted):
            self._problems.append(
                f"dtype mismatch for {copy.source.key}: {found} in the checkpoint, {wanted} in the model"
            )
        self.report.converted[copy.source.key] = (found, wanted)

    def _judge(self, missing: Iterable[str], unexpected: Iterable[str]) -> None:
        """Note and, if strict, refuse what is missing or unexpected."""
        supplied: dict[Any, list[tuple[int, int]]] = {}
        for copy in self.copies:
            memory, start, end = extent_of(copy.target)
            supplied.setdefault(memory, []).append((start, end))

        def is_supplied(name: str) -> bool:
            if name not in self._state:
                return self._has_extra_state(name)
            # Files that cannot hold a tensor twice, safetensors, have a tied one, or the whole of which it is a part.
            memory, start, end = extent_of(self._state[name])
            return any(first <= start and end <= last for first, last in supplied.get(memory, ()))

        self.report.missing = missing = [name for name in dict.fromkeys(missing) if not is_supplied(name)]
        self.report.unexpected = unexpected = list(dict.fromkeys(unexpected))
        if self.strict and missing:
            self._problems.append(f"missing in the checkpoint: {', '.join(missing)}. strict=False initializes them")
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
        last: dict[Any, Copy] = {}
        for copy in self.copies:
            place = (*extent_of(copy.target), copy.target.stride() if is_plain(copy.target) else None)
            other = last.pop(place, None)
            last[place] = copy
            if self.strict and not self._problems and other is not None and not other.agrees_with(copy):
                names = f"{other.name} and {copy.name}"
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
            memory = extent_of(copy.target)[0]
            key = position[copy.source.key] if isinstance(copy.source, Stored) else len(position)
            keys[id(copy)] = last[memory] = max(key, last.get(memory, 0))
        self.copies.sort(key=lambda copy: keys[id(copy)])

    # Values ------------------------------------------------------------------------------------------------------

    def _carry_out(self, advance: Callable[[int], Any]) -> None:
        """Make all copies; what holds values keeps them until it is known that what comes in their place fits."""
        before = {id(copy): copy for copy in self.copies if self._is_checked_before(copy)}
        for copy in before.values():
            self._refuse_lost(copy)
            advance(copy.nbytes)
        self._refuse_problems()
        streamed = self._streamed()
        self.checkpoint.close()  # what is mapped would count beside the buffers
        try:
            transfers = [transfer for each in streamed.values() for transfer in each.transfers]
            stream(sorted(transfers, key=lambda each: (each.file, each.offset)), advance)
        except OSError as error:
            raise self.checkpoint.failed(error) from error
        for copy in self.copies:
            if copy.narrows and id(copy) not in before:
                self._refuse_lost(copy, streamed[id(copy)].memory if id(copy) in streamed else None)
        self._refuse_problems()
        for copy in self.copies:
            if id(copy) in streamed:
                give(copy.part.memory, streamed[id(copy)].memory)
            else:
                self._copy(copy)
                advance(copy.nbytes)

    def _is_checked_before(self, copy: Copy) -> bool:
        """Whether what a copy brings is looked at first, which reads it twice."""
        return copy.narrows and not self.new and copy.holds_values

    def _streamed(self) -> dict[int, Streamed]:
        """What can be streamed, by the copy's id. What shares memory with anything else is copied in its order."""
        users = Counter(extent_of(copy.target)[0] for copy in self.copies)
        make_room([copy.part.memory for copy in self.copies])
        streamed = {}
        for copy in self.copies:
            if isinstance(copy.source, Stored) and users[extent_of(copy.target)[0]] == 1:
                each = copy.source.streamed_to(copy.part)
                if each is not None:
                    streamed[id(copy)] = each
        return streamed

    def _copy(self, copy: Copy) -> None:
        # In a call of its own, at the end of which nothing holds on to what was read.
        values = copy.values()
        with torch.no_grad():
            (copy.target if is_dtensor(values) else copy.part.memory).copy_(values)

    def _refuse_lost(self, copy: Copy, written: torch.Tensor | None = None) -> None:
        """Note if a copy has values beyond the target's range; what they have become there is looked at faster."""
        values = copy.values() if written is None else written
        value = first_lost(copy.values if values is written else lambda: values, copy.target, values)
        if value is not None:
            self._problems.append(lost_message(copy.name, value, copy.source.dtype, copy.target.dtype))

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
            if kind_of(source.dtype) != kind_of(target.dtype):
                raise TypeError(f"{source.dtype} in the checkpoint, {target.dtype} in the model")
            copy = Copy.to(target, Stored.of(self.checkpoint, name, self._slices.get(name)))
            values = copy.part_of(source)
            if copy.narrows:
                value = first_lost(lambda: values, target, values)
                if value is not None:
                    raise ValueError(lost_message(name, value, source.dtype, target.dtype))
            self.copies.append(copy)
            self._check_dtype(copy)
            copy.part.memory.copy_(values)
            advance(source.nbytes)

        try:
            with CopyMode(carry_out):
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

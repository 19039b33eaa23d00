"""Operators left to later: what a block with `empty` or `shard` computes from random fills alone is recorded, too.

An orthogonal weight, say, is a QR of a normal matrix. In such a block no rank should hold all of them, or compute what
a checkpoint will overwrite. So an operator on pending placeholders gives pending ones, whose recipe begins with a
write of the kind `CALLED`: the call, which evaluates itself from the recipes of its operands when the values are
wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ..execution import Fills, can_fill
from ..layout import contiguous_strides, numel
from ..native import CONSTANT
from ..recipe import CALLED, Region, Write
from .nested import tensors_in
from .precision import result_dtypes, values_dtype
from .records import Record, is_whole, view_of
from .tensors import Placeholder, stand_for

_HOST = torch.device("cpu")

# Calls that wait for one another: what they compute is held until the last one is evaluated, and Python's stack is
# limited. One more is computed at once, and what waits for it with it.
_DEEPEST = 32


# Memory alone: large, and the same with any number of threads.
_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


@functools.cache
def is_elementwise(func: Any) -> bool:
    """Whether the number of threads cannot decide how an operator rounds."""
    return torch.Tag.pointwise in func.tags or func.is_view or func in _COPIES


def evaluate(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives, with the same bits whatever number of threads torch has.

    Sums, products of matrices and decompositions are cut up by the number of threads and round accordingly; ranks that
    a launcher has started often have one thread, a process that was not has all. So these have one everywhere.
    """
    threads = torch.get_num_threads()
    if threads == 1 or is_elementwise(func):
        return func(*args, **kwargs)
    torch.set_num_threads(1)
    try:
        return func(*args, **kwargs)
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Operand:
    """A placeholder as it was when an operator was called; the dtype is that of its values."""

    recipe: tuple[Write, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    region: Region | None


class Call:
    """An operator with its operands; `results` evaluates it, in fp32 (fp64 of what is fp64) and on the host."""

    def __init__(self, name: str, args: Any, kwargs: Any, in_place: bool) -> None:
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.in_place = in_place
        before = [call.depth for operand in self.operands() for call in _calls(operand.recipe)]
        self.depth: int = 1 + max(before, default=0)

    def operands(self) -> list[_Operand]:
        """Its placeholders as they were, in their order."""
        return [each for each in tree_leaves((self.args, self.kwargs)) if isinstance(each, _Operand)]

    def take_streams(self, streams: dict[int, int], changed: set[int]) -> None:
        """Let the random fills of its operands have other streams; see `with_streams`."""

        def replaced(operand: _Operand) -> _Operand:
            return replace(operand, recipe=with_streams(operand.recipe, streams, changed))

        self.args, self.kwargs = tree_map_only(_Operand, replaced, (self.args, self.kwargs))

    def results(self, seed: int, memo: dict[int, list[torch.Tensor]]) -> list[torch.Tensor]:
        """The tensors that the operator gives; of one that writes its first operand, all of that operand's storage."""
        if id(self) not in memo:
            written: list[torch.Tensor] = []

            def value(operand: _Operand) -> torch.Tensor:
                whole = _evaluated(operand, seed, memo)
                written.append(whole)
                return view_of(whole, operand.region)

            args, kwargs = tree_map_only(_Operand, value, (self.args, self.kwargs))
            base, _, overload = self.name.partition("::")[2].partition(".")
            results = evaluate(getattr(getattr(torch.ops.aten, base), overload), args, kwargs)
            memo[id(self)] = written[:1] if self.in_place else tensors_in(results)
        return memo[id(self)]


def _calls(recipe: tuple[Write, ...]) -> list[Call]:
    return [write.parameters[0] for write in recipe if write.kind == CALLED]


def streams_in(recipe: tuple[Write, ...]) -> list[int]:
    """The streams of the random fills that a recipe needs, each once, in the order in which they are carried out.

    Those with a key of their own are left out: a seed that the code has set decides them alone.
    """
    return list(dict.fromkeys(_streams(recipe, set())))


def _streams(recipe: tuple[Write, ...], seen: set[int]) -> Iterator[int]:
    for write in recipe:
        if write.kind == CALLED:
            call = write.parameters[0]
            if id(call) not in seen:
                seen.add(id(call))
                for operand in call.operands():
                    yield from _streams(operand.recipe, seen)
        elif write.kind != CONSTANT and write.key is None:
            yield write.stream


def with_streams(recipe: tuple[Write, ...], streams: dict[int, int], changed: set[int]) -> tuple[Write, ...]:
    """A recipe whose random fills have other streams, as far as `streams` names some.

    Calls are changed themselves, once each, since recipes share them; `changed` notes which ones are.
    """
    for call in _calls(recipe):
        if id(call) not in changed:
            changed.add(id(call))
            call.take_streams(streams, changed)
    return tuple(
        write._replace(stream=streams.get(write.stream, write.stream))
        if write.kind not in (CALLED, CONSTANT) and write.key is None
        else write
        for write in recipe
    )


def _evaluated(operand: _Operand, seed: int, memo: dict[int, list[torch.Tensor]]) -> torch.Tensor:
    values = torch.empty(operand.shape, dtype=operand.dtype)
    fills = Fills(seed, _HOST, memo)
    fills.write(values, operand.recipe)
    fills.run()
    return values


def record_call(func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
    """The results of an operator as placeholders; NotImplemented if it has to run now."""
    if not _can_wait(func, kwargs, tensors):
        return NotImplemented
    in_place = func._schema.is_mutable
    if in_place:
        written = [each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
        first = args[0] if written == [func._schema.arguments[0].name] else None
        if type(first) is not Placeholder or not is_whole(first._record, first._region):
            return NotImplemented
    operands, options = tree_map_only(Placeholder, _operand, (args, kwargs))
    if func is torch.ops.aten.copy_.default:
        operands = (replace(operands[0], recipe=()), *operands[1:])  # what was there is not read
    call = Call(func.name(), operands, options, in_place)
    if call.depth > _DEEPEST:
        return NotImplemented
    try:
        on_meta = func(*tree_map_only(Placeholder, _on_meta, args), **tree_map_only(Placeholder, _on_meta, kwargs))
    except (NotImplementedError, RuntimeError):
        return NotImplemented  # torch's refusal, perhaps, which is not to come later than it does elsewhere
    if in_place:
        args[0]._record.recipe = (Write(CALLED, (call, 0, None)),)
        return args[0]
    results = tensors_in(on_meta)
    block = tensors[0]._record.block  # type: ignore[attr-defined]
    dtypes = result_dtypes(func, args, kwargs, on_meta, block.default_dtype)
    if any(each.dtype not in (torch.float32, torch.float64) or not each.numel() for each in results):
        return NotImplemented
    if not all(can_fill(dtype, _HOST) for dtype in dtypes):
        return NotImplemented
    positions = iter(range(len(results)))

    def pending(result: torch.Tensor) -> torch.Tensor:
        index = next(positions)
        sizes, strides = tuple(result.shape), result.stride()
        in_order = strides == contiguous_strides(sizes)
        write = Write(CALLED, (call, index, None if in_order else strides))
        shape = sizes if in_order else (numel(sizes),)
        record = Record(block, shape, dtypes[index], tensors[0].device, (write,))
        return stand_for(record, None if in_order else Region(0, sizes, strides))

    return tree_map_only(torch.Tensor, pending, on_meta)


def _can_wait(func: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> bool:
    if not tensors or func.namespace != "aten" or not _WAITS.isdisjoint(func.tags) or kwargs.get("device") is not None:
        return False
    is_random = False
    for tensor in tensors:
        if type(tensor) is not Placeholder or (torch.is_grad_enabled() and tensor.requires_grad):
            return False
        record = tensor._record
        if record.recipe is None or not record.block.defers or not record.is_fillable:
            return False
        is_random = is_random or any(write.kind != CONSTANT for write in record.recipe)
    return is_random


# Operators that have to run when they are called: they draw, or their results decide what comes next.
_WAITS = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _operand(tensor: Placeholder) -> _Operand:
    record = tensor._record
    assert record.recipe is not None
    return _Operand(record.recipe, record.shape, values_dtype(record.dtype), tensor._region)


def _on_meta(tensor: Placeholder) -> torch.Tensor:
    """A tensor like its values."""
    dtype = values_dtype(tensor.dtype)
    return view_of(torch.empty(tensor._record.shape, dtype=dtype, device="meta"), tensor._region)

"""The end of a block with `empty` or `shard`: what is pending stays so, with its recipe and its name."""

from __future__ import annotations

import torch

from ..native import CONSTANT
from . import reading as reading
from .block import Block
from .names import prefixes_of
from .records import Record, lock, modes_off
from .tensors import Placeholder
from .unwritten import Key, Origin, Rest, Unwritten, move


def leave_unwritten(block: Block) -> Key:
    """Let what a state dict holds and is still pending outlive the block, as `empty` and `shard` ask for.

    Returns the key that all of it refers to.

    With `shard`, parameters only, and on the meta device; with `empty`, what is random or never written. What was
    computed, or has memory because the constructor asked for it, is left alone.
    """
    key = Key(block.seed, block.seed_agreed)
    with lock, modes_off():
        for record, owners in _owned(block).items():
            recipe = record.recipe or ()
            if block.shard:
                if any(module._parameters.get(name) is None for module, name, _ in owners):
                    continue
            elif recipe and all(write.kind == CONSTANT for write in recipe):
                continue
            block.deferred += len(recipe)
            if block.empty == "unchecked":
                record.recipe, record.deferred = (), True
                continue
            remedy = _MATERIALIZE if block.shard else _INITIALIZE
            created = record.dtype, record.device
            origin = Origin(owners[0][2], record.shape, recipe, key, *created, remedy, block.empty == "nan")
            device = torch.device("meta") if block.shard else record.device
            rest = Rest(origin, record.shape, None, record.dtype, device)
            for tensor in record.placeholders():
                tensor.__class__ = Unwritten
                tensor._record = rest
                rest.stands(tensor)
            record.tensors = []  # torch.utils.swap_tensors refuses what has weak references
            move(rest, device)
    return key


_INITIALIZE = "Load a checkpoint that supplies it, or call fastinit.initialize(model)"
_MATERIALIZE = "Call fastinit.materialize(model), once the model is sharded or is not to be"

_Owner = tuple[torch.nn.Module, str, str]


def _owned(block: Block) -> dict[Record, list[_Owner]]:
    """What a state dict holds and is still pending: modules, the names there, and the full names."""
    owned: dict[Record, list[_Owner]] = {}
    modules = list(block.seen_modules())
    prefixes: dict[int, str] = {}
    for module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if type(tensor) is not Placeholder or name in module._non_persistent_buffers_set:
                continue
            record = tensor._record
            recipe = record.recipe
            if recipe is None or record.block is not block:
                continue
            if record.is_fillable or all(write.kind == CONSTANT for write in recipe):
                prefixes = prefixes or prefixes_of(modules)
                owned.setdefault(record, []).append((module, name, prefixes[id(module)] + name))
    return owned

"""The end of a block with `empty` or `shard`: what is pending stays so, with its recipe and its name."""

from __future__ import annotations

import torch

from ..native import CONSTANT
from ..recipe import Write
from . import reading as reading
from .block import Block
from .names import models_of, tensors_of
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
        for record, (name, parameters_only) in _owned(block).items():
            recipe = record.recipe or ()
            if not parameters_only if block.shard else recipe and _is_constant(recipe):
                continue
            block.deferred += len(recipe)
            if block.empty == "unchecked":
                record.recipe, record.deferred = (), True
                continue
            origin = Origin(name, record.shape, recipe, key, record.dtype, record.device, block.empty == "nan")
            rest = Rest(origin, record.shape, None, record.dtype, record.device)
            for tensor in record.placeholders():
                tensor.__class__ = Unwritten
                tensor._record = rest
                rest.stands(tensor)
            record.tensors = []  # torch.utils.swap_tensors refuses what has weak references
            move(rest, torch.device("meta") if block.shard else record.device)
    return key


def _is_constant(recipe: tuple[Write, ...]) -> bool:
    return all(write.kind == CONSTANT for write in recipe)


def _owned(block: Block) -> dict[Record, tuple[str, bool]]:
    """What a state dict holds and is still pending: its first name, and whether all are of parameters."""
    owned: dict[Record, tuple[str, bool]] = {}
    for model in models_of(block.seen_modules()):
        for full_name, module, name, tensor in tensors_of(model):
            if type(tensor) is not Placeholder or name in module._non_persistent_buffers_set:
                continue
            record = tensor._record
            if record.recipe is None or record.block is not block:
                continue
            if record.is_fillable or _is_constant(record.recipe):
                first, parameters_only = owned.get(record, (full_name, True))
                owned[record] = first, parameters_only and name in module._parameters
    return owned

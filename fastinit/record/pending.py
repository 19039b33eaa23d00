"""What a block leaves unwritten: recipes handed to the modules that own the tensors, to be carried out later."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..deferred import MARK, Deferred, keep, kept_for, mark_recipe
from ..native import CONSTANT
from ..recipe import Write
from .block import Block
from .tensors import Placeholder, Record, lock, modes_off

_Owners = list[tuple[torch.nn.Module, str]]


def defer(block: Block) -> None:
    """Hand the recipes of what a state dict holds to the modules that own it, and leave out the random fills."""
    with lock, modes_off():
        for record, owners in _owned(block).items():
            recipe, mark = record.recipe or (), None
            if not recipe or any(write.kind != CONSTANT for write in recipe):
                mark = math.nan if block.empty == "nan" else MARK
                record.recipe = () if block.empty == "unchecked" else mark_recipe(record.shape, mark)
                record.deferred = True
                block.deferred += len(recipe)
            if block.empty != "unchecked":
                _keep(block, record, owners, recipe, mark)


def defer_to_shards(block: Block) -> None:
    """Hand the recipes of parameters to the modules that own them, and leave the parameters on the meta device.

    Those whose values were computed, or that have memory because the constructor asked for it, stay what they are.
    """
    with lock, modes_off():
        for record, owners in _owned(block).items():
            recipe = record.recipe or ()
            if all(module._parameters.get(name) is not None for module, name in owners):
                _keep(block, record, owners, recipe, None)
                block.deferred += len(recipe)
                for tensor in record.placeholders():
                    _move_to_meta(tensor)


def parameters(block: Block) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter, Deferred | None]]:
    """The parameters of all modules that a block has seen, with the recipes that were deferred."""
    for module in block.seen_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter, kept_for(module, name)


def _owned(block: Block) -> dict[Record, _Owners]:
    """What modules own whole, in its order, a state dict holds, and is still pending: the owners."""
    owned: dict[Record, _Owners] = {}
    parts = set()
    for module in block.seen_modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if type(tensor) is not Placeholder or name in module._non_persistent_buffers_set:
                continue
            record, region = tensor._record, tensor._region
            if record.recipe is None or record.block is not block:
                continue
            by_torch = not record.is_native and any(write.kind != CONSTANT for write in record.recipe)
            if region is not None or by_torch:
                parts.add(record)
                continue
            owned.setdefault(record, []).append((module, name))
    return {record: owners for record, owners in owned.items() if record not in parts}


def _keep(block: Block, record: Record, owners: _Owners, recipe: tuple[Write, ...], mark: float | None) -> None:
    deferred = Deferred(record.shape, record.dtype, block.seed, recipe, mark, record.device, block.seed_agreed)
    for module, name in owners:
        keep(module, name, deferred)


def _move_to_meta(tensor: Placeholder) -> None:
    """Make a placeholder a tensor on the meta device, which stays the same object."""
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    meta.requires_grad_(tensor.requires_grad)
    hooks, post = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    attributes = tensor.__dict__
    del attributes["_record"], attributes["_region"]
    is_parameter = attributes.pop("_is_param", False)
    torch._C._swap_tensor_impl(tensor, meta)
    tensor.__class__ = torch.nn.Parameter if is_parameter else torch.Tensor  # type: ignore[assignment]
    if hooks:
        tensor._backward_hooks = hooks
    if post:
        tensor._post_accumulate_grad_hooks = post

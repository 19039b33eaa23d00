"""Initialisation of tensors that exist already, inside of a block: distributed ones, and what a block left unwritten.

Their initialisation is recorded on a placeholder of the whole tensor, and then written to what this rank holds of it:
an element's value depends on its place in the whole, and so is the same on any number of ranks and any mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..distributed import from_rank_0, is_distributed
from ..execution import Fills, can_fill, copy_part
from ..layout import Box
from ..sharding import is_dtensor, local_boxes, local_tensor
from .block import Block
from .dispatch import create
from .records import modes_off, view_of
from .tensors import Placeholder
from .unwritten import Unwritten, memory_to_write, wrote


def takes(block: Block, tensor: Any) -> bool:
    """Whether a tensor is one that this module initialises."""
    if not is_dtensor(tensor) and type(tensor) is not Unwritten:
        return False
    local = local_tensor(tensor) if is_dtensor(tensor) else tensor
    return can_fill(tensor.dtype, local.device)


def initialise(block: Block, tensor: torch.Tensor, record: Callable[[torch.Tensor], Any]) -> None:
    """Give a tensor what `record` does to a placeholder of its whole."""
    with modes_off():
        local = local_tensor(tensor) if is_dtensor(tensor) else tensor
        whole = create(block, tuple(tensor.shape), tensor.dtype, local.device, None)
    record(whole)
    with modes_off(), torch.no_grad():
        if is_dtensor(tensor):
            _agree_on_key(block)  # also those ranks that have no element
        if type(whole) is Placeholder and whole._record.recipe == ():
            return  # nothing was asked for
        memory = memory_to_write(local) if type(local) is Unwritten else local.detach()
        if memory is not None and memory.numel():
            boxes = local_boxes(tensor) if is_dtensor(tensor) else None
            _write(block, memory, boxes, whole, zeros=type(local) is Unwritten)
        if type(local) is Unwritten:
            wrote(local)
        torch.autograd.graph.increment_version(tensor)


def _write(block: Block, memory: torch.Tensor, boxes: list[Box] | None, whole: torch.Tensor, *, zeros: bool) -> None:
    if type(whole) is not Placeholder:
        return
    record = whole._record
    if record.recipe is None:
        copy_part(view_of(record.compute(), whole._region), memory, boxes)
        return
    block.keep_order(record.recipe, record)
    fills = Fills(block.seed, memory.device)
    fills.write(memory, record.recipe, boxes, zeros=zeros, elements=whole.numel())
    block.run(fills)


def _agree_on_key(block: Block) -> None:
    """Have all ranks use rank 0's key, if each has drawn its own."""
    if not block.seed_agreed and is_distributed():
        (block.seed,), block.seed_agreed = from_rank_0([block.seed], block.device), True

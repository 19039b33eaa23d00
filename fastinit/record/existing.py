"""Initialization of tensors that exist already, inside of a block.

That of distributed ones, and of what a block left unwritten, is recorded on a placeholder of the whole tensor, and then
written to what this rank holds of it: an element's value depends on its place in the whole, and so is the same on any
number of ranks and any mesh. What is unwritten and on the meta device has nowhere to be written: its recipe becomes
another one. Ordinary tensors are filled at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..distributed import from_rank_0, is_distributed
from ..execution import Fills, can_fill, copy_part
from ..layout import Box
from ..native import CONSTANT, UNIFORM
from ..recipe import Region
from ..sharding import is_dtensor, is_on_meta, local_boxes, local_tensor
from .block import Block
from .dispatch import create
from .recorded import fill, is_beyond
from .records import Record, in_functorch, is_in_order, is_whole, modes_off, view_of
from .tensors import Placeholder, stand_for
from .unwritten import Key, Unwritten, memory_of, wrote


def takes(block: Block, tensor: Any) -> bool:
    """Whether a tensor is one that this module initializes."""
    if not is_dtensor(tensor) and type(tensor) is not Unwritten:
        return False
    return can_fill(tensor.dtype, _device_of(block, local_tensor(tensor)))


def is_recorded_again(block: Block, tensor: Any) -> bool:
    """Whether a tensor is unwritten and on the meta device, where an initialization changes what is recorded."""
    return takes(block, tensor) and type(local_tensor(tensor)) is Unwritten and is_on_meta(tensor)


def _device_of(block: Block, local: torch.Tensor) -> torch.device:
    """Where a tensor's values are computed."""
    return block.device if local.is_meta else local.device


def initialize(block: Block, tensor: torch.Tensor, record: Callable[[torch.Tensor], Any]) -> None:
    """Give a tensor what `record` does to a placeholder of its whole."""
    with modes_off():
        local = local_tensor(tensor)
        whole = create(block, tuple(tensor.shape), tensor.dtype, _device_of(block, local), None)
    record(whole)
    with modes_off(), torch.no_grad():
        if is_dtensor(tensor):
            _agree_on_key(block)  # also those ranks that have no element
        if type(whole) is Placeholder and whole._record.recipe == ():
            return  # nothing was asked for
        if type(local) is Unwritten and local.is_meta:
            if type(whole) is Placeholder:
                _record_again(block, tensor, local, whole._record)
            return
        memory = memory_of(local) if type(local) is Unwritten else local.detach()
        if memory is not None and memory.numel():
            boxes = local_boxes(tensor) if is_dtensor(tensor) else None
            _write(block, memory, boxes, whole, zeros=type(local) is Unwritten)
        if type(local) is Unwritten:
            wrote(local)
        torch.autograd.graph.increment_version(tensor)


def _record_again(block: Block, tensor: torch.Tensor, local: Unwritten, record: Record) -> None:
    """Let what is on the meta device have another recipe.

    A part of a tensor can only become constant: what else it is to have would depend on another key than the rest has.
    """
    rest, region, recipe = local._record, local._region, record.recipe
    origin = rest.origin
    if recipe is None:
        raise RuntimeError(
            f"fastinit: {origin.name!r} is on the meta device, and this block computes its new values "
            "at once; enter the block with shard=True, which records them, or materialize the model first"
        )
    block.keep_order(recipe, record)
    is_shard = tensor is not local
    if not is_shard and not is_whole(rest, region):
        is_constant = all(write.kind == CONSTANT and write.region is None for write in recipe)
        if not is_constant or rest.place is not None or origin.placeless or rest.shape != origin.shape:
            rest.with_memory()  # the refusal for what is on the meta device
        rest.origin = origin._replace(recipe=origin.recipe + tuple(each._replace(region=region) for each in recipe))
        return
    rest.place = None if is_shard or is_in_order(rest, region) else region
    key = Key(block.seed, block.seed_agreed)
    rest.origin = origin._replace(shape=tuple(tensor.shape), recipe=recipe, key=key, placeless=False, zeros=False)


def _write(block: Block, memory: torch.Tensor, boxes: list[Box] | None, whole: torch.Tensor, *, zeros: bool) -> None:
    if type(whole) is not Placeholder or whole._record.recipe is None:
        values = whole if type(whole) is not Placeholder else view_of(whole._record.compute(), whole._region)
        copy_part(values, memory, boxes)
        return
    recipe = whole._record.recipe
    block.keep_order(recipe, whole._record)
    fills = Fills(block.seed, memory.device)
    fills.write(memory, recipe, boxes, zeros=zeros, elements=whole.numel())
    block.run(fills)


def _agree_on_key(block: Block) -> None:
    """Have all ranks use rank 0's key, if each has drawn its own."""
    if not block.seed_agreed and is_distributed():
        (block.seed,), block.seed_agreed = from_rank_0([block.seed], block.device), True


# --- ordinary tensors ------------------------------------------------------------------------------------------------


def is_fillable(block: Block, tensor: Any) -> bool:
    """Whether a tensor that exists is one for native fills; one on meta takes its streams, too."""
    return (
        isinstance(tensor, torch.Tensor)
        and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and tensor.layout == torch.strided
        and (can_fill(tensor.dtype, tensor.device) or (tensor.is_meta and can_fill(tensor.dtype, block.device)))
        and tensor.device.type in ("cpu", "meta", block.device.type)
        and not torch._C._len_torch_dispatch_stack()
        and not in_functorch()
    )


def over(block: Block, tensor: torch.Tensor) -> torch.Tensor:
    """A placeholder over the memory of a tensor; of one on meta, over none."""
    if tensor.is_meta:
        return create(block, tuple(tensor.shape), tensor.dtype, block.device, None)
    storage = tensor.untyped_storage()
    shape = (storage.nbytes() // tensor.element_size(),)
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    memory = empty.set_(storage, 0, shape)  # type: ignore[call-overload]
    record = Record(block, shape, tensor.dtype, tensor.device, memory=memory)
    return stand_for(record, Region(int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride()))


def fill_now(block: Block, tensor: Any, kind: int, parameters: tuple[Any, ...]) -> Any:
    """Fill a tensor that has memory by the next stream; NotImplemented if it is torch's to fill."""
    if not is_fillable(block, tensor) or (torch.is_grad_enabled() and tensor.requires_grad):
        return NotImplemented
    if not all(type(value) in (int, float) and math.isfinite(value) for value in parameters[:2]):
        return NotImplemented
    a, b = parameters[:2]
    if (b < a or is_beyond(tensor.dtype, a, b, b - a)) if kind == UNIFORM else b < 0:
        return NotImplemented
    if not tensor.numel():
        block.generator.next_stream()
        return tensor
    alias: Any = over(block, tensor)
    if fill(alias, kind, tuple(map(float, parameters))) is NotImplemented:
        return NotImplemented
    torch.autograd.graph.increment_version(tensor)
    block.keep_history(tensor, alias._record.executed or ())
    return tensor

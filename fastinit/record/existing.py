"""Initialization of tensors that exist already, inside of a block.

That of distributed ones, and of what a block left unwritten, is recorded on a placeholder of the whole tensor, and then
written to what this rank holds of it: an element's value depends on its place in the whole, and so is the same on any
number of ranks and any mesh. What is unwritten and on the meta device has nowhere to be written: its recipe becomes
another one. Ordinary tensors are filled at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..distributed import from_rank_0, is_distributed
from ..execution import Fills, can_fill, copy_part
from ..native import CONSTANT
from ..recipe import Region
from ..sharding import is_dtensor, is_on_meta, local_boxes, local_tensor
from .block import Block
from .dispatch import create
from .records import Record, in_functorch, is_in_order, is_whole, modes_off, view_of
from .tensors import Placeholder, stand_for
from .unwritten import Key, Unwritten, memory_of, wrote


def takes(block: Block, tensor: Any) -> bool:
    """Whether a tensor that exists is one for recorded fills, and not for torch's; one on meta takes streams, too."""
    if not isinstance(tensor, torch.Tensor) or torch._C._len_torch_dispatch_stack() or in_functorch():
        return False
    if is_ordinary(tensor) and (
        type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or tensor.layout != torch.strided
        or tensor.is_neg()  # whose memory has other values
        or tensor.device.type not in ("cpu", "meta", block.device.type)
    ):
        return False
    return can_fill(tensor.dtype, _device_of(block, local_tensor(tensor)))


def takes_constants(block: Block, tensor: Any) -> bool:
    """Whether a tensor is unwritten and on the meta device, where torch's own fills have nothing to write to."""
    return takes(block, tensor) and type(local_tensor(tensor)) is Unwritten and is_on_meta(tensor)


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether a tensor is neither distributed nor one that a block left unwritten."""
    return not is_dtensor(tensor) and type(tensor) is not Unwritten


def _device_of(block: Block, local: torch.Tensor) -> torch.device:
    """Where a tensor's values are computed."""
    return block.device if local.is_meta else local.device


def initialize(block: Block, tensor: torch.Tensor, record: Callable[[torch.Tensor], Any]) -> Any:
    """Give a tensor what `record` does to a placeholder of its whole; the result is the function's."""
    ordinary = is_ordinary(tensor)
    with modes_off():
        local = local_tensor(tensor)
        what = tuple(tensor.shape), tensor.dtype, _device_of(block, local)
        whole: Any = _over(block, tensor) if ordinary and not tensor.is_meta else create(block, *what, None)
        if ordinary:
            whole.__dict__.update(tensor.__dict__)
    result = record(whole)
    block.initialized(tensor)
    with modes_off(), torch.no_grad():
        torch.autograd.graph.increment_version(tensor)
        if not ordinary:
            _take(block, tensor, local, whole)
        elif type(whole) is Placeholder:
            block.keep_history(tensor, whole._record.executed or ())
    return tensor if result is whole else result


def _over(block: Block, tensor: torch.Tensor) -> torch.Tensor:
    """A placeholder over the memory of a tensor."""
    storage = tensor.untyped_storage()
    shape = (storage.nbytes() // tensor.element_size(),)
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    memory = empty.set_(storage, 0, shape)  # type: ignore[call-overload]
    record = Record(block, shape, tensor.dtype, tensor.device, memory=memory)
    return stand_for(record, Region(int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride()))


def _take(block: Block, tensor: torch.Tensor, local: torch.Tensor, whole: Any) -> None:
    """Let this rank's part of a tensor have what was recorded for the whole."""
    if is_dtensor(tensor) and not block.seed_agreed and is_distributed():  # also on ranks that have no element
        (block.seed,), block.seed_agreed = from_rank_0([block.seed], block.device), True
    record = whole._record if type(whole) is Placeholder else None
    if record is not None and record.recipe == ():
        return  # nothing was asked for
    if type(local) is Unwritten and local.is_meta:
        if record is not None:
            _record_again(block, tensor, local, record)
        return
    memory = memory_of(local) if type(local) is Unwritten else local.detach()
    if memory.numel():
        boxes = local_boxes(tensor) if is_dtensor(tensor) else None
        if record is None or record.recipe is None:
            copy_part(whole if record is None else view_of(record.compute(), whole._region), memory, boxes)
        else:
            block.keep_order(record.recipe, record)
            fills = Fills(block.seed, memory.device)
            fills.write(memory, record.recipe, boxes, zeros=type(local) is Unwritten, elements=whole.numel())
            block.timing.run(fills)
    if type(local) is Unwritten:
        wrote(local)


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

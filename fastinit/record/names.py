"""Streams by name: the name of a tensor in its model decides what it draws, and not the order of the fills.

docs/stream-v1.md says how name and place make a stream. While the block runs, every fill has the number of its order.
`name_streams` exchanges those, once, when the names are known. A number whose values somebody has used by then stays,
wherever it is: what was computed from them has to agree with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from .calls import streams_in, with_streams
from .records import lock, modes_off
from .tensors import Placeholder

if TYPE_CHECKING:
    from .block import Block

# The modules of a model, with what comes before the names of their tensors.
Model = list[tuple[str, nn.Module]]

# Children that another module only wraps, by what torch.compile, FSDP1 and activation checkpointing call them.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def name_streams(block: Block) -> None:
    """Give the pending fills of what modules own the streams of its names; nothing, unless the block wants that."""
    if block.rename is None:
        return
    with lock, modes_off():
        waiting = block.waiting()
        if not waiting:
            return
        streams: dict[int, int] = {}
        for name, tensor, number in _named(block.seen_modules()):
            if type(tensor) is not Placeholder or tensor._record.block is not block:
                continue
            for place, stream in enumerate(streams_in(tensor._record.recipe or ())):
                if stream in block.by_order:
                    block.by_order[stream] = name
                elif stream not in streams and stream not in block.by_name:
                    streams[stream] = _free_stream(block, _renamed(block, name), place, number)
        changed: set[int] = set()
        for record in waiting:
            if record.recipe:
                record.recipe = with_streams(record.recipe, streams, changed)
        block.by_name.update(streams.values())


def stream_of(name: str, place: int, number: int = 0) -> int:
    """The stream of a tensor's random fill, as docs/stream-v1.md specifies it."""
    told = name.encode() + number.to_bytes(8, "little") + place.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "little")


def _free_stream(block: Block, name: str, place: int, number: int) -> int:
    """The stream for a name; with a higher number, if the name was another tensor's when the block shared out streams.

    That is so where layers are sharded one by one as they are made, before they have their places in the model.
    """
    while (stream := stream_of(name, place, number)) in block.by_name:
        number += 1
    return stream


def _renamed(block: Block, name: str) -> str:
    assert block.rename is not None
    renamed = block.rename(name)
    if not isinstance(renamed, str):
        raise TypeError(f"fastinit.on: streams= returned {renamed!r} for {name!r}; return the name that counts, a str")
    return renamed


def models_of(modules: Iterable[nn.Module]) -> Iterator[Model]:
    """The largest models that modules are of.

    Wrappers leave no trace in it: a compiled or checkpointed module has the names that it has without.
    """
    modules = list(modules)
    below = {id(child) for module in modules for child in module._modules.values()}
    seen: set[int] = set()
    # Those in a cycle are below one another, and come after the others.
    for root in sorted(modules, key=lambda module: id(module) in below):
        if id(root) not in below or id(root) not in seen:
            model: dict[int, tuple[str, nn.Module]] = {}
            _collect(root, "", model)
            seen.update(model)
            yield list(model.values())


def tensors_of(model: Model) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Parameters and buffers by their full names, in order, with the modules that have them and their names there."""
    for prefix, module in model:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield prefix + name, module, name, tensor


def _collect(module: nn.Module, prefix: str, model: dict[int, tuple[str, nn.Module]]) -> None:
    model[id(module)] = prefix, module
    for name, child in module._modules.items():
        if child is not None and id(child) not in model:
            _collect(child, prefix if _is_wrapped(module, name) else f"{prefix}{name}.", model)


def _is_wrapped(owner: nn.Module, name: str) -> bool:
    return name in _WRAPPED or (name == "module" and isinstance(owner, _DATA_PARALLEL))


def _named(modules: Iterable[nn.Module]) -> Iterator[tuple[str, torch.Tensor, int]]:
    """The parameters and buffers of models by their names, in order, with the number of the model."""
    taken: dict[str, tuple[torch.Tensor, int]] = {}
    for model in models_of(modules):
        named = {name: tensor for name, _, _, tensor in tensors_of(model)}
        before = [taken[name] for name, tensor in named.items() if name in taken and taken[name][0] is not tensor]
        number = max((other + 1 for _, other in before), default=0)
        for name, tensor in named.items():
            taken[name] = tensor, number
            yield name, tensor, number

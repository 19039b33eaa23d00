"""Accelerate with FSDP2: `prepare` takes a model that ``fastinit.on(..., shard=True)`` left on the meta device.

``Accelerator.prepare`` shards such a model well enough, but it tells the optimizer's parameters apart by the addresses
of their memory, and on the meta device all of them are 0: the optimizer would train one parameter and leave the others
as they are, without a word. And ``cpu_ram_efficient_loading`` broadcasts what rank 0 has, which is nothing yet. Each
rank fills its own part instead, when the model is sharded.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .materialization import materialize
from .sharding import is_on_meta

__all__ = ["prepare"]


def prepare(accelerator: Any, *objects: Any, **options: Any) -> Any:
    """Do what ``accelerator.prepare(*objects, **options)`` does, also for a model whose parameters are on meta.

    With FSDP2 the model is sharded first, and then each rank is given the memory and the values of its part alone; the
    plugin's ``cpu_ram_efficient_loading`` has nothing to do. With any other strategy the model gets its values, whole,
    on ``accelerator.device`` and is then prepared. The values are those of the unsharded model in either case.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        objects: as it takes them: a model, optimizers of its parameters, data loaders, schedulers. A model that has
            values is prepared as ever.
        options: passed on.

    Returns:
        What ``accelerator.prepare`` returns: the objects in their order, or the one.

    Raises:
        ValueError, RuntimeError: as `materialize`, and whatever Accelerate raises.

    Example:
        >>> accelerator = accelerate.Accelerator(cpu=True)
        >>> with fastinit.on(accelerator.device, shard=True, seed=0):
        ...     model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer = fastinit.accelerate.prepare(accelerator, model, optimizer)
        >>> model.weight.device
        device(type='cpu')
    """
    models = [each for each in objects if isinstance(each, nn.Module) and any(map(is_on_meta, each.parameters()))]
    if not models:
        return accelerator.prepare(*objects, **options)
    if not accelerator.is_fsdp2:
        for model in models:
            materialize(model, accelerator.device)
        return accelerator.prepare(*objects, **options)
    plugin = accelerator.state.fsdp_plugin
    broadcasts = plugin.cpu_ram_efficient_loading
    numbered = _number([parameter for model in models for parameter in model.parameters()])
    plugin.cpu_ram_efficient_loading = False
    try:
        prepared = accelerator.prepare(*objects, **options)
    finally:
        plugin.cpu_ram_efficient_loading = broadcasts
        for parameter in numbered:
            del parameter.data_ptr
    for model in models:  # which Accelerate has sharded in place
        materialize(model)
    return prepared


def _number(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Let those on meta answer to ``data_ptr()`` with numbers that are no addresses, each with its own."""
    on_meta = [parameter for parameter in parameters if is_on_meta(parameter)]
    for number, parameter in enumerate(on_meta, 1):
        answer = -number
        parameter.data_ptr = lambda answer=answer: answer  # type: ignore[method-assign,misc]
    return on_meta

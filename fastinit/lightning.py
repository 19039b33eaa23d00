"""Lightning Trainer and Fabric: ``init_module``, ``init_tensor`` and ``configure_model`` go through fastinit.

Lightning creates models under context managers that its strategies return. `enable` wraps those methods, on the
classes, so that strategies given as objects and as strings are the same; `FastInit` overrides them in one strategy.
Either way Lightning is asked where (the strategy's device) and in which dtype (the precision plugin's), and
`fastinit.on` does the rest. What fastinit does not support, and plugins that do more, keep Lightning's own way.

Nothing happens before a context is entered: Lightning puts its modes on torch's stack in different orders, and the
recorder has to be the innermost of them.

Strategies that shard find recorded parameters on the meta device: FSDP gives them values unit by unit through its
``param_init_fn``, ModelParallelStrategy at the place where Lightning calls ``to_empty`` and ``reset_parameters``, and
DeepSpeed's stage 3 when the context ends.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .context import _draw_seed, on
from .deepspeed import zero3
from .distributed import from_rank_0, is_distributed
from .log import logger
from .materialization import (
    agree_on_seeds,
    initialize,
    materialize,
    overwrite,
    param_init_fn,
    uninitialized,
    unwritten_tensors,
)
from .record.block import current
from .record.unwritten import origin_of
from .sharding import is_on_meta

__all__ = ["FastInit", "disable", "enable", "enabled"]

# The package `lightning`, and those that are also published on their own.
_PACKAGES = ("lightning.fabric", "lightning.pytorch", "lightning_fabric", "pytorch_lightning")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Modules of Lightning's precision plugins that set the default dtype while a model is created, and do nothing else.
_PLAIN_PLUGINS = ("amp", "deepspeed", "double", "fsdp", "half", "precision")


def enable() -> None:
    """Let every strategy of Lightning create models with fastinit, from now on and in all threads.

    ``Trainer.init_module``, ``Fabric.init_module``, ``Fabric.init_tensor`` and the ``configure_model`` hook are meant.
    Calling it again does no harm, and is needed if one of the packages ``lightning``, ``lightning_fabric`` and
    ``pytorch_lightning`` has been imported since. If none has been, ``lightning`` is.

    Raises:
        ImportError: none of them is installed.

    Example:
        >>> fastinit.lightning.enable()
        >>> trainer = lightning.Trainer(accelerator="cpu", precision="bf16-true", logger=False)
        >>> with trainer.init_module():
        ...     model = torch.nn.Linear(4, 2)
        >>> model.weight.dtype
        torch.bfloat16
        >>> fastinit.lightning.disable()
    """
    with _lock:
        if not _imported():
            _import_lightning()
        for package in _imported():
            for path, method, handler in _methods(package):
                _wrap(_class(package, path), method, handler)
        logger.info("lightning.enable: strategies of %s create models with fastinit", ", ".join(_imported()))


def disable() -> None:
    """Put every method of Lightning back that `enable` has wrapped.

    Models that were created meanwhile for FSDP or ModelParallelStrategy have to be set up before.
    """
    with _lock:
        while _wrapped:
            owner, method, original = _wrapped.pop()
            setattr(owner, method, original)


@contextmanager
def enabled() -> Iterator[None]:
    """`enable` for the duration of a ``with`` block; if it was enabled before, it stays so.

    Example:
        >>> with fastinit.lightning.enabled():
        ...     fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="16-true")
        ...     with fabric.init_module():
        ...         model = torch.nn.Linear(4, 2)
        >>> model.weight.dtype
        torch.float16
    """
    before = bool(_wrapped)
    enable()
    try:
        yield
    finally:
        if not before:
            disable()


class FastInit:
    """Mix-in for one strategy, without a switch for all: ``class FastDDP(FastInit, DDPStrategy)``.

    For strategies of the Trainer and of Fabric. Put it first. Methods that a class of your own overrides stay yours.

    Example:
        >>> from lightning.pytorch.strategies import SingleDeviceStrategy
        >>> class FastSingleDevice(fastinit.lightning.FastInit, SingleDeviceStrategy):
        ...     pass
        >>> trainer = lightning.Trainer(strategy=FastSingleDevice("cpu"), precision="16-true", logger=False)
        >>> with trainer.init_module():
        ...     model = torch.nn.Linear(4, 2)
        >>> model.weight.dtype
        torch.float16
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for package in _imported():
            for path, method, handler in _methods(package):
                owner = _class(package, path)
                if issubclass(cls, owner) and _is_lightnings(getattr(cls, method)):
                    setattr(cls, method, _override(cls, method, handler))


# --- what is wrapped, and how ----------------------------------------------------------------------------------------

_lock = threading.RLock()
_wrapped: list[tuple[type, str, Any]] = []


def _imported() -> list[str]:
    return [name for name in _PACKAGES if name in sys.modules]


def _import_lightning() -> None:
    for name in ("lightning", "pytorch_lightning", "lightning_fabric"):
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
            return
    raise ImportError("fastinit.lightning needs Lightning: pip install 'torch-fastinit[lightning]'")


def _class(package: str, path: str) -> type:
    module, name = path.split(".")
    found: type = getattr(importlib.import_module(f"{package}.strategies.{module}"), name)
    return found


def _is_lightnings(definition: Any) -> bool:
    module: str = definition.__module__
    return module.startswith(tuple(f"{name}." for name in _PACKAGES))


def _is(strategy: Any, name: str) -> bool:
    """Whether a strategy is of Lightning's class of that name, in whichever of the packages."""
    return any(cls.__name__ == name and _is_lightnings(cls) for cls in type(strategy).__mro__)


def _wrap(owner: type, method: str, handler: Callable[..., Any]) -> None:
    if any(each[:2] == (owner, method) for each in _wrapped):
        return
    original = vars(owner)[method]

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return handler(functools.partial(original, self), self, *args, **kwargs)

    setattr(owner, method, wrapper)
    _wrapped.append((owner, method, original))


def _override(cls: type, method: str, handler: Callable[..., Any]) -> Any:
    @functools.wraps(getattr(cls, method))
    def override(self: Any, *args: Any, **kwargs: Any) -> Any:
        return handler(getattr(super(cls, self), method), self, *args, **kwargs)

    return override


# --- creating ---------------------------------------------------------------------------------------------------------
#
# These are generators, so that nothing happens before a context is entered. `original` is Lightning's method.


@contextmanager
def _fabric_tensors(original: Any, strategy: Any) -> Iterator[None]:
    """Fabric.init_tensor."""
    with _on(strategy.root_device, _dtype(strategy.precision)) or original():
        yield


@contextmanager
def _fabric_modules(original: Any, strategy: Any, empty_init: bool | None = None) -> Iterator[None]:
    """Fabric.init_module."""
    if _is_zero3(strategy):
        context = _partitions(strategy, strategy.precision)
    else:
        context = _modules(strategy, strategy.precision, bool(empty_init))
    with ExitStack() as stack:
        if context is None:
            stack.enter_context(original(empty_init=empty_init))
        else:
            if _is(strategy, "FSDPStrategy"):
                stack.enter_context(strategy.module_sharded_context())  # for those who wrap layers themselves
            stack.enter_context(context)
        yield


_IN_CONFIGURE_MODEL: Any = object()  # where Lightning passes no empty_init


@contextmanager
def _trainer_modules(original: Any, strategy: Any, empty_init: bool | None = _IN_CONFIGURE_MODEL) -> Iterator[None]:
    """Trainer.init_module, and the outer context of the hook configure_model."""
    in_hook = empty_init is _IN_CONFIGURE_MODEL
    context: AbstractContextManager[Any] | None
    if _is_zero3(strategy):
        # Lightning creates an ordinary model in init_module; the hook has an inner context for partitions.
        context = None if in_hook else _on(torch.get_default_device(), torch.get_default_dtype())
    else:
        empty = _is_sharding(strategy) if in_hook else bool(empty_init)
        context = _modules(strategy, strategy.precision_plugin, empty)
    if context is None:
        context = original() if in_hook else original(empty_init=empty_init)
    with context:
        yield


@contextmanager
def _trainer_partitions(original: Any, strategy: Any) -> Iterator[None]:
    """The inner context of the hook configure_model, under DeepSpeed."""
    strategy._init_config_if_needed()
    context = _partitions(strategy, strategy.precision_plugin) if _is_zero3(strategy) else None
    with original() if context is None else context:
        yield


def _is_zero3(strategy: Any) -> bool:
    return _is(strategy, "DeepSpeedStrategy") and strategy.zero_stage_3


def _is_sharding(strategy: Any) -> bool:
    return _is(strategy, "FSDPStrategy") or _is(strategy, "ModelParallelStrategy")


def _dtype(plugin: Any) -> torch.dtype | None:
    """The dtype in which a precision plugin has modules created; None if it wants more than that."""
    for method in (type(plugin).module_init_context, type(plugin).tensor_init_context):
        if not (_is_lightnings(method) and method.__module__.rpartition(".")[2] in _PLAIN_PLUGINS):
            logger.info("Lightning creates this model: %s does more than to name a dtype", type(plugin).__name__)
            return None
    with plugin.tensor_init_context():
        return torch.get_default_dtype()


def _on(device: torch.device, dtype: torch.dtype | None, **how: Any) -> on | None:
    """The context of fastinit, if it supports that device and dtype."""
    if device.type == "meta" or dtype not in _DTYPES:
        logger.info("Lightning creates this model: fastinit has no %s on %s", dtype, device)
        return None
    return on(device, dtype, **how)


def _modules(strategy: Any, plugin: Any, empty: bool) -> AbstractContextManager[Any] | None:
    """The context in which a strategy has modules created; None if that is to remain Lightning's."""
    dtype = _dtype(plugin)
    if dtype is None:
        return None
    if not _is_sharding(strategy):
        context = _on(strategy.root_device, dtype, empty=empty)
        return context if context is None or not empty else _empty(context)
    if not empty:
        # Real parameters, whole, on the default device: only these may be changed or loaded after the block.
        seed = None
        if is_distributed():
            (seed,) = from_rank_0([_draw_seed()], strategy.root_device)
        return _on(torch.get_default_device(), dtype, seed=seed)
    if _is(strategy, "FSDPStrategy"):
        options = strategy._fsdp_kwargs if hasattr(strategy, "_fsdp_kwargs") else strategy.kwargs
        options.setdefault("param_init_fn", functools.partial(_init_module_of_fsdp, device=strategy.root_device))
    return _on(strategy.root_device, dtype, shard=True)


@contextmanager
def _empty(context: on) -> Iterator[None]:
    with context:
        block = current.get()
        assert block is not None
        yield
    # The Trainer does not call a LightningModule, it calls training_step: nothing would notice that what the module
    # itself owns is unwritten.
    for module in block.seen_modules():
        if any(cls.__name__ == "LightningModule" and _is_lightnings(cls) for cls in type(module).__mro__):
            initialize(module, [name for name in uninitialized(module) if "." not in name])


def _partitions(strategy: Any, plugin: Any) -> AbstractContextManager[Any] | None:
    """The context in which modules become partitions of ZeRO-3; None if that is to remain Lightning's."""
    if _dtype(plugin) is None:
        return None
    try:
        placing = zero3(strategy.config)
        if strategy.remote_device not in (None, "none", placing.slice_device.type):
            raise ValueError(f"remote_device={strategy.remote_device!r} is not where ds_config has the parameters")
    except (ImportError, ValueError) as error:
        warnings.warn(f"fastinit.lightning: the model is created by DeepSpeed's own zero.Init. {error}", stacklevel=2)
        return None
    # DeepSpeed's dtype, which is half precision in the mixed ones too.
    return on(placing.device, placing.dtype, shard=placing)


# --- giving values ----------------------------------------------------------------------------------------------------


def _fabric_setup(original: Any, strategy: Any, module: nn.Module) -> nn.Module:
    """ModelParallelStrategy of Fabric: between parallelize_fn and what it does to modules on the meta device."""
    parallelize = strategy._parallelize_fn

    def parallelize_and_materialize(module: Any, device_mesh: Any) -> Any:
        module = parallelize(module, device_mesh)
        if isinstance(module, nn.Module):
            _materialize(strategy, module)
        return module

    strategy._parallelize_fn = parallelize_and_materialize
    try:
        created: nn.Module = original(module)
        return created
    finally:
        strategy._parallelize_fn = parallelize


def _trainer_setup(original: Any, strategy: Any, trainer: Any) -> None:
    """ModelParallelStrategy of the Trainer: after configure_model, before what it does to modules on meta."""
    if strategy.model is not None:
        _materialize(strategy, strategy.model)
    original(trainer)


def _materialize(strategy: Any, model: nn.Module) -> None:
    """Give what was recorded its values, and leave what was created on the meta device to Lightning."""
    recorded = [each for each in unwritten_tensors(model) if is_on_meta(each.tensor)]
    if not recorded:
        return
    known = {id(each.tensor) for each in recorded}
    tensors = [*model.parameters(), *model.buffers()]
    if all(id(tensor) in known for tensor in tensors if is_on_meta(tensor)):
        materialize(model, strategy.root_device)
        return
    # What Lightning calls then gives new memory to everything, and initializes as far as modules have a
    # reset_parameters: what had values, and what was recorded, is written afterwards.
    agree_on_seeds(recorded)
    origins = {each.name: each.origin for each in recorded}
    values = [
        (owner, name, tensor)
        for module in model.modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None and not is_on_meta(tensor)
    ]
    base = next(
        cls for cls in type(strategy).__mro__ if cls.__name__ == "ModelParallelStrategy" and _is_lightnings(cls)
    )
    sys.modules[base.__module__]._materialize_distributed_module(model, strategy.root_device)
    with torch.no_grad():
        for owner, name, tensor in values:
            owner[name].copy_(tensor)  # type: ignore[union-attr]
    materialize(model)  # what has no reset_parameters
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    overwrite((named[name], origin) for name, origin in origins.items())


def _init_module_of_fsdp(module: nn.Module, device: torch.device) -> None:
    """FSDP's param_init_fn: recorded values, or else what FSDP does without such a function."""
    own = [*module._parameters.items(), *module._buffers.items()]
    if all(origin_of(tensor) is not None for _, tensor in own if tensor is not None and tensor.is_meta):
        param_init_fn(module)
    else:
        with torch.no_grad():
            module.to_empty(device=device, recurse=False)
            module.reset_parameters()  # type: ignore[operator]


# --- where ------------------------------------------------------------------------------------------------------------

_Methods = list[tuple[str, str, Callable[..., Any]]]

_IN_FABRIC: _Methods = [
    ("strategy.Strategy", "tensor_init_context", _fabric_tensors),
    ("strategy.Strategy", "module_init_context", _fabric_modules),
    ("fsdp.FSDPStrategy", "module_init_context", _fabric_modules),
    ("model_parallel.ModelParallelStrategy", "module_init_context", _fabric_modules),
    ("model_parallel.ModelParallelStrategy", "setup_module", _fabric_setup),
    ("deepspeed.DeepSpeedStrategy", "module_init_context", _fabric_modules),
]

_IN_TRAINER: _Methods = [
    ("strategy.Strategy", "tensor_init_context", _trainer_modules),
    ("fsdp.FSDPStrategy", "tensor_init_context", _trainer_modules),
    ("model_parallel.ModelParallelStrategy", "tensor_init_context", _trainer_modules),
    ("model_parallel.ModelParallelStrategy", "setup", _trainer_setup),
    ("deepspeed.DeepSpeedStrategy", "tensor_init_context", _trainer_modules),
    ("deepspeed.DeepSpeedStrategy", "model_sharded_context", _trainer_partitions),
]


def _methods(package: str) -> _Methods:
    return _IN_FABRIC if package.endswith("fabric") else _IN_TRAINER

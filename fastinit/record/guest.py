"""What no mode and no placeholder's dispatch sees.

Module-level functions of torch are replaced while a block is active anywhere, ask for the block of the calling thread
or coroutine, and otherwise do what they did before. The last block to be left puts them back, unless somebody else has
replaced them meanwhile. No class is modified, with two exceptions: the legacy constructor ``torch.Tensor(2, 3)`` and
``torch.Tensor._make_subclass`` are wrapped once per process, by the first block; `uninstall` takes that back.

``ordinary.data = tensor`` lets a tensor share the C++ side of another one, without its class. One operator asks for
leave first, and is answered here.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn import init
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.utils import parametrizations
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .. import native
from ..compiler import never_compiled
from ..execution import concrete
from . import fast, methods
from .block import Block, current
from .factories import legacy_tensor
from .mode import Mode, has_layout_of, truncated_normal
from .names import name_streams
from .nested import tensors_in
from .pending import leave_unwritten
from .records import HALVES, modes_off
from .tensors import Placeholder, alias_of, become_real, has_master
from .unwritten import Unwritten, readable, refuse

# Python objects made between two runs of the garbage collector while a model is created.
_COLLECT_EVERY = 200_000

_lock = threading.Lock()
_this_thread = threading.local()
_users = 0
_undo: list[Callable[[], object]] = []


def install() -> None:
    """Install the replacements, or count one more user of them."""
    global _users
    with _lock:
        if not _users:
            try:
                _install()
            except BaseException:
                _undo_all()
                raise
        _users += 1


def remove() -> None:
    """Take them back when the last user leaves."""
    global _users
    with _lock:
        _users -= 1
        if not _users:
            _undo_all()


def _undo_all() -> None:
    while _undo:
        _undo.pop()()


def _install() -> None:
    _wrap_constructors()
    thresholds = gc.get_threshold()
    if gc.isenabled() and thresholds[0]:
        # A model is thousands of objects that stay: collecting every few hundred of them looks at all the others again.
        gc.set_threshold(max(thresholds[0], _COLLECT_EVERY), *thresholds[1:])
        _undo.append(lambda: gc.set_threshold(*thresholds))
    _replace(torch, "get_default_dtype", _default_dtype)
    _replace(torch, "set_default_dtype", _set_default_dtype)
    _replace(torch, "set_default_tensor_type", _set_default_tensor_type)
    _replace(torch, "get_default_device", _default_device)
    for owner in (torch, torch.random):
        _replace(owner, "get_rng_state", _get_rng_state)
        _replace(owner, "set_rng_state", _set_rng_state)
    _replace(init, "_no_grad_trunc_normal_", truncated_normal)
    _shadow_type(torch.nn.parameter)
    _replace(parametrizations, "_is_orthogonal", _orthogonal_in_fp32)
    if fast.in_use:
        _replace(torch.overrides, "handle_torch_function", native.around_handle)
    _replace(torch, "_enable_functionalization", _functionalizing)
    _replace(torch, "_disable_functionalization", _functionalizing_no_more)
    # What Tensor.backward calls once the mode has been asked, and is off.
    _replace(torch.autograd, "_engine_run_backward", _in_the_mode)
    # What torch.autograd.Function.apply does first: no mode sees that one.
    _replace(torch._functorch.utils, "unwrap_dead_wrappers", _before_function)
    # Code of C++ that keeps tensors, or reads their memory.
    _replace(torch.utils, "swap_tensors", _real_first)
    for owner in (torch, torch.utils.dlpack):
        _replace(owner, "to_dlpack", _real_first)
    _replace(torch, "compile", _compiled_later)
    _replace(sys.modules.get("torch.distributed"), "Reducer", _named_and_real_first)
    # Where DistributedDataParallel and FSDP1 are about to read all parameters, or to make one of them.
    _replace(sys.modules.get("torch.nn.parallel.distributed"), "_verify_param_shape_across_processes", _named_first)
    fsdp1 = "torch.distributed.fsdp.fully_sharded_data_parallel"
    _replace(sys.modules.get(fsdp1), "_init_ignored_module_states", _named_first)
    _replace(sys.modules.get("torch.jit._recursive"), "create_script_module_impl", _all_real_first)
    # Where torch shards a model: what is pending goes there on meta, for each rank to be given its part.
    for name in _SHARDS:
        for function in ("_get_modules_and_states", "_get_managed_states", "distribute_tensor"):
            _replace(sys.modules.get(f"torch.distributed.{name}"), function, _on_meta_first)
    for register in (
        register_module_parameter_registration_hook,
        register_module_buffer_registration_hook,
        register_module_module_registration_hook,
    ):
        _undo.append(register(methods.registered()).remove)
    _undo.append(register_module_forward_pre_hook(_used).remove)


_SHARDS = ("fsdp._fully_shard._fully_shard", "tensor._api", "tensor.parallel.style")


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    function = getattr(owner, name, None)
    if function is not None:  # else it is another version of torch, or not imported
        _put(owner, name, function, _wrapped(wrap, function))


# The next block mostly wants the same.
@functools.lru_cache(100)
def _wrapped(wrap: Callable[[Any], Any], function: Any) -> Any:
    return wrap(function)


def _put(owner: Any, name: str, function: Any, replacement: Any) -> None:
    """Put a replacement into a module, in the place of a function or of None, until it is undone."""

    def put_back() -> None:
        if vars(owner).get(name) is replacement and function is None:
            delattr(owner, name)
        elif vars(owner).get(name) is replacement:
            setattr(owner, name, function)

    setattr(owner, name, replacement)
    _undo.append(put_back)


def _shadow_type(module: Any) -> None:
    """Let ``nn.Parameter`` take placeholders for plain tensors.

    Only then does it say to `torch.Tensor._make_subclass` of which class the parameter is to be: of tensors of other
    classes it makes an nn.Parameter whatever subclass was called, and Python does not call that one's ``__init__``.
    """
    if "type" not in vars(module):
        _put(module, "type", None, native.type_of if fast.in_use else _type_of)


def _type_of(value: Any) -> type:
    kind = type(value)
    return torch.Tensor if kind is Placeholder else kind


def _in_block(handler: Callable[..., Any]) -> Callable[[Any], Any]:
    """What makes the replacement of a function: in a block, `handler` gets that, the function and its arguments."""

    def replacing(function: Any) -> Any:
        @functools.wraps(function, updated=())
        def replacement(*args: Any, **kwargs: Any) -> Any:
            block = current.get()
            return function(*args, **kwargs) if block is None else handler(block, function, *args, **kwargs)

        return replacement

    return replacing


@_in_block
def _default_dtype(block: Block, function: Any) -> torch.dtype:
    return block.default_dtype


@_in_block
def _set_default_dtype(block: Block, function: Any, d: Any, /) -> None:
    if not isinstance(d, torch.dtype) or not d.is_floating_point:
        raise TypeError(f"only floating-point types are supported as the default type, not {d}")
    block.default_dtype = d


@_in_block
def _set_default_tensor_type(block: Block, function: Any, t: Any, /) -> None:
    """The older way to say it, by ``torch.DoubleTensor`` or its name."""
    kind: Any = getattr(torch, t.removeprefix("torch."), None) if isinstance(t, str) else t
    dtype = getattr(kind, "dtype", None)
    if dtype is None or kind.is_cuda:
        function(t)
    else:
        torch.set_default_dtype(dtype)


@_in_block
def _default_device(block: Block, function: Any) -> Any:
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, DeviceContext):
            return concrete(mode.device)
        if isinstance(mode, Mode) and mode.block is block:
            return mode.factory_device()
    return function()


@_in_block
def _compiled_later(block: Block, function: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.compile: what it makes of a function runs as that is written while a block is active."""
    compiled = function(*args, **kwargs)
    original = args[0] if args else kwargs.get("model")
    if not isinstance(original, FunctionType):
        return compiled

    @functools.wraps(original)
    def either(*arguments: Any, **options: Any) -> Any:
        return (compiled if current.get() is None else original)(*arguments, **options)

    return either


@_in_block
def _orthogonal_in_fp32(block: Block, function: Any, Q: torch.Tensor, eps: Any = None) -> Any:
    """Whether a matrix is orthogonal, which torch asks with a tolerance of the precision in which it computes."""
    return function(Q.float() if Q.dtype in HALVES and has_master(Q) else Q, eps)


@_in_block
def _get_rng_state(block: Block, function: Any) -> torch.Tensor:
    with modes_off():
        return block.generator.state_is_read(function)


@_in_block
def _set_rng_state(block: Block, function: Any, new_state: torch.Tensor) -> None:
    function(new_state)
    with modes_off():
        block.generator.state_was_set(new_state)


def _before_function(function: Any) -> Any:
    """A function whose arguments a function of the caller's gets next that autograd records: it finds ordinary tensors.

    Also those of another thread's block.
    """

    @functools.wraps(function)
    def called(args: Any) -> Any:
        tensors = tensors_in(args)
        if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
            for each in tensors:
                become_real(each)
        return function(args)

    return called


def _functionalizing(function: Any, more: int = 1) -> Any:
    """A function from which on C++ makes functional tensors of whatever is created in its thread."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)
        # torch's own modes end what they have not begun.
        if getattr(_this_thread, "functionalizes", False) != (more > 0):
            _this_thread.functionalizes = more > 0
            native.count_functionalizing(more)

    return called


def _functionalizing_no_more(function: Any) -> Any:
    return _functionalizing(function, -1)


@_in_block
def _real_first(block: Block, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that finds no placeholders among its arguments."""
    for each in tensors_in((args, kwargs)):
        become_real(each)
    return function(*args, **kwargs)


@_in_block
def _in_the_mode(block: Block, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that runs code of the caller's: hooks, and what a checkpoint runs once more."""
    mode = block.mode() if _mode_of(block) is None else None
    if mode is None:
        return function(*args, **kwargs)
    torch._C._push_on_torch_function_stack(mode)
    try:
        return function(*args, **kwargs)
    finally:
        torch._C._pop_torch_function_stack()


@_in_block
def _all_real_first(block: Block, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that hands all tensors of a model to C++."""
    block.settle()
    return function(*args, **kwargs)


@_in_block
def _named_first(block: Block, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A function after which a model has other names, or values."""
    name_streams(block)
    return function(*args, **kwargs)


def _named_and_real_first(function: Any) -> Any:
    return _named_first(_real_first(function))


@_in_block
def _on_meta_first(block: Block, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that shards parameters."""
    name_streams(block)
    if block.shard:
        leave_unwritten(block)
        block.settle()
    return function(*args, **kwargs)


@never_compiled
def _used(module: torch.nn.Module, args: Any) -> None:
    # A module that is called under autograd is in use, perhaps in training: its parameters are torch's from here on.
    if current.get() is not None and torch.is_grad_enabled() and torch._guards.TracingContext.try_get() is None:
        for tensor in module._parameters.values():
            if tensor is not None:
                become_real(tensor)


# --- data of other tensors -------------------------------------------------------------------------------------------


def _may_take_data(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a tensor may take the data of another one: no ordinary one that of a tensor without storage.

    It would be a tensor over nothing, which crashes whoever reads it.
    """
    if not has_layout_of(tensor, other):
        return False
    if type(other) is Unwritten and type(tensor) is not Unwritten:
        refuse(other, ", so that it cannot become the data of another tensor; assign the parameter itself")
    if type(other) is Placeholder and type(tensor) is not Placeholder:
        raise RuntimeError(
            f"fastinit: a tensor of shape {tuple(other.shape)} has no memory while the block that creates it is "
            "active, and cannot become the data of another tensor by this path; leave the block first"
        )
    return True


def _share_storage(tensor: Any, source: Any, *geometry: Any) -> torch.Tensor:
    """``tensor.set_(source, offset, size, stride)``, in which C++ takes the storage of the source, and asks nobody."""
    if type(source) is Unwritten:
        source = readable(source)
    become_real(source)
    result: torch.Tensor = torch.ops.aten.set_.source_Tensor_storage_offset.decompose(tensor, source, *geometry)
    return result


# Of all dispatch keys, only tensors of classes with a __torch_dispatch__ have this one.
_library = torch.library.Library("aten", "IMPL")
_library.impl("_has_compatible_shallow_copy_type", _may_take_data, "PythonTLSSnapshot")
_library.impl("set_.source_Tensor_storage_offset", _share_storage, "PythonTLSSnapshot")


# --- the two that are wrapped once ----------------------------------------------------------------------------------

_make_subclass: Any = None


def _wrap_constructors() -> None:
    global _make_subclass
    if _make_subclass is not None:
        return
    original = _make_subclass = torch.Tensor._make_subclass
    new_tensor = torch._C.TensorBase.__new__

    # No named parameters: torch._dynamo compares these signatures with its own when it is first imported.
    def tensor_new(*args: Any, **kwargs: Any) -> Any:
        block = current.get()
        mode = None if block is None else _mode_of(block)
        if mode is not None and args:
            with modes_off():
                tensor = legacy_tensor(mode, args[1:], kwargs)
            if tensor is not NotImplemented:
                return tensor if args[0] is torch.Tensor else make_subclass(args[0], tensor)
        if block is not None and args and args[0] is not torch.Tensor:  # also where the mode itself is calling
            for each in tensors_in(args):
                become_real(each)
        return new_tensor(*args, **kwargs)

    def make_subclass(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 and type(args[1]) is Placeholder:
            if args[0] is torch.nn.Parameter and len(args) == 3 and not kwargs:
                with temporarily_clear_interpreter_stack():  # transforms of functions refuse to set requires_grad
                    parameter = alias_of(args[1], args[2])
                parameter._is_param = True
                return parameter
            become_real(args[1])
        elif len(args) > 1 and type(args[1]) is Unwritten:
            args = (args[0], readable(args[1]), *args[2:])
        return original(*args, **kwargs)

    torch.Tensor.__new__ = staticmethod(tensor_new)  # type: ignore[method-assign]
    torch.Tensor._make_subclass = staticmethod(native.around_make_subclass(make_subclass))  # type: ignore[method-assign]


def _mode_of(block: Block) -> Mode | None:
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, Mode) and mode.block is block:
            return mode
    return None


def uninstall() -> None:
    """Take back what the first block has wrapped in torch: ``torch.Tensor.__new__`` and
    ``torch.Tensor._make_subclass``.

    The next block wraps them again.

    Raises:
        RuntimeError: inside of a block.

    Example:
        >>> fastinit.uninstall()
    """
    global _make_subclass
    with _lock:
        if _users:
            raise RuntimeError("fastinit.uninstall: a block is active; leave it first")
        if _make_subclass is not None:
            del torch.Tensor.__new__
            torch.Tensor._make_subclass = _make_subclass  # type: ignore[method-assign]
            _make_subclass = None

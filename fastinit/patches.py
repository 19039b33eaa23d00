"""What a mode cannot see, replaced while a context is active in any thread.

A few things in torch do not pass through torch functions: making a Parameter, the legacy constructor
``torch.Tensor(2, 3)``, ``set_``, the default dtype and device, and what the body of ``trunc_normal_`` means. They, and
for speed the functions of torch.nn.init, are replaced by functions that ask for the recorder of the calling thread and
otherwise do what they did before. The first context to be entered installs them, the last one to be left puts
everything back. The garbage collector's threshold is part of that.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import init
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .deferred import never_compiled
from .interception import (
    HANDLERS,
    INIT_REPLACEMENTS,
    PLAIN_INITS,
    Function,
    Handler,
    _load_from_state_dict,
    legacy_tensor,
    load_from_state_dict,
    set_memory,
)
from .native import forget_classes, set_method
from .recorder import _modes_off, _thread, concrete, module_methods, new_parameter

# Python objects made between two runs of the garbage collector while a model is created.
_COLLECT_EVERY = 200_000

# torch's own, which are replaced; another library's would be left in their place.
_torch_methods = {
    name: method
    for name in module_methods
    if (method := getattr(torch.nn.Module, name)).__module__ == torch.nn.Module.__module__
}

_lock = threading.Lock()
_users = 0
_restore: list[Callable[[], object]] = []


def install() -> None:
    """Install the replacements, or count one more user of them."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _install()


def remove() -> None:
    """Take them back when the last user leaves."""
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            while _restore:
                _restore.pop()()


def _install() -> None:
    swap: Any
    get_default_dtype, set_default_dtype = torch.get_default_dtype, torch.set_default_dtype
    get_default_device, swap = torch.get_default_device, torch.utils.swap_tensors
    new_tensor = torch._C.TensorBase.__new__

    @functools.wraps(torch.nn.Module._load_from_state_dict)
    def load_into(module: torch.nn.Module, *args: Any) -> None:
        recorder = _thread.recorder
        if recorder is None or not load_from_state_dict(recorder, module, *args):
            _load_from_state_dict(module, *args)

    def swap_tensors(t1: torch.Tensor, t2: torch.Tensor) -> Any:
        # torch exchanges no tensors that have weak references.
        recorder = _thread.recorder
        if recorder is None:
            return swap(t1, t2)
        with _modes_off():
            parameters = [tensor for tensor in (t1, t2) if recorder.let_go(tensor)]
            swap(t1, t2)
        recorder.module_parameters += map(weakref.ref, parameters)

    # No named parameters: torch._dynamo compares this signature with its own when it is first imported.
    def tensor_new(*args: Any, **kwargs: Any) -> Any:
        recorder = _thread.recorder
        if recorder is not None and args[0] is torch.Tensor and not kwargs:
            with _modes_off():
                tensor = legacy_tensor(recorder, args[1:])
            if tensor is not NotImplemented:
                return tensor
        return new_tensor(*args, **kwargs)

    def tensor_set(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        recorder = _thread.recorder
        if recorder is None:
            return torch._C.TensorBase.set_(tensor, *args, **kwargs)
        with _modes_off():
            return set_memory(recorder, tensor, *args, **kwargs)

    def default_dtype() -> torch.dtype:
        recorder = _thread.recorder
        return get_default_dtype() if recorder is None else recorder.default_dtype

    def change_default_dtype(d: Any, /) -> None:
        recorder = _thread.recorder
        if recorder is None:
            return set_default_dtype(d)
        if not isinstance(d, torch.dtype) or not d.is_floating_point:
            raise TypeError(f"only floating-point types are supported as the default type, not {d}")
        recorder.default_dtype = d

    def default_device() -> torch.device:
        recorder = _thread.recorder
        if recorder is None:
            return get_default_device()
        modes = _get_current_function_mode_stack()
        if recorder in modes:
            for mode in reversed(modes[modes.index(recorder) :]):
                if isinstance(mode, DeviceContext):
                    return concrete(mode.device)
        return recorder.factory_device()

    thresholds = gc.get_threshold()
    if gc.isenabled() and thresholds[0]:
        # A model is thousands of objects that stay: collecting every few hundred of them looks at all the others again.
        gc.set_threshold(max(thresholds[0], _COLLECT_EVERY), *thresholds[1:])
        _restore.append(lambda: gc.set_threshold(*thresholds))
    _restore.append(forget_classes)
    original = torch.nn.Parameter.__new__
    replacement = functools.partial(new_parameter, original)
    _replace(torch.nn.Parameter, "__new__", staticmethod(replacement), staticmethod(original))
    for name, method in module_methods.items():
        if getattr(torch.nn.Module, name) is _torch_methods.get(name):
            set_method(torch.nn.Module, name, method)
            _restore.append(functools.partial(set_method, torch.nn.Module, name, _torch_methods[name]))
    for name, handler in INIT_REPLACEMENTS.items():
        function = getattr(init, name)
        new = _straight_to(handler, function)
        if name in PLAIN_INITS:
            new = PLAIN_INITS[name](new)
        functools.update_wrapper(new, function)
        _replace(init, name, new, function)
        # torch.nn.init names the function that it hands to a mode by looking up its own public name.
        HANDLERS[new] = handler
        _restore.append(functools.partial(HANDLERS.pop, new))
    _replace(torch.nn.Module, "_load_from_state_dict", load_into, _load_from_state_dict)
    _replace(torch.utils, "swap_tensors", swap_tensors, swap)
    scripted = torch.jit._recursive.create_script_module_impl
    _replace(torch.jit._recursive, "create_script_module_impl", _settled_first(scripted), scripted)
    _replace(torch, "get_default_dtype", default_dtype, get_default_dtype)
    _replace(torch, "set_default_dtype", change_default_dtype, set_default_dtype)
    _replace(torch, "get_default_device", default_device, get_default_device)
    torch.Tensor.set_ = tensor_set  # type: ignore[method-assign,assignment]
    _restore.append(lambda: delattr(torch.Tensor, "set_"))
    torch.Tensor.__new__ = staticmethod(tensor_new)  # type: ignore[method-assign]
    _restore.append(lambda: delattr(torch.Tensor, "__new__"))
    for register, is_parameter in (
        (register_module_parameter_registration_hook, True),
        (register_module_buffer_registration_hook, False),
    ):
        _restore.append(register(_registration_hook(is_parameter)).remove)
    _restore.append(register_module_module_registration_hook(_note_parent).remove)
    _restore.append(register_module_forward_pre_hook(_settle_before_use).remove)


def _straight_to(handler: Handler, function: Function) -> Function:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        recorder = _thread.recorder
        if recorder is not None:
            with _modes_off():
                result = handler(recorder, function, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return function(*args, **kwargs)

    return replacement


def _replace(owner: Any, name: str, new: Any, old: Any) -> None:
    setattr(owner, name, new)
    _restore.append(lambda: setattr(owner, name, old))


@never_compiled
def _settle_before_use(module: torch.nn.Module, args: Any) -> None:
    # A module that is called under autograd is in use, perhaps in training: from here on its tensors are torch's alone.
    recorder = _thread.recorder
    # While torch.compile traces there is nothing to do: the module that it was told of has been settled by then.
    if recorder is not None and torch.is_grad_enabled() and torch._guards.TracingContext.try_get() is None:
        with _modes_off():
            recorder.settle_all()


def _settled_first(function: Function) -> Function:
    """A function of torch that hands tensors to code which no mode sees."""

    @functools.wraps(function)
    def settled(*args: Any, **kwargs: Any) -> Any:
        recorder = _thread.recorder
        if recorder is not None:
            with _modes_off():
                recorder.settle_all()
        return function(*args, **kwargs)

    return settled


def _note_parent(module: torch.nn.Module, name: str, child: torch.nn.Module | None) -> None:
    recorder = _thread.recorder
    if recorder is not None and recorder.defers:
        recorder.saw(module)


def _registration_hook(is_parameter: bool) -> Callable[..., None]:
    def hook(module: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        recorder = _thread.recorder
        if recorder is not None and tensor is not None:
            recorder.registered(module, name, tensor, is_parameter)

    return hook

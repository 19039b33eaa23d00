"""The function mode of a block: it serves torch's factories, and makes real what autograd is about to record.

Everything else is decided below, in fastinit.record.dispatch, by what a placeholder is.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import init
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from .. import native
from ..execution import can_fill, concrete
from ..native import TRUNCATED_NORMAL
from ..recipe import COMPUTED
from . import existing
from .block import Block, current
from .dispatch import wrap
from .factories import FACTORIES
from .graphs import is_leaf
from .nested import tensors_in
from .precision import SINGLE, WHOLE, in_doubles, of_default
from .recorded import fill
from .records import HALVES, in_functorch, lock, modes_off, view_of
from .tensors import (
    Placeholder,
    become_real,
    before_graph,
    has_master,
    use_values,
)

_TENSOR: Any = torch.Tensor

_GETTER = type(_TENSOR.shape.__get__)

# Functions of an initialization, which records no graph whatever requires one.
INITIALIZERS = frozenset(value for value in vars(init).values() if isinstance(value, FunctionType))

# Methods that say what a tensor is, or that autograd itself answers for one without memory.
_ABOUT_TENSORS = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        *"__hash__ __len__ detach dim element_size get_device is_complex is_contiguous is_floating_point".split(),
        *"is_inference is_same_size is_signed ndimension nelement numel register_hook".split(),
        *"register_post_accumulate_grad_hook requires_grad_ size storage_offset stride to type_as".split(),
    )
) | {
    *(torch.detach, torch.numel, torch.is_floating_point, torch.is_complex, torch.is_same_size, torch.is_signed),
    torch._has_compatible_shallow_copy_type,
}

# Views, which leave what they show unread.
_VIEWS = frozenset(
    view
    for name in (
        *"__getitem__ as_strided chunk diagonal expand expand_as flatten movedim narrow permute reshape select".split(),
        *"split squeeze swapaxes swapdims t tensor_split transpose unbind unflatten unsqueeze view view_as".split(),
    )
    for owner in (torch.Tensor, torch)
    if (view := getattr(owner, name, None)) is not None
) | {_TENSOR.T.__get__, _TENSOR.mT.__get__, _TENSOR.H.__get__, _TENSOR.mH.__get__}

# Results in these are looked at once more.
_PRECISIONS = (*SINGLE, *HALVES)

_CONVERTS = {torch.Tensor.to, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.type, torch.Tensor.type_as}

# Functions that say of which dtype their result is, though they are given none.
_NAME_A_DTYPE = {torch.Tensor.float, torch.Tensor.type}

# Views whose C++ reads where to split from the memory of a tensor.
_SPLITS = frozenset({torch.tensor_split, torch.Tensor.tensor_split})

# Functions whose C++ refuses subclasses of Tensor, or takes the address of one.
_WANT_MEMORY = frozenset({torch.Tensor.apply_, torch.Tensor.map_, torch.Tensor.map2_})

# Where a tensor becomes part of another one, below the dispatcher.
TAKES_OVER: set[Any] = {
    _TENSOR.data.__set__,
    _TENSOR.grad.__set__,
}

_GRAD_FN = _TENSOR.grad_fn.__get__

# Functions that the placeholder class may have as methods of its own, by the method's name.
AS_METHODS: dict[Any, str] = {}

_CONSTANTS = {torch.Tensor.fill_, torch.Tensor.zero_}

# Fills of tensors that exist already.
_FILLS = {torch.Tensor.uniform_, torch.Tensor.normal_, *_CONSTANTS}


class Mode(native.Mode, TorchFunctionMode):
    """The mode of one block, in the thread or coroutine that has entered it."""

    block: Block

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        block.mode = weakref.ref(self)
        self._outer_device_context = _device_context()

    def __exit__(self, *exception: Any) -> None:
        # Coroutines that interleave leave in any order: only this mode goes.
        others = []
        while (mode := torch._C._pop_torch_function_stack()) is not self:
            others.append(mode)
        for mode in reversed(others):
            torch._C._push_on_torch_function_stack(mode)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        block = self.block
        if current.get() is not block:  # another coroutine's
            return func(*args, **kwargs)
        factory = FACTORIES.get(func)
        if factory is not None:
            block.generator.resume()
            with modes_off():
                options = dict(kwargs)
                if type(options.get("dtype")) is type:  # of Python
                    options["dtype"] = torch.empty(0, dtype=options["dtype"]).dtype
                result = factory(self, func, *args, **options)
            if result is not NotImplemented:
                return result
            return func(*args, **kwargs)
        if type(func) is _GETTER:
            if func in TAKES_OVER:
                become_real(args[1])
            elif func == _GRAD_FN and type(args[0]) is Placeholder and not is_leaf(args[0]):
                return graph_of(args[0])
            return func(*args, **kwargs)
        if func is torch._has_compatible_shallow_copy_type and type(args[0]) is not Placeholder:
            if has_layout_of(*args):
                become_real(args[1])  # what is asked before a tensor takes the data of another one
        block.generator.resume()
        if func is torch.Tensor.__setitem__ and type(args[0]) is Placeholder:
            if args[0]._record.memory is not None and not has_master(args[0]):
                # It has all that makes a tensor, and constructors that fill tables one by one do a lot to it.
                become_real(args[0])
            elif is_mine() and not _is_recorded(args) and _set_element(*args):
                return None
        name = AS_METHODS.get(func)
        if name is not None and args and not kwargs and type(args[0]) is Placeholder and not _is_recorded(args):
            method = vars(Placeholder).get(name)
            return (method or func)(*args, **kwargs)
        if _initializes(func, kwargs):
            return self._initialize(func, args, kwargs)
        if func in _FILLS and _is_filled(block, func, args, kwargs):
            with modes_off():
                return existing.initialize(block, args[0], lambda whole: func(whole, *args[1:], **kwargs))
        tensors = tensors_in((args, kwargs))
        # Modes below autograd, which trace or fake, know placeholders no more than autograd's graphs do; nor does the
        # code of a class that answers functions of torch itself. Autocast remembers leaves by their C++ objects.
        to_others = torch._C._len_torch_dispatch_stack() or any(map(_answers_itself, types)) or func in _WANT_MEMORY
        if to_others or (torch._C._is_any_autocast_enabled() and any(each.requires_grad for each in tensors)):
            for each in tensors:
                become_real(each)
        elif func is torch._make_dual:
            for each in tensors:
                use_values(each)  # for another C++ object would not know the tangent
        elif torch.is_grad_enabled() and func not in _ABOUT_TENSORS and func not in _VIEWS:
            before_graph(tensors)
        if func in _SPLITS:
            for each in tensors_in((args[1:], kwargs)):
                become_real(each)
        if func is torch.Tensor.__setitem__ and type(args[2]) is float and has_master(args[0]):
            # torch would round the number before any operator sees it.
            with modes_off():
                args = (*args[:2], wrap(block, torch.tensor(args[2]), args[0].dtype, args[0].device))
        result = func(*args, **kwargs)
        if type(result) is torch.Tensor and result.dtype in _PRECISIONS:
            return self._in_the_blocks_precision(func, result, args, kwargs, tensors)
        return result

    def _initialize(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function of torch.nn.init, for a tensor that exists by way of a placeholder of its whole."""
        tensor = args[0] if args else kwargs.get("tensor")
        # Functions that are not torch's own may read what they are given.
        if not existing.takes(self.block, tensor) or not (func in INITIALIZERS or existing.is_ordinary(tensor)):
            return func(*args, **kwargs)

        def record(whole: torch.Tensor) -> Any:
            return func(whole, *args[1:], **kwargs) if args else func(**{**kwargs, "tensor": whole})

        return existing.initialize(self.block, tensor, record)

    def _in_the_blocks_precision(
        self, func: Any, result: torch.Tensor, args: Any, kwargs: Any, operands: list[torch.Tensor]
    ) -> torch.Tensor:
        """What torch has computed of integers or fp64 outside of placeholders, as the block is to have it.

        Of integers torch makes its default dtype, which is fp32 in the process and may be another one in the block. And
        what is converted to half precision keeps its values in fp32.
        """
        if result.requires_grad:
            return result
        # What is traced or faked below autograd is nothing that a placeholder could stand for.
        wraps = result.layout == torch.strided and result.is_cpu and not torch._C._len_torch_dispatch_stack()
        if result.dtype in HALVES:
            source: Any = args[0] if args and func in _CONVERTS else None
            computed = type(source) is torch.Tensor and source.is_cpu and source.dtype in (*WHOLE, torch.float64)
            if not computed or not wraps or in_functorch():
                return result
            with modes_off():
                values = torch.empty_like(result, dtype=torch.float32).copy_(source)  # of the result's strides
                return wrap(self.block, values, result.dtype, result.device)
        default = self.block.default_dtype
        if default is torch.float32 or not operands or any(each.dtype not in WHOLE for each in operands):
            return result
        if func in _NAME_A_DTYPE or any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
            return result
        with modes_off():
            if default is torch.float64:
                doubles: torch.Tensor = in_doubles(func, args, kwargs)
                return doubles
            dtype = of_default(result.dtype, default)
            return wrap(self.block, result, dtype, result.device) if wraps else result.to(dtype)

    def factory_device(self) -> torch.device:
        """Where a factory without a device argument puts its result: an inner ``torch.device`` context wins."""
        context = _device_context()
        if context is not None and context is not self._outer_device_context:
            return concrete(context.device)
        return self.block.device


def _device_context() -> DeviceContext | None:
    # torch keeps the only device context at the bottom of its mode stack.
    if torch._C._len_torch_function_stack():
        mode = torch._C._get_function_stack_at(0)
        if isinstance(mode, DeviceContext):
            return mode
    return None


def _is_recorded(args: tuple[Any, ...]) -> bool:
    """Whether autograd records a function of these."""
    return torch.is_grad_enabled() and any(isinstance(each, torch.Tensor) and each.requires_grad for each in args)


def is_mine() -> bool:
    """Whether nobody else's mode or transform would see a call."""
    modes = torch._C._len_torch_function_stack()
    if modes and not isinstance(torch._C._get_function_stack_at(modes - 1), Mode):
        return False
    if forward_ad._current_level >= 0:  # a tensor may have a tangent
        return False
    return not (torch._C._len_torch_dispatch_stack() or in_functorch() or torch._C._get_tracing_state())


def graph_of(tensor: Placeholder) -> Any:
    """``tensor.grad_fn`` of what a graph leads to: whoever asks may keep nodes, which are to be those of later on."""
    become_real(tensor)
    return tensor.grad_fn


_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def has_layout_of(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """What torch says to whether a tensor can take the data of another one, whatever stands for them."""
    has: bool = torch.ops.aten._has_compatible_shallow_copy_type.default.redispatch(_CPU, tensor, other)
    return has


def _answers_itself(kind: type[torch.Tensor]) -> bool:
    own: Any = kind.__torch_function__
    usual: Any = torch.Tensor.__torch_function__
    return own is not torch._C._disabled_torch_function_impl and getattr(own, "__func__", None) is not usual.__func__


def _initializes(func: Any, kwargs: dict[str, Any]) -> bool:
    # torch.nn.init hands a mode whatever has its public name, which a library may have replaced for a while; it is
    # called with `tensor` by name.
    return func in INITIALIZERS or (type(func) is FunctionType and "tensor" in kwargs)


def _set_element(tensor: Placeholder, index: Any, value: Any) -> bool:
    """Write to one place of master values that are there already; False if it is not so plain."""
    parts = index if type(index) is tuple else (index,)
    if not any(type(each) is int for each in parts):
        return False
    if not all(each is None or each is Ellipsis or type(each) in (int, slice) for each in parts):
        return False
    with lock, modes_off():
        # Where a log is kept of what torch runs, `dispatch` counts this.
        if type(tensor) is not Placeholder or tensor._record.block.defers or tensor._record.block.ran is not None:
            return False
        if type(value) is Placeholder:
            value = view_of(value._record.compute(), value._region)
        plain = type(value) is torch.Tensor and value.is_cpu and value.dtype not in HALVES
        if not (plain or type(value) in (int, float, bool)) or tensor._record.values is None:
            return False
        view_of(tensor._record.values, tensor._region)[index] = value
        tensor._record.block.touch(tensor._record)
        tensor._record.did(COMPUTED)
    torch.autograd.graph.increment_version(tensor)
    return True


# --- fills of tensors that exist already ---------------------------------------------------------------------------


def _is_filled(block: Block, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a fill is recorded for a tensor that exists already; constants are torch's, if there is any memory."""
    tensor = args[0]
    if kwargs.get("generator") is not None or (torch.is_grad_enabled() and tensor.requires_grad):
        return False
    return existing.takes_constants(block, tensor) if func in _CONSTANTS else existing.takes(block, tensor)


def truncated_normal(function: Callable[..., Any]) -> Callable[..., Any]:
    """The body of ``torch.nn.init.trunc_normal_``, which no mode sees as a whole."""

    @functools.wraps(function)
    def _no_grad_trunc_normal_(
        tensor: torch.Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
    ) -> torch.Tensor:
        block = current.get()
        if block is not None and generator is None and isinstance(tensor, torch.Tensor):
            with modes_off(), torch.no_grad():
                result = _truncated(block, tensor, mean, std, a, b)
            if result is not NotImplemented:
                return tensor
        return function(tensor, mean, std, a, b, generator=generator)  # type: ignore[no-any-return]

    return _no_grad_trunc_normal_


def _truncated(block: Block, tensor: torch.Tensor, mean: Any, std: Any, a: Any, b: Any) -> Any:
    try:
        parameters = (float(mean), float(std), float(a), float(b))
    except (TypeError, ValueError):
        return NotImplemented
    mean, std, a, b = parameters
    if not (0 < std < float("inf") and a < b and abs(mean) < float("inf")):
        return NotImplemented
    if type(tensor) is Placeholder:
        if not can_fill(tensor.dtype, tensor.device) or in_functorch():
            return NotImplemented
        torch.autograd.graph.increment_version(tensor)
        return fill(tensor, TRUNCATED_NORMAL, parameters)
    if not existing.takes(block, tensor):
        return NotImplemented
    return existing.initialize(block, tensor, lambda whole: _truncated(block, whole, *parameters))

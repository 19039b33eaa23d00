"""What torch computes of factories in a block: on the host, in fp32 where the result is in half precision.

Here is `compute`, for any factory of which no fill says what it contains, and those that are given data. They are
called as `fastinit.record.factories` says, which is above this module and knows which function each is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from ..execution import concrete
from .dispatch import wrap
from .nested import tensors_in
from .precision import SINGLE, WHOLE, complex_of, of_default
from .recorded import fills_what_is_empty
from .records import HALVES, alone, in_functorch, view_of
from .tensors import Placeholder, become_real

if TYPE_CHECKING:
    from .mode import Mode


def device_for(mode: Mode, options: dict[str, Any]) -> torch.device:
    """Where a factory with these keyword arguments has its result."""
    device = options.get("device")
    return mode.factory_device() if device is None else concrete(device)


def requiring(result: Any, requires_grad: Any) -> Any:
    """A factory's result, which requires grad if the call says so."""
    if not requires_grad:
        return result
    if not (result.is_floating_point() or result.is_complex()):
        raise RuntimeError("Only Tensors of floating point and complex dtype can require gradients")  # as torch says
    return result.requires_grad_()


def compute(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    """A factory whose values torch computes: on the host, in fp32 where the result is in half precision."""
    block = mode.block
    if block.ran is not None:
        block.ran[f"torch.{func.__name__}"] += 1
    if kwargs.get("out") is not None:
        return func(*args, **kwargs)
    device = device_for(mode, kwargs)
    default = kwargs.get("dtype") is None and _is_default(func, args, kwargs)
    final = kwargs.get("dtype")
    if default:
        final = block.default_dtype
        if func in _MAY_BE_COMPLEX and any(_is_complex(each) for each in (*args, *kwargs.values())):
            final = torch.complex128 if final == torch.float64 else torch.complex64
    is_pinned = kwargs.get("pin_memory") and device.type == "cpu"  # what somebody copies through, safetensors say
    by_torch = is_pinned or kwargs.get("generator") is not None or device.type == "meta"
    if by_torch or torch._C._len_torch_dispatch_stack():
        if default and final != torch._C.get_default_dtype():
            kwargs["dtype"] = final  # else left out: a trace is to show the call as it was written
        return func(*args, **{**kwargs, "device": device})
    requires_grad = kwargs.pop("requires_grad", False)
    kwargs.pop("pin_memory", None)
    kwargs["device"] = "cpu"
    if final is not None:
        kwargs["dtype"] = torch.float32 if final in HALVES else final
    if any(type(each) is Placeholder for each in tensors_in((args, kwargs))):
        args, kwargs = tree_map_only(Placeholder, _host_values, (args, kwargs))
    values = func(*args, **kwargs)
    if func is torch.empty and not fills_what_is_empty(block):
        (values.untyped_storage() if values.is_quantized else values).fill_(0)
    if final is None:
        final = values.dtype
    if func in _MAY_SHARE and (final in HALVES or device.type != "cpu"):
        values = values.clone()  # torch converts or moves the caller's data, and leaves it alone
    return requiring(wrap(block, values, final, device), requires_grad)


def _host_values(tensor: torch.Tensor) -> Any:
    if not isinstance(tensor, Placeholder):
        # In a transform of functions it may be one around a placeholder, of which C++ would want the address.
        return tensor.item() if in_functorch() and not tensor.dim() else tensor
    with alone():
        values = view_of(tensor._record.compute(), tensor._region)
        return values if values.is_cpu else values.cpu()


# Factories whose result may be the memory that they are given.
_MAY_SHARE = {torch.as_tensor, torch.asarray}

# Factories of which complex numbers make complex ones.
_MAY_BE_COMPLEX = {torch.full, torch.linspace, torch.logspace}

# Factories whose results are of another dtype than the default one, if they are given none.
_OF_THEIR_OWN = {
    *(torch.randint, torch.randperm, torch.tril_indices, torch.triu_indices, torch.empty_quantized),
    *(torch.tensor, torch.as_tensor, torch.asarray),
}


def _is_complex(value: Any) -> bool:
    return isinstance(value, complex) or (isinstance(value, torch.Tensor) and value.is_complex())


def _is_default(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a factory that is given no dtype gives the default dtype."""
    if func is torch.arange or func is torch.full:
        values = args[1:2] or (kwargs.get("fill_value"),) if func is torch.full else (*args, *kwargs.values())
        return any(_is_float(value) or _is_complex(value) for value in values)
    return func not in _OF_THEIR_OWN


def _is_float(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return isinstance(value, float) or getattr(getattr(value, "dtype", None), "kind", "") in ("f", "b")


def _dtype_of_data(leaves: Iterable[Any], default: torch.dtype) -> torch.dtype | None:
    """The dtype that torch infers for numbers of nested lists, with this default; None for what is no number."""
    of_python = {bool: torch.bool, int: torch.int64, float: default, complex: complex_of(default)}
    dtype: torch.dtype | None = None
    for each in leaves:
        own = each.dtype if isinstance(each, torch.Tensor) else of_python.get(type(each))
        if own is None and hasattr(each, "dtype"):
            own = torch.tensor(each).dtype
        if own is None:
            return None
        dtype = own if dtype is None else torch.promote_types(dtype, own)
    return default if dtype is None else dtype


def _leaves(data: Any, within: tuple[Any, ...] = ()) -> Iterator[Any]:
    """What nested lists hold; of a list that holds itself, itself."""
    if isinstance(data, (list, tuple)) and not any(data is each for each in within):
        for each in data:
            yield from _leaves(each, (*within, data))
    else:
        yield data


def from_data(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    """What torch.tensor, torch.as_tensor or torch.asarray makes of data in which there may be placeholders."""
    data, *rest = args or (kwargs.pop("obj" if "obj" in kwargs else "data"),)
    if isinstance(data, torch.Tensor):
        return NotImplemented
    kwargs.update(zip(("dtype", "device"), rest, strict=False))  # of as_tensor
    if not isinstance(data, (list, tuple, float, int, bool, complex)):
        # An array or a buffer: the dtype is its own, and so may be the memory.
        dtype, its = kwargs.get("dtype"), getattr(data, "dtype", None)
        own = dtype is None or (its is not None and str(dtype).endswith(str(its)))
        own = own or isinstance(data, (torch.UntypedStorage, torch.TypedStorage))
        if (own or (func is torch.asarray and _is_memory(data))) and device_for(mode, kwargs).type == "cpu":
            return func(data, **{**kwargs, "device": "cpu"})
    leaves = list(_leaves(data))
    if any(isinstance(each, (list, tuple)) for each in leaves):
        return NotImplemented  # a list that holds itself is torch's to refuse
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = _dtype_of_data(leaves, mode.block.default_dtype)
    if any(isinstance(each, torch.Tensor) for each in leaves):
        data = _mapped(data, _host_values)
    return compute(mode, func, data, **kwargs)


def _is_memory(data: Any) -> bool:
    """Whether torch.asarray takes an object for memory of whatever dtype it is asked for."""
    if hasattr(data, "dtype"):
        return False
    try:
        memoryview(data)
    except TypeError:
        return type(data).__name__ == "PyCapsule"
    return True


def _mapped(data: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(data, (list, tuple)):
        return [_mapped(each, function) for each in data]
    return function(data) if isinstance(data, torch.Tensor) else data


def new_tensor(mode: Mode, func: Any, other: torch.Tensor, data: Any, **kwargs: Any) -> Any:
    """``other.new_tensor(data)``, of the other one's dtype and device."""
    kwargs = {"dtype": other.dtype, "device": other.device, **{k: v for k, v in kwargs.items() if v is not None}}
    return from_data(mode, torch.tensor, data, **kwargs)


def result_type(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> torch.dtype:
    """``torch.result_type(...)``, with the default dtype of the block."""
    dtype: torch.dtype = func(*args, **kwargs)
    tensors = tensors_in((args, kwargs))
    # Of integers and a number torch makes its default dtype, which is another one in the process.
    is_default = dtype in SINGLE and all(each.dtype in WHOLE for each in tensors)
    return of_default(dtype, mode.block.default_dtype) if is_default else dtype


def of_other_layout(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Factories of layouts that have no placeholders, whose data may be placeholders."""
    for each in _leaves([*args, *kwargs.values()]):
        become_real(each)
    device = device_for(mode, kwargs)
    data = args[2] if len(args) > 2 else kwargs.get("values")
    if func is torch.sparse_coo_tensor:
        data = args[1] if len(args) > 1 else kwargs.get("values")
    if kwargs.get("dtype") is None and not isinstance(data, torch.Tensor):
        kwargs["dtype"] = _dtype_of_data(_leaves(data), mode.block.default_dtype)
    return func(*args, **{**kwargs, "device": device})

"""torch's factories in a block: recorded where a fill says what they contain, else computed on the host.

A factory is called as ``factory(mode, func, *args, **kwargs)`` with all modes off. It returns NotImplemented for what
is torch's own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map_only

from ..execution import DTYPES, concrete, is_native
from ..layout import numel
from ..native import CONSTANT, NORMAL, UNIFORM
from ..recipe import Region, Write
from .dispatch import RECORDED, create, wrap
from .nested import tensors_in
from .precision import SINGLE, WHOLE, complex_of, of_default
from .recorded import fills_what_is_empty, is_worth_recording, refuse_beyond
from .records import HALVES, alone, view_of
from .tensors import Placeholder, become_real

if TYPE_CHECKING:
    from .mode import Mode

aten = torch.ops.aten

Factory = Callable[..., Any]

FACTORIES: dict[Any, Factory] = {}


def _is(*functions: Any) -> Callable[[Factory], Factory]:
    def register(factory: Factory) -> Factory:
        for function in functions:
            FACTORIES[function] = factory
        return factory

    return register


_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


def with_torchs_dtype(options: dict[str, Any]) -> dict[str, Any]:
    """A factory's keyword arguments, with torch's name for a dtype that is given as a type of Python."""
    dtype = options.get("dtype")
    return {**options, "dtype": _DTYPES.get(dtype, dtype)} if type(dtype) is type else options


# --- recorded -------------------------------------------------------------------------------------------------------

_OPTIONS = {"size", "dtype", "device", "requires_grad", "pin_memory", "layout", "memory_format", "generator", "out"}


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The size argument of a factory, or None if it is not plain integers."""
    if not args and "size" in kwargs:
        args = (kwargs["size"],)
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        args = tuple(args[0])
    try:
        size = tuple(value if type(value) is int else operator.index(value) for value in args)
    except TypeError:
        return None
    return size if all(value >= 0 for value in size) else None


def _create(
    mode: Mode, size: tuple[int, ...] | None, options: dict[str, Any], fill: tuple[int, tuple[float, ...]] | None
) -> Any:
    """A placeholder for a factory call; NotImplemented if it is to be computed."""
    if size is None or torch._C._len_torch_dispatch_stack() or not options.keys() <= _OPTIONS:
        return NotImplemented
    if in_functorch():  # whose tensors are its own: written in place, and drawn as its randomness says
        return NotImplemented
    if options.get("pin_memory") or options.get("layout") not in (None, torch.strided):
        return NotImplemented
    if options.get("out") is not None or options.get("generator") is not None:
        return NotImplemented
    block = mode.block
    dtype = options.get("dtype") or block.default_dtype
    device = _device(mode, options)
    if fill is None and fills_what_is_empty(block):
        if not dtype.is_floating_point:
            return NotImplemented
        fill = CONSTANT, (math.nan,)
    if device.type == "meta" or (fill is None and dtype in _OPAQUE):
        return NotImplemented
    if math.prod(max(each, 1) for each in size) * dtype.itemsize >= 2**63:
        return NotImplemented  # torch's refusal
    if fill is not None and fill[0] == CONSTANT:
        refuse_beyond(dtype, numel(size), *fill[1])
    if dtype not in DTYPES and fill is not None:
        if not is_worth_recording(dtype, device, *fill):
            return NotImplemented
    elif not is_native(dtype, device) and device.type not in ("cpu", block.device.type):
        return NotImplemented
    region = None
    memory_format = options.get("memory_format")
    if memory_format not in (None, torch.contiguous_format):
        meta = torch.empty(size, device="meta", memory_format=memory_format)
        region = Region(0, size, meta.stride())
    write = None
    if fill is not None:
        stream, key = (0, None) if fill[0] == CONSTANT else block.generator.next_stream()
        write = Write(*fill, stream, key=key)
    result = create(block, size, dtype, device, write, region)
    return _requiring(result, options.get("requires_grad"))


def _requiring(result: Any, requires_grad: Any) -> Any:
    """A factory's result, which requires grad if the call says so."""
    if not requires_grad:
        return result
    if not (result.is_floating_point() or result.is_complex()):
        raise RuntimeError("Only Tensors of floating point and complex dtype can require gradients")  # as torch says
    return result.requires_grad_()


_OPAQUE = (torch.quint8, torch.qint8, torch.qint32)


def _device(mode: Mode, options: dict[str, Any]) -> torch.device:
    device = options.get("device")
    return mode.factory_device() if device is None else concrete(device)


def _recorded(fill: tuple[int, tuple[float, ...]] | None) -> Factory:
    def factory(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
        if "names" in kwargs:
            return compute(mode, func, *args, **kwargs)
        result = _create(mode, _size(args, kwargs), kwargs, fill)
        return compute(mode, func, *args, **kwargs) if result is NotImplemented else result

    return factory


_recorded_empty = _recorded(None)


@_is(torch.empty)
def _empty(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("pin_memory") and _device(mode, kwargs).type == "cpu":
        # What somebody copies through, safetensors say: torch's own, at once.
        dtype = kwargs.get("dtype") or mode.block.default_dtype
        return func(*args, **{**kwargs, "dtype": dtype, "device": "cpu"})
    return _recorded_empty(mode, func, *args, **kwargs)


FACTORIES[torch.zeros] = _recorded((CONSTANT, (0.0,)))
FACTORIES[torch.ones] = _recorded((CONSTANT, (1.0,)))
FACTORIES[torch.rand] = _recorded((UNIFORM, (0.0, 1.0)))
FACTORIES[torch.randn] = _recorded((NORMAL, (0.0, 1.0)))


@_is(torch.full)
def _full(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    options = dict(kwargs)
    size, value = (*args, *(options.pop(name) for name in ("size", "fill_value") if name in options))
    # Without a dtype, torch makes whole numbers int64, and anything else the default dtype.
    if type(value) is float or (type(value) is int and options.get("dtype") is not None):
        result = _create(mode, _size((size,), {}), options, (CONSTANT, (float(value),)))
        if result is not NotImplemented:
            return result
    is_complex = value.is_complex() if isinstance(value, torch.Tensor) else isinstance(value, complex)
    if is_complex and options.get("dtype") is None and mode.block.default_dtype == torch.float64:
        kwargs = {**kwargs, "dtype": torch.complex128}  # of any other default, torch makes complex64
    return compute(mode, func, *args, **kwargs)


@_is(torch.empty_strided)
def _empty_strided(mode: Mode, func: Any, size: Any, stride: Any, **options: Any) -> Any:
    sizes, strides = _size((tuple(size),), {}), _size((tuple(stride),), {})
    block = mode.block
    plain = not torch._C._len_torch_dispatch_stack() and not fills_what_is_empty(block) and not in_functorch()
    if plain and sizes is not None and strides is not None and 0 not in sizes:
        device = _device(mode, options)
        dtype = options.get("dtype") or block.default_dtype
        end = Region(0, sizes, strides).end
        plain = end * dtype.itemsize < 2**63 and dtype not in _OPAQUE  # what overflows is torch's to refuse
        if plain and device.type != "meta" and not options.get("pin_memory"):
            base = create(block, (end,), dtype, device, None)
            result = base.as_strided(sizes, strides)
            return _requiring(result, options.get("requires_grad"))
    return compute(mode, func, size, stride, **options)


@_is(torch.empty_permuted)
def _empty_permuted(mode: Mode, func: Any, size: Any, physical_layout: Any, **options: Any) -> Any:
    strides = torch.empty_permuted(tuple(size), tuple(physical_layout), device="meta").stride()
    return _empty_strided(mode, torch.empty_strided, tuple(size), strides, **options)


@_is(torch.normal)
def _torch_normal(mode: Mode, func: Any, mean: Any, std: Any = None, size: Any = None, **kwargs: Any) -> Any:
    if (
        size is None
        or not all(type(value) in (int, float) and math.isfinite(value) for value in (mean, std))
        or std < 0
    ):
        return NotImplemented if size is None else compute(mode, func, mean, std, size, **kwargs)
    result = _create(mode, _size((size,), {}), kwargs, (NORMAL, (float(mean), float(std))))
    return compute(mode, func, mean, std, size, **kwargs) if result is NotImplemented else result


# Tensors like others: the operators of fastinit.record.dispatch, also for tensors of others.
_LIKE = {
    torch.empty_like: aten.empty_like.default,
    torch.zeros_like: aten.zeros_like.default,
    torch.ones_like: aten.ones_like.default,
    torch.rand_like: aten.rand_like.default,
    torch.randn_like: aten.randn_like.default,
    torch.full_like: aten.full_like.default,
    torch.Tensor.new_empty: aten.new_empty.default,
    torch.Tensor.new_zeros: aten.new_zeros.default,
    torch.Tensor.new_ones: aten.new_ones.default,
    torch.Tensor.new_full: aten.new_full.default,
}


def _like(overload: Any) -> Factory:
    def factory(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
        other = args[0] if args else kwargs.get("input")
        if not isinstance(other, torch.Tensor) or type(other).__torch_function__ not in _SILENT:
            return NotImplemented  # torch's to refuse, or a subclass's to answer
        if not args:
            del kwargs["input"]
        if torch._C._len_torch_dispatch_stack():
            return _again(func, (other, *args[1:]), kwargs)
        rest = args[1:]
        requires_grad = kwargs.pop("requires_grad", False)
        plain = type(other) in (torch.Tensor, torch.nn.Parameter, Placeholder)
        if plain and other.layout == torch.strided and not in_functorch():
            if overload in _SIZED:
                given = rest[:1] if overload is aten.new_full.default else rest
                size = _size(given, kwargs)
                kwargs.pop("size", None)
                if size is None:
                    return _again(func, (other, *rest), kwargs, requires_grad)
                rest = (size, *rest[1:]) if overload is aten.new_full.default else (size,)
            result = RECORDED[overload](overload, other, *rest, **kwargs)
            if result is not NotImplemented:
                return _requiring(result, requires_grad)
        return _again(func, (other, *rest), kwargs, requires_grad)

    return factory


# What classes have that leave functions of torch to torch.
_SILENT = (torch.Tensor.__torch_function__, torch._C._disabled_torch_function_impl)


def _again(func: Any, args: Any, kwargs: Any, requires_grad: bool = False) -> Any:
    result = func(*args, **kwargs)
    return _requiring(result, requires_grad)


def in_functorch() -> bool:
    """Whether a transform of functions is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


_SIZED = {aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
for _function, _overload in _LIKE.items():
    FACTORIES[_function] = _like(_overload)


# --- computed -------------------------------------------------------------------------------------------------------


def compute(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    """A factory whose values torch computes: on the host, in fp32 where the result is in half precision."""
    block = mode.block
    if block.ran is not None:
        block.ran[f"torch.{func.__name__}"] += 1
    if kwargs.get("out") is not None:
        return func(*args, **kwargs)
    device = _device(mode, kwargs)
    dtype = kwargs.get("dtype")
    default = dtype is None and _is_default(func, args, kwargs)
    final = block.default_dtype if default else dtype
    if default and func in _SPACED and any(_is_complex(each) for each in (*args, *kwargs.values())):
        final = complex_of(block.default_dtype)
    generator = kwargs.get("generator")
    if generator is not None or device.type == "meta" or torch._C._len_torch_dispatch_stack():
        if default and _takes_dtype(func):
            kwargs["dtype"] = final
        return func(*args, **{**kwargs, "device": device})
    block.generator.resume()
    requires_grad = kwargs.pop("requires_grad", False)
    if kwargs.pop("pin_memory", False):
        kwargs["pin_memory"] = device.type == "cpu"
    kwargs["device"] = "cpu"
    if final is not None and _takes_dtype(func):
        kwargs["dtype"] = torch.float32 if final in HALVES else final
    if any(type(each) is Placeholder for each in tensors_in((args, kwargs))):
        args, kwargs = tree_map_only(Placeholder, _host_values, (args, kwargs))
    values = func(*args, **kwargs)
    if func is torch.empty and not fills_what_is_empty(block):
        if values.is_quantized:  # which torch has no zero_ for
            values.untyped_storage().fill_(0)
        else:
            values.zero_()
    if final is None:
        final = values.dtype
    if func in _MAY_SHARE and (final in HALVES or device.type != "cpu"):
        values = values.clone()  # torch converts or moves the caller's data, and leaves it alone
    result = wrap(block, values, final, device)
    return _requiring(result, requires_grad)


def _host_values(tensor: torch.Tensor) -> Any:
    if not isinstance(tensor, Placeholder):
        # In a transform of functions it may be one around a placeholder, of which C++ would want the address.
        return tensor.item() if in_functorch() and not tensor.dim() else tensor
    with alone():
        values = view_of(tensor._record.compute(), tensor._region)
        return values if values.is_cpu else values.cpu()


def _takes_dtype(func: Any) -> bool:
    return func not in (torch.tril_indices, torch.triu_indices)


# Factories whose result may be the memory that they are given.
_MAY_SHARE = {torch.as_tensor, torch.asarray}

# Factories that give the default dtype whatever they are given.
_ALWAYS = {
    *(torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.normal, torch.eye, torch.linspace),
    *(torch.logspace, torch.scalar_tensor, torch.range, torch.bartlett_window, torch.blackman_window),
    *(torch.hamming_window, torch.hann_window, torch.kaiser_window, torch.fft.fftfreq, torch.fft.rfftfreq),
    *(torch.empty_strided, torch.empty_permuted),
}


# Factories of which complex bounds make complex numbers.
_SPACED = {torch.linspace, torch.logspace}


def _is_complex(value: Any) -> bool:
    return isinstance(value, complex) or (isinstance(value, torch.Tensor) and value.is_complex())


def _is_default(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a factory that is given no dtype gives the default dtype."""
    if func in _ALWAYS:
        return True
    if func is torch.arange or func is torch.full:
        values = args[1:2] or (kwargs.get("fill_value"),) if func is torch.full else (*args, *kwargs.values())
        return any(_is_float(value) for value in values)
    return False


def _is_float(value: Any) -> bool:
    if type(value) in (int, float):
        return type(value) is float
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return isinstance(value, float) or getattr(getattr(value, "dtype", None), "kind", "") in ("f", "b")


def _dtype_of_data(data: Any, default: torch.dtype) -> torch.dtype | None:
    """The dtype that torch infers for lists of numbers, with this default; None for what is no such list."""
    dtype: torch.dtype | None = None
    for each in _leaves(data):
        if isinstance(each, torch.Tensor):
            own = each.dtype
        elif hasattr(each, "dtype"):
            own = torch.tensor(each).dtype
        elif type(each) is float:
            own = default
        elif type(each) is complex:
            own = complex_of(default)
        elif type(each) in (bool, int):
            own = torch.bool if type(each) is bool else torch.int64
        else:
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


@_is(torch.tensor, torch.as_tensor, torch.asarray)
def _tensor(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
    if isinstance(data, torch.Tensor):
        if type(data) is Placeholder:
            if kwargs.get("copy") is False:
                become_real(data)  # torch.asarray refuses what would be a copy
                return NotImplemented
            return _of_placeholder(func, data, args[1:], kwargs)
        return NotImplemented
    if func is torch.as_tensor and len(args) > 1:
        kwargs.update(zip(("dtype", "device"), args[1:], strict=False))
        args = args[:1]
    if not isinstance(data, (list, tuple, float, int, bool, complex)):
        # An array or a buffer: the dtype is its own, and so may be the memory.
        dtype, its = kwargs.get("dtype"), getattr(data, "dtype", None)
        own = dtype is None or (its is not None and str(dtype).endswith(str(its)))
        own = own or isinstance(data, (torch.UntypedStorage, torch.TypedStorage))
        if (own or (func is torch.asarray and _is_memory(data))) and _device(mode, kwargs).type == "cpu":
            return func(*args, **{**kwargs, "device": "cpu"})
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = _dtype_of_data(data, mode.block.default_dtype)
    if any(isinstance(each, (list, tuple)) for each in _leaves(data)):
        return NotImplemented  # a list that holds itself is torch's to refuse
    if any(isinstance(each, torch.Tensor) for each in _leaves(data)):
        args, kwargs = (
            (_mapped(data, _host_values), *args[1:]),
            {k: v for k, v in kwargs.items() if k not in ("data", "obj")},
        )
    return compute(mode, func, *args, **kwargs)


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


def _of_placeholder(func: Any, data: Placeholder, args: Any, kwargs: Any) -> Any:
    options = {name: value for name, value in kwargs.items() if name in ("dtype", "device") and value is not None}
    options.update(zip(("dtype", "device"), args, strict=False))
    requires_grad = kwargs.get("requires_grad", False)
    if func is torch.tensor:
        result = data.detach().to(**options, copy=True) if options else data.detach().clone()
    else:
        result = data.to(**options, copy=bool(kwargs.get("copy"))) if options or kwargs.get("copy") else data
    return _requiring(result, requires_grad)


@_is(torch.Tensor.tolist)
def _tolist(mode: Mode, func: Any, tensor: Any) -> Any:
    # A method of a placeholder's own; torch's refuses subclasses.
    return tensor.tolist() if type(tensor) is Placeholder else NotImplemented


@_is(torch.Tensor.new_tensor)
def _new_tensor(mode: Mode, func: Any, other: torch.Tensor, data: Any, **kwargs: Any) -> Any:
    kwargs = {"dtype": other.dtype, "device": other.device, **{k: v for k, v in kwargs.items() if v is not None}}
    return _tensor(mode, torch.tensor, data, **kwargs)


@_is(torch.Tensor.new)
def _new(mode: Mode, func: Any, other: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.keys() - {"device", "size"} or other.layout != torch.strided:
        return NotImplemented
    if any(isinstance(each, torch.Tensor) for each in args):
        return NotImplemented  # another tensor of the same memory
    if torch.device(kwargs.get("device") or other.device).type != other.device.type:
        return NotImplemented  # torch's to refuse
    if len(args) == 1 and isinstance(args[0], (list, tuple)) and not isinstance(args[0], torch.Size):
        return _tensor(mode, torch.tensor, args[0], dtype=other.dtype, device=other.device)
    size = _size(args or (() if "size" in kwargs else (0,)), kwargs)
    if size is not None:
        return create(mode.block, size, other.dtype, other.device, None)
    return NotImplemented


def legacy_tensor(mode: Mode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.Tensor(2, 3)``, uninitialized, ``torch.Tensor([2, 3])`` and the like, all of the default dtype."""
    options = {**kwargs, "dtype": mode.block.default_dtype}
    values = [*args, *options.pop("size", ()), *([options.pop("data")] if "data" in kwargs else ())]
    if not options.keys() <= {"dtype", "device"} or torch.device(options.get("device") or "cpu").type != "cpu":
        return NotImplemented
    data = values[0] if len(values) == 1 else None
    if isinstance(data, torch.Tensor):
        return NotImplemented  # another tensor of the same memory
    if isinstance(data, (torch.UntypedStorage, torch.TypedStorage)):
        return torch.empty(0, **options).set_(data)
    if isinstance(data, torch.Size) or not any(hasattr(value, "__len__") for value in values):
        return _create(mode, _size(tuple(values) or (0,), {}), options, None)
    return _tensor(mode, torch.tensor, data, **options) if hasattr(data, "__len__") else NotImplemented


@_is(torch.result_type)
def _result_type(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> torch.dtype:
    dtype: torch.dtype = func(*args, **kwargs)
    tensors = tensors_in((args, kwargs))
    # Of integers and a number torch makes its default dtype, which is another one in the process.
    is_default = dtype in SINGLE and all(each.dtype in WHOLE for each in tensors)
    return of_default(dtype, mode.block.default_dtype) if is_default else dtype


def _take_memory(mode: Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Factories of layouts that have no placeholders, whose data may be placeholders."""
    for each in _leaves([*args, *kwargs.values()]):
        become_real(each)
    device = _device(mode, kwargs)
    data = args[2] if len(args) > 2 else kwargs.get("values")
    if func is torch.sparse_coo_tensor:
        data = args[1] if len(args) > 1 else kwargs.get("values")
    if kwargs.get("dtype") is None and not isinstance(data, torch.Tensor):
        kwargs["dtype"] = _dtype_of_data(data, mode.block.default_dtype)
    return func(*args, **{**kwargs, "device": device})


_TAKING = {
    *(torch.sparse_coo_tensor, torch.sparse_csr_tensor, torch.sparse_csc_tensor, torch.sparse_bsr_tensor),
    *(
        torch.sparse_bsc_tensor,
        torch.sparse_compressed_tensor,
        torch.nested.nested_tensor,
        torch._empty_affine_quantized,
    ),
}
for _function in _TAKING:
    FACTORIES[_function] = _take_memory
for _function in _device_constructors():
    FACTORIES.setdefault(_function, compute)

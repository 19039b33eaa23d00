"""The table of interceptions: torch callable -> what the recorder does with it.

A handler is called as ``handler(recorder, func, *args, **kwargs)`` with all modes off. It returns the result, or
NotImplemented for whatever it does not recognise; the recorder then settles what is pending for the tensors involved
and lets torch run (`Recorder.run_in_torch`). Functions that are not in the table take that path too.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import init

from .execution import DTYPES
from .layout import contiguous_strides
from .native import ADD, CLAMP, CONSTANT, DIVIDE, MULTIPLY, NORMAL, TRUNCATED_NORMAL, UNIFORM, pending_shape, record
from .recipe import ERFINV, ORTHOGONAL, Region, Write, with_step

_modes_off = torch._C.DisableTorchFunction
_HALVES = (torch.float16, torch.bfloat16)

if TYPE_CHECKING:
    from .recorder import Entry, Recorder

Function = Callable[..., Any]  # torch's: a function, a method or the getter of a property
Handler = Callable[..., Any]

# Metadata and flags: torch answers for a placeholder as it would for the tensor itself.
PASS: Handler = lambda *_: NotImplemented  # noqa: E731 - a sentinel, compared by identity

HANDLERS: dict[Any, Handler] = {}


def _callables(*names: str) -> list[Any]:
    """Every public callable of these names: function, method, and the variants of torch.special."""
    found = []
    for name in names:
        for owner in (torch, torch.Tensor, torch.special):
            candidate = getattr(owner, name, None)
            if callable(candidate) and candidate not in found:
                found.append(candidate)
    return found


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for target in _callables(*names):
            HANDLERS[target] = handler
        return handler

    return register


# --- metadata -------------------------------------------------------------------------------------------------------

for _name in (
    "dim ndimension size numel nelement element_size is_floating_point is_complex is_signed is_same_size get_device "
    "requires_grad_ __len__ __hash__ register_hook register_post_accumulate_grad_hook retain_grad is_inference "
    "_is_view is_neg is_conj has_names is_distributed _has_compatible_shallow_copy_type"
).split():
    for _target in _callables(_name):
        HANDLERS[_target] = PASS
for _name in (
    "shape ndim dtype device layout is_meta is_cuda is_cpu is_xpu is_mps is_sparse is_sparse_csr is_quantized "
    "is_nested is_mkldnn is_leaf requires_grad grad grad_fn names itemsize nbytes _version output_nr retains_grad "
    "_backward_hooks _post_accumulate_grad_hooks is_ipu is_xla is_hpu is_maia is_mtia is_vulkan _grad _grad_fn _cdata"
).split():
    _property: Any = getattr(torch.Tensor, _name, None)
    if hasattr(_property, "__get__"):
        HANDLERS[_property.__get__] = PASS
        HANDLERS[_property.__set__] = PASS
HANDLERS[torch._C._set_grad_enabled] = PASS


@_handles("stride")
def _stride(rec: Recorder, func: Function, tensor: torch.Tensor, dim: int | None = None) -> Any:
    entry = rec.find(tensor)
    if entry is None or entry.allocated:
        return func(tensor) if dim is None else func(tensor, dim)
    region = rec.region(entry, tensor)
    strides = contiguous_strides(entry.shape) if region is None else region.strides
    return strides if dim is None else strides[dim]


@_handles("storage_offset")
def _storage_offset(rec: Recorder, func: Function, tensor: torch.Tensor) -> Any:
    entry = rec.find(tensor)
    if entry is None or entry.allocated:
        return func(tensor)
    region = rec.region(entry, tensor)
    return 0 if region is None else region.offset


@_handles("is_contiguous")
def _is_contiguous(rec: Recorder, func: Function, tensor: torch.Tensor, **kwargs: Any) -> Any:
    entry = rec.find(tensor)
    if entry is not None and kwargs:
        rec.give_memory(entry)
    if entry is None or entry.allocated:
        return func(tensor, **kwargs)
    region = rec.region(entry, tensor)
    return region is None or region.strides == contiguous_strides(region.sizes)


# --- factories ------------------------------------------------------------------------------------------------------


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The size argument of a factory, or None if it is not plain integers."""
    if not args and "size" in kwargs:
        args = (kwargs["size"],)
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        args = tuple(args[0])
    for value in args:
        if type(value) is not int or value < 0:
            break
    else:
        return args
    try:
        size = tuple(value if type(value) is int else operator.index(value) for value in args)
    except TypeError:
        return None
    return size if all(value >= 0 for value in size) else None


# What a factory may be given for it to be recorded; anything else is torch's.
_PLAIN_OPTIONS = {"size", "dtype", "device"}
_RECORDED_OPTIONS = _PLAIN_OPTIONS | {"requires_grad", "pin_memory", "layout", "memory_format"}


def _create(
    rec: Recorder,
    size: tuple[int, ...] | None,
    options: dict[str, Any],
    recipe: tuple[Write, ...],
    like: torch.Tensor | None = None,
) -> Any:
    """A placeholder for a factory call, or NotImplemented."""
    if size is None or torch._C._len_torch_dispatch_stack():
        return NotImplemented
    if options and not options.keys() <= _PLAIN_OPTIONS:
        if not options.keys() <= _RECORDED_OPTIONS or options.get("pin_memory"):
            return NotImplemented
        if options.get("layout") not in (None, torch.strided):
            return NotImplemented
        if options.get("memory_format") not in (None, torch.contiguous_format, torch.preserve_format):
            return NotImplemented
    dtype = options.get("dtype") or (rec.default_dtype if like is None else like.dtype)
    device = options.get("device")
    if device is None:
        device = rec.factory_device() if like is None else like.device
    elif type(device) is not torch.device or device.index is None:
        device = _concrete(device)
    if dtype not in DTYPES or (device is not rec.device and device.type not in ("cpu", rec.device.type)):
        return NotImplemented
    if 0 in size:
        result = torch.empty(size, dtype=dtype, device=device)
    else:
        result = rec.placeholder(size, dtype, device, recipe)
    return result.requires_grad_() if options.get("requires_grad") else result


def _concrete(device: str | int | torch.device) -> torch.device:
    from .recorder import concrete

    return concrete(device)


def _in_torch(
    rec: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype | None = None
) -> Any:
    """A factory that torch executes: on the context's device, in fp32 where it would have been in half precision."""
    if kwargs.get("device") is None:
        kwargs["device"] = rec.factory_device()
    named = kwargs.get("dtype")
    half = dtype or named or rec.default_dtype
    if half not in _HALVES or "out" in kwargs:
        return func(*args, **kwargs)
    requires_grad = kwargs.pop("requires_grad", False)
    if named is not None:
        kwargs["dtype"] = torch.float32
    result = func(*args, **kwargs)
    if result.dtype == torch.float32 or named is not None:
        if result.layout != torch.strided or result.is_meta or torch._C._len_torch_dispatch_stack():
            result = result.to(half)
        else:
            result = rec.wrap(result, half)
    return result.requires_grad_() if requires_grad else result


@_handles("empty")
def _empty(rec: Recorder, func: Function, *args: Any, **kwargs: Any) -> Any:
    result = _create(rec, _size(args, kwargs), kwargs, ())
    return _in_torch(rec, func, args, kwargs) if result is NotImplemented else result


def _constant_factory(value: float) -> Handler:
    def handler(rec: Recorder, func: Function, *args: Any, **kwargs: Any) -> Any:
        result = _create(rec, _size(args, kwargs), kwargs, (Write(CONSTANT, (value,)),))
        return _in_torch(rec, func, args, kwargs) if result is NotImplemented else result

    return handler


HANDLERS[torch.zeros] = _constant_factory(0.0)
HANDLERS[torch.ones] = _constant_factory(1.0)


@_handles("full")
def _full(rec: Recorder, func: Function, *args: Any, **kwargs: Any) -> Any:
    options = dict(kwargs)
    size, value = (*args, *(options.pop(name) for name in ("size", "fill_value") if name in options))
    # Without a dtype, torch takes the dtype of the value: only a float becomes the default dtype.
    if type(value) is float or (type(value) is int and options.get("dtype") is not None):
        result = _create(rec, _size((size,), {}), options, (Write(CONSTANT, (float(value),)),))
        if result is not NotImplemented:
            return result
        return _in_torch(rec, func, args, kwargs)
    kwargs.setdefault("device", rec.factory_device())
    return func(*args, **kwargs)


def _random_factory(kind: int, parameters: tuple[float, ...]) -> Handler:
    def handler(rec: Recorder, func: Function, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is not None or kwargs.get("out") is not None:
            return _in_torch(rec, func, args, kwargs)
        options = {name: value for name, value in kwargs.items() if name != "generator"}
        stream = rec.next_stream()
        result = _create(rec, _size(args, options), options, (Write(kind, parameters, stream),))
        return _random_in_torch(rec, func, args, kwargs, stream) if result is NotImplemented else result

    return handler


HANDLERS[torch.rand] = _random_factory(UNIFORM, (0.0, 1.0))
HANDLERS[torch.randn] = _random_factory(NORMAL, (0.0, 1.0))


def _like_factory(recipe_of: Callable[[Recorder], tuple[Write, ...]]) -> Handler:
    """empty_like and its kind; their dtype and device are the other tensor's unless they are named."""

    def handler(rec: Recorder, func: Function, other: torch.Tensor, **kwargs: Any) -> Any:
        if type(other) not in (torch.Tensor, torch.nn.Parameter) or other.layout != torch.strided:
            return NotImplemented
        if kwargs.get("memory_format") in (None, torch.preserve_format):
            if not _is_contiguous(rec, torch.Tensor.is_contiguous, other):
                return NotImplemented
        return _create(rec, tuple(other.size()), kwargs, recipe_of(rec), like=other)

    return handler


HANDLERS[torch.empty_like] = _like_factory(lambda rec: ())
HANDLERS[torch.zeros_like] = _like_factory(lambda rec: (Write(CONSTANT, (0.0,)),))
HANDLERS[torch.ones_like] = _like_factory(lambda rec: (Write(CONSTANT, (1.0,)),))
HANDLERS[torch.rand_like] = _like_factory(lambda rec: (Write(UNIFORM, (0.0, 1.0), rec.next_stream()),))
HANDLERS[torch.randn_like] = _like_factory(lambda rec: (Write(NORMAL, (0.0, 1.0), rec.next_stream()),))


@_handles("full_like")
def _full_like(rec: Recorder, func: Function, other: torch.Tensor, fill_value: Any, **kwargs: Any) -> Any:
    if type(fill_value) not in (int, float):
        return NotImplemented
    return _like_factory(lambda rec: (Write(CONSTANT, (float(fill_value),)),))(rec, func, other, **kwargs)


def _new_factory(recipe: tuple[Write, ...]) -> Handler:
    def handler(rec: Recorder, func: Function, other: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return _create(rec, _size(args, kwargs), kwargs, recipe, like=other)

    return handler


HANDLERS[torch.Tensor.new_empty] = _new_factory(())
HANDLERS[torch.Tensor.new_zeros] = _new_factory((Write(CONSTANT, (0.0,)),))
HANDLERS[torch.Tensor.new_ones] = _new_factory((Write(CONSTANT, (1.0,)),))


@_handles("new_full")
def _new_full(rec: Recorder, func: Function, other: torch.Tensor, size: Any, fill_value: Any, **kwargs: Any) -> Any:
    if type(fill_value) not in (int, float):
        return NotImplemented
    return _new_factory((Write(CONSTANT, (float(fill_value),)),))(rec, func, other, size, **kwargs)


@_handles("new_tensor")
def _new_tensor(rec: Recorder, func: Function, other: torch.Tensor, data: Any, **kwargs: Any) -> Any:
    kwargs.setdefault("dtype", other.dtype)
    kwargs.setdefault("device", other.device)
    return _in_torch(rec, torch.tensor, (data,), kwargs)


def _torch_factory(rec: Recorder, func: Function, *args: Any, **kwargs: Any) -> Any:
    """Factories whose values torch computes; an integer result stays one."""
    return _in_torch(rec, func, args, kwargs)


for _target in _callables(
    *"arange range eye linspace logspace bartlett_window blackman_window hamming_window hann_window kaiser_window "
    "empty_strided empty_permuted tril_indices triu_indices scalar_tensor sparse_coo_tensor".split()
):
    HANDLERS[_target] = _torch_factory
HANDLERS[torch.fft.fftfreq] = _torch_factory
HANDLERS[torch.fft.rfftfreq] = _torch_factory


def _eye_out(rec: Recorder, func: Function, *args: Any, **kwargs: Any) -> Any:
    out = kwargs.get("out")
    if out is None:
        return _torch_factory(rec, func, *args, **kwargs)
    # torch.nn.init.eye_ writes through out=; the tensor is overwritten whole.
    entry = rec.find(out)
    if entry is None:
        return func(*args, **kwargs)
    kwargs.update(out=None, device=entry.device, dtype=torch.float32, requires_grad=False)
    values = func(*args, **kwargs)
    if values.shape != out.shape or not rec.is_whole(entry, out):
        return NotImplemented
    return _write_values(rec, entry, out, values)


HANDLERS[torch.eye] = _eye_out


@_handles("tensor", "as_tensor", "asarray")
def _tensor(rec: Recorder, func: Function, data: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(data, torch.Tensor):
        # Copies and moves of a tensor: what torch does with one that has memory.
        return NotImplemented
    if func is torch.as_tensor and args:
        return NotImplemented
    if kwargs.get("dtype") is None and (hasattr(data, "dtype") or hasattr(data, "__array_interface__")):
        # The dtype is the array's, not the default.
        kwargs.setdefault("device", rec.factory_device())
        return func(data, *args, **kwargs)
    return _in_torch(rec, func, (data, *args), kwargs)


def legacy_tensor(rec: Recorder, args: tuple[Any, ...]) -> Any:
    """``torch.Tensor(2, 3)``, uninitialised, and ``torch.Tensor([2, 3])``, both of the default dtype."""
    if all(type(argument) is int for argument in args):
        return _create(rec, _size(args or (0,), {}), {}, ())
    if len(args) != 1:
        return NotImplemented
    if isinstance(args[0], torch.Size):
        return _create(rec, _size(args, {}), {}, ())
    if isinstance(args[0], (list, tuple)) or hasattr(args[0], "__array_interface__"):
        return _in_torch(rec, torch.tensor, args, {"dtype": rec.default_dtype})
    return NotImplemented


# --- fills in place -------------------------------------------------------------------------------------------------


def _refuse_leaf(tensor: torch.Tensor) -> None:
    if torch.is_grad_enabled() and tensor.requires_grad:
        # Let torch raise what it raises for a leaf that is written in place outside of no_grad.
        torch.zeros(1, requires_grad=True).zero_()


def _fill(
    rec: Recorder,
    func: Function,
    tensor: torch.Tensor,
    kind: int,
    parameters: tuple[float, ...],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if rec.fill(tensor, kind, parameters):
        return tensor
    if kind == CONSTANT:
        return NotImplemented
    return _random_in_torch(rec, func, (tensor, *args), kwargs, rec.streams - 1)


@_handles("uniform_")
def _uniform(
    rec: Recorder,
    func: Function,
    tensor: torch.Tensor,
    *args: Any,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Any:
    pair = _pair(args, kwargs, ("from", "to"), (0.0, 1.0))
    if generator is not None or pair is None or not 0.0 <= pair[1] - pair[0] < math.inf:
        return NotImplemented
    _refuse_leaf(tensor)
    return _fill(rec, func, tensor, UNIFORM, pair, *pair)


@_handles("normal_")
def _normal(
    rec: Recorder,
    func: Function,
    tensor: torch.Tensor,
    *args: Any,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Any:
    pair = _pair(args, kwargs, ("mean", "std"), (0.0, 1.0))
    if generator is not None or pair is None or not 0.0 <= pair[1] < math.inf or not math.isfinite(pair[0]):
        return NotImplemented
    _refuse_leaf(tensor)
    return _fill(rec, func, tensor, NORMAL, pair, *pair)


def _pair(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, str], defaults: tuple[float, float]
) -> tuple[float, float] | None:
    """The two float parameters of a fill by position or name, or None if they are something else."""
    rest = list(zip(names, defaults, strict=True))[len(args) :]
    values = [*args, *(kwargs.get(name, default) for name, default in rest)]
    if len(values) != 2 or not all(type(value) in (int, float) for value in values) or kwargs.keys() - set(names):
        return None
    return float(values[0]), float(values[1])


@_handles("fill_")
def _fill_constant(rec: Recorder, func: Function, tensor: torch.Tensor, value: Any) -> Any:
    if type(value) not in (int, float):
        return NotImplemented
    entry = rec.find(tensor)
    if entry is None:
        return NotImplemented
    _refuse_leaf(tensor)
    return _fill(rec, func, tensor, CONSTANT, (float(value),))


@_handles("zero_")
def _zero(rec: Recorder, func: Function, tensor: torch.Tensor) -> Any:
    return _fill_constant(rec, func, tensor, 0.0)


@_handles("__setitem__")
def _setitem(rec: Recorder, func: Function, tensor: torch.Tensor, index: Any, value: Any) -> Any:
    entry = rec.find(tensor)
    if entry is None or _has_tensor(index) or (torch.is_grad_enabled() and tensor.requires_grad):
        return NotImplemented
    is_scalar = type(value) in (int, float)
    if not is_scalar and not isinstance(value, torch.Tensor):
        return NotImplemented
    view = _view(rec, torch.Tensor.__getitem__, tensor, index)
    if view is NotImplemented:
        return NotImplemented
    if is_scalar:
        return None if rec.fill(view, CONSTANT, (float(value),)) else NotImplemented
    if value.dim() > view.dim() or _copy(rec, torch.Tensor.copy_, view, value) is NotImplemented:
        return NotImplemented
    return None


def _has_tensor(index: object) -> bool:
    return isinstance(index, (torch.Tensor, list)) or (
        isinstance(index, tuple) and any(isinstance(item, (torch.Tensor, list)) for item in index)
    )


# --- torch.nn.init functions that a mode sees whole -----------------------------------------------------------------


def _handles_function(function: Function) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS[function] = handler
        return handler

    return register


# torch.nn.init names the function that it dispatches by looking up its own public name, so where a library has
# replaced that name for a while, as transformers does, the replacement arrives instead of the function.
INIT_HANDLERS: dict[str, Handler] = {}


def _handles_init(function: Function) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS[function] = INIT_HANDLERS[function.__name__] = handler
        return handler

    return register


def _init_fill(
    rec: Recorder, method: Function, tensor: torch.Tensor, kind: int, parameters: tuple[float, float]
) -> Any:
    if rec.fill(tensor, kind, parameters):
        return tensor
    with torch.no_grad():
        return _random_in_torch(rec, method, (tensor, *parameters), {}, rec.streams - 1)


@_handles_init(init.uniform_)
def _init_uniform(
    rec: Recorder,
    func: Function,
    tensor: torch.Tensor,
    a: float = 0.0,
    b: float = 1.0,
    generator: torch.Generator | None = None,
) -> Any:
    if generator is not None or not 0.0 <= b - a < math.inf:
        return NotImplemented
    return _init_fill(rec, torch.Tensor.uniform_, tensor, UNIFORM, (float(a), float(b)))


@_handles_init(init.normal_)
def _init_normal(
    rec: Recorder,
    func: Function,
    tensor: torch.Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Any:
    if generator is not None or not 0.0 <= std < math.inf:
        return NotImplemented
    return _init_fill(rec, torch.Tensor.normal_, tensor, NORMAL, (float(mean), float(std)))


@_handles_init(init.constant_)
def _init_constant(rec: Recorder, func: Function, tensor: torch.Tensor, val: Any) -> Any:
    if type(val) in (int, float) and rec.find(tensor) is not None and rec.fill(tensor, CONSTANT, (float(val),)):
        return tensor
    return NotImplemented


def _fan_in_and_fan_out(rec: Recorder, func: Function, tensor: torch.Tensor) -> Any:
    # Called by constructors for the bound of a bias; the shape is all that it reads.
    return func(tensor)


def _trunc_normal(
    rec: Recorder,
    func: Function,
    tensor: torch.Tensor,
    mean: float,
    std: float,
    a: float,
    b: float,
    generator: torch.Generator | None = None,
) -> Any:
    """The body of ``torch.nn.init.trunc_normal_``; where it is not ours to draw, torch's."""
    if generator is not None or not (std > 0 and a < b and math.isfinite(std) and math.isfinite(mean)):
        return NotImplemented
    if tensor.dtype not in DTYPES or tensor.device.type not in ("cpu", rec.device.type):
        return NotImplemented
    parameters = (float(mean), float(std), float(a), float(b))
    return tensor if rec.fill(tensor, TRUNCATED_NORMAL, parameters) else NotImplemented


@lru_cache(maxsize=1024)
def _kaiming_bound(shape: tuple[int, ...], a: float, mode: Any, nonlinearity: Any) -> float:
    # He et al., "Delving Deep into Rectifiers" (2015), with torch's own fans and gains.
    with _modes_off():
        fan = init._calculate_correct_fan(torch.empty(shape, device="meta"), mode)
    return math.sqrt(3.0) * (init.calculate_gain(nonlinearity, a) / math.sqrt(fan))


@lru_cache(maxsize=1024)
def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    with _modes_off():
        return _torch_fans(torch.empty(shape, device="meta"))


_torch_fans = init._calculate_fan_in_and_fan_out


@_handles_init(init.kaiming_uniform_)
def _init_kaiming_uniform(
    rec: Recorder,
    func: Function,
    tensor: torch.Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Any:
    if generator is not None:
        return NotImplemented
    shape = tensor.shape
    if 0 in shape:
        warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=4)
        return tensor
    bound = _kaiming_bound(shape, a, mode, nonlinearity)
    return _init_fill(rec, torch.Tensor.uniform_, tensor, UNIFORM, (-bound, bound))


@_handles_init(init.orthogonal_)
def _init_orthogonal(
    rec: Recorder, func: Function, tensor: torch.Tensor, gain: float = 1, generator: torch.Generator | None = None
) -> Any:
    entry = rec.find(tensor)
    if generator is not None or entry is None or len(entry.shape) < 2 or type(gain) not in (int, float):
        return NotImplemented
    if tuple(tensor.shape) != entry.shape or not rec.is_whole(entry, tensor):
        return NotImplemented
    rec.overwrite(entry, (Write(ORTHOGONAL, (float(gain), *map(float, entry.shape)), rec.next_stream()),))
    return tensor


# Replaced in torch.nn.init while a context is active (fastinit.patches). A mode would see the calls inside most of
# them, but not what trunc_normal_ means, and these are the calls of which constructors are made: going straight to the
# handler saves the dispatch through torch's overrides.
INIT_REPLACEMENTS: dict[str, Handler] = {
    **INIT_HANDLERS,
    "_calculate_fan_in_and_fan_out": _fan_in_and_fan_out,
    "_no_grad_uniform_": _init_uniform,
    "_no_grad_normal_": _init_normal,
    "_no_grad_fill_": _init_constant,
    "_no_grad_zero_": lambda rec, func, tensor: _init_constant(rec, func, tensor, 0.0),
    "_no_grad_trunc_normal_": _trunc_normal,
}


# Those that constructors call most, with the plain case in front: the whole of a tensor without memory, with numbers.
# It needs no look at the tensor itself, which would be a call of the mode. `rest` does the other cases.


def _plain_uniform(rest: Function) -> Function:
    def uniform_(tensor: torch.Tensor, a: float = 0.0, b: float = 1.0, generator: torch.Generator | None = None) -> Any:
        plain = generator is None and type(b - a) in (int, float) and 0.0 <= b - a < math.inf
        return tensor if plain and record(tensor, UNIFORM, a, b) else rest(tensor, a, b, generator)

    return uniform_


def _plain_normal(rest: Function) -> Function:
    def normal_(
        tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
    ) -> Any:
        plain = generator is None and type(mean) in (int, float) and type(std) in (int, float) and 0.0 <= std < math.inf
        return tensor if plain and record(tensor, NORMAL, mean, std) else rest(tensor, mean, std, generator)

    return normal_


def _plain_constant(rest: Function) -> Function:
    def constant_(tensor: torch.Tensor, val: Any) -> Any:
        return tensor if type(val) in (int, float) and record(tensor, CONSTANT, val) else rest(tensor, val)

    return constant_


def _plain_zero(rest: Function) -> Function:
    return lambda tensor: tensor if record(tensor, CONSTANT, 0.0) else rest(tensor)


def _plain_kaiming_uniform(rest: Function) -> Function:
    def kaiming_uniform_(
        tensor: torch.Tensor,
        a: float = 0,
        mode: str = "fan_in",
        nonlinearity: str = "leaky_relu",
        generator: torch.Generator | None = None,
    ) -> Any:
        shape = pending_shape(tensor)
        if shape is not None and generator is None:
            bound = _kaiming_bound(shape, a, mode, nonlinearity)
            if record(tensor, UNIFORM, -bound, bound):
                return tensor
        return rest(tensor, a, mode, nonlinearity, generator)

    return kaiming_uniform_


def _plain_fans(rest: Function) -> Function:
    def _calculate_fan_in_and_fan_out(tensor: torch.Tensor) -> Any:
        shape = pending_shape(tensor)
        return rest(tensor) if shape is None else _fans(shape)

    return _calculate_fan_in_and_fan_out


PLAIN_INITS: dict[str, Callable[[Function], Function]] = {
    "uniform_": _plain_uniform,
    "normal_": _plain_normal,
    "constant_": _plain_constant,
    "kaiming_uniform_": _plain_kaiming_uniform,
    "_calculate_fan_in_and_fan_out": _plain_fans,
    "_no_grad_uniform_": _plain_uniform,
    "_no_grad_normal_": _plain_normal,
    "_no_grad_fill_": _plain_constant,
    "_no_grad_zero_": _plain_zero,
}


# --- element-wise steps ---------------------------------------------------------------------------------------------

_Steps = tuple[tuple[int, float, float], ...]


def _pending(rec: Recorder, tensor: object) -> Entry | None:
    """The entry of a tensor whose whole value is a pending recipe; it may be a view, in another shape."""
    if not isinstance(tensor, torch.Tensor):
        return None
    entry = rec.find(tensor)
    return entry if entry is not None and entry.recipe and rec.is_whole(entry, tensor) else None


def _stepped(entry: Entry, steps: _Steps) -> tuple[Write, ...] | None:
    recipe: tuple[Write, ...] | None = entry.recipe
    for op, a, b in steps:
        recipe = with_step(recipe, op, a, b) if recipe is not None else None
    return recipe


def _step(names: str, steps_of: Callable[..., _Steps | None]) -> None:
    """Record `names` and its in-place twin as steps; steps_of gets the arguments behind the tensor."""

    def out_of_place(rec: Recorder, func: Function, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        entry = _pending(rec, tensor)
        if entry is None:
            return NotImplemented
        steps = steps_of(*args, **kwargs)
        recipe = None if steps is None else _stepped(entry, steps)
        if recipe is None or (torch.is_grad_enabled() and tensor.requires_grad):
            return NotImplemented
        return rec.placeholder(tuple(tensor.shape), entry.dtype, entry.device, recipe)

    def in_place(rec: Recorder, func: Function, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        entry = _pending(rec, tensor)
        if entry is None:
            return NotImplemented
        steps = steps_of(*args, **kwargs)
        recipe = None if steps is None else _stepped(entry, steps)
        if recipe is None:
            return NotImplemented
        _refuse_leaf(tensor)
        entry.recipe = recipe
        entry.filled = False
        return tensor

    for name in names.split():
        for target in _callables(name):
            HANDLERS[target] = out_of_place
        for target in _callables(f"{name}_") + _callables(f"__i{name}__"):
            HANDLERS[target] = in_place


def _scalar(op: int, sign: float = 1.0) -> Callable[..., _Steps | None]:
    def steps(*args: Any, **kwargs: Any) -> _Steps | None:
        if len(args) == 1 and not kwargs and type(args[0]) in (int, float):
            return ((op, sign * args[0], 0.0),)
        return None

    return steps


def _reversed_subtract(*args: Any, **kwargs: Any) -> _Steps | None:
    if len(args) == 1 and not kwargs and type(args[0]) in (int, float):
        return ((MULTIPLY, -1.0, 0.0), (ADD, float(args[0]), 0.0))
    return None


def _clamp(min: Any = None, max: Any = None, **kwargs: Any) -> _Steps | None:
    if kwargs or not all(value is None or type(value) in (int, float) for value in (min, max)):
        return None
    if min is None and max is None:
        return None
    return ((CLAMP, -math.inf if min is None else float(min), math.inf if max is None else float(max)),)


_step("mul multiply", _scalar(MULTIPLY))
_step("div divide true_divide truediv", _scalar(DIVIDE))
_step("add", _scalar(ADD))
_step("sub subtract", _scalar(ADD, -1.0))
_step("__rsub__", _reversed_subtract)
_step("neg negative", lambda *args, **kwargs: None if args or kwargs else ((MULTIPLY, -1.0, 0.0),))
_step("clamp clip", _clamp)
_step("clamp_min", lambda min=None, **kwargs: _clamp(min=min, **kwargs))
_step("clamp_max", lambda max=None, **kwargs: _clamp(max=max, **kwargs))
_step("erfinv", lambda *args, **kwargs: None if args or kwargs else ((ERFINV, 0.0, 0.0),))


# --- copies, views, conversions -------------------------------------------------------------------------------------


def _is_computed(rec: Recorder, tensor: torch.Tensor) -> bool:
    """Whether a tensor that torch has made is the same in an fp32 model, where it would not be in half precision.

    Positions in int64, say, or a table in fp64: what is computed of them in half precision is what the fp32 model has.
    Data in fp32 may be a checkpoint of any size, of which no copy is kept.
    """
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
        and tensor.dtype not in DTYPES
        and not tensor.dtype.is_complex
        and tensor.layout == torch.strided
        and tensor.device.type in ("cpu", rec.device.type)
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def _write_values(rec: Recorder, entry: Entry, tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Overwrite a whole tensor by fp32 values that the constructor computed."""
    if entry.dtype == torch.float32:
        rec.replace_by_real(entry)
        with torch.no_grad():
            return tensor.copy_(values)
    rec.overwrite_by_shadow(entry, values.reshape(entry.shape).clone(memory_format=torch.contiguous_format))
    return tensor


@_handles("copy_")
def _copy(rec: Recorder, func: Function, tensor: torch.Tensor, source: Any, *args: Any, **kwargs: Any) -> Any:
    entry = rec.find(tensor)
    if entry is None or not rec.is_whole(entry, tensor) or not isinstance(source, torch.Tensor):
        return NotImplemented
    origin = rec.find(source)
    _refuse_leaf(tensor)
    if origin is entry:
        return tensor if rec.is_whole(entry, source) and source.shape == tensor.shape else NotImplemented
    if origin is None:
        if entry.dtype in _HALVES and _is_computed(rec, source):
            values = source.to(entry.device, torch.float32).expand(tensor.shape)
            return _write_values(rec, entry, tensor, values)
        # Data from outside, a checkpoint say: converted while it is copied. What is pending is dropped after that, so
        # that a copy which torch refuses leaves it as it was.
        rec.give_memory(entry)
        func(tensor, source, *args, **kwargs)
        rec.replace_by_real(entry)
        return tensor
    same_values = origin.dtype in (torch.float32, entry.dtype) and origin.recipe and rec.is_whole(origin, source)
    if same_values and source.shape == tensor.shape:
        rec.overwrite(entry, origin.recipe)
        return tensor
    return NotImplemented


_load_from_state_dict = torch.nn.Module._load_from_state_dict
_set_extra_state = torch.nn.Module.set_extra_state


def load_from_state_dict(
    rec: Recorder,
    module: torch.nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    *args: Any,
) -> bool:
    """What ``Module._load_from_state_dict`` does, without a look of the recorder at each of its steps.

    It reads shapes and copies, nothing else, unless the module has hooks or extra state. Returns False, and has done
    nothing, if it may do more than that.
    """
    modes = torch._C._len_torch_function_stack()
    if (
        modes == 0
        or torch._C._get_function_stack_at(modes - 1) is not rec
        or module._load_state_dict_pre_hooks
        or type(module).set_extra_state is not _set_extra_state
        or local_metadata.get("assign_to_params_buffers")
        or torch.__future__.get_swap_module_params_on_conversion()
    ):
        return False
    with _modes_off():
        pending: list[tuple[Entry, Any]] = []
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                value = state_dict.get(prefix + name)
                if isinstance(value, torch.Tensor) and rec.find(value) is not None:
                    # Pending itself. Below, torch would copy whatever lies behind it, also into memory of others.
                    return False
                entry = None if tensor is None or value is None else rec.find(tensor)
                if entry is None:
                    continue
                if type(value) not in (torch.Tensor, torch.nn.Parameter) or not rec.is_whole(entry, tensor):
                    return False
                pending.append((entry, tensor))
        for entry, _ in pending:
            rec.make_resident(entry)
        versions = [tensor._version for _, tensor in pending]
        _load_from_state_dict(module, state_dict, prefix, local_metadata, *args)
        for (entry, tensor), version in zip(pending, versions, strict=True):
            if tensor._version != version:  # else torch has refused the copy
                rec.replace_by_real(entry)
    return True


def _clone(rec: Recorder, func: Function, tensor: torch.Tensor, **kwargs: Any) -> Any:
    entry = _pending(rec, tensor)
    if entry is None or kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    if torch.is_grad_enabled() and tensor.requires_grad:
        return NotImplemented
    return rec.placeholder(tuple(tensor.shape), entry.dtype, entry.device, entry.recipe)


for _target in _callables("clone"):
    HANDLERS[_target] = _clone


def _view(rec: Recorder, func: Function, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Views of a tensor whose values stay pending."""
    entry = rec.find(tensor) if isinstance(tensor, torch.Tensor) else None
    if entry is None:
        return NotImplemented
    if kwargs.get("memory_format") not in (None, torch.contiguous_format):
        rec.settle([entry])
        return NotImplemented
    if not (entry.allocated or entry.resident):
        views = _views_without_memory(rec, entry, func, tensor, args, kwargs)
        if views is not None:
            return views
    rec.give_memory(entry)
    result = func(tensor, *args, **kwargs)
    results = result if isinstance(result, (tuple, list)) else (result,)
    if all(_is_view_of(entry, item) for item in results):
        return result
    # A copy after all: of values that are not there yet.
    return NotImplemented


def _views_without_memory(
    rec: Recorder,
    entry: Entry,
    func: Function,
    tensor: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What a function that takes views gives, as placeholders; None if it is no such function for this tensor."""
    if func in IN_PLACE:
        return None
    offset, sizes, strides = rec.region(entry, tensor) or (0, entry.shape, contiguous_strides(entry.shape))
    stand_in = torch.empty(math.prod(entry.shape), dtype=entry.dtype, device="meta").as_strided(sizes, strides, offset)
    result = func(stand_in, *args, **kwargs)
    if result is stand_in:
        return tensor
    results = result if isinstance(result, (tuple, list)) else (result,)
    if not all(view.untyped_storage()._cdata == stand_in.untyped_storage()._cdata for view in results):
        return None
    regions = [Region(view.storage_offset(), tuple(view.size()), view.stride()) for view in results]
    if torch.is_grad_enabled() and tensor.requires_grad:
        # Views that autograd knows, of the one element that stands for the tensor; not every view can be taken of it.
        try:
            result = func(tensor, *args, **kwargs)
        except RuntimeError:
            return None
        views = [result] if isinstance(result, torch.Tensor) else list(result)
        if any(view.untyped_storage()._cdata != tensor.untyped_storage()._cdata for view in views):
            return None
        for view, region in zip(views, regions, strict=True):
            rec.stand_for(view, entry, region)
        return result
    views = [rec.view(entry, region) for region in regions]
    return views[0] if results[0] is result else type(result)(views)


def _view_as(rec: Recorder, func: Function, tensor: torch.Tensor, other: torch.Tensor) -> Any:
    """A view whose shape is that of another tensor, of which nothing else is read."""
    if rec.find(tensor) is not None:
        return _view(rec, func, tensor, other)
    return func(tensor, other)


def _is_view_of(entry: Entry, tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata == entry.storage_key


for _target in _callables(
    *"view reshape flatten unflatten t transpose swapaxes swapdims permute movedim moveaxis select "
    "narrow chunk split tensor_split unsafe_chunk unsafe_split hsplit vsplit dsplit unbind squeeze unsqueeze expand "
    "diagonal as_strided ravel unfold t_ transpose_ squeeze_ unsqueeze_ swapaxes_ swapdims_ as_strided_ "
    "adjoint contiguous".split()
):
    HANDLERS[_target] = _view
for _target in _callables("view_as", "reshape_as", "expand_as"):
    HANDLERS[_target] = _view_as
for _name in ("T", "mT", "H", "mH"):
    HANDLERS[getattr(torch.Tensor, _name).__get__] = _view


@_handles("__getitem__")
def _getitem(rec: Recorder, func: Function, tensor: torch.Tensor, index: Any) -> Any:
    return NotImplemented if _has_tensor(index) else _view(rec, func, tensor, index)


def _alias(rec: Recorder, func: Function, tensor: torch.Tensor, *args: Any) -> Any:
    """``.data`` and ``.detach()``: the whole tensor under another name, which needs no memory yet."""
    entry = rec.find(tensor)
    if entry is None:
        return NotImplemented
    alias = func(tensor, *args)
    if not entry.allocated:
        rec.stand_for(alias, entry, rec.region(entry, tensor))
    return alias


HANDLERS[torch.Tensor.data.__get__] = _alias  # type: ignore[attr-defined]
for _target in _callables("detach", "detach_"):
    HANDLERS[_target] = _alias


def _set_data(rec: Recorder, func: Function, tensor: torch.Tensor, value: torch.Tensor) -> None:
    entry = rec.find(value)
    region = None if entry is None else rec.region(entry, value)
    rec.leave(tensor)
    func(tensor, value)
    if entry is not None and not entry.allocated:
        rec.stand_for(tensor, entry, region)


HANDLERS[torch.Tensor.data.__set__] = _set_data  # type: ignore[attr-defined]


def set_memory(rec: Recorder, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``tensor.set_(source)``, by which parametrizations replace a weight, often by itself; no mode sees it."""
    source = args[0] if args else kwargs.get("source")
    if not isinstance(source, torch.Tensor) or len(args) + len(kwargs) > 1 or source.dtype != tensor.dtype:
        result: torch.Tensor = _memory_access(rec, torch._C.TensorBase.set_, tensor, *args, **kwargs)
        return result
    if source is not tensor:
        _set_data(rec, torch.Tensor.data.__set__, tensor, source)  # type: ignore[attr-defined]
    return tensor


def _convert(rec: Recorder, func: Function, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """``.to`` and its kind. Naming a dtype gives a tensor of that dtype, from the fp32 values."""
    dtype, device, copy = _conversion(func, tensor, args, kwargs)
    entry = rec.find(tensor)
    if device is not None and device.type == "cuda":
        device = _concrete(device)
    if entry is None:
        target = tensor.device if device is None else device
        if dtype in _HALVES and target.type in ("cpu", rec.device.type) and _is_computed(rec, tensor):
            return rec.wrap(tensor.to(target, torch.float32), dtype)
        if not args or not isinstance(args[0], torch.Tensor):
            # Not by way of the recorder, which takes .float() of half-precision data for a result in half precision.
            return func(tensor, *args, **kwargs)
        # By name: the tensor whose dtype and device are asked for may be one of ours.
        return tensor.to(dtype=dtype, device=device or tensor.device, copy=copy)
    if kwargs.get("memory_format") not in (None, torch.preserve_format) or (
        device is not None and device.type == "meta"
    ):
        rec.settle([entry])
        return NotImplemented
    if not copy and dtype in (None, entry.dtype) and device in (None, entry.device):
        return tensor
    if entry.dtype not in _HALVES:
        return NotImplemented
    values = rec._shadow_view(entry, tensor)
    if dtype in (None, entry.dtype):
        return rec.wrap(values.to(device=device or entry.device, copy=True), entry.dtype)
    return values.to(dtype=dtype, device=device or entry.device, copy=True)


_NAMED_CONVERSIONS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int": torch.int32,
    "long": torch.int64,
    "bool": torch.bool,
    "short": torch.int16,
    "char": torch.int8,
    "byte": torch.uint8,
}


def _conversion(
    func: Function, tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.dtype | None, torch.device | None, bool]:
    name = func.__name__
    if name in _NAMED_CONVERSIONS:
        return _NAMED_CONVERSIONS[name], None, False
    if name == "cpu":
        return None, torch.device("cpu"), False
    if name == "cuda":
        return None, torch.device("cuda", *args[:1]) if args and type(args[0]) is int else torch.device("cuda"), False
    copy = bool(kwargs.get("copy"))
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, torch.Tensor):
        return other.dtype, other.device, copy
    if name == "type":
        dtype = args[0] if args else kwargs.get("dtype")
        return dtype if isinstance(dtype, torch.dtype) else None, None, False
    options = {key: value for key, value in kwargs.items() if key not in ("copy", "other")}
    device, dtype, *_ = torch._C._nn._parse_to(*args[: 2 if len(args) > 1 else 1], **options)
    return dtype, device, copy


for _target in _callables("to", "type_as", "cpu", "cuda", *_NAMED_CONVERSIONS):
    HANDLERS[_target] = _convert


@_handles_function(torch.Tensor.type)
def _type(rec: Recorder, func: Function, tensor: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    if dtype is None:
        return func(tensor)
    if isinstance(dtype, torch.dtype):
        return _convert(rec, func, tensor, dtype)
    return _memory_access(rec, func, tensor, dtype, **kwargs)


# --- access to memory -----------------------------------------------------------------------------------------------


def _memory_access(rec: Recorder, func: Function, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Whoever asks for the address gets final values behind it."""
    entry = rec.find(tensor)
    if entry is not None:
        rec.settle([entry])
    return func(tensor, *args, **kwargs)


for _target in _callables(
    *"data_ptr untyped_storage storage _typed_storage storage_type __dlpack__ share_memory_ is_shared "
    "pin_memory is_pinned __reduce_ex__ resize_ resize_as_ record_stream is_set_to".split()
):
    HANDLERS[_target] = _memory_access


# --- random functions that torch executes ---------------------------------------------------------------------------


def _random_in_torch(rec: Recorder, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], stream: int) -> Any:
    """Run a random function with a generator of its own, seeded by key and stream, on the CPU.

    So its values depend on the key and the ordinal alone, on no device, and torch's generators stay as they are.
    """
    generator = torch.Generator("cpu").manual_seed(_mix(rec.seed, stream))
    kwargs["generator"] = generator
    target = args[0] if args and isinstance(args[0], torch.Tensor) else None
    if target is None:
        device = _concrete(kwargs.get("device") or rec.factory_device())
        if device.type == "meta":
            del kwargs["generator"]
            return _in_torch(rec, func, args, kwargs)
        kwargs["device"] = "cpu"
        return func(*args, **kwargs).to(device)
    if func in IN_PLACE:
        entry = rec.find(target)
        if entry is not None:
            view = rec._shadow_view(entry, target) if entry.dtype in _HALVES else target
            if view is target:
                rec.settle([entry])
        else:
            view = target
        if view.is_cpu:
            func(view, *args[1:], **kwargs)
        elif not view.is_meta:
            with torch.no_grad():
                view.copy_(func(view.detach().cpu(), *args[1:], **kwargs))
        return target
    return NotImplemented


def _mix(seed: int, stream: int) -> int:
    """A 64-bit seed for torch's generator from key and stream (the finaliser of SplitMix64)."""
    x = (seed + (stream + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _random(rec: Recorder, func: Function, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("generator") is not None:
        return NotImplemented
    return _random_in_torch(rec, func, args, dict(kwargs), rec.next_stream())


for _target in _callables(*"randint randperm random_ exponential_ geometric_ cauchy_ log_normal_ bernoulli_".split()):
    HANDLERS[_target] = _random


def _random_without_generator(rec: Recorder, func: Function, *args: Any, **kwargs: Any) -> Any:
    """Functions that take no generator, dropout say: torch's own is lent to them, seeded by key and stream."""
    seed = _mix(rec.seed, rec.next_stream())
    with torch.random.fork_rng([] if rec.device.type == "cpu" else [rec.device]):
        torch.default_generator.manual_seed(seed)
        if rec.device.type != "cpu":
            torch.cuda.default_generators[rec.device.index].manual_seed(seed)
        return rec.run_in_torch(func, args, kwargs)


for _name in (
    *"dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout rrelu".split(),
    *"gumbel_softmax randint_like native_dropout fractional_max_pool2d fractional_max_pool3d".split(),
):
    for _owner in (torch, torch.nn.functional):
        for _target in (getattr(_owner, _name, None), getattr(_owner, f"{_name}_", None)):
            if _target is not None:
                HANDLERS[_target] = _random_without_generator


@_handles("bernoulli", "multinomial", "poisson")
def _random_of_tensor(rec: Recorder, func: Function, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("generator") is not None or tensor.is_meta:
        return NotImplemented
    entry = rec.find(tensor)
    values = tensor
    if entry is not None:
        if entry.dtype in _HALVES:
            values = rec._shadow_view(entry, tensor)
        else:
            rec.settle([entry])
    generator = torch.Generator("cpu").manual_seed(_mix(rec.seed, rec.next_stream()))
    result = func(values.detach().cpu(), *args, **kwargs, generator=generator).to(tensor.device)
    return rec.wrap(result, tensor.dtype) if values is not tensor and result.dtype == torch.float32 else result


@_handles_function(torch.normal)
def _torch_normal(rec: Recorder, func: Function, mean: Any, std: Any = None, size: Any = None, **kwargs: Any) -> Any:
    if type(mean) in (int, float) and type(std) in (int, float) and size is not None:
        return _random_factory(NORMAL, (float(mean), float(std)))(rec, _SizedNormal(mean, std), size, **kwargs)
    if kwargs.get("generator") is not None or kwargs.get("out") is not None:
        return NotImplemented
    like = mean if isinstance(mean, torch.Tensor) else std
    shape = torch.broadcast_shapes(*(tuple(x.shape) for x in (mean, std) if isinstance(x, torch.Tensor)))
    noise = _create(rec, tuple(shape), {}, (Write(NORMAL, (0.0, 1.0), rec.next_stream()),), like=like)
    if noise is NotImplemented:
        return NotImplemented
    scaled = rec.run_in_torch(torch.mul, (noise, 1.0 if std is None else std), {})
    return rec.run_in_torch(torch.add, (scaled, mean), {})


class _SizedNormal:
    """torch.normal(mean, std, size) as a function of the size alone."""

    def __init__(self, mean: float, std: float) -> None:
        self._parameters = (mean, std)

    def __call__(self, size: Any, **kwargs: Any) -> torch.Tensor:
        return torch.normal(*self._parameters, size, **kwargs)


# --- functions that must see the tensor itself ----------------------------------------------------------------------


@_handles_function(torch.linalg.qr)
def _qr(rec: Recorder, func: Function, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """QR on the CPU, whatever the device: the factorisations of LAPACK and cuSOLVER differ in their last bits."""
    if tensor.is_cpu or kwargs.get("out") is not None:
        return NotImplemented
    device = tensor.device
    entry = rec.find(tensor)
    if entry is None:
        return NotImplemented
    half = entry.dtype if entry.dtype in _HALVES else None
    if half is None:
        rec.settle([entry])
    values = tensor if half is None else rec._shadow_view(entry, tensor)
    factors = [factor.to(device) for factor in func(values.cpu(), *args, **kwargs)]
    return type(func(torch.eye(1)))([rec.wrap(factor, half) if half else factor for factor in factors])


HANDLERS[torch.qr] = _qr


def _is_in_place(name: str) -> bool:
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__index__", "__int__", "__invert__", "__init__")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


IN_PLACE = {
    target
    for owner in (torch.Tensor, torch, torch.nn.functional, init)
    for name in dir(owner)
    if _is_in_place(name) and callable(target := getattr(owner, name, None))
}

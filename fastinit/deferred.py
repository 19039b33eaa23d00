"""Recipes that outlive their context: which tensors ``empty=True`` left unwritten, and how they are written later.

A module keeps its recipes in an attribute, by the name of the parameter or buffer, so that they survive whatever
replaces the tensor, and are copied with the module. That nothing has written a tensor is read from the tensor itself: a
*mark* lies in a few of its elements, spread over its length, and whoever writes the tensor, by whichever path, writes
over it. Before a module is used for the first time a hook looks for marks in it; if there are none, every trace of this
is removed from the model, and the hook with the last model that has any.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .execution import DTYPES, Fills, can_fill, refuse_capture
from .layout import Box, Window, numel
from .native import CONSTANT
from .recipe import Region, Write
from .sharding import is_dtensor, local_boxes, local_tensor

_modes_off = torch._C.DisableTorchFunction

_ATTRIBUTE = "_fastinit"

# Exact in fp32, fp16 and bf16, so that conversions keep it, and far from any weight.
MARK = -65280.0
_MARKS = 4

_NAMES_IN_ERRORS = 20


class Deferred(NamedTuple):
    """What one tensor would have been filled with, and the mark that says that it was not; None: it was, or is on meta.

    The device is the one that the context created models on; seed_agreed says that all ranks have the same seed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    recipe: tuple[Write, ...]
    mark: float | None
    device: torch.device
    seed_agreed: bool
    marked_as_shard: bool = False  # the mark was put into this rank's part, and not before there were parts


class Kept:
    """The deferred tensors of one module, by the name of the parameter or buffer."""

    def __init__(self, module: nn.Module, tensors: dict[str, Deferred]) -> None:
        self.module = weakref.ref(module)
        self.tensors = tensors
        _watch(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        module = self.module()
        copied = memo.get(id(module))
        return Kept(copied, dict(self.tensors)) if isinstance(copied, nn.Module) else self

    def __reduce__(self) -> tuple[Any, ...]:
        # A model that has all its values is pickled without a trace of fastinit.
        unwritten = self.unwritten()
        if not unwritten:
            return dict, ()
        return _unpickled, (), (self.module(), unwritten)

    def __setstate__(self, state: tuple[nn.Module, dict[str, Deferred]]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def unwritten(self) -> dict[str, Deferred]:
        """Those that nothing has written, or not whole."""
        module = self.module()
        if module is None:
            return {}
        named = [(name, *found) for name, d in self.tensors.items() if (found := _found(module, name, d))]
        return {name: d for (name, _, d), marks in zip(named, _marks_left(named), strict=True) if marks}


def _unpickled() -> Kept:
    return Kept.__new__(Kept)


# --- what the recorder leaves here ----------------------------------------------------------------------------------


def keep(module: nn.Module, name: str, deferred: Deferred) -> None:
    """Let a module keep the recipe of one of its tensors."""
    kept = module.__dict__.get(_ATTRIBUTE)
    if kept is None:
        module.__dict__[_ATTRIBUTE] = Kept(module, {name: deferred})
    else:
        kept.tensors[name] = deferred


def kept_for(module: nn.Module, name: str) -> Deferred | None:
    """The recipe that a module keeps for one of its tensors."""
    kept = module.__dict__.get(_ATTRIBUTE)
    return kept.tensors.get(name) if kept else None


def replace_seeds(seeds: dict[int, int]) -> None:
    """Put the seeds that all ranks have agreed on in place of this rank's, in every model that has any of them."""
    for kept in list(_watched):
        for name, deferred in kept.tensors.items():
            if not deferred.seed_agreed and deferred.seed in seeds:
                kept.tensors[name] = deferred._replace(seed=seeds[deferred.seed], seed_agreed=True)


def mark_recipe(shape: tuple[int, ...], mark: float) -> tuple[Write, ...]:
    """The fill that marks an unwritten tensor: NaN is put everywhere, any other mark in a few places."""
    if mark != mark:
        return (Write(CONSTANT, (mark,)),)
    count, step = _places(numel(shape))
    return (Write(CONSTANT, (mark,), region=Region(0, (count,), (step,))),)


def _places(elements: int) -> tuple[int, int]:
    """Number and distance of the marks: the first element, and one in each third of the rest."""
    return min(_MARKS, elements), max((elements - 1) // (_MARKS - 1), 1)


# --- what users ask -------------------------------------------------------------------------------------------------


def uninitialized(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that ``fastinit.on(..., empty=True)`` created and nothing has written since.

    Whoever writes a tensor whole makes it initialised: ``load_state_dict``, ``safetensors.torch.load_model``,
    ``torch.distributed.checkpoint``, an assignment or any operation in place. One that was written in part is listed.

    Args:
        model: a module; it may be a part of the one that was created, or contain it.

    Returns:
        Full names as ``model.named_parameters()`` and ``named_buffers()`` give them, tied tensors once. Nothing for a
        model that was created in another way, or has been used: its first forward checks this too.

    Example:
        >>> with fastinit.on("cpu", empty=True):
        ...     model = torch.nn.Linear(2, 2)
        >>> model.load_state_dict({"bias": torch.zeros(2)}, strict=False).missing_keys
        ['weight']
        >>> fastinit.uninitialized(model)
        ['weight']
    """
    with _modes_off():
        named = list(once(deferred_tensors(model)))
        return [name for (name, *_), marks in zip(named, _marks_left(named), strict=True) if marks]


def initialize(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Run the recorded initialisation of tensors that ``fastinit.on(..., empty=True)`` created.

    They get the bits that they would have had without ``empty``, in the dtype and on the device that they have now.

    Args:
        model: a module; it may be a part of the one that was created, or contain it.
        names: full names of parameters and buffers, for instance the ``missing_keys`` that ``load_state_dict`` returns.
            Those named are written even if something else has written them meanwhile; those whose values the
            constructor computed have had them from the start, and are left alone. None: all that are unwritten.

    Returns:
        The names of the tensors that were written, tied tensors once.

    Raises:
        ValueError: for a name that the model does not have, or a tensor whose shape is no longer the recorded one.
        RuntimeError: for a tensor that was written in part, if no names are given: it would lose what it has. For one
            that Accelerate has offloaded to disk. While a CUDA graph is being captured.

    Example:
        >>> with fastinit.on("cpu", empty=True, seed=0):
        ...     model = torch.nn.Linear(2, 2)
        >>> fastinit.initialize(model)
        ['weight', 'bias']
    """
    with _modes_off():
        deferred = list(deferred_tensors(model))
        for device in {tensor.device for _, tensor, _ in deferred}:
            refuse_capture(device)
        if names is None:
            chosen = list(once(deferred))
            marks = _marks_left(chosen)
            _refuse_partly_written([name for (name, *_), left in zip(chosen, marks, strict=True) if 0 < left < 1])
            chosen = [each for each, left in zip(chosen, marks, strict=True) if left]
        else:
            if isinstance(names, str):
                names = [names]
            by_name = {each[0]: each for each in deferred}
            wanted = list(names)
            _refuse_unknown(model, [name for name in wanted if name not in by_name])
            chosen = list(once(by_name[name] for name in wanted if name in by_name))
        _refuse_marked_before_sharding(chosen if names is None else [])
        _refuse_copies(model, chosen)
        pieces = [_piece(*each) for each in chosen]
        warn_about_empty_recipes(chosen)
        write_pieces(pieces)
        return [name for name, _, _ in chosen]


def forget(model: nn.Module, *, recurse: bool = True) -> None:
    """Remove every trace of deferred initialisation from a model, without a look at its tensors."""
    for module in model.modules() if recurse else (model,):
        module.__dict__.pop(_ATTRIBUTE, None)
    _watch_no_more()


def warn_never_initialised(what: str, shape: tuple[int, ...]) -> None:
    """Say that a tensor, of a module as a rule, is one that the constructor does not initialise."""
    warnings.warn(
        f"fastinit: {what} of shape {tuple(shape)} is never initialised by its module; it was filled with "
        "zeros instead of being left as raw memory. Initialise it in the constructor, or load a checkpoint that "
        "supplies it inside the context.",
        stacklevel=3,
    )


def warn_about_empty_recipes(named: Iterable[Named]) -> None:
    for name, _, deferred in named:
        if not deferred.recipe:
            warn_never_initialised(name if "." in name else f"model.{name}", deferred.shape)


Named = tuple[str, torch.Tensor, Deferred]


def deferred_tensors(model: nn.Module) -> Iterator[Named]:
    """Full name, tensor and recipe of all that a model's modules keep, tied ones under each of their names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = module.__dict__.get(_ATTRIBUTE)
        for name, deferred in kept.tensors.items() if kept else ():
            found = _found(module, name, deferred)
            if found is not None:
                yield f"{prefix}.{name}" if prefix else name, *found


def _found(module: nn.Module, name: str, deferred: Deferred) -> tuple[torch.Tensor, Deferred] | None:
    tensor: Any = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers.get(name)
    if tensor is None and "parametrizations" in module._modules:
        # torch.nn.utils.parametrize moves a tensor there when it is asked to compute with it.
        tensor = getattr(getattr(module._modules["parametrizations"], name, None), "original", None)
    if tensor is not None and tensor.is_meta:
        tensor = _offloaded(module, name, tensor)
    return None if tensor is None else (tensor, deferred)


def _offloaded(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Where Accelerate keeps the values of a tensor that it has offloaded, or a copy if that is a file."""
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        values = getattr(each, "weights_map", None)
        if values is not None and name in values:
            offloaded: torch.Tensor = values[name]
            return offloaded
    return tensor


def once(named: Iterable[Named]) -> Iterator[Named]:
    seen = set()
    for each in named:
        if id(each[1]) not in seen:
            seen.add(id(each[1]))
            yield each


def _marks_left(named: list[Named]) -> list[float]:
    """For each tensor the part of its marks that nothing has written over, from 0 to 1; one transfer per device."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    left = [0.0] * len(named)
    for index, (_, tensor, deferred) in enumerate(named):
        if is_dtensor(tensor):
            left[index] = _has_mark(local_tensor(tensor), deferred.mark)
        elif tensor.is_meta:
            left[index] = 1.0
        # A tensor of another size or kind, a quantised one say, is not the one that was created.
        elif deferred.mark is not None and _is_ordinary(tensor) and tensor.numel() == numel(deferred.shape):
            elements = _marked_elements(tensor.detach())
            elements = elements if elements.dtype == torch.float64 else elements.float()
            groups.setdefault((tensor.device, elements.dtype), []).append((index, elements))
    for group in groups.values():
        values = iter(torch.cat([elements for _, elements in group]).tolist())
        for index, elements in group:
            mark = named[index][2].mark
            found = [next(values) for _ in range(elements.numel())]
            left[index] = sum(value == mark or value != value != mark != mark for value in found) / len(found)
    return left


def is_on_meta(tensor: torch.Tensor) -> bool:
    """Whether a tensor, or this rank's shard of it, has no memory yet."""
    return local_tensor(tensor).is_meta if is_dtensor(tensor) else tensor.is_meta


def _has_mark(local: torch.Tensor, mark: float | None) -> float:
    """The same for a shard, which may have been marked before it was cut: then there is no telling where."""
    if local.is_meta:
        return 1.0
    if mark is None or not local.is_floating_point() or not local.numel():
        return 0.0
    return float((local.isnan() if mark != mark else local == mark).any())


def _is_ordinary(tensor: torch.Tensor) -> bool:
    return (
        tensor.is_floating_point()
        and tensor.layout == torch.strided
        and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )


def _marked_elements(tensor: torch.Tensor) -> torch.Tensor:
    count, step = _places(tensor.numel())
    if tensor.is_contiguous():
        return tensor.as_strided((count,), (step,), tensor.storage_offset())
    places = torch.unravel_index(torch.arange(0, count * step, step, device=tensor.device), tensor.shape)
    return tensor[places]


class Piece(NamedTuple):
    """Memory to write, and which elements of a tensor lie in it; boxes None: all of them, in the tensor's shape."""

    memory: torch.Tensor
    deferred: Deferred
    boxes: list[Box] | None


def _piece(name: str, tensor: torch.Tensor, deferred: Deferred) -> Piece:
    """Where a tensor, or this rank's shard of it, has to be written."""
    if tuple(tensor.shape) != deferred.shape:
        raise ValueError(
            f"fastinit: {name!r} has shape {tuple(tensor.shape)}, but was created with shape {deferred.shape}; "
            "initialise it before it is changed, or write it yourself"
        )
    if is_dtensor(tensor):
        piece = Piece(local_tensor(tensor), deferred, local_boxes(tensor))
    else:
        piece = Piece(tensor.detach(), deferred, None)
    if piece.memory.is_meta:
        raise ValueError(f"fastinit: {name!r} is on the meta device; use fastinit.materialize(model)")
    return piece


def write_pieces(pieces: Iterable[Piece], *, zeros: bool = True) -> None:
    """Give memory the values that recipes have for it, all of it together, rounded once to its dtype.

    With zeros=False, what a recipe leaves out is left as it is.
    """
    fills: dict[tuple[int, torch.device], Fills] = {}
    copies = []
    for target, deferred, boxes in pieces:
        memory = target
        if not can_fill(target.dtype, target.device):
            dtype = target.dtype if target.dtype in DTYPES else torch.float32
            device = target.device if can_fill(dtype, target.device) else torch.device("cpu")
            memory = torch.empty_strided(target.shape, target.stride(), dtype=dtype, device=device)
            copies.append((target, memory))
        if boxes is None and not memory.is_contiguous():
            boxes = [Window(deferred.shape, (0,) * memory.dim()).box(memory.shape, memory.stride())]
        each = fills.setdefault((deferred.seed, memory.device), Fills(deferred.seed, memory.device))
        each.write(memory, deferred.recipe, boxes, zeros=zeros)
        torch.autograd.graph.increment_version(target)
    for each in fills.values():
        each.run()
    for target, memory in copies:
        target.copy_(memory)


def _refuse_unknown(model: nn.Module, names: list[str]) -> None:
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"fastinit.initialize: names={_listed(unknown)} are not parameters or buffers of this "
            f"{type(model).__name__}; use the names of named_parameters() and named_buffers()"
        )


def _refuse_marked_before_sharding(named: Iterable[Named]) -> None:
    """A shard may have got none of the marks: a rank cannot tell that it is unwritten, and would leave it so."""
    names = [name for name, tensor, deferred in named if is_dtensor(tensor) and not deferred.marked_as_shard]
    if names:
        raise RuntimeError(
            f"fastinit: {_listed(names)} were created with empty=True and sharded afterwards, so that no rank can tell "
            "which are unwritten. Name those to write: fastinit.initialize(model, names); the next time, create the "
            "model with shard=True"
        )


def _refuse_copies(model: nn.Module, named: Iterable[Named]) -> None:
    kept = {name: tensor for name, tensor, _ in deferred_tensors(model)}
    names = [name for name, tensor, _ in named if kept[name] is not tensor]
    if names:
        raise RuntimeError(
            f"fastinit: {_listed(names)} are offloaded to disk, where they cannot be written; initialise the model "
            "before: accelerate.load_checkpoint_in_model, then fastinit.initialize, then accelerate.dispatch_model"
        )


def _refuse_partly_written(names: list[str]) -> None:
    if names:
        raise RuntimeError(
            f"fastinit: {_listed(names)} were created with empty=True and written only in part. Write them whole, or "
            "have their recorded initialisation overwrite what they have: fastinit.initialize(model, names=[...]); "
            "the next time, initialise before you write a part"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_IN_ERRORS} more" if len(names) > _NAMES_IN_ERRORS else ""
    return ", ".join(names[:_NAMES_IN_ERRORS]) + more


# --- the first use --------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_watched: weakref.WeakSet[Kept] = weakref.WeakSet()
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_hook: Any = None


def _watch(kept: Kept) -> None:
    global _hook
    with _lock:
        _watched.add(kept)
        if _hook is None:
            _hook = register_module_forward_pre_hook(_before_use)


def _watch_no_more() -> None:
    """Remove the hook if no model is left that it has to look at."""
    global _hook
    if torch._guards.TracingContext.try_get() is not None:
        return  # torch.compile is tracing the hook; the next module that is called will remove it
    with _lock:
        if _hook is not None and not _watched:
            _hook.remove()
            _hook = None
            _checked.clear()


def never_compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Have torch.compile run a function of ours as it is, whether it traces the call or is handed its frame."""
    # What torch.compiler.disable amounts to here, without the import of torch._dynamo, which takes seconds.
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):
        function._dynamo_marked_constant = True  # type: ignore[attr-defined]
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    else:  # torch 2.6, whose constant functions take no modules: its graph breaks here instead
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        frames.skip_code(function.__code__)  # type: ignore[attr-defined,unused-ignore]
    return function


@never_compiled
def _before_use(module: nn.Module, args: Any) -> None:
    _check(module)


@never_compiled
def _check(module: nn.Module) -> None:
    if not _watched:
        _watch_no_more()
    elif module not in _checked and not _not_a_real_use():
        # torch.jit.trace must not see what happens here.
        tracing = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            with _modes_off():
                _refuse_unwritten(module)
        finally:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


def _refuse_unwritten(module: nn.Module) -> None:
    named = list(once(deferred_tensors(module)))
    if any(is_on_meta(tensor) for _, tensor, _ in named):
        return  # on purpose: torch refuses what needs values
    marks = _marks_left(named)
    unwritten = [name for (name, *_), left in zip(named, marks, strict=True) if left == 1]
    if unwritten:
        raise RuntimeError(
            f"fastinit: {_listed(unwritten)} of this {type(module).__name__} were created with empty=True, and nothing "
            "has written them since. Load a checkpoint that supplies them, or call fastinit.initialize(model)"
        )
    _refuse_partly_written([name for (name, *_), left in zip(named, marks, strict=True) if left])
    if named and _is_functional_call():
        return  # with tensors of the caller's: nothing is known of the model's own
    _checked.update(module.modules())
    forget(module)
    if named:
        # Copies that are never called, moving averages say, need not keep the hook alive.
        for owner in [owner for kept in _watched if (owner := kept.module()) is not None and not kept.unwritten()]:
            owner.__dict__.pop(_ATTRIBUTE, None)
        _watch_no_more()


def _is_functional_call() -> bool:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.nn.utils.stateless._functional_call.__code__:
            return True
        frame = frame.f_back
    return False


def _not_a_real_use() -> bool:
    """Whether tensors have no values to look at now: fake ones, function transforms, a graph that is being captured."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )

"""Placeholders: tensors without storage, and how they become real.

A *placeholder* is a tensor of the final shape, strides, dtype and device that has no storage and points at a record and
at a *region* of it. Whatever torch does with a placeholder reaches `Placeholder.__torch_dispatch__`, from any thread,
mode or C++ code, so that nobody can read memory which nobody wrote.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .. import native
from ..execution import allocate
from ..recipe import COPIED, Region
from . import fast
from .graphs import Edge, edge_of, is_leaf, viewed_in_graph, with_graph_of
from .records import Record, alone, is_in_order, lock, modes_off, view_of
from .storageless import deep_copy, swap_impl, without_storage


class Placeholder(torch.Tensor):
    """A tensor without storage that stands for a region of a record; see the module's docstring.

    Defined here is what reaches a tensor below torch's dispatcher. An object changes its class when it becomes real, so
    that this class must not add fields to Tensor's.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _record: Record
    _region: Region | None

    _is_param: bool = False  # what torch asks for an nn.Parameter that is of another class

    # What an operator does to placeholders: fastinit.record.dispatch, which is above this module, puts it here.
    dispatch: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """What ``type(tensor)(...)`` means: a parameter if a tensor is given, else what torch.Tensor makes."""
        if args and isinstance(args[0], torch.Tensor):
            return torch.nn.Parameter(args[0], kwargs.get("requires_grad", True))
        return torch.Tensor(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # C++ code calls from inside of any mode, and what is done here is no affair of theirs.
        with lock, modes_off():
            return Placeholder.dispatch(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        with alone():
            if not self.is_leaf:
                become_real(self)
                return copy.deepcopy(self, memo)  # torch's refusal
            if self._is_param:  # of which torch copies the data alone
                if id(self) not in memo:
                    memo[id(self)] = torch.nn.Parameter(self.data.clone(), self.requires_grad)
                return memo[id(self)]  # type: ignore[no-any-return]
            return deep_copy(self, memo, stand_for)

    @property
    def data(self) -> torch.Tensor:
        with modes_off(), lock:
            if type(self) is not Placeholder:  # while this thread waited for the lock, another one has made it real
                return _torch_data.__get__(self)  # type: ignore[no-any-return]
            return stand_for(self._record, self._region)  # with versions of its own

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        with modes_off(), lock:
            set_data(self, value)

    @data.deleter
    def data(self) -> None:
        with modes_off():
            _torch_data.__delete__(self)  # torch's refusal

    @property
    def grad(self) -> torch.Tensor | None:
        with modes_off():
            gradient: torch.Tensor | None = _torch_grad.__get__(self)
            return gradient

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        with modes_off():
            if isinstance(value, Placeholder):
                become_real(value)  # the engine adds to the gradient that it finds
            _torch_grad.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        with modes_off():
            _torch_grad.__delete__(self)

    def register_hook(self, hook: Callable[[torch.Tensor], Any]) -> Any:
        if not is_leaf(self):  # torch keeps the hook with the node, of which there will be another one
            become_real(self)
        return torch.Tensor.register_hook(self, hook)  # type: ignore[no-untyped-call]

    def tolist(self) -> Any:
        with alone():
            return view_of(self._record.compute(), self._region).tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with alone():
            values = view_of(self._record.compute(), self._region).to(self.device, self.dtype)
            values.requires_grad_(self.requires_grad)
            return repr(torch.nn.Parameter(values, self.requires_grad) if self._is_param else values)

    def __format__(self, specification: str) -> str:
        return format(self.item(), specification) if self.dim() == 0 else object.__format__(self, specification)

    @property
    def __cuda_array_interface__(self) -> Any:
        become_real(self)
        return self.__cuda_array_interface__

    def set_(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        source = args[0] if args else kwargs.get("source")
        with modes_off(), lock:
            plain = len(args) + len(kwargs) == 1 and not (torch.is_grad_enabled() and self.requires_grad)
            if plain and isinstance(source, torch.Tensor) and source.dtype == self.dtype:
                if source is not self:
                    set_data(self, source)
                torch.autograd.graph.increment_version(self)
                return self
            become_real(self)
            result: torch.Tensor = torch._C.TensorBase.set_(self, *args, **kwargs)
            return result


# What Python's and torch's errors call it: the class that it stands for.
Placeholder.__name__ = "Tensor"

_torch_grad: Any = torch.Tensor.grad
_torch_data: Any = torch.Tensor.data


def _real_first(name: str) -> Callable[..., Any]:
    def method(self: Placeholder, *args: Any, **kwargs: Any) -> Any:
        become_real(self)
        return getattr(self, name)(*args, **kwargs)

    return method


# Methods that no dispatcher sees, or only after an address was taken: they find a tensor with memory and values.
for _name in (
    *"__array__ __dlpack__ __dlpack_device__ __reduce_ex__ as_subclass backward data_ptr".split(),
    *"detach_ is_pinned is_set_to is_shared numpy pin_memory record_stream resize_ resize_as_ retain_grad".split(),
    *"share_memory_ storage storage_type untyped_storage _typed_storage".split(),
):
    setattr(Placeholder, _name, _real_first(_name))


def _number(name: str) -> Callable[[Placeholder], Any]:
    usual = getattr(torch.Tensor, name)

    def method(self: Placeholder) -> Any:
        # C++ that makes a tensor of a list asks its elements with the way to __torch_dispatch__ barred.
        if not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python):
            return usual(self)
        with alone():
            return usual(view_of(self._record.compute(), self._region))

    return method


for _name in "__bool__ __complex__ __float__ __index__ __int__".split():
    setattr(Placeholder, _name, _number(_name))


def stand_for(record: Record, region: Region | None = None) -> Placeholder:
    """A new placeholder for a record, or for a region of it."""
    if torch.is_inference_mode_enabled():
        # An inference tensor is of no use outside of that mode; a model's should be, whenever it was made.
        with torch.inference_mode(False):
            return stand_for(record, region)
    if region is None and fast.in_use:
        tensor: Placeholder = native.new_placeholder(record)
        return tensor
    return _standing(without_storage(Placeholder, record, region, record.nbytes), record, region)


def _standing(tensor: Placeholder, record: Record, region: Region | None) -> Placeholder:
    tensor._record, tensor._region = record, region
    record.tensors.append(weakref.ref(tensor))
    return tensor


# While it is entered, torch does to placeholders what it does to tensors with memory. That is right for what gives
# views and aliases, which read none: versions, bases and sizes are torch's own.
_undispatched: Any = torch._C._DisableTorchDispatch

_make_subclass: Any = torch._C.TensorBase._make_subclass


def alias_of(tensor: Placeholder, requires_grad: bool = False) -> Placeholder:
    """What ``tensor.detach()`` gives: another placeholder of the same region, with the same versions."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return alias_of(tensor, requires_grad)
    with _undispatched():
        return _standing(_make_subclass(Placeholder, tensor, requires_grad), tensor._record, tensor._region)


def views_of(tensor: Placeholder, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function that takes views gives, as placeholders of the same record; None if they show other values."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return views_of(tensor, function, *args, **kwargs)
    record = tensor._record
    with _undispatched():
        taken = function(tensor, *args, **kwargs)
        views = [taken] if isinstance(taken, torch.Tensor) else list(taken)
        if any(each.dtype != record.dtype or each.is_conj() or each.is_neg() for each in views):
            return None
        base = _base.__get__(tensor) if _is_view(tensor) else None
        for i, each in enumerate(views):
            if type(base) is Placeholder and base._record is record and _is_view(each):
                # In one step from the base: torch keeps a function for each step to a view of a subclass.
                meta = torch._C._autograd._get_creation_meta(each)
                each = torch.Tensor.as_strided(base, each.size(), each.stride(), each.storage_offset())
                torch._C._autograd._set_creation_meta(each, meta)
            if each.numel():
                views[i] = _standing(torch.Tensor.as_subclass(each, Placeholder), record, region_of(each))
            else:
                views[i] = torch.empty_strided(each.shape, each.stride(), dtype=record.dtype, device=record.device)
    return views[0] if isinstance(taken, torch.Tensor) else type(taken)(views)


def change_geometry(tensor: Placeholder, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Placeholder:
    """Let a function give a placeholder other sizes or strides."""
    with _undispatched():
        function(tensor, *args, **kwargs)
        tensor._region = region_of(tensor)
    return tensor


def region_of(view: torch.Tensor) -> Region:
    """The elements of its storage that a tensor shows."""
    # By torch's own method: those of placeholders say what their region is.
    return Region(int(view.storage_offset()), tuple(torch.Tensor.size(view)), view.stride())


def has_master(tensor: torch.Tensor) -> bool:
    """Whether torch computes with other values of a tensor than those in its final memory."""
    return type(tensor) is Placeholder and tensor._record.needs_master and tensor._record.memory is None


# --- becoming real --------------------------------------------------------------------------------------------------


def become_real(tensor: torch.Tensor) -> None:
    """Make a placeholder an ordinary tensor with memory and values; it stays the same object."""
    if type(tensor) is not Placeholder:
        return
    with alone():
        if type(tensor) is Placeholder:  # no other thread has done it meanwhile
            record = tensor._record
            record.materialize()
            take_record_memory(record, [tensor])
            record.block.keep_history(tensor, record.executed or (), record.replaced or ())


def use_values(tensor: torch.Tensor) -> None:
    """Make a placeholder real that autograd may record; in half precision or for a GPU, master values are."""
    if not has_master(tensor):
        become_real(tensor)
    elif isinstance(tensor, Placeholder) and tensor._record.block.rename is not None:
        # Which values a name decides must not depend on the precision.
        with alone():
            tensor._record.compute()


def before_graph(tensors: list[torch.Tensor]) -> None:
    """Prepare tensors for what autograd may record of them."""
    if any(each.requires_grad for each in tensors):
        for each in tensors:  # those without gradient, too: one that is written in place gets a node
            use_values(each)


def new_memory(tensor: Placeholder) -> torch.Tensor | None:
    """Memory for a placeholder that somebody is about to write whole, by other means than torch's operators.

    The placeholder is what it was until `take_memory`. None if it has memory, or does not stand for all of a record in
    its order.
    """
    with lock, modes_off():
        record = tensor._record
        if record.memory is not None or not is_in_order(record, tensor._region):
            return None
        record.block.reserve_for_all(record.device)
        return allocate(record.shape, record.dtype, record.device, name_of=lambda: record.block.name_of(record))


def take_memory(tensor: Placeholder, memory: torch.Tensor) -> None:
    """Let a placeholder have `new_memory` of it, which has been written: what was recorded is dropped."""
    with lock:
        tensor._record.overwrite(())
        tensor._record.become_resident(memory)
        tensor._record.did(COPIED)


def take_record_memory(record: Record, wanted: list[Placeholder]) -> None:
    """Let placeholders have the memory of their record, and those that are their views be views of what they are then.

    A view becomes real together with the tensor that it is a view of: torch's graphs lead to that one's new C++ object.
    """
    assert record.memory is not None
    everyone = wanted if len(record.tensors) == 1 else record.placeholders()
    views: dict[int, list[Placeholder]] = {}  # by the id of what they are views of
    for each in everyone:
        if _is_view(each):
            views.setdefault(id(_base.__get__(each)), []).append(each)
    edges: dict[Edge, torch.Tensor] = {edge_of(each): each for each in everyone if not is_leaf(each)}
    for tensor in wanted:
        if type(tensor) is not Placeholder:
            continue
        base = _base.__get__(tensor) if _is_view(tensor) else None
        if type(base) is Placeholder and base._record is record:
            tensor = base
        related = [each for each in views.get(id(tensor), ()) if type(each) is Placeholder]
        metas = [torch._C._autograd._get_creation_meta(each) for each in related]
        viewed = [tensor if is_leaf(each) else viewed_in_graph(each, tensor, edges) for each in related]
        swap_in(tensor, view_of(record.memory, tensor._region))
        for each, of, meta in zip(related, viewed, metas, strict=True):
            swap_in(each, view_of(record.memory, each._region), viewed=of, meta=meta)
    # torch.utils.swap_tensors refuses what has weak references.
    record.tensors = [ref for ref in record.tensors if type(ref()) is Placeholder]


_base: Any = torch._C.TensorBase._base
_is_view: Any = torch.Tensor._is_view


def swap_in(tensor: Any, memory: torch.Tensor, *, viewed: torch.Tensor | None = None, meta: Any = None) -> None:
    """Let a tensor without storage have memory: torch's hooks, gradient and graph stay with it.

    Args:
        tensor: the tensor, a placeholder or one that a block left unwritten.
        memory: a tensor over that memory, of its shape and strides.
        viewed: the tensor of which it is to be a view, over the same memory.
        meta: torch's word for how that view was made.
    """
    kind, record, region = type(tensor), tensor._record, tensor._region
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            swap_in(tensor, memory, viewed=viewed, meta=meta)
        return
    requires_grad = tensor.requires_grad
    # A view of something that requires a gradient does so, too; torch accumulates none for it.
    inherits = requires_grad and _is_view(tensor) and _base.__get__(tensor).requires_grad
    graph = requires_grad and not is_leaf(tensor)
    if graph and (meta not in _KNOWN_VIEWS or tensor._backward_hooks):
        viewed = None
    if viewed is None:
        real = _with_versions_of(tensor, memory) if kind is Placeholder else memory.detach()
    else:
        with torch.set_grad_enabled(graph):
            real = viewed.as_strided(memory.size(), memory.stride(), memory.storage_offset())
        torch._C._autograd._set_creation_meta(real, meta)
    hooks = post = grad = None
    if requires_grad and not graph:
        if not inherits or viewed is None:
            real.requires_grad_()
        hooks, post = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
        grad = None if _is_view(tensor) else tensor.grad
        if grad is not None:
            become_real(grad)
    elif graph and viewed is None:
        real = with_graph_of(tensor, real)
    attributes = tensor.__dict__
    del attributes["_record"], attributes["_region"]
    is_parameter = attributes.pop("_is_param", False)
    swap_impl(tensor, real)
    tensor.__class__ = torch.nn.Parameter if is_parameter else torch.Tensor
    if hooks is not None:
        tensor._backward_hooks = hooks
    if post is not None:
        tensor._post_accumulate_grad_hooks = post
    if grad is not None:
        tensor.grad = grad
    if real._use_count() > 1:  # type: ignore[attr-defined]
        accumulates = requires_grad and not inherits and tensor.is_leaf
        _leave_behind(real, record, region, tensor if accumulates else None, kind)


def _with_versions_of(tensor: Placeholder, memory: torch.Tensor) -> torch.Tensor:
    """A tensor over memory that shares its versions with a placeholder: graphs that have saved that look at them."""
    with _undispatched():
        real: torch.Tensor = _make_subclass(torch.Tensor, tensor, False)
    real.data = memory
    return real


# Views in a graph that are nothing but that: torch has made them itself, and of the tensor as it was.
_KNOWN_VIEWS = (torch._C._autograd.CreationMeta.DEFAULT, torch._C._autograd.CreationMeta.MULTI_OUTPUT_NODE)


def _leave_behind(
    old: Any,
    record: Any,
    region: Region | None,
    leaf: torch.Tensor | None,
    kind: type[torch.Tensor],
) -> None:
    """What a C++ object still holds of a tensor that has become real: it stays of its kind, over the same memory."""
    old.__class__ = kind
    old._record, old._region = record, region
    if leaf is None:
        return
    old.requires_grad_()

    def pass_on(accumulated: torch.Tensor) -> None:
        gradient, accumulated.grad = accumulated.grad, None
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            for hook in (leaf._post_accumulate_grad_hooks or {}).values():
                hook(leaf)

    old.register_post_accumulate_grad_hook(pass_on)


def set_data(tensor: Placeholder, value: torch.Tensor) -> None:
    """``tensor.data = value``: the tensor is about the other one's content from here on."""
    if type(value) is not Placeholder:
        if not torch._has_compatible_shallow_copy_type(tensor, value) or value.device != tensor.device:
            become_real(tensor)
            _torch_data.__set__(tensor, value)  # torch's refusal
            return
        swap_in(tensor, value.detach())
        return
    _torch_data.__set__(tensor, value)  # sizes and strides, or torch's refusal
    tensor._record, tensor._region = value._record, value._region
    value._record.tensors.append(weakref.ref(tensor))

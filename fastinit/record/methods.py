"""The fast path: native methods of placeholders and of the mode, which are found before torch's and pay no dispatcher.

They are of the class alone: without them (`use(False)`, or FASTINIT_FAST=0 in the environment) every result is the
same. They serve what torch.nn's constructors call, and hand anything unusual to torch, or to the Python code of the
mode.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from .. import native
from ..execution import DTYPES, can_fill
from ..recipe import Write
from . import fast as fast_path
from .block import current
from .factories import RECORDED_FACTORIES
from .mode import INITIALIZERS, TAKES_OVER, Mode, graph_of
from .operators import OPERATORS
from .records import Record, lock
from .storageless import swap_impl
from .tensors import Placeholder, stand_for

_in_python: Any = Mode.__torch_function__

# What the mode passes on: each entry and exit of torch.no_grad calls it.
_PASSED = frozenset({torch._C._set_grad_enabled})

_METHODS, _torch_function, _registered = native.connect(
    placeholder=Placeholder,
    record=Record,
    mode=Mode,
    write=Write,
    current=current,
    lock=lock,
    can_fill=can_fill,
    dtypes=DTYPES,
    factories=RECORDED_FACTORIES,
    initializers=INITIALIZERS,
    takes_over=TAKES_OVER,
    passed=_PASSED,
    stand_for=stand_for,
    swap_impl=swap_impl,
    torch_function=_in_python,
    graph_of=graph_of,
)


def use(fast: bool) -> None:
    """Give the classes their fast methods, or take them away; outside of any block."""
    for name, method in {**OPERATORS, **_METHODS}.items():
        if fast:
            setattr(Placeholder, name, method)
        elif name in vars(Placeholder):
            delattr(Placeholder, name)
    Mode.__torch_function__ = _torch_function if fast else _in_python  # type: ignore[method-assign]
    native.use(fast)
    fast_path.in_use = fast


def registered() -> Callable[[torch.nn.Module, str, Any], None]:
    """The hook of torch.nn.Module for what is registered: a block keeps its modules and the names of its tensors."""
    hook: Callable[[torch.nn.Module, str, Any], None] = _registered if fast_path.in_use else _registered_in_python
    return hook


def _registered_in_python(module: torch.nn.Module, name: str, value: Any) -> None:
    block = current.get()
    if block is None:
        return
    block.saw(module)
    if type(value) is Placeholder:
        value._record.owner = (type(module), name)


use(os.environ.get("FASTINIT_FAST", "1") != "0")

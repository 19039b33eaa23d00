"""torch.compile: a function that enters a block is run as it is written, in the block and up to its end.

What Dynamo would trace are Python's steps of the recorder, and what it compiled would draw and round as the compiler
has it. No module of torch._dynamo is imported here, which takes seconds.

Private: it may change with any version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_frames: Any = torch._C._dynamo.eval_frame

_Function = TypeVar("_Function", bound=Callable[..., Any])

_REASON = (
    "a fastinit block creates a model, which is run as it is written and is no part of a graph. Create the model "
    "outside of what is compiled with fullgraph=True"
)


def not_compiled(function: _Function) -> _Function:
    """Have graphs break where a function is called, and its own frame left alone; what it calls is not meant."""
    # What torch.compiler.disable(recursive=False) amounts to.
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]
    return _skipped(function, callees="DEFAULT")


def never_compiled(function: _Function) -> _Function:
    """Have a function run as it is, with what it calls, whether a graph reaches its call or is handed its frame."""
    # What torch.compiler.disable amounts to.
    if torch.__version__ >= (2, 13):  # type: ignore[operator]
        function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    else:  # whose constant functions take no modules, in 2.9 for one: the graph breaks here instead
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return _skipped(function, callees="SKIP")


def _skipped(function: _Function, callees: str) -> _Function:
    if hasattr(_frames, "set_code_exec_strategy"):
        action = _frames._FrameAction
        strategy = _frames._FrameExecStrategy(action.SKIP, getattr(action, callees))
        _frames.set_code_exec_strategy(function.__code__, strategy)
    else:  # torch 2.6
        _frames.skip_code(function.__code__)
    return function


@not_compiled
def stop_compiling() -> Any:
    """Have no frame compiled in this thread; returns what `go_on_compiling` takes."""
    return _frames.set_eval_frame(None)


@not_compiled
def go_on_compiling(compiler: Any) -> None:
    """Have frames compiled as before `stop_compiling`."""
    if compiler is not None:
        _frames.set_eval_frame(compiler)

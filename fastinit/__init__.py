"""fastinit: PyTorch models created where they will live, in their precision, at the speed of memory.

What `__all__` names is public, and what the modules for frameworks name in theirs. The rest is private: it may change
with any version.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .checkpoint import CheckpointError, LoadReport, load
from .context import on
from .fills import empty, fill_
from .layout import Window
from .materialization import initialize, materialize, param_init_fn, uninitialized
from .recipe import Constant, Normal, TruncatedNormal, Uniform
from .record.guest import uninstall
from .report import FillReport, Report, TensorReport

if TYPE_CHECKING:
    from . import accelerate, deepspeed, lightning

__all__ = [
    "CheckpointError",
    "Constant",
    "FillReport",
    "LoadReport",
    "Normal",
    "Report",
    "TensorReport",
    "TruncatedNormal",
    "Uniform",
    "Window",
    "__version__",
    "accelerate",
    "deepspeed",
    "empty",
    "fill_",
    "initialize",
    "lightning",
    "load",
    "materialize",
    "on",
    "param_init_fn",
    "uninitialized",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name in ("accelerate", "deepspeed", "lightning"):  # most programs use none of them
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""fastinit: PyTorch models created where they will live, in their precision, at the speed of memory."""

from . import deepspeed
from ._version import __version__
from .checkpoint import LoadReport, load
from .checkpoint_files import CheckpointError
from .context import Report, on
from .fills import empty, fill_
from .layout import Window
from .materialization import initialize, materialize, param_init_fn, uninitialized
from .recipe import Constant, Normal, TruncatedNormal, Uniform
from .record.guest import uninstall

__all__ = [
    "CheckpointError",
    "Constant",
    "LoadReport",
    "Normal",
    "Report",
    "TruncatedNormal",
    "Uniform",
    "Window",
    "__version__",
    "deepspeed",
    "empty",
    "fill_",
    "initialize",
    "load",
    "materialize",
    "on",
    "param_init_fn",
    "uninitialized",
    "uninstall",
]

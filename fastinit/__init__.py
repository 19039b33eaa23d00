"""fastinit: PyTorch models created where they will live, in their precision, at the speed of memory."""

from ._version import __version__
from .context import Report, on
from .deferred import initialize, uninitialized
from .fills import empty, fill_
from .layout import Window
from .recipe import Constant, Normal, TruncatedNormal, Uniform

__all__ = [
    "Constant",
    "Normal",
    "Report",
    "TruncatedNormal",
    "Uniform",
    "Window",
    "__version__",
    "empty",
    "fill_",
    "initialize",
    "on",
    "uninitialized",
]

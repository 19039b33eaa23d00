"""Checkpoints: files that are read into a model. Private: it may change with any version."""

from .api import load
from .files import CheckpointError
from .loading import LoadReport

__all__ = ["CheckpointError", "LoadReport", "load"]

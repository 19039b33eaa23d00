"""Tests that need a GPU: skipped as a whole where there is none, or where the native module was built without CUDA."""

import os
from pathlib import Path

import pytest
import torch

from fastinit import native


def pytest_collection_modifyitems(items):
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        for item in items:
            if item.get_closest_marker("caching_allocator"):
                item.add_marker(pytest.mark.skip(reason="needs torch's caching allocator"))
    if not native.build_info()["cuda"]:
        reason = "fastinit was built without CUDA"
    elif not torch.cuda.is_available():
        reason = "no CUDA device"
    else:
        return
    here = Path(__file__).resolve().parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))

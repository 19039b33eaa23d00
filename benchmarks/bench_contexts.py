"""What a block itself costs: an empty one, by the number of module classes in the process, and the thousandth one."""

import importlib.util
import time

import pytest
import torch

import fastinit
from fastinit.cli import measure

COUNTED = {"about the tenth": slice(5, 25), "about the thousandth": slice(-20, None)}
LOADED = [name for name in ("transformers", "timm", "torchvision") if importlib.util.find_spec(name)]


@pytest.mark.parametrize("when", COUNTED)
@pytest.mark.parametrize("classes", [0, 1000, 10_000, "libraries"])
def test_empty_block(figure, once, main_device, quick, classes, when):
    what = f"{' and '.join(LOADED) or 'no library'} imported" if classes == "libraries" else f"{classes:,} classes more"
    with figure(f"an empty block, {what}, {main_device}", when) as record:
        seconds = once(measure.in_new_process, empty_blocks, classes, 50 if quick else 1000, str(main_device))
        record(seconds[COUNTED[when]])


def empty_blocks(classes, count, device_name):
    """Seconds of each."""
    if classes == "libraries":
        kept = [importlib.import_module(name) for name in LOADED]
    else:
        kept = [type(f"Module{number}", (torch.nn.Module,), {}) for number in range(classes)]
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        with fastinit.on(device_name, "fp32"):
            pass
        seconds.append(time.perf_counter() - began)
    del kept
    return seconds

"""Normals that are no plain run through one new tensor: rows of a larger one, odd starts, steps, limits, many at once.

The rate of each is to be held against that of "one tensor", of "one of as many elements" for many at once.
"""

import pytest
import torch

import fastinit
from fastinit import TruncatedNormal, Window, native
from fastinit.cli import measure
from fastinit.cli.workloads import FILLS, STD, elements_to_fill

NORMAL = FILLS["normal"].ours
DTYPES = {"fp32": native.FLOAT32, "bf16": native.BFLOAT16}
SMALL = 4096  # elements
LAYOUTS = [
    "one tensor", "limits unlike", "one step", "rows of 1 KiB", "rows of 1 KiB, odd start", "rows of 128 bytes",
    "box of three dimensions", "one run, odd start", "one 4096 x 4096", "one of as many elements", "many at once",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout(figure, device, quick, dtype, layout):
    tensor = fastinit.empty(elements_to_fill(device, quick), dtype=measure.DTYPES[dtype], device=device)
    many = min(10_000, tensor.numel() // SMALL)
    elements, run, setup = work(layout, tensor, DTYPES[dtype], many)
    with figure(f"{layout}, {device}", dtype) as record:
        record(lambda: measure.seconds_on_device(run, device, setup), rounds=11, patience=2.0, elements=elements)


def work(layout, tensor, dtype, many):
    """(elements, what fills them once, what prepares so many runs)"""
    count = tensor.numel()
    columns = (128 if "128" in layout else 1024) // tensor.itemsize
    rows = tensor.view(-1, columns)

    def filling(values, distribution=NORMAL, window=None):
        return values.numel(), lambda: fastinit.fill_(values, distribution, seed=1, window=window), None

    if layout == "limits unlike":
        return filling(tensor, TruncatedNormal(0.0, STD, -STD, 2 * STD))
    if layout == "one step":
        return batched(tensor[None], dtype, ((native.MULTIPLY, STD, 0.0),))
    if layout in ("rows of 1 KiB", "rows of 128 bytes"):
        return filling(rows, window=Window((len(rows), 8 * columns), (0, 0)))
    if layout == "rows of 1 KiB, odd start":
        odd = tensor[1 : 1 + count - columns].view(-1, columns)
        return filling(odd, window=Window((len(odd), 8 * columns), (0, 3)))
    if layout == "box of three dimensions":
        box = tensor.view(-1, 16, columns)
        return filling(box, window=Window((len(box), 32, 8 * columns), (0, 0, 0)))
    if layout == "one run, odd start":
        return filling(tensor[1 : count - 7], window=Window((count,), (3,)))
    if layout == "one 4096 x 4096":
        return filling(tensor[: 4096 * 4096])
    if layout == "one of as many elements":
        return batched(tensor[: many * SMALL][None], dtype)
    if layout == "many at once":
        return batched(tensor[: many * SMALL].view(many, SMALL), dtype)
    return filling(tensor)


def batched(rows, dtype, steps=()):
    """A fill of each row in one native call, as at a block's end; the Python that puts it together is not timed."""
    addresses, parameters = [row.data_ptr() for row in rows], (0.0, STD)
    batches = []  # each runs once

    def setup(runs):
        for _ in range(runs):
            batch = native.Batch()
            for stream, address in enumerate(addresses):
                batch.add(address, rows.shape[1], dtype, native.NORMAL, parameters, 1, stream, steps)
            batches.append(batch)

    def run():
        if rows.device.type == "cuda":
            batches.pop().run_cuda(rows.get_device(), torch.cuda.current_stream(rows.device).cuda_stream)
        else:
            batches.pop().run_cpu(torch.get_num_threads())

    return rows.numel(), run, setup

"""Fills of one tensor that exists already, by fastinit, torch and other generators of random numbers.

Constants show what memory allows. Of new memory of a CPU, which the system zeroes when it is first written, as that of
most models is, there are the fill, its part without zeroing, and zeroing alone.
"""

from concurrent.futures import ThreadPoolExecutor

import peers
import pytest
import torch

import fastinit
from fastinit.cli import measure
from fastinit.cli.workloads import FILLS, elements_to_fill


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("threads", ["one thread", "all threads"])
@pytest.mark.parametrize("dtype", measure.DTYPES)
@pytest.mark.parametrize("distribution", FILLS)
def test_fill(figure, device, quick, distribution, dtype, threads, peer):
    on_gpu = device.type == "cuda"
    if device.type not in peers.PEERS[peer].devices or (on_gpu and threads == "one thread"):
        pytest.skip("there is no such fill")
    tensor = fastinit.empty(elements_to_fill(device, quick), dtype=measure.DTYPES[dtype], device=device)
    case = f"{distribution} {dtype}, {device}{'' if on_gpu else f', {threads}'}"
    with figure(case, peer) as record, measure.torch_threads(1 if threads == "one thread" else None):
        fill = peers.prepare(peer, distribution, tensor, None if on_gpu else threads)
        patience = 2.0 if on_gpu else 0.5
        info = record(lambda: seconds_of(fill, device), rounds=11, patience=patience, elements=tensor.numel())
        info["wrong"] = not FILLS[distribution].are_right(fill.sample())


def fill_normal(tensor):
    fastinit.fill_(tensor, FILLS["normal"].ours, seed=1)


def touch(tensor):
    """Write a byte of each page, in all threads."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part[::4096].fill_(0), tensor.view(torch.uint8).chunk(threads)))


# What gives memory, what happens before the time is taken, and what it is taken of.
FIRST_TOUCH = {
    "fastinit": (fastinit.empty, None, fill_normal),
    "fastinit, written before": (fastinit.empty, touch, fill_normal),
    "zeroing alone": (fastinit.empty, None, touch),
    "torch": (torch.empty, None, FILLS["normal"].torch),
}


@pytest.mark.parametrize("way", FIRST_TOUCH)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_first_touch(figure, device, quick, dtype, way):
    if device.type != "cpu":
        pytest.skip("a GPU's memory is its driver's")
    count = 2**18 if quick else 2**26
    allocate, before, run = FIRST_TOUCH[way]

    def seconds():
        measure.warm_memory(count * measure.DTYPES[dtype].itemsize)
        tensor = allocate(count, dtype=measure.DTYPES[dtype])
        if before is not None:
            before(tensor)
        return measure.seconds_of(lambda: run(tensor), device)[0]

    with figure(f"normal {dtype}, {device}, first touch", way) as record:
        record(seconds, rounds=11, patience=3.0, elements=count)


def seconds_of(fill, device):
    if fill.wait is None:
        return measure.seconds_on_device(fill.run, device)

    def run():
        for _ in range(measure.CALLS):
            last = fill.run()
        fill.wait(last)

    return measure.seconds_of(run, device)[0] / measure.CALLS

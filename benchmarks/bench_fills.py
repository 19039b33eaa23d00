"""Fills of one tensor that exists already, by fastinit, torch and other generators of random numbers.

Constants show what memory allows.
"""

import peers
import pytest

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


def seconds_of(fill, device):
    if fill.wait is None:
        return measure.seconds_on_device(fill.run, device)

    def run():
        for _ in range(measure.CALLS):
            last = fill.run()
        fill.wait(last)

    return measure.seconds_of(run, device)[0] / measure.CALLS

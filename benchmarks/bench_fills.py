"""Fills of one tensor that exists already, by fastinit, torch and other generators of random numbers.

Constants show what memory allows.
"""

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
def test_fill(record, absent, device, quick, distribution, dtype, threads, peer):
    if device.type not in peers.PEERS[peer].devices or (device.type == "cuda" and threads == "one thread"):
        pytest.skip("there is no such fill")
    count = None if device.type == "cuda" else 1 if threads == "one thread" else torch.get_num_threads()
    case = f"{distribution} {dtype}, {device}{'' if count is None else f', {threads}'}"
    tensor = fastinit.empty(elements_to_fill(device, quick), dtype=measure.DTYPES[dtype], device=device)
    with measure.torch_threads(count):
        try:
            fill = peers.prepare(peer, distribution, tensor, count)
        except peers.Unavailable as why:
            absent(case, peer, str(why))
        info = record(
            case,
            peer,
            lambda: seconds_of(fill, device),
            rounds=11,
            patience=2.0 if count is None else 0.5,
            elements=tensor.numel(),
        )
    info["wrong"] = not FILLS[distribution].are_right(fill.sample())


def seconds_of(fill, device):
    if fill.wait is None:
        return measure.seconds_on_device(fill.run, device)

    def run():
        for _ in range(measure.CALLS):
            last = fill.run()
        fill.wait(last)

    return measure.seconds_of(run, device)[0] / measure.CALLS

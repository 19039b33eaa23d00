"""Fills of one tensor by fastinit, torch and other generators of random numbers; a group for each distribution, dtype.

A peer whose package is missing, or that has no such fill, is skipped with that reason.
"""

import pytest

import fastinit
from fastinit.cli import measure, peers, sections
from fastinit.cli.workloads import FILLS


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("dtype", measure.DTYPES)
@pytest.mark.parametrize("distribution", FILLS)
def test_fill(benchmark, device, quick, distribution, dtype, peer):
    if device.type not in peers.PEERS[peer].devices:
        pytest.skip(f"{peer} does not fill on {device.type}")
    elements = sections.elements_to_fill(sections.Settings(str(device), quick, peers=True))
    tensor = fastinit.empty(elements, dtype=measure.DTYPES[dtype], device=device)
    try:
        fill = peers.prepare(peer, distribution, tensor)
    except peers.Missing as missing:
        pytest.skip(f"{missing} is not installed")
    except peers.Unsupported as unsupported:
        pytest.skip(str(unsupported))

    def run():
        result = fill.run()
        if fill.wait is not None:
            fill.wait(result)
        measure.synchronize(device)

    benchmark.group = f"{distribution} {dtype}, {elements:,} elements"
    benchmark.pedantic(run, rounds=3 if quick else 11, warmup_rounds=1)
    benchmark.extra_info.update(peer=peer, elements=elements, **sections.values_of(fill))

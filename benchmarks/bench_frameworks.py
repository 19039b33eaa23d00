"""What `fabric.init_module()` costs with fastinit enabled and without, in new processes, bf16-true, on one device.

Lightning and the GPU are initialised and a tensor has been allocated when the clock starts. First: the first model of
the process; on a GPU, torch loads each kernel at its first use. Second: another one, after the first was freed and
torch's allocator gave its memory back.
"""

import functools
from contextlib import nullcontext

import peers
import pytest
import torch

from fastinit.cli import measure, text
from fastinit.cli.models import LLAMA_7B, Decoder, DecoderConfig

WHEN = ("first", "second")


@pytest.mark.parametrize("way", ["fastinit", "Lightning alone"])
@pytest.mark.parametrize("when", WHEN)
def test_fabric(record, absent, main_device, quick, when, way):
    config = LLAMA_7B if main_device.type == "cuda" else DecoderConfig.of_size(100_000_000)
    if quick:
        config = DecoderConfig.of_size(1_000_000)
    case = f"fabric.init_module, {text.count(config.parameters)}, {when} model, {main_device}"
    try:
        peers.require("lightning")
    except peers.Unavailable as why:
        absent(case, way, str(why))

    rounds = runs(way == "fastinit", config, main_device.type, 1 if quick else 4)
    record(case, way, [each[WHEN.index(when)] for each in rounds[-3:]])  # the first one reads the packages from disk


@functools.cache
def runs(enabled, config, device_type, rounds):
    return [measure.in_new_process(create, enabled, config, device_type) for _ in range(rounds)]


def create(enabled, config, device_type):
    """Seconds of the first and of the second creation."""
    import lightning

    import fastinit.lightning

    device = torch.device(device_type)
    with fastinit.lightning.enabled() if enabled else nullcontext():
        fabric = lightning.Fabric(accelerator=device_type, devices=1, precision="bf16-true")
        torch.ones(1, device=device).sum().item()

        def model():
            with fabric.init_module():
                return Decoder(config)

        seconds = []
        for _ in WHEN:
            measure.clean_up(device)
            taken, created = measure.seconds_of(model, device)
            assert {(each.dtype, each.device.type) for each in created.parameters()} == {(torch.bfloat16, device_type)}
            seconds.append(taken)
            del created
    return seconds

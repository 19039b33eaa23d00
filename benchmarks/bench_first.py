"""The first model of a process, which is the only one that most processes make, with nothing loaded before.

The clock starts when torch, the library and the model's classes are imported and CUDA's context exists, with no kernel
loaded. It stops when the GPU is done. Each figure is of a process of its own.
"""

import peers
import pytest
import torch

from fastinit.cli import measure, text
from fastinit.cli.workloads import timed_creation

LIBRARIES = ("torch.nn", "transformers")
WAYS = ("fastinit", "torch", "fabric", "accelerate", "transformers")  # the first two first: time may be limited


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("way", WAYS)
def test_first_model(figure, main_device, quick, library, way):
    if (library, way) == ("torch.nn", "transformers"):
        pytest.skip("it creates models of its own alone")
    config, created = peers.shape_for(main_device, quick, on_cpu=350_000_000), []

    def run():
        created.append(measure.in_new_process(create, way, library, config, str(main_device)))
        return created[-1].seconds

    with figure(f"Llama-shaped, {text.count(config.parameters)}, {library}, {main_device}", way) as record:
        peers.require(library, peers.ALL_WAYS[way].requires)
        record(run, rounds=3, patience=60.0).update(created[-1].info())


def create(way, library, config, device_name):
    device = torch.device(device_name)
    build = peers.llama(config, library)
    creator = peers.prepare_way(way, device, torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.init()
        torch.empty(1, device=device)
    else:
        measure.warm_memory(torch.bfloat16.itemsize * config.parameters)
    return timed_creation(creator, build, device)[1]

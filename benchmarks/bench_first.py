"""The first model of a process, which is the only one that most processes make, with nothing loaded before.

The clock starts when torch, the library and the model's classes are imported and CUDA's context exists, with no kernel
loaded. It stops when the GPU is done. Each figure is of a process of its own.
"""

import peers
import pytest
import torch

from fastinit.cli import measure, text
from fastinit.cli.models import LLAMA_7B, DecoderConfig
from fastinit.cli.workloads import timed_creation

LIBRARIES = ("torch.nn", "transformers")
WAYS = ("fastinit", "torch", "fabric", "accelerate", "transformers")  # the first two first: time may be limited


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("way", WAYS)
def test_first_model(record, absent, main_device, quick, library, way):
    if (library, way) == ("torch.nn", "transformers"):
        pytest.skip("it creates models of its own alone")
    config = LLAMA_7B if main_device.type == "cuda" else DecoderConfig.of_size(350_000_000)
    if quick:
        config = DecoderConfig.of_size(1_000_000)
    case = f"Llama-shaped, {text.count(config.parameters)}, {library}, {main_device}"
    try:
        peers.require("transformers" if library == "transformers" else None)
        peers.require(peers.ALL_WAYS[way].requires)
    except peers.Unavailable as why:
        absent(case, way, str(why))
    created = []

    def run():
        created.append(measure.in_new_process(create, way, library, config, str(main_device)))
        return created[-1].seconds

    info = record(case, way, run, rounds=3, patience=60.0)
    info.update(parameters=created[-1].parameters, beyond=created[-1].beyond, parts=created[-1].parts)


def create(way, library, config, device_name):
    device = torch.device(device_name)
    build = peers.llama(config, library)
    if library == "transformers":
        import transformers

        transformers.LlamaForCausalLM  # noqa: B018 - imports its module
    creator = peers.prepare_way(way, device, torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.init()
        torch.empty(1, device=device)
    else:
        measure.warm_memory(torch.bfloat16.itemsize * config.parameters)
    return timed_creation(creator, build, device)[1]

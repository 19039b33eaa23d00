"""Creation of models in bf16 in one process, whose kernels are loaded: from one module to 6.74B parameters.

Cold: torch's allocator holds nothing when a creation starts. Warm: it holds what an equal model has just given back.
"""

import peers
import pytest
import torch

from fastinit.cli import text
from fastinit.cli.models import DecoderConfig
from fastinit.cli.workloads import linears, make_ready, timed_creation

SMALL_WAYS = ("fastinit", "torch")
MODULE_WAYS = ("fastinit", "torch", "fastinit fp32", "torch fp32", "plain fp32")
WAYS = ("fastinit", "torch", "naive", "fabric", "accelerate")
LIBRARY_WAYS = {"torch.nn": WAYS, "transformers": (*WAYS, "transformers")}
SIZES = {"1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}


def small_models():
    yield from (("Linear(64, 64)", way) for way in SMALL_WAYS)
    yield from (("2,000 x Linear(64, 64)", way) for way in MODULE_WAYS)
    yield from ((f"Llama-shaped, {size}", way) for size in SIZES for way in SMALL_WAYS)


@pytest.mark.parametrize(("model", "way"), list(small_models()))
def test_small_model(figure, device, quick, model, way):
    if model == "Linear(64, 64)":
        build = lambda: torch.nn.Linear(64, 64)  # noqa: E731
    elif model.startswith("2,000"):
        build = linears(20 if quick else 2000)
    else:
        build = peers.llama(DecoderConfig.of_size(100_000 if quick else SIZES[model.split()[-1]]), "torch.nn")
    with figure(f"{model}, {device}", way) as record:
        measure_way(record, way, build, device, rounds=20)


@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize(("library", "way"), [(library, way) for library, ways in LIBRARY_WAYS.items() for way in ways])
def test_model(figure, main_device, quick, library, way, cache):
    on_gpu = main_device.type == "cuda"
    if cache == "warm" and (not on_gpu or way == "naive"):
        pytest.skip("there is no such cache")
    config = peers.shape_for(main_device, quick, on_cpu=350_000_000)
    part = config.with_layers(1) if way == "naive" else config  # each takes as long, some seconds in all
    scale = config.parameters / part.parameters if part != config else None
    case = f"Llama, {text.count(config.parameters)}, {library}, {main_device}{f', {cache}' if on_gpu else ''}"
    with figure(case, way) as record:
        measure_way(record, way, peers.llama(part, library), main_device, keep_cache=cache == "warm", scale=scale)


def measure_way(record, way, build, device, *, keep_cache=False, rounds=5, scale=None):
    creator, created = peers.prepare_way(way, device, torch.bfloat16), []

    def run():
        parameters = created[-1].parameters if created else 0
        make_ready(peers.ALL_WAYS[way], parameters, device, torch.bfloat16, keep_cache=keep_cache)
        created.append(timed_creation(creator, build, device)[1])
        return created[-1].seconds

    record(run, rounds=rounds, patience=3.0, scale=scale).update(created[-1].info())

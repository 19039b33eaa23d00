"""Creation of models in bf16 in one process, whose kernels are loaded: from one module to 6.74B parameters.

Cold: torch's allocator holds nothing when a creation starts. Warm: it holds what an equal model has just given back.
"""

import peers
import pytest
import torch

from fastinit.cli import text
from fastinit.cli.measure import DTYPES
from fastinit.cli.models import LLAMA_7B, DecoderConfig
from fastinit.cli.workloads import linears, make_ready, timed_creation

BF16 = DTYPES["bf16"]
SMALL_WAYS = ("fastinit", "torch")
MODULE_WAYS = ("fastinit", "torch", "fastinit fp32", "torch fp32", "plain fp32")
LIBRARY_WAYS = {
    "torch.nn": ("fastinit", "torch", "naive", "fabric", "accelerate"),
    "transformers": ("fastinit", "torch", "naive", "fabric", "accelerate", "transformers"),
}
SIZES = {"1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}


def one_linear():
    return torch.nn.Linear(64, 64)


def small_models():
    yield from (("Linear(64, 64)", way) for way in SMALL_WAYS)
    yield from (("2,000 x Linear(64, 64)", way) for way in MODULE_WAYS)
    yield from ((f"Llama-shaped, {size}", way) for size in SIZES for way in SMALL_WAYS)


@pytest.mark.parametrize(("model", "way"), list(small_models()))
def test_small_model(record, absent, device, quick, model, way):
    if model == "Linear(64, 64)":
        build, parameters = one_linear, 64 * 65
    elif model.startswith("2,000"):
        build, parameters = linears(20 if quick else 2000), 2000 * 64 * 65
    else:
        config = DecoderConfig.of_size(100_000 if quick else SIZES[model.split()[-1]])
        build, parameters = peers.llama(config, "torch.nn"), config.parameters
    measure_way(record, absent, f"{model}, {device}", way, build, parameters, device, rounds=20)


@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize(("library", "way"), [(library, way) for library, ways in LIBRARY_WAYS.items() for way in ways])
def test_model(record, absent, main_device, quick, library, way, cache):
    on_gpu = main_device.type == "cuda"
    if cache == "warm" and (not on_gpu or way == "naive"):
        pytest.skip("there is no such cache")
    config = LLAMA_7B if on_gpu else DecoderConfig.of_size(350_000_000)
    if quick:
        config = DecoderConfig.of_size(1_000_000)
    case = f"Llama, {text.count(config.parameters)}, {library}, {main_device}{f', {cache}' if on_gpu else ''}"
    part = config.with_layers(1) if way == "naive" else config  # each takes as long, some seconds in all
    scale = config.parameters / part.parameters if part != config else None
    needed = "transformers" if library == "transformers" else None
    measure_way(
        record,
        absent,
        case,
        way,
        peers.llama(part, library),
        part.parameters,
        main_device,
        cache == "warm",
        needed,
        scale,
    )


def measure_way(
    record, absent, case, way, build, parameters, device, keep_cache=False, requires=None, scale=None, rounds=5
):
    try:
        peers.require(requires)
        creator = peers.prepare_way(way, device, BF16)
    except peers.Unavailable as why:
        absent(case, way, str(why))
    created = []

    def run():
        make_ready(peers.ALL_WAYS[way], parameters, device, BF16, keep_cache=keep_cache)
        created.append(timed_creation(creator, build, device)[1])
        return created[-1].seconds

    info = record(case, way, run, rounds=rounds, patience=3.0, scale=scale)
    last = created[-1]
    info.update(parameters=last.parameters, beyond=last.beyond, parts=last.parts)

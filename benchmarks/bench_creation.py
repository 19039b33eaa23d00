"""Creation of models in bf16 in one process, whose kernels are loaded: from one module to 6.74B parameters.

Cold: torch's allocator holds nothing when a creation starts. Warm: it holds what an equal model has just given back.
"""

import peers
import pytest
import torch
from conftest import rounds_for

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
def test_small_model(figure, once, device, quick, model, way):
    ways = MODULE_WAYS if model.startswith("2,000") else SMALL_WAYS
    with figure(f"{model}, {device}", way) as record:
        record_way(record, once(small_models_in_turns, model, ways, device, quick)[way])


def small_models_in_turns(model, ways, device, quick):
    if model == "Linear(64, 64)":
        build = lambda: torch.nn.Linear(64, 64)  # noqa: E731
    elif model.startswith("2,000"):
        build = linears(20 if quick else 2000)
    else:
        build = peers.llama(DecoderConfig.of_size(100_000 if quick else SIZES[model.split()[-1]]), "torch.nn")
    return in_turns(dict.fromkeys(ways, build), device, rounds=0 if quick else 20)


@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize(("library", "way"), [(library, way) for library, ways in LIBRARY_WAYS.items() for way in ways])
def test_model(figure, once, main_device, quick, library, way, cache):
    on_gpu = main_device.type == "cuda"
    if cache == "warm" and (not on_gpu or way == "naive"):
        pytest.skip("there is no such cache")
    config = peers.shape_for(main_device, quick, on_cpu=350_000_000)
    # Each layer takes as long the naive way, some seconds in all.
    scale = config.parameters / config.with_layers(1).parameters if way == "naive" and config.layers > 1 else None
    case = f"Llama, {text.count(config.parameters)}, {library}, {main_device}{f', {cache}' if on_gpu else ''}"
    with figure(case, way) as record:
        record_way(record, once(models_in_turns, library, config, main_device, cache == "warm", quick)[way], scale)


def models_in_turns(library, config, device, warm, quick):
    ways = [way for way in LIBRARY_WAYS[library] if not (warm and way == "naive")]
    builds = {way: peers.llama(config.with_layers(1) if way == "naive" else config, library) for way in ways}
    return in_turns(builds, device, warm=warm, rounds=0 if quick else 5)


def in_turns(builds, device, *, warm=False, rounds=5):
    """The creations of each way, or what it raised; the first one does not count.

    The ways take turns: a processor may do twice as much in one second as in the next, and each is to have its share.
    """
    creators, created = {}, {way: [] for way in builds}

    def run(way):
        if isinstance(created[way], Exception):
            return
        try:
            if way not in creators:
                creators[way] = peers.prepare_way(way, device, torch.bfloat16)
            parameters = created[way][-1].parameters if created[way] else 0
            make_ready(peers.ALL_WAYS[way], parameters, device, torch.bfloat16)
            if warm:
                creators[way](builds[way])
            created[way].append(timed_creation(creators[way], builds[way], device)[1])
        except Exception as error:
            created[way] = error.with_traceback(None)  # which holds a model

    for way in builds:
        run(way)
    counts = {way: rounds_for(each[0].seconds, rounds, 3.0) for way, each in created.items() if isinstance(each, list)}
    for done in range(max(counts.values(), default=0)):
        for way, count in counts.items():
            if done < count:
                run(way)
    return {way: each if isinstance(each, Exception) else each[1:] or each for way, each in created.items()}


def record_way(record, created, scale=None):
    if isinstance(created, Exception):
        raise created
    record([each.seconds for each in created], scale=scale).update(created[-1].info())

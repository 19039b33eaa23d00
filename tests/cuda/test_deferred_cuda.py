"""Empty, loaded and sharded on a GPU: the bits of the CPU, no fill that a checkpoint replaces, no memory beyond it."""

import gc

import pytest
import torch
from models import DTYPES, SEED, assert_same_bits, assert_same_structure, built, registered, same_bits
from torch import nn

import fastinit
from fastinit.record import block

over_dtypes = pytest.mark.parametrize("dtype", DTYPES)
MIB = 1 << 20


def model():
    layers = nn.ModuleDict(
        {
            "embedding": nn.Embedding(1000, 96, padding_idx=3),
            "linear": nn.Linear(96, 128),
            "norm": nn.BatchNorm1d(128),
            "orthogonal": nn.Linear(128, 64, bias=False),
            "head": nn.Linear(96, 1000, bias=False),
        }
    )
    nn.init.orthogonal_(layers["orthogonal"].weight)
    layers["head"].weight = layers["embedding"].weight
    layers.register_parameter("decay", nn.Parameter(-torch.exp(torch.arange(64.0) / 64)))
    return layers


def make(dtype, **options):
    with fastinit.on("cuda", dtype, seed=SEED, **options) as report:
        made = model()
    return made, report


@pytest.fixture(scope="module", params=DTYPES)
def expected(request):
    return request.param, make(request.param)[0]


def test_a_model_has_the_bits_of_the_cpu(expected):
    dtype, full = expected
    reference = built(model, dtype)
    values = registered(full)
    for name, tensor in registered(reference).items():
        if name != "decay":  # torch's exp differs between devices
            assert same_bits(values[name], tensor), name


@pytest.mark.parametrize("empty", [True, "nan"])
def test_empty_is_noticed_and_initialized_with_the_same_bits(expected, empty):
    dtype, full = expected
    lazy, report = make(dtype, empty=empty)
    names = ["embedding.weight", "linear.weight", "linear.bias", "orthogonal.weight"]
    assert sorted(fastinit.uninitialized(lazy)) == sorted(names) and report.fills_deferred == 5
    x = torch.ones(1, 96, device="cuda", dtype=DTYPES[dtype])
    if empty == "nan":
        assert lazy["linear"](x).isnan().all()
    else:
        with pytest.raises(RuntimeError, match=r"linear\.(weight|bias) .* nothing has written"):
            lazy["linear"](x)
    lazy.load_state_dict({"linear.weight": full["linear"].weight.cpu()}, strict=False)
    assert sorted(fastinit.initialize(lazy)) == sorted(set(names) - {"linear.weight"})
    assert_same_structure(lazy, full)
    assert_same_bits(lazy, full)


@pytest.mark.caching_allocator
def test_a_first_forward_in_a_captured_graph_follows_one_that_was_checked():
    with fastinit.on("cuda", "fp32", seed=SEED, empty=True):
        lazy = nn.Linear(64, 64)
    x = torch.ones(8, 64, device="cuda")
    fastinit.initialize(lazy)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        expected = lazy(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = lazy(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_a_checkpoint_inside_of_the_context_runs_no_fill_however_large_the_model(monkeypatch):
    monkeypatch.setattr(block, "_SEGMENT_BYTES", 4 * MIB)

    def layers():
        return nn.Sequential(*(nn.Linear(512, 512) for _ in range(32)))

    def load():
        made = layers()
        made.load_state_dict(checkpoint)
        return made

    checkpoint = {name: tensor.cpu() for name, tensor in built(layers, "fp32", "cuda").state_dict().items()}
    torch.cuda.empty_cache()
    with fastinit.on("cuda", "bf16", seed=1) as report:
        loaded = load()
    assert report.fills_executed == 0
    for name, tensor in loaded.state_dict().items():
        assert same_bits(tensor, checkpoint[name].bfloat16()), name


def test_a_file_is_loaded_onto_the_gpu(tmp_path, expected):
    safetensors = pytest.importorskip("safetensors.torch")
    dtype, full = expected
    state = {name: tensor.cpu().float() for name, tensor in full.state_dict().items() if name != "head.weight"}
    state["norm.num_batches_tracked"] = full["norm"].num_batches_tracked.cpu()
    safetensors.save_file(state, tmp_path / "model.safetensors")
    loaded = fastinit.load(model, tmp_path / "model.safetensors", "cuda", dtype)
    assert_same_structure(loaded, full)
    assert_same_bits(loaded, full)
    if dtype == "fp16":
        state["linear.weight"][3, 5] = 1e6
        safetensors.save_file(state, tmp_path / "large.safetensors")
        with pytest.raises(fastinit.CheckpointError, match=r"linear\.weight"):
            fastinit.load(model, tmp_path / "large.safetensors", "cuda", dtype)


def test_materialized_models_and_windows_have_the_same_bits(expected):
    dtype, full = expected
    sharded, _ = make(dtype, shard=True)
    assert sharded["linear"].weight.is_meta and sharded["norm"].running_mean.is_cuda and sharded.decay.is_cuda
    fastinit.materialize(sharded)
    assert_same_structure(sharded, full)
    assert_same_bits(sharded, full)
    part, _ = make(dtype, shard=True)
    fastinit.materialize(part, window=lambda name, shape: (slice(1, 33), *(slice(None) for _ in shape[1:])))
    for name, parameter in part.named_parameters():
        whole = registered(full)[name]
        assert same_bits(parameter, whole if name == "decay" else whole[1:33]), name


@pytest.mark.parametrize("options", [{"empty": True}, {"shard": True}])
def test_memory_is_that_of_the_model(options):
    def layers():
        return nn.Sequential(nn.Embedding(20_000, 1024, padding_idx=0), *(nn.Linear(1024, 4096) for _ in range(16)))

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with fastinit.on("cuda", "bf16", seed=1, **options):
        made = layers()
    if "shard" in options:
        assert torch.cuda.max_memory_allocated() - before < 4 * MIB
        fastinit.materialize(made)
    nbytes = sum(parameter.nbytes for parameter in made.parameters())
    assert torch.cuda.max_memory_allocated() - before < nbytes + 4 * MIB
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert unused < max(nbytes // 8, 256 * MIB)


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_two
def test_materialize_goes_to_the_device_that_is_named():
    sharded, _ = make("bf16", shard=True)
    fastinit.materialize(sharded, "cuda:1")
    assert sharded["linear"].weight.device == torch.device("cuda:1")
    assert same_bits(sharded["linear"].weight, make("bf16")[0]["linear"].weight)

"""`fastinit.load` to a GPU: the values of the CPU, streamed and otherwise; the order of streams; memory; failures."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from models import DTYPES, SEED, built, registered, same_bits
from safetensors.torch import save_file
from test_load import WRITERS, Net, trained, written
from torch import nn

import fastinit
from fastinit import CheckpointError, LoadReport, load
from fastinit.checkpoint import streaming

MIB = 1 << 20


def loaded(model, path, *args, **options):
    if not isinstance(model, nn.Module):
        args, options = args or ("cuda",), {"seed": SEED, **options}
    return load(model, path, *args, progress=False, **options)


def assert_loaded(model, state):
    for name, tensor in model.state_dict().items():
        assert tensor.is_cuda and same_bits(tensor.cpu(), state[name].to(tensor.dtype)), name


def large():
    """More than the ring of buffers, with small tensors in between."""
    return nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(20)), nn.Embedding(20_000, 1024), nn.LayerNorm(77))


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    state = {name: torch.randn(tensor.shape) for name, tensor in built(large).state_dict().items()}
    save_file(state, path)
    return path, state


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_format_is_loaded_as_on_the_cpu(tmp_path, name, dtype):
    source = trained()
    path = written(tmp_path, name, source)
    report = LoadReport()
    model = loaded(Net, path, dtype=dtype, report=report)
    assert_loaded(model, source.state_dict())
    assert same_bits(model.noise.cpu(), built(Net, dtype).noise)
    assert not report.missing and not report.unexpected
    for tensor in registered(model).values():
        tensor.detach().zero_()
    assert_loaded(loaded(model, path), source.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_beyond_the_ring_is_loaded_created_or_passed(large_file, dtype):
    path, state = large_file
    model = loaded(large, path, dtype=dtype)
    assert_loaded(model, state)
    for tensor in registered(model).values():
        tensor.detach().zero_()
    assert_loaded(loaded(model, path), state)


def test_what_waits_on_the_current_stream_is_before_it_and_what_follows_after(large_file):
    path, state = large_file
    model = loaded(large, path, dtype="bf16")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for tensor in registered(model).values():
            tensor.detach().fill_(-1)
        loaded(model, path)
        sums = [tensor.detach().clone() for tensor in model.state_dict().values()]
    torch.cuda.synchronize()
    for name, tensor in zip(model.state_dict(), sums, strict=True):
        assert same_bits(tensor.cpu(), state[name].bfloat16()), name


def test_a_model_in_two_places_is_loaded(tmp_path):
    """On the CPU and the GPU, in three dtypes, so that chunks for all of them are in flight at once."""
    model = nn.ModuleList([nn.Linear(3000, 1000), nn.Linear(3000, 1000), nn.Linear(3000, 1000)])
    state = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    model[0].cuda().bfloat16()
    model[1].bfloat16()
    model[2].weight.data = model[2].weight.data.cuda()
    loaded(model, tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor.cpu(), state[name].to(tensor.dtype)), name


def test_a_value_that_fp16_cannot_hold_is_refused(large_file, tmp_path):
    state = dict(large_file[1])
    state["20.weight"] = state["20.weight"].clone()
    state["20.weight"][19_999, 1000] = -70_000.0
    state["21.bias"] = torch.full((77,), float("inf"))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"20\.weight has the value -70000 in torch\.float32"):
        loaded(large, tmp_path / "model.safetensors", dtype="fp16")
    model = built(large, "fp16").cuda()
    before = {name: tensor.detach().clone() for name, tensor in registered(model).items()}
    with pytest.raises(CheckpointError, match=r"20\.weight has the value -70000"):
        loaded(model, tmp_path / "model.safetensors")
    assert all(same_bits(tensor, registered(model)[name]) for name, tensor in before.items())


def test_what_a_load_takes_beside_the_model(large_file):
    path, _ = large_file
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = loaded(large, path, dtype="bf16")
    size = sum(tensor.nbytes for tensor in registered(model).values())
    assert size <= torch.cuda.max_memory_allocated() - before <= size + 64 * MIB
    del model
    assert torch.cuda.memory_allocated() == before


def test_a_file_that_shrinks_meanwhile_is_an_error_and_the_gpu_works_on(large_file, tmp_path, monkeypatch):
    path, state = tmp_path / "model.safetensors", large_file[1]
    save_file(state, path)
    model = built(large, "bf16").cuda()
    check = streaming.StoredFile.check

    def shrinks(self, *args):
        check(self, *args)
        os.truncate(path, 100 * MIB)

    with monkeypatch.context() as patch:
        patch.setattr(streaming.StoredFile, "check", shrinks)
        with pytest.raises(CheckpointError, match="has changed since it was opened"):
            loaded(model, path)
    assert_loaded(loaded(model, large_file[0]), state)


def columns(name, shape):
    """Of what is in `large`: the middle columns of matrices, of which a row is less than the whole."""
    return (slice(None), slice(512, 1536 if shape[1] == 2048 else 1000)) if len(shape) == 2 else None


def cut():
    """`large` with those columns."""
    return nn.Sequential(*(nn.Linear(1024, 2048) for _ in range(20)), nn.Embedding(20_000, 488), nn.LayerNorm(77))


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_are_read_row_by_row(large_file, dtype):
    path, state = large_file
    model = loaded(cut, path, dtype=dtype, window=columns)
    parts = {name: tensor[columns(name, tensor.shape) or ...] for name, tensor in state.items()}
    assert_loaded(model, parts)


_WITHOUT_NATIVE_READS = """
import sys
import torch
from safetensors.torch import load_file
import fastinit
from fastinit import native
from test_load_cuda import columns, cut, large

native.read_cuda = None  # whoever calls it fails
state = load_file(sys.argv[1])
parts = {name: tensor[columns(name, tensor.shape) or ...] for name, tensor in state.items()}
for dtype in ("fp32", "bf16"):
    for build, expected, window in ((large, state, None), (cut, parts, columns)):
        model = fastinit.load(build, sys.argv[1], "cuda", dtype, window=window, progress=False)
        for name, tensor in model.state_dict().items():
            assert tensor.is_cuda and torch.equal(tensor.cpu(), expected[name].to(tensor.dtype)), (dtype, name)
"""


def test_without_native_reads_the_values_are_the_same(large_file):
    """As where fastinit was built without CUDA, and torch with it; FASTINIT_FAST=0 says so here."""
    environment = {**os.environ, "FASTINIT_FAST": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", _WITHOUT_NATIVE_READS, str(large_file[0])], check=True, env=environment)


def test_pinned_memory_inside_the_context_is_torchs_own():
    """safetensors and others copy through it; it used to be computed like a tensor of the model."""
    with fastinit.on("cuda", "bf16"):
        for dtype in (torch.uint8, torch.bfloat16, torch.float32):
            buffer = torch.empty(5, 7, dtype=dtype, device="cpu", pin_memory=True)
            assert type(buffer) is torch.Tensor and buffer.is_pinned() and buffer.dtype == dtype
        assert torch.empty(3, device="cpu", pin_memory=True).dtype == torch.bfloat16


def test_a_load_inside_the_context_reaches_the_gpu(large_file):
    path, state = large_file
    with fastinit.on("cuda", "bf16", seed=SEED) as init:
        model = large()
        loaded(model, path)
    assert init.fills_executed == 0
    assert_loaded(model, state)

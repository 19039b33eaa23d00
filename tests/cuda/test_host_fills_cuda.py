"""A GPU that a build has no native fills for, and fp64: values are computed on the host and copied, the same bits."""

import pytest
import torch
from models import SEED, WAYS, assert_same_bits, made, module_cases, random_names, same_bits
from other_device import Net

import fastinit
from fastinit import execution

RANDOM = [pytest.param(c, id=name) for name, c in module_cases() if random_names(c)]


@pytest.fixture
def without_native_fills(monkeypatch):
    monkeypatch.setattr(execution, "NATIVE_DEVICES", {"cpu"})


@pytest.mark.parametrize("constructor", RANDOM)
def test_modules_have_the_bits_of_the_cpu(constructor, without_native_fills):
    for dtype in ("fp32", "bf16"):
        assert_same_bits(made(constructor, "at once", dtype, "cuda"), made(constructor, "at once", dtype))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "fp64"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_and_dtype_has_the_bits_of_the_cpu(way, dtype, without_native_fills):
    model = made(Net, way, dtype, "cuda")
    assert all(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))
    assert_same_bits(model, made(Net, "at once", dtype))


@pytest.mark.parametrize("way", WAYS)
def test_fp64_on_a_gpu_has_the_bits_of_the_cpu(way):
    assert_same_bits(made(Net, way, "fp64", "cuda"), made(Net, "at once", "fp64"))


def test_large_tensors_are_written_in_pieces_behind_what_the_stream_has_to_do(without_native_fills):
    expected = fastinit.fill_(torch.empty(5 << 20), fastinit.Normal(), seed=SEED)
    tensor = torch.empty(5 << 20, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        tensor.fill_(7.0)
        fastinit.fill_(tensor, fastinit.Normal(), seed=SEED)
    torch.cuda.synchronize()
    assert same_bits(tensor, expected)


def test_a_build_without_native_fills_is_told_once(without_native_fills, caplog, monkeypatch):
    from fastinit import context

    monkeypatch.setattr(context, "NATIVE_DEVICES", {"cpu"})
    context._tell_of_build.cache_clear()
    for _ in range(2):
        with fastinit.on("cuda"):
            pass
    messages = [each.message for each in caplog.records if each.name == "fastinit"]
    assert [message.partition(":")[0] for message in messages] == ["values are computed on the host and copied"]

"""Devices without native fills: values are computed on the host, piece by piece, and copied; the bits are the same.

Most tests switch native fills off for the CPU, whose memory then is filled as that of another device is. The last ones
have a real one: tests/support/other_device.cpp, whose memory the host cannot touch. It takes a compiler, and a minute.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import other_device
import pytest
import torch
from models import SEED, WAYS, assert_same_bits, made, module_cases, random_names, same_bits
from other_device import Net
from ranks import on_every_rank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import fastinit
from fastinit import execution

RANDOM = [pytest.param(c, id=name) for name, c in module_cases() if random_names(c)]


@pytest.fixture(params=[64, 16 << 20], ids=["small pieces", "large pieces"])
def elsewhere(request, monkeypatch):
    """From when it is called on, no memory is filled natively."""

    def switch_off():
        monkeypatch.setattr(execution, "NATIVE_DEVICES", set())
        monkeypatch.setattr(execution, "_PIECE_BYTES", request.param)

    return switch_off


@pytest.mark.parametrize("constructor", RANDOM)
def test_modules_have_the_bits_of_native_fills(constructor, elsewhere):
    expected = [made(constructor, "at once", dtype) for dtype in ("fp32", "bf16")]
    elsewhere()
    for dtype, each in zip(("fp32", "bf16"), expected, strict=True):
        assert_same_bits(made(constructor, "at once", dtype), each)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "fp64"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_and_dtype_has_the_bits_of_native_fills(way, dtype, elsewhere):
    expected = made(Net, "at once", dtype)
    elsewhere()
    model = made(Net, way, dtype)
    assert_same_bits(model, expected)
    assert model.head.weight is model.embedding.weight and model.across.stride() == (1, 9)


def row_major():
    model = Net()
    del model.across  # FSDP2 refuses it
    return model


def test_windows_and_shards_are_parts_of_the_whole(elsewhere):
    whole = dict(made(row_major, "at once", "bf16").named_parameters())
    elsewhere()

    def window(name, shape):
        return tuple(slice(1, size - 1) for size in shape)

    with fastinit.on("cpu", "bf16", seed=SEED, shard=True):
        model = row_major()
    fastinit.materialize(model, window=window)
    for name, parameter in model.named_parameters():
        assert same_bits(parameter, whole[name][window(name, whole[name].shape)].contiguous()), name

    def on_rank(rank):
        with fastinit.on("cpu", "bf16", seed=SEED, shard=True):
            model = row_major()
        fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
        fastinit.materialize(model)
        for name, parameter in model.named_parameters():
            parts = whole[name].chunk(3)
            part = parts[rank] if rank < len(parts) else whole[name][:0]
            assert same_bits(parameter.to_local().contiguous(), part.contiguous()), name

    on_every_rank(3, on_rank)


def test_what_is_written_already_stays(elsewhere):
    expected = made(Net, "at once", "fp32")
    elsewhere()
    with fastinit.on("cpu", "fp32", seed=SEED, empty=True):
        model = Net()
    with torch.no_grad():
        model.fused[2:5, 1:4] = 7.0
    fastinit.initialize(model)
    assert (model.fused[2:5, 1:4] == 7.0).all()
    with torch.no_grad():
        expected.fused[2:5, 1:4] = 7.0
    assert_same_bits(model, expected)


def test_fills_write_what_they_are_given_and_nothing_else(elsewhere):
    expected = fastinit.fill_(torch.empty(6, 5), fastinit.Normal(), seed=7, stream=2)
    elsewhere()
    memory = torch.full((9, 11), -1.0)
    fastinit.fill_(memory[2:8, 1:11:2], fastinit.Normal(), seed=7, stream=2)
    assert same_bits(memory[2:8, 1:11:2].contiguous(), expected)
    memory[2:8, 1:11:2] = -1.0
    assert (memory == -1.0).all()
    part = fastinit.fill_(
        torch.empty(3, 4, dtype=torch.bfloat16).T,
        fastinit.Normal(),
        seed=7,
        stream=2,
        window=fastinit.Window((6, 5), (1, 2)),
    )
    assert same_bits(part.contiguous(), expected[1:5, 2:].bfloat16().contiguous())


def test_tensors_that_exist_already_are_filled(elsewhere):
    def fill(tensor):
        with fastinit.on("cpu", seed=SEED):
            nn.init.xavier_normal_(tensor)
            tensor.T[1:3].uniform_()
        return tensor

    expected = fill(torch.zeros(8, 5))
    elsewhere()
    assert same_bits(fill(torch.zeros(8, 5)), expected)


class Largest(TorchDispatchMode):
    """The largest memory that was allocated, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided):
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


def test_the_host_holds_a_piece_at_a_time(monkeypatch):
    tensor = torch.empty(24 << 20, dtype=torch.bfloat16)
    expected = fastinit.fill_(torch.empty_like(tensor), fastinit.Normal(), seed=7)
    monkeypatch.setattr(execution, "NATIVE_DEVICES", set())
    with Largest() as largest:
        fastinit.fill_(tensor, fastinit.Normal(), seed=7)
    assert 0 < largest.nbytes <= 16 << 20
    assert same_bits(tensor, expected)


def test_a_device_that_torch_cannot_use_is_refused_in_one_sentence():
    # Which of them there is depends on the machine.
    present = str(torch.accelerator.current_accelerator())
    absent = [name for name in ("mps", "xpu", "hpu", "xla") if name not in present]
    for name in absent:
        with pytest.raises(RuntimeError, match=f"device='{name}' is none that torch .* can use here") as caught:
            with fastinit.on(name):
                pass
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("ninja") is None, reason="no C++ compiler, or no ninja")
def test_a_device_whose_memory_the_host_cannot_touch_gets_the_bits_of_the_cpu(tmp_path):
    script = Path(other_device.__file__)
    result = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "all the same"

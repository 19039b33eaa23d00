"""Builds other_device.cpp into a directory, and compares models on that device with those on the CPU: `DIRECTORY`.

A program of its own, since a process keeps such a device to its end.
"""

import sys
from pathlib import Path

import torch
from models import SEED, same_bits
from torch import nn
from torch.utils import cpp_extension

import fastinit


class Net(nn.Module):
    """Regions, steps, chains that are computed of fills, computed values, another dtype, ties, other strides."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(19, 8, padding_idx=3)
        self.head = nn.Linear(8, 19)
        self.head.weight = self.embedding.weight
        self.conv = nn.Conv2d(2, 3, 3)
        nn.init.orthogonal_(self.conv.weight)
        self.fused = nn.Parameter(torch.empty(12, 7))
        for part in self.fused.data.chunk(3):
            nn.init.trunc_normal_(part, std=0.02)
        self.moved = nn.Parameter(torch.randn(6, 5).mul_(0.1).add_(3))
        self.across = nn.Parameter(torch.empty(5, 9).T.normal_())
        self.fine = nn.Parameter(torch.rand(7, dtype=torch.float64))
        self.never = nn.Parameter(torch.ones(4, 3))
        self.register_buffer("angles", torch.outer(torch.arange(6.0), torch.linspace(0, 1, 5)).cos())
        self.register_buffer("count", torch.full((3,), 7))


class Device:
    """What torch asks of the module of a device."""

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def current_device():
        return 0


def registered(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same(model, expected):
    for name, tensor in registered(model).items():
        assert tensor.device == torch.device("other:0"), (name, tensor.device)
        assert same_bits(tensor.cpu(), registered(expected)[name]), name


def main(directory):
    source = Path(__file__).with_suffix(".cpp")
    extension = cpp_extension.load("other_device", [source], extra_cflags=["-O0", "-g0"], build_directory=directory)
    torch.utils.rename_privateuse1_backend("other")
    torch._register_device_module("other", Device)
    before = extension.live()
    probe = torch.ones(3, device="other")
    assert extension.live() == before + 1 and probe.device.type == "other" and (probe.cpu() == 1).all()
    for dtype in ("fp32", "bf16", "fp64"):
        with fastinit.on("cpu", dtype, seed=SEED):
            expected = Net()
        with fastinit.on("other", dtype, seed=SEED) as init:
            model = Net()
        assert init.device == torch.device("other:0") and init.peak_memory == 0
        assert_same(model, expected)
        with fastinit.on("other", dtype, seed=SEED, empty=True):
            model = Net()
        fastinit.initialize(model)
        assert_same(model, expected)
        with fastinit.on("other", dtype, seed=SEED, shard=True):
            model = Net()
        fastinit.materialize(model)
        assert_same(model, expected)
        torch.save(expected.state_dict(), Path(directory, "checkpoint.pt"))
        model = fastinit.load(Net, Path(directory, "checkpoint.pt"), "other", dtype, progress=False)
        assert_same(model, expected)
    where = torch.zeros(9, 5, device="other")
    fastinit.fill_(where.T[1:3], fastinit.Normal(), seed=3)
    assert same_bits(where.cpu().T[1:3].contiguous(), fastinit.fill_(torch.empty(2, 9), fastinit.Normal(), seed=3))
    with fastinit.on("other", seed=SEED):
        torch.nn.init.normal_(where)
    assert same_bits(where.cpu(), fastinit.fill_(torch.empty(9, 5), fastinit.Normal(), seed=SEED))
    print("all the same")


if __name__ == "__main__":
    main(sys.argv[1])

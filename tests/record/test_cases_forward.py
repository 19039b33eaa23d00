"""Constructors that run what they have made, and copies of it that they take out of the graph."""

import copy

import pytest
import torch
from cases import assert_as_torch, assert_rounded, inside, over_dtypes
from models import SEED, assert_same_bits, assert_same_structure, plain, same_bits
from torch import nn
from torch.nn import functional as F

import fastinit

# A forward in the constructor ----------------------------------------------------------------------------------------


class Probed(nn.Module):
    """Runs itself to find out a size, and computes buffers before and afterwards."""

    def __init__(self, probe=None):
        super().__init__()
        self.register_buffer("freq", torch.linspace(0, 1, 7))
        self.layer, self.norm = nn.Linear(2, 7), nn.BatchNorm1d(7)
        if probe:
            probe(self)
        self.register_buffer("cos", (self.freq * 1000).cos())
        self.head = nn.Linear(7, 2)

    def forward(self, x):
        return self.layer(x) * self.freq


PROBES = {
    "a layer": lambda m: m.layer(torch.zeros(1, 2)),
    "a layer without gradient": lambda m: torch.no_grad()(m.layer)(torch.zeros(1, 2)),
    "itself": lambda m: m(torch.zeros(1, 2)),
    "itself without gradient": lambda m: torch.no_grad()(m)(torch.ones(1, 2)),
    "its shape": lambda m: m(torch.zeros(1, 2)).shape[-1],
    "and backward": lambda m: (m(torch.ones(1, 2)).sum().backward(), m.zero_grad()),
    "in evaluation": lambda m: (m.norm.eval()(m(torch.ones(2, 2))), m.norm.train()),
    "functional": lambda m: F.linear(torch.ones(1, 7), m.layer.weight.t()),
    "the buffer": lambda m: m.freq.cos().sum().item(),
}


@pytest.mark.parametrize("name", PROBES)
@over_dtypes
def test_a_forward_in_the_constructor_changes_no_value_of_the_model(name, dtype):
    probed, untouched, exact = (
        inside(lambda probe=probe: Probed(probe), kind)
        for probe, kind in ((PROBES[name], dtype), (None, dtype), (None, "fp32"))
    )
    assert_same_structure(probed, plain(Probed, dtype))
    assert_rounded([probed.freq, probed.cos], [exact.freq, (torch.linspace(0, 1, 7) * 1000).cos()], dtype)
    assert_same_bits(probed, untouched)


@over_dtypes
def test_batch_statistics_of_a_forward_in_the_constructor_are_kept(dtype):
    def construct():
        norm = nn.BatchNorm1d(3, momentum=0.5)
        norm(torch.arange(6.0).view(2, 3))
        return norm.running_mean, norm.running_var, norm.num_batches_tracked

    assert_as_torch(inside(construct, dtype), plain(construct, dtype), dtype)


# Copies that are detached in place ------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """A student and its copy, as in self-distillation."""

    def __init__(self):
        super().__init__()
        self.student = nn.Linear(8, 8)
        self.teacher = copy.deepcopy(self.student)
        for p in self.teacher.parameters():
            p.detach_()


STATE = {
    f"{part}.{name}": torch.full(shape, 0.5)
    for part in ("student", "teacher")
    for name, shape in (("weight", (8, 8)), ("bias", (8,)))
}
USES = {
    "nothing": (lambda m: None, None),
    "load": (lambda m: m.load_state_dict(STATE), 0.5),
    "read": (lambda m: m.teacher.weight.mean(), None),
    "forward": (lambda m: m.teacher(torch.ones(1, 8)), None),
    "copy_": (lambda m: (m.teacher.weight.data.copy_(torch.ones(8, 8)), m.teacher.weight.sum()), 1.0),
    "detached sum": (lambda m: m.teacher.weight.detach().sum(), None),
    "average": (lambda m: torch.no_grad()(m.teacher.weight.lerp_)(m.student.weight, 0.5), None),
    "frozen": (lambda m: m.teacher.requires_grad_(False), None),
}


@pytest.mark.parametrize("way", [{}, {"shard": True}], ids=["at once", "sharded"])
@pytest.mark.parametrize("use", USES)
@over_dtypes
def test_a_parameter_that_is_detached_in_place_stays_a_parameter(use, way, dtype):
    run, value = USES[use]

    def construct():
        model = Teacher()
        run(model)
        return model

    model = inside(construct, dtype, **way)
    if way:
        fastinit.materialize(model)
    assert_same_structure(model, plain(construct, dtype))
    weight = inside(lambda: nn.Linear(8, 8), dtype, SEED).weight.detach()
    if value is None:
        assert same_bits(model.student.weight.detach(), weight) and same_bits(model.teacher.weight.detach(), weight)
    else:
        assert (model.teacher.weight == value).all()
    assert model.student.weight.data_ptr() != model.teacher.weight.data_ptr()

"""Fills that a GPU starts while the constructor still runs: the same values, whatever happens to the tensors later.

The order of work is the recorder's, not the device's, so it is tested here on the CPU, with groups of a few kilobytes.
"""

import pytest
import torch
from torch import nn

import fastinit
from fastinit import recorder


@pytest.fixture
def early(monkeypatch):
    """Execute fills as early as on a GPU; gives the number of tensors that were filled early."""
    counts = []
    fill_ready, enter = recorder.Recorder._fill_ready, recorder.Recorder.__enter__

    def counting(self):
        before = self.executed
        try:
            fill_ready(self)
        finally:
            counts.append(self.executed - before)

    def overlapping(self):
        self._overlap = True
        return enter(self)

    monkeypatch.setattr(recorder.Recorder, "_fill_ready", counting)
    monkeypatch.setattr(recorder.Recorder, "__enter__", overlapping)
    monkeypatch.setattr(recorder, "_FIRST_BYTES", 1024)
    monkeypatch.setattr(recorder, "_SEGMENT_BYTES", 2048)
    monkeypatch.setattr(recorder, "_BATCH_BYTES", 1024)
    return lambda: sum(counts)


class Meddling(nn.Module):
    """Does to early parameters what constructors do: initialise again, in part, compute from, scale, drop, tie."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(24))
        nn.init.normal_(self.layers[0].weight, std=0.02)
        with torch.no_grad():
            self.layers[1].weight[3].fill_(7.0)
            self.layers[2].weight.mul_(0.5)
            self.layers[3].weight[:4].normal_()
            self.norm = nn.Parameter(self.layers[4].weight.norm(dim=0))
            self.layers[5].weight.copy_(torch.eye(16))
            self.layers[6].weight /= self.layers[6].weight.sum()
        self.layers[7] = nn.Identity()
        self.layers[8].weight = self.layers[9].weight
        self.product = nn.Parameter(self.layers[10].weight.data @ self.layers[11].weight.data)
        nn.init.orthogonal_(self.layers[12].weight)


class Reinitialising(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(24))
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def build(model, dtype):
    with fastinit.on("cpu", dtype, seed=3) as report:
        built = model()
    return built.state_dict(), report


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [Meddling, Reinitialising])
def test_early_fills_leave_the_values_as_they_are(model, dtype, request):
    expected, _ = build(model, dtype)
    count = request.getfixturevalue("early")
    state, _ = build(model, dtype)
    assert count() > 0
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name


def test_a_model_that_initialises_again_at_its_end_is_filled_once(early):
    _, report = build(Reinitialising, "bf16")
    assert early() > 0
    assert (report.fills_executed, report.fills_dropped) == (48, 48)


def test_memory_that_was_given_early_is_given_back_when_the_rest_does_not_fit(early):
    with pytest.raises(RuntimeError, match="no memory for a tensor of shape"):
        with fastinit.on("cpu", "bf16", seed=3):
            model = Meddling()
            model.large = nn.Linear(16, 2**46)  # more than there are addresses
    assert early() > 0
    assert all(parameter.untyped_storage().nbytes() <= 2 for parameter in model.parameters())


def test_what_a_checkpoint_will_overwrite_is_not_filled_early(early):
    def layers():
        return nn.Sequential(*(nn.Linear(16, 16) for _ in range(24)))

    def create_and_load(checkpoint):
        model = layers()
        model.load_state_dict(checkpoint)
        return model

    checkpoint = layers().state_dict()
    with fastinit.on("cpu", seed=3) as report:
        model = create_and_load(checkpoint)
    assert early() == 0 and report.fills_executed == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint[name]), name


def test_a_load_outside_of_the_context_does_not_keep_fills_from_being_early(early):
    def create():
        with fastinit.on("cpu", "bf16", seed=3):
            return nn.Sequential(*(nn.Linear(16, 16) for _ in range(24)))

    create().load_state_dict({}, strict=False)
    assert early() > 0

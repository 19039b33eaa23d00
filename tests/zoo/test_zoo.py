"""A sample of the zoo, and that it finds what is wrong; `make zoo` runs all of it."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import architectures
import compare

SAMPLE = ("convnextv2", "deberta-v2", "gemma2", "opt", "sam", "xlstm")


@pytest.mark.parametrize("mode", compare.MODES)
@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_is_what_torch_makes(name, mode):
    _, make = architectures.constructor(name)
    compare.MODES[mode](make)


def test_there_are_hundreds():
    assert len(architectures.architectures()) > 300


def faulty(change):
    """A constructor whose models are others from the third on: the comparison makes torch's two first."""
    made = []

    def make():
        model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
        made.append(model)
        if len(made) > 2:
            with torch.no_grad():
                change(model)
        return model

    return make


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda model: model[0].weight.mul_(1.3), "distributions differ: .*0.weight"),
        (lambda model: model[0].weight[:24].zero_(), "distributions differ: .*0.weight"),
        (lambda model: model[1].weight.mul_(1.5), "torch fixes differ: .*1.weight"),
        (lambda model: setattr(model[0], "bias", None), None),
        (lambda model: model[0].double(), "0.weight"),
        (lambda model: setattr(model[1], "weight", model[1].bias), None),
    ],
    ids=["scaled", "partly zero", "other constant", "without bias", "other dtype", "tied"],
)
def test_a_model_that_is_another_is_found(change, finding):
    with pytest.raises(AssertionError, match=finding):
        compare.device_mode(faulty(change))

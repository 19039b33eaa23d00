"""Computed values do not depend on how many threads torch has: a launcher gives ranks one, a plain process has all."""

import pytest
import torch
from models import WAYS, assert_same_bits, made
from torch import nn


class Computed(nn.Module):
    """What torch computes in pieces, one for each thread: decompositions, products of matrices, sums."""

    def __init__(self):
        super().__init__()
        self.orthogonal = nn.Linear(48, 192)
        nn.init.orthogonal_(self.orthogonal.weight)
        self.square = nn.utils.parametrizations.orthogonal(nn.Linear(128, 128))
        self.normalized = nn.Parameter(torch.randn(300, 700))
        with torch.no_grad():
            self.normalized.div_(self.normalized.norm()).sub_(self.normalized.mean())
        noise = torch.randn(512, 512)
        self.register_buffer("product", noise @ noise)
        self.register_buffer("spread", torch.stack([noise.sum(), noise.std(), noise.logsumexp((0, 1))]))


@pytest.fixture(autouse=True)
def number_stays():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
def test_computed_values_are_the_same_with_any_number_of_threads(way, dtype):
    torch.set_num_threads(1)
    expected = made(Computed, way, dtype)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        model = made(Computed, way, dtype)
        assert torch.get_num_threads() == threads
        assert_same_bits(model, expected)

"""A model that was made on a GPU is torch's alone: CUDA graphs, streams, optimizers, and copies to the CPU."""

import copy

import models
import pytest
import torch
from models import WAYS, assert_same_bits, built
from torch import nn

over_ways = pytest.mark.parametrize("way", WAYS)


def network():
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64))


def made(way, dtype="fp32"):
    return models.made(network, way, dtype, "cuda")


def examples(dtype=torch.float32):
    return torch.linspace(-1, 1, 8 * 64, device="cuda", dtype=dtype).view(8, 64)


@over_ways
def test_the_first_use_of_a_model_may_be_in_a_cuda_graph(way):
    model, warm = made(way), built(network, device="cuda")
    x = examples()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        warm(x)  # libraries make their handles and workspaces
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model(x)
    for scale in (1, 2):
        x.mul_(scale)
        graph.replay()
        # Close, not equal: a matrix product in a graph may be another algorithm's.
        torch.testing.assert_close(y, warm(x))
    assert_same_bits(model, warm)


@over_ways
def test_a_model_is_trained_by_a_cuda_graph(way):
    model = made(way)
    eager = copy.deepcopy(model)
    x = examples()
    graphed = torch.cuda.make_graphed_callables(model, (x.clone(),))
    for each in (graphed, eager):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.01, capturable=True)
        for _ in range(3):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    before = built(network).state_dict()
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor.cpu(), before[name]), name
        torch.testing.assert_close(tensor, eager.state_dict()[name], atol=1e-4, rtol=1e-3)


@over_ways
def test_another_stream_that_waits_sees_the_values(way):
    model = made(way, "bf16")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        copies = [parameter.detach().clone() for parameter in model.parameters()]
    side.synchronize()
    expected = built(network, "bf16")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(copies, expected.parameters(), strict=True))
    assert_same_bits(model.cpu(), expected)

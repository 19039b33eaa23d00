"""torch.compile of functions that enter a block, which run as they are written, or are called in one."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter

import fastinit


class Net(nn.Module):
    """Recorded fills, computed values, and draws that are torch's."""

    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(64.0), 1.0 / 10000 ** (torch.arange(0, 32, 2).float() / 32))
        self.register_buffer("cos", angles.cos())
        self.weight = nn.Parameter(torch.rand(7, 5).log().mul(3).sin())
        self.mixture = nn.Parameter(torch.distributions.Dirichlet(torch.ones(4)).sample())
        self.layer = nn.Linear(4, 4)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing of an earlier test is compiled, or known to be no graph."""
    torch._dynamo.reset()


def assert_eager(model):
    with fastinit.on("cpu", "bf16", seed=0):
        expected = Net()
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor) and model.state_dict()[name].dtype == tensor.dtype, name
    assert all(type(each) is nn.Parameter for each in model.parameters())


def in_a_block():
    with fastinit.on("cpu", "bf16", seed=0):
        return Net()


def in_a_function_that_it_calls():
    return in_a_block()


context = fastinit.on("cpu", "bf16", seed=0)


def in_a_context_from_outside():
    with context:
        return Net()


def in_an_inner_block():
    with fastinit.on("cpu", "fp16", seed=1), fastinit.on("cpu", "bf16", seed=0):
        return Net()


@fastinit.on("cpu", "bf16", seed=0)
def in_a_decorated_function():
    return Net()


WAYS = [in_a_block, in_a_function_that_it_calls, in_a_context_from_outside, in_an_inner_block, in_a_decorated_function]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("create", WAYS)
def test_a_compiled_function_that_enters_a_block_gives_the_eager_bits(create):
    counter = CompileCounter()
    compiled = torch.compile(create, backend=counter)
    for _ in range(2):
        assert_eager(compiled())
    assert counter.frame_count == 0, "nothing of the block is a graph"


@pytest.mark.parametrize("create", [in_a_block, in_a_function_that_it_calls, in_a_decorated_function])
def test_a_whole_graph_of_it_is_refused_with_the_reason(create):
    with pytest.raises(Unsupported, match="a fastinit block creates a model, which is run as it is written"):
        torch.compile(create, backend="eager", fullgraph=True)()
    assert_eager(create())


def test_what_is_before_and_behind_the_block_is_compiled():
    def create(x):
        y = x.sin() + 1
        model = in_a_block()
        return model, y.cos() * 2

    counter = CompileCounter()
    x = torch.arange(4.0)
    model, y = torch.compile(create, backend=counter)(x)
    assert_eager(model)
    assert torch.equal(y, (x.sin() + 1).cos() * 2)
    assert (counter.frame_count, counter.op_count) == (2, 4)


def of_a_layer(x):
    return nn.Linear(3, 3)(x).detach()


CALLED = [lambda x: x * 2 + torch.ones(3), lambda x: x @ torch.eye(3), of_a_layer]


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_was_compiled_before_gives_the_eager_bits_in_a_block(called, dtype):
    compiled = torch.compile(called, backend="eager")
    compiled(torch.ones(3))

    def run(function):
        with fastinit.on("cpu", dtype, seed=0):
            return function(torch.ones(3))

    ours, eager = run(compiled), run(called)
    assert ours.dtype == eager.dtype and torch.equal(ours, eager)


def raising():
    with fastinit.on("cpu", seed=0):
        raise ValueError("of the constructor")


def refused():
    with fastinit.on("cuda:99"):
        raise AssertionError("there are no hundred GPUs")


@pytest.mark.parametrize(("create", "error"), [(raising, ValueError), (refused, RuntimeError)])
def test_an_error_leaves_compiling_as_it_was(create, error):
    def caught(x):
        try:
            create()
        except error:
            pass
        return double(x)

    def double(x):
        return x * 2

    counter = CompileCounter()
    assert torch.equal(torch.compile(caught, backend=counter)(torch.ones(2)), torch.full((2,), 2.0))
    assert counter.frame_count == 1

"""Random constructors: sequences of factories, inits, arithmetic, views, reads and registrations.

A program runs four ways: with torch alone in fp32, its random fills replaced by `fastinit.fill_` on the streams that
the contract gives them; inside `fastinit.on` in fp32, which must give the same bits; inside it in half precision,
which must give those values rounded once; and with torch alone in half precision, which decides the dtypes.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import DTYPES, SEED, default_dtype, registered
from torch import nn
from torch.nn import init

import fastinit

SIDE = 5  # every tensor is a matrix of this side, a vector of this length or a scalar, so that all broadcast
SHAPES = ((SIDE, SIDE), (SIDE,), ())


class Random:
    """The random fills as a constructor writes them."""

    def fill(self, tensor, call, distribution):
        call(tensor)

    def make(self, make, shape, distribution, dtype=None):
        return make(shape, dtype=dtype)


class OnStreams(Random):
    """The same fills by `fastinit.fill_`, numbered in program order."""

    def __init__(self):
        self.stream = -1

    def fill(self, tensor, call, distribution):
        self.stream += 1
        fastinit.fill_(tensor, distribution, seed=SEED, stream=self.stream)

    def make(self, make, shape, distribution, dtype=None):
        self.stream += 1
        return fastinit.fill_(torch.empty(shape, dtype=dtype), distribution, seed=SEED, stream=self.stream)


# Operations: name -> function of (state, tensor, other tensor, index, value), which returns a new tensor or None. A
# tensor is any earlier one, `index` an integer below SIDE and `value` a float; an operation ignores what it needs not.

OPERATIONS = {}


def operation(function):
    OPERATIONS[function.__name__] = function
    return function


# Factories


@operation
def zeros(state, tensor, other, index, value):
    return torch.zeros(SHAPES[index % 3])


@operation
def ones_like(state, tensor, other, index, value):
    return torch.ones_like(tensor)


@operation
def full(state, tensor, other, index, value):
    return torch.full(SHAPES[index % 3], value)


@operation
def full_like(state, tensor, other, index, value):
    return torch.full_like(tensor, value)


@operation
def new_full(state, tensor, other, index, value):
    return tensor.new_full(SHAPES[index % 3], value)


@operation
def new_zeros(state, tensor, other, index, value):
    return tensor.new_zeros(SHAPES[index % 3])


@operation
def legacy_constructor(state, tensor, other, index, value):
    return torch.Tensor(SIDE, SIDE).fill_(value)


@operation
def from_list(state, tensor, other, index, value):
    return torch.tensor([value * k + 0.1 for k in range(SIDE)])


@operation
def scalar(state, tensor, other, index, value):
    return torch.tensor(value)


@operation
def named_scalar(state, tensor, other, index, value):
    return torch.tensor(value, dtype=torch.float32)


@operation
def named_single(state, tensor, other, index, value):
    return torch.full(SHAPES[index % 3], value, dtype=torch.float32)


@operation
def named_double(state, tensor, other, index, value):
    return torch.linspace(-1, value, SIDE, dtype=torch.float64)


@operation
def float_tensor(state, tensor, other, index, value):
    return torch.FloatTensor([value] * SIDE)


@operation
def linspace(state, tensor, other, index, value):
    return torch.linspace(0, value, SIDE)


@operation
def arange(state, tensor, other, index, value):
    return torch.arange(SIDE) + index


@operation
def arange_of_floats(state, tensor, other, index, value):
    return torch.arange(0.0, SIDE)


@operation
def eye(state, tensor, other, index, value):
    return torch.eye(SIDE) * value


@operation
def triangle(state, tensor, other, index, value):
    return torch.full((SIDE, SIDE), value).triu(1)


@operation
def default_dtype_by_name(state, tensor, other, index, value):
    return torch.full(SHAPES[index % 3], value, dtype=torch.get_default_dtype())


@operation
def rand(state, tensor, other, index, value):
    return state.random.make(torch.rand, SHAPES[index % 3], fastinit.Uniform())


@operation
def randn(state, tensor, other, index, value):
    return state.random.make(torch.randn, SHAPES[index % 3], fastinit.Normal())


@operation
def named_randn(state, tensor, other, index, value):
    return state.random.make(torch.randn, SHAPES[index % 3], fastinit.Normal(), torch.float32)


# Inits


@operation
def uniform_(state, tensor, other, index, value):
    low, high = min(value, 0.5), max(value, 0.5)
    state.random.fill(tensor, lambda t: t.uniform_(low, high), fastinit.Uniform(low, high))


@operation
def normal_(state, tensor, other, index, value):
    state.random.fill(tensor, lambda t: init.normal_(t, value, 0.02), fastinit.Normal(value, 0.02))


@operation
def trunc_normal_(state, tensor, other, index, value):
    distribution = fastinit.TruncatedNormal(0.0, 0.5, -abs(value) - 0.1, 0.7)
    state.random.fill(tensor, lambda t: init.trunc_normal_(t, 0.0, 0.5, -abs(value) - 0.1, 0.7), distribution)


@operation
def normal_rows(state, tensor, other, index, value):
    rows = tensor[: index + 1] if tensor.dim() else tensor
    state.random.fill(rows, lambda t: init.normal_(t, value, 0.02), fastinit.Normal(value, 0.02))


@operation
def uniform_column(state, tensor, other, index, value):
    column = tensor.t()[index : index + 2] if tensor.dim() == 2 else tensor
    state.random.fill(column, lambda t: t.uniform_(), fastinit.Uniform())


@operation
def constant_(state, tensor, other, index, value):
    init.constant_(tensor, value)


@operation
def zero_data(state, tensor, other, index, value):
    tensor.data.zero_()


@operation
def fill_row(state, tensor, other, index, value):
    (tensor[index] if tensor.dim() else tensor).fill_(value)


@operation
def set_item(state, tensor, other, index, value):
    if tensor.dim() == 2:
        tensor[:, index] = value
    elif tensor.dim() == 1:
        tensor[index] = value


@operation
def set_items_by_list(state, tensor, other, index, value):
    if tensor.dim():
        tensor[[0, index]] = value


@operation
def fill_diagonal(state, tensor, other, index, value):
    if tensor.dim() == 2:
        tensor.diagonal().fill_(value)


@operation
def masked_fill_(state, tensor, other, index, value):
    tensor.masked_fill_(tensor > value, 0.25)


# Arithmetic


@operation
def mul_(state, tensor, other, index, value):
    tensor.mul_(value)


@operation
def add_(state, tensor, other, index, value):
    tensor.add_(value)


@operation
def subtract_in_place(state, tensor, other, index, value):
    tensor -= value


@operation
def div_(state, tensor, other, index, value):
    tensor.div_(3 + abs(value))


@operation
def clamp_(state, tensor, other, index, value):
    tensor.clamp_(-abs(value), 0.9)


@operation
def row_mul_(state, tensor, other, index, value):
    (tensor[index] if tensor.dim() else tensor).mul_(value)


@operation
def scaled(state, tensor, other, index, value):
    return tensor * value


@operation
def shifted(state, tensor, other, index, value):
    return value - tensor


@operation
def divided_by_a_list(state, tensor, other, index, value):
    return tensor / (index + 1)


@operation
def sine(state, tensor, other, index, value):
    return torch.sin(tensor)


@operation
def root(state, tensor, other, index, value):
    return tensor.abs().sqrt()


@operation
def power(state, tensor, other, index, value):
    return (1 + abs(value)) ** tensor.clamp(-3, 3)


@operation
def cumulative_sum(state, tensor, other, index, value):
    return tensor.cumsum(0) if tensor.dim() else None


@operation
def total(state, tensor, other, index, value):
    return tensor.sum()


@operation
def sum_of_two(state, tensor, other, index, value):
    return tensor + other


@operation
def product(state, tensor, other, index, value):
    return tensor * other


@operation
def greater(state, tensor, other, index, value):
    return torch.where(tensor > value, tensor, other)


@operation
def outer(state, tensor, other, index, value):
    return torch.outer(tensor, other) if tensor.dim() == other.dim() == 1 else None


@operation
def stack(state, tensor, other, index, value):
    return torch.stack([tensor] * SIDE) if tensor.dim() == 1 else None


@operation
def add_tensor_(state, tensor, other, index, value):
    if other.dim() <= tensor.dim() and other.is_floating_point():
        tensor.add_(other)


@operation
def copy_(state, tensor, other, index, value):
    if other.dim() <= tensor.dim():
        tensor.copy_(other)


# Views, copies, conversions


@operation
def row(state, tensor, other, index, value):
    return tensor[index] if tensor.dim() else None


@operation
def column(state, tensor, other, index, value):
    return tensor[:, index] if tensor.dim() == 2 else None


@operation
def transposed(state, tensor, other, index, value):
    return tensor.t()


@operation
def data(state, tensor, other, index, value):
    return tensor.data


@operation
def detached(state, tensor, other, index, value):
    return tensor.detach()


@operation
def cloned(state, tensor, other, index, value):
    return tensor.clone()


@operation
def contiguous(state, tensor, other, index, value):
    return tensor.contiguous()


@operation
def deep_copied(state, tensor, other, index, value):
    return copy.deepcopy(tensor)


@operation
def expanded(state, tensor, other, index, value):
    return tensor.expand(SIDE, SIDE).clone()


@operation
def as_single(state, tensor, other, index, value):
    # A copy in any case: torch returns a tensor that has the dtype itself, so what is one tensor in an fp32 model
    # would be two in half precision.
    return tensor.to(torch.float32, copy=True)


@operation
def as_double(state, tensor, other, index, value):
    return tensor.to(torch.float64, copy=True)


@operation
def as_other(state, tensor, other, index, value):
    return tensor.to(other.dtype, copy=True)


@operation
def as_default(state, tensor, other, index, value):
    return tensor.to(torch.get_default_dtype(), copy=True)


# Reads


@operation
def read_a_sum(state, tensor, other, index, value):
    return torch.full(SHAPES[index % 3], tensor.double().sum().item())


@operation
def read_an_element(state, tensor, other, index, value):
    return other * float(tensor.flatten()[0])


@operation
def read_a_list(state, tensor, other, index, value):
    return torch.tensor([float(x) for x in tensor.flatten()[:SIDE].tolist()] * SIDE)[:SIDE]


@operation
def read_a_condition(state, tensor, other, index, value):
    if (tensor > value).any():
        return torch.ones(SIDE) * value


@operation
def read_as_text(state, tensor, other, index, value):
    repr(tensor)


# Registrations


@operation
def parameter(state, tensor, other, index, value):
    if tensor.is_floating_point():
        made = nn.Parameter(tensor)
        state.module.register_parameter(f"p{len(list(state.module.parameters()))}", made)
        return made


@operation
def buffer(state, tensor, other, index, value):
    name = f"b{len(state.module._buffers)}"
    state.module.register_buffer(name, tensor, persistent=index % 2 == 0)
    return state.module.get_buffer(name)


@operation
def replace_data(state, tensor, other, index, value):
    if tensor.shape == other.shape:
        tensor.data = other.to(tensor.dtype, copy=True)


NEEDS_FLOAT = {
    *"uniform_ normal_ trunc_normal_ normal_rows uniform_column constant_ fill_row set_item set_items_by_list".split(),
    *"fill_diagonal masked_fill_ mul_ add_ subtract_in_place div_ clamp_ row_mul_ add_tensor_ copy_ full_like".split(),
    *"new_full replace_data zero_data".split(),
}
RANDOM = {"uniform_", "normal_", "trunc_normal_", "normal_rows", "uniform_column"}


class State:
    """What operations write to: the module that they register in, and the way to random values."""

    def __init__(self, module, random):
        self.module, self.random = module, random


class Program(nn.Module):
    """Runs steps of (operation, tensor, other tensor, index, value) and registers all that is left."""

    def __init__(self, steps, random):
        super().__init__()
        state = State(self, random)
        tensors = [torch.zeros(SIDE, SIDE), torch.ones(SIDE)]
        with torch.no_grad():
            for name, first, second, index, value in steps:
                tensor, other = tensors[first % len(tensors)], tensors[second % len(tensors)]
                if name in NEEDS_FLOAT and not tensor.is_floating_point():
                    continue
                if name in RANDOM and tensor.dtype == torch.float64:
                    continue  # no stream is specified for fp64
                made = OPERATIONS[name](state, tensor, other, index, value)
                if made is not None:
                    tensors.append(made)
            for k, tensor in enumerate(tensors):
                self.register_buffer(f"last{k}", tensor)


def with_streams(steps, dtype):
    with default_dtype(dtype):
        return Program(steps, OnStreams())


def inside(steps, dtype):
    with fastinit.on("cpu", dtype, seed=SEED):
        return Program(steps, Random())


def differences(ours, theirs):
    """Return the names whose values in `ours` are not those in `theirs`, converted to the dtype in ours."""
    theirs = registered(theirs)
    wrong = []
    for name, tensor in registered(ours).items():
        expected = theirs[name].detach().to(tensor.dtype)
        tensor = tensor.detach()
        same = (tensor == expected) & (tensor.signbit() == expected.signbit()) | tensor.isnan() & expected.isnan()
        if tensor.shape != expected.shape or not same.all():
            wrong.append((name, tensor, expected))
    return wrong


def kinds(module):
    """Describe what is registered. Whether views of parameters are leaves depends on how torch.no_grad is nested."""
    description = {n: ("parameter", tuple(p.shape), p.dtype, p.requires_grad) for n, p in module._parameters.items()}
    for name, tensor in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set
        description[name] = ("buffer", tuple(tensor.shape), tensor.dtype, persistent)
    return description


VALUES = st.sampled_from([0.1, -0.7, 1 / 3, 2.0, 0.0, -1.5, 3.14159, 1e-3]) | st.floats(-3, 3, width=32)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(sorted(OPERATIONS)),
        st.integers(0, 30),
        st.integers(0, 30),
        st.integers(0, SIDE - 1),
        VALUES,
    ),
    min_size=1,
    max_size=25,
)
thoroughly = settings(
    max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@thoroughly
@given(STEPS)
def test_a_program_gives_torchs_values_in_fp32_with_its_fills_on_their_streams(steps):
    assert not differences(inside(steps, "fp32"), with_streams(steps, torch.float32))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@thoroughly
@given(STEPS)
def test_a_program_in_half_precision_gives_the_fp32_values_rounded_once(dtype, steps):
    assert not differences(inside(steps, dtype), inside(steps, "fp32"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@thoroughly
@given(STEPS)
def test_a_program_gives_every_tensor_the_dtype_that_it_has_in_torch(dtype, steps):
    assert kinds(inside(steps, dtype)) == kinds(with_streams(steps, DTYPES[dtype]))

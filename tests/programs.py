"""Random programs as constructors write them, and the eager reference that fills at once.

A program is a list of steps (operation, tensor, other tensor, index, value). The same code runs inside `fastinit.on`
and, as the oracle, inside `Eager`, which is torch itself except that each random fill is a `fastinit.fill_` there and
then, on the stream that the contract gives it. test_programs.py says what has to be equal.
"""

import copy
import math
from unittest import mock

import torch
from models import SEED
from torch import nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

import fastinit

SIDE = 5  # every tensor is a matrix of this side, a vector of this length or a scalar, so that all broadcast
SHAPES = ((SIDE, SIDE), (SIDE,), ())


class Eager(TorchFunctionMode):
    """Torch with its random fills on the streams of a context, each executed when it is called."""

    def __init__(self, seed=SEED):
        super().__init__()
        self.seed, self.stream = seed, -1
        self.patch = mock.patch.object(init, "trunc_normal_", self.trunc_normal_)

    def __enter__(self):
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.stop()
        super().__exit__(*exception)

    def fill(self, tensor, distribution):
        self.stream += 1
        fastinit.fill_(tensor, distribution, seed=self.seed, stream=self.stream)
        torch.autograd.graph.increment_version(tensor)
        return tensor

    def trunc_normal_(self, tensor, mean=0.0, std=1.0, a=-2.0, b=2.0):
        return self.fill(tensor, fastinit.TruncatedNormal(mean, std, a, b))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.uniform_, init.uniform_):
            return self.fill(*uniform(*args, **kwargs))
        if func in (torch.Tensor.normal_, init.normal_):
            return self.fill(*normal(*args, **kwargs))
        if func is init.kaiming_uniform_:
            return self.fill(*kaiming(*args, **kwargs))
        if func in (torch.rand, torch.rand_like):
            return self.fill(EMPTY[func](*args, **kwargs), fastinit.Uniform())
        if func in (torch.randn, torch.randn_like):
            return self.fill(EMPTY[func](*args, **kwargs), fastinit.Normal())
        return func(*args, **kwargs)


def uniform(tensor, a=0.0, b=1.0, generator=None):
    return tensor, fastinit.Uniform(a, b)


def normal(tensor, mean=0.0, std=1.0, generator=None):
    return tensor, fastinit.Normal(mean, std)


def kaiming(tensor, a=0, mode="fan_in", nonlinearity="leaky_relu", generator=None):
    fan = init._calculate_correct_fan(tensor, mode)
    bound = math.sqrt(3.0) * (init.calculate_gain(nonlinearity, a) / math.sqrt(fan))
    return tensor, fastinit.Uniform(-bound, bound)


EMPTY = {
    torch.rand: torch.empty,
    torch.randn: torch.empty,
    torch.rand_like: torch.empty_like,
    torch.randn_like: torch.empty_like,
}

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
    return torch.rand(SHAPES[index % 3])


@operation
def randn(state, tensor, other, index, value):
    return torch.randn(SHAPES[index % 3])


@operation
def named_randn(state, tensor, other, index, value):
    return torch.randn(SHAPES[index % 3], dtype=torch.float32)


# Inits


@operation
def uniform_(state, tensor, other, index, value):
    low, high = min(value, 0.5), max(value, 0.5)
    tensor.uniform_(low, high)


@operation
def normal_(state, tensor, other, index, value):
    init.normal_(tensor, value, 0.02)


@operation
def trunc_normal_(state, tensor, other, index, value):
    init.trunc_normal_(tensor, 0.0, 0.5, -abs(value) - 0.1, 0.7)


@operation
def normal_rows(state, tensor, other, index, value):
    rows = tensor[: index + 1] if tensor.dim() else tensor
    init.normal_(rows, value, 0.02)


@operation
def uniform_column(state, tensor, other, index, value):
    column = tensor.t()[index : index + 2] if tensor.dim() == 2 else tensor
    column.uniform_()


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
    """What operations share: the module that they register in."""

    def __init__(self, module):
        self.module = module


class Program(nn.Module):
    """Runs steps of (operation, tensor, other tensor, index, value) and registers all that is left."""

    def __init__(self, steps):
        super().__init__()
        state = State(self)
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

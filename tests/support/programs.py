"""Random programs as constructors write them, and the eager reference that fills at once.

A program is a list of steps (operation, tensor, other tensor, index, value). The same code runs inside `fastinit.on`
and, as the oracle, inside `Eager`, which is torch itself except that each random fill is a `fastinit.fill_` there and
then, on the stream that the contract gives it. test_programs.py says what has to be equal.
"""

import concurrent.futures
import contextlib
import copy
import io
import math
import pickle
import warnings
from unittest import mock

import torch
from models import SEED
from torch import nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

import fastinit
from fastinit.record.generator import mix

SIDE = 5  # every tensor is a matrix of this side, a vector of this length or a scalar, so that all broadcast
SHAPES = ((SIDE, SIDE), (SIDE,), ())


class Eager(TorchFunctionMode):
    """Torch with its random fills on the streams of a context, each executed when it is called.

    What is no such fill draws from torch's generator, which the key seeds. Once the program has set a seed, streams are
    draws of that generator, and the key is 0.
    """

    def __init__(self, seed=SEED):
        super().__init__()
        self.seed, self.stream = seed, -1
        self.patches = [
            mock.patch.object(init, "trunc_normal_", self.trunc_normal_),
            mock.patch.object(torch, "get_rng_state", self.get_rng_state),
            mock.patch.object(torch, "set_rng_state", self.set_rng_state),
        ]

    def __enter__(self):
        self.outside = torch.default_generator.get_state()
        torch.default_generator.manual_seed(mix(self.seed, 0))
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        for patch in reversed(self.patches):
            patch.stop()
        super().__exit__(*exception)
        torch.default_generator.set_state(self.outside)

    def get_rng_state(self):
        return self.stream, torch.default_generator.get_state()

    def set_rng_state(self, state):
        self.stream = state[0]
        torch.default_generator.set_state(state[1])

    def next_stream(self):
        if torch.default_generator.initial_seed() == mix(self.seed, 0):
            self.stream += 1
            return self.seed, self.stream
        with torch._C.DisableTorchFunction():
            return 0, torch.empty((), dtype=torch.int64).random_(-(2**63), None).item() % 2**64

    def fill(self, tensor, distribution):
        seed, stream = self.next_stream()
        try:
            fastinit.fill_(tensor, distribution, seed=seed, stream=stream)
        except ValueError as error:
            raise RuntimeError("elements share memory") from error  # what torch raises for them
        torch.autograd.graph.increment_version(tensor)
        return tensor

    def trunc_normal_(self, tensor, mean=0.0, std=1.0, a=-2.0, b=2.0):
        return self.fill(tensor, fastinit.TruncatedNormal(mean, std, a, b))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func in (torch.Tensor.uniform_, torch.Tensor.normal_) and torch.is_grad_enabled() and args[0].requires_grad:
            return func(*args, **kwargs)  # which raises; the functions of init write under torch.no_grad
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
    if 0 not in tensor.stride():  # an error of its body comes after the first of its fills
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
def cloned_in_another_shape(state, tensor, other, index, value):
    flat = tensor.reshape(1, -1).clone()
    state.facts.append(tuple(flat.shape))
    return flat.view(tensor.shape)


@operation
def product_in_another_shape(state, tensor, other, index, value):
    flat = tensor.detach().reshape(-1, 1) * value
    state.facts.append(tuple(flat.shape))
    return flat.view(tensor.shape)


@operation
def copied_in_another_shape(state, tensor, other, index, value):
    flat = torch.empty(1, tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(1, -1))
    return flat.view(tensor.shape)


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


@operation
def flat(state, tensor, other, index, value):
    return tensor.view(-1)[index : index + SIDE] if tensor.dim() == 2 and tensor.is_contiguous() else None


@operation
def diagonal(state, tensor, other, index, value):
    return tensor.diagonal() if tensor.dim() == 2 else None


@operation
def narrowed(state, tensor, other, index, value):
    return tensor.narrow(0, index, 1).squeeze(0) if tensor.dim() else None


@operation
def unbound(state, tensor, other, index, value):
    return tensor.unbind(-1)[index] if tensor.dim() else None


@operation
def chunked(state, tensor, other, index, value):
    return tensor.chunk(SIDE)[index].reshape(tensor.shape[1:]) if tensor.dim() else None


@operation
def strided(state, tensor, other, index, value):
    return tensor.as_strided((SIDE,), (SIDE + 1,)) if tensor.dim() == 2 and tensor.is_contiguous() else None


@operation
def expanded_view(state, tensor, other, index, value):
    return tensor.expand(SIDE, SIDE) if tensor.dim() < 2 else tensor[None].squeeze(0)


@operation
def normal_through_a_chunk(state, tensor, other, index, value):
    part = tensor.chunk(2)[index % 2] if tensor.dim() else tensor
    init.normal_(part, value, 0.5)


@operation
def same_again(state, tensor, other, index, value):
    return tensor


@operation
def forget(state, tensor, other, index, value):
    if len(state.tensors) > 2:
        del state.tensors[index % len(state.tensors)]


@operation
def swap_values(state, tensor, other, index, value):
    if tensor.shape == other.shape:
        kept = tensor.clone()
        tensor.copy_(other)
        other.copy_(kept)


# Modules


MAKERS = (
    lambda: nn.Linear(SIDE, SIDE),
    lambda: nn.Embedding(SIDE, SIDE, padding_idx=1),
    lambda: nn.BatchNorm1d(SIDE),
    lambda: nn.Sequential(nn.Linear(SIDE, SIDE, bias=False), nn.LayerNorm(SIDE)),
    lambda: nn.RNNCell(SIDE, SIDE),
)


@operation
def child(state, tensor, other, index, value):
    made = MAKERS[index]()
    state.add_child(made)
    return next(made.parameters())


def last_child(state):
    children = list(state.module.children())
    return children[-1] if children else nn.Module()


def decidable_child(state):
    child = last_child(state)
    return child if decidable(*child.state_dict().values()) else nn.Module()


@operation
def deep_copied_child(state, tensor, other, index, value):
    state.add_child(copy.deepcopy(last_child(state)))


@operation
def drop_child(state, tensor, other, index, value):
    for name, _ in list(state.module.named_children())[-1:]:
        delattr(state.module, name)


@operation
def tie(state, tensor, other, index, value):
    for module in last_child(state).modules():
        if "weight" in module._parameters and isinstance(tensor, nn.Parameter):
            module.weight = tensor


@operation
def tie_a_name(state, tensor, other, index, value):
    if isinstance(tensor, nn.Parameter):
        setattr(state.module, f"tie{index}", tensor)


@operation
def drop_a_name(state, tensor, other, index, value):
    for name in list(state.module._parameters)[index : index + 1]:
        delattr(state.module, name)


@operation
def drop_a_buffer(state, tensor, other, index, value):
    for name in list(state.module._buffers)[index : index + 1]:
        delattr(state.module, name)


@operation
def apply_init(state, tensor, other, index, value):
    def initialize(module):
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.dtype != torch.float64:
            init.normal_(module.weight, 0.0, 0.02)
            if getattr(module, "bias", None) is not None:
                init.constant_(module.bias, value)

    last_child(state).apply(initialize)


@operation
def weight_data(state, tensor, other, index, value):
    for parameter in last_child(state).parameters():
        if decidable(parameter):
            parameter.data.mul_(value)


@operation
def requires_grad(state, tensor, other, index, value):
    last_child(state).requires_grad_(index % 2 == 0)
    if isinstance(tensor, nn.Parameter):  # torch lets go of few views that were made under torch.no_grad
        tensor.requires_grad_(index < 2)


@operation
def child_in_half(state, tensor, other, index, value):
    last_child(state).half()


@operation
def child_in_double(state, tensor, other, index, value):
    decidable_child(state).double()


@operation
def load_state(state, tensor, other, index, value):
    child = last_child(state)
    child.load_state_dict({name: torch.full_like(each, value) for name, each in child.state_dict().items()})


@operation
def attribute(state, tensor, other, index, value):
    state.module.__dict__[f"attribute{index}"] = tensor


@operation
def attribute_read(state, tensor, other, index, value):
    return state.module.__dict__.get(f"attribute{index}")


# Saved and loaded, moves, autograd


@operation
def pickled(state, tensor, other, index, value):
    return pickle.loads(pickle.dumps(tensor))


@operation
def saved(state, tensor, other, index, value):
    file = io.BytesIO()
    torch.save({"a": tensor, "b": tensor}, file)
    file.seek(0)
    loaded = torch.load(file)
    state.facts.append(loaded["a"] is loaded["b"])
    return loaded["a"]


@operation
def saved_child(state, tensor, other, index, value):
    file = io.BytesIO()
    torch.save(last_child(state).state_dict(), file)
    file.seek(0)
    state.seen.append(list(torch.load(file).items()))


@operation
def shallow_copied(state, tensor, other, index, value):
    return copy.copy(tensor)


@operation
def child_in_single(state, tensor, other, index, value):
    decidable_child(state).float()


@operation
def child_to_a_dtype(state, tensor, other, index, value):
    decidable_child(state).to(torch.get_default_dtype())


@operation
def child_to_the_device(state, tensor, other, index, value):
    last_child(state).to("cpu")


@operation
def train_or_not(state, tensor, other, index, value):
    last_child(state).train(index % 2 == 0)


@operation
def zero_grad(state, tensor, other, index, value):
    last_child(state).zero_grad()


@operation
def normal_under_inner_no_grad(state, tensor, other, index, value):
    with torch.enable_grad(), torch.no_grad():
        tensor.normal_(value, 0.1)


@operation
def parameter_under_grad(state, tensor, other, index, value):
    with torch.enable_grad():
        made = nn.Parameter(tensor.detach().clone(), requires_grad=index % 2 == 0)
        return (made * value).detach()


@operation
def fresh_parameter(state, tensor, other, index, value):
    with torch.enable_grad():
        made = nn.Parameter(torch.empty(SHAPES[index % 2]))
        init.normal_(made, value, 0.02)
    state.module.register_parameter(f"fresh{index}", made)
    return made


@operation
def data_of_another(state, tensor, other, index, value):
    if tensor.shape == other.shape and tensor.dtype == other.dtype:
        tensor.data = other.data


@operation
def set_nothing(state, tensor, other, index, value):
    state.module.register_buffer(f"nothing{index}", None)


@operation
def parameter_list(state, tensor, other, index, value):
    if tensor.is_floating_point():
        state.add_child(nn.ParameterList([tensor, other.detach().clone()] if other.is_floating_point() else [tensor]))


# Contexts in the context. Each has a key and a count of streams of its own, and ends, here by an error, before the
# outer one goes on.


class Ended(Exception):
    """The error that ends a context within the program's."""


def in_a_context(state, index, run, *dtype):
    """Run `run` in a context of its own, or in the eager reference to it; `index` odd: an error ends it."""
    with contextlib.suppress(Ended), state.context(SEED + 1 + index, *dtype):
        run()
        if index % 2:
            raise Ended


@operation
def inner_linear(state, tensor, other, index, value):
    in_a_context(state, index, lambda: state.add_child(nn.Linear(SIDE, SIDE)))
    return last_child(state).weight


@operation
def inner_linear_in_another_dtype(state, tensor, other, index, value):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
    in_a_context(state, index, lambda: state.add_child(nn.Linear(SIDE, SIDE)), dtype)
    state.tensors.append(torch.full((SIDE,), value))
    return last_child(state).weight


@operation
def inner_tensors(state, tensor, other, index, value):
    def run():
        state.tensors.append(torch.randn(SIDE, SIDE).mul_(value))
        state.tensors.append(torch.full(SHAPES[index % 3], value))

    in_a_context(state, index, run)


@operation
def inner_fill_of_the_outer(state, tensor, other, index, value):
    in_a_context(state, index, lambda: init.normal_(tensor, value, 0.02))


@operation
def inner_read_of_the_outer(state, tensor, other, index, value):
    in_a_context(state, index, lambda: state.seen.append((tensor.tolist(), (other * value).tolist())))


@operation
def inner_in_the_inner(state, tensor, other, index, value):
    def run():
        first = nn.Linear(SIDE, SIDE)
        in_a_context(state, index + 10, lambda: state.add_child(nn.Sequential(nn.Linear(SIDE, SIDE), first)))
        init.uniform_(first.weight, 0.0, 0.5)

    in_a_context(state, index, run)


@operation
def leave(state, tensor, other, index, value):
    raise Left


# Errors: what comes after them is as if they had not been raised


@operation
def wrong_view(state, tensor, other, index, value):
    tensor.view(7)


@operation
def wrong_sum(state, tensor, other, index, value):
    tensor.add_(torch.ones(3))


@operation
def wrong_copy(state, tensor, other, index, value):
    tensor.copy_(torch.ones(7, 7))


@operation
def wrong_index(state, tensor, other, index, value):
    tensor[SIDE]


@operation
def wrong_init(state, tensor, other, index, value):
    init.xavier_uniform_(tensor[0] if tensor.dim() else tensor)


@operation
def write_to_a_leaf(state, tensor, other, index, value):
    with torch.enable_grad():
        leaf = nn.Parameter(torch.full((SIDE,), value))
        state.tensors.append(leaf)
        (leaf.zero_, leaf.uniform_, leaf.normal_, leaf.exp_, leaf.neg_)[index]()


@operation
def facts(state, tensor, other, index, value):
    state.seen.append((tensor.stride(), tensor.is_contiguous(), tensor.storage_offset()))
    state.facts.append((tuple(tensor.shape), tensor.dtype, tensor.numel(), tensor is other))


@operation
def read_a_value(state, tensor, other, index, value):
    state.seen.append((tensor.flatten()[index % tensor.numel()].item(), tensor.tolist(), torch.equal(tensor, other)))


@operation
def same_memory(state, tensor, other, index, value):
    state.facts.append(tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())


@operation
def registered_as_default(state, tensor, other, index, value):
    if tensor.is_floating_point():
        state.module.register_buffer(f"default{index}", tensor.to(torch.get_default_dtype(), copy=True))


# Operands that are data, out=, keywords, containers


@operation
def tensor_of_elements(state, tensor, other, index, value):
    element = tensor.flatten()[index % tensor.numel()]
    return torch.tensor([element, value, element, 0.5, other.flatten()[0]])


@operation
def full_of_an_element(state, tensor, other, index, value):
    return torch.full(SHAPES[index % 3], tensor.flatten()[0])


@operation
def linspace_between_elements(state, tensor, other, index, value):
    return torch.linspace(tensor.flatten()[0], other.flatten()[-1], SIDE)


@operation
def filled_with_an_element(state, tensor, other, index, value):
    tensor.fill_(other.flatten()[index % other.numel()])


@operation
def item_set_to_an_element(state, tensor, other, index, value):
    if tensor.dim():
        tensor[index] = other.flatten()[0]


@operation
def clamped_by_tensors(state, tensor, other, index, value):
    return tensor.clamp(other.min(), other.max())


@operation
def indexed_by_a_tensor(state, tensor, other, index, value):
    return tensor[torch.arange(SIDE).flip(0)] if tensor.dim() else None


@operation
def put_by_a_mask(state, tensor, other, index, value):
    if tensor.shape == other.shape and tensor.dtype == other.dtype:
        tensor[other > value] = other[other > value]


@operation
def added_into_an_empty_one(state, tensor, other, index, value):
    out = torch.empty(torch.broadcast_shapes(tensor.shape, other.shape), dtype=(tensor + other).dtype)
    return torch.add(tensor, other, out=out)


@operation
def multiplied_into_itself(state, tensor, other, index, value):
    torch.mul(tensor, value, out=tensor)


@operation
def sine_into_another(state, tensor, other, index, value):
    if tensor.shape == other.shape and tensor.dtype == other.dtype:
        torch.sin(tensor, out=other)


@operation
def stacked_into_an_empty_one(state, tensor, other, index, value):
    if tensor.shape == other.shape == (SIDE,) and tensor.dtype == other.dtype:
        out = torch.empty(0, dtype=tensor.dtype)
        return torch.stack([tensor, other] * SIDE, out=out)[:SIDE]


@operation
def added_by_keywords(state, tensor, other, index, value):
    return torch.add(input=tensor, other=other, alpha=2)


@operation
def filled_by_keywords(state, tensor, other, index, value):
    init.uniform_(tensor=tensor, a=-1.0, b=0.5)
    init.normal_(tensor, mean=0.5, std=0.1)


@operation
def sum_by_keywords(state, tensor, other, index, value):
    return torch.sum(input=tensor, dim=-1, keepdim=True).squeeze(dim=-1) if tensor.dim() else None


@operation
def for_each_in_place(state, tensor, other, index, value):
    if tensor is not other and tensor.is_floating_point() and other.is_floating_point():
        torch._foreach_mul_([tensor, other], value)


@operation
def for_each(state, tensor, other, index, value):
    if tensor.is_floating_point() and other.is_floating_point():
        return torch._foreach_add([tensor, other], 0.25)[index % 2]


@operation
def halves_exchanged(state, tensor, other, index, value):
    if tensor.dim() and tensor.dtype == other.dtype and tensor.shape == other.shape:
        return torch.cat((tensor[:2], other[2:]))


@operation
def parameters_by_name(state, tensor, other, index, value):
    if tensor.is_floating_point():
        state.add_child(nn.ParameterDict({"a": tensor, "b": torch.full((SIDE,), value)}))


@operation
def most_and_least(state, tensor, other, index, value):
    largest, at = tensor.flatten().max(dim=0)
    state.facts.append((at.dtype, largest.dtype))
    return torch.stack(torch.aminmax(tensor)).sum() + largest


@operation
def sorted_values(state, tensor, other, index, value):
    return tensor.sort(dim=-1, descending=True).values if tensor.dim() else None


# Other ways to torch: threads, transforms, scripts, subclasses, autograd


def affine(x):
    return x * 2 + 1


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scripted_affine = torch.jit.script(affine)


class Labelled(torch.Tensor):
    """A subclass without a word of its own."""


class LabelledParameter(nn.Parameter):
    """A parameter of such a class."""


@operation
def in_a_thread(state, tensor, other, index, value):
    def run():
        with torch.no_grad():
            return tensor.mul_(0.5) * value

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@operation
def scripted(state, tensor, other, index, value):
    return scripted_affine(tensor)


@operation
def mapped(state, tensor, other, index, value):
    return torch.vmap(affine)(tensor) if tensor.dim() else None


@operation
def as_a_subclass(state, tensor, other, index, value):
    labelled = tensor.as_subclass(Labelled)
    state.facts.append(type(labelled * 2).__name__)
    return labelled.as_subclass(torch.Tensor)


@operation
def parameter_of_a_subclass(state, tensor, other, index, value):
    if tensor.is_floating_point():
        made = LabelledParameter(tensor.clone(), requires_grad=index % 2 == 0)
        state.module.register_parameter(f"labelled{index}", made)
        return made


@operation
def gradient(state, tensor, other, index, value):
    if tensor.is_floating_point():
        with torch.enable_grad():
            leaf = tensor.detach().clone().requires_grad_()
            (leaf * leaf * value).sum().backward()
        return leaf.grad


@operation
def graph_of_parameters(state, tensor, other, index, value):
    with torch.enable_grad():
        made = nn.Linear(SIDE, SIDE)
        output = made(torch.full((SIDE,), value)).sum()
        state.facts.append((output.requires_grad, type(output.grad_fn).__name__))
        output.backward()
    state.add_child(made)
    return made.weight.grad


# Seeds of the program's own, states, and what is drawn from torch's generator


@operation
def seeded(state, tensor, other, index, value):
    torch.manual_seed(index)
    return torch.randn(SIDE)


@operation
def forked(state, tensor, other, index, value):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(index)
        init.normal_(tensor, 0.0, 0.5)


@operation
def replayed(state, tensor, other, index, value):
    before = torch.get_rng_state()
    first = torch.rand(SIDE)
    torch.set_rng_state(before)
    second = torch.rand(SIDE)
    state.facts.append(torch.equal(first, second))
    return first + second


@operation
def permutation(state, tensor, other, index, value):
    return tensor[torch.randperm(SIDE)] if tensor.dim() else None


@operation
def bernoulli_(state, tensor, other, index, value):
    tensor.bernoulli_(0.5)


@operation
def exponential_(state, tensor, other, index, value):
    tensor.exponential_(1 + abs(value))


@operation
def dropped_out(state, tensor, other, index, value):
    return nn.functional.dropout(tensor, 0.5) if tensor.is_floating_point() else None


@operation
def integers_drawn(state, tensor, other, index, value):
    return torch.randint(0, 9, (SIDE,)) + torch.randint_like(torch.zeros(SIDE), 9)


@operation
def drawn_by_a_generator(state, tensor, other, index, value):
    drawn = torch.rand(SIDE, generator=torch.Generator().manual_seed(index), dtype=torch.float32)
    return torch.zeros(SIDE).add_(drawn)  # in the dtype that the other tensors have


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
    *"new_full replace_data zero_data normal_through_a_chunk normal_under_inner_no_grad".split(),
    *"swap_values inner_fill_of_the_outer filled_with_an_element item_set_to_an_element put_by_a_mask".split(),
    *"multiplied_into_itself sine_into_another filled_by_keywords in_a_thread forked bernoulli_ exponential_".split(),
}
RANDOM = {
    *"uniform_ normal_ trunc_normal_ normal_rows uniform_column normal_through_a_chunk".split(),
    *"normal_under_inner_no_grad inner_fill_of_the_outer filled_by_keywords forked".split(),
}
# Whoever gets at the memory of a tensor, or asks for half precision, has values rounded from then on, which goes on in
# what is computed from them: no rounding once. So do copies of values that the program has computed in fp32. And data
# of another dtype are not shared.
ROUNDING = {
    *"copy_ swap_values replace_data".split(),
    *"same_memory data_of_another pickled saved saved_child shallow_copied".split(),
    *"inner_linear inner_linear_in_another_dtype inner_tensors inner_in_the_inner inner_fill_of_the_outer".split(),
    "inner_read_of_the_outer",
    *"as_default as_other child_in_half child_in_single child_to_a_dtype".split(),
    *"mapped as_a_subclass gradient graph_of_parameters parameter_of_a_subclass".split(),
    # They do nothing where dtypes differ, which in single precision they never do.
    *"put_by_a_mask sine_into_another stacked_into_an_empty_one halves_exchanged".split(),
}
# What may be done in an fp32 program to a tensor that it has turned into half precision: torch computes with its
# rounded values, fastinit with those before.
OF_HALVES = {
    *"uniform_ normal_ trunc_normal_ normal_rows uniform_column constant_ fill_row set_item fill_diagonal row".split(),
    *"column transposed data detached cloned contiguous parameter buffer flat diagonal narrowed unbound".split(),
    *"strided same_again forget wrong_view facts attribute deep_copied requires_grad tie tie_a_name".split(),
}


def decidable(*tensors):
    """Return whether the eager reference computes with these tensors what the contract promises."""
    halves = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    return not (halves and torch.get_default_dtype() == torch.float32)


class State:
    """What operations share.

    Attributes:
        module: that they register in.
        context: function of a seed, and of a dtype that is not the program's, that gives another context of its kind.
        tensors: that there are.
        facts: what they learnt of structure, which is the same in every precision.
        seen: values that they read.
    """

    def __init__(self, module, context):
        self.module, self.context = module, context
        self.tensors, self.facts, self.seen = [], [], []

    def start(self):
        self.tensors += [torch.zeros(SIDE, SIDE), torch.ones(SIDE)]
        return self.tensors

    def add_child(self, made):
        self.module.add_module(f"child{len(list(self.module.children()))}", made)


class Left(BaseException):
    """Raised by a program to leave its context."""


class Program(nn.Module):
    """Runs steps of (operation, tensor, other tensor, index, value) in a context and registers all that is left.

    `context` is a function of a seed that gives the context, and contexts to be entered within it.
    """

    def __init__(self, steps, context):
        super().__init__()
        state = State(self, context)
        try:
            with context(SEED):
                self.run(state, steps)
                self.register_all(state.tensors)
        except Left:
            self.register_all(state.tensors)

    def run(self, state, steps):
        tensors, self.facts, self.seen = state.start(), state.facts, state.seen
        with torch.no_grad():
            for name, first, second, index, value in steps:
                tensor, other = tensors[first % len(tensors)], tensors[second % len(tensors)]
                if name in NEEDS_FLOAT and not tensor.is_floating_point():
                    continue
                if name in RANDOM and tensor.dtype == torch.float64:
                    continue  # no stream is specified for fp64
                if name not in OF_HALVES and not decidable(tensor, other):
                    continue
                try:
                    made = OPERATIONS[name](state, tensor, other, index, value)
                except Exception as error:  # torch's; the program goes on, and has to raise it in all ways
                    state.facts.append((name, type(error).__name__))
                    continue
                if made is not None:
                    tensors.append(made)

    def register_all(self, tensors):
        for k, tensor in enumerate(tensors):
            self.register_buffer(f"last{k}", tensor)

"""Random constructors: sequences of factories, inits, arithmetic, views, reads and registrations (programs.py).

A program runs four ways: with the eager reference in fp32; inside `fastinit.on` in fp32, which must give the same
bits; inside it in half precision, which must give those values rounded once; and with the eager reference in half
precision, which decides the dtypes.
"""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import DTYPES, HALVES, SEED, assert_same_bits, built, classes, default_dtype, registered, same_bits, ties
from programs import OPERATIONS, ROUNDING, SIDE, Eager, Program
from torch import nn

import fastinit


def eagerly(steps, dtype):
    @contextlib.contextmanager
    def context(seed, dtype=dtype):
        with default_dtype(dtype), Eager(seed):
            yield

    return Program(steps, context)


def inside(steps, dtype):
    return Program(steps, lambda seed, dtype=dtype: fastinit.on("cpu", dtype, seed=seed))


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
    """Describe what is registered, as far as it is the same in every precision.

    Not whether a view of a parameter requires a gradient: in torch, one that is made under torch.no_grad says so.
    """
    description = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, tensor in owner._parameters.items():
            shape = None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            description[prefix, name] = "parameter", type(tensor), shape
        for name, tensor in owner._buffers.items():
            shape = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            description[prefix, name] = "buffer", type(tensor), shape, name not in owner._non_persistent_buffers_set
    return list(description.items()), classes(module)


def strides(module):
    return {name: tensor.stride() for name, tensor in registered(module).items()}


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


def check_in_single_precision(steps):
    """The values of torch with the fills on their streams, bit for bit."""
    ours, theirs = inside(steps, "fp32"), eagerly(steps, torch.float32)
    assert not differences(ours, theirs)
    assert kinds(ours) == kinds(theirs)
    assert ties(ours) == ties(theirs)
    assert strides(ours) == strides(theirs)
    assert ours.facts == theirs.facts
    assert repr(ours.seen) == repr(theirs.seen)


def check_in_half_precision(steps, dtype):
    """The fp32 values rounded once."""
    steps = [step for step in steps if step[0] not in ROUNDING]
    assert not differences(inside(steps, dtype), inside(steps, "fp32"))


def check_dtypes(steps, dtype):
    """The dtypes and kinds that torch gives, where its rounding decides nothing."""
    steps = [step for step in steps if step[0] != "read_a_condition"]
    ours, theirs = inside(steps, dtype), eagerly(steps, DTYPES[dtype])
    assert kinds(ours) == kinds(theirs)
    assert ties(ours) == ties(theirs)
    assert ours.facts == theirs.facts


@thoroughly
@given(STEPS)
def test_a_program_gives_torchs_values_in_fp32_with_its_fills_on_their_streams(steps):
    check_in_single_precision(steps)


@pytest.mark.parametrize("dtype", HALVES)
@thoroughly
@given(STEPS)
def test_a_program_in_half_precision_gives_the_fp32_values_rounded_once(dtype, steps):
    check_in_half_precision(steps, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@thoroughly
@given(STEPS)
def test_a_program_gives_every_tensor_the_dtype_that_it_has_in_torch(dtype, steps):
    check_dtypes(steps, dtype)


# What the programs have found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_parameter_that_has_its_values_already_is_loaded_from_tensors_that_have_not(dtype):
    with fastinit.on("cpu", dtype):
        layer = nn.LayerNorm(SIDE)
        addresses = layer.weight.data_ptr(), layer.bias.data_ptr()
        layer.load_state_dict({name: torch.full((SIDE,), 0.1) for name in layer.state_dict()})
    assert (layer.weight.data_ptr(), layer.bias.data_ptr()) == addresses
    assert torch.equal(layer.weight, torch.full((SIDE,), 0.1, dtype=DTYPES[dtype]))
    assert torch.equal(layer.bias, torch.full((SIDE,), 0.1, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("dtype", HALVES)
def test_asking_for_the_offset_of_a_tensor_does_not_round_it(dtype):
    with fastinit.on("cpu", dtype):
        buffers = nn.Module()
        thirds = torch.linspace(0.1, 1.0, 100) / 3
        assert (thirds.storage_offset(), thirds[2:].storage_offset()) == (0, 2)
        buffers.register_buffer("large", thirds * 1001)
    assert torch.equal(buffers.large, (torch.linspace(0.1, 1.0, 100) / 3 * 1001).to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_context_is_entered_while_the_outer_one_has_computed_views(dtype):
    with fastinit.on("cpu", dtype), torch.no_grad():
        thirds = torch.full((SIDE, SIDE), 1.0) / 3
        columns = thirds.t()
        columns.mul_(2)
        assert columns.flatten().tolist() == thirds.flatten().tolist()
        with fastinit.on("cpu", dtype, seed=SEED):
            inner = nn.Linear(SIDE, SIDE)
    assert_same_bits(inner, built(lambda: nn.Linear(SIDE, SIDE), dtype))
    assert same_bits(columns, (torch.full((SIDE, SIDE), 1.0) / 3 * 2).to(DTYPES[dtype]))


@pytest.mark.parametrize("like", [torch.empty_like, torch.ones_like, torch.rand_like], ids=lambda like: like.__name__)
def test_a_tensor_like_a_transposed_one_without_memory_has_its_strides(like):
    with fastinit.on("cpu"):
        columns = torch.zeros(2, 3).t()
        assert like(columns).stride() == (1, 3)
        assert like(columns, memory_format=torch.contiguous_format).stride() == (2, 1)

"""Random constructors: sequences of factories, inits, arithmetic, views, reads and registrations (programs.py).

A program runs four ways: with the eager reference in fp32; inside `fastinit.on` in fp32, which must give the same
bits; inside it in half precision, which must give those values rounded once; and with the eager reference in half
precision, which decides the dtypes.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import DTYPES, HALVES, SEED, default_dtype, registered
from programs import OPERATIONS, SIDE, Eager, Program

import fastinit


def eagerly(steps, dtype):
    with default_dtype(dtype), Eager():
        return Program(steps)


def inside(steps, dtype):
    with fastinit.on("cpu", dtype, seed=SEED):
        return Program(steps)


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


def check_in_single_precision(steps):
    """The values of torch with the fills on their streams, bit for bit."""
    assert not differences(inside(steps, "fp32"), eagerly(steps, torch.float32))


def check_in_half_precision(steps, dtype):
    """The fp32 values rounded once."""
    assert not differences(inside(steps, dtype), inside(steps, "fp32"))


def check_dtypes(steps, dtype):
    """The dtypes and kinds that torch gives."""
    assert kinds(inside(steps, dtype)) == kinds(eagerly(steps, DTYPES[dtype]))


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

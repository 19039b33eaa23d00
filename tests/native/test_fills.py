"""`fastinit.fill_` as a function of its own: many tensors in one call, and what it refuses before it writes."""

import math
import re

import pytest
import torch
from models import same_bits

import fastinit

NORMAL = fastinit.Normal(0.0, 0.02)


def test_many_tensors_in_one_call_get_what_each_gets_alone():
    shapes, dtypes = [(3, 5), (), (0, 4), (700,)], [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    what = [NORMAL, fastinit.Constant(0.3), fastinit.Uniform(), fastinit.TruncatedNormal()]
    tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    versions = [tensor._version for tensor in tensors]
    assert fastinit.fill_(tensors, what, seed=7, stream=[3, 1, 2, 2**64 - 1]) is tensors
    for tensor, distribution, stream in zip(tensors, what, (3, 1, 2, 2**64 - 1), strict=True):
        alone = fastinit.fill_(torch.empty_like(tensor), distribution, seed=7, stream=stream)
        assert same_bits(tensor, alone)
    # Autograd notices: what was saved for a backward pass has changed.
    assert all(tensor._version > before for tensor, before in zip(tensors, versions, strict=True))
    assert fastinit.fill_([], NORMAL, seed=7) == []


def test_strides_are_those_of_memory_and_not_of_the_stream():
    whole = fastinit.fill_(torch.empty(6, 4), NORMAL, seed=7)
    across = fastinit.fill_(torch.empty(4, 6).T, NORMAL, seed=7)
    spread = fastinit.fill_(torch.zeros(6, 9)[:, 1::2], NORMAL, seed=7)
    assert same_bits(across.contiguous(), whole) and same_bits(spread.contiguous(), whole)


REFUSED = {
    "complex": (TypeError, "dtype=torch.complex64", lambda: torch.zeros(3, dtype=torch.complex64), {}),
    "sparse": (TypeError, "layout=torch.sparse_coo", lambda: torch.zeros(3).to_sparse(), {}),
    "expanded": (ValueError, "shares memory between elements; clone it", lambda: torch.zeros(1, 4).expand(3, 4), {}),
    "no distribution": (TypeError, "distribution='normal'", lambda: torch.zeros(3), {"distribution": "normal"}),
    "negative seed": (ValueError, "seed is -1", lambda: torch.zeros(3), {"seed": -1}),
    "long stream": (ValueError, f"stream is {2**64}", lambda: torch.zeros(3), {"stream": 2**64}),
    "window too small": (
        ValueError,
        "does not fit into the global shape (2,)",
        lambda: torch.zeros(3),
        {"window": fastinit.Window((2,), (0,))},
    ),
}


@pytest.mark.parametrize(("error", "message", "make", "arguments"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_filled_is_refused_before_anything_is_written(error, message, make, arguments):
    good, bad = torch.zeros(5), make()
    for tensors in (bad, [good, bad]):
        with pytest.raises(error, match=re.escape(message)):
            fastinit.fill_(tensors, **{"distribution": NORMAL, "seed": 7} | arguments)
    assert not good.any()


def test_tensors_are_on_one_device_that_fills_reach_and_sequences_have_a_value_for_each():
    tensors = [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(ValueError, match="3 values of stream for 2 tensors"):
        fastinit.fill_(tensors, NORMAL, seed=7, stream=[1, 2, 3])
    with pytest.raises(ValueError, match="1 values of distribution for 2 tensors"):
        fastinit.fill_(tensors, [NORMAL], seed=7)
    with pytest.raises(TypeError, match="device='meta'"):
        fastinit.fill_(torch.zeros(2, device="meta"), NORMAL, seed=7)
    with pytest.raises(ValueError, match="tensor is on meta and another one on cpu"):
        fastinit.fill_([tensors[0], torch.zeros(2, device="meta")], NORMAL, seed=7)
    assert not any(tensor.any() for tensor in tensors)


@pytest.mark.parametrize(
    ("distribution", "arguments", "message"),
    [
        (fastinit.Uniform, (1.0, 0.0), "low=1.0 is greater than high=0.0"),
        (fastinit.Uniform, (0.0, math.inf), "high=inf must be a finite number"),
        (fastinit.Normal, (math.nan,), "mean=nan must be a finite number"),
        (fastinit.Normal, (0.0, -1.0), "std=-1.0 is negative"),
        (fastinit.TruncatedNormal, (0.0, 0.0), "std=0.0 must be positive"),
        (fastinit.TruncatedNormal, (0.0, 1.0, 2.0, 2.0), "low=2.0 must be less than high=2.0"),
    ],
)
def test_distributions_name_the_parameter_that_makes_no_sense(distribution, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        distribution(*arguments)

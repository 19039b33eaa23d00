"""Every operator of torch's own table of them (`op_db`), with torch's own samples, on operands that are pending.

In fp32 a block gives the bits that torch gives. In half precision it gives the values of the fp32 operands rounded
once; dtypes are those under `torch.set_default_dtype`, strides those of fp32.
"""

import itertools
import math

import pytest
import torch
from models import DTYPES, SEED, default_dtype
from torch.utils._pytree import tree_leaves, tree_map_only

import fastinit

pytest.importorskip("expecttest", reason="torch's table of operators imports it")

from torch.testing._internal.common_methods_invocations import op_db

pytestmark = pytest.mark.slow

SAMPLES = 6

NO_VALUES = {"empty", "empty_like", "new_empty", "empty_permuted", "empty_strided", "new_empty_strided"}
RESIZED = {"resize_", "resize_as_"}
# Those that draw; those for which torch takes another function of LAPACK where it is given a subclass of Tensor; and
# erfinv, which is the one of a truncated normal.
OTHER_VALUES = set(
    """
    bernoulli cauchy exponential geometric log_normal multinomial normal rand_like randint randint_like randn
    randn_like uniform pca_lowrank svd_lowrank nn.functional.alpha_dropout nn.functional.dropout
    nn.functional.dropout2d nn.functional.dropout3d nn.functional.feature_alpha_dropout nn.functional.rrelu
    nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d nn.functional.linear_cross_entropy
    nn.functional.multi_head_attention_forward nn.functional.scaled_dot_product_attention
    erfinv linalg.cond linalg.eigvalsh linalg.lstsq linalg.norm linalg.svdvals norm
    """.split()
)


def operand(tensor, dtype, make):
    """A tensor of a sample in a dtype, with memory that `make` fills; anything that is not plain as it is."""
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        return tensor
    if tensor.is_quantized:
        return tensor
    values = tensor.to(DTYPES["bf16"]).float() if tensor.dtype == torch.float32 else tensor
    dense = values.numel() == 0 or torch.empty_like(values).stride() == values.stride()
    strides = values.stride() if dense else values.contiguous().stride()
    return make(torch.empty_strided(values.shape, strides, dtype=dtype or values.dtype), values)


def copied(memory, values):
    return memory.copy_(values)


def summed(memory, values):
    """What the constructor has computed: unlike a copy of data that were there before, it has values in fp32."""
    return memory.zero_().add_(values) if memory.dtype.is_floating_point else memory.copy_(values)


def outcome(function, sample, dtype, make=copied):
    """All that a call gives and what it leaves in its operands, or the exception that it raises."""

    def convert(tensor):
        return operand(tensor, dtype if tensor.dtype == torch.float32 else None, make)

    values, args, kwargs = tree_map_only(torch.Tensor, convert, (sample.input, sample.args, sample.kwargs))
    try:
        return tree_leaves((function(values, *args, **kwargs), values, args, kwargs))
    except Exception as error:
        return error


def ways(operator):
    return dict.fromkeys(way for way in (operator.op, operator.method_variant, operator.inplace_variant) if way)


@pytest.mark.parametrize("operator", op_db, ids=lambda each: f"{each.name}-{each.variant_test_name}")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore")
def test_an_operator_gives_what_it_gives_in_torch(operator, dtype):
    if torch.float32 not in operator.dtypes or operator.name in NO_VALUES | RESIZED:
        pytest.skip("no values in fp32")
    for sample in itertools.islice(operator.sample_inputs("cpu", torch.float32), SAMPLES):
        for way in ways(operator):
            with torch.random.fork_rng(devices=()):
                exact = outcome(way, sample, torch.float32)
                with default_dtype(DTYPES[dtype]):
                    model = outcome(way, sample, DTYPES[dtype])
            with fastinit.on("cpu", dtype, seed=SEED):
                got = outcome(way, sample, DTYPES[dtype], summed)
            if isinstance(exact, Exception):
                assert isinstance(got, Exception)
            elif isinstance(model, Exception):  # torch has no such operator in half precision
                assert isinstance(got, Exception) or len(got) == len(exact)
            else:
                assert_same(got, exact, model, operator.name not in OTHER_VALUES)


def assert_same(got, exact, model, values):
    assert not isinstance(got, Exception), got
    assert len(got) == len(exact)
    for ours, right, theirs in zip(got, exact, model, strict=True):
        if isinstance(right, torch.Tensor) and right.layout == torch.strided and not right.is_quantized:
            assert type(ours) is type(right) and ours.stride() == right.stride()
            tolerance = 0 if values else math.inf
            torch.testing.assert_close(ours, right.to(theirs.dtype), rtol=0, atol=tolerance, equal_nan=True)

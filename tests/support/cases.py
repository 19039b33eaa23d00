"""What the tests of cases share: programs run by torch alone and inside of a block, and their results compared.

A program is a function of `t`, which makes operands: `t(2, 3)` is a tensor of that shape, `t()` one without dimensions.
Inside of a block such an operand is pending: a constant that nobody has written yet, a value that was computed, or a
random fill, whichever SOURCES gives. `check` demands of every tensor that the program returns

- torch's dtype, that is the one under `torch.set_default_dtype`, its class, and whether autograd knows it;
- the value that torch computes in fp32 from the same operands, rounded once, and its strides;

both at once, inside of the block, and after its end. Memory that was freed holds JUNK before, so that a result which
was read from it is not right by chance.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from models import DTYPES, SEED, plain, same_bits
from torch import nn
from torch.utils._pytree import tree_leaves

import fastinit

JUNK = 7.7e7

over_dtypes = pytest.mark.parametrize("dtype", ["fp32", "bf16"])

SOURCES = {
    "constant": lambda *shape: torch.full(shape, 0.3),
    "computed": lambda *shape: (torch.arange(1, math.prod(shape) + 1) / (math.prod(shape) + 1)).view(shape),
    "random": lambda *shape: nn.init.uniform_(torch.empty(shape), 0.1, 0.9),
}
over_sources = pytest.mark.parametrize("source", SOURCES)


def dirty():
    """Fill memory and free it, in the sizes that small tensors take."""
    for size in (1, 2, 3, 4, 8, 16, 32, 64, 256, 2048, 4096, 8192):
        junk = [torch.full((size,), JUNK) for _ in range(40 if size < 1000 else 9)]
        del junk


def _drawn(dtype):
    return torch.empty(8, dtype=dtype).uniform_(generator=torch.Generator().manual_seed(0))


# Whether torch's generators draw in half precision what they draw in fp32, rounded: torch 2.9 does not yet.
DRAWS_ARE_ROUNDED = torch.equal(_drawn(torch.bfloat16), _drawn(torch.float32).bfloat16())


def inside(function, dtype="fp32", seed=SEED, **options):
    """Return function() as a block gives it, in a process whose freed memory is not zero."""
    dirty()
    with fastinit.on("cpu", dtype, seed=seed, **options):
        return function()


def draw(function, dtype="fp32", seed=SEED, outer=1):
    """Return what a block gives, and fail if torch's generator is another one afterwards."""
    torch.manual_seed(outer)
    before = torch.get_rng_state()
    result = inside(function, dtype, seed)
    assert torch.equal(before, torch.get_rng_state()), "torch's generator was moved"
    return result


def in_torch(function, dtype):
    """Return the leaves of function() by torch alone; where half precision has no kernel, the fp32 ones converted."""
    try:
        return tree_leaves(plain(function, dtype))
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
        leaves = tree_leaves(plain(function, "fp32"))
        return [leaf.to(DTYPES[dtype]) if leaf.dtype == torch.float32 else leaf for leaf in leaves]


def operands(shapes, source="random"):
    """Return the fp32 values that operands of these shapes have, one after the other, in a block of that SEED."""
    with fastinit.on("cpu", "fp32", seed=SEED):
        return [SOURCES[source](*shape) for shape in shapes]


def check(program, dtype, source="constant", ulps=0):
    """Fail unless program(t) gives inside of a block what the module's first lines say.

    With `ulps` the values may differ from the rounded ones by so many units in the last place of the block's dtype:
    where autograd records, or a transformation of functorch, half precision is computed in half precision.
    """
    exact, theirs = expected(program, dtype, source)
    eps = torch.finfo(DTYPES[dtype]).eps
    kept = inside(lambda: program(SOURCES[source]), dtype)
    seen = inside(lambda: [values(leaf) for leaf in tree_leaves(program(SOURCES[source]))], dtype)
    kept = tree_leaves(kept)
    assert len(kept) == len(seen) == len(exact)
    for got, read, right, model in zip(kept, seen, exact, theirs, strict=True):
        assert_right(got, right, model, ulps * eps)
        if isinstance(right, torch.Tensor):
            rounded = right.detach().to(model.dtype)
            read = torch.tensor(read, dtype=exactly(model.dtype)).to(model.dtype).view(right.shape)
            assert close(read, rounded, ulps * eps), f"read in the block: {read}, right {rounded}"


def expected(program, dtype, source):
    """Return the leaves of a program's result as torch gives them: of fp32 values, and in the dtype."""
    shapes = []

    def noting(*shape):
        shapes.append(shape)
        return SOURCES["computed"](*shape)

    theirs = in_torch(lambda: program(noting), dtype)
    given = iter(operands(shapes, source))
    exact = tree_leaves(plain(lambda: program(lambda *shape: next(given).clone()), "fp32"))
    return exact, theirs


def assert_right(got, right, model, tolerance=0.0):
    """Fail unless `got` is `right` rounded to the dtype of `model`, and like `model` in all but the values."""
    if not isinstance(right, torch.Tensor):
        if isinstance(right, (np.ndarray, np.generic)):
            assert got.dtype == model.dtype, (got.dtype, model.dtype)
            got, right = (torch.from_numpy(np.asarray(each, dtype=model.dtype)) for each in (got, right))
        elif isinstance(right, float):
            got, right = torch.tensor(got).to(torch.bfloat16), torch.tensor(right).to(torch.bfloat16)
        assert torch.equal(got, right) if isinstance(got, torch.Tensor) else got == right, (got, right)
        return
    assert type(got) is type(right)
    assert got.dtype == model.dtype, f"dtype {got.dtype}, right {model.dtype}"
    assert got.shape == right.shape and got.device == right.device
    assert got.requires_grad == model.requires_grad, f"requires_grad {got.requires_grad}"
    assert (got.grad_fn is None) == (model.grad_fn is None)
    assert got.stride() == right.stride(), f"strides {got.stride()}, right {right.stride()}"
    assert got.untyped_storage().nbytes() >= got.nbytes or 0 in got.stride()
    rounded = right.detach().to(model.dtype)
    assert close(got.detach(), rounded, tolerance), f"{got}, right {rounded}"


def assert_as_torch(got, right, dtype):
    """Fail unless results are torch's, graphs included, and values differ by two units in the last place at most."""
    got, right = tree_leaves(got), tree_leaves(right)
    assert len(got) == len(right)
    for ours, theirs in zip(got, right, strict=True):
        if not isinstance(theirs, torch.Tensor):
            assert ours == theirs
            continue
        assert ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad, (ours, theirs)
        assert (ours.grad_fn is None) == (theirs.grad_fn is None), (ours.grad_fn, theirs.grad_fn)
        assert ours.stride() == theirs.stride()
        tolerance = 2 * max(torch.finfo(each).eps for each in (DTYPES[dtype], theirs.dtype) if each.is_floating_point)
        assert close(ours.detach(), theirs.detach(), tolerance), (ours, theirs)


def close(got, right, tolerance=0.0):
    """Return whether two tensors have one dtype and the same bits, or values within a relative tolerance."""
    if not tolerance or not right.is_floating_point():
        return same_bits(got, right)
    same = got.dtype == right.dtype and got.shape == right.shape
    return same and torch.allclose(got.double(), right.double(), rtol=tolerance, atol=0, equal_nan=True)


def values(leaf):
    return leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf


def exactly(dtype):
    """Return a dtype that holds the numbers which tolist() gives for tensors of that dtype."""
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype


def assert_rounded(got, exact, dtype):
    """Fail unless a tensor, or each of several, is the fp32 one rounded once to the block's dtype."""
    for ours, right in zip(tree_leaves(got), tree_leaves(exact), strict=True):
        assert same_bits(ours.detach(), right.detach().to(DTYPES[dtype])), (ours, right)


def same(left, right):
    """Return whether two results have the same tensors, bit for bit."""
    return all(same_bits(a, b) for a, b in zip(tree_leaves(left), tree_leaves(right), strict=True))


def quiet(function):
    """Return function() without warnings: of deprecated functions, and of parameters that nobody writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()

"""Arguments by torch's documented names, views of another dtype, and the dtype that a result has."""

import math

import numpy as np
import pytest
import torch
from cases import SOURCES, check, in_torch, inside, operands, over_dtypes, over_sources, quiet
from models import DTYPES, plain, same_bits, structure
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import fastinit

KEYWORDS = {
    "zeros_like": lambda t: torch.zeros_like(input=t(2)),
    "ones_like": lambda t: torch.ones_like(input=t(2), dtype=torch.float32),
    "full_like": lambda t: torch.full_like(input=t(2), fill_value=0.1),
    "empty_like": lambda t: torch.empty_like(input=t(2)).fill_(value=0.1),
    "new_full": lambda t: t(2).new_full(size=(3,), fill_value=0.1),
    "new_zeros": lambda t: t(2).new_zeros(size=(3,)),
    "zeros": lambda t: torch.zeros(size=(2, 3)),
    "full": lambda t: torch.full(size=(2,), fill_value=0.1),
    "ones": lambda t: torch.ones(size=(2,), out=None, requires_grad=False),
    "eye": lambda t: torch.eye(n=2, m=3),
    "arange": lambda t: torch.arange(start=0, end=2, step=0.5),
    "arange of an end": lambda t: torch.arange(end=3),
    "linspace": lambda t: torch.linspace(start=0, end=1, steps=4),
    "tensor": lambda t: torch.tensor(data=[0.1, 0.2]),
    "as_tensor": lambda t: torch.as_tensor(data=[0.1, 0.2]),
    "asarray": lambda t: torch.asarray(obj=[0.1]),
    "scalar_tensor": lambda t: torch.scalar_tensor(s=0.1),
    "from_numpy": lambda t: torch.as_tensor(data=np.ones(2, dtype=np.float32)),
    "flatten": lambda t: torch.flatten(input=t(2, 2), start_dim=0),
    "unflatten": lambda t: torch.unflatten(input=t(4), dim=0, sizes=(2, 2)),
    "reshape": lambda t: torch.reshape(input=t(4), shape=(2, 2)),
    "view": lambda t: t(4).view(size=(2, 2)),
    "unsqueeze": lambda t: torch.unsqueeze(input=t(2), dim=0),
    "unsqueeze of integers": lambda t: torch.unsqueeze(input=torch.arange(2), dim=0),
    "squeeze": lambda t: torch.squeeze(input=t(1, 2), dim=0),
    "transpose": lambda t: torch.transpose(input=t(2, 3), dim0=0, dim1=1),
    "permute": lambda t: torch.permute(input=t(2, 3), dims=(1, 0)),
    "narrow": lambda t: torch.narrow(input=t(4), dim=0, start=1, length=2),
    "select": lambda t: torch.select(input=t(2, 3), dim=1, index=0),
    "chunk": lambda t: torch.chunk(input=t(4), chunks=2, dim=0),
    "split": lambda t: torch.split(tensor=t(4), split_size_or_sections=3),
    "unbind": lambda t: torch.unbind(input=t(2, 2), dim=1),
    "expand": lambda t: t(1).expand(size=(3,)),
    "repeat": lambda t: t(2).repeat(repeats=(2,)),
    "tile": lambda t: torch.tile(input=t(2), dims=(2,)),
    "movedim": lambda t: torch.movedim(input=t(2, 3), source=0, destination=1),
    "clone": lambda t: torch.clone(input=t(2), memory_format=torch.preserve_format),
    "detach": lambda t: torch.detach(input=t(2)),
    "clamp": lambda t: torch.clamp(input=t(2), min=0.4),
    "clamp_": lambda t: torch.clamp_(input=t(2), max=0.4),
    "mul": lambda t: torch.mul(input=t(2), other=2),
    "add": lambda t: torch.add(input=t(2), other=1, alpha=0.5),
    "sub": lambda t: torch.sub(input=t(2), other=t(2), alpha=2),
    "div": lambda t: torch.div(input=t(2), other=3, rounding_mode=None),
    "pow": lambda t: torch.pow(input=t(2), exponent=2),
    "pow of a number": lambda t: torch.pow(self=2, exponent=t(2)),
    "method add_": lambda t: t(2).add_(other=1, alpha=2),
    "method mul_": lambda t: t(2).mul_(other=3),
    "method copy_": lambda t: t(2).copy_(other=t(2), non_blocking=False),
    "method masked_fill_": lambda t: t(2).masked_fill_(mask=torch.tensor([True, False]), value=0.1),
    "method clamp_": lambda t: t(2).clamp_(min=0.4, max=0.5),
    "method to": lambda t: t(2).to(dtype=torch.float32, copy=True),
    "method type": lambda t: t(2).type(dtype=torch.float64),
    "method requires_grad_": lambda t: t(2).requires_grad_(requires_grad=True),
    "constant_": lambda t: nn.init.constant_(tensor=t(2), val=0.1),
    "zeros_": lambda t: nn.init.zeros_(tensor=t(2)),
    "eye_": lambda t: nn.init.eye_(tensor=t(2, 2)),
    "bernoulli": lambda t: torch.bernoulli(input=t(2).ceil()),
    "normal": lambda t: torch.normal(mean=t(2), std=torch.zeros(2)),
    "where": lambda t: torch.where(condition=t(2) > 0, input=t(2), other=0.1),
    "cat": lambda t: torch.cat(tensors=[t(2), t(3)], dim=0),
    "stack": lambda t: torch.stack(tensors=(t(2), t(2)), dim=1),
    "sum": lambda t: torch.sum(input=t(2, 2), dim=0, keepdim=True),
    "mean": lambda t: torch.mean(input=t(2, 2), dim=(0,)),
    "norm": lambda t: torch.norm(input=t(3), p=2),
    "cumsum": lambda t: torch.cumsum(input=t(3), dim=0),
    "sort": lambda t: torch.sort(input=t(3), dim=0, descending=True),
    "outer": lambda t: torch.outer(input=t(2), vec2=t(3)),
    "matmul": lambda t: torch.matmul(input=t(2, 2), other=t(2, 2)),
    "mm": lambda t: torch.mm(input=t(2, 2), mat2=t(2, 2)),
    "addmm": lambda t: torch.addmm(input=t(2), mat1=t(2, 3), mat2=t(3, 2), beta=0.5),
    "triu": lambda t: torch.triu(input=t(2, 2), diagonal=1),
    "diag": lambda t: torch.diag(input=t(2), diagonal=0),
    "qr": lambda t: torch.linalg.qr(A=t(2, 2).float(), mode="reduced"),
    "inv": lambda t: torch.linalg.inv(A=(torch.eye(2) + t()).float()),
    "vector_norm": lambda t: torch.linalg.vector_norm(x=t(3), ord=2),
    "linear": lambda t: F.linear(input=t(2, 3), weight=t(4, 3), bias=None),
    "normalize": lambda t: F.normalize(input=t(3), p=2.0, dim=0),
    "pad": lambda t: F.pad(input=t(2), pad=(1, 1), mode="constant", value=0.1),
    "Parameter": lambda t: nn.Parameter(data=t(2), requires_grad=False),
    "Buffer": lambda t: nn.Buffer(data=t(2), persistent=False),
}


@pytest.mark.parametrize("name", KEYWORDS)
@over_dtypes
def test_arguments_may_be_given_by_the_names_that_torch_documents(name, dtype):
    check(KEYWORDS[name], dtype, "computed")


RANDOM_KEYWORDS = {
    "rand": lambda w: torch.rand(size=(5,)),
    "randn": lambda w: torch.randn(size=(5,), generator=None),
    "rand_like": lambda w: torch.rand_like(input=w),
    "randn_like": lambda w: torch.randn_like(input=w),
    "normal_": lambda w: w.normal_(mean=0.0, std=2.0),
    "uniform_": lambda w: w.uniform_(to=2.0),
    "init.normal_": lambda w: nn.init.normal_(tensor=w, mean=0.0, std=2.0, generator=None),
    "init.uniform_": lambda w: nn.init.uniform_(tensor=w, a=0.0, b=2.0),
    "dropout": lambda w: F.dropout(input=torch.ones(5), p=0.5, training=True),
    "randint": lambda w: torch.randint(low=0, high=9, size=(5,)),
    "randperm": lambda w: torch.randperm(n=5),
    "multinomial": lambda w: torch.multinomial(input=torch.ones(5), num_samples=2),
    "bernoulli_": lambda w: w.bernoulli_(p=0.5),
    "exponential_": lambda w: w.exponential_(lambd=2.0),
}


@pytest.mark.parametrize("name", RANDOM_KEYWORDS)
@over_dtypes
def test_random_functions_take_names_too_and_give_what_they_give_without(name, dtype):
    with_names = inside(lambda: RANDOM_KEYWORDS[name](torch.empty(5)), dtype)
    positional = {
        "rand": lambda w: torch.rand(5),
        "randn": lambda w: torch.randn(5),
        "rand_like": lambda w: torch.rand_like(w),
        "randn_like": lambda w: torch.randn_like(w),
        "normal_": lambda w: w.normal_(0.0, 2.0),
        "uniform_": lambda w: w.uniform_(0.0, 2.0),
        "init.normal_": lambda w: nn.init.normal_(w, 0.0, 2.0),
        "init.uniform_": lambda w: nn.init.uniform_(w, 0.0, 2.0),
        "dropout": lambda w: F.dropout(torch.ones(5), 0.5, True),
        "randint": lambda w: torch.randint(0, 9, (5,)),
        "randperm": lambda w: torch.randperm(5),
        "multinomial": lambda w: torch.multinomial(torch.ones(5), 2),
        "bernoulli_": lambda w: w.bernoulli_(0.5),
        "exponential_": lambda w: w.exponential_(2.0),
    }[name]
    assert same_bits(with_names, inside(lambda: positional(torch.empty(5)), dtype))


# Views of another dtype -----------------------------------------------------------------------------------------------


VIEWS = {
    "int32": lambda x: x.view(torch.int32),
    "int16": lambda x: x.view(torch.int16),
    "uint8": lambda x: x.view(torch.uint8),
    "uint8 of rows": lambda x: x.view(2, 4).view(torch.uint8),
    "int64": lambda x: x.view(torch.int64),
    "float16": lambda x: x.view(torch.float16),
    "float64": lambda x: x.view(torch.float64),
    "back again": lambda x: x.view(torch.uint8).view(x.dtype) * 2,
    "sign bits": lambda x: x.view(torch.uint8)[x.element_size() - 1 :: x.element_size()] >> 7,
    "written through": lambda x: (x.view(torch.int16).bitwise_and_(-(2**15)), x)[1],
    "written by zeros": lambda x: (x.view(torch.uint8)[: x.element_size()].zero_(), x)[1],
    "written afterwards": lambda x: (x.view(torch.int16), x.mul_(2.0))[0],
    "a row of it": lambda x: x.view(2, 4)[1].view(torch.int16),
    "by name": lambda x: torch.Tensor.view(x, dtype=torch.int16),
}


@pytest.mark.parametrize("name", VIEWS)
@over_dtypes
@over_sources
def test_a_view_of_another_dtype_sees_the_stored_bits(name, dtype, source):
    (exact,) = operands([(8,)], source)
    right = VIEWS[name](exact.to(DTYPES[dtype]))
    kept = inside(lambda: VIEWS[name](SOURCES[source](8)), dtype)
    assert kept.dtype == right.dtype and kept.stride() == right.stride() and same_bits(kept, right)
    read = inside(lambda: VIEWS[name](SOURCES[source](8)).tolist(), dtype)
    assert read == right.tolist() or right.is_floating_point()


@over_dtypes
def test_a_view_of_a_parameters_bits_is_the_parameters_memory(dtype):
    def construct():
        module = nn.Linear(4, 4)
        module.bits = module.weight.detach().view(torch.int16)
        nn.init.uniform_(module.weight)
        return module

    module = inside(construct, dtype)
    assert module.bits.data_ptr() == module.weight.data_ptr()
    assert torch.equal(module.bits, module.weight.detach().view(torch.int16))


# Dtypes ---------------------------------------------------------------------------------------------------------------


RESULTS = {
    "tensor of numpy fp32 scalars": lambda: torch.tensor([np.float32(1)]),
    "tensor of numpy fp64 scalars": lambda: torch.tensor([np.float64(1)]),
    "tensor of a numpy scalar": lambda: torch.tensor(np.float32(1)),
    "tensor of a list of arrays": lambda: torch.tensor(np.array([np.ones(2, np.float32)])),
    "tensor of tensors of fp64": lambda: torch.tensor([torch.ones((), dtype=torch.float64)]),
    "tensor of integers and a float": lambda: torch.tensor([1, 2.5]),
    "sparse_coo_tensor": lambda: torch.sparse_coo_tensor([[0], [0]], torch.ones(1), (1, 1)),
    "sparse_coo_tensor of a list": lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (1, 1)),
    "sparse_csr_tensor": lambda: torch.sparse_csr_tensor([0, 1], [0], torch.ones(1), (1, 1)),
    "to_sparse": lambda: torch.eye(2).to_sparse(),
    "to_sparse_csr": lambda: torch.eye(2).to_sparse_csr(),
    "dequantize": lambda: torch.quantize_per_tensor(torch.ones(1).float(), 1.0, 0, torch.qint8).dequantize(),
    "full of a tensor": lambda: torch.full((1,), torch.ones(())),
    "full of an integer": lambda: torch.full((1,), 1),
    "full of an integer tensor": lambda: torch.full((1,), torch.ones((), dtype=torch.int32)),
    "full of an fp64 tensor": lambda: torch.full((1,), torch.ones((), dtype=torch.float64)),
    "full of an fp32 tensor": lambda: torch.full((1,), torch.ones((), dtype=torch.float32)),
    "full of an fp16 tensor": lambda: torch.full((1,), torch.ones((), dtype=torch.float16)),
    "full of a complex tensor": lambda: torch.full((1,), torch.ones((), dtype=torch.complex64)),
    "full of numpy's numbers": lambda: [torch.full((1,), n) for n in (np.float64(1), np.int64(1), np.True_)],
    "bincount": lambda: torch.bincount(torch.tensor([0]), weights=torch.ones(1)),
    "numpy of fp16": lambda: torch.ones(1, dtype=torch.float16).numpy(),
    "numpy of fp32": lambda: torch.ones(1, dtype=torch.float32).numpy(),
    "view_as_complex of fp16": lambda: torch.view_as_complex(torch.ones(1, 2, dtype=torch.float16)),
    "complex of fp32": lambda: torch.complex(torch.ones(1, dtype=torch.float32), torch.ones(1, dtype=torch.float32)),
    "polar of fp64": lambda: torch.polar(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)),
    "integer division": lambda: torch.arange(3) / 2,
    "mean of integers as a float": lambda: torch.arange(3).float().mean(),
    "integers times a float": lambda: torch.arange(3) * 0.5,
    "sqrt of integers": lambda: torch.arange(3).sqrt(),
    "bool times a float": lambda: torch.tensor([True]) * 0.5,
    "sum of fp16 and a scalar": lambda: torch.ones(2, dtype=torch.float16) + torch.ones(()),
    "product with an fp32 scalar": lambda: torch.ones(2) * torch.ones((), dtype=torch.float32),
    "product with fp32": lambda: torch.ones(2) * torch.ones(2, dtype=torch.float32),
    "product with fp64": lambda: torch.ones(2) * torch.ones(1, dtype=torch.float64),
    "sum in fp32": lambda: torch.ones(2).sum(dtype=torch.float32),
    "softmax in fp32": lambda: F.softmax(torch.ones(2), 0, dtype=torch.float32),
    "type_as": lambda: torch.ones(2, dtype=torch.float64).type_as(torch.ones(1)),
    "result_type": lambda: torch.result_type(torch.ones(2), torch.arange(2)),
    "promote": lambda: torch.ones(2, dtype=torch.float16) * torch.ones(2, dtype=torch.bfloat16),
    "where of numbers": lambda: torch.where(torch.tensor([True]), 1.0, 2.0),
    "window": lambda: (torch.hann_window(4), torch.kaiser_window(4), torch.blackman_window(4)),
    "fftfreq": lambda: (torch.fft.fftfreq(4), torch.fft.rfftfreq(4)),
    "complex of the default": lambda: torch.ones(2).to(torch.complex64),
    "logspace": lambda: torch.logspace(0, 1, 3),
    "histc": lambda: torch.histc(torch.ones(3, dtype=torch.float32), 3),
    "one_hot": lambda: F.one_hot(torch.arange(3)).to(torch.get_default_dtype()),
    "cumsum of integers": lambda: torch.arange(3).cumsum(0),
    "var of fp64": lambda: torch.arange(3, dtype=torch.float64).var(),
    "norm in fp32": lambda: torch.linalg.vector_norm(torch.ones(3), dtype=torch.float32),
    "prod of bools": lambda: torch.tensor([True]).prod(),
    "legacy": lambda: (torch.Tensor([1]), torch.FloatTensor([1]), torch.HalfTensor([1]), torch.DoubleTensor([1])),
    "legacy of sizes": lambda: (torch.Tensor(2).zero_(), torch.FloatTensor(2).zero_(), torch.BFloat16Tensor(2).zero_()),
    "frombuffer": lambda: torch.frombuffer(bytearray(8), dtype=torch.float32),
    "from a list of numpy arrays": lambda: torch.as_tensor(np.ones(2)),
    "item and back": lambda: torch.tensor(torch.ones(()).item()),
    "default dtype": lambda: torch.zeros((), dtype=torch.get_default_dtype()),
    "float method": lambda: torch.ones(1).float(),
    "half method": lambda: torch.ones(1).half(),
    "cast by type": lambda: torch.ones(1).type("torch.DoubleTensor"),
    "rand_like of fp64": lambda: torch.rand_like(torch.ones(1, dtype=torch.float64)) * 0,
    "randn in fp64": lambda: torch.randn(2, dtype=torch.float64) * 0,
    "randn in complex": lambda: torch.randn(2, dtype=torch.complex64) * 0,
    "normal of fp64": lambda: torch.normal(torch.zeros(2, dtype=torch.float64), 0.0),
    "ones of types of Python": lambda: [torch.ones(2, dtype=each) for each in (bool, int, float, complex)],
    "empty of types of Python": lambda: [torch.empty(2, dtype=each).zero_() for each in (bool, int, float, complex)],
    "rand of a type of Python": lambda: torch.rand(2, dtype=float) * 0,
    "zeros like, of a type of Python": lambda: (
        torch.zeros_like(torch.ones(2), dtype=int),
        torch.ones(2).new_ones(2, dtype=bool),
    ),
    "arange of a type of Python": lambda: (torch.arange(3, dtype=float), torch.full((2,), 1, dtype=float)),
    "tensor of a type of Python": lambda: (torch.tensor([1, 2], dtype=float), torch.as_tensor([1, 2], dtype=bool)),
    "as_tensor of an array, of a type of Python": lambda: torch.as_tensor(np.ones(2, np.float32), dtype=float),
    "to a type of Python": lambda: torch.ones(2).to(float),
    "transposed fp64": lambda: _transposed().to(torch.get_default_dtype()),
    "transposed fp64, made contiguous": lambda: _transposed().to(
        torch.get_default_dtype(), memory_format=torch.contiguous_format
    ),
    "where of whole numbers and one": lambda: torch.where(torch.arange(3) > 1, torch.arange(3), 0.1),
    "powers of a number": lambda: torch.pow(0.3, torch.arange(3)),
    "whole numbers times a complex one": lambda: (torch.arange(3) * 1j, torch.exp(1j * torch.arange(3))),
    "ones in int64 times complex and float": lambda: [torch.ones(2, dtype=torch.int64) * each for each in (1j, 0.1)],
    "full of a complex number": lambda: torch.full((1,), 1j),
}

# Of whole numbers alone, or of lists of numbers. In bf16 torch has no such tensors.
COMPLEX = {
    "complex number": lambda: (torch.tensor(1j), torch.tensor([1, 2j]), torch.tensor([1j, torch.ones(())])),
    "sum with a complex number": lambda: torch.ones(2) + 1j,
    "Fourier transform": lambda: (torch.fft.fft(torch.arange(4)), torch.fft.rfft(torch.ones(4, dtype=torch.int64))),
}


def _transposed():
    return torch.arange(6, dtype=torch.float64).view(2, 3).t()


@pytest.mark.parametrize("name", RESULTS)
@over_dtypes
def test_a_result_has_the_dtype_that_it_has_under_torchs_default_dtype(name, dtype):
    def function():
        return quiet(RESULTS[name])

    right = in_torch(function, dtype)
    got = tree_leaves(inside(function, dtype))
    assert [_kind(leaf) for leaf in got] == [_kind(leaf) for leaf in right]
    for ours, theirs in zip(got, right, strict=True):
        if isinstance(ours, torch.Tensor):
            ours, theirs = (each.to_dense().to(torch.complex128) for each in (ours, theirs))
            assert torch.allclose(ours, theirs, rtol=0.02, atol=0.01), (ours, theirs)


# Torch does not narrow what it computes.
@pytest.mark.parametrize("name", [name for name in (*RESULTS, *COMPLEX) if name != "norm in fp32"])
def test_a_result_is_torchs_own_under_a_default_of_float64_that_the_code_sets(name):
    def doubled():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return quiet({**RESULTS, **COMPLEX}[name])
        finally:
            torch.set_default_dtype(before)

    right = tree_leaves(plain(doubled, "fp32"))
    got = tree_leaves(inside(doubled))
    assert [_kind(leaf) for leaf in got] == [_kind(leaf) for leaf in right]
    for ours, theirs in zip(got, right, strict=True):
        if isinstance(ours, torch.Tensor):
            ours, theirs = (each.to_dense().to(torch.complex128) for each in (ours, theirs))
            assert torch.equal(ours, theirs), (ours, theirs)


@pytest.mark.parametrize("given", [torch.DoubleTensor, "torch.DoubleTensor"])
@over_dtypes
def test_a_default_tensor_type_that_the_code_sets_is_a_default_dtype_of_the_block(dtype, given):
    def doubled():
        quiet(lambda: torch.set_default_tensor_type(given))
        return torch.get_default_dtype(), (torch.arange(2) / 3).dtype, nn.Linear(1, 1).weight.dtype

    assert set(inside(doubled, dtype)) == {torch.float64}
    assert torch.get_default_dtype() == (torch.arange(2) / 3).dtype == torch.float32


@pytest.mark.parametrize("name", ["complex number", "sum with a complex number"])
def test_complex_numbers_in_fp16_have_torchs_dtype(name):
    right, got = quiet(lambda: [tree_leaves(run(COMPLEX[name], "fp16")) for run in (plain, inside)])
    assert [leaf.dtype for leaf in got] == [leaf.dtype for leaf in right]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_result_type_is_what_torch_says_of_every_pair(dtype):
    kinds = (torch.bool, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64, torch.complex64)

    def run():
        values = [1, 2.0, True, 1j, *(torch.ones(size, dtype=kind) for kind in kinds for size in ((), (2,)))]
        return [torch.result_type(a, b) for a in values for b in values]

    assert inside(run, dtype) == plain(run, dtype)


def _kind(leaf):
    if not hasattr(leaf, "dtype"):
        return leaf
    layout = getattr(leaf, "layout", None)
    return type(leaf), leaf.dtype, layout, leaf.stride() if layout == torch.strided else None


class Plain(torch.Tensor):
    """A subclass without a word of its own."""


class Counting(torch.Tensor):
    """A subclass with a constructor."""

    def __new__(cls, *args, **kwargs):
        result = super().__new__(cls, *args, **kwargs)
        result.given = len(args)
        return result

    def __init__(self, *args, **kwargs):
        self.named = sorted(kwargs)


# The legacy constructor as people call it, of torch.Tensor or of a subclass.
LEGACY = {
    "sizes": lambda make, t: make(2, 3).fill_(0.1),
    "sizes of numpy": lambda make, t: make(np.int64(2), 3).fill_(0.1),
    "a tensor's size": lambda make, t: make(t(2, 3).size()).fill_(0.1),
    "a number of elements": lambda make, t: make(t(2, 3).numel()).fill_(0.1),
    "sizes by name": lambda make, t: make(size=(2, 3)).fill_(0.1),
    "sizes and a device": lambda make, t: make(2, 3, device="cpu").fill_(0.1),
    "nothing": lambda make, t: make(),
    "a list": lambda make, t: make([0.1, 2]),
    "a list by name": lambda make, t: make(data=[0.1, 2]),
    "a tuple of lists": lambda make, t: make(([1, 2], [3, 4])),
    "a range": lambda make, t: make(range(3)),
    "an array": lambda make, t: make(np.full(3, 0.1)),
    "a list of tensors": lambda make, t: make([t(), t()]),
    "a tensor": lambda make, t: make(t(3)),
    "a parameter": lambda make, t: make(nn.Parameter(t(3))).detach(),
    "a view": lambda make, t: make(t(2, 3)[1]),
    "a storage": lambda make, t: make(torch.zeros(3).untyped_storage()),
    "new of a list": lambda make, t: t(2).new([0.1, 2]),
    "new of a tuple": lambda make, t: t(2).new((1, 2)),
    "new of a size": lambda make, t: t(2).new(t(2, 3).size()).fill_(0.1),
    "new of sizes": lambda make, t: t(2).new(2, 3).fill_(0.1),
    "new of a size by name": lambda make, t: t(2).new(size=(2, 3)).fill_(0.1),
    "a typed list of tensors": lambda make, t: torch.FloatTensor([t(), [*t(2)][1]]),
    "a typed list of integers": lambda make, t: torch.LongTensor([t().ceil().long(), torch.zeros(2).long()[1]]),
    "a typed list of bools": lambda make, t: torch.BoolTensor([t() > 0.1, torch.zeros(()).bool()]),
}


@pytest.mark.parametrize("kind", [torch.Tensor, Plain, Counting])
@pytest.mark.parametrize("name", LEGACY)
@over_dtypes
@over_sources
def test_the_legacy_constructor_makes_what_it_makes_in_torch(name, kind, dtype, source):
    check(lambda t: LEGACY[name](kind, t).as_subclass(torch.Tensor), dtype, source)
    kept = inside(lambda: LEGACY[name](kind, SOURCES[source]), dtype)
    model = plain(lambda: LEGACY[name](kind, SOURCES["computed"]), dtype)
    assert type(kept) is type(model) and vars(kept) == vars(model)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_a_tensor_of_a_storage_reads_its_bytes_as_the_dtype_that_is_named(kind):
    def run():
        return torch.tensor(torch.full((4, 3), 0.3, dtype=torch.bfloat16).untyped_storage(), dtype=kind)

    assert same_bits(inside(run, "bf16"), plain(run, "bf16"))
    with pytest.raises(RuntimeError, match="Expected a Storage of type"):
        inside(lambda: torch.tensor(torch.ones(2, dtype=torch.float64).storage(), dtype=kind), "bf16")


def test_what_the_legacy_constructor_refuses_is_refused_in_a_block():
    for wrong in (lambda: torch.Tensor(1.5), lambda: Plain(data=torch.ones(2)), lambda: torch.Tensor(-1)):
        with pytest.raises((TypeError, RuntimeError)) as theirs:
            wrong()
        with pytest.raises(theirs.type):
            inside(wrong)


def test_a_subclass_made_of_a_pending_tensor_shares_its_memory():
    def construct():
        weight = nn.Linear(2, 2).weight
        other = Plain(weight.detach())
        other.fill_(3)
        return weight, other

    weight, other = inside(construct)
    assert type(other) is Plain and weight.data_ptr() == other.data_ptr() and (weight == 3).all()


@over_dtypes
def test_numpy_sees_half_precision_where_the_code_names_it(dtype):
    def arrays():
        weight, ones = torch.randn(2, 3).half(), torch.ones(2, dtype=torch.float16)
        return [
            each.numpy() if isinstance(each, torch.Tensor) else each
            for each in (
                *(weight.cpu(), weight, np.asarray(weight), ones, ones.cpu(), ones * 2, weight.detach().cpu()),
                *(np.array(ones), weight.to("cpu"), ones.view(2, 1), ones.clone(), torch.full((2,), 0.1).half()),
            )
        ]

    got, right = (quiet(lambda run=run: run(arrays, dtype)) for run in (inside, plain))
    assert {array.dtype for array in got} == {np.dtype(np.float16)} == {array.dtype for array in right}
    assert [array.shape for array in got] == [array.shape for array in right]
    for ours, theirs in list(zip(got, right, strict=True))[3:6]:
        assert (ours == theirs).all()
    assert (got[-1] == np.float16(0.1)).all() and (got[0] == got[1]).all() and (got[1] == got[2]).all()


# A default dtype that the constructor sets ---------------------------------------------------------------------------


class Doubled(nn.Module):
    """Sets float64 for a part of itself, as scientific code does."""

    def __init__(self, inner=torch.float64):
        super().__init__()
        before = torch.get_default_dtype()
        self.register_buffer("first", torch.tensor(0.1))
        torch.set_default_dtype(inner)
        try:
            self.seen = torch.get_default_dtype(), torch.empty(0).dtype, torch.zeros(1).new_empty(0).dtype
            self.linear = nn.Linear(2, 2)
            self.register_buffer("scalar", torch.tensor(0.1))
            self.register_buffer("quotient", torch.arange(3) / 7)
            self.register_buffer("legacy", torch.Tensor([0.1]))
            self.register_buffer("legacy_of_sizes", torch.Tensor(2).fill_(0.1))
            self.register_buffer("line", torch.linspace(0, 1, 5))
            self.register_buffer("mixed", self.first * self.scalar.view(1))
            self.register_buffer("array", torch.as_tensor(np.array([0.1])))
            self.register_buffer("listed", torch.tensor([0.1, torch.tensor(0.2)]))
            self.register_buffer("full", torch.full((2,), 0.1))
            self.parameter = nn.Parameter(torch.rand(3))
        finally:
            torch.set_default_dtype(before)
        self.last = nn.Linear(2, 2)
        self.register_buffer("after", torch.tensor(0.1))


@pytest.mark.parametrize("inner", [torch.float64, torch.float16, torch.float32], ids=str)
@over_dtypes
def test_a_default_dtype_that_the_constructor_sets_is_the_one_that_counts(dtype, inner):
    def construct():
        return Doubled(inner)

    ours, theirs = inside(construct, dtype), plain(construct, dtype)
    assert structure(ours) == structure(theirs) and ours.seen == theirs.seen
    if inner == torch.float64:
        for name in ("scalar", "quotient", "legacy", "legacy_of_sizes", "line", "array", "full"):
            assert same_bits(getattr(ours, name), getattr(theirs, name)), name
    assert torch.get_default_dtype() == torch.float32


# --- arguments by whose kind torch decides ----------------------------------------------------------------------------


@over_dtypes
def test_complex_bounds_make_complex_numbers(dtype):
    for function in (torch.linspace, torch.logspace):
        assert inside(lambda: function(0, 1j, 3), dtype).tolist() == function(0, 1j, 3).tolist()  # noqa: B023
        assert inside(lambda: function(0, torch.tensor(1j), 3), dtype).dtype == torch.complex64  # noqa: B023


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@over_dtypes
def test_memory_of_others_in_half_precision_is_neither_copied_nor_misread(dtype):
    array = np.arange(4, dtype=np.float16)
    for make in (
        lambda: torch.asarray(array),
        lambda: torch.asarray(array, dtype=torch.float16),
        lambda: torch.as_tensor(array),
        lambda: torch.asarray(memoryview(array).cast("B"), dtype=torch.float16),
    ):
        tensor = inside(make, dtype)
        assert tensor.data_ptr() == array.ctypes.data and tensor.tolist() == [0.0, 1.0, 2.0, 3.0]
    stored = torch.ones(2, dtype=torch.bfloat16).storage()
    assert inside(lambda: torch.tensor(stored, dtype=torch.bfloat16), dtype).tolist() == [1.0, 1.0]


@over_dtypes
def test_whole_numbers_are_drawn_in_the_range_of_the_dtype(dtype):
    for half, most in ((torch.bfloat16, 2**8), (torch.float16, 2**11)):
        drawn = inside(lambda: torch.empty(4096, dtype=half).random_(), dtype)  # noqa: B023
        assert most / 2 < drawn.max() <= most and drawn.min() >= 0


def of_itself():
    numbers = [0]
    return [*numbers, numbers.append(numbers) or numbers]


def half(*size):
    return torch.empty(*size, dtype=torch.float16)


REFUSED = {
    "more elements than can be counted": lambda: torch.empty(2**62, 2**62),
    "more bytes than can be counted": lambda: torch.zeros(2**62),
    "sizes of no elements that overflow": lambda: torch.empty(0, 4, 2**61),
    "strides that overflow": lambda: torch.empty_strided((8, 8), (2**61, 1)),
    "strides that go backwards": lambda: torch.empty_strided((2, 3), (-1, 1)),
    "transpose in place": lambda: torch.ones(2, 2, 2).t_(),
    "deletion of data": lambda: exec("del x.data", {"x": torch.ones(2)}),
    "bounds beyond the dtype": lambda: half(3).uniform_(0, 1e6),
    "bounds too far apart": lambda: half(3).uniform_(-6e4, 6e4),
    "number beyond the dtype": lambda: half(3).fill_(1e6),
    "number beyond whole numbers": lambda: torch.empty(3, dtype=torch.uint8).fill_(300),
    "full beyond the dtype": lambda: torch.full((3,), 1e6, dtype=torch.float16),
    "full_like beyond the dtype": lambda: torch.full_like(half(3), -1e6),
    "new_full beyond the dtype": lambda: half(3).new_full((2,), 1e6),
    "whole numbers that require grad": lambda: torch.ones(3, dtype=torch.int64, requires_grad=True),
    "new whole numbers that require grad": lambda: torch.arange(3).new_full((2,), 1, requires_grad=True),
    "list that holds itself": lambda: torch.tensor(of_itself()),
    "list that holds itself and a tensor": lambda: torch.as_tensor([torch.ones(()), of_itself()]),
    "legacy list that holds itself": lambda: torch.Tensor(of_itself()),
    "alias of another dtype": lambda: torch.asarray(torch.ones(2), dtype=torch.float64, copy=False),
    "new on another device": lambda: torch.ones(3).new(device="cuda"),
    "new of a size on another device": lambda: torch.ones(3).new(torch.Size((2,)), device="cuda"),
    "new of a tensor on a device": lambda: torch.arange(3).new(torch.arange(1, 2), device="cpu"),
}


@pytest.mark.parametrize("name", REFUSED)
@over_dtypes
def test_what_torch_refuses_is_refused_at_once_and_by_its_words(name, dtype):
    errors = (RuntimeError, TypeError, ValueError)
    with pytest.raises(errors) as right:
        plain(REFUSED[name], dtype)
    with fastinit.on("cpu", dtype), pytest.raises(errors) as found:
        REFUSED[name]()
    assert found.type is right.type and str(found.value)[:20] == str(right.value)[:20]


def test_bounds_beyond_the_dtype_of_a_tensor_that_exists_are_refused():
    tensor = torch.zeros(3, dtype=torch.float16)
    with fastinit.on("cpu", "fp32"), pytest.raises(RuntimeError, match="out of bounds"):
        tensor.uniform_(0, 1e6)
    assert not tensor.any()


def test_numbers_that_torch_lets_through_are_let_through():
    assert torch.equal(inside(lambda: half(2).fill_(math.inf), "fp32"), half(2).fill_(math.inf))
    assert torch.equal(inside(lambda: half(()).fill_(1e6), "fp32"), half(()).fill_(1e6))
    assert torch.equal(inside(lambda: half(2).fill_(torch.tensor(1e6)), "fp32"), half(2).fill_(torch.tensor(1e6)))
    assert inside(lambda: torch.empty(2, dtype=torch.uint8).fill_(-100)).tolist() == [156, 156]
    assert inside(lambda: torch.empty(2, dtype=torch.bool).fill_(-3)).tolist() == [True, True]


@over_dtypes
def test_the_method_tolist_of_the_class_is_the_placeholders(dtype):
    def run():
        for tensor in (torch.full((2,), 0.1), torch.full((2,), 0.1, requires_grad=True)):
            assert torch.Tensor.tolist(tensor) == tensor.tolist()
        return torch.zeros(1)

    inside(run, dtype)


def test_what_new_makes_of_a_tensor_shares_its_memory():
    def run():
        numbers = torch.arange(5, 6)
        numbers.new(numbers).add_(1)
        return numbers

    assert inside(run).tolist() == [6]


@over_dtypes
def test_an_alias_that_is_asked_for_is_one(dtype):
    def run():
        tensor = torch.ones(2)
        torch.asarray(tensor, copy=False).add_(1)
        return tensor

    assert inside(run, dtype).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_sparse_whole_numbers_make_the_default_dtype(default):
    def run():
        sparse = torch.arange(4).to_sparse()
        return [torch.div(sparse, 2).to_dense(), torch.sqrt(sparse).to_dense(), sparse.float().to_dense()]

    for right, found in zip(plain(run, default), inside(run, default), strict=True):
        assert same_bits(right, found)


@over_dtypes
def test_functions_that_refuse_subclasses_find_tensors(dtype):
    def run():
        return torch.ones(2).map_(torch.full((2,), 2.0), lambda a, b: a + b), torch.ones(2).apply_(lambda a: a + 2)

    assert [each.tolist() for each in inside(run, dtype)] == [[3.0, 3.0]] * 2


@over_dtypes
def test_a_parameter_says_that_it_is_one_and_loses_its_gradient(dtype):
    def run():
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        del p.grad
        return repr(p), p.grad

    assert inside(run, dtype) == plain(run, dtype)


@over_dtypes
def test_in_deterministic_mode_what_nobody_initializes_is_what_torch_makes_it(dtype):
    def run():
        torch.use_deterministic_algorithms(True)
        try:
            linear = nn.Linear(2, 2)
            like = torch.empty_like(torch.ones(2)), torch.ones(2).new_empty(2), torch.rand_like(torch.ones(2))
            integers = torch.empty(2, dtype=torch.int32), torch.empty(2, dtype=torch.bool)
            other = torch.empty(2), torch.Tensor(2), torch.empty_strided((2, 2), (1, 2)), linear.weight.detach()
            return [each.isnan().tolist() for each in (*like, *other)], [each.tolist() for each in integers]
        finally:
            torch.use_deterministic_algorithms(False)

    assert inside(run, dtype) == plain(run, dtype)


@pytest.mark.filterwarnings("ignore")  # torch says that quantized tensors are to go
@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8, torch.qint32])
def test_what_nobody_writes_of_a_quantized_dtype_is_zero(dtype):
    with fastinit.on("cpu"):
        made = torch.empty(500, dtype=dtype)
    assert made.dtype == dtype and not made.int_repr().any()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("like", [torch.empty_like, torch.ones_like, lambda q: torch.full_like(q, 2.0)])
def test_tensors_like_quantized_ones_are_torchs(like):
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.quint8)
    made = inside(lambda: like(quantized))
    assert (made.dtype, made.q_scale(), made.shape) == (torch.quint8, 0.5, (3,))
    if like is not torch.empty_like:
        assert torch.equal(made.dequantize(), like(quantized).dequantize())


def test_a_tensor_whose_memory_has_the_negative_values_is_initialized_as_it_reads():
    tensor = torch.arange(6.0).to(torch.complex64).conj().imag
    with fastinit.on("cpu", "fp32", seed=0):
        torch.nn.init.constant_(tensor, 3.0)
        constant = tensor.tolist()
        torch.nn.init.uniform_(tensor, 1.0, 2.0)
    assert tensor.is_neg() and constant == [3.0] * 6
    assert tensor.min() >= 1.0

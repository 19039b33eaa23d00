"""Tensors that a function is given as data, in its arguments or in containers there, while they are still pending."""

import math
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from cases import assert_rounded, check, close, inside, over_dtypes, over_sources
from models import DTYPES
from torch import nn
from torch.nn import functional as F

import fastinit

INDICES = [[0, 1], [1, 0]]

FACTORIES = {
    "tensor of a list": lambda t: torch.tensor([t(), t()]),
    "tensor of nested lists": lambda t: torch.tensor([[t(), 0.0], [1.0, t()]]),
    "tensor of a tuple of rows": lambda t: torch.tensor(((t(), t()), [t(), t()])),
    "a rotation": lambda t: torch.tensor([[t().cos(), -t().sin()], [t().sin(), t().cos()]]),
    "tensor of elements": lambda t: torch.tensor(list(t(3))),
    "tensor of tensors with one element": lambda t: torch.tensor([t(1), t(1)]),
    "as_tensor": lambda t: torch.as_tensor([t(), t()]),
    "asarray": lambda t: torch.asarray([[t()], [t()]]),
    "legacy Tensor": lambda t: torch.Tensor([t(), t()]),
    "new_tensor": lambda t: torch.zeros(1).new_tensor([t(), t()]),
    "tensor with a dtype": lambda t: torch.tensor([t(), t()], dtype=torch.float64),
    "full": lambda t: torch.full((2, 3), t()),
    "full_like": lambda t: torch.full_like(torch.zeros(3), t()),
    "new_full": lambda t: torch.zeros(1).new_full((3,), t()),
    "scalar_tensor": lambda t: torch.scalar_tensor(t()),
    "linspace": lambda t: torch.linspace(t(), t() + 1, 5),
    "linspace from a number": lambda t: torch.linspace(0.0, t(), 5),
    "logspace": lambda t: torch.logspace(t(), t() + 1, 5),
    "arange": lambda t: torch.arange(t(), t() + 3.75, t() * 0 + 1),
    "arange of an integer tensor": lambda t: torch.arange(torch.tensor(4)) * t(),
    "sizes that are tensors": lambda t: torch.ones(torch.tensor(2), torch.tensor([3, 4])[0]) * t(),
    "complex": lambda t: torch.complex(t(3).float(), t(3).float()),
    "polar": lambda t: torch.polar(t(3).float(), t(3).float()),
    "sparse_coo_tensor": lambda t: torch.sparse_coo_tensor(INDICES, t(2), (2, 2)).to_dense(),
    "values of sparse_coo_tensor": lambda t: torch.sparse_coo_tensor(INDICES, t(2), (2, 2)).coalesce().values(),
    "sparse_csr_tensor": lambda t: torch.sparse_csr_tensor([0, 1, 2], [0, 1], t(2), (2, 2)).values(),
    "sparse times dense": lambda t: torch.sparse.mm(torch.sparse_coo_tensor(INDICES, t(2).float()), t(2, 2).float()),
    "diag_embed": lambda t: torch.diag_embed(t(3)),
    "bernoulli_ of ones": lambda t: torch.empty(5).bernoulli_(t(5).ceil()),
    "bernoulli of zeros": lambda t: torch.bernoulli(t(5).floor()),
    "bernoulli_ of a number": lambda t: torch.empty(5).bernoulli_(t().ceil()),
    "normal of a mean": lambda t: torch.normal(t(4), 0.0),
    "normal of a mean and a deviation": lambda t: torch.normal(t(4), torch.zeros(4)),
    "normal of a deviation": lambda t: torch.normal(0.0, t(4).floor()),
    "poisson of zeros": lambda t: torch.poisson(t(4).floor()),
    "multinomial": lambda t: torch.multinomial(torch.cat([torch.zeros(3), t(1)]), 2, replacement=True),
    "addmm without inner elements": lambda t: torch.addmm(t(2, 3), torch.ones(2, 0), torch.ones(0, 3), beta=0.7),
    "cat into one without elements": lambda t: torch.cat([t(2) / 3, t(3)], out=torch.empty(0)),
    "a result with a dimension of one": lambda t: torch.linalg.solve_triangular(
        t(2, 2).float(), t(2, 1).float(), upper=True
    ),
    "splits at a tensor": lambda t: t(5).tensor_split(torch.empty(2, dtype=torch.int64).copy_(torch.tensor([1, 3]))),
    "splits at one's own": lambda t: torch.tensor_split(
        t(5), tensor_indices_or_sections=torch.full((), 2, dtype=torch.int64)
    ),
}

WRITERS = {
    "fill_": lambda t: torch.empty(3).fill_(t()),
    "constant_": lambda t: nn.init.constant_(torch.empty(3), t()),
    "copy_": lambda t: torch.empty(3).copy_(t(3)),
    "copy_ of a scalar": lambda t: torch.empty(2, 3).copy_(t()),
    "mul_": lambda t: torch.ones(3).mul_(t()),
    "add_ with alpha": lambda t: torch.ones(3).add_(t(3), alpha=t()),
    "sub_": lambda t: t(3).sub_(t(3)),
    "div_": lambda t: torch.ones(3).div_(t()),
    "pow_": lambda t: t(3).pow_(t(3)),
    "clamp_": lambda t: torch.linspace(-1, 1, 5).clamp_(-t(), t()),
    "slices": lambda t: _assigned(torch.zeros(4, 3), slice(1, 3), t(3)),
    "an element": lambda t: _assigned(torch.zeros(4), 2, t()),
    "a mask": lambda t: _assigned(torch.zeros(4), torch.arange(4) > 1, t(2)),
    "a mask of values": lambda t: _assigned(t(4), t(4) > 0.5, t()),
    "an index": lambda t: _assigned(torch.zeros(4), torch.tensor([3, 0]), t(2)),
    "elements of a table": lambda t: _filled(torch.zeros(12), lambda table, i: _assigned(table, i, math.sin(i))),
    "elements of rows": lambda t: _filled(torch.zeros(3, 4), lambda table, i: _assigned(table[i % 3], i // 3, t())),
    "whole numbers of a table": lambda t: _filled(torch.zeros(12).long(), lambda table, i: _assigned(table, i, i)),
    "rows of a table": lambda t: _filled(torch.zeros(12, 3), lambda table, i: _assigned(table, i, t(3) * i)),
    "rows that are one number": lambda t: _filled(t(12, 3), lambda table, i: _assigned(table, i, True)),
    "columns of a table": lambda t: _filled(t(2, 12), lambda table, i: _assigned(table, (..., i), t() / (i + 1))),
    "every other element of rows": lambda t: _filled(
        torch.zeros(12, 4), lambda table, i: _assigned(table, (i, slice(0, None, 2)), torch.arange(2) / (i + 1))
    ),
    "rows of their own": lambda t: _filled(t(12, 3), lambda table, i: _assigned(table, i, table[i - 1])),
    "elements of a transposed table": lambda t: _filled(t(4, 12).t(), lambda table, i: _assigned(table, (i, 3), 0.1)),
    "elements of data": lambda t: _filled(nn.Parameter(t(12)), lambda table, i: _assigned(table.data, i, 0.1 * i)),
    "an ellipsis": lambda t: _assigned(torch.zeros(2, 3), (..., 0), t(2)),
    "data": lambda t: _with_data(torch.zeros(3), t(3)),
    "index_put_": lambda t: torch.zeros(4).index_put_((torch.tensor([1, 1]),), t(2), accumulate=True),
    "index_put": lambda t: torch.index_put(torch.zeros(4), (torch.tensor([1, 3]),), t(2)),
    "index_copy_": lambda t: torch.zeros(4).index_copy_(0, torch.tensor([2, 0]), t(2)),
    "index_add_": lambda t: torch.zeros(4).index_add_(0, torch.tensor([2, 2]), t(2), alpha=2),
    "index_fill_": lambda t: torch.zeros(4).index_fill_(0, torch.tensor([2]), t()),
    "index_reduce_": lambda t: torch.ones(4).index_reduce_(0, torch.tensor([2, 2]), t(2), "prod"),
    "scatter_": lambda t: torch.zeros(4).scatter_(0, torch.tensor([3, 1]), t(2)),
    "scatter": lambda t: torch.scatter(t(4), 0, torch.tensor([3, 1]), t(2)),
    "scatter_add_": lambda t: torch.zeros(4).scatter_add_(0, torch.tensor([3, 3]), t(2)),
    "scatter_reduce_": lambda t: torch.zeros(4).scatter_reduce_(0, torch.tensor([3, 3]), t(2), "amax"),
    "slice_scatter": lambda t: torch.slice_scatter(torch.zeros(4), t(2), 0, 1, 3),
    "select_scatter": lambda t: torch.select_scatter(torch.zeros(2, 3), t(3), 0, 1),
    "diagonal_scatter": lambda t: torch.diagonal_scatter(torch.zeros(3, 3), t(3)),
    "masked_fill_": lambda t: torch.zeros(4).masked_fill_(torch.arange(4) > 1, t()),
    "masked_fill": lambda t: torch.masked_fill(t(4), t(4) > 0.5, t()),
    "masked_scatter_": lambda t: torch.zeros(4).masked_scatter_(torch.arange(4) > 1, t(2)),
    "put_": lambda t: torch.zeros(2, 2).put_(torch.tensor([3]), t(1)),
    "fill_diagonal_": lambda t: torch.zeros(3, 3).fill_diagonal_(t().item()),
    "lerp_": lambda t: torch.zeros(3).lerp_(t(3), t(3)),
    "addcmul_": lambda t: torch.zeros(3).addcmul_(t(3), t(3), value=2),
    "addmm_": lambda t: torch.zeros(2, 2).addmm_(t(2, 3), t(3, 2)),
    "foreach": lambda t: _foreach([torch.ones(2), torch.ones(3)], [t(2), t(3)]),
    "foreach out": lambda t: (
        lambda out: (torch.ops.aten._foreach_mul.List_out([t(2), t(3)], [t(2), t(3)], out=out), out)[1]
    )([torch.empty(2), torch.empty(3)]),
    "a view of an expanded one": lambda t: torch.zeros(2, 3).add_(t(3).expand(2, 3)),
    "running statistics": lambda t: _normalized(t(3), t(3), t(4, 3)),
    "set_": lambda t: torch.empty(0).set_(t(3)),
    "resized": lambda t: torch.empty(0).resize_(3).copy_(t(3)),
}

OPERATIONS = {
    "where": lambda t: torch.where(t(4) > 0.5, t(4), t(4) - 1),
    "where of scalars": lambda t: torch.where(torch.arange(4) > 1, t(), 0.0),
    "clamp": lambda t: torch.clamp(torch.linspace(-1, 1, 5), t() - 1, t()),
    "clamp by name": lambda t: torch.linspace(-1, 1, 5).clamp(min=t(5), max=t(5) + 0.1),
    "clip": lambda t: torch.clip(torch.linspace(-1, 1, 5), max=t(5)),
    "lerp": lambda t: torch.lerp(t(3), t(3) + 1, t(3)),
    "lerp by a number": lambda t: torch.lerp(t(3), t(3) + 1, 0.3),
    "addcmul": lambda t: torch.addcmul(t(3), t(3), t(3), value=0.5),
    "addcdiv": lambda t: torch.addcdiv(t(3), t(3), t(3), value=0.5),
    "addmm": lambda t: torch.addmm(t(2), t(2, 3), t(3, 2)),
    "baddbmm": lambda t: torch.baddbmm(t(2, 2, 2), t(2, 2, 3), t(2, 3, 2), beta=0.5),
    "addr": lambda t: torch.addr(t(2, 3), t(2), t(3)),
    "outer": lambda t: torch.outer(t(2), t(3)),
    "kron": lambda t: torch.kron(t(2, 2), t(2)),
    "matmul": lambda t: t(2, 3) @ t(3, 2),
    "number to a power": lambda t: 2.0 ** t(3),
    "number divided": lambda t: 1.0 / t(3),
    "number subtracted": lambda t: 1 - t(3),
    "atan2": lambda t: torch.atan2(t(3), t(3) + 1),
    "hypot": lambda t: torch.hypot(t(3), t(3)),
    "maximum": lambda t: torch.maximum(t(3), torch.full((3,), 0.4)),
    "remainder": lambda t: torch.remainder(t(3) * 5, t(3)),
    "copysign": lambda t: torch.copysign(t(3), torch.linspace(-1, 1, 3)),
    "heaviside": lambda t: torch.heaviside(torch.zeros(3), t(3)),
    "cross": lambda t: torch.linalg.cross(t(3), torch.arange(3.0)),
    "tensordot": lambda t: torch.tensordot(t(2, 3), t(3, 2), dims=1),
    "cdist": lambda t: torch.cdist(t(2, 3), t(2, 3) + 1),
    "comparison": lambda t: (t(3) < torch.full((3,), 0.5), t(3) == t(3)),
    "isin": lambda t: torch.isin(torch.full((3,), 0.3), t(3)),
    "searchsorted": lambda t: torch.searchsorted(torch.arange(1.0, 4.0) / 4, t(3)),
    "bucketize": lambda t: torch.bucketize(torch.linspace(0, 1, 5), t(3).cumsum(0)),
    "gather": lambda t: torch.gather(t(2, 3), 1, torch.tensor([[0], [2]])),
    "take": lambda t: torch.take(t(2, 3), torch.tensor([5, 0])),
    "integer tensor as index": lambda t: t(4)[torch.tensor(2)],
    "slice of tensors": lambda t: t(4)[torch.tensor(1) : torch.tensor(3)],
    "slice of a row": lambda t: t(3, 4)[torch.tensor(1), torch.tensor(2) :],
    "boolean index": lambda t: t(4)[t(4) > 0.25],
    "index_select": lambda t: torch.index_select(t(3, 2), 0, torch.tensor([2, 0])),
    "repeat_interleave": lambda t: torch.repeat_interleave(t(3), torch.tensor([1, 0, 2])),
    "narrow of a tensor": lambda t: torch.narrow(t(4), 0, torch.tensor(1), 2),
    "roll, sort, flip": lambda t: (t(4).roll(1), torch.sort(t(4), descending=True).values, t(4).flip(0)),
    "polynomial": lambda t: sum(c * t(3) ** k for k, c in enumerate(t(3))),
    "pad": lambda t: F.pad(t(3), (1, 2), value=t().item()),
    "pad of a pad": lambda t: F.pad(F.pad(t(1, 3), (1, 1), mode="replicate"), (1, 0)),
    "linear": lambda t: F.linear(t(2, 3), t(4, 3), t(4)),
    "conv1d": lambda t: F.conv1d(t(1, 2, 5), t(3, 2, 3), t(3)),
    "conv2d": lambda t: F.conv2d(t(1, 1, 4, 4), t(1, 1, 2, 2)),
    "layer_norm": lambda t: F.layer_norm(torch.arange(6.0).view(2, 3), (3,), t(3), t(3)),
    "batch_norm": lambda t: F.batch_norm(torch.arange(6.0).view(2, 3), t(3), t(3), t(3), t(3)),
    "group_norm": lambda t: F.group_norm(torch.arange(8.0).view(1, 4, 2), 2, t(4), t(4)),
    "embedding": lambda t: F.embedding(torch.tensor([1, 0]), t(3, 2)),
    "embedding_bag": lambda t: F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), t(3, 2), mode="sum"),
    "prelu": lambda t: F.prelu(torch.linspace(-1, 1, 3), t(1)),
    "bilinear": lambda t: F.bilinear(t(2, 3), t(2, 3), t(1, 3, 3)),
    "cross_entropy": lambda t: F.cross_entropy(t(2, 3), torch.tensor([0, 2]), weight=t(3)),
    "mse_loss": lambda t: F.mse_loss(t(3), torch.arange(3.0)),
    "cosine_similarity": lambda t: F.cosine_similarity(t(2, 3), torch.arange(1.0, 4.0).expand(2, 3)),
    "attention": lambda t: F.scaled_dot_product_attention(t(1, 2, 4), t(1, 2, 4), t(1, 2, 4), attn_mask=t(2, 2)),
    "quantized": lambda t: torch.quantize_per_tensor(t(4).float(), t().item(), 0, torch.qint8).int_repr(),
}

OUT = {
    "ones": lambda t: torch.ones(3, out=t(3)),
    "zeros": lambda t: torch.zeros(3, out=t(3)),
    "full": lambda t: torch.full((3,), 2.0, out=t(3)),
    "arange": lambda t: torch.arange(1, 4, out=t(3)),
    "linspace": lambda t: torch.linspace(1, 3, 3, out=t(3)),
    "logspace": lambda t: torch.logspace(0, 1, 3, out=t(3)),
    "eye": lambda t: torch.eye(2, out=t(2, 2)),
    "empty": lambda t: torch.empty(3, out=t(3)).fill_(1.0),
    "mul": lambda t: torch.mul(t(3), t(3), out=t(3)),
    "add into an operand": lambda t: _written(lambda x: torch.add(x, t(3), out=x), t(3)),
    "cat": lambda t: torch.cat([t(1), t(2)], out=torch.empty(3)),
    "stack": lambda t: torch.stack([t(2), t(2)], out=torch.empty(2, 2)),
    "matmul": lambda t: torch.matmul(t(2, 3), t(3, 2), out=torch.empty(2, 2)),
    "sum": lambda t: torch.sum(t(2, 3), 0, out=torch.empty(3)),
    "sort": lambda t: torch.sort(t(3), out=(torch.empty(3), torch.empty(3, dtype=torch.int64))),
    "out of another shape": lambda t: torch.mul(t(3), 2, out=torch.empty(0)),
    "a view of the result": lambda t: _written(lambda x: torch.mul(t(3), 2, out=x[1]), t(2, 3)),
    "a column of the result": lambda t: _written(lambda x: torch.mul(t(2), 2, out=x[:, 1]), t(2, 3)),
    "clamp": lambda t: torch.clamp(t(3), 0.2, 0.4, out=torch.empty(3)),
    "steps afterwards": lambda t: torch.arange(1, 4, out=t(3)).mul_(3.14159).add_(t()),
    "where": lambda t: torch.where(t(3) > 0.5, t(3), t(3), out=torch.empty(3)),
}

Rows = namedtuple("Rows", "first second")


class Listed(list):
    """A list of a class of its own, as configurations of libraries have."""


CONTAINERS = {
    "cat of a namedtuple": lambda t: torch.cat(Rows(t(2), t(3))),
    "cat of a list subclass": lambda t: torch.cat(Listed([t(2), t(3)])),
    "cat of views": lambda t: torch.cat(t(6).chunk(3)[::-1]),
    "cat by name": lambda t: torch.cat(tensors=Rows(t(1, 2), t(1, 3)), dim=1),
    "concat": lambda t: torch.concat((t(2), torch.zeros(1), t(2))),
    "stack of a returned tuple": lambda t: torch.stack(t(5).aminmax()),
    "stack of a namedtuple": lambda t: torch.stack(Rows(t(2), t(2)), dim=1),
    "stack of a sort": lambda t: torch.stack([torch.sort(t(4)).values, t(4).topk(4)[0]]),
    "stack of an unbound": lambda t: torch.stack(Listed(t(2, 3).unbind(1))),
    "hstack": lambda t: torch.hstack(Rows(t(2), t(3))),
    "vstack": lambda t: torch.vstack((t(2), t(2))),
    "column_stack": lambda t: torch.column_stack(Listed([t(2), t(2, 2)])),
    "block_diag": lambda t: torch.block_diag(t(2, 2), t(1), t(2)),
    "meshgrid": lambda t: torch.meshgrid(t(2), t(3), indexing="ij"),
    "meshgrid of a list": lambda t: torch.meshgrid(Listed([t(2), t(3)]), indexing="xy"),
    "broadcast_tensors": lambda t: torch.broadcast_tensors(t(2, 1), t(3)),
    "cartesian_prod": lambda t: torch.cartesian_prod(t(2), t(3)),
    "combinations": lambda t: torch.combinations(t(3)),
    "atleast_2d": lambda t: torch.atleast_2d(t(3), t()),
    "einsum": lambda t: torch.einsum("i,j->ij", t(2), t(3)),
    "einsum of a list": lambda t: torch.einsum("ij,jk,k->i", [t(2, 3), t(3, 2), t(2)]),
    "multi_dot": lambda t: torch.linalg.multi_dot(Rows(t(2, 3), t(3, 2))),
    "tensor_split": lambda t: torch.tensor_split(t(5), torch.tensor([1, 3])),
    "split": lambda t: torch.split(t(5), torch.tensor([2, 3]).tolist()),
    "foreach_mul": lambda t: torch._foreach_mul(Listed([t(2), t(3)]), 2.0),
    "foreach_add": lambda t: torch._foreach_add(Rows(t(2), t(3)), (t(2), t(3))),
    "foreach_norm": lambda t: torch._foreach_norm([t(2), t(3)]),
    "parameters_to_vector": lambda t: nn.utils.parameters_to_vector(iter([t(2), t(3)])),
    "pad_sequence": lambda t: nn.utils.rnn.pad_sequence([t(2), t(3)], batch_first=True),
    "packed sequence": lambda t: nn.utils.rnn.pack_sequence([t(3), t(2)]).data,
    "keyword arguments of a dict": lambda t: _called(F.linear, {"input": t(2, 3), "weight": t(2, 3), "bias": t(2)}),
    "a tuple of bounds": lambda t: torch.linspace(-1, 1, 5).clamp(*Rows(t(5) - 1, t(5))),
    "a tuple of indices": lambda t: t(2, 3)[Rows(torch.tensor([0, 1]), torch.tensor([2, 0]))],
    "a list of lists": lambda t: torch.tensor(Listed([Rows(t(), t()), (t(), 0.0)])),
    "stack of eigenvalues": lambda t: torch.stack(torch.linalg.eigh(torch.diag(t(2) + torch.arange(2.0)))[:1]),
    "an ordered dict": lambda t: OrderedDict(a=t(2) * 2, b=[t(3), (t(1).clone(),)]),
}


def _called(function, arguments):
    return function(**arguments)


def _assigned(tensor, index, value):
    tensor[index] = value
    return tensor


def _filled(table, write):
    for i in range(12):  # so many that they are not kept as a recipe
        write(table, i)
    return table


def _written(write, tensor):
    write(tensor)
    return tensor


def _with_data(tensor, value):
    tensor.data = value
    return tensor


def _foreach(tensors, others):
    torch._foreach_mul_(tensors, others)
    return tensors


def _normalized(mean, variance, batch):
    F.batch_norm(batch, mean, variance, training=True, momentum=0.5)
    return mean, variance


@pytest.mark.parametrize("name", FACTORIES)
@over_dtypes
@over_sources
def test_a_factory_takes_pending_tensors_as_its_data(name, dtype, source):
    check(FACTORIES[name], dtype, source)


@pytest.mark.parametrize("name", WRITERS)
@over_dtypes
@over_sources
def test_a_pending_tensor_is_written_into_another(name, dtype, source):
    check(WRITERS[name], dtype, source)


@pytest.mark.parametrize("name", OPERATIONS)
@over_dtypes
@over_sources
def test_every_operand_of_an_operation_may_be_pending(name, dtype, source):
    check(OPERATIONS[name], dtype, source)


@pytest.mark.parametrize("name", OUT)
@over_dtypes
@over_sources
def test_a_result_is_written_to_a_pending_tensor(name, dtype, source):
    check(OUT[name], dtype, source)


@pytest.mark.parametrize("name", CONTAINERS)
@over_dtypes
@over_sources
def test_pending_tensors_are_found_in_any_container(name, dtype, source):
    check(CONTAINERS[name], dtype, source)


# Initializations whose parameters are tensors -------------------------------------------------------------------------

BOUNDED = {
    "uniform_": lambda w, a: nn.init.uniform_(w, -a, a),
    "normal_": lambda w, a: nn.init.normal_(w, 0.0, a),
    "normal_ of a mean": lambda w, a: nn.init.normal_(w, a, a),
    "xavier_uniform_": lambda w, a: nn.init.xavier_uniform_(w, gain=a),
    "xavier_normal_": lambda w, a: nn.init.xavier_normal_(w, gain=a),
    "orthogonal_": lambda w, a: nn.init.orthogonal_(w, gain=a),
    "sparse_": lambda w, a: nn.init.sparse_(w, 0.1, std=a),
    "method uniform_": lambda w, a: w.uniform_(-a, a),
    "method normal_ by name": lambda w, a: w.normal_(mean=0.0, std=a),
    "method exponential_": lambda w, a: w.exponential_(a),
    "method clamp_": lambda w, a: w.uniform_(-1, 1).clamp_(min=-a, max=a),
    "method mul_": lambda w, a: w.normal_().mul_(a),
    "a truncated normal by hand": lambda w, a: w.uniform_(-0.9, 0.9).erfinv_().mul_(a).clamp_(-a, a),
    "rand times": lambda w, a: w.copy_(torch.rand(w.shape) * a - a),
}
TENSORS = {
    "constant": lambda: torch.full((), 0.25),
    "computed": lambda: torch.sqrt(torch.tensor(6.0) / 90),
    "one element": lambda: (torch.tensor([0.25]) * 2).squeeze(),
    "a parameter": lambda: nn.Parameter(torch.tensor(0.3)).detach(),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", BOUNDED)
@over_dtypes
def test_a_bound_or_deviation_may_be_a_pending_tensor(name, kind, dtype):
    tensor, number = TENSORS[kind], TENSORS[kind]().item()

    def fill(bound):
        with torch.no_grad():
            return BOUNDED[name](torch.empty(12, 30), bound())

    # In double precision, that is of a Python number, a bound may come out a little differently.
    with_tensor, with_number = inside(lambda: fill(tensor), dtype), inside(lambda: fill(lambda: number), dtype)
    assert close(with_tensor, with_number, 4 * torch.finfo(DTYPES[dtype]).eps)
    if name.endswith("uniform_") and "xavier" not in name:
        assert 0.95 * number < with_tensor.abs().max() < 1.01 * number
    assert_rounded(with_tensor, inside(lambda: fill(tensor)), dtype)


class Bessel(nn.Module):
    """The layer of DimeNet, in PyTorch Geometric, that writes its frequencies with `out=`."""

    def __init__(self, number=6):
        super().__init__()
        self.freq = nn.Parameter(torch.empty(number))
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            torch.arange(1, self.freq.numel() + 1, out=self.freq).mul_(math.pi)
        self.freq.requires_grad_()


@over_dtypes
def test_a_parameter_is_the_result_of_arange(dtype):
    model, right = inside(Bessel, dtype), Bessel()
    assert_rounded(model.freq, right.freq, dtype)
    assert type(model.freq) is nn.Parameter and model.freq.is_leaf and model.freq.requires_grad


@over_dtypes
def test_bounds_are_right_in_every_block(dtype):
    for number in range(4):

        def weights(number=number):
            bound = torch.sqrt(torch.tensor(6.0) / (8 + number))
            deviation = torch.tensor(0.02) * (number + 1)
            weights = torch.empty(4000), torch.empty(4000)
            return nn.init.uniform_(weights[0], -bound, bound), nn.init.normal_(weights[1], 0.0, deviation)

        uniform, normal = inside(weights, dtype)
        assert uniform.float().abs().max() == pytest.approx((6 / (8 + number)) ** 0.5, rel=0.01)
        assert normal.float().std() == pytest.approx(0.02 * (number + 1), rel=0.05)


@pytest.mark.parametrize("name", ["as_strided", "as_strided_"])
@over_dtypes
def test_a_view_beyond_its_tensor_is_refused_when_it_is_asked_for(name, dtype):
    def construct():
        weight = torch.ones(3, 3)
        for sizes, strides, offset in (((4, 4), (4, 2), 0), ((2,), (1,), 8)):
            with pytest.raises(RuntimeError, match="out of bounds"):
                getattr(weight, name)(sizes, strides, offset)
        return weight.as_strided((3,), (4,)).zero_() + weight.sum()

    assert inside(construct, dtype).tolist() == [6.0] * 3


@pytest.mark.parametrize("function", [torch.as_tensor, torch.asarray])
def test_an_array_that_is_converted_stays_what_it_is(function):
    array = np.ones(4, dtype=np.float32)
    with fastinit.on("cpu", "bf16"):
        tensor = function(array, dtype=torch.bfloat16).mul_(2)
    assert tensor.tolist() == [2.0] * 4
    assert array.tolist() == [1.0] * 4


@over_dtypes
def test_what_torch_refuses_to_write_to_an_element_leaves_the_table_as_it_was(dtype):
    def program():
        table = torch.arange(12.0) / 7
        table[0] = 0.5
        for index, value in ((12, 1.0), (0, torch.ones(2)), ((0, 0), 1.0), (slice(0, 12), torch.ones(5))):
            with pytest.raises((IndexError, RuntimeError)):
                table[index] = value
        version = table._version
        table[1] = 0.25
        assert table._version > version
        return table

    assert_rounded(inside(program, dtype), torch.tensor([0.5, 0.25, *(torch.arange(12.0) / 7)[2:]]), dtype)


@over_dtypes
def test_a_table_that_requires_grad_is_torchs_to_write(dtype):
    def program():
        table = nn.Parameter(torch.arange(12.0) / 7)
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            table[0] = 1.0
        with torch.no_grad():
            table[0] = 1.0
        copy = table.clone()
        copy[1] = 2.0
        assert copy.grad_fn is not None
        return table

    assert inside(program, dtype)[:2].tolist() == [1.0, torch.tensor(1 / 7).to(DTYPES[dtype]).item()]

"""Views in a block: what torch's graphs, versions and refusals know of them is what they know outside."""

import copy
import gc
import operator
import weakref

import pytest
import torch
from cases import assert_as_torch, inside, over_dtypes
from models import DTYPES, plain
from torch import nn

import fastinit

pytestmark = pytest.mark.filterwarnings("ignore")

TAKEN = {
    "a slice": lambda x: x[1:3],
    "a row": lambda x: x.view(2, 2)[1],
    "narrow": lambda x: x.narrow(0, 1, 2),
    "a view of a view": lambda x: x[1:].view(3, 1)[:2].squeeze(1),
    "split": lambda x: x.split(2)[0],
    "diagonal": lambda x: x.view(2, 2).diagonal(),
}


def _filled(kind):
    return {"zeros": torch.zeros, "random": torch.randn, "computed": lambda n: torch.arange(float(n))}[kind](4)


over_views = pytest.mark.parametrize("taken", TAKEN)
over_kinds = pytest.mark.parametrize("kind", ["zeros", "random", "computed"])


@pytest.mark.parametrize("taken", [each for each in TAKEN if each != "split"])  # which may not be written to
@over_kinds
@over_dtypes
def test_what_is_written_to_a_view_is_in_the_graph_of_its_base(taken, kind, dtype):
    def run():
        p = nn.Parameter(torch.full((2,), 3.0))
        x = torch.zeros(4) if kind == "random" else _filled(kind)
        y = TAKEN[taken](x)
        y.copy_(p * 2)
        (x * torch.tensor([1.0, 2.0, 3.0, 4.0])).float().sum().backward()
        return [x, p.grad]

    assert_as_torch(inside(run, dtype), plain(run, dtype), dtype)


@over_dtypes
def test_views_follow_a_base_that_a_graph_has_written_to(dtype):
    def run():
        p = nn.Parameter(torch.ones(1))
        x = torch.zeros(4)
        views = [taken(x) for taken in TAKEN.values()]
        x.add_(p)
        return [each.requires_grad for each in views]

    assert inside(run, dtype) == plain(run, dtype) == [True] * len(TAKEN)


@over_views
@over_kinds
@over_dtypes
def test_a_gradient_is_asked_for_behind_a_view(taken, kind, dtype):
    def run():
        x = (_filled(kind) if kind != "random" else torch.ones(4)).requires_grad_()
        y = TAKEN[taken](x)
        return [*torch.autograd.grad((y * 2).float().sum(), x), y.detach()]

    assert_as_torch(inside(run, dtype), plain(run, dtype), dtype)


@over_views
@over_kinds
@over_dtypes
@pytest.mark.parametrize("real", ["neither", "the base first", "the view first"])
def test_a_view_stays_one_of_its_base(taken, kind, dtype, real):
    def run():
        x = _filled(kind)
        y = TAKEN[taken](x)
        order = {"neither": [], "the base first": [x, y], "the view first": [y, x]}[real]
        for each in order:
            each.data_ptr()
        before = y._version
        x.add_(1)
        return x, y, (y._is_view(), y._base is x, y._version - before, torch.equal(y, TAKEN[taken](x)))

    x, y, known = inside(run, dtype)
    assert known == (True, True, 1, True)
    assert type(x) is type(y) is torch.Tensor and y._base is x
    x.zero_()
    assert y.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "write",
    [
        lambda: torch.zeros(1, requires_grad=True).view(1).add_(1),
        lambda: torch.zeros(1, requires_grad=True).expand(2)[0].mul_(2),
        lambda: torch.zeros(1, 2).unbind()[0].copy_(torch.ones(2, requires_grad=True)),
        lambda: torch.zeros(4).split(2)[0].mul_(torch.ones(2, requires_grad=True)),
        lambda: torch.no_grad()(lambda x: x[:1])(torch.zeros(2)).mul_(torch.ones(1, requires_grad=True)),
    ],
    ids=["view of a leaf", "view of a view of a leaf", "unbind", "split", "taken without gradient"],
)
@over_dtypes
def test_views_that_torch_lets_nobody_write_to_are_refused(write, dtype):
    with pytest.raises(RuntimeError) as right:
        plain(write, dtype)
    with pytest.raises(RuntimeError) as refused:
        inside(write, dtype)
    words = ("inplace", "in-place")
    assert any(each in str(right.value) for each in words) and any(each in str(refused.value) for each in words)


@over_dtypes
def test_a_copy_of_a_base_and_its_view_share_memory(dtype):
    def run():
        x = torch.zeros(4)
        copied, view = copy.deepcopy([x, x[1:3]])
        copied.add_(1)
        return [copied, view, x]

    assert_as_torch(inside(run, dtype), plain(run, dtype), dtype)


# --- what keeps hold of a leaf ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [False, True], ids=["in the block", "after it"])
@over_dtypes
def test_hooks_of_the_node_that_accumulates_a_gradient_are_run(later, dtype):
    hits = []

    def construct():
        p = nn.Parameter(torch.ones(2))
        # Kept by who asked for it: torch itself holds it weakly.
        p.node = p.expand_as(p).grad_fn.next_functions[0][0]
        p.node.register_hook(lambda *gradients: hits.append(1))
        return p if later else train(p)

    def train(p):
        (p * 2).sum().backward()
        return p

    p = inside(construct, dtype)
    p = train(p) if later else p
    assert hits == [1] and p.grad.tolist() == [2.0, 2.0]


class Square(torch.autograd.Function):
    """A function whose context is set up apart, which no mode sees."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def _dual(x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.full((2,), 3.0))
        return torch.autograd.forward_ad.unpack_dual(dual * 2).tangent


@pytest.mark.parametrize(
    "derivative",
    [
        lambda x: torch.autograd.grad(Square.apply(x.requires_grad_()).float().sum(), x)[0],
        lambda x: torch.autograd.grad(torch.exp(x.requires_grad_()).float().sum(), x)[0],
        lambda x: torch.autograd.grad(torch.mul(x.requires_grad_(), 2).float().sum(), x)[0],
        lambda x: torch.autograd.grad(
            torch.utils.checkpoint.checkpoint(torch.exp, x.requires_grad_(), use_reentrant=False).float().sum(), x
        )[0],
        _dual,
    ],
    ids=["a function of its own", "torch.exp", "torch.mul", "a checkpoint", "forward mode"],
)
@over_dtypes
def test_derivatives_of_pending_leaves_are_found(derivative, dtype):
    def run():
        return derivative(torch.full((2,), 0.5))

    assert inside(run, dtype).dtype == DTYPES[dtype]
    assert_as_torch(inside(run, dtype), plain(run, dtype), dtype)


@over_dtypes
def test_what_is_written_to_the_data_of_a_tensor_is_no_new_version_of_it(dtype):
    def run():
        leaf, pending = torch.rand(4).requires_grad_(), torch.rand(4)
        data, alias = leaf.data, leaf.detach()
        part = data[1:]
        y = (leaf * leaf).sum()
        data.mul_(0.5)
        part.add_(1)
        y.backward()
        pending.data.add_(1)
        shared = torch.equal(leaf, data) and torch.equal(alias[1:], part)
        return (
            [each._version for each in (leaf, alias, data, part, pending)],
            part._base is data,
            data._is_view(),
            shared,
        )

    assert inside(run, dtype) == plain(run, dtype)


@pytest.mark.parametrize("taken", TAKEN)
@over_dtypes
def test_a_view_of_a_parameter_requires_grad_also_while_no_graph_is_recorded(taken, dtype):
    def run():
        p = nn.Parameter(torch.zeros(4))
        with torch.no_grad():
            view = TAKEN[taken](p)
        return view.requires_grad, view.is_leaf

    assert inside(run, dtype) == plain(run, dtype)


WRITES = {
    "an element": lambda v: v.__setitem__(0, 9.0),
    "a step": lambda v: v.mul_(3.0),
    "a sum": lambda v: operator.iadd(v, torch.ones_like(v)),
    "a fill": lambda v: v.zero_(),
}


# What shares the versions of a tensor. It is written to in the block, or when that has ended.
ALIASES = {
    "itself": lambda b: b,
    "a view": lambda b: b[1:],
    "detached": lambda b: b.detach(),
    "a part of it, detached": lambda b: b.detach()[1:],
    "a view, detached": lambda b: b[1:].detach(),
    "a parameter": lambda b: nn.Parameter(b, requires_grad=False),
    "a parameter's alias": lambda b: nn.Parameter(b).detach().view(2, 2)[0],
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("saved", ["filled", "computed", "of a graph"])
@pytest.mark.parametrize("ended", [False, True])
@over_dtypes
def test_what_is_written_to_an_alias_is_a_new_version_of_what_a_graph_has_saved(write, alias, saved, ended, dtype):
    def made():
        w = nn.Parameter(torch.ones(4))
        b = {"filled": torch.ones(4), "computed": torch.arange(4.0).add(1), "of a graph": w * 2}[saved]
        return (b * w).sum(), ALIASES[alias](b)

    def run():
        y, written = made()
        with torch.no_grad():
            WRITES[write](written)
        y.backward()

    def run_afterwards():
        y, written = inside(made, dtype)
        with torch.no_grad():
            WRITES[write](written)
        y.backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        plain(run, dtype)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run_afterwards() if ended else inside(run, dtype)


@over_dtypes
def test_a_view_of_a_leaf_that_is_written_to_without_a_graph_outlives_the_block(dtype):
    def run():
        leaf = nn.Parameter(torch.full((3,), 0.5))
        with torch.no_grad():
            view = leaf.chunk(3)[0].reshape(())
            view.add_(1)
        return leaf, view

    ours, theirs = inside(run, dtype), plain(run, dtype)
    with torch.no_grad():
        assert [each.tolist() for each in ours] == [each.tolist() for each in theirs]
        ours[0][0] = 3.0
        assert ours[1].item() == 3.0


@over_dtypes
def test_the_data_of_data_of_a_tensor_and_so_on_is_one_step_from_it(dtype):
    def run():
        data = leaf = nn.Parameter(torch.zeros(3))
        for _ in range(2000):
            data = data.data
        data.add_(1)
        return leaf, data

    assert [each.tolist() for each in inside(run, dtype)] == [[1.0, 1.0, 1.0]] * 2


@over_dtypes
def test_the_data_of_a_tensor_keeps_no_trace_of_it(dtype):
    def run():
        weight = nn.Parameter(torch.zeros(3))
        data = weight.data
        weight.data = torch.ones(3)
        return weight, data

    weight, data = inside(run, dtype)
    assert not vars(data) and not vars(weight) and not data.any() and weight.all()


@over_dtypes
def test_a_tensor_and_its_views_are_freed_with_their_last_references(dtype):
    gc.collect()
    gc.disable()
    try:
        with fastinit.on("cpu", dtype):
            base = torch.randn(4, 3)
            kept = [base[0], base.data, base]
        gone = [weakref.ref(each) for each in kept]
        del base, kept
        assert [ref() for ref in gone] == [None, None, None]
    finally:
        gc.enable()


OTHER_WRITES = {
    "trunc_normal_": nn.init.trunc_normal_,
    "set_": lambda b: b.set_(torch.zeros(4)),
    "a list of tensors": lambda b: torch._foreach_mul_([b], 5.0),
}


@pytest.mark.parametrize("write", OTHER_WRITES)
@over_dtypes
def test_every_kind_of_write_is_a_new_version_of_what_a_graph_has_saved(write, dtype):
    def run():
        b, w = torch.ones(4), nn.Parameter(torch.ones(4))
        y = (b * w).sum()
        OTHER_WRITES[write](b)
        return y

    for where in (plain, inside):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            where(run, dtype).backward()


def _requiring_itself():
    x = torch.zeros(4)
    view = x[:2].requires_grad_()
    return (view * 2).sum(), x, view


def _requiring_by_its_base():
    x = torch.full((4,), 3.0)
    view = x[:2]
    x.requires_grad_()
    return (view * view).sum(), x, view


def _taken_without_a_graph():
    x = nn.Parameter(torch.ones(4))
    with torch.no_grad():
        view = x[1:]
    return (x * 2).sum(), x, view


@pytest.mark.parametrize("made", [_requiring_itself, _requiring_by_its_base, _taken_without_a_graph])
@over_dtypes
def test_after_the_block_a_view_has_the_gradient_that_torch_gives_it(made, dtype):
    def gradients(made):
        y, *tensors = made
        if y.requires_grad:
            y.backward()
        return [each.grad for each in tensors if each.grad is not None]

    right = gradients(plain(made, dtype))
    assert_as_torch(gradients(inside(made, dtype)), right, dtype)


@over_dtypes
def test_a_long_chain_of_views_ends_and_shows_its_base(dtype):
    def run():
        x = torch.ones(8)
        view = x
        for _ in range(1500):  # of which torch would keep a function each
            view = view.view(2, 4).view(8)
        view.add_(1)
        return [x, torch.tensor(view._base is x)]

    assert_as_torch(inside(run, dtype), plain(run, dtype), dtype)


@over_dtypes
def test_a_view_without_a_graph_that_is_initialized_after_its_base_has_other_data_ends_the_block(dtype):
    def run():
        p = nn.Parameter(torch.ones(4, 2))
        with torch.no_grad():
            view = p[-1]
            other = view.view(-1)
        p.data = p.data * 2
        nn.init.constant_(view, 3.0)
        return p, other

    assert [each.tolist() for each in inside(run, dtype)] == [each.tolist() for each in plain(run, dtype)]


@over_dtypes
def test_hooks_of_accumulated_gradients_are_called_after_the_block(dtype):
    def made():
        p, seen = nn.Parameter(torch.ones(3)), []
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.tolist()))
        return (p * 2).sum(), seen

    y, seen = inside(made, dtype)
    y.backward()
    assert seen == [[2.0, 2.0, 2.0]]

"""A seed that the code sets decides what is drawn under it, alone, and a state that is put back replays."""

import pytest
import torch
from cases import assert_rounded, draw, inside, over_dtypes, same
from models import DTYPES, bits, plain, same_bits
from torch import distributions as D
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastinit

pytestmark = pytest.mark.filterwarnings("ignore")

# Seeds that the code sets ---------------------------------------------------------------------------------------------


def projection(seed=42, function=lambda: torch.randn(30)):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return function()


UNDER_A_SEED = {
    "randn": lambda: torch.randn(30),
    "rand": lambda: torch.rand(30),
    "a parameter": lambda: nn.init.normal_(nn.Parameter(torch.empty(30))).detach(),
    "a layer": lambda: [p.detach() for p in nn.Linear(5, 5).parameters()],
    "two layers": lambda: [p.detach() for p in nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).parameters()],
    "orthogonal_": lambda: nn.init.orthogonal_(torch.empty(6, 6)),
    "steps": lambda: torch.randn(30).mul_(0.3).add_(1.0).clamp_(0.5, 1.5),
    "trunc_normal_": lambda: nn.init.trunc_normal_(torch.empty(30), std=0.02),
    "randperm": lambda: torch.randperm(30),
    "choice and fill": lambda: torch.randn(30)[torch.randperm(30)],
    "fill and choice": lambda: [torch.randperm(30), torch.randn(30), torch.randint(9, (30,)), torch.rand(30)],
    "Gamma": lambda: D.Gamma(torch.ones(30), 1.0).sample(),
    "dropout": lambda: F.dropout(torch.ones(30)),
    "a view": lambda: torch.empty(6, 10).normal_()[2:4].t(),
}


@pytest.mark.parametrize("name", UNDER_A_SEED)
@over_dtypes
def test_what_is_drawn_under_a_seed_of_the_code_is_the_same_everywhere(name, dtype):
    function = UNDER_A_SEED[name]

    def twice():
        first = projection(42, function)
        nn.Linear(3, 3), torch.randperm(5), torch.rand(3)
        return first, projection(42, function), projection(43, function)

    first, second, other = draw(twice, dtype)
    assert same(first, second) and not same(first, other)
    assert same(first, draw(lambda: projection(42, function), dtype, seed=1, outer=2))
    assert same(first, inside(lambda: projection(42, function), dtype, seed=None))
    assert_rounded(
        [x for x in tree_leaves(first) if x.is_floating_point()],
        [x for x in tree_leaves(draw(lambda: projection(42, function))) if x.is_floating_point()],
        dtype,
    )


@over_dtypes
def test_draws_under_one_seed_are_different_ones(dtype):
    one, other, third = draw(lambda: projection(7, lambda: (torch.randn(30), torch.randn(30), torch.rand(30))), dtype)
    assert not same_bits(one, other) and not same_bits(other, third)


SETTERS = {
    "torch.manual_seed": lambda seed: torch.manual_seed(seed),
    "torch.random.manual_seed": lambda seed: torch.random.manual_seed(seed),
    "torch.default_generator": lambda seed: torch.default_generator.manual_seed(seed),
    "a state": lambda seed: torch.set_rng_state(torch.Generator().manual_seed(seed).get_state()),
}


@pytest.mark.parametrize("name", SETTERS)
@over_dtypes
def test_a_seed_in_the_block_decides_all_that_follows_and_nothing_outside(name, dtype):
    def construct():
        before = nn.Linear(4, 4).weight.detach()
        SETTERS[name](7)
        return before, [nn.Linear(4, 4).weight.detach(), torch.randperm(9), torch.rand(9)]

    (before, after), (other, same_after) = draw(construct, dtype, seed=1), draw(construct, dtype, seed=2, outer=2)
    assert same(after, same_after) and not same_bits(before, other)
    with fastinit.on("cpu", dtype, seed=1):
        SETTERS[name](7)
        with fastinit.on("cpu", dtype, seed=3):
            SETTERS[name](8)
        again = [nn.Linear(4, 4).weight.detach(), torch.randperm(9), torch.rand(9)]
    assert same(after, again)


def test_the_default_seed_of_the_process_is_as_before():
    torch.manual_seed(5)
    draw(lambda: torch.manual_seed(7), outer=5)
    assert torch.initial_seed() == 5


@over_dtypes
def test_a_state_that_is_put_back_replays(dtype):
    def construct():
        state = torch.get_rng_state()
        first = nn.Linear(4, 4).weight.detach(), torch.randperm(9), torch.rand(9), torch.empty(9).exponential_()
        torch.set_rng_state(state)
        second = nn.Linear(4, 4).weight.detach(), torch.randperm(9), torch.rand(9), torch.empty(9).exponential_()
        with torch.random.fork_rng(devices=[]):
            inner = torch.rand(9)
        return first, second, inner, torch.rand(9)

    first, second, inner, outer = draw(construct, dtype)
    assert same(first, second) and same_bits(inner, outer) and not same_bits(inner, second[2])
    torch_first, torch_second, torch_inner, torch_outer = plain(construct, dtype)
    assert same(torch_first, torch_second) and same_bits(torch_inner, torch_outer)


@over_dtypes
def test_a_forked_seed_leaves_what_follows_as_it_would_be_without(dtype):
    def construct(inner):
        first = nn.Linear(4, 4)
        if inner:
            projection()
        return [p.detach() for p in (*first.parameters(), *nn.Linear(4, 4).parameters())] + [torch.randperm(9)]

    for run in (plain, draw):
        assert same(run(lambda: construct(True), dtype), run(lambda: construct(False), dtype))


@pytest.mark.parametrize("reentrant", [False, True])
@over_dtypes
def test_activation_checkpointing_draws_the_same_mask_again(reentrant, dtype):
    def recompute():
        x = torch.ones(1000, requires_grad=True)
        y = checkpoint(nn.Dropout(0.5), x, use_reentrant=reentrant)
        y.sum().backward()
        return y.detach(), x.grad  # the gradient of dropout is its mask

    for run in (plain, draw):
        result, mask = run(recompute, dtype)
        assert same_bits(result, mask) and 300 < (mask == 0).sum() < 700


DRAWN_AGAIN = {
    "rand": lambda x: x * torch.rand(100),
    "an init": lambda x: x * nn.init.normal_(torch.empty(100)),
    "randn_like": lambda x: x * torch.randn_like(x.detach()),
    "both kinds": lambda x: F.dropout(x, 0.5) * torch.rand(100) * F.dropout(torch.ones(100), 0.3) * torch.randn(100),
    "nested": lambda x: checkpoint(lambda y: y * torch.rand(100), x * torch.rand(100), use_reentrant=False),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", DRAWN_AGAIN)
@over_dtypes
def test_activation_checkpointing_draws_the_same_numbers_again(name, reentrant, dtype):
    def recompute():
        x = torch.ones(100, requires_grad=True)
        y = checkpoint(DRAWN_AGAIN[name], x, use_reentrant=reentrant)
        torch.rand(5)
        y.sum().backward()
        return y.detach(), x.grad, torch.rand(3)

    y, gradient, _ = draw(recompute, dtype)
    assert torch.allclose(y.float(), gradient.float(), rtol=4 * torch.finfo(DTYPES[dtype]).eps)  # products in any order
    assert y.dtype == gradient.dtype == DTYPES[dtype] and y.unique().numel() > 20


@over_dtypes
def test_what_backward_calls_is_in_the_block(dtype):
    made = []

    def call():
        w = nn.Parameter(torch.full((2,), 0.5))
        w.register_hook(lambda g: made.append(torch.ones(2)) or g * torch.full((2,), 0.5))
        (w * w).sum().backward()
        return w.grad, *torch.autograd.grad((w * w).sum(), w), *made

    assert [each.dtype for each in draw(call, dtype)] == [DTYPES[dtype]] * 4


# Steps ----------------------------------------------------------------------------------------------------------------


def _truncated(w, std, mean=0.0):
    w.uniform_(-0.9544997, 0.9544997)
    w.erfinv_()
    w.mul_(2**0.5)
    w.clamp_(-2, 2)
    w.mul_(std).add_(mean)


CHAINS = {
    "twice": lambda w: (_truncated(w, 0.25), _truncated(w, 0.25)),
    "once": lambda w: _truncated(w, 0.25),
    "of another deviation": lambda w: (_truncated(w, 0.25), _truncated(w, 0.5, 1.0)),
    "after another init": lambda w: (nn.init.xavier_normal_(w), _truncated(w, 0.25)),
    "with another step": lambda w: (_truncated(w, 0.25), w.neg_(), _truncated(w, 0.25), w.add_(w)),
    "in parts": lambda w: (_truncated(w[:3], 0.25), _truncated(w[3:], 0.5), _truncated(w[1:2], 1.0)),
    "of a column": lambda w: (_truncated(w, 0.25), _truncated(w[:, 1], 0.25)),
    "read between": lambda w: (_truncated(w, 0.25), w.abs().max().item(), _truncated(w, 0.25)),
    "other steps": lambda w: (w.uniform_(-1, 1), w.erfinv_(), w.abs_(), w.sqrt_(), w.mul_(3), w.normal_(), w.sub_(1)),
    "interrupted": lambda w: (w.uniform_(-0.5, 0.5), w.erfinv_(), w.normal_(), w.clamp_(-1, 1), _truncated(w, 0.1)),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_whether_steps_are_recognized_does_not_change_a_value(name, dtype):
    def construct():
        module = nn.Module()
        module.weight, module.next = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6, 4))
        with torch.no_grad():
            CHAINS[name](module.weight)
            module.next.normal_()
        return module.weight.detach(), module.next.detach()

    assert_rounded(draw(construct, dtype), draw(construct), dtype)
    assert DTYPES[dtype] == draw(construct, dtype)[0].dtype and bits(draw(construct)[0]).any()

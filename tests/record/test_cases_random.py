"""The seed of the block decides alone what is random in it, whatever draws it, and moves no generator of torch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import DRAWS_ARE_ROUNDED, assert_rounded, close, draw, in_torch, inside, over_dtypes, same
from models import SEED, assert_same_distribution, plain, same_bits
from torch import distributions as D
from torch import nn
from torch.nn import functional as F
from torch.utils import data

pytestmark = pytest.mark.filterwarnings("ignore")

N = 400


@torch.jit.script
def scripted(number: int):
    return torch.rand([number])


def half(shape=(N,)):
    return torch.full(shape, 0.5)


NUMPY = {
    "normal_": lambda n: torch.empty(N).normal_(0, n.sqrt(2 / 9)),
    "normal_ of fp32 scalars": lambda n: torch.empty(N).normal_(n.float32(0.5), n.float32(2)),
    "normal_ by name": lambda n: torch.empty(N).normal_(mean=n.float64(0), std=n.sqrt(2 / 9)),
    "uniform_": lambda n: torch.empty(N).uniform_(-n.sqrt(0.1), n.sqrt(0.1)),
    "init.normal_": lambda n: nn.init.normal_(torch.empty(N), n.float64(0), n.sqrt(2 / 9)),
    "init.uniform_": lambda n: nn.init.uniform_(torch.empty(N), -n.float32(0.25), n.float32(0.25)),
    "init.trunc_normal_": lambda n: nn.init.trunc_normal_(torch.empty(N), 0.0, n.sqrt(0.1), -n.float64(1)),
    "init.xavier_uniform_": lambda n: nn.init.xavier_uniform_(torch.empty(20, 20), n.sqrt(2)),
    "sizes": lambda n: torch.randn(n.int64(20), n.int64(20)),
    "a factor": lambda n: torch.randn(N) * n.float32(0.25),
    "a factor before": lambda n: n.sqrt(0.1) * torch.randn(N),
    "mul_": lambda n: torch.randn(N).mul_(n.sqrt(0.1)),
    "exponential_": lambda n: torch.empty(N).exponential_(n.float64(2)),
    "bernoulli_": lambda n: torch.empty(N).bernoulli_(n.float64(0.5)),
}
FILLS = {
    "randn_like of a transposed one": lambda: torch.randn_like(torch.ones(20, 20).t()),
    "randn_like of channels last": lambda: torch.randn_like(
        torch.ones(2, 5, 4, 10).to(memory_format=torch.channels_last)
    ),
    "rand_like in fp64": lambda: torch.rand_like(torch.ones(N, dtype=torch.float64)),
    "randn in fp64": lambda: torch.randn(N, dtype=torch.float64),
    "randn in fp16": lambda: torch.randn(N, dtype=torch.float16),
    "randn in complex": lambda: torch.view_as_real(torch.randn(N, dtype=torch.complex64)),
    "normal_ of a transposed one": lambda: torch.empty(20, 20).t().normal_(),
    "normal_ of a slice": lambda: torch.zeros(2 * N)[::2].normal_(),
    "randn to a tensor": lambda: torch.randn(N, out=torch.empty(N)),
    "rand to a tensor": lambda: torch.rand(N, out=torch.empty(N)),
    "normal of tensors": lambda: torch.normal(torch.zeros(N), torch.ones(N)),
    "normal of a size": lambda: torch.normal(0.0, 1.0, (N,)),
    "legacy": lambda: torch.FloatTensor(N).normal_(),
    "new": lambda: torch.ones(1).new(N).uniform_(-1, 1),
    "new_empty": lambda: torch.ones(1).new_empty(N).normal_(),
    "empty_strided": lambda: torch.empty_strided((20, 20), (1, 20)).normal_(),
    "aten.normal_": lambda: torch.ops.aten.normal_(torch.empty(N)),
    "aten.uniform_": lambda: torch.ops.aten.uniform_(torch.empty(N), -1.0, 1.0),
    "aten.randn": lambda: torch.ops.aten.randn([N], dtype=torch.float32),
    "aten.rand_like": lambda: torch.ops.aten.rand_like(torch.zeros(N)),
    "aten.bernoulli": lambda: torch.ops.aten.bernoulli(half()),
    "TorchScript": lambda: scripted(N).float(),
    "vmap": lambda: torch.vmap(torch.randn_like, randomness="different")(torch.zeros(20, 20)),
    "orthogonal_": lambda: nn.init.orthogonal_(torch.empty(20, 20)),
    "sparse_": lambda: nn.init.sparse_(torch.empty(20, 20), 0.5),
    "the default generator by name": lambda: torch.empty(N).normal_(generator=torch.default_generator),
    "a generator seeded by a draw": lambda: _generated(int(torch.randint(2**31, (1,)))),
}
DRAWS = {
    "randperm": lambda: torch.randperm(N),
    "randint": lambda: torch.randint(99, (N,)),
    "randint_like": lambda: torch.randint_like(torch.zeros(N), 99),
    "randint_like of whole numbers, in half precision": lambda: torch.ops.aten.randint_like(
        torch.empty(N, dtype=torch.int64), 99, dtype=torch.float16
    ),
    "random_": lambda: torch.empty(N).random_(99),
    "multinomial": lambda: torch.multinomial(torch.ones(N), N),
    "multinomial with replacement": lambda: torch.multinomial(torch.ones(9), N, True, generator=None),
    "bernoulli": lambda: torch.bernoulli(half()),
    "bernoulli_": lambda: torch.empty(N).bernoulli_(0.5),
    "bernoulli_ of a tensor": lambda: torch.empty(N).bernoulli_(half()),
    "poisson": lambda: torch.poisson(half() * 8),
    "binomial": lambda: torch.binomial(half() * 16, half()),
    "exponential_": lambda: torch.empty(N).exponential_(),
    "geometric_": lambda: torch.empty(N).geometric_(0.3),
    "log_normal_": lambda: torch.empty(N).log_normal_(),
    "cauchy_": lambda: torch.empty(N).cauchy_().atan(),
    "dropout": lambda: F.dropout(torch.ones(N)),
    "nn.Dropout": lambda: nn.Dropout(0.5)(torch.ones(N)),
    "dropout1d": lambda: F.dropout1d(torch.ones(N, 1, 1)),
    "alpha_dropout": lambda: F.alpha_dropout(torch.ones(N), training=True),
    "rrelu": lambda: F.rrelu(torch.full((N,), -1.0), training=True),
    "attention": lambda: F.scaled_dot_product_attention(*[half((1, 20, 20))] * 3, dropout_p=0.5),
    "fractional_max_pool2d": lambda: F.fractional_max_pool2d(torch.arange(N * 1.0).view(1, 20, 20), 2, 6),
    "random_split": lambda: torch.tensor(data.random_split(range(N), [300, 100])[0].indices),
    "RandomSampler": lambda: torch.tensor(list(data.RandomSampler(range(N)))),
    "WeightedRandomSampler": lambda: torch.tensor(list(data.WeightedRandomSampler([1.0] * 9, N))),
    "DataLoader": lambda: torch.cat(list(data.DataLoader(range(N), 50, shuffle=True))),
}
SAMPLERS = {
    "Normal": lambda: D.Normal(torch.zeros(N), 1.0).sample(),
    "Normal.rsample": lambda: D.Normal(torch.zeros(N), torch.ones(N)).rsample(),
    "Uniform": lambda: D.Uniform(-1.0, torch.ones(N)).sample(),
    "LogNormal": lambda: D.LogNormal(torch.zeros(N), 1.0).sample(),
    "Gamma": lambda: D.Gamma(torch.ones(N), 1.0).sample(),
    "Beta": lambda: D.Beta(torch.ones(N), torch.ones(N) * 2).sample(),
    "Dirichlet": lambda: D.Dirichlet(torch.ones(40, 10)).sample(),
    "StudentT": lambda: D.StudentT(torch.ones(N) * 9).sample(),
    "Bernoulli": lambda: D.Bernoulli(half()).sample(),
    "Categorical": lambda: D.Categorical(torch.ones(9)).sample((N,)),
    "Poisson": lambda: D.Poisson(half() * 8).sample(),
    "Exponential": lambda: D.Exponential(torch.ones(N)).sample(),
    "MultivariateNormal": lambda: D.MultivariateNormal(torch.zeros(2).float(), torch.eye(2).float()).sample((N,)),
    "MixtureSameFamily": lambda: D.MixtureSameFamily(
        D.Categorical(torch.ones(3)), D.Normal(torch.arange(3.0), torch.ones(3))
    ).sample((N,)),
    "trunc_normal of scipy's kind": lambda: torch.erfinv(D.Uniform(-0.9, torch.full((N,), 0.9)).sample()),
}
RANDOM = {
    f"{group}: {name}": function
    for group, functions in (("fill", FILLS), ("draw", DRAWS), ("sampler", SAMPLERS))
    for name, function in functions.items()
}
# Whose arithmetic goes through constants of the dtype, or is torch's own in half precision: not fp32 values rounded.
OF_ITS_DTYPE = ["draw: alpha_dropout", "draw: attention", "sampler: Exponential", "sampler: StudentT"]
if not DRAWS_ARE_ROUNDED:
    OF_ITS_DTYPE += ["fill: the default generator by name", "fill: a generator seeded by a draw"]
    OF_ITS_DTYPE += ["draw: fractional_max_pool2d"]
# What is equal in many of their elements: too few numbers for a comparison of means.
FEW = ("fill: orthogonal_", "draw: attention")


def _generated(seed):
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", RANDOM)
@over_dtypes
def test_the_seed_of_the_block_decides_alone(name, dtype):
    function = RANDOM[name]
    first, second, other = (draw(function, dtype, seed, outer) for seed, outer in ((SEED, 1), (SEED, 2), (SEED + 1, 2)))
    assert same_bits(first, second) and not same_bits(first, other)
    (model,), (in_fp32,) = in_torch(function, dtype), in_torch(function, "fp32")
    assert first.dtype == model.dtype and first.stride() == in_fp32.stride() and not first.requires_grad
    if dtype == "fp32" and first.is_floating_point() and name not in FEW:
        assert_same_distribution(first, model, name)
    if dtype != "fp32" and name not in OF_ITS_DTYPE:
        exact = draw(function)
        assert same_bits(first, exact.to(first.dtype)), (first, exact)


@pytest.mark.parametrize("name", RANDOM)
def test_without_a_seed_torchs_decides_and_gives_one_draw(name):
    results, states = [], []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(inside(RANDOM[name], seed=None))
        states.append(torch.get_rng_state())
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_()
    assert same_bits(*results) and all(torch.equal(state, torch.get_rng_state()) for state in states)


@pytest.mark.parametrize("name", NUMPY)
@over_dtypes
def test_a_scalar_of_numpy_is_a_number(name, dtype):
    with_numpy, again = (draw(lambda: NUMPY[name](np), dtype, outer=outer) for outer in (1, 2))
    assert same_bits(with_numpy, again)
    python = SimpleNamespace(sqrt=math.sqrt, float64=float, float32=lambda x: np.float32(x).item(), int64=int)
    assert same_bits(with_numpy, draw(lambda: NUMPY[name](python), dtype))
    assert_rounded(with_numpy, draw(lambda: NUMPY[name](np)), dtype)
    if dtype == "fp32":
        assert_same_distribution(with_numpy, plain(lambda: NUMPY[name](np)), name)


# Generators -----------------------------------------------------------------------------------------------------------

NONE = {
    "bernoulli": lambda **g: torch.bernoulli(half(), **g),
    "multinomial": lambda **g: torch.multinomial(torch.ones(9), 5, False, **g),
    "normal": lambda **g: torch.normal(torch.zeros(9), torch.ones(9), **g),
    "randperm": lambda **g: torch.randperm(9, **g),
    "rand": lambda **g: torch.rand(9, **g),
    "randint": lambda **g: torch.randint(0, 99, (9,), **g),
    "poisson": lambda **g: torch.poisson(half(), **g),
    "normal_": lambda **g: torch.empty(9).normal_(**g),
    "uniform_": lambda **g: torch.empty(9).uniform_(-1, 1, **g),
    "random_": lambda **g: torch.empty(9).random_(99, **g),
    "exponential_": lambda **g: torch.empty(9).exponential_(**g),
    "bernoulli_": lambda **g: torch.empty(9).bernoulli_(0.5, **g),
    "init.normal_": lambda **g: nn.init.normal_(torch.empty(9), **g),
    "init.kaiming_uniform_": lambda **g: nn.init.kaiming_uniform_(torch.empty(4, 4), **g),
}


@pytest.mark.parametrize("name", NONE)
@over_dtypes
def test_no_generator_by_name_is_none_at_all(name, dtype):
    without, with_none = draw(NONE[name], dtype), draw(lambda: NONE[name](generator=None), dtype)
    assert same_bits(without, with_none)
    ours = draw(lambda: NONE[name](generator=torch.Generator().manual_seed(3)), dtype)
    in_dtype = "fp32" if DRAWS_ARE_ROUNDED else dtype
    theirs = plain(lambda: NONE[name](generator=torch.Generator().manual_seed(3)), in_dtype)
    assert close(ours, theirs.to(ours.dtype), 2**-20)


@over_dtypes
def test_draws_of_a_generator_in_half_precision_are_torchs(dtype):
    def drawn(kind=torch.bfloat16):
        generator = torch.Generator("cpu").manual_seed(0)
        draws = [torch.empty(32, 4, dtype=kind).uniform_(-1, 1, generator=generator) for _ in range(4)]
        return draws, draws[0].float(), generator.get_state()

    (draws, wide, state), (right, right_wide, right_state) = draw(drawn, dtype), drawn()
    assert torch.equal(state, right_state)
    if dtype == "fp32":
        assert same(draws, right) and same_bits(wide, right_wide)
    else:  # the block's own dtype: those of fp32 are as good
        rounded = [each.bfloat16() for each in drawn(torch.float32)[0]]
        assert all(same_bits(a, b) or same_bits(a, c) for a, b, c in zip(draws, right, rounded, strict=True))

"""Every function of torch.nn.init inside fastinit.on, against torch's own."""

import inspect
import math
import warnings

import pytest
import torch
from models import (
    DTYPES,
    SEED,
    assert_rounded_once,
    assert_same_distribution,
    built,
    plain,
    same_bits,
    samples,
)
from torch import nn
from torch.nn import init

# Taken before any context exists, as libraries do.
from torch.nn.init import kaiming_normal_, normal_, orthogonal_, trunc_normal_, xavier_uniform_, zeros_
from torch.overrides import TorchFunctionMode

import fastinit

MATRIX, CONV, CUBE = (24, 17), (8, 6, 3, 3), (6, 4, 5)
FAN_OUT = {"mode": "fan_out", "nonlinearity": "relu"}

# name -> (keyword arguments, shape) of each call to test.
CALLS = {
    "uniform_": [({}, MATRIX), ({"a": -0.3, "b": 0.7}, CONV), ({"a": 0.5, "b": 0.5}, (5,))],
    "normal_": [({}, MATRIX), ({"mean": 0.1, "std": 0.02}, CONV), ({"std": 0.0, "mean": 1 / 3}, (5,))],
    "trunc_normal_": [
        ({}, MATRIX),
        ({"std": 0.02}, CONV),
        ({"mean": 0.5, "std": 0.7, "a": -1.0, "b": 0.9}, MATRIX),
        ({"std": 0.02, "a": -0.06, "b": 0.06}, (7,)),
        ({"a": 1.0, "b": 3.0}, MATRIX),
    ],
    "constant_": [({"val": 1 / 3}, MATRIX), ({"val": -1}, CONV), ({"val": math.inf}, (3,))],
    "ones_": [({}, MATRIX), ({}, (5,))],
    "zeros_": [({}, MATRIX), ({}, (5,))],
    "eye_": [({}, MATRIX), ({}, (5, 5))],
    "dirac_": [({}, (6, 4, 3)), ({}, CONV), ({"groups": 2}, CONV), ({}, (4, 4, 3, 3, 3))],
    "xavier_uniform_": [({}, MATRIX), ({"gain": 1.7}, CONV)],
    "xavier_normal_": [({}, MATRIX), ({"gain": 1.7}, CONV)],
    "kaiming_uniform_": [({}, MATRIX), ({"a": math.sqrt(5)}, CONV), (FAN_OUT, CUBE)],
    "kaiming_normal_": [({}, MATRIX), ({"a": math.sqrt(5)}, CONV), (FAN_OUT, CUBE)],
    "orthogonal_": [({}, MATRIX), ({"gain": 1.7}, (17, 24)), ({}, CONV)],
    "sparse_": [({"sparsity": 0.3}, MATRIX), ({"sparsity": 0.9, "std": 1.5}, (40, 30))],
}


def init_functions():
    return {
        name: function
        for name, function in vars(init).items()
        if inspect.isfunction(function) and not name.startswith("_") and name != "calculate_gain"
    }


def new_name(name):
    """Return the name behind torch's deprecated spelling without the underscore."""
    return name if name.endswith("_") else f"{name}_"


CASES = [
    pytest.param(name, keywords, shape, id=f"{name}-{'x'.join(map(str, shape))}-{k}")
    for name in init_functions()
    for k, (keywords, shape) in enumerate(CALLS.get(new_name(name), ()))
]
over_calls = pytest.mark.parametrize("name, keywords, shape", CASES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


class Weight(nn.Module):
    """A parameter of a shape, initialized by a function."""

    def __init__(self, shape, initialize):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            initialize(self.weight)


def calling(name, keywords, shape):
    return lambda: Weight(shape, lambda weight: getattr(init, name)(weight, **keywords))


def weight(initialize, shape=MATRIX, dtype="fp32", seed=SEED):
    return built(lambda: Weight(shape, initialize), dtype, seed=seed).weight.detach()


def is_random(constructor):
    return not same_bits(plain(constructor, seed=1).weight, plain(constructor, seed=2).weight)


def test_every_function_of_torch_nn_init_is_called_here():
    assert {new_name(name) for name in init_functions()} == set(CALLS)


@over_calls
def test_values_are_the_fp32_values_rounded_once(name, keywords, shape):
    constructor = calling(name, keywords, shape)
    exact = built(constructor)
    for dtype in DTYPES:
        stored = built(constructor, dtype)
        assert stored.weight.dtype == DTYPES[dtype] and stored.weight.shape == shape
        assert_rounded_once(stored, exact)
    if not is_random(constructor):
        assert same_bits(exact.weight, plain(constructor).weight)


# The elements of orthogonal and sparse matrices are not independent: they are tested by their properties.
INDEPENDENT = [
    case
    for case in CASES
    if new_name(case.values[0]) not in ("orthogonal_", "sparse_") and is_random(calling(*case.values))
]


@pytest.mark.parametrize("name, keywords, shape", INDEPENDENT)
def test_random_values_follow_torchs_distribution(name, keywords, shape):
    constructor = calling(name, keywords, shape)
    enough = 1 << 14
    ours = samples(lambda seed: built(constructor, seed=seed), ["weight"], enough, most=enough)["weight"]
    theirs = samples(lambda seed: plain(constructor, seed=seed), ["weight"], enough, most=enough)["weight"]
    assert_same_distribution(ours, theirs, name)
    # Bounded distributions reach the same bounds, but for the gap that 2^14 samples leave.
    if "uniform" in name or keywords.keys() >= {"a", "b"}:
        width = theirs.max() - theirs.min()
        tolerance = width * (1e-2 if name.startswith("trunc") else 2e-3)
        assert abs(ours.max() - theirs.max()) < tolerance and abs(ours.min() - theirs.min()) < tolerance


@pytest.mark.parametrize("shape", [(24, 17), (17, 24), (16, 16), (8, 6, 3, 3)])
@over_dtypes
def test_orthogonal_is_orthogonal_although_torch_has_no_half_precision_qr(shape, dtype):
    matrix = weight(lambda w: init.orthogonal_(w, gain=2.0), shape, dtype).flatten(1).double() / 2
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    error = (matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)).abs().max()
    # Rounding to a half type moves each of n products by 2^-8 (bf16) or 2^-11 (fp16) of 1/n.
    assert error < {"fp32": 1e-5, "bf16": 2**-7, "fp16": 2**-10}[dtype]


def test_orthogonal_matrices_are_uniform_in_sign():
    # Haar measure: the first entry is symmetric about zero, which LAPACK's own sign convention would spoil.
    first = torch.stack([weight(init.orthogonal_, (4, 4), seed=seed)[0, 0] for seed in range(200)])
    assert abs((first > 0).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(200)


@over_dtypes
def test_sparse_zeroes_the_given_part_of_each_column(dtype):
    matrix = weight(lambda w: init.sparse_(w, sparsity=0.3, std=0.5), (40, 300), dtype).float()
    assert (matrix == 0).sum(dim=0).eq(12).all()
    rows = (matrix == 0).sum(dim=1).float()
    assert rows.std() > 1, "every column has its zeros in the same rows"
    kept = matrix[matrix != 0]
    assert abs(kept.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * len(kept)) and abs(kept.mean()) < 2.5 / math.sqrt(len(kept))


# How the calls are made ---------------------------------------------------------------------------


@over_dtypes
def test_functions_imported_before_the_context_are_recorded(dtype):
    early = (kaiming_normal_, normal_, orthogonal_, trunc_normal_, xavier_uniform_, zeros_)
    for function in early:
        late = getattr(init, function.__name__)
        with fastinit.on("cpu", dtype, seed=SEED) as report:
            first = Weight(MATRIX, function)
        assert same_bits(first.weight, weight(late, dtype=dtype)), function.__name__
        assert report.fills_executed + report.fills_dropped <= 1


def test_an_init_returns_the_tensor_it_was_given():
    for name, calls in CALLS.items():
        keywords, shape = calls[0]
        with fastinit.on("cpu", "bf16", seed=SEED):
            parameter = nn.Parameter(torch.empty(shape))
            assert getattr(init, name)(parameter, **keywords) is parameter, name
            assert parameter.requires_grad and parameter.is_leaf and parameter.grad_fn is None, name


@over_dtypes
def test_a_second_init_replaces_the_first_and_only_it_is_executed(dtype):
    def twice(w):
        init.kaiming_uniform_(w, a=math.sqrt(5))
        init.normal_(w, std=0.02)

    with fastinit.on("cpu", dtype, seed=SEED) as report:
        model = Weight(MATRIX, twice)
    # The dropped fill keeps its ordinal: the second one is stream 1.
    expected = fastinit.fill_(torch.empty(MATRIX, dtype=DTYPES[dtype]), fastinit.Normal(0.0, 0.02), seed=SEED, stream=1)
    assert same_bits(model.weight.detach(), expected)
    assert (report.fills_executed, report.fills_dropped) == (1, 1)


@over_dtypes
def test_init_of_slices_uses_the_fans_of_the_slice_and_leaves_the_rest(dtype):
    def by_thirds(w):
        init.zeros_(w)
        init.xavier_uniform_(w[:4])
        init.normal_(w[8:16, 2:5], mean=3.0, std=0.1)
        init.constant_(w.data[20], 0.1)
        init.ones_(w[:, 16])

    result, exact = weight(by_thirds, dtype=dtype), weight(by_thirds)
    assert same_bits(result, exact.to(DTYPES[dtype]))
    bound = math.sqrt(6 / (4 + MATRIX[1]))
    assert 0.9 * bound < exact[:4, :16].abs().max() <= bound
    assert 2.5 < exact[8:16, 2:5].min() and exact[8:16, 2:5].max() < 3.5
    assert (exact[20, :16] == torch.tensor(0.1)).all() and (exact[:, 16] == 1).all()
    untouched = torch.ones(MATRIX, dtype=torch.bool)
    untouched[:4] = untouched[8:16, 2:5] = untouched[20] = untouched[:, 16] = False
    assert not result[untouched].any()


@over_dtypes
def test_a_fused_projection_initialized_in_many_slices(dtype):
    # More slices than a recipe keeps apart, some of them written twice.
    def by_head(w):
        init.normal_(w, std=1.0)
        for head in range(12):
            init.uniform_(w[2 * head : 2 * head + 2], head, head + 1)
        init.zeros_(w[5:9])

    result, exact = weight(by_head, dtype=dtype), weight(by_head)
    assert same_bits(result, exact.to(DTYPES[dtype]))
    assert not exact[5:9].any()
    for head in (0, 1, 5, 11):
        assert head <= exact[2 * head].min() and exact[2 * head].max() < head + 1


@over_dtypes
@pytest.mark.parametrize("view", ["t", "flip_free_transpose", "reshape", "unsqueeze", "data", "detach", "chunk"])
def test_init_through_a_view_or_an_alias_reaches_the_parameter(dtype, view):
    aliases = {
        "t": lambda w: [w.t()],
        "flip_free_transpose": lambda w: [w.transpose(0, 1)],
        "reshape": lambda w: [w.reshape(-1)],
        "unsqueeze": lambda w: [w.unsqueeze(0)],
        "data": lambda w: [w.data],
        "detach": lambda w: [w.detach()],
        "chunk": lambda w: list(w.chunk(3)),
    }

    def through(w):
        for alias in aliases[view](w):
            init.normal_(alias, mean=5.0)

    result, exact = weight(through, dtype=dtype), weight(through)
    assert same_bits(result, exact.to(DTYPES[dtype]))
    assert exact.min() > 0 and abs(exact.mean() - 5) < 5 / math.sqrt(exact.numel())


@over_dtypes
def test_a_tensor_from_outside_the_context_is_initialized_at_once(dtype):
    target = torch.full(MATRIX, math.nan, dtype=DTYPES[dtype])
    bystander = torch.full(MATRIX, 2.5, dtype=DTYPES[dtype])
    with fastinit.on("cpu", dtype, seed=SEED):
        init.normal_(target, std=0.3)
        init.trunc_normal_(bystander[:4], std=0.1, a=-0.2, b=0.2)
        assert not target.isnan().any()
    expected = fastinit.fill_(torch.empty(MATRIX, dtype=DTYPES[dtype]), fastinit.Normal(0.0, 0.3), seed=SEED, stream=0)
    assert same_bits(target, expected)
    assert bystander[:4].abs().max() <= 0.2 and (bystander[4:] == 2.5).all()


@over_dtypes
def test_a_generator_is_honoured_by_giving_the_call_to_torch(dtype):
    for name, calls in CALLS.items():
        if "generator" not in inspect.signature(getattr(init, name)).parameters:
            continue
        for keywords, shape in calls:

            def construct(name=name, keywords=keywords, shape=shape):
                generator = torch.Generator("cpu").manual_seed(11)
                return Weight(shape, lambda w: getattr(init, name)(w, **keywords, generator=generator))

            state = torch.get_rng_state()
            ours, theirs = built(construct, dtype).weight.detach(), plain(construct).weight.detach()
            if name in ("normal_", "uniform_"):  # torch's numbers depend on the dtype that it draws in
                generator = torch.Generator("cpu").manual_seed(11)
                theirs = getattr(init, name)(torch.empty(shape, dtype=DTYPES[dtype]), **keywords, generator=generator)
            elif dtype != "fp32":
                continue  # computed of such numbers
            assert torch.equal(state, torch.get_rng_state()), name
            if name == "sparse_":
                # torch takes the places of the zeros from its default generator all the same.
                both = (ours != 0) & (theirs != 0)
                assert both.any()
                ours, theirs = ours[both], theirs[both]
            if name == "trunc_normal_":  # older versions of torch take erfinv_, which in a block is the stream's: 2 ulp
                torch.testing.assert_close(ours, theirs, rtol=2**-22, atol=2**-22)
                continue
            assert same_bits(ours, theirs.to(DTYPES[dtype])), (name, keywords)


def test_a_generator_advances_as_it_does_in_torch():
    ours, theirs = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    with fastinit.on("cpu", "fp32", seed=SEED):
        first, second = torch.empty(50).normal_(generator=ours), torch.rand(20, generator=ours)
    assert torch.equal(first, torch.empty(50).normal_(generator=theirs))
    assert torch.equal(second, torch.rand(20, generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())


# Refusals and edges ----------------------------------------------------------------------------------


BAD_CALLS = {
    "xavier of a vector": lambda w: init.xavier_uniform_(w[0]),
    "kaiming of a vector": lambda w: init.kaiming_normal_(w[0]),
    "kaiming mode": lambda w: init.kaiming_uniform_(w, mode="fan_sideways"),
    "kaiming nonlinearity": lambda w: init.kaiming_uniform_(w, nonlinearity="parabola"),
    "eye of a vector": lambda w: init.eye_(w[0]),
    "dirac of a matrix": lambda w: init.dirac_(w),
    "orthogonal of a vector": lambda w: init.orthogonal_(w[0]),
    "sparse of a vector": lambda w: init.sparse_(w[0], 0.1),
    "uniform upside down": lambda w: init.uniform_(w, 1.0, -1.0),
    "negative std": lambda w: init.normal_(w, std=-1.0),
    "in place outside of no_grad": lambda w: w.normal_(),
    "in place scale outside of no_grad": lambda w: w.mul_(2),
    "misspelt keyword": lambda w: init.normal_(w, sigma=1.0),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_a_call_that_torch_refuses_is_refused_alike(call):
    def attempt():
        with pytest.raises(Exception) as caught:
            Weight(MATRIX, BAD_CALLS[call])
        return caught

    theirs = plain(attempt)
    with warnings.catch_warnings():
        # The parameter is left without an init, which fastinit says.
        warnings.simplefilter("ignore", UserWarning)
        ours = built(attempt)
    assert ours.type is theirs.type
    if call != "misspelt keyword":  # that message has the name of the Python function
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


@over_dtypes
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (3, 0, 2)])
def test_tensors_without_elements_are_accepted_where_torch_accepts_them(dtype, shape):
    for name, calls in CALLS.items():
        keywords = calls[0][0]

        def attempt(name=name, keywords=keywords):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                try:
                    return Weight(shape, lambda w: getattr(init, name)(w, **keywords))
                except Exception as error:
                    return type(error)

        theirs, ours = plain(attempt), built(attempt, dtype)
        if isinstance(theirs, type):
            assert ours is theirs, name
        else:
            assert ours.weight.shape == shape and ours.weight.dtype == DTYPES[dtype], name


@over_dtypes
def test_scalars_are_initialized(dtype):
    model = built(lambda: Weight((), lambda w: init.uniform_(w, 2.0, 3.0)), dtype)
    assert model.weight.shape == () and 2 <= model.weight.item() <= 3
    assert_rounded_once(model, built(lambda: Weight((), lambda w: init.uniform_(w, 2.0, 3.0))))


# Truncated normals written out by hand -----------------------------------------------------------------


def phi(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def chain_in_place(w, mean, std, low, high):
    """The chain that vision libraries carry: uniform between the cumulative probabilities, erfinv, scale, clamp."""
    with torch.no_grad():
        w.uniform_(2 * phi((low - mean) / std) - 1, 2 * phi((high - mean) / std) - 1)
        w.erfinv_()
        w.mul_(std * math.sqrt(2.0))
        w.add_(mean)
        w.clamp_(min=low, max=high)


def chain_on_the_standard_normal(w, mean, std, low, high):
    """The TensorFlow and JAX manner: truncate N(0, 1) at low and high, scale and shift afterwards."""
    with torch.no_grad():
        chain_in_place(w, 0.0, 1.0, low, high)
        w.mul_(std).add_(mean)


def chain_out_of_place(w, mean, std, low, high):
    lower, upper = phi((low - mean) / std), phi((high - mean) / std)
    values = torch.rand(w.shape) * (2 * (upper - lower)) + (2 * lower - 1)
    w.data = torch.clamp(torch.erfinv(values) * (std * math.sqrt(2.0)) + mean, low, high)


CHAINS = {
    "in place": (chain_in_place, (0.0, 0.02, -0.04, 0.04)),
    "in place, far bounds": (chain_in_place, (0.0, 0.02, -2.0, 2.0)),
    "in place, one-sided": (chain_in_place, (0.5, 1.0, -0.3, 0.9)),
    "on the standard normal": (chain_on_the_standard_normal, (0.1, 0.02, -2.0, 2.0)),
    "out of place": (chain_out_of_place, (0.0, 0.5, -1.0, 1.0)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_hand_written_truncated_normals_follow_the_distribution_in_every_dtype(chain):
    function, arguments = CHAINS[chain]

    def construct(shape=(200, 100)):
        return Weight(shape, lambda w: function(w, *arguments))

    exact = built(construct)
    for dtype in DTYPES:
        stored = built(construct, dtype)
        assert stored.weight.dtype == DTYPES[dtype]
        assert_rounded_once(stored, exact)
    assert torch.isfinite(exact.weight).all()
    assert_same_distribution(exact.weight.detach(), plain(construct).weight.detach(), chain)


@pytest.mark.parametrize("chain", ["in place", "in place, one-sided", "on the standard normal", "out of place"])
def test_hand_written_truncated_normals_are_one_native_fill(chain):
    function, (mean, std, low, high) = CHAINS[chain]
    with fastinit.on("cpu", "fp32", seed=SEED) as report:
        model = Weight((50, 40), lambda w: function(w, mean, std, low, high))
    assert (report.fills_executed, report.fills_dropped) == (1, 0)
    # The steps that torch takes, on the uniform values of the stream.
    with Uniforms():
        expected = Weight((50, 40), lambda w: function(w, mean, std, low, high))
    torch.testing.assert_close(model.weight.detach(), expected.weight.detach(), rtol=1e-5, atol=1e-6 * std)


class Uniforms(TorchFunctionMode):
    """Torch with its uniform values from stream 0."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.uniform_:
            return fastinit.fill_(args[0], fastinit.Uniform(*args[1:]), seed=SEED)
        if func is torch.rand:
            return fastinit.fill_(torch.empty(*args), fastinit.Uniform(), seed=SEED)
        return func(*args, **(kwargs or {}))


def test_no_value_of_a_truncated_normal_is_outside_its_bounds():
    for dtype in DTYPES:
        for low, high in ((-2.0, 2.0), (-0.1, 0.3), (0.5, 0.6)):
            values = weight(lambda w, a=low, b=high: init.trunc_normal_(w, 0.0, 1.0, a, b), (300, 300), dtype)
            bounds = torch.tensor([low, high]).to(DTYPES[dtype])
            assert bounds[0] <= values.min() and values.max() <= bounds[1]
            assert values.float().max() - values.float().min() > 0.95 * (high - low) - 2**-8


@over_dtypes
def test_steps_after_a_fill_are_computed_in_fp32_and_rounded_once(dtype):
    def scaled(w):
        init.normal_(w, std=0.02)
        with torch.no_grad():
            w.mul_(1 / math.sqrt(24)).add_(0.01).div_(3).clamp_(-0.01, 0.02)

    fill = fastinit.fill_(torch.empty(MATRIX), fastinit.Normal(0.0, 0.02), seed=SEED)
    expected = fill.mul_(1 / math.sqrt(24)).add_(0.01).div_(3).clamp_(-0.01, 0.02)
    assert same_bits(weight(scaled, dtype=dtype), expected.to(DTYPES[dtype]))


def test_more_steps_than_a_fill_holds_give_what_torch_gives():
    def scaled(w):
        init.uniform_(w, -1, 1)
        with torch.no_grad():
            for k in range(1, 12):
                w.mul_(1 + 1 / k).sub_(0.01 * k).clamp_(max=k)

    expected = fastinit.fill_(torch.empty(MATRIX), fastinit.Uniform(-1, 1), seed=SEED)
    for k in range(1, 12):
        expected.mul_(1 + 1 / k).sub_(0.01 * k).clamp_(max=k)
    for dtype in DTYPES:
        assert same_bits(weight(scaled, dtype=dtype), expected.to(DTYPES[dtype]))

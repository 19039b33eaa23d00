"""That the values have the distributions they are named for, in every dtype. Seeds are fixed: a test either always
passes or always fails. Each significance level is such that a correct generator would pass with nearly any seed.

The samples here are large enough to see any error that matters to a model; `make test-slow` repeats them with 10^8.
"""

import math

import numpy as np
import pytest
import reference
from reference import DTYPES, NORMAL, TRUNCATED_NORMAL, UNIFORM
from scipy import stats
from test_native import whole

from fastinit.recipe import truncated_normal_parameters

SIZES = [pytest.param(4_000_000, id="quick"), pytest.param(100_000_000, id="large", marks=pytest.mark.slow)]
LOWEST_P = 1e-5

# name: (kind, native parameters, the exact distribution)
CASES = {
    "uniform": (UNIFORM, (-1.0, 3.0), stats.uniform(-1.0, 4.0)),
    "normal": (NORMAL, (0.0, 1.0), stats.norm()),
    "normal with a mean": (NORMAL, (0.5, 0.02), stats.norm(0.5, 0.02)),
    "truncated at two": (
        TRUNCATED_NORMAL,
        truncated_normal_parameters(0.0, 0.02, -0.04, 0.04),
        stats.truncnorm(-2, 2, 0.0, 0.02),
    ),
    "truncated, lopsided": (
        TRUNCATED_NORMAL,
        truncated_normal_parameters(1.0, 2.0, 0.5, 7.0),
        stats.truncnorm(-0.25, 3, 1.0, 2.0),
    ),
    "truncated on one side": (
        TRUNCATED_NORMAL,
        truncated_normal_parameters(0.0, 1.0, -math.inf, 0.5),
        stats.truncnorm(-math.inf, 0.5),
    ),
    "truncated beyond the mean": (
        TRUNCATED_NORMAL,
        truncated_normal_parameters(0.0, 1.0, 2.0, 4.0),
        stats.truncnorm(2, 4),
    ),
    "truncated below the mean": (
        TRUNCATED_NORMAL,
        truncated_normal_parameters(0.0, 1.0, -3.0, -1.0),
        stats.truncnorm(-3, -1),
    ),
}


def sample(count, name, dtype, stream=0):
    """Values as float64."""
    kind, parameters, _ = CASES[name]
    return decoded(whole(count, kind, parameters, 2024, stream, dtype=dtype, threads=2), dtype)


def decoded(bits, dtype):
    if dtype == "float32":
        return bits.view(np.float32).astype(np.float64)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def code_probabilities(exact, dtype):
    """The finite values of a half dtype that can occur, rising, and the exact probability that rounding gives each."""
    codes = np.arange(0x7C00 if dtype == "float16" else 0x7F80, dtype=np.uint16)
    magnitudes = decoded(codes, dtype)
    values = np.concatenate([-magnitudes[:0:-1], magnitudes])  # one zero
    edges = (values[1:] + values[:-1]) / 2  # ties to even belong to either side with probability 0
    lower = np.concatenate([[-np.inf], edges])
    upper = np.concatenate([edges, [np.inf]])
    # Differences of the nearer tail: no cancellation far out.
    middle = exact.median()
    probabilities = np.where(lower >= middle, exact.sf(lower) - exact.sf(upper), exact.cdf(upper) - exact.cdf(lower))
    low, high = exact.support()
    possible = (upper > low) & (lower < high)
    return values[possible], probabilities[possible]


def chi_square_p(observed, expected):
    """p-value after neighbouring cells are pooled to at least 20 expected."""
    pooled_observed, pooled_expected = [], []
    o = e = 0.0
    for one_observed, one_expected in zip(observed, expected, strict=True):
        o += one_observed
        e += one_expected
        if e >= 20:
            pooled_observed.append(o)
            pooled_expected.append(e)
            o = e = 0.0
    pooled_observed[-1] += o
    pooled_expected[-1] += e
    o, e = np.array(pooled_observed), np.array(pooled_expected)
    return stats.chi2.sf(((o - e) ** 2 / e).sum(), len(o) - 1)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_codes_of_half_dtypes_have_their_exact_probabilities(name, dtype, count):
    values, probabilities = code_probabilities(CASES[name][2], dtype)
    assert probabilities.sum() == pytest.approx(1, abs=1e-9)
    drawn, counts = np.unique(sample(count, name, dtype), return_counts=True)
    assert np.isin(drawn, values).all(), "values that cannot occur"
    observed = np.zeros(len(values))
    observed[np.searchsorted(values, drawn)] = counts
    # float32 arithmetic leaves the values about 1e-7 std apart near the middle: half codes closer than 1e-5 std go
    # into one cell.
    cell = np.floor(values / (1e-5 * CASES[name][2].std()))
    starts = np.flatnonzero(np.diff(cell, prepend=-np.inf))
    observed, expected = np.add.reduceat(observed, starts), np.add.reduceat(probabilities * count, starts)
    assert chi_square_p(observed, expected) > LOWEST_P


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_float32_values_fill_equiprobable_cells_evenly(name, count):
    exact = CASES[name][2]
    cells = 4096
    edges = exact.ppf(np.arange(1, cells) / cells)
    observed = np.bincount(np.searchsorted(edges, sample(count, name, "float32")), minlength=cells)
    assert chi_square_p(observed, np.full(cells, count / cells)) > LOWEST_P


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_the_first_four_moments_agree(name, count):
    exact = CASES[name][2]
    mean, std = exact.mean(), exact.std()
    x = (sample(count, name, "float32") - mean) / std
    standard = [exact.expect(lambda v, k=k: ((v - mean) / std) ** k) for k in range(9)]
    for k in range(1, 5):
        spread = math.sqrt((standard[2 * k] - standard[k] ** 2) / count)
        z = ((x**k).mean() - standard[k]) / spread
        assert abs(z) < 5, f"moment {k} is {z:.2f} standard errors off"


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tails_beyond_three_four_and_five_sigma_hold_what_they_should(dtype, count):
    x = sample(count, "normal", dtype)
    for sigma in (3, 4, 5):
        # Beyond sigma after rounding: from half a unit in the last place above it, and sigma is a value of each dtype.
        unit = 2.0 ** (math.floor(math.log2(sigma)) - {"float32": 23, "float16": 10, "bfloat16": 7}[dtype])
        probability = stats.norm.sf(sigma + unit / 2)
        for tail in ((x > sigma).sum(), (x < -sigma).sum()):
            assert stats.binomtest(int(tail), count, probability).pvalue > LOWEST_P


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_neighbours_and_streams_are_uncorrelated(name, count):
    exact = CASES[name][2]
    x = (sample(count, name, "float32") - exact.mean()) / exact.std()
    for lag in range(1, 9):
        r = (x[:-lag] * x[lag:]).sum() / math.sqrt(count - lag)
        assert abs(r) < 5, f"lag {lag}"
        r = (x[:-lag] ** 2 * x[lag:] ** 2 - 1).sum() / math.sqrt(count - lag)
        assert abs(r) < 5 * (exact.stats("k") + 3), f"squares at lag {lag}"
    blocks = x[: count // 4 * 4].reshape(-1, 4)  # the four words of a Philox block
    for i in range(4):
        for j in range(i):
            assert abs((blocks[:, i] * blocks[:, j]).sum()) / math.sqrt(len(blocks)) < 5, f"words {j} and {i}"
    other = (sample(count, name, "float32", stream=1) - exact.mean()) / exact.std()
    assert abs((x * other).sum()) / math.sqrt(count) < 5


def test_the_inverse_cdf_is_as_close_as_documented():
    largest = 0.0
    for exponent in range(31):
        f = np.ldexp(np.linspace(1, 2, 20_001)[:-1], exponent).astype(np.float32)
        exact = stats.norm.isf(f.astype(np.float64) * 2.0**-32)
        largest = max(largest, np.abs(reference.icdf(f) - exact).max())
    assert largest < 5.3e-7
    assert reference.icdf(np.float32([2.0**31]))[0] == 0.0


@pytest.mark.parametrize("low, high", [(-2, 2), (-1, 3), (0, 1), (-4, -3), (5, 6), (0.1, 0.100001), (-math.inf, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_truncated_normals_stay_within_their_bounds(low, high, dtype):
    parameters = truncated_normal_parameters(0.0, 1.0, float(low), float(high))
    x = decoded(whole(100_000, TRUNCATED_NORMAL, parameters, 5, 5, dtype=dtype), dtype)
    rounded_low, rounded_high = (
        decoded(reference.stored(np.float32([bound]), dtype), dtype)[0] for bound in (low, high)
    )
    assert x.min() >= rounded_low and x.max() <= rounded_high

"""How large samples of stream v1 are compared with the law that they should have: for bench_statistics.py.

The law of an element is known exactly: docs/stream-v1.md makes it a function of one of 2^32 words. That function is
written down here once more, in torch, and applied to all words, which gives the probability of every cell, the moments
and the tails, and how far they are from the ideal distribution. Samples that `fastinit.fill_` wrote, one stream after
the other, are compared with that law:

- cells: chi-square of the values in 4096 cells of equal width, or of the codes of a half dtype;
- mantissa: chi-square of the lowest 12 bits of a float32;
- moments 1 to 4, and how many values lie beyond k standard deviations;
- pairs and quadruples of neighbours (the four words of a block of Philox): chi-square over 64 x 64 and 8^4 cells;
- correlations of x and of x^2 at lags from 1 to 2^20, between a stream and the next, between a seed and the next.

Each is a p-value. The family of all of them fails if its smallest is below ALPHA / their number (Bonferroni).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import fastinit
from fastinit.recipe import truncated_normal_parameters

ALPHA = 1e-3
CELLS = 4096
LAGS = (1, 2, 3, 4, 5, 8, 12, 16, 64, 256, 1024, 4096, 2**16, 2**20)
SEED = 20_261_123
# Samples that pairs and correlations look at; the cells, moments and tails look at all.
RELATED = 10**10

Draw = Callable[[torch.Tensor, int, int], None]  # (where to, seed, stream)

# The law


def read_table() -> torch.Tensor:
    source = (Path(__file__).parents[1] / "csrc" / "normal_table.h").read_text()
    rows = re.findall(r"^ *\{(.*)\},$", source, re.MULTILINE)
    return torch.tensor([[float.fromhex(number.rstrip("f")) for number in row.split(", ")] for row in rows])


def fma(a, b, c) -> torch.Tensor:
    """a b + c in float64, rounded to float32: once, but for one case in 2^29, which is the same to a histogram."""
    return (a.double() * b + c).float()


def tail_quantile(f: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    bits = f.abs().view(torch.int32)
    row = table[((bits >> 20) & 255).long()].double()
    t = ((bits & 0xFFFFF) | 0x3F800000).view(torch.float32) - 1.0625
    z = row[:, 3].float()
    for coefficient in (2, 1, 0):
        z = fma(z, t.double(), row[:, coefficient])
    return z


@dataclass(frozen=True)
class Case:
    name: str
    distribution: Any  # as fill_ takes it; mean 0 and standard deviation 1, or on [0, 1)
    ideal: Any  # of scipy.stats
    dtype: torch.dtype
    low: float  # where the cells begin and end: no value lies beyond
    high: float
    share: float = 0.1  # of --samples

    def values_of(self, words: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """What docs/stream-v1.md makes of words, given as int32."""
        if isinstance(self.distribution, fastinit.Uniform):
            x = ((words >> 8) & 0xFFFFFF).float() * 2.0**-24
        elif isinstance(self.distribution, fastinit.Normal):
            f = words.float()
            x = torch.copysign(tail_quantile(f, table), f)
        else:
            parameters = truncated_normal_parameters(0.0, 1.0, self.low, self.high)
            threshold, offset, scale, below, above = parameters[2:7]
            assert threshold == 0  # the sides are alike
            f = words.float()
            x = torch.copysign(tail_quantile(fma(f.abs(), scale, offset), table).clamp(below, above), f)
        return x.to(self.dtype)


NORMAL = fastinit.Normal(0.0, 1.0)
TRUNCATED = fastinit.TruncatedNormal(0.0, 1.0, -2.0, 2.0)
CASES = (
    Case("normal", NORMAL, stats.norm(), torch.float32, -6.5, 6.5, share=1.0),
    Case("normal", NORMAL, stats.norm(), torch.bfloat16, -6.5, 6.5),
    Case("normal", NORMAL, stats.norm(), torch.float16, -6.5, 6.5),
    Case("uniform", fastinit.Uniform(0.0, 1.0), stats.uniform(), torch.float32, 0.0, 1.0),
    Case("truncated normal", TRUNCATED, stats.truncnorm(-2, 2), torch.float32, -2.0, 2.0),
)


class Tally:
    """Counts of values, of which blocks are added."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.count = case, 0
        wide = case.dtype == torch.float32
        self.cells = torch.zeros(CELLS if wide else 2**16, dtype=torch.int64, device=device)
        self.mantissa = torch.zeros(CELLS if wide else 0, dtype=torch.int64, device=device)
        self.coarse = torch.zeros(64, dtype=torch.int64, device=device)
        self.powers = torch.zeros(9, dtype=torch.float64, device=device)
        scale = case.ideal.std()
        self.limits = [k * scale for k in (1, 2, 3, 4, 5, 5.5, 6, 6.2) if k * scale < case.high - case.ideal.mean()]
        self.beyond = torch.zeros(len(self.limits), dtype=torch.int64, device=device)
        edges = case.ideal.ppf(np.arange(1, 64) / 64)
        self.edges = torch.tensor(edges, dtype=torch.float32, device=device)

    def add(self, x: torch.Tensor) -> None:
        self.count += x.numel()
        if x.dtype == torch.float32:
            # histc counts in the dtype of its input: exact below 2^24 a cell and block.
            self.cells += torch.histc(x, CELLS, self.case.low, self.case.high).long()
            self.mantissa += torch.bincount(x.view(torch.int32) & 0xFFF, minlength=CELLS)
        else:
            self.cells += torch.bincount(x.view(torch.int16).int() & 0xFFFF, minlength=2**16)
        self.coarse += torch.bincount(self.coarsely(x), minlength=64)
        wide = x.double()
        distance = (x.float() - self.case.ideal.mean()).abs()
        for at, limit in enumerate(self.limits):
            self.beyond[at] += (distance > limit).sum()
        power = torch.ones_like(wide)
        for exponent in range(1, 9):
            power *= wide
            self.powers[exponent] += power.sum()

    def coarsely(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(x.float(), self.edges, out_int32=True)

    @cached_property
    def moments(self) -> np.ndarray:
        return (self.powers / self.count).cpu().numpy()

    def probabilities(self, what: str) -> np.ndarray:
        return getattr(self, what).cpu().numpy() / self.count


def law_of(case: Case, device: torch.device, samples: float) -> Tally:
    """The tally of all words; for small samples that of every 2^k-th, still of 64 times as many as those."""
    table = read_table().to(device)
    law = Tally(case, device)
    step = 2 ** min(8, max(0, math.floor(26 - math.log2(samples))))  # a uniform has all but the last 8 bits of a word
    block = 2**26 if device.type == "cuda" else 2**20
    for first in tqdm(range(0, 2**32, block * step), desc=f"law of {case.name} {short(case.dtype)}", leave=False):
        words = first - 2**31 + step // 2 + torch.arange(block, device=device) * step
        law.add(case.values_of(words.int(), table))
    return law


# Samples against it


class Related:
    """Sums over neighbours and over streams, for pairs and correlations."""

    def __init__(self, law: Tally, device: torch.device):
        self.law, self.count = law, 0
        self.pairs = torch.zeros(64**2, dtype=torch.int64, device=device)
        self.quadruples = torch.zeros(8**4, dtype=torch.int64, device=device)
        self.products: dict[str, torch.Tensor] = {}
        self.terms: dict[str, int] = {}

    def add(self, x: torch.Tensor, others: dict[str, torch.Tensor]) -> None:
        """A block, and blocks of the same size from elsewhere, by what they are."""
        self.count += x.numel()
        cell = self.law.coarsely(x)
        self.pairs += torch.bincount(cell[0::2] * 64 + cell[1::2], minlength=64**2)
        eighth = cell // 8
        four = ((eighth[0::4] * 8 + eighth[1::4]) * 8 + eighth[2::4]) * 8 + eighth[3::4]
        self.quadruples += torch.bincount(four, minlength=8**4)
        both = [self._centred(x)] + [self._centred(other) for other in others.values()]
        for lag in LAGS:
            if lag < x.numel():
                for power, values in zip(("x", "x^2"), both[0], strict=True):
                    self._multiply(f"{power}, lag {lag}", values[:-lag], values[lag:])
        for name, other in zip(others, both[1:], strict=True):
            for power, mine, theirs in zip(("x", "x^2"), both[0], other, strict=True):
                self._multiply(f"{power}, {name}", mine, theirs)

    def _centred(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.double() - self.law.moments[1]
        return wide, wide * wide - self._moment(2)

    def _moment(self, exponent: int) -> float:
        """About the mean."""
        m = self.law.moments.copy()
        m[0] = 1.0
        return sum(math.comb(exponent, i) * m[i] * (-m[1]) ** (exponent - i) for i in range(exponent + 1))

    def _multiply(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        self.products[name] = self.products.get(name, 0) + torch.dot(a, b)
        self.terms[name] = self.terms.get(name, 0) + a.numel()

    def p_values(self) -> dict[str, float]:
        coarse = self.law.probabilities("coarse")
        eighths = coarse.reshape(8, 8).sum(1)
        four = np.einsum("i,j,k,l->ijkl", eighths, eighths, eighths, eighths).ravel()
        found = {
            "pairs of neighbours": chi_square(self.pairs, np.outer(coarse, coarse).ravel()),
            "quadruples of neighbours": chi_square(self.quadruples, four),
        }
        variances = {"x": self._moment(2), "x^2": self._moment(4) - self._moment(2) ** 2}
        for name, product in self.products.items():
            z = product.item() / (variances[name.split(",")[0]] * math.sqrt(self.terms[name]))
            found[f"correlation of {name}"] = two_sided(z)
        return found


def chi_square(observed: torch.Tensor, probabilities: np.ndarray, *, exact: bool = True) -> float:
    """p-value, neighbouring cells being pooled until 20 are expected of each. Exact probabilities of 0 are believed."""
    counts = observed.cpu().numpy().astype(np.float64)
    expected = probabilities * counts.sum()
    if exact and counts[expected == 0].any():
        return 0.0
    starts, inside = [0], 0.0
    for at, share in enumerate(expected):
        if inside >= 20:
            starts.append(at)
            inside = 0.0
        inside += share
    if inside < 20 and len(starts) > 1:  # what remains at the end
        starts.pop()
    counts, expected = np.add.reduceat(counts, starts), np.add.reduceat(expected, starts)
    return float(stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1))


def two_sided(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def p_values(sample: Tally, law: Tally) -> dict[str, float]:
    """Of cells, mantissa, moments and tails."""
    found, exact = {}, law.count == 2**32
    for what in ("cells", "mantissa") if len(law.mantissa) else ("cells",):
        found[what] = chi_square(getattr(sample, what), law.probabilities(what), exact=exact)
    for exponent in range(1, 5):
        variance = law.moments[2 * exponent] - law.moments[exponent] ** 2
        z = (sample.moments[exponent] - law.moments[exponent]) / math.sqrt(variance / sample.count)
        found[f"moment {exponent}"] = two_sided(z)
    for limit, probability, seen in zip(law.limits, law.probabilities("beyond"), sample.beyond.tolist(), strict=True):
        tails = stats.binom.cdf(seen, sample.count, probability), stats.binom.sf(seen - 1, sample.count, probability)
        found[f"beyond {limit:.3g}"] = float(min(1.0, 2 * min(tails)))
    return found


def writer(case: Case) -> Draw:
    def draw(out: torch.Tensor, seed: int, stream: int) -> None:
        fastinit.fill_(out, case.distribution, seed=seed, stream=stream)

    return draw


def examine(case: Case, draw: Draw, samples: float, law: Tally) -> dict[str, Any]:
    """All p-values of a case, and its law beside the ideal one."""
    began, device = time.perf_counter(), law.cells.device
    block = min(2**28 if device.type == "cuda" else 2**22, 2 ** math.floor(math.log2(samples)))
    sample, related = Tally(case, device), Related(law, device)
    x = torch.empty(block, dtype=case.dtype, device=device)
    next_stream, next_seed = torch.empty_like(x), torch.empty_like(x)
    for stream in tqdm(range(math.ceil(samples / block)), desc=f"{case.name} {short(case.dtype)}", unit="block"):
        draw(x, SEED, stream)
        sample.add(x)
        if related.count < min(samples, RELATED):
            draw(next_stream, SEED, stream + 1)
            draw(next_seed, SEED + 1, stream)
            related.add(x, {"the next stream": next_stream, "the next seed": next_seed})
    return {
        "case": case.name,
        "dtype": short(case.dtype),
        "samples": sample.count,
        "samples of pairs and correlations": related.count,
        "words": law.count,
        "law": beside_the_ideal(law),
        "p": p_values(sample, law) | related.p_values(),
        "seconds": time.perf_counter() - began,
    }


def beside_the_ideal(law: Tally) -> dict[str, Any]:
    """How far the exact law is from the distribution that it stands for."""
    case = law.case
    found: dict[str, Any] = {}
    if case.dtype == torch.float32:
        edges = np.linspace(case.low, case.high, CELLS + 1)[1:-1]
        below = np.cumsum(law.probabilities("cells"))[:-1]
        found["largest difference of the distribution function"] = float(np.abs(below - case.ideal.cdf(edges)).max())
    ideal = [float(case.ideal.moment(exponent)) for exponent in range(1, 5)]
    found["moments"] = {"law": law.moments[1:5].tolist(), "ideal": ideal}
    found["beyond"] = []
    for limit, share in zip(law.limits, law.probabilities("beyond").tolist(), strict=True):
        ideal = case.ideal.sf(case.ideal.mean() + limit) + case.ideal.cdf(case.ideal.mean() - limit)
        found["beyond"].append({"distance": float(limit), "law": share, "ideal": float(ideal)})
    return found


def verdict(results: list[dict[str, Any]], of: int = 1) -> dict[str, Any]:
    """Whether all pass, as a part of a family of so many times as many tests."""
    of_all = [(p, f"{r['case']} {r['dtype']}: {name}") for r in results for name, p in r["p"].items()]
    smallest, where = min(of_all, key=lambda pair: -1.0 if math.isnan(pair[0]) else pair[0])
    limit = ALPHA / len(of_all) / of
    return {"tests": len(of_all), "smallest p": smallest, "of": where, "limit": limit, "passed": smallest > limit}


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]

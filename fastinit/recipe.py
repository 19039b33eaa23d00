"""What a tensor's values are, independent of where they live: distributions, steps and writes as frozen values.

A *recipe* is a tuple of writes in program order. The first one usually covers the whole tensor; later ones cover
rectangles of it (an embedding's padding row, the slices of a fused projection). An empty recipe means that nothing
has been written yet. docs/stream-v1.md specifies the values to the bit.

Private: it may change with any version.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from .native import CONSTANT, MAX_STEPS, NORMAL, TRUNCATED_NORMAL, UNIFORM

# A kind of recipes only: an operator's result, which needs the whole tensor (fastinit.record.calls). It comes first in
# its recipe, covers the whole and takes no steps.
CALLED = 4


class Region(NamedTuple):
    """Where in a tensor's storage a write goes, in elements."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """How many elements a storage needs to hold it, unless it is empty."""
        return self.offset + 1 + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))


class Write(NamedTuple):
    """One fill: a distribution on its stream, the steps that follow it, and the rectangle that it covers.

    Element k of a region, in the region's own row-major order, is element k of the stream. The key is that of whoever
    carries out the recipe, unless the write names one.
    """

    kind: int
    parameters: tuple[Any, ...]
    stream: int = 0
    steps: tuple[tuple[int, float, float], ...] = ()
    region: Region | None = None
    key: int | None = None


# What is noted among the writes that have been executed: torch has computed values, or they are another tensor's.
COMPUTED = Write(5, ())
COPIED = Write(6, ())


@dataclass(frozen=True, slots=True)
class Constant:
    """Every element equals ``value``.

    Example:
        >>> fastinit.fill_(torch.empty(3), fastinit.Constant(2.0), seed=0)
        tensor([2., 2., 2.])
    """

    value: float = 0.0
    kind: ClassVar[int] = CONSTANT

    @property
    def parameters(self) -> tuple[float, ...]:
        return (float(self.value),)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform on ``[low, high)``: ``fma(u, high - low, low)`` in fp32 with 24-bit u in [0, 1).

    Raises:
        ValueError: unless ``low <= high`` and both are finite.

    Example:
        >>> fastinit.fill_(torch.empty(2, 3), fastinit.Uniform(-1.0, 1.0), seed=0).shape
        torch.Size([2, 3])
    """

    low: float = 0.0
    high: float = 1.0
    kind: ClassVar[int] = UNIFORM

    def __post_init__(self) -> None:
        _require_finite("Uniform", low=self.low, high=self.high)
        if self.low > self.high:
            raise ValueError(f"Uniform: low={self.low} is greater than high={self.high}; exchange them")

    @property
    def parameters(self) -> tuple[float, ...]:
        return (float(self.low), float(self.high))


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal with the given mean and standard deviation, by inversion of the cumulative distribution.

    Raises:
        ValueError: unless both are finite and ``std >= 0``.

    Example:
        >>> fastinit.fill_(torch.empty(2, 3), fastinit.Normal(0.0, 0.02), seed=0).shape
        torch.Size([2, 3])
    """

    mean: float = 0.0
    std: float = 1.0
    kind: ClassVar[int] = NORMAL

    def __post_init__(self) -> None:
        _require_finite("Normal", mean=self.mean, std=self.std)
        if self.std < 0:
            raise ValueError(f"Normal: std={self.std} is negative; a standard deviation is at least 0")

    @property
    def parameters(self) -> tuple[float, ...]:
        return (float(self.mean), float(self.std))


@dataclass(frozen=True, slots=True)
class TruncatedNormal:
    """Normal restricted to ``[low, high]``, exactly: no rejection, one random word per element.

    ``low`` and ``high`` are values, not numbers of standard deviations, as in ``torch.nn.init.trunc_normal_``.
    They may be infinite.

    Raises:
        ValueError: unless ``std > 0``, ``low < high``, and mean and std are finite.

    Example:
        >>> fastinit.fill_(torch.empty(4), fastinit.TruncatedNormal(0.0, 1.0, -2.0, 2.0), seed=0).abs().max() <= 2
        tensor(True)
    """

    mean: float = 0.0
    std: float = 1.0
    low: float = -2.0
    high: float = 2.0
    kind: ClassVar[int] = TRUNCATED_NORMAL

    def __post_init__(self) -> None:
        _require_finite("TruncatedNormal", mean=self.mean, std=self.std)
        if not self.std > 0:
            raise ValueError(f"TruncatedNormal: std={self.std} must be positive; use Constant for a spread of 0")
        if not self.low < self.high:
            raise ValueError(f"TruncatedNormal: low={self.low} must be less than high={self.high}")

    @property
    def parameters(self) -> tuple[float, ...]:
        return (float(self.mean), float(self.std), float(self.low), float(self.high))


Distribution = Constant | Uniform | Normal | TruncatedNormal


def _require_finite(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{owner}: {name}={value} must be a finite number")


def with_step(recipe: tuple[Write, ...], op: int, a: float = 0.0, b: float = 0.0) -> tuple[Write, ...] | None:
    """The recipe followed by one step on every element, or None if a fill cannot carry that step."""
    if not recipe or recipe[0].kind == CALLED or any(len(write.steps) >= MAX_STEPS for write in recipe):
        return None
    return tuple(write._replace(steps=(*write.steps, (op, a, b))) for write in recipe)


def canonical(
    kind: int, parameters: tuple[float, ...], steps: tuple[tuple[int, float, float], ...]
) -> tuple[int, tuple[float, ...], tuple[tuple[int, float, float], ...]]:
    """The form that a kernel takes: of truncated normals, with the parameters that it computes with."""
    if kind == TRUNCATED_NORMAL:
        parameters = truncated_normal_parameters(*parameters)
    return kind, parameters, steps


def mix(key: int, ordinal: int) -> int:
    """A 64-bit seed from a key and an ordinal (the finalizer of SplitMix64)."""
    mask = 2**64 - 1
    x = (key + (ordinal + 1) * 0x9E3779B97F4A7C15) & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


# --- Truncated normal: from (mean, std, low, high) to what the kernel uses; docs/stream-v1.md derives the formulas ---

_TWO_31 = Decimal(2**31)
_TWO_32 = Decimal(2**32)
_SQRT_TWO_PI = (2 * Decimal("3.14159265358979323846264338327950288419716939937510582")).sqrt()


@lru_cache(maxsize=256)
def truncated_normal_parameters(mean: float, std: float, low: float, high: float) -> tuple[float, ...]:
    """Kernel parameters of a truncated normal: mean, std, threshold, then offset, scale, z limits of each side.

    Tail probabilities are computed with 50 decimal digits, so that every platform rounds to the same fp32 numbers;
    the C library's erfc would not promise that.
    """
    with localcontext() as context:
        context.prec = 50
        alpha = _deviations(low, mean, std)
        beta = _deviations(high, mean, std)
        if beta <= 0:
            # Wholly below the mean: the mirror image of an interval above it, with the sign in std.
            return _above_mean(mean, -std, -beta, -alpha, near=high, far=low)
        if alpha >= 0:
            return _above_mean(mean, std, alpha, beta, near=low, far=high)
        tail_low, tail_high = _tail(-alpha), _tail(beta)
        half = Decimal("0.5")
        words_below = int((_TWO_32 * (half - tail_low) / (1 - tail_low - tail_high)).to_integral_value())
        words_below = min(max(words_below, 0), 2**32 - 1)
        parameters = [mean, std, float(words_below - 2**31)]
        beyond = _TWO_32 * max(tail_low, tail_high) < 1
        for sign, tail, words, bound in ((-1, tail_low, words_below, low), (1, tail_high, 2**32 - words_below, high)):
            # No bound within the largest |z|: the normal's own values, to the bit. Otherwise no tail begins below 1,
            # where the table ends.
            offset = Decimal(0) if beyond else max(_TWO_32 * tail, Decimal(1))
            scale = (_TWO_31 - offset) / words if words else Decimal(0)
            parameters += [_float32(offset), _float32(scale), -math.inf, _z_limit(mean, sign * std, bound, -1)]
        return tuple(parameters)


def _above_mean(mean: float, std: float, near_z: Decimal, far_z: Decimal, near: float, far: float) -> tuple[float, ...]:
    far_tail = max(_TWO_32 * _tail(far_z), Decimal(1))
    scale = max(_TWO_32 * _tail(near_z) - far_tail, Decimal(0)) / _TWO_32
    side = (_float32(far_tail), _float32(scale), _z_limit(mean, std, near, +1), _z_limit(mean, std, far, -1))
    return (mean, std, float(-(2**31)), *side, *side)


def _deviations(bound: float, mean: float, std: float) -> Decimal:
    if math.isinf(bound):
        return Decimal(bound)
    return (Decimal(bound) - Decimal(mean)) / Decimal(std)


def _tail(z: Decimal) -> Decimal:
    """Probability that a standard normal exceeds z >= 0, by the series of Abramowitz and Stegun 26.2.11."""
    if z > 8:
        return Decimal(0)
    term = total = z
    n = 1
    while term > Decimal("1e-45"):
        n += 2
        term = term * z * z / n
        total += term
    return Decimal("0.5") - total * (-z * z / 2).exp() / _SQRT_TWO_PI


def _float32(x: Decimal | float) -> float:
    # Decimal to double to fp32 rounds twice; both roundings are IEEE and the same everywhere.
    rounded: float = struct.unpack("<f", struct.pack("<f", float(x)))[0]
    return rounded


def _next_float32(x: float, direction: int) -> float:
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    following: float
    if x == 0.0:
        following = direction * struct.unpack("<f", struct.pack("<i", 1))[0]
        return following
    bits += direction if x > 0 else -direction
    following = struct.unpack("<f", struct.pack("<i", bits))[0]
    return following


def _z_limit(mean: float, std: float, bound: float, direction: int) -> float:
    """The fp32 z closest to the bound for which fma(z, std, mean) is not beyond it.

    direction -1 looks for the largest z on the inside of an outer bound, +1 for the smallest z inside an inner one.
    Rounding is monotonic, so an exact value inside the bound stays inside it in every stored dtype that holds it.
    """
    if math.isinf(bound):
        return math.inf if direction < 0 else -math.inf
    exact_mean, exact_std, exact_bound = (Fraction(_float32(x)) for x in (mean, std, bound))
    if exact_std == 0:
        return math.inf if direction < 0 else -math.inf
    # Inside means below the bound in z * |std|, whichever sign std has.
    distance = (exact_bound - exact_mean) / exact_std
    z = _float32(float(distance))
    if math.isinf(z):
        return z
    while (Fraction(z) - distance) * direction < 0:
        z = _next_float32(z, direction)
    return z

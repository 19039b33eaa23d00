"""Stream v1 in plain NumPy: the slow, obvious twin of csrc/philox.h and csrc/distributions.h, for tests alone.

    python tests/support/reference.py          # writes tests/support/known_answers.json

Everything takes and returns arrays; nothing depends on the compiled module. The coefficients are read from
csrc/normal_table.h, which is their norm.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
KNOWN_ANSWERS = HERE / "known_answers.json"

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
STORAGE = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
CONSTANT, UNIFORM, NORMAL, TRUNCATED_NORMAL = range(4)
MULTIPLY, ADD, DIVIDE, CLAMP, ERFINV = range(5)

MASK32 = np.uint64(0xFFFFFFFF)


def philox(counter, key):
    """Philox4x32-10: four words of counter (arrays) and two of key to four words."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ np.uint64(k0), p1 & MASK32, (p0 >> 32) ^ c3 ^ np.uint64(k1), p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c.astype(np.uint32) for c in (c0, c1, c2, c3)]


def words(seed, stream, indices):
    """The word of each element index."""
    indices = np.asarray(indices, np.uint64)
    block = indices >> np.uint64(2)
    counter = (block & MASK32, block >> np.uint64(32), stream & 0xFFFFFFFF, stream >> 32)
    four = np.stack(np.broadcast_arrays(*philox(counter, (seed & 0xFFFFFFFF, seed >> 32))))
    return np.take_along_axis(four, (indices & np.uint64(3)).astype(np.intp)[None], axis=0)[0]


def fma(a, b, c):
    """a * b + c of float32 arrays, rounded once.

    The product is exact in float64. The sum is rounded to odd there: to the neighbour whose last bit is 1 unless it is
    exact. A later rounding to at most 51 bits then gives what rounding the exact sum would (Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    p = np.multiply(a, b, dtype=np.float64)
    c = np.asarray(c, np.float64)
    s = np.asarray(p + c)
    with np.errstate(invalid="ignore"):
        virtual = s - p
        error = (p - (s - virtual)) + (c - virtual)  # of the sum, exactly (Knuth)
        even = (s.view(np.uint64) & np.uint64(1)) == 0
        toward = np.where(error > 0, np.inf, -np.inf)
        s = np.where(np.isfinite(s) & (error != 0) & even, np.nextafter(s, toward), s)
    with np.errstate(over="ignore"):
        return s.astype(np.float32)


def _read_table():
    source = (HERE.parents[1] / "csrc" / "normal_table.h").read_text()
    rows = re.findall(r"^ *\{(.*)\},$", source, re.MULTILINE)
    return np.array([[float.fromhex(x.rstrip("f")) for x in row.split(", ")] for row in rows], np.float32)


TABLE = _read_table()


def icdf(f):
    """z >= 0 whose upper tail has probability |f| 2^-32."""
    bits = np.asarray(f, np.float32).view(np.uint32)
    c0, c1, c2, c3 = TABLE[(bits >> 20) & 255].T
    t = ((bits & np.uint32(0x000FFFFF)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1.0625)
    return fma(fma(fma(c3, t, c2), t, c1), t, c0)


def _with_sign(z, negative):
    return np.where(negative, -z, z)


def values(kind, parameters, w, steps=()):
    """The float32 values of the words w, before rounding to the stored dtype."""
    w = np.asarray(w, np.uint32)
    p = [float(x) for x in parameters]
    if kind == CONSTANT:
        x = np.full(w.shape, np.float32(p[0]))
    elif kind == UNIFORM:
        u = (w >> 8).astype(np.float32) * np.float32(2.0**-24)
        x = fma(u, np.float32(p[1] - p[0]), np.float32(p[0]))
    elif kind == NORMAL:
        f = w.view(np.int32).astype(np.float32)
        x = fma(_with_sign(icdf(f), np.signbit(f)), np.float32(p[1]), np.float32(p[0]))
    else:
        mean, std, threshold, *sides = p
        s = w.view(np.int32).astype(np.int64)
        negative = s < int(threshold)
        g = np.where(negative, int(threshold) - s, s - int(threshold)).astype(np.float32)
        offset, scale, low, high = (
            np.where(negative, np.float32(n), np.float32(q)) for n, q in zip(sides[:4], sides[4:], strict=True)
        )
        z = icdf(fma(g, scale, offset))
        z = np.where(z < low, low, z)
        z = np.where(z > high, high, z)
        x = fma(_with_sign(z, negative), np.float32(std), np.float32(mean))
    return apply_steps(x, steps)


def _coefficients(text):
    return [np.float32(float.fromhex(c)) for c in text.split()]


# Lowest first: -log2(1 + f) / f, and erfinv(x) / x in v = -log2(1 - x^2) and in v - 12.
LOG2 = _coefficients(
    "-0x1.715472p+0 0x1.7155b8p-1 -0x1.ec7b3ep-2 0x1.70baf4p-2 -0x1.25992ap-2 0x1.0011f8p-2 -0x1.e50a80p-3"
    " 0x1.2a5e40p-3"
)
NEAR = _coefficients(
    "0x1.c5bf8ap-1 0x1.495baap-3 0x1.6bb404p-8 -0x1.9851fep-11 -0x1.dd04acp-16 0x1.c3c5dep-18 0x1.204b44p-21"
    " -0x1.6303d6p-23 0x1.b7b3ccp-27 -0x1.88b8d8p-32"
)
FAR = _coefficients(
    "0x1.5bc5e2p+1 0x1.ebc998p-4 -0x1.2ff98ap-9 0x1.46a4eap-14 -0x1.23dc8ap-19 -0x1.30d19ep-25 0x1.b77e00p-27"
    " -0x1.6166b4p-30 0x1.8454aap-34 -0x1.18b7bcp-38 0x1.7dd168p-44"
)


def _horner(coefficients, x):
    y = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = fma(y, x, c)
    return y


def erfinv(x):
    a = np.abs(x)
    with np.errstate(all="ignore"):
        square = fma(-a, a, np.float32(1)).view(np.uint32)
        exponent = (square - np.uint32(0x3F3504F3)) & np.uint32(0xFF800000)
        f = (square - exponent).view(np.float32) - np.float32(1)
        whole = exponent.view(np.int32).astype(np.float32) * np.float32(-(2.0**-23))
        v = fma(f, _horner(LOG2, f), whole)
        ratio = np.where(v < np.float32(7), _horner(NEAR, v), _horner(FAR, v - np.float32(12)))
        edge = np.where(a == 1, np.float32(np.inf), np.float32(np.nan))
        return np.where(a < 1, ratio, edge) * x


def apply_steps(x, steps):
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        for op, a, b in steps:
            a, b = np.float32(a), np.float32(b)
            if op == MULTIPLY:
                x = x * a
            elif op == ADD:
                x = x + a
            elif op == DIVIDE:
                x = x / a
            elif op == ERFINV:
                x = erfinv(x)
            else:
                x = np.where(x < a, a, x)
                x = np.where(x > b, b, x)
    return np.where(np.isnan(x), np.array(0x7FC00000, np.uint32).view(np.float32), x)


def stored(x, dtype):
    """Bit patterns of float32 values rounded to the stored dtype."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    if dtype == "float32":
        return bits
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # NaN is 7FC00000 and passes unharmed


def fill(kind, parameters, seed, stream, indices, dtype="float32", steps=()):
    """Bit patterns of the elements with these indices."""
    return stored(values(kind, parameters, words(seed, stream, indices), steps), dtype)


# --- known answers ---------------------------------------------------------------------------------------------------

RANDOM123 = [  # kat_vectors of Random123, philox4x32-10
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

INF = float("inf")
# (mean, std, threshold, offset, scale, low, high of the negative, then of the positive side), as fastinit.recipe
# derives them: N(0, 0.02) within 2 std, N(0.5, 2), N(0.25, 0.5) on [-0.25, 1.25], N(0, 1) on [-6, -3] and below 0.5.
WITHIN_TWO = (0.0, 0.02, 0, *(97711072.0, 0.9544997215270996, -INF, 2.0) * 2)
UNBOUNDED = (0.5, 2.0, 0, *(0.0, 1.0, -INF, INF) * 2)
LOPSIDED = (0.25, 0.5, -356530598, 681419136.0, 0.8185946345329285, -INF, 1.0,
            97711072.0, 0.8185946345329285, -INF, 2.0)  # fmt: skip
BELOW = (0.0, -1.0, -(2**31), *(4.237361907958984, 0.001349897007457912, 3.0, 6.0) * 2)
ONE_BOUND = (0.0, 1.0, 958228908, 0.0, 0.6914624571800232, -INF, INF, 1325158656.0, 0.6914624571800232, -INF, 0.5)

# A truncated normal as libraries write it out by hand, after a uniform.
BY_HAND = ((ERFINV, 0.0, 0.0), (MULTIPLY, 0.02 * 2.0**0.5, 0.0), (ADD, 0.01, 0.0), (CLAMP, -0.02, 0.05))

CASES = [
    # name, kind, parameters, seed, stream, steps
    ("uniform on the unit interval", UNIFORM, (0.0, 1.0), 0, 0, ()),
    ("uniform, large key and stream", UNIFORM, (-0.1, 0.3), 2**64 - 1, 2**64 - 1, ()),
    ("uniform, tiny", UNIFORM, (1e-44, 3e-41), 3, 1, ()),
    ("standard normal", NORMAL, (0.0, 1.0), 0, 0, ()),
    ("normal, as a model's", NORMAL, (0.0, 0.02), 0x0123456789ABCDEF, 41, ()),
    ("normal with a mean, large stream", NORMAL, (1.0, 3.0), 5, 2**63 + 12345, ()),
    ("normal, subnormal in float16", NORMAL, (0.0, 1e-6), 11, 3, ()),
    ("normal, beyond float16", NORMAL, (0.0, 4e4), 12, 3, ()),
    ("normal, subnormal in float32", NORMAL, (0.0, 1e-39), 12, 4, ()),
    ("normal with no spread", NORMAL, (0.7, 0.0), 13, 5, ()),
    ("truncated normal, symmetric", TRUNCATED_NORMAL, WITHIN_TWO, 7, 2, ()),
    ("truncated normal, no bounds", TRUNCATED_NORMAL, UNBOUNDED, 0, 0, ()),
    ("truncated normal, lopsided", TRUNCATED_NORMAL, LOPSIDED, 8, 1 << 32, ()),
    ("truncated normal, below the mean alone", TRUNCATED_NORMAL, BELOW, 9, 3, ()),
    ("truncated normal, one bound", TRUNCATED_NORMAL, ONE_BOUND, 10, 3, ()),
    ("constant", CONSTANT, (0.1,), 1, 1, ()),
    ("constant, nan", CONSTANT, (float("nan"),), 1, 1, ()),
    ("constant, negative zero", CONSTANT, (-0.0,), 1, 1, ()),
    ("uniform, multiply and add", UNIFORM, (0.0, 1.0), 21, 0, ((MULTIPLY, 2.0, 0.0), (ADD, -1.0, 0.0))),
    ("normal, divide and clamp", NORMAL, (0.0, 1.0), 22, 0, ((DIVIDE, 3.0, 0.0), (CLAMP, -0.5, 0.25))),
    ("normal, four steps", NORMAL, (0.0, 1.0), 22, 1,
     ((CLAMP, -INF, 1.0), (MULTIPLY, -0.3, 0.0), (ADD, 0.1, 0.0), (DIVIDE, 7.0, 0.0))),
    ("truncated normal with a step", TRUNCATED_NORMAL, LOPSIDED, 23, 0, ((MULTIPLY, 0.1, 0.0),)),
    ("uniform to infinity and nan", UNIFORM, (-1.0, 1.0), 24, 0,
     ((MULTIPLY, 1e38, 0.0), (MULTIPLY, INF, 0.0), (ADD, -INF, 0.0))),
    ("constant with a step", CONSTANT, (1.0,), 1, 1, ((DIVIDE, 3.0, 0.0),)),
]  # fmt: skip

# Where in the stream the listed elements start: the beginning, inside a block, where the block number's and the
# element index's low words wrap, and near the end of what an index can be.
STARTS = [0, 5, 2**32 - 3, 2**34 - 6, 2**62 + 1]
LISTED = 8
DIGESTED = 1 << 16


def _hexadecimal(bits):
    return " ".join(f"{int(b):0{2 * bits.itemsize}x}" for b in bits)


def _case(name, kind, parameters, seed, stream, steps):
    case = {
        "name": name,
        "kind": kind,
        "parameters": " ".join(repr(float(x)) for x in parameters),
        "seed": f"{seed:#018x}",
        "stream": f"{stream:#018x}",
        "steps": [f"{op} {float(a)!r} {float(b)!r}" for op, a, b in steps],
        "elements": [],
        "sha256": {"index": 0, "count": DIGESTED},
    }
    for start in STARTS[: 1 if kind == CONSTANT else None]:
        indices = np.uint64(start) + np.arange(LISTED, dtype=np.uint64)
        x = values(kind, parameters, words(seed, stream, indices), steps)
        row = {"index": start, "words": _hexadecimal(words(seed, stream, indices))}
        row |= {dtype: _hexadecimal(stored(x, dtype)) for dtype in DTYPES}
        case["elements"].append(row)
    for dtype in DTYPES:
        little_endian = fill(kind, parameters, seed, stream, np.arange(DIGESTED), dtype, steps)
        digest = hashlib.sha256(little_endian.astype(little_endian.dtype.newbyteorder("<")).tobytes())
        case["sha256"][dtype] = digest.hexdigest()
    return case


def known_answers():
    return {
        "about": "Known answers of stream v1, read by the tests of every backend, by tests/support/reference.py. "
        "Words and bit patterns are hexadecimal, in order of element index, 'index' being the first; sha256 is over "
        "the little-endian elements [index, index + count). A step is an op and two operands, numbered "
        "as in csrc/fill.h.",
        "philox4x32-10": [{"counter": c, "key": k, "words": w} for c, k, w in RANDOM123],
        "fills": [_case(*case) for case in CASES],
    }


def read_known_answers():
    """The file's fills with everything parsed: numbers for numbers, arrays of storage type for bit patterns."""

    def bits(text, storage):
        return np.array([int(x, 16) for x in text.split()], storage)

    answers = json.loads(KNOWN_ANSWERS.read_text())["fills"]
    for case in answers:
        case["parameters"] = tuple(float(x) for x in case["parameters"].split())
        case["seed"], case["stream"] = int(case["seed"], 16), int(case["stream"], 16)
        case["steps"] = tuple((int(op), float(a), float(b)) for op, a, b in (s.split() for s in case["steps"]))
        for row in case["elements"]:
            row["words"] = bits(row["words"], np.uint32)
            row |= {dtype: bits(row[dtype], STORAGE[dtype]) for dtype in DTYPES}
    return answers


if __name__ == "__main__":
    KNOWN_ANSWERS.write_text(json.dumps(known_answers(), indent=1) + "\n")

"""The CPU fills against stream v1: known answers, and the same bits whatever the instruction set, the number of
threads, the dtype, the window or the batch."""

import ctypes
import hashlib
import math
import os
import platform
import re
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    ADD,
    CLAMP,
    CONSTANT,
    DIVIDE,
    DTYPES,
    ERFINV,
    MULTIPLY,
    NORMAL,
    STORAGE,
    TRUNCATED_NORMAL,
    UNIFORM,
)
from scipy import special

from fastinit import native

ISAS = native.cpu_isas()
CASES = reference.read_known_answers()
INF = float("inf")

# One distribution per kernel, each with two steps at times.
DISTRIBUTIONS = {
    "uniform": (UNIFORM, (-0.5, 1.5), ()),
    "tiny uniform": (UNIFORM, (0.0, 1e-32), ()),
    "normal": (NORMAL, (0.0, 0.02), ()),
    "symmetric truncated normal": (TRUNCATED_NORMAL, reference.WITHIN_TWO, ()),
    "lopsided truncated normal": (TRUNCATED_NORMAL, reference.LOPSIDED, ()),
    "far tail": (TRUNCATED_NORMAL, reference.BELOW, ()),
    "constant": (CONSTANT, (0.3,), ()),
    "uniform with steps": (UNIFORM, (0.0, 1.0), ((MULTIPLY, 3.0, 0.0), (CLAMP, 0.5, 2.5))),
    "normal with steps": (NORMAL, (0.0, 1.0), ((DIVIDE, 3.0, 0.0), (ADD, 0.1, 0.0))),
    "uniform with erfinv": (UNIFORM, (-0.95, 0.95), reference.BY_HAND),
    "normal with erfinv, beyond its domain": (NORMAL, (0.0, 1.0), ((ERFINV, 0.0, 0.0),)),
}


def storage(count, dtype, fill=0xA5):
    return np.full(count * np.dtype(STORAGE[dtype]).itemsize, fill, np.uint8).view(STORAGE[dtype])


def whole(count, kind, parameters, seed, stream, steps=(), dtype="float32", threads=1, isa=None):
    out = storage(count, dtype)
    batch = native.Batch()
    batch.add(out.ctypes.data, count, DTYPES[dtype], kind, parameters, seed, stream, steps)
    batch.run_cpu(threads, isa)
    return out


def region(out, start, box, kind, parameters, seed, stream, steps=(), dtype="float32", isa=None):
    """Fills a box = (index_offset, sizes, index_strides, memory_strides) at element `start` of out."""
    batch = native.Batch()
    address = out.ctypes.data + start * out.itemsize
    batch.add_region(address, DTYPES[dtype], kind, parameters, seed, stream, steps, *box)
    batch.run_cpu(1, isa)
    return out


def row(index, count, kind, parameters, seed, stream, steps=(), dtype="float32", isa=None):
    """Elements [index, index + count) of a stream."""
    return region(
        storage(count, dtype), 0, (index, (count,), (1,), (1,)), kind, parameters, seed, stream, steps, dtype, isa
    )


# --- the reference itself ---


@pytest.mark.parametrize("counter, key, expected", reference.RANDOM123)
def test_reference_philox_has_random123s_known_answers(counter, key, expected):
    counter, key, expected = ([int(x, 16) for x in text.split()] for text in (counter, key, expected))
    assert [int(w) for w in reference.philox(counter, key)] == expected


float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
operands = st.floats(width=32, allow_nan=False)


@settings(derandomize=True)
@given(float32s, float32s, float32s)
def test_reference_fma_rounds_the_exact_result_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = float(reference.fma(np.float32(a), np.float32(b), np.float32(c)))
    if math.isinf(got):
        assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
        return
    error = abs(Fraction(got) - exact)
    for neighbour in (np.nextafter(np.float32(got), np.float32(x)) for x in (-INF, INF)):
        if np.isfinite(neighbour):
            other = abs(Fraction(float(neighbour)) - exact)
            even = int(np.float32(got).view(np.uint32)) % 2 == 0
            assert error < other or (error == other and even)


def test_known_answers_file_is_what_the_reference_says():
    """No one edits the one without the other."""
    written = reference.KNOWN_ANSWERS.read_text()
    assert written == reference.json.dumps(reference.known_answers(), indent=1) + "\n"


# --- known answers ---


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_fills_have_the_known_answers(case, dtype, isa):
    fill = [case[x] for x in ("kind", "parameters", "seed", "stream", "steps")]
    for elements in case["elements"]:
        got = row(elements["index"], len(elements[dtype]), *fill, dtype, isa)
        np.testing.assert_array_equal(got, elements[dtype])
    digest = case["sha256"]
    got = row(digest["index"], digest["count"], *fill, dtype, isa)
    assert hashlib.sha256(got.astype(got.dtype.newbyteorder("<")).tobytes()).hexdigest() == digest[dtype]


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="reads Linux's flags of x86")
def test_the_instruction_sets_are_those_that_the_system_says_it_has():
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    avx2 = {"avx2", "fma", "f16c"}
    wanted = {"avx512": avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "avx2": avx2, "portable": set()}
    assert [isa for isa, needs in wanted.items() if needs <= flags] == ISAS


# --- one value function ---


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_large_fill_is_the_references_on_every_instruction_set(name, dtype, isa):
    kind, parameters, steps = DISTRIBUTIONS[name]
    count = 300_007
    got = whole(count, kind, parameters, 77, 5, steps, dtype, isa=isa)
    np.testing.assert_array_equal(got, reference.fill(kind, parameters, 77, 5, np.arange(count), dtype, steps))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_half_precision_is_float32_rounded_once(name):
    kind, parameters, steps = DISTRIBUTIONS[name]
    single = whole(50_001, kind, parameters, 3, 9, steps).view(np.float32)
    for dtype in ("float16", "bfloat16"):
        got = whole(50_001, kind, parameters, 3, 9, steps, dtype)
        np.testing.assert_array_equal(got, reference.stored(single, dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(threads, isa):
    count = 1_100_003
    for dtype in DTYPES:
        one = whole(count, NORMAL, (0.0, 1.0), 1, 2, (), dtype, 1, isa)
        np.testing.assert_array_equal(whole(count, NORMAL, (0.0, 1.0), 1, 2, (), dtype, threads, isa), one)


@pytest.mark.parametrize("start", [0, 1, 300_007])
def test_the_bits_of_a_large_fill_do_not_depend_on_where_its_memory_lies(start):
    """With so much for each thread, pieces end where huge pages do; with more threads they are small."""
    for dtype, storage_dtype in STORAGE.items():
        count = (9 << 20) // np.dtype(storage_dtype).itemsize + 3
        out = storage(start + count + 1, dtype)
        batch = native.Batch()
        batch.add(out.ctypes.data + start * out.itemsize, count, DTYPES[dtype], NORMAL, (0.0, 1.0), 1, 2, ())
        batch.run_cpu(2)
        np.testing.assert_array_equal(out[start:-1], whole(count, NORMAL, (0.0, 1.0), 1, 2, (), dtype, 64))
        around = np.concatenate([out[:start], out[-1:]])
        np.testing.assert_array_equal(around, storage(start + 1, dtype))


def test_a_batch_whose_fills_take_turns_gives_each_its_own_bits():
    """Fills share what they have in common with the last few: distributions, dtypes and shapes that come and go."""
    turns = [(list(DISTRIBUTIONS)[i % 7], list(DTYPES)[i % 3], (i % 5) * 100 + 1, i % 2) for i in range(60)]
    batch, outs = native.Batch(), []
    for name, dtype, count, seed in turns:
        kind, parameters, steps = DISTRIBUTIONS[name]
        outs.append(storage(count, dtype))
        batch.add(outs[-1].ctypes.data, count, DTYPES[dtype], kind, parameters, seed, len(outs), steps)
    assert len(batch) == len(turns)
    assert batch.elements == sum(out.size for out in outs)
    batch.run_cpu(2)
    assert len(batch) == 0
    for stream, ((name, dtype, count, seed), out) in enumerate(zip(turns, outs, strict=True), 1):
        kind, parameters, steps = DISTRIBUTIONS[name]
        np.testing.assert_array_equal(out, whole(count, kind, parameters, seed, stream, steps, dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1, 16])
def test_a_fill_larger_than_the_caches_has_the_bits_of_its_parts(isa, dtype, shift):
    # Large tensors are written past the caches where they lie on cache lines; parts and shifted ones are not.
    itemsize = np.dtype(STORAGE[dtype]).itemsize
    count, part, line = (16 << 20) // itemsize + 4321, 1 << 19, 64 // itemsize
    out = storage(count + shift + 2 * line, dtype)
    start = -out.ctypes.data // itemsize % line + shift
    batch = native.Batch()
    batch.add(out.ctypes.data + start * itemsize, count, DTYPES[dtype], NORMAL, (0.0, 0.02), 5, 6)
    batch.run_cpu(2, isa)
    untouched = storage(count, dtype)
    assert np.array_equal(out[:start], untouched[:start])
    assert np.array_equal(out[start + count :], untouched[: len(out) - start - count])
    for first in range(0, count, part):
        expected = row(first, min(part, count - first), NORMAL, (0.0, 0.02), 5, 6, dtype=dtype)
        assert np.array_equal(out[start + first : start + first + len(expected)], expected)


def test_a_batch_gives_what_single_fills_give():
    rng = np.random.default_rng(0)
    fills, outs = [], []
    for stream in range(300):
        name = list(DISTRIBUTIONS)[rng.integers(len(DISTRIBUTIONS))]
        dtype = list(DTYPES)[rng.integers(3)]
        count = int(rng.choice([0, 1, 3, 64, 1000, 70_000]))
        fills.append((count, *DISTRIBUTIONS[name][:2], 12, stream, DISTRIBUTIONS[name][2], dtype))
        outs.append(storage(count, dtype))
    batch = native.Batch()
    for out, (count, kind, parameters, seed, stream, steps, dtype) in zip(outs, fills, strict=True):
        batch.add(out.ctypes.data, count, DTYPES[dtype], kind, parameters, seed, stream, steps)
    assert len(batch) == 300
    assert batch.elements == sum(fill[0] for fill in fills)
    batch.run_cpu(2)
    assert len(batch) == batch.elements == 0
    for out, fill in zip(outs, fills, strict=True):
        np.testing.assert_array_equal(out, whole(*fill))


def test_a_batch_runs_once():
    out = storage(16, "float32")
    batch = native.Batch()
    batch.add(out.ctypes.data, 16, 0, CONSTANT, (1.0,), 0, 0)
    batch.run_cpu(1)
    out[:] = 0
    batch.run_cpu(1)
    assert not out.any()


# --- windows ---


@st.composite
def boxes(draw):
    """A box of a row-major global tensor, in memory of any dimension order with gaps: (global index of each element,
    place in memory of each element, the native arguments)."""
    dims = draw(st.integers(1, 5))
    sizes = [draw(st.integers(1, 6)) for _ in range(dims)]
    if draw(st.booleans()):
        sizes[-1] = draw(st.integers(1, 1500))
    before = [draw(st.integers(0, 3)) for _ in sizes]
    after = [draw(st.integers(0, 3)) if draw(st.booleans()) else 0 for _ in sizes]
    if draw(st.booleans()):
        before = after = [0] * dims
    shape = [b + s + a for b, s, a in zip(before, sizes, after, strict=True)]
    index_strides = [int(np.prod(shape[d + 1 :])) for d in range(dims)]
    memory_strides, step = [0] * dims, draw(st.sampled_from([1, 1, 1, 2]))
    for d in draw(st.permutations(range(dims))) if draw(st.booleans()) else reversed(range(dims)):
        memory_strides[d] = step
        step *= sizes[d]
        step += draw(st.sampled_from([0, 0, 1, 5]))
    offset = sum(b * s for b, s in zip(before, index_strides, strict=True))
    offset += draw(st.sampled_from([0, 0, 2**32 - 5, 2**34 - 50]))
    places = np.indices(sizes).reshape(dims, -1)
    index = offset + np.array(index_strides) @ places
    memory = np.array(memory_strides) @ places
    return index, memory, (offset, tuple(sizes), tuple(index_strides), tuple(memory_strides))


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, derandomize=True)
@given(
    box=boxes(),
    start=st.integers(0, 40),
    dtype=st.sampled_from(list(DTYPES)),
    name=st.sampled_from(["uniform", "normal", "constant", "normal with steps"]),
)
def test_a_box_writes_its_elements_of_the_stream_and_nothing_else(isa, box, start, dtype, name):
    index, memory, arguments = box
    kind, parameters, steps = DISTRIBUTIONS[name]
    out = storage(start + int(memory.max()) + 40, dtype)
    expected = out.copy()
    expected[start + memory] = reference.fill(kind, parameters, 6, 7, index, dtype, steps)
    region(out, start, arguments, kind, parameters, 6, 7, steps, dtype, isa)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_start_and_length_is_a_slice_of_the_whole(dtype, isa):
    kind, parameters = NORMAL, (0.0, 1.0)
    tensor = whole(400, kind, parameters, 1, 1, (), dtype, isa=isa)
    for start in range(9):
        for count in (*range(1, 70), 127, 128, 129, 255, 257):
            out = storage(start + count + 1, dtype)
            region(out, start, (start, (count,), (1,), (1,)), kind, parameters, 1, 1, (), dtype, isa)
            np.testing.assert_array_equal(out[start:-1], tensor[start : start + count])
            assert (out[:start] == storage(1, dtype)).all() and out[-1] == storage(1, dtype)[0]


@pytest.mark.parametrize("isa", ISAS)
def test_index_offsets_pass_where_counters_carry(isa):
    for boundary in (2**32, 2**34, 2**36, 2**62):
        first = boundary - 5003
        got = row(first, 10_001, UNIFORM, (0.0, 1.0), 4, 4, isa=isa)
        index = np.uint64(first) + np.arange(10_001, dtype=np.uint64)
        np.testing.assert_array_equal(got, reference.fill(UNIFORM, (0.0, 1.0), 4, 4, index))


def test_a_large_column_window_is_cut_among_threads_like_any_other():
    rows, columns, first, width = 700, 900, 123, 611
    tensor = whole(rows * columns, NORMAL, (0.0, 1.0), 2, 2).reshape(rows, columns)
    out = storage(rows * width, "float32")
    batch = native.Batch()
    batch.add_region(out.ctypes.data, 0, NORMAL, (0.0, 1.0), 2, 2, (), first, (rows, width), (columns, 1), (width, 1))
    batch.run_cpu(3)
    np.testing.assert_array_equal(out.reshape(rows, width), tensor[:, first : first + width])


def test_a_transposed_tensor_gets_the_same_elements():
    tensor = whole(300 * 500, NORMAL, (0.0, 1.0), 2, 2, (), "bfloat16").reshape(300, 500)
    out = storage(300 * 500, "bfloat16")
    region(out, 0, (0, (300, 500), (500, 1), (1, 300)), NORMAL, (0.0, 1.0), 2, 2, (), "bfloat16")
    np.testing.assert_array_equal(out.reshape(500, 300).T, tensor)


# --- the float environment ---

LIBM = ctypes.CDLL(None)
FE_TONEAREST, FE_UPWARD = 0, 0x800 if sys.platform != "darwin" else 0x400000


def test_flush_to_zero_in_the_host_program_changes_nothing():
    torch = pytest.importorskip("torch")
    fill = (4096, NORMAL, (0.0, 1e-39), 1, 1)
    expected = whole(*fill)
    assert (expected & 0x7FFFFFFF > 0).mean() > 0.9
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormals")
    try:
        tiny = torch.tensor([1e-39])
        flushed = (tiny * 1.0).item() == 0.0
        got = whole(*fill)
        value = native.apply_steps(1e-39, ((MULTIPLY, 1.0, 0.0),))
        still = (tiny * 1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(got, expected)
    assert value > 0.0
    assert flushed and still, "the host's setting must be as before"


@pytest.mark.skipif(not hasattr(LIBM, "fesetround"), reason="no fesetround here")
def test_a_rounding_mode_set_by_the_host_program_changes_nothing():
    expected = whole(4096, NORMAL, (0.1, 0.3), 1, 1)
    assert LIBM.fesetround(FE_UPWARD) == 0
    try:
        got = whole(4096, NORMAL, (0.1, 0.3), 1, 1)
        kept = LIBM.fegetround()
    finally:
        LIBM.fesetround(FE_TONEAREST)
    np.testing.assert_array_equal(got, expected)
    assert kept == FE_UPWARD


# --- steps ---


@settings(deadline=None, derandomize=True)
@given(value=float32s, steps=st.lists(st.tuples(st.integers(0, 4), operands, operands), max_size=6))
def test_apply_steps_is_what_a_fill_computes(value, steps):
    expected = reference.apply_steps(np.float32([value]), steps).view(np.uint32)
    got = np.float32(native.apply_steps(value, tuple(steps)))
    assert np.array_equal(np.array([got]).view(np.uint32), expected)
    for isa in ISAS:
        np.testing.assert_array_equal(whole(3, CONSTANT, (value,), 0, 0, steps, isa=isa), expected.repeat(3))
        # The same value by way of a kernel's own steps: a uniform with no range.
        flat = (UNIFORM, (value, value), 0, 0)
        got = whole(70, *flat, steps, isa=isa)
        np.testing.assert_array_equal(got, reference.fill(*flat, np.arange(70), steps=steps))


# --- erfinv ---

# What uniforms take erfinv to: both signs and all magnitudes, where 1 - x^2 is small and where x is, the ends of the
# domain and what is beyond them.
RANGES = {
    "everything": (-1.0, 1.0),
    "above a half": (0.5, 1.0),
    "the change of polynomials": (0.994, 0.998),
    "near one": (1.0 - 2.0**-18, 1.0),
    "near minus one": (-1.0, -1.0 + 2.0**-12),
    "small": (-0.01, 0.01),
    "tiny": (0.0, 1e-12),
    "subnormal": (-1e-38, 1e-38),
    "beyond": (-3.0, 2.0),
}
STEP = ((ERFINV, 0.0, 0.0),)
EDGES = np.array([0, 1, 2, 0x007FFFFF, 0x00800000, 0x3F3504F3, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x7F7FFFFF,
                  0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], np.uint32)  # fmt: skip
EDGES = np.concatenate([EDGES, EDGES | np.uint32(1 << 31)])


def erfinv_in_place(x):
    out = np.array(x, np.float32)
    native.erfinv(out.ctypes.data, out.size)
    return out


@pytest.mark.parametrize("low, high", RANGES.values(), ids=RANGES)
def test_erfinv_is_the_references_on_every_instruction_set(low, high):
    count = 200_003
    expected = reference.fill(UNIFORM, (low, high), 4, 5, np.arange(count), steps=STEP)
    for isa in ISAS:
        np.testing.assert_array_equal(whole(count, UNIFORM, (low, high), 4, 5, STEP, isa=isa), expected)


@pytest.mark.parametrize("low, high", RANGES.values(), ids=RANGES)
def test_a_uniform_that_is_taken_through_erfinv_later_has_the_bits_of_one_fill(low, high):
    x = whole(70_001, UNIFORM, (low, high), 4, 5).view(np.float32)
    fused = whole(70_001, UNIFORM, (low, high), 4, 5, STEP)
    np.testing.assert_array_equal(erfinv_in_place(x).view(np.uint32), fused)


def test_a_truncated_normal_by_hand_has_the_same_bits_in_one_fill_and_step_by_step():
    fused = whole(70_001, UNIFORM, (-0.95, 0.95), 4, 5, reference.BY_HAND)
    x = erfinv_in_place(whole(70_001, UNIFORM, (-0.95, 0.95), 4, 5).view(np.float32))
    np.testing.assert_array_equal(reference.apply_steps(x, reference.BY_HAND[1:]).view(np.uint32), fused)


def test_erfinv_of_every_exponent_and_of_edges_is_the_references():
    random = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint32)
    x = np.concatenate([random, EDGES]).view(np.float32)
    expected = reference.apply_steps(x, STEP).view(np.uint32)
    np.testing.assert_array_equal(erfinv_in_place(x).view(np.uint32), expected)
    for value, bits in zip(x[-3000:], expected[-3000:], strict=True):
        got = np.float32(native.apply_steps(float(value), STEP))
        assert np.array([got]).view(np.uint32) == bits


@pytest.mark.parametrize("isa", ISAS)
def test_erfinv_in_place_is_the_references_on_every_instruction_set(isa):
    """The variable is read once in a process."""
    script = """if True:
        import sys
        import numpy as np
        from fastinit import native

        assert native.cpu_isa() == sys.argv[1]
        x = np.frombuffer(sys.stdin.buffer.read(), np.float32).copy()
        native.erfinv(x.ctypes.data, x.size)
        sys.stdout.buffer.write(x.tobytes())
    """
    random = np.random.default_rng(1).integers(0, 2**32, 20_000, dtype=np.uint32)
    x = np.concatenate([random, EDGES, np.linspace(-1, 1, 20_001, dtype=np.float32).view(np.uint32)]).view(np.float32)
    environment = os.environ | {"FASTINIT_CPU_ISA": isa}
    command = [sys.executable, "-c", script, isa]
    done = subprocess.run(command, input=x.tobytes(), env=environment, stdout=subprocess.PIPE, check=True)
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.uint32), reference.apply_steps(x, STEP).view(np.uint32))


def test_erfinv_has_the_bits_that_it_had():
    """The stream is frozen: of every 997th float32 in [0, 1), and of the edges."""
    x = np.concatenate([np.arange(0, 0x3F800000, 997, dtype=np.uint32), EDGES]).view(np.float32)
    digest = hashlib.sha256(erfinv_in_place(x).astype("<f4").tobytes()).hexdigest()
    assert digest == "357ad970f2697a11dadd2e0fa5d2e2a6339f304b71edba05424f906b36d33df2"


def test_erfinv_is_accurate_odd_and_monotonic():
    x = np.arange(0, 0x3F800000, 997, dtype=np.uint32).view(np.float32)
    got = erfinv_in_place(x)
    exact = special.erfinv(x.astype(np.float64))
    normal = exact >= np.finfo(np.float32).tiny
    ulp = 2.0 ** (np.frexp(exact[normal])[1] - 24)
    assert (np.abs(got[normal] - exact[normal]) / ulp).max() < 2.0
    assert (np.abs(got[~normal] - exact[~normal]) <= 2.0**-149).all()
    assert (np.diff(got) >= 0).all()
    np.testing.assert_array_equal(erfinv_in_place(-x).view(np.uint32), (-got).view(np.uint32))


def test_erfinv_at_the_ends_of_its_domain_and_beyond_is_torchs():
    torch = pytest.importorskip("torch")
    x = np.array([0.0, -0.0, 1.0, -1.0, 1.5, -1.0000001, INF, -INF, np.nan], np.float32)
    expected = torch.erfinv(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(erfinv_in_place(x), expected)
    assert np.signbit(erfinv_in_place([-0.0])) and not np.signbit(erfinv_in_place([0.0]))


def test_erfinv_in_place_writes_what_it_is_told_to():
    x = np.random.default_rng(2).uniform(-1, 1, 100).astype(np.float32)
    expected = reference.apply_steps(x, STEP)
    for start in (0, 1, 5):
        for count in (0, 1, 7, 15, 16, 17, 31, 33, 64, 70):
            out = x.copy()
            native.erfinv(out.ctypes.data + 4 * start, count)
            np.testing.assert_array_equal(out[start : start + count], expected[start : start + count])
            np.testing.assert_array_equal(out[:start], x[:start])
            np.testing.assert_array_equal(out[start + count :], x[start + count :])


def test_erfinv_does_not_depend_on_what_the_host_program_does_with_subnormals_and_rounding():
    torch = pytest.importorskip("torch")
    x = np.concatenate([np.linspace(-1e-38, 1e-38, 1001), np.linspace(-1, 1, 1001)]).astype(np.float32)
    expected = reference.apply_steps(x, STEP).view(np.uint32)
    upward = hasattr(LIBM, "fesetround") and LIBM.fesetround(FE_UPWARD) == 0
    torch.set_flush_denormal(True)
    try:
        got = erfinv_in_place(x).view(np.uint32)
    finally:
        torch.set_flush_denormal(False)
        if upward:
            LIBM.fesetround(FE_TONEAREST)
    np.testing.assert_array_equal(got, expected)


def test_erfinv_refuses_bad_arguments_by_name():
    native.erfinv(0, 0)
    for match, *arguments in (
        (r"numel is -1", 64, -1),
        (r"data_ptr is 0", 0, 4),
        (r"data_ptr is 66.*aligned", 66, 4),
        (r"data_ptr is -4", -4, 4),
    ):
        with pytest.raises(ValueError, match=match):
            native.erfinv(*arguments)


# --- refusals ---


def refused(match, **changes):
    arguments = {"data_ptr": 64, "numel": 4, "dtype": 0, "kind": NORMAL, "parameters": (0.0, 1.0)}
    batch = native.Batch()
    with pytest.raises(ValueError, match=match):
        batch.add(**(arguments | {"seed": 0, "stream": 0, "steps": ()} | changes))
    assert len(batch) == 0


def test_bad_arguments_are_refused_by_name():
    refused(r"numel is -1", numel=-1)
    refused(r"data_ptr is 0", data_ptr=0)
    refused(r"data_ptr is 66.*aligned", data_ptr=66)
    refused(r"dtype is 3.*bfloat16", dtype=3)
    refused(r"kind is 4.*normal", kind=4)
    refused(r"parameters is of length 1", parameters=(0.0,))
    refused(r"mean is inf", parameters=(INF, 1.0))
    refused(r"std is nan", parameters=(0.0, float("nan")))
    refused(r"std is -1", parameters=(0.0, -1.0))
    refused(r"std is 1e\+39.*float32", parameters=(0.0, 1e39))
    refused(r"high is 0.*low, 1", kind=UNIFORM, parameters=(1.0, 0.0))
    refused(r"high - low is 6e\+38", kind=UNIFORM, parameters=(-3e38, 3e38))
    refused(r"seed is -1.*2\*\*64", seed=-1)
    refused(r"stream is 18446744073709551616", stream=2**64)
    refused(r"step is 5.*4 \(erfinv\)", steps=((5, 0.0, 0.0),))
    refused(r"steps is longer than 6", steps=((ADD, 0.0, 0.0),) * 7)
    refused(r"step operand is nan", steps=((ADD, float("nan"), 0.0),))
    threshold = list(reference.WITHIN_TWO)
    for bad in (0.5, 2.0**31, float("nan")):
        threshold[2] = bad
        refused(r"threshold is", kind=TRUNCATED_NORMAL, parameters=threshold)


def test_bad_regions_are_refused_by_name():
    def refused_region(match, index_offset=0, sizes=(2, 3), index_strides=(3, 1), memory_strides=(3, 1)):
        with pytest.raises(ValueError, match=match):
            native.Batch().add_region(
                64, 0, NORMAL, (0.0, 1.0), 0, 0, (), index_offset, sizes, index_strides, memory_strides
            )

    refused_region(r"sizes is of length 0", sizes=(), index_strides=(), memory_strides=())
    refused_region(r"sizes is of length 9", sizes=(1,) * 9, index_strides=(1,) * 9, memory_strides=(1,) * 9)
    refused_region(r"index_strides is of length 1", index_strides=(1,))
    refused_region(r"memory_strides is of length 1", memory_strides=(1,))
    refused_region(r"sizes\[1\] is -3", sizes=(2, -3))
    refused_region(r"index_strides\[0\] is -3", index_strides=(-3, 1))
    refused_region(r"memory_strides\[0\] is 0.*share memory", memory_strides=(0, 1))
    refused_region(r"index_offset is -1", index_offset=-1)
    refused_region(r"below element 2\^63", index_offset=2**63)
    refused_region(r"below element 2\^63", sizes=(2**40, 2**40))


def test_empty_fills_need_no_memory():
    batch = native.Batch()
    batch.add(0, 0, 0, NORMAL, (0.0, 1.0), 0, 0)
    batch.add_region(0, 0, NORMAL, (0.0, 1.0), 0, 0, (), 0, (3, 0, 2), (1, 1, 1), (1, 1, 1))
    assert len(batch) == 2 and batch.elements == 0
    batch.run_cpu(4)


def test_run_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"threads is 0"):
        native.Batch().run_cpu(0)
    with pytest.raises(ValueError, match=r"isa is 'sse9': this machine runs .*portable"):
        native.Batch().run_cpu(1, "sse9")


# --- the instruction set ---


def cpu_isa_under(value):
    return subprocess.run(
        [sys.executable, "-c", "from fastinit import native; print(native.cpu_isa())"],
        env=os.environ | {"FASTINIT_CPU_ISA": value},
        capture_output=True,
        text=True,
    )


def test_the_environment_chooses_the_instruction_set():
    assert native.cpu_isas()[-1] == "portable"
    assert cpu_isa_under("portable").stdout.strip() == "portable"
    assert cpu_isa_under("").stdout.strip() == ISAS[0]
    result = cpu_isa_under("neon2")
    assert result.returncode != 0
    assert "ValueError: FASTINIT_CPU_ISA is 'neon2': this machine runs" in result.stderr


# --- the rest of the module ---


def test_the_gil_is_released_while_a_batch_runs():
    out = storage(1 << 22, "float32")
    batch = native.Batch()
    batch.add(out.ctypes.data, out.size, 0, NORMAL, (0.0, 1.0), 0, 0)
    finished = threading.Event()

    def run():
        batch.run_cpu(1, "portable")
        finished.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # nobody is made to give up the GIL, so a batch that kept it would finish first
    try:
        thread = threading.Thread(target=run)
        thread.start()
        while len(batch):  # the batch is emptied before the GIL is released
            os.sched_yield()
        assert not finished.is_set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_huge_page_advice_needs_a_huge_page():
    small = np.zeros(1000, np.uint8)
    assert native.advise_huge_pages(small.ctypes.data, small.size) is False
    large = np.zeros(5 << 20, np.uint8)
    assert native.advise_huge_pages(large.ctypes.data, large.size) in (True, False)
    with pytest.raises(ValueError, match="nbytes is -1"):
        native.advise_huge_pages(large.ctypes.data, -1)


def test_build_info_says_what_was_built():
    info = native.build_info()
    assert set(info) == {"cuda", "cuda_version", "cuda_architectures", "compiler"}
    assert info["compiler"]
    if info["cuda"]:
        assert info["cuda_version"] and info["cuda_architectures"]
    else:
        assert info["cuda_version"] is None and info["cuda_architectures"] == []
        with pytest.raises(RuntimeError, match="built without CUDA"):
            native.Batch().run_cuda(0, 0)

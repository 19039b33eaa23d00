"""CUDA fills have the CPU's bits, whatever the distribution, dtype, geometry, alignment, batch, stream or capture."""

import hashlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import reference
import torch
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

from fastinit import native

CASES = reference.read_known_answers()
THREADS = 4
INF = float("inf")
GUARD = 0xA5

# One distribution per kernel and branch of a kernel, as (kind, parameters, steps).
DISTRIBUTIONS = {
    "uniform": (UNIFORM, (-0.5, 1.5), ()),
    "tiny uniform": (UNIFORM, (0.0, 1e-32), ()),
    "normal": (NORMAL, (0.0, 0.02), ()),
    "normal about negative zero": (NORMAL, (-0.0, 1.0), ()),
    "symmetric truncated normal": (TRUNCATED_NORMAL, reference.WITHIN_TWO, ()),
    "unbounded truncated normal": (TRUNCATED_NORMAL, reference.UNBOUNDED, ()),
    "lopsided truncated normal": (TRUNCATED_NORMAL, reference.LOPSIDED, ()),
    "far tail": (TRUNCATED_NORMAL, reference.BELOW, ()),
    "one bound": (TRUNCATED_NORMAL, reference.ONE_BOUND, ()),
    "constant": (CONSTANT, (0.3,), ()),
    "constant with steps": (CONSTANT, (0.3,), ((DIVIDE, 3.0, 0.0), (ADD, 1.0, 0.0))),
    "uniform with steps": (UNIFORM, (0.0, 1.0), ((MULTIPLY, 3.0, 0.0), (CLAMP, 0.5, 2.5))),
    "normal with steps": (NORMAL, (0.0, 1.0), ((DIVIDE, 3.0, 0.0), (ADD, 0.1, 0.0), (CLAMP, -0.3, INF))),
    "truncated normal with a step": (TRUNCATED_NORMAL, reference.WITHIN_TWO, ((MULTIPLY, -1.5, 0.0),)),
    "uniform with an offset": (UNIFORM, (0.0, 1.0), ((ADD, -0.5, 0.0),)),
    "normal with a factor": (NORMAL, (0.0, 1.0), ((MULTIPLY, 0.02, 0.0),)),
    "normal with a factor and an offset": (NORMAL, (0.0, 1.0), ((MULTIPLY, -1.5, 0.0), (ADD, 0.25, 0.0))),
    "normal divided by a power of two": (NORMAL, (0.0, 1.0), ((DIVIDE, -8.0, 0.0), (ADD, -0.0, 0.0))),
    "normal divided by a large number": (NORMAL, (0.0, 1.0), ((DIVIDE, 2.0**127, 0.0),)),
    # Symmetric, and on both sides of what the fast form takes: f from 2 to 2^31.
    "truncated normal at 6.2 sigma": (TRUNCATED_NORMAL, (0.0, 1.0, 0, *(1.2122, 1.0, -INF, 6.2) * 2), ()),
    "truncated normal from f = 2 on": (TRUNCATED_NORMAL, (0.0, 1.0, 0, *(2.0, 1.0, -INF, 6.1) * 2), ()),
    "truncated normal with f beyond the median": (TRUNCATED_NORMAL, (0.0, 1.0, 0, *(4.0, 3.0, -INF, 2.0) * 2), ()),
    # erfinv where no value can be NaN, after other steps, and where values are infinite or NaN.
    "uniform with erfinv": (UNIFORM, (-0.95, 0.95), reference.BY_HAND),
    "six steps": (UNIFORM, (0.0, 1.0), ((MULTIPLY, 1.998, 0.0), (ADD, -0.999, 0.0), *reference.BY_HAND)),
    "normal with erfinv": (NORMAL, (0.0, 0.1), ((ERFINV, 0.0, 0.0),)),
    "truncated with erfinv": (TRUNCATED_NORMAL, reference.WITHIN_TWO, ((MULTIPLY, 24.0, 0.0), (ERFINV, 0.0, 0.0))),
    "constant with erfinv": (CONSTANT, (0.7,), ((ERFINV, 0.0, 0.0), (MULTIPLY, 3.0, 0.0))),
    "uniform with erfinv to infinity": (UNIFORM, (-1.0, 1.0), ((ERFINV, 0.0, 0.0),)),
    "normal with erfinv to nan": (NORMAL, (0.0, 1.0), ((ERFINV, 0.0, 0.0), (ADD, 1.0, 0.0))),
    "uniform to infinity and nan": (UNIFORM, (-1.0, 1.0), ((MULTIPLY, INF, 0.0), (ADD, -INF, 0.0))),
}

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def cuda_stream():
    return torch.cuda.current_stream().cuda_stream


def device_bytes(nbytes):
    return torch.full((nbytes,), GUARD, dtype=torch.uint8, device="cuda")


def cpu_and_cuda(nbytes, add):
    """What add(batch, address) leaves in memory of GUARD bytes at `address`: on the CPU and on the GPU."""
    expected = np.full(nbytes, GUARD, np.uint8)
    batch = native.Batch()
    add(batch, expected.ctypes.data)
    batch.run_cpu(THREADS)
    actual = device_bytes(nbytes)
    batch = native.Batch()
    add(batch, actual.data_ptr())
    batch.run_cuda(0, cuda_stream())
    return expected, actual.cpu().numpy()


def itemsize(dtype):
    return np.dtype(STORAGE[dtype]).itemsize


def row(index, count, dtype, distribution, seed=0, stream=0):
    """Elements [index, index + count) of a stream, from the GPU."""
    kind, parameters, steps = distribution
    out = device_bytes(count * itemsize(dtype))
    batch = native.Batch()
    batch.add_region(out.data_ptr(), DTYPES[dtype], kind, parameters, seed, stream, steps, index, (count,), (1,), (1,))
    batch.run_cuda(0, cuda_stream())
    return out.cpu().numpy().view(STORAGE[dtype])


# --- values ---


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_known_answers(case, dtype):
    distribution = case["kind"], case["parameters"], case["steps"]
    for listed in case["elements"]:
        expected = listed[dtype]
        np.testing.assert_array_equal(
            row(listed["index"], len(expected), dtype, distribution, case["seed"], case["stream"]), expected
        )
    digest = case["sha256"]
    elements = row(digest["index"], digest["count"], dtype, distribution, case["seed"], case["stream"])
    assert hashlib.sha256(elements.tobytes()).hexdigest() == digest[dtype]


@every_dtype
@every_distribution
@pytest.mark.parametrize("count", [1, 7, 8, 4095, 300_001])
def test_whole_tensors_have_the_cpus_bits(count, distribution, dtype):
    kind, parameters, steps = distribution
    expected, actual = cpu_and_cuda(
        count * itemsize(dtype) + 64,
        lambda batch, address: batch.add(address, count, DTYPES[dtype], kind, parameters, 2**64 - 3, 2**63 + 5, steps),
    )
    np.testing.assert_array_equal(actual, expected)


def address_of(words, seed):
    """The (block, stream) whose Philox output under `seed` is `words`: its ten rounds undone."""
    mask, multipliers = 2**32 - 1, (0xD2511F53, 0xCD9E8D57)
    x, y, z, w = words
    for i in reversed(range(10)):
        key = (seed + i * 0x9E3779B9) & mask, ((seed >> 32) + i * 0xBB67AE85) & mask
        before_x, before_z = w * pow(multipliers[0], -1, 2**32) & mask, y * pow(multipliers[1], -1, 2**32) & mask
        y, w = x ^ (multipliers[1] * before_z >> 32) ^ key[0], z ^ (multipliers[0] * before_x >> 32) ^ key[1]
        x, z = before_x, before_z
    return x | y << 32, z | w << 32


def edge_words():
    """Words at the ends of the inverse CDF's cells and of the conversions before it, and their negatives."""
    magnitudes = {0, 1, 2, 3, 2**31, 2**31 - 1, 2**31 - 64, 2**31 - 65, 2**24 - 1, 2**24, 2**24 + 1}
    for exponent in range(31):
        for cell in range(8):
            edge = 2**exponent + cell * 2**exponent // 8
            magnitudes |= {edge - 1, edge, edge + 1}
    words = {m & (2**32 - 1) for m in magnitudes} | {-m & (2**32 - 1) for m in magnitudes}
    # The thresholds of the lopsided distributions above.
    words |= {(t + d) & (2**32 - 1) for t in (-356530598, 958228908) for d in (-2, -1, 0, 1, 2)}
    return sorted(words)


def test_philox_can_be_undone():
    block, stream = address_of([1, 2, 3, 4], seed=0x0123456789ABCDEF)
    counter = block & (2**32 - 1), block >> 32, stream & (2**32 - 1), stream >> 32
    assert [int(w) for w in reference.philox(counter, (0x89ABCDEF, 0x01234567))] == [1, 2, 3, 4]


@every_dtype
@every_distribution
def test_edge_words_have_the_cpus_bits(distribution, dtype):
    """Words that chance does not bring up, 0 or -2^31 say, in aligned runs and by themselves."""
    kind, parameters, steps = distribution
    blocks = []
    for word in edge_words():
        filler = 0
        while True:  # the run must end below element 2^63: one block in eight
            block, stream = address_of([word, ~word & (2**32 - 1), -word & (2**32 - 1), filler], seed=99)
            if block < 2**61 - 2:
                break
            filler += 1
        blocks.append((4 * block, stream))

    def add(batch, address):
        for i, (index, stream) in enumerate(blocks):
            for place, start, count in ((0, 0, 8), (17, 1, 1), (20, 2, 3)):
                at = address + (32 * i + place) * itemsize(dtype)
                box = index + start, (count,), (1,), (1,)
                batch.add_region(at, DTYPES[dtype], kind, parameters, 99, stream, steps, *box)

    expected, actual = cpu_and_cuda(32 * len(blocks) * itemsize(dtype), add)
    np.testing.assert_array_equal(actual, expected)


@every_dtype
@every_distribution
@pytest.mark.parametrize("index", [2**34 - 4096, 2**34 - 4100, 2**34 - 4099, 2**63 - 8192 - 16])
def test_large_indices_have_the_cpus_bits(index, distribution, dtype):
    """Across 2^34 the low word of the block number wraps and its high word changes."""
    kind, parameters, steps = distribution
    expected, actual = cpu_and_cuda(
        8192 * itemsize(dtype),
        lambda batch, address: batch.add_region(
            address, DTYPES[dtype], kind, parameters, 5, 6, steps, index, (8192,), (1,), (1,)
        ),
    )
    np.testing.assert_array_equal(actual, expected)


def test_a_host_that_flushes_subnormals_gets_the_same_bits():
    distribution = UNIFORM, (0.0, 3e-39), ()
    expected = row(0, 4096, "float32", distribution)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        actual = row(0, 4096, "float32", distribution)
    finally:
        torch.set_flush_denormal(False)
    assert len(np.unique(expected)) > 1000
    np.testing.assert_array_equal(actual, expected)


# --- geometry ---


@st.composite
def boxes(draw):
    """Arguments of add_region from index_offset on, and the number of elements of memory that they span.

    Dimensions are drawn innermost first, each stride at least what keeps elements apart; memory may be permuted.
    """
    dims = draw(st.integers(1, 5))
    sizes, index_strides, memory_strides = [], [], []
    index_stride, memory_stride = draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (3, 1), (1, 2)]))
    gaps = st.sampled_from([0, 0, 1, 5, 8, 64])
    for d in range(dims):
        sizes.append(draw(st.sampled_from([1, 2, 5, 8, 64, 521]) if d == 0 else st.integers(1, 6)))
        index_strides.append(index_stride)
        memory_strides.append(memory_stride)
        index_stride = index_stride * sizes[-1] + draw(gaps)
        memory_stride = memory_stride * sizes[-1] + draw(gaps)
    if draw(st.booleans()):
        memory_stride = 1
        for d in draw(st.permutations(range(dims))):
            memory_strides[d] = memory_stride
            memory_stride = memory_stride * sizes[d] + draw(gaps)
    offset = draw(st.sampled_from([0, 1, 2, 3, 8, 1001, 2**34 - 40, 2**40 + 6]))
    span = 1 + sum((n - 1) * s for n, s in zip(sizes, memory_strides, strict=True))
    order = draw(st.permutations(range(dims)))
    return (offset, *(tuple(values[d] for d in order) for values in (sizes, index_strides, memory_strides))), span


@settings(derandomize=True, max_examples=300, deadline=None)
@given(boxes(), st.integers(0, 15), st.sampled_from(list(DTYPES)), st.sampled_from(list(DISTRIBUTIONS)))
def test_boxes_of_any_geometry_have_the_cpus_bits_and_touch_nothing_else(box, start, dtype, name):
    arguments, span = box
    kind, parameters, steps = DISTRIBUTIONS[name]
    start *= itemsize(dtype)
    expected, actual = cpu_and_cuda(
        start + span * itemsize(dtype) + 48,
        lambda batch, address: batch.add_region(
            address + start, DTYPES[dtype], kind, parameters, 11, 12, steps, *arguments
        ),
    )
    np.testing.assert_array_equal(actual, expected)


@every_dtype
@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("index", [0, 1, 6, 8])
def test_runs_of_any_alignment_have_the_cpus_bits_and_touch_nothing_else(index, start, dtype):
    for count in (1, 3, 16, 33, 5000):
        box = index, (count,), (1,), (1,)
        expected, actual = cpu_and_cuda(
            (start + count) * itemsize(dtype) + 32,
            lambda batch, address, box=box: batch.add_region(
                address + start * itemsize(dtype), DTYPES[dtype], NORMAL, (0.0, 1.0), 1, 2, (), *box
            ),
        )
        np.testing.assert_array_equal(actual, expected)


def test_rows_of_a_large_window_have_the_cpus_bits():
    rows, columns, width = 1500, 700, 4099  # of a (1500, 4099) tensor: unaligned rows
    expected, actual = cpu_and_cuda(
        rows * columns * 2,
        lambda batch, address: batch.add_region(
            address, DTYPES["bfloat16"], NORMAL, (0.0, 1.0), 1, 2, (), 100, (rows, columns), (width, 1), (columns, 1)
        ),
    )
    np.testing.assert_array_equal(actual, expected)


# (sizes, index strides, memory strides) of boxes whose rows are whole 16-byte units of memory and whole Philox blocks.
ALIGNED_BOXES = {
    "rows": ((5, 64), (80, 1), (72, 1)),
    "short rows": ((300, 8), (4104, 1), (8, 1)),
    "many rows": ((1500, 704), (4096, 1), (704, 1)),
    "planes": ((7, 9, 24), (1000, 40, 1), (24 * 9 * 8, 24, 1)),
    "planes transposed in memory": ((7, 9, 24), (1000, 40, 1), (24, 24 * 7, 1)),
    "four dimensions": ((3, 2, 5, 16), (4000, 1200, 100, 1), (480, 240, 48, 1)),
}


@every_dtype
@every_distribution
@pytest.mark.parametrize("box", ALIGNED_BOXES.values(), ids=ALIGNED_BOXES)
def test_aligned_boxes_have_the_cpus_bits_and_touch_nothing_else(box, distribution, dtype):
    kind, parameters, steps = distribution
    span = 1 + sum((size - 1) * stride for size, stride in zip(box[0], box[2], strict=True))
    expected, actual = cpu_and_cuda(
        (span + 32) * itemsize(dtype),
        lambda batch, address: batch.add_region(
            address + 8 * itemsize(dtype), DTYPES[dtype], kind, parameters, 11, 2**40 + 12, steps, 2**35 + 20, *box
        ),
    )
    np.testing.assert_array_equal(actual, expected)


@every_dtype
@every_distribution
@pytest.mark.parametrize("index", [1, 2, 3])
def test_rows_that_begin_inside_a_block_have_the_cpus_bits_and_touch_nothing_else(index, distribution, dtype):
    """Threads take elements over from their neighbours: rows longer and shorter than a warp's share of slots."""
    kind, parameters, steps = distribution
    for columns, start in ((1000, 0), (261, 5), (9, 3)):
        box = index, (40, columns), (columns + 3, 1), (columns + 1, 1)
        expected, actual = cpu_and_cuda(
            (start + 40 * (columns + 1) + 16) * itemsize(dtype),
            lambda batch, address, box=box, start=start: batch.add_region(
                address + start * itemsize(dtype), DTYPES[dtype], kind, parameters, 11, 12, steps, *box
            ),
        )
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("last", [(MULTIPLY, 1e30, 0.0), (DIVIDE, 0.0, 0.0), (CLAMP, INF, INF), (CLAMP, -INF, -INF)])
def test_steps_that_overflow_have_the_cpus_bits(last):
    steps = (MULTIPLY, 1e30, 0.0), last
    expected, actual = cpu_and_cuda(
        4 * 4096,
        lambda batch, address: batch.add(address, 4096, DTYPES["float32"], NORMAL, (0.0, 1.0), 1, 2, steps),
    )
    np.testing.assert_array_equal(actual, expected)


def test_more_than_2_32_elements():
    count = 2**32 + 4321
    if torch.cuda.mem_get_info()[0] < 2 * count + 2**30:
        pytest.skip("needs 10 GB of device memory")
    tensor = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    batch = native.Batch()
    batch.add(tensor.data_ptr(), count, DTYPES["bfloat16"], NORMAL, (0.0, 1.0), 1, 2)
    batch.run_cuda(0, cuda_stream())
    for index in (0, 2**31 - 500, 2**32 - 500, count - 1000):
        expected = np.empty(1000, np.uint16)
        batch = native.Batch()
        batch.add_region(
            expected.ctypes.data, DTYPES["bfloat16"], NORMAL, (0.0, 1.0), 1, 2, (), index, (1000,), (1,), (1,)
        )
        batch.run_cpu(1)
        actual = tensor[index : index + 1000].view(torch.int16).cpu().numpy().view(np.uint16)
        np.testing.assert_array_equal(actual, expected)
    # Half of 2^32 words are below 0: an unwritten stretch of more than 2^20 elements would show.
    assert abs(int((tensor < 0).sum()) - count // 2) < 10 * count**0.5 / 2


# --- batches, streams, capture, devices ---


def test_a_batch_of_many_fills_has_the_cpus_bits():
    """Thousands of fills of thousands of sizes, aligned and not."""
    random = np.random.default_rng(0)
    fills, at = [], 0
    for stream in range(3000):
        dtype = list(DTYPES)[random.integers(3)]
        count = int(random.integers(1, 3000))
        name = "normal" if stream % 2 else list(DISTRIBUTIONS)[random.integers(len(DISTRIBUTIONS))]
        fills.append((at, count, dtype, DISTRIBUTIONS[name], stream))
        at += (count * itemsize(dtype) + 15) // 16 * 16 + (16 if stream % 7 else 4)

    def add(batch, address):
        for offset, count, dtype, (kind, parameters, steps), stream in fills:
            batch.add(address + offset, count, DTYPES[dtype], kind, parameters, 3, stream, steps)

    expected, actual = cpu_and_cuda(at + 64, add)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fills_of_few_sizes_in_turn_have_the_cpus_bits(dtype):
    """Full tables, whose entries are sorted by size and place in the stream, and more of these than a table holds."""
    kind, parameters, steps = DISTRIBUTIONS["normal"]
    fills, at = [], 0
    for stream in range(4000):
        count = (64, 4096, 512)[stream % 3]
        if 1500 <= stream < 1900 and stream % 4 == 0:
            count = 4 * stream
        index = 1024 * (stream % 5) if stream >= 2500 else 0
        fills.append((at, index, count, stream))
        at += count * itemsize(dtype)

    def add(batch, address):
        for offset, index, count, stream in fills:
            box = index, (count,), (1,), (1,)
            batch.add_region(address + offset, DTYPES[dtype], kind, parameters, 3, stream, steps, *box)

    expected, actual = cpu_and_cuda(at + 64, add)
    np.testing.assert_array_equal(actual, expected)


def normal_batch(tensor, stream=0):
    batch = native.Batch()
    batch.add(tensor.data_ptr(), tensor.numel(), DTYPES["float32"], NORMAL, (0.0, 1.0), 7, stream)
    return batch


def test_an_empty_batch_and_empty_fills_do_nothing():
    native.Batch().run_cuda(0, cuda_stream())
    batch = native.Batch()
    batch.add(0, 0, DTYPES["float32"], NORMAL, (0.0, 1.0), 0, 0)
    batch.run_cuda(0, cuda_stream())


def test_fills_run_in_the_order_of_their_stream():
    tensor = torch.empty(1 << 22, device="cuda")
    expected = torch.empty_like(tensor)
    normal_batch(expected, 1).run_cuda(0, cuda_stream())
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # keeps the side stream busy while the fills are queued
        tensor.fill_(3.0)
        normal_batch(tensor, 0).run_cuda(0, side.cuda_stream)
        normal_batch(tensor, 1).run_cuda(0, side.cuda_stream)
        copy = tensor.clone()
        tensor.zero_()
    side.synchronize()
    assert torch.equal(copy, expected)
    assert not tensor.any()


def test_fills_can_be_captured_in_a_graph():
    tensor = torch.zeros(100_003, device="cuda")
    expected = torch.empty_like(tensor)
    normal_batch(expected).run_cuda(0, cuda_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        normal_batch(tensor).run_cuda(0, cuda_stream())
    assert not tensor.any()
    for _ in range(2):
        tensor.zero_()
        graph.replay()
        assert torch.equal(tensor, expected)


def test_the_first_fill_of_a_process_can_be_captured():
    """The kernel is loaded during the capture then."""
    script = """
        import torch
        from fastinit import native

        tensor = torch.zeros(4096, device="cuda")
        batch = native.Batch()
        batch.add(tensor.data_ptr(), 4096, native.FLOAT32, native.NORMAL, (0.0, 1.0), 0, 0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            batch.run_cuda(0, torch.cuda.current_stream().cuda_stream)
        graph.replay()
        assert 0.9 < tensor.std().item() < 1.1
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_a_device_that_does_not_exist_is_named():
    device = torch.cuda.device_count()
    tensor = torch.zeros(16, device="cuda")
    with pytest.raises(RuntimeError, match=rf"cudaSetDevice failed on CUDA device {device}: .*cudaErrorInvalidDevice"):
        normal_batch(tensor).run_cuda(device, 0)
    assert torch.cuda.current_device() == 0
    normal_batch(tensor).run_cuda(0, cuda_stream())  # nothing is left behind
    assert tensor.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_has_the_same_bits_and_the_current_one_stays():
    tensors = [torch.empty(100_003, device=f"cuda:{i}") for i in range(2)]
    for i, tensor in enumerate(tensors):
        normal_batch(tensor).run_cuda(i, torch.cuda.current_stream(i).cuda_stream)
        assert torch.cuda.current_device() == 0
    assert torch.equal(tensors[0].cpu(), tensors[1].cpu())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "normal", "symmetric truncated normal", "lopsided truncated normal"])
def test_billions_of_words_have_the_cpus_bits(name):
    """2^32 random words, 63 % of all. In float32: the rounding to half that follows does not depend on the word."""
    kind, parameters, steps = DISTRIBUTIONS[name]
    chunk = 1 << 28
    expected = torch.empty(chunk)
    actual = torch.empty(chunk, device="cuda")
    for index in range(0, 2**32, chunk):
        region = DTYPES["float32"], kind, parameters, 21, 22, steps, index, (chunk,), (1,), (1,)
        batch = native.Batch()
        batch.add_region(actual.data_ptr(), *region)
        batch.run_cuda(0, cuda_stream())
        batch = native.Batch()
        batch.add_region(expected.data_ptr(), *region)
        batch.run_cpu(torch.get_num_threads())
        assert torch.equal(expected.view(torch.int32).cuda(), actual.view(torch.int32)), f"elements from {index} on"

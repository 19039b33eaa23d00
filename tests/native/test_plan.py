"""Which kernel the CUDA half fills what with, and in which pieces: csrc/cuda/plan.cpp, compiled here, without a GPU."""

import os
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from fastinit import native

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FLAGS = "-std=c++17 -O1 -ffp-contract=off -Wall -Wextra -Werror".split()

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

FORMS = ("constant", "uniform", "normal", "symmetric", "lopsided", "truncated")
PATHS = (
    "run",
    "rows",
    "affine_rows",
    "planes",
    "affine_planes",
    "any",
    "any_erfinv",
    "plain",
    "general",
    "general_erfinv",
)
# Slots in an entry, entries and sections in a launch, at most: csrc/cuda/launch.h.
SLOTS, ENTRIES, SECTIONS = 1 << 27, 2560, 32
BASE = 1 << 40  # an address that nothing reads
LANES = {native.FLOAT32: 4, native.FLOAT16: 8, native.BFLOAT16: 8}

NORMAL = (native.NORMAL, (0.0, 1.0))
UNIFORM = (native.UNIFORM, (-1.0, 1.0))
CONSTANT = (native.CONSTANT, (0.5,))
INF = float("inf")
TWO_SIGMA = (native.TRUNCATED_NORMAL, (0.0, 0.02, 0, *(97711072.0, 0.9544997215270996, -INF, 2.0) * 2))
LOPSIDED = (
    native.TRUNCATED_NORMAL,
    (0.25, 0.5, -356530598, 681419136.0, 0.8185946345329285, -INF, 1.0, 97711072.0, 0.8185946345329285, -INF, 2.0),
)
ONE_SIDED = (native.TRUNCATED_NORMAL, (0.0, 1.0, -(2**31), *(97711072.0, 0.13590511679649353, 1.0, 2.0) * 2))


class Fill(NamedTuple):
    address: int = BASE
    dtype: int = native.FLOAT32
    values: tuple = NORMAL
    seed: int = 1
    stream: int = 0
    steps: tuple = ()
    index: int = 0
    sizes: tuple = (4096,)
    index_strides: tuple = (1,)
    memory_strides: tuple = (1,)

    def line(self):
        kind, parameters = self.values
        numbers = [self.address, self.dtype, kind, len(parameters), *parameters, self.seed, self.stream]
        numbers += [len(self.steps), *(number for step in self.steps for number in step), self.index, len(self.sizes)]
        return " ".join(map(repr, [*numbers, *self.sizes, *self.index_strides, *self.memory_strides]))


class Launch(NamedTuple):
    form: str
    dtype: int
    path: str
    blocks: int
    threads: int
    block_high: int
    stream_high: int
    phase: int
    tile_slots: int
    outer_dims: int
    entries: list  # of (address, stream, block, slots, size)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """plan(fills): the launches."""
    program = tmp_path_factory.mktemp("plan") / "plans"
    sources = [ROOT / "csrc" / "cuda" / "plan.cpp", ROOT / "tests" / "native" / "plans.cpp"]
    subprocess.run([*shlex.split(COMPILER), *FLAGS, "-I", ROOT / "csrc", *sources, "-o", program], check=True)

    def plan(*fills):
        lines = "".join(f"{fill.line()}\n" for fill in fills)
        done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
        launches = []
        for line in done.stdout.splitlines():
            form, dtype, path, *common, count = map(int, line.split()[:11])
            numbers = list(map(int, line.split()[11:]))
            entries = [tuple(numbers[at : at + 5]) for at in range(0, len(numbers), 5)]
            assert len(entries) == count
            launches.append(Launch(FORMS[form], dtype, PATHS[path], *common, entries))
        return launches

    return plan


ROWS = {"sizes": (64, 256), "index_strides": (1024, 1), "memory_strides": (256, 1)}
BOX = {"sizes": (8, 16, 256), "index_strides": (65536, 1024, 1), "memory_strides": (4096, 256, 1)}
DEEP = {
    "sizes": (2, 8, 16, 256),
    "index_strides": (1 << 20, 65536, 1024, 1),
    "memory_strides": (65536, 4096, 256, 1),
}
HALVE = (native.MULTIPLY, 0.5, 0.0)
ERFINV = (native.ERFINV, 0.0, 0.0)
CLAMP = (native.CLAMP, -1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, ("normal", "run")),
        ({"values": UNIFORM}, ("uniform", "run")),
        ({"values": CONSTANT}, ("constant", "run")),
        ({"values": TWO_SIGMA}, ("symmetric", "run")),
        ({"values": LOPSIDED}, ("lopsided", "run")),
        ({"values": ONE_SIDED}, ("truncated", "rows")),
        ({**ROWS, "values": LOPSIDED}, ("truncated", "rows")),
        ({"steps": (HALVE,)}, ("normal", "affine_rows")),
        ({"steps": (CLAMP,)}, ("normal", "any")),
        ({"values": UNIFORM, "steps": ((native.MULTIPLY, 0.5, 0.0), ERFINV)}, ("uniform", "any_erfinv")),
        (ROWS, ("normal", "rows")),
        ({**ROWS, "values": TWO_SIGMA}, ("truncated", "rows")),
        ({**ROWS, "steps": (HALVE,)}, ("normal", "affine_rows")),
        (BOX, ("normal", "planes")),
        ({**BOX, "steps": (HALVE,)}, ("normal", "affine_planes")),
        ({**BOX, "steps": (CLAMP,)}, ("normal", "any")),
        (DEEP, ("normal", "any")),
        ({"address": BASE + 4}, ("normal", "plain")),
        ({"index": 3}, ("normal", "plain")),
        ({"index": 3, "values": TWO_SIGMA}, ("truncated", "general")),  # the symmetric form is fill_run's alone
        ({"address": BASE + 4, "steps": (CLAMP,)}, ("normal", "general")),
        ({"values": (native.NORMAL, (0.0, 1e38))}, ("normal", "general")),  # may overflow to infinity
        ({"memory_strides": (2,)}, ("normal", "plain")),
        ({**ROWS, "values": CONSTANT}, ("constant", "general")),
    ],
)
def test_the_kernel_for_a_fill(plan, changes, kernel):
    (launch,) = plan(Fill(**changes))
    assert (launch.form, launch.path) == kernel


@pytest.mark.parametrize("dtype", LANES)
def test_an_entry_says_where_a_whole_tensor_lies(plan, dtype):
    (launch,) = plan(Fill(dtype=dtype, stream=(7 << 32) + 5, index=(9 << 34) + 64))
    slots = 4096 // LANES[dtype]
    assert (launch.block_high, launch.stream_high, launch.phase) == (9, 7, 0)
    assert launch.entries == [(BASE, 5, 16, slots, slots)]


@pytest.mark.parametrize("dtype", LANES)
def test_what_does_not_fill_a_slot_at_the_end_is_a_piece_of_its_own(plan, dtype):
    lanes, itemsize = LANES[dtype], 16 // LANES[dtype]
    tail, body = sorted(plan(Fill(dtype=dtype, sizes=(4096 + 3,))), key=lambda launch: launch.path)
    assert (body.path, tail.path) == ("run", "plain")
    assert body.entries == [(BASE, 0, 0, 4096 // lanes, 4096 // lanes)]
    assert tail.entries == [(BASE + 4096 * itemsize, 0, 1024, 2, 3)]


def test_tensors_that_differ_in_address_and_stream_share_launches(plan):
    launches = plan(*(Fill(address=BASE + 16384 * i, stream=i) for i in range(10_000)))
    assert {(each.form, each.path) for each in launches} == {("normal", "run")}
    assert [len(each.entries) for each in launches] == [ENTRIES] * 3 + [10_000 - 3 * ENTRIES]
    entries = [entry for each in launches for entry in each.entries]
    assert entries == [(BASE + 16384 * i, i, 0, 1024, 1024) for i in range(10_000)]


def test_weights_and_biases_of_a_models_layers_share_a_launch(plan):
    layer = ((4096, (4096,)), (1024, (256,)))  # bytes, elements
    fills = [Fill(address=BASE + 65536 * i + 32768 * j, stream=2 * i + j, sizes=sizes)
             for i in range(100) for j, (_, sizes) in enumerate(layer)]  # fmt: skip
    (launch,) = plan(*fills)
    assert Counter(slots for *_, slots, _ in launch.entries) == {1024: 100, 64: 100}
    found = {(address, stream): 4 * slots for address, stream, _, slots, _ in launch.entries}
    assert found == {(fill.address, fill.stream): fill.sizes[0] for fill in fills}


def test_more_sizes_than_sections_make_more_launches(plan):
    fills = [Fill(address=BASE + (i << 20), stream=i, sizes=(4 * (i + 1),)) for i in range(SECTIONS + 1)]
    launches = plan(*fills)
    assert [len(each.entries) for each in launches] == [SECTIONS, 1]
    found = {(entry[0], entry[1], 4 * entry[3]) for each in launches for entry in each.entries}
    assert found == {(fill.address, fill.stream, fill.sizes[0]) for fill in fills}


@pytest.mark.parametrize(
    "difference",
    [{"seed": 2}, {"values": UNIFORM}, {"dtype": native.BFLOAT16}, {"stream": 1 << 32}, {"steps": (CLAMP,)}],
)
def test_fills_that_differ_in_anything_else_do_not_share_one(plan, difference):
    assert len(plan(Fill(), Fill(address=BASE + (1 << 20)))) == 1
    assert len(plan(Fill(), Fill(address=BASE + (1 << 20))._replace(**difference))) == 2


@pytest.mark.parametrize("elements", [4 * SLOTS, 4 * SLOTS + 16, 12 * SLOTS + 64])
def test_pieces_of_a_large_tensor_cover_it_once(plan, elements):
    entries = sorted(entry for launch in plan(Fill(sizes=(elements,))) for entry in launch.entries)
    assert len(entries) == -(-elements // (4 * SLOTS)) or len(entries) & (len(entries) - 1) == 0
    address, block = BASE, 0
    for entry in entries:
        assert entry[:3] == (address, 0, block) and 0 < entry[3] <= SLOTS
        address, block = address + 16 * entry[3], block + entry[3]
    assert address == BASE + 4 * elements


def test_no_aligned_piece_crosses_the_high_word_of_the_block_number(plan):
    # The kernels for aligned pieces count blocks in 32 bits; what crosses has one that carries.
    (launch,) = plan(Fill(index=(1 << 34) - 2048))
    assert launch.path == "general" and launch.block_high == 0
    (launch,) = plan(Fill(index=(1 << 34) - 4096))
    assert launch.path == "run" and launch.block_high == 0
    (launch,) = plan(Fill(index=1 << 34))
    assert launch.path == "run" and launch.block_high == 1


def test_rows_keep_their_arrangement_and_number_of_slots(plan):
    (launch,) = plan(Fill(**ROWS))
    assert launch.outer_dims == 1 and launch.entries == [(BASE, 0, 0, 64 * 64, 64 * 64)]
    (launch,) = plan(Fill(**BOX))
    assert launch.outer_dims == 2 and launch.entries == [(BASE, 0, 0, 8 * 16 * 64, 8 * 16 * 64)]


def test_the_grid_is_a_block_for_each_tile_without_a_table_and_what_runs_at_a_time_with_one(plan):
    (uniform,) = plan(Fill(values=UNIFORM, sizes=(1 << 28,)))
    (normal,) = plan(Fill(sizes=(1 << 28,)))
    assert uniform.blocks == -(-(1 << 26) // uniform.tile_slots)
    assert normal.blocks == 132 * 2 and normal.threads == 1024


def test_a_small_tensor_gets_a_small_block(plan):
    (launch,) = plan(Fill(sizes=(64,)))
    assert launch.threads == 256 and launch.blocks == 1


def test_empty_fills_are_left_out(plan):
    assert plan(Fill(sizes=(0,)), Fill(sizes=(64, 0), index_strides=(1, 1), memory_strides=(1, 1))) == []

"""Known answers of stream v1 on aarch64 (Grace, Graviton): the CPU kernels, cross-compiled, run under qemu-user."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference
from reference import DTYPES, STORAGE

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = "-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror".split()
SOURCES = ("csrc/cpu/fill.cpp", "csrc/cpu/isa.cpp", "csrc/cpu/kernel_portable.cpp", "tests/native/fills.cpp")

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"no {EMULATOR} (Debian: qemu-user)"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Elements by (case, dtype, index): all that the file of known answers lists or has the digest of, from one run."""
    program = tmp_path_factory.mktemp("aarch64") / "fills"
    command = [COMPILER, *FLAGS, "-I", ROOT / "csrc", *(ROOT / each for each in SOURCES), "-static", "-pthread"]
    subprocess.run([*command, "-o", program], check=True)
    asked = [
        (case, dtype, index, count)
        for case in reference.read_known_answers()
        for dtype in DTYPES
        for index, count in [
            *((row["index"], len(row[dtype])) for row in case["elements"]),
            (case["sha256"]["index"], case["sha256"]["count"]),
        ]
    ]
    lines = "".join(f"{line_of(*each)}\n" for each in asked)
    output = subprocess.run([EMULATOR, program], input=lines.encode(), stdout=subprocess.PIPE, check=True).stdout
    found = {}
    for case, dtype, index, count in asked:
        size = count * np.dtype(STORAGE[dtype]).itemsize
        found[case["name"], dtype, index, count], output = output[:size], output[size:]
    assert output == b""
    return found


def line_of(case, dtype, index, count):
    steps = [number for step in case["steps"] for number in step]
    numbers = [DTYPES[dtype], case["kind"], len(case["parameters"]), *case["parameters"], case["seed"], case["stream"]]
    return " ".join(map(repr, [*numbers, len(case["steps"]), *steps, index, count]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", reference.read_known_answers(), ids=lambda case: case["name"])
def test_fills_on_aarch64_have_the_known_answers(case, dtype, answers):
    little_endian = np.dtype(STORAGE[dtype]).newbyteorder("<")
    for row in case["elements"]:
        got = answers[case["name"], dtype, row["index"], len(row[dtype])]
        np.testing.assert_array_equal(np.frombuffer(got, little_endian), row[dtype])
    digest = case["sha256"]
    got = answers[case["name"], dtype, digest["index"], digest["count"]]
    assert hashlib.sha256(got).hexdigest() == digest[dtype]

"""The vector kernels' arithmetic over every input there is: a C++ program, compiled here for each instruction set, and
the one step that is more than an operation.

Minutes, so not part of the default suite.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastinit import native

TESTS = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FLAGS = {  # as in CMakeLists.txt
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("isa", [isa for isa in native.cpu_isas() if isa in FLAGS])
def test_transforms_and_roundings_equal_the_scalar_ones_for_every_input(isa, tmp_path):
    program = tmp_path / "transforms"
    subprocess.run(
        [*shlex.split(COMPILER), "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
         "-w", *FLAGS[isa], f"-I{TESTS.parent / 'csrc'}", f'-DSIMD_HEADER="cpu/simd_{isa}.h"',
         f"-DSIMD={isa.capitalize()}", str(TESTS / "native" / "transforms.cpp"), "-pthread", "-o", str(program)],
        check=True,
    )  # fmt: skip
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout == "0 differences\n"


# SHA-256 of erfinv of all 2^32 bit patterns, block by block.
ERFINV = """
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastinit import native


def digest(block):
    x = np.arange(block << 22, (block + 1) << 22, dtype=np.uint64).astype(np.uint32)
    native.erfinv(x.ctypes.data, x.size)
    return hashlib.sha256(x.astype("<u4").tobytes()).digest()


with ThreadPoolExecutor(os.cpu_count()) as pool:
    print(native.cpu_isa(), hashlib.sha256(b"".join(pool.map(digest, range(1 << 10)))).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", native.cpu_isas())
def test_erfinv_has_the_same_bits_on_every_instruction_set_for_every_input(isa):
    environment = os.environ | {"FASTINIT_CPU_ISA": isa}
    command = [sys.executable, "-c", ERFINV]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == f"{isa} f6c35db13a2fb18ba794315da747629990b41d0f35ccddb08db161a3447fbe68\n"

"""The vector kernels' arithmetic over every input there is: a C++ program, compiled here for each instruction set.

Minutes, so not part of the default suite.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fastinit import native

HERE = Path(__file__).resolve().parent
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
         "-w", *FLAGS[isa], f"-I{HERE.parent / 'csrc'}", f'-DSIMD_HEADER="cpu/simd_{isa}.h"',
         f"-DSIMD={isa.capitalize()}", str(HERE / "transforms.cpp"), "-pthread", "-o", str(program)],
        check=True,
    )  # fmt: skip
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout == "0 differences\n"

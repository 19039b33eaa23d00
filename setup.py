"""Builds the native module fastinit._native by driving CMakeLists.txt; pyproject.toml has all else about the package.

Environment variables decide about the CUDA half of the module:

    FASTINIT_CUDA        unset: built if a CUDA compiler is found.  1: built, its absence is an error.  0: left out.
    FASTINIT_CUDA_ARCHS  compute capabilities to compile for, as in "90" or "80;90". Unset: all of 80 86 89 90 100 120
                         that the compiler knows. The highest one is also embedded as PTX, for GPUs newer than it.
    CUDACXX, CUDA_HOME   where the compiler is, if nvcc on PATH is not the one to use.

The decision is printed (`pip install -v .` shows it).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
OLDEST_ARCHITECTURE = 80  # the first with bfloat16
OLDEST_NVCC = (11, 8)  # the first that knows Hopper, and has __grid_constant__
OLDEST = ".".join(map(str, OLDEST_NVCC))


class BuildError(Exception):
    """The build cannot go on as asked. The message names the variable or tool, its value and the remedy."""


def wants_cuda(environ):
    """FASTINIT_CUDA as True (must), False (must not) or None (if a compiler is found)."""
    value = environ.get("FASTINIT_CUDA", "")
    if value not in ("", "0", "1"):
        raise BuildError(
            f"FASTINIT_CUDA={value!r} is not understood: use 1 (build the CUDA half, or fail), 0 (leave it out), "
            "or leave it unset (build it if a CUDA compiler is found)"
        )
    return {"": None, "0": False, "1": True}[value]


def find_nvcc(environ):
    """The CUDA compiler that the environment names, or that is on PATH or in /usr/local/cuda; None if there is none.

    A compiler that CUDACXX or CUDA_HOME names and that is not there is an error rather than a reason to look elsewhere.
    """
    path = environ.get("PATH", os.defpath)
    for variable, candidate in (
        ("CUDACXX", environ.get("CUDACXX")),
        ("CUDA_HOME", environ.get("CUDA_HOME") and os.path.join(environ["CUDA_HOME"], "bin", "nvcc")),
    ):
        if candidate:
            found = shutil.which(candidate, path=path)
            if found is None:
                raise BuildError(
                    f"{variable}={environ[variable]!r}, but {candidate!r} is not an executable: "
                    f"correct {variable} or unset it"
                )
            return os.path.abspath(found)
    return shutil.which("nvcc", path=path) or shutil.which("nvcc", path="/usr/local/cuda/bin")


def known_architectures(listing):
    """The compute capabilities in the output of `nvcc --list-gpu-arch`, ascending."""
    return sorted({int(number) for number in re.findall(r"^compute_(\d+)$", listing, re.MULTILINE)})


def choose_architectures(environ, known):
    """The compute capabilities to compile for, ascending, out of those the compiler knows."""
    value = environ.get("FASTINIT_CUDA_ARCHS", "")
    if not value:
        chosen = [arch for arch in ARCHITECTURES if arch in known]
        if not chosen:
            raise BuildError(f"nvcc knows none of {ARCHITECTURES}, only {known}: install a newer CUDA toolkit")
        return chosen
    if not re.fullmatch(r"\d+(;\d+)*;?", value):
        raise BuildError(
            f"FASTINIT_CUDA_ARCHS={value!r} is not understood: give compute capabilities without the dot, separated by "
            'semicolons, such as "90" or "80;90"'
        )
    usable = [arch for arch in known if arch >= OLDEST_ARCHITECTURE]
    chosen = sorted({int(arch) for arch in value.split(";") if arch})
    unusable = [arch for arch in chosen if arch not in usable]
    if unusable:
        raise BuildError(
            f"FASTINIT_CUDA_ARCHS={value!r} asks for {unusable}, which this nvcc or fastinit does not support; "
            f"choose from {usable}"
        )
    return chosen


def run_nvcc(nvcc, *arguments):
    """The output of nvcc; BuildError with what it printed if it fails."""
    try:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, errors="replace", timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise broken_nvcc(nvcc, str(error)) from error
    if done.returncode:
        raise broken_nvcc(nvcc, (done.stderr + done.stdout).strip())
    return done.stdout


def broken_nvcc(nvcc, reason):
    indented = reason[-2000:].replace("\n", "\n    ")
    return BuildError(
        f"The CUDA compiler {nvcc} was found but does not work:\n\n    {indented}\n\n"
        "Repair the CUDA toolkit (a common cause is a host compiler that this nvcc is too old for: choose another with "
        "NVCC_CCBIN or CUDAHOSTCXX), point CUDACXX at a working nvcc, or set FASTINIT_CUDA=0 to build without CUDA."
    )


def check_nvcc(nvcc):
    """The architectures nvcc knows, once it has proved to be new enough and able to compile with its host compiler."""
    version = re.search(r"release (\d+)\.(\d+)", run_nvcc(nvcc, "--version"))
    if version and tuple(map(int, version.groups())) < OLDEST_NVCC:
        raise broken_nvcc(nvcc, f"it is CUDA {version[1]}.{version[2]}, fastinit needs {OLDEST} or newer")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cu")
        source.write_text("#include <cuda_runtime.h>\n#include <vector>\n__global__ void probe(int* p) { *p = 1; }\n")
        host = [f"-ccbin={os.environ['CUDAHOSTCXX']}"] if os.environ.get("CUDAHOSTCXX") else []
        run_nvcc(nvcc, "-std=c++17", *host, "-c", str(source), "-o", str(Path(scratch, "probe.o")))
    return known_architectures(run_nvcc(nvcc, "--list-gpu-arch"))


def decide_cuda(environ, find=find_nvcc, check=check_nvcc):
    """(nvcc, architectures), or (None, reason) if the CUDA half is left out."""
    wanted = wants_cuda(environ)
    if wanted is False:
        return None, "FASTINIT_CUDA=0"
    nvcc = find(environ)
    if nvcc is None:
        if wanted:
            raise BuildError(
                "FASTINIT_CUDA=1, but no CUDA compiler was found: CUDACXX and CUDA_HOME are not set, and nvcc is "
                f"neither on PATH nor in /usr/local/cuda. Install the CUDA toolkit, {OLDEST} or newer (NVIDIA's "
                "package cuda-toolkit, or conda's cuda-nvcc and cuda-cudart-dev), and put nvcc on PATH, or unset "
                "FASTINIT_CUDA to build without CUDA"
            )
        return None, "no CUDA compiler found (looked at CUDACXX, CUDA_HOME, PATH and /usr/local/cuda)"
    return nvcc, choose_architectures(environ, check(nvcc))


def build_tool(name):
    """Path of cmake or ninja: from the Python package of that name if there is one, else from PATH."""
    try:
        module = __import__(name)
        directory = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
    except ImportError:
        directory = None
    found = (directory and shutil.which(name, path=directory)) or shutil.which(name)
    if found is None:
        raise BuildError(f"{name} was not found: `pip install {name}`, or build with build isolation, which brings it")
    return found


def check_python_headers():
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise BuildError(
            f"Python.h is not in {sysconfig.get_path('include')}: install the development headers of this Python "
            f"{sys.version_info[0]}.{sys.version_info[1]} (Debian and Ubuntu: python3-dev; Fedora: python3-devel)"
        )


class CMakeBuild(build_ext):
    """Configures and builds the CMake project, its module landing where setuptools expects the extension."""

    def build_extension(self, ext):
        import pybind11

        check_python_headers()
        nvcc, choice = decide_cuda(os.environ)
        if nvcc:
            print(f"fastinit: building the CUDA half with {nvcc} for {choice}, PTX of {choice[-1]}", flush=True)
        else:
            print(f"fastinit: building without CUDA: {choice}", flush=True)

        cmake = build_tool("cmake")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [cmake, "-S", str(Path(__file__).resolve().parent), "-B", str(build), "-G", "Ninja",
                     f"-DCMAKE_MAKE_PROGRAM={build_tool('ninja')}",
                     f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                     f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                     f"-DPython_EXECUTABLE={sys.executable}",
                     f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                     f"-DFASTINIT_CUDA={'ON' if nvcc else 'OFF'}"]  # fmt: skip
        if nvcc:
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DFASTINIT_CUDA_ARCHS={';'.join(map(str, choice))}"]
        # A cache made with other settings is discarded: pip's isolated environments come and go, and what remembers the
        # last one's paths breaks the next build. With the same settings only what changed is compiled.
        settings, record = "\n".join(configure), build / "configured-with.txt"
        fresh = [] if record.is_file() and record.read_text() == settings else ["--fresh"]
        record.unlink(missing_ok=True)
        self.run_or_fail(configure + fresh)
        record.write_text(settings)
        self.run_or_fail([cmake, "--build", str(build), "--target", "_native"])

    @staticmethod
    def run_or_fail(command):
        if subprocess.run(command).returncode:
            raise BuildError("the native module did not build; the reason is above (with pip: `pip install -v .`)")


def index_page(readme):
    """The README as a package index shows it, where the repository's files are not: without comments, and without the
    links to files and their pictures. docs/ is in the source distribution."""
    page = re.sub(r"<!--.*?-->\n*", "", readme, flags=re.DOTALL)
    page = re.sub(r"^!\[[^\]]*\]\((?!https:)[^)]*\)\n+", "", page, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\((?!https:)([^)]*)\)", r"\1", page)


def main():
    readme = Path(__file__).resolve().parent / "README.md"
    try:
        setup(
            ext_modules=[Extension("fastinit._native", sources=[])],
            cmdclass={"build_ext": CMakeBuild},
            long_description=index_page(readme.read_text(encoding="utf-8")),
            long_description_content_type="text/markdown",
        )
    except BuildError as error:
        raise SystemExit(f"\nfastinit: {error}\n") from None


if __name__ == "__main__":
    main()

"""Build what people install, and try it as they do: the source distribution, from it a wheel for each Python, and each
wheel in an environment of its own where no compiler is found.

    python tools/wheels.py                 # all Pythons of this machine that fastinit supports
    python tools/wheels.py python3.12      # these alone

Writes dist/. A wheel must have the package and nothing else in it, be named after its Python, and run on other Linux
systems than this one, without a CUDA toolkit (auditwheel). Needs tools/requirements.txt, as `make wheels` has it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pythons

ROOT = pythons.ROOT
DIST = ROOT / "dist"
SCRATCH = ROOT / "build" / "wheels"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="default: all of this machine")
    chosen = parser.parse_args().pythons
    interpreters = {pythons.version_of(each): each for each in chosen} if chosen else newest_of_each_minor()
    if None in interpreters:
        sys.exit(f"{interpreters[None]} is no Python that runs here and has venv and ensurepip")
    for folder in (DIST, SCRATCH):
        shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--quiet", "--sdist", "--outdir", DIST, ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    for version, interpreter in interpreters.items():
        environment = SCRATCH / version
        run(interpreter, "-m", "venv", environment)
        try_wheel(environment, check(build(environment, sdist), sdist, version))
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    print("\nBuilt and tried:", *(path.name for path in sorted(DIST.iterdir())), sep="\n  ")
    if not chosen and pythons.missing():
        print("No wheel for lack of Python", ", ".join(pythons.missing()))


def newest_of_each_minor():
    installed = pythons.installed()
    newest = {pythons.minor(version): version for version in installed}
    return {version: installed[version] for version in newest.values()}


def build(environment, sdist):
    """The wheel of a source distribution as auditwheel has made it fit for other systems."""
    raw = environment / "raw"
    run(environment / "bin/python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, sdist)
    (built,) = raw.glob("*.whl")
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", environment / "repaired", built)
    (repaired,) = (environment / "repaired").glob("*.whl")
    return Path(shutil.move(repaired, DIST))


def check(wheel, sdist, version):
    """The wheel, once its name and contents have proved right."""
    tag = "cp" + pythons.minor(version).replace(".", "")
    if not re.fullmatch(rf"torch_fastinit-[\w.]+-{tag}-{tag}-manylinux_2_\d+_\w+\.whl", wheel.name):
        sys.exit(f"{wheel.name}: the tags should be {tag}-{tag}-manylinux_2_*")
    with tarfile.open(sdist) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
    package = {name for name in inside if re.fullmatch(r"fastinit/.*\.(py|pyi|typed)", name)}
    files = [name for name in zipfile.ZipFile(wheel).namelist() if not re.search(r"/$|\.dist-info/", name)]
    native = [name for name in files if re.fullmatch(r"fastinit/_native\.[\w-]+\.so", name)]
    if len(native) != 1 or {*files} != package | {*native}:
        sys.exit(f"{wheel.name}: these files differ from the package's: {sorted({*files} ^ package)}")
    return wheel


def try_wheel(environment, wheel):
    """doctor, with nothing on PATH and nothing of this checkout."""
    python = environment / "bin/python"
    run(python, "-m", "pip", "install", "--quiet", "--requirement", ROOT / "requirements-dev.txt", wheel)
    bare = {"HOME": os.environ.get("HOME", "/"), "PATH": "/nonexistent"}
    run(python, "-I", "-m", "fastinit", "doctor", cwd=environment, env=bare)


def run(*command, **options):
    print("+", *command, flush=True)
    if subprocess.run(command, **options).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


if __name__ == "__main__":
    main()

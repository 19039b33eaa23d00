"""Run the core of the test suite with every Python of this machine that fastinit supports, and torch from the oldest to
the newest, each with a Python of its time.

    python tools/test_versions.py                    # all
    python tools/test_versions.py 3.10 3.13.0        # these alone
    python tools/test_versions.py 3.10 -- -x -k normal

Environments stay in build/versions, for the next time. FASTINIT_CUDA=0 saves the building of the CUDA half for each
Python.
"""

import argparse
import subprocess
import sys

import pythons

ROOT = pythons.ROOT
# By minor version of Python. 3.11 has what requirements-dev.txt pins.
TORCH = {"3.10": "torch==2.6.0", "3.12": "torch==2.9.1", "3.13": "torch==2.14.1", "3.14": "torch==2.14.1"}
# Not in it: tests of frameworks, which have fewer Pythons and torches, of documents and of statistics.
CORE = (
    "arguments cases_arguments cases_autograd cases_below cases_forward cases_guest cases_inner_seeds cases_memory "
    "cases_operands cases_random cases_threads contract empty fast_path faults fills golden native programs torch_init "
    "torch_modules windows"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="of Python, as 3.10 or 3.10.13 (default: all)")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    chosen, pytest = parser.parse_args(sys.argv[1:split]).versions, sys.argv[split + 1 :]
    results = {}
    for version, interpreter in pythons.installed().items():
        if not chosen or {version, pythons.minor(version)} & {*chosen}:
            results[version] = test(version, interpreter, pytest)
    absent = pythons.missing() if not chosen else [each for each in chosen if not matches(each, results)]
    print()
    for version, passed in results.items():
        print(f"Python {version}, {requirement(version)}: {'passed' if passed else 'FAILED'}")
    for version in absent:
        print(f"Python {version}: not installed, not tested")
    return 0 if results and all(results.values()) else 1


def matches(chosen, versions):
    return any(chosen in (version, pythons.minor(version)) for version in versions)


def requirement(version):
    pinned = (ROOT / "requirements-dev.txt").read_text().split()
    return TORCH.get(pythons.minor(version)) or next(each for each in pinned if each.startswith("torch=="))


def test(version, interpreter, pytest):
    """Whether the core tests pass there."""
    environment = ROOT / "build" / "versions" / version
    python = environment / "bin/python"
    tests = [next(ROOT.glob(f"tests/*/test_{name}.py")) for name in CORE.split()]
    return (
        (python.exists() or succeeds(interpreter, "-m", "venv", environment))
        and succeeds(python, "-m", "pip", "install", "--quiet", requirement(version), "--editable", ".[test-core]")
        and succeeds(python, "-m", "pytest", "-p", "no:cacheprovider", *tests, *pytest)
    )


def succeeds(*command):
    print("+", *command, flush=True)
    return subprocess.run(command, cwd=ROOT).returncode == 0


if __name__ == "__main__":
    sys.exit(main())

"""The package as people install it: what importing loads, what is shipped, and how setup.py decides about CUDA."""

import doctest
import importlib.util
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastinit
from fastinit import native

ROOT = Path(__file__).parents[2]


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT, **options)


def test_import_loads_torch_and_no_other_heavy_package():
    program = (
        "import sys, torch\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import fastinit\n"
        "after = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(after - before - sys.stdlib_module_names))"
    )
    assert python("-c", program).stdout.strip() == "['fastinit']"


def test_modules_for_frameworks_load_when_they_are_named():
    program = (
        "import sys, fastinit\n"
        "names = ['accelerate', 'deepspeed', 'lightning']\n"
        "print([f'fastinit.{name}' in sys.modules for name in names])\n"
        "print([getattr(fastinit, name).__name__ for name in names])\n"
        "from fastinit import lightning; print(lightning.enable.__name__, hasattr(fastinit, 'transformers'))"
    )
    lines = python("-c", program).stdout.splitlines()
    assert lines[0] == "[False, False, False]"
    assert lines[1] == "['fastinit.accelerate', 'fastinit.deepspeed', 'fastinit.lightning']"
    assert lines[2] == "enable False"


def test_dir_shows_the_public_names_alone():
    assert dir(fastinit) == sorted(fastinit.__all__)


def test_other_modules_say_that_they_are_private():
    public = {"__init__", "__main__", "_version", "accelerate", "deepspeed", "lightning"}
    package = Path(fastinit.__file__).parent
    private = {path.stem for path in package.glob("*.py")} - public | {"cli", "record"}
    documents = {name: importlib.import_module(f"fastinit.{name}").__doc__ for name in private}
    assert [name for name, document in documents.items() if "\n\nPrivate: " not in document] == []


def test_import_starts_neither_cuda_nor_threads():
    program = (
        "import threading, torch, fastinit\n"
        "print(torch.cuda.is_initialized(), threading.active_count(), fastinit.native.build_info()['compiler'] != '')"
    )
    assert python("-c", program).stdout.split() == ["False", "1", "True"]


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_import_and_a_block_ask_nothing_of_other_systems_that_they_lack(system):
    program = (
        "import sys, torch\n"
        f"sys.platform = {system!r}\n"
        "if sys.platform == 'win32': sys.modules['resource'] = None\n"
        "import fastinit, fastinit.__main__\n"
        "with fastinit.on('cpu', 'bf16') as block: model = torch.nn.Linear(2, 2)\n"
        "print(model.weight.dtype, block.peak_memory < 2**34)"
    )
    assert python("-c", program).stdout.split() == ["torch.bfloat16", "True"]


def test_version_is_written_in_one_place_and_well_formed():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", fastinit.__version__)
    assert fastinit.__version__ not in (ROOT / "pyproject.toml").read_text() + (ROOT / "setup.py").read_text()


def test_public_names_exist_and_are_documented():
    for name in fastinit.__all__:
        assert name == "__version__" or getattr(fastinit, name).__doc__, name


def test_build_has_cuda_where_it_was_demanded():
    info = native.build_info()
    if os.environ.get("FASTINIT_CUDA") == "1":
        assert info["cuda"] and info["cuda_architectures"]
    assert info["cuda"] == (info["cuda_version"] is not None) == bool(info["cuda_architectures"])


def test_native_module_links_no_torch():
    loaded = Path(sys.modules["fastinit._native"].__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in loaded


def test_the_command_fastinit_is_the_module_that_python_runs():
    scripts = re.search(r"\[project.scripts\]\nfastinit = \"([\w.]+):(\w+)\"\n", (ROOT / "pyproject.toml").read_text())
    assert callable(getattr(importlib.import_module(scripts[1]), scripts[2]))


def test_built_package_carries_types_and_commands(tmp_path):
    python(
        "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")
    )
    shipped = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "fastinit").rglob("*.py")}
    assert shipped == source | {"fastinit/py.typed", "fastinit/_native.pyi"}


# The decisions of setup.py


@pytest.fixture(scope="module")
def setup():
    pytest.importorskip("setuptools")
    specification = importlib.util.spec_from_file_location("fastinit_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_on_an_index_links_to_no_file_that_is_not_there(setup):
    page = setup.index_page((ROOT / "README.md").read_text())
    assert re.findall(r"\]\((?!https:)[^)]*\)|<!--", page) == []
    assert "What is guaranteed, with the tests of each promise" in page and "pip install ." in page


def test_scripts_that_pages_run_exist():
    folders = (".", "docs", "examples", "benchmarks", "benchmarks/results")
    pages = [page for folder in folders for page in (ROOT / folder).glob("*.md")]
    named = {(page.name, script) for page in pages for script in re.findall(r"python ([\w/]+\.py)", page.read_text())}
    assert named and [each for each in named if not (ROOT / each[1]).is_file()] == []


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(("value", "wanted"), [(None, None), ("", None), ("0", False), ("1", True)])
def test_fastinit_cuda_says_whether_cuda_is_wanted(setup, value, wanted):
    assert setup.wants_cuda({} if value is None else {"FASTINIT_CUDA": value}) is wanted


@pytest.mark.parametrize("value", ["2", "ON", "true", " 1"])
def test_other_values_of_fastinit_cuda_are_refused(setup, value):
    with pytest.raises(setup.BuildError, match=f"FASTINIT_CUDA={re.escape(repr(value))}.*use 1"):
        setup.wants_cuda({"FASTINIT_CUDA": value})


def test_architectures_are_read_from_the_compiler(setup):
    assert setup.known_architectures("compute_90\ncompute_75\ncompute_120\nsm_80\n") == [75, 90, 120]


def test_all_supported_architectures_that_the_compiler_knows_are_built(setup):
    assert setup.choose_architectures({}, [75, 80, 86, 87, 89, 90, 100, 103, 120]) == [80, 86, 89, 90, 100, 120]
    assert setup.choose_architectures({}, [75, 80, 86, 89, 90]) == [80, 86, 89, 90]
    with pytest.raises(setup.BuildError, match="newer CUDA toolkit"):
        setup.choose_architectures({}, [60, 70, 75])


@pytest.mark.parametrize(("value", "chosen"), [("90", [90]), ("90;80", [80, 90]), ("87;", [87]), ("", [80, 86, 90])])
def test_fastinit_cuda_archs_narrows(setup, value, chosen):
    assert setup.choose_architectures({"FASTINIT_CUDA_ARCHS": value}, [75, 80, 86, 87, 90]) == chosen


@pytest.mark.parametrize("value", ["sm_90", "9.0", "80,90", "native", ";", "80;;90"])
def test_malformed_architectures_are_refused(setup, value):
    with pytest.raises(setup.BuildError, match=f"FASTINIT_CUDA_ARCHS={re.escape(repr(value))} is not understood"):
        setup.choose_architectures({"FASTINIT_CUDA_ARCHS": value}, [80, 90])


@pytest.mark.parametrize("value", ["75", "80;121"])
def test_unsupported_architectures_are_refused_with_those_that_work(setup, value):
    with pytest.raises(setup.BuildError, match=r"FASTINIT_CUDA_ARCHS=.*choose from \[80, 90\]"):
        setup.choose_architectures({"FASTINIT_CUDA_ARCHS": value}, [75, 80, 90])


def test_compiler_is_looked_for_in_cudacxx_then_cuda_home_then_path(setup, tmp_path):
    named, home, on_path = (
        executable(tmp_path / place, "exit 0\n") for place in ("named/mynvcc", "home/bin/nvcc", "path/nvcc")
    )
    environ = {"PATH": str(on_path.parent)}
    assert setup.find_nvcc(environ) == str(on_path)
    environ["CUDA_HOME"] = str(tmp_path / "home")
    assert setup.find_nvcc(environ) == str(home)
    environ["CUDACXX"] = str(named)
    assert setup.find_nvcc(environ) == str(named)


def test_compiler_named_but_absent_is_an_error(setup, tmp_path):
    for variable in ("CUDACXX", "CUDA_HOME"):
        with pytest.raises(setup.BuildError, match=f"{variable}=.*correct {variable} or unset it"):
            setup.find_nvcc({"PATH": str(tmp_path), variable: str(tmp_path / "nowhere")})


def test_missing_compiler_leaves_cuda_out_unless_demanded(setup):
    def nothing(environ):
        return None

    nvcc, reason = setup.decide_cuda({}, find=nothing)
    assert nvcc is None and "no CUDA compiler" in reason
    with pytest.raises(setup.BuildError, match=r"FASTINIT_CUDA=1.*Install the CUDA toolkit"):
        setup.decide_cuda({"FASTINIT_CUDA": "1"}, find=nothing)


def test_forbidden_cuda_does_not_even_look_for_a_compiler(setup):
    def unexpected(environ):
        raise AssertionError("looked for a compiler")

    assert setup.decide_cuda({"FASTINIT_CUDA": "0"}, find=unexpected) == (None, "FASTINIT_CUDA=0")


def test_compiler_that_cannot_compile_is_reported_with_its_own_words(setup, tmp_path):
    nvcc = executable(
        tmp_path / "nvcc",
        'case "$1" in --version) echo "Cuda compilation tools, release 13.0, V13.0.88";;\n'
        "*) echo 'host compiler too new' >&2; exit 1;; esac\n",
    )
    with pytest.raises(setup.BuildError, match=r"(?s)does not work.*host compiler too new.*FASTINIT_CUDA=0"):
        setup.decide_cuda({"CUDACXX": str(nvcc)})


def test_compiler_that_is_too_old_is_refused(setup, tmp_path):
    nvcc = executable(tmp_path / "nvcc", 'echo "Cuda compilation tools, release 11.2, V11.2.67"\n')
    with pytest.raises(setup.BuildError, match=r"it is CUDA 11\.2, fastinit needs 11\.8 or newer"):
        setup.decide_cuda({"CUDACXX": str(nvcc)})


def test_this_compiler_passes_its_own_check(setup):
    nvcc = setup.find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("no CUDA compiler on this machine")
    assert set(setup.check_nvcc(nvcc)) & set(setup.ARCHITECTURES)


@pytest.mark.parametrize(
    "module",
    [
        *("checkpoint.api", "checkpoint.loading", "context", "fills", "layout"),
        *("materialization", "recipe", "runs", "sharding"),
    ],
)
def test_the_examples_in_docstrings_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"fastinit": fastinit, "torch": torch}
    result = doctest.testmod(importlib.import_module(f"fastinit.{module}"), extraglobs=names)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(("system", "missing"), [("darwin", []), ("win32", ["resource", "fcntl", "pwd", "grp"])])
def test_models_are_created_without_what_other_systems_lack(system, missing):
    # What fastinit asks of the system; torch is another matter, and is imported before.
    program = (
        "import sys, torch, torch.distributed\n"
        f"sys.platform = {system!r}\n"
        f"sys.modules.update(dict.fromkeys({missing!r}))\n"
        "import fastinit\n"
        "with fastinit.on('cpu', 'bf16', seed=0) as init:\n"
        "    model = torch.nn.Linear(4, 4)\n"
        "print(init.parameters, init.peak_memory >= 0, model.weight.dtype)\n"
        "from fastinit.__main__ import main\n"
        "sys.exit(main(['doctor']))"
    )
    assert python("-c", program).stdout.splitlines()[0] == "20 True torch.bfloat16"

# make demo      the main job on whatever this machine has
# make test      the test suite (also on a machine without a GPU)
# make test-versions  the core of it with each Python of this machine, from the oldest torch to the newest; ARGS="3.10 3.12" for these
# make test-libraries  models of timm, diffusers, peft, PyG and many more, which it installs (3 GB); writes docs/conformance.md, too
# make bench     all of benchmarks/, with tables and a picture; ARGS="--quick -k fills"
# make zoo       every architecture of transformers and module of torch.nn, by torch and by fastinit; writes docs/conformance.md
# make fuzz      20,000 random programs against an eager reference; ARGS="--programs 1000 --seed 7"
# make sanitize  the native module under AddressSanitizer and UBSan: its own tests, windows, the recorder, random programs
# make coverage  the test suite, and which lines of the package it runs: at least 95 % of them
# make lint      ruff, mypy, clang-format and cppcheck; `make format` rewrites what ruff and clang-format would
# make docs      the site of the documentation, in build/site/index.html; links that lead nowhere are errors
# make wheels    sdist, and a wheel for each Python of this machine, each tried where there is no compiler; ARGS="python3.12" for one
#
# All make a virtual environment in the checkout first, and need Python >= 3.10 with its headers and a C++ compiler: cmake, ninja
# and all the rest come from pip. The CUDA half is built if nvcc is found (setup.py tells how to steer that).

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILD_TOOLS := $(VENV)/.build-tools
TOOLS := $(VENV)/.tools
BUILD_INPUTS := setup.py pyproject.toml requirements-dev.txt CMakeLists.txt $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc tests -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")

.PHONY: demo test test-slow test-libraries test-versions zoo docs fuzz sanitize coverage wheels bench build lint format clean

demo: $(INSTALLED)
	$(PY) -m fastinit demo $(ARGS)

test: $(INSTALLED)
	$(PY) -m pytest $(ARGS)

test-slow: $(INSTALLED)
	$(PY) -m pytest -m slow $(ARGS)

# The libraries in an environment of their own. One asks for versions that the others cannot have.
LIBRARIES := build/libraries
test-libraries: $(LIBRARIES)/.installed
	$(LIBRARIES)/bin/python -m pytest -m libraries --junit-xml=$(LIBRARIES)/results.xml tests/zoo/test_libraries.py $(ARGS)
	$(if $(ARGS),,$(LIBRARIES)/bin/python tests/zoo/libraries/page.py $(LIBRARIES)/results.xml)

$(LIBRARIES)/.installed: $(BUILD_INPUTS) tests/zoo/libraries/requirements.txt tests/zoo/libraries/requirements-alone.txt | $(PY)
	$(PY) -m venv $(LIBRARIES)
	$(LIBRARIES)/bin/python -m pip install -r requirements-dev.txt -e ".[test-core]"
	$(LIBRARIES)/bin/python -m pip install -r requirements-dev.txt -r tests/zoo/libraries/requirements.txt
	$(LIBRARIES)/bin/python -m pip install --no-deps -r tests/zoo/libraries/requirements-alone.txt
	# What torchaudio was built with needs CUDA; without that file it does what needs no operator of its own.
	rm -rf $(LIBRARIES)/lib/python*/site-packages/torchaudio/lib
	touch $@

fuzz: $(INSTALLED)
	PYTHONPATH=tests/record $(PY) tests/support/fuzz.py $(ARGS)

zoo: $(INSTALLED)
	$(PY) tests/zoo $(ARGS)

# Python itself is not built with the sanitizers, hence the preloading, and what it keeps to the end counts as a leak.
SANITIZED := build/sanitized
sanitize: $(INSTALLED) $(BUILD_TOOLS)
	CXXFLAGS="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" FASTINIT_CUDA=0 \
	    $(PY) setup.py -q build --debug --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$(for each in asan ubsan stdc++; do printf '%s ' "$$($(CXX) -print-file-name=lib$$each.so)"; done)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/lib $(VENV)/bin/pytest -p no:cacheprovider \
	    tests/native/test_native.py tests/dist/test_windows.py tests/record/test_fast_path.py tests/record/test_programs.py $(ARGS)

coverage: $(INSTALLED)
	$(PY) -m pip install --quiet -e ".[coverage]"
	$(PY) -m pytest --cov --cov-report=term-missing:skip-covered --cov-fail-under=95 $(ARGS)

wheels: $(TOOLS)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) tools/wheels.py $(ARGS)

test-versions:
	$(PYTHON) tools/test_versions.py $(ARGS)

bench: $(INSTALLED)
	$(PY) -m pip install --quiet -e ".[bench]"
	mkdir -p bench-out
	$(PY) -m pytest benchmarks --benchmark-json bench-out/benchmarks.json --benchmark-quiet $(ARGS)
	$(PY) benchmarks/report.py bench-out/benchmarks.json

# The native module again, in place, only what changed: for work on csrc/.
build: $(BUILD_TOOLS)
	$(PY) setup.py build_ext --inplace

lint: $(INSTALLED) $(TOOLS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(VENV)/bin/cppcheck --quiet --error-exitcode=1 --std=c++17 --language=c++ --enable=warning,performance,portability \
	    --inline-suppr --suppress=missingIncludeSystem --suppress=uninitMemberVarNoCtor -I csrc csrc

# The pages where they lie in the repository, so that their links hold in both forms. Without --quiet, which hides warnings from `strict`, too.
docs: $(TOOLS)
	rm -rf build/pages && mkdir -p build/pages
	git ls-files -z "*.md" docs/images benchmarks examples LICENSE | xargs -0 cp --parents -t build/pages
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

format: $(TOOLS)
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

$(INSTALLED): $(BUILD_INPUTS) | $(PY)
	$(PY) -m pip install -r requirements-dev.txt -e ".[demo,test]"
	touch $@

# What setup.py needs to run outside of pip's isolation. A stamp and not the tools themselves, some of which come with others.
$(BUILD_TOOLS): pyproject.toml requirements-dev.txt | $(PY)
	$(PY) -m pip install -r requirements-dev.txt pybind11 cmake ninja
	touch $@

$(TOOLS): tools/requirements.txt requirements-dev.txt | $(PY)
	$(PY) -m pip install -r requirements-dev.txt -r tools/requirements.txt
	touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastinit needs Python >= 3.10, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV) build dist bench-out *.egg-info fastinit/*.so

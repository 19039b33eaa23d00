# make demo    the main job on whatever this machine has
# make test    the test suite (also on a machine without a GPU)
# make fuzz    20,000 random programs against an eager reference; ARGS="--programs 1000 --seed 7"
#
# All make a virtual environment in the checkout first, and need Python >= 3.10 with its headers and a C++ compiler: cmake, ninja
# and all the rest come from pip. The CUDA half is built if nvcc is found (setup.py tells how to steer that).

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILD_INPUTS := setup.py pyproject.toml requirements-dev.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-slow fuzz bench build lint clean

demo: $(INSTALLED)
	$(PY) -m fastinit demo $(ARGS)

test: $(INSTALLED)
	$(PY) -m pytest $(ARGS)

test-slow: $(INSTALLED)
	$(PY) -m pytest -m slow $(ARGS)

fuzz: $(INSTALLED)
	$(PY) tests/fuzz.py $(ARGS)

bench: $(INSTALLED)
	$(PY) -m fastinit bench --out bench-out $(ARGS)

# The native module again, in place, only what changed: for work on csrc/.
build: $(VENV)/bin/ninja
	$(PY) setup.py build_ext --inplace

lint: $(INSTALLED)
	$(PY) -m pip install --quiet -r requirements-dev.txt -e ".[lint]"
	$(PY) -m ruff check .
	$(PY) -m mypy

$(INSTALLED): $(BUILD_INPUTS) | $(PY)
	$(PY) -m pip install -r requirements-dev.txt -e ".[demo,test]"
	touch $@

$(VENV)/bin/ninja: | $(PY)
	$(PY) -m pip install -r requirements-dev.txt pybind11 cmake ninja

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastinit needs Python >= 3.10, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV) build dist bench-out *.egg-info fastinit/*.so

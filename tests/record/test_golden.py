"""Whole models have the bits that tests/support/golden.json says they have: see golden.py."""

import os
import subprocess
import sys
from pathlib import Path

import golden
import pytest

REMEDY = (
    "A seed no longer gives the model that it gave. If that is meant, say why in the commit that changes the file: "
    "python tests/support/golden.py --write"
)


@pytest.mark.parametrize("mode", golden.MODES)
@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("name", golden.MODELS)
def test_a_model_is_what_it_was(name: str, dtype: str, mode: str) -> None:
    version, written = golden.transformers_version(), golden.golden()["transformers"]
    if golden.MODELS[name].of_transformers and version != written:
        pytest.skip(f"golden.json is of transformers {written}, and this is {version}")
    found = list(golden.differences(name, dtype, mode, golden.machine() == golden.golden()["machine"]))
    assert not found, "\n".join([f"{name} in {dtype}, mode {mode}:", *found, REMEDY])


def test_the_file_has_the_models_that_are_defined() -> None:
    assert list(golden.golden()["models"]) == list(golden.MODELS), REMEDY


@pytest.mark.parametrize("name", [name for name, model in golden.MODELS.items() if model.computed])
def test_each_pattern_of_computed_tensors_finds_some_and_leaves_others(name: str) -> None:
    tensors = golden.recorded(name, "fp32")
    for pattern in golden.MODELS[name].computed:
        assert golden.matching(tensors, (pattern,)), f"{pattern} is the name of no tensor"
    assert len(golden.matching(tensors, golden.MODELS[name].computed)) < len(tensors)


def test_only_computed_tensors_depend_on_the_instruction_set() -> None:
    """Those that are not listed as computed are compared on any machine, here on one that seems to be old."""
    file = Path(golden.__file__)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    run = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "computed tensors are left out" in run.stdout

"""Models of other libraries, made by torch and by fastinit: `make test-libraries`, which installs these libraries."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_geometric", reason="the libraries are not installed: make test-libraries")

sys.path.insert(0, str(Path(__file__).parent / "zoo"))

import compare
from libraries import KNOWN, LIBRARIES

pytestmark = pytest.mark.libraries


def cases():
    for library, models in LIBRARIES.items():
        for name, model in models().items():
            for mode in (*compare.MODES, *(["forward"] if model.call else [])):
                reason = KNOWN.get((library, name, mode))
                marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
                yield pytest.param(model, mode, id=f"{library}-{name}-{mode}", marks=marks)


@pytest.mark.parametrize(("model", "mode"), cases())
def test_a_model_is_what_torch_makes(model, mode):
    if mode == "forward":
        compare.forward(model.make, model.call)
    else:
        compare.MODES[mode](model.make)

"""Models of other libraries, made by torch and by fastinit: `make test-libraries`, which installs these libraries."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_geometric", reason="the libraries are not installed: make test-libraries")

sys.path.insert(0, str(Path(__file__).parent))

import compare
import torch
from libraries import KNOWN, LIBRARIES
from models import DTYPES, WAYS, built, made
from torch import nn

pytestmark = [
    pytest.mark.libraries,
    pytest.mark.filterwarnings("ignore"),  # of libraries that know older versions of others
]


def cases():
    for library, models in LIBRARIES.items():
        for name, model in models().items():
            for mode in (*compare.MODES, "fp64", *(["forward"] if model.call else [])):
                reason = KNOWN.get((library, name, mode))
                marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
                yield pytest.param(model, mode, id=f"{library}-{name}-{mode}", marks=marks)


@pytest.mark.parametrize(("model", "mode"), list(cases()))
def test_a_model_is_what_torch_makes(model, mode):
    if mode == "forward":
        compare.forward(model.make, model.call)
    elif mode == "fp64":
        compare.double_precision(model.make)
    else:
        compare.MODES[mode](model.make)


# Quantizers -----------------------------------------------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32, bias=False))


def torchao(name):
    from torchao import quantization

    def quantize(model):
        quantization.quantize_(model, getattr(quantization, name)())

    return quantize


def quanto(name):
    from optimum import quanto

    def quantize(model):
        quanto.quantize(model, weights=getattr(quanto, name))
        quanto.freeze(model)

    return quantize


def bitsandbytes(name, **options):
    import bitsandbytes

    def quantize(model):
        layer = getattr(bitsandbytes.nn, name)(64, 64, **options)
        layer.load_state_dict(model[0].state_dict())
        model[0] = layer.to("cpu")

    return quantize


QUANTIZERS = {
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao-int8 activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-float8": lambda: torchao("Float8WeightOnlyConfig"),
    "optimum.quanto-int8": lambda: quanto("qint8"),
    "optimum.quanto-int4": lambda: quanto("qint4"),
    "optimum.quanto-float8": lambda: quanto("qfloat8"),
    "bitsandbytes-int8": lambda: bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes-nf4": lambda: bitsandbytes("LinearNF4"),
    "bitsandbytes-fp4": lambda: bitsandbytes("LinearFP4"),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_model_is_quantized_in_the_block_as_after_it(name, way, dtype):
    quantize = QUANTIZERS[name]()

    def quantized():
        model = network()
        quantize(model)
        return model

    after = built(network, dtype)
    quantize(after)
    inside = made(quantized, way, dtype)
    assert [type(each) for each in inside.parameters()] == [type(each) for each in after.parameters()]
    x = torch.linspace(-1, 1, 192, dtype=DTYPES[dtype]).view(3, 64)
    got, right = inside(x), after(x)
    if dtype == "fp32":
        assert torch.equal(got, right)
    else:  # in the block the weights that are quantized are those in fp32
        assert torch.allclose(got, right, rtol=0, atol=0.05 * right.abs().max().item())

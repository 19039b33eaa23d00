"""Every public module class of torch.nn, in every dtype, against torch's own construction of it."""

import pytest
import torch
from models import (
    DTYPES,
    MODULES,
    assert_rounded_once,
    assert_same_bits,
    assert_same_distribution,
    assert_same_structure,
    built,
    module_cases,
    module_classes,
    plain,
    random_names,
    registered,
    same_bits,
    samples,
)
from torch import nn

import fastinit

CASES = module_cases()
RANDOM = [(name, constructor) for name, constructor in CASES if random_names(constructor)]


def over(cases):
    return pytest.mark.parametrize("constructor", [pytest.param(c, id=name) for name, c in cases])


def test_the_table_has_every_public_module_class():
    missing = sorted(set(module_classes()) - set(MODULES))
    assert not missing, f"torch.nn has classes that tests/support/models.py has no constructor for: {missing}"


def test_most_of_the_table_is_random_where_torch_is():
    # Guards the tests below against an empty parametrisation.
    assert len(RANDOM) >= 40


@over(CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_structure_is_that_of_torch_in_the_same_default_dtype(constructor, dtype):
    assert_same_structure(built(constructor, dtype), plain(constructor, dtype))


@over(CASES)
def test_values_are_the_fp32_values_rounded_once_and_repeat_with_the_seed(constructor):
    exact = built(constructor)
    for dtype in DTYPES:
        stored = built(constructor, dtype)
        assert_rounded_once(stored, exact)
        assert_same_bits(stored, built(constructor, dtype))
    reference = registered(plain(constructor))
    random = random_names(constructor)
    for name, tensor in registered(exact).items():
        if name not in random and not nn.parameter.is_lazy(tensor):
            assert same_bits(tensor, reference[name]), name


@over(RANDOM)
def test_random_values_differ_between_seeds_and_follow_torchs_distribution(constructor):
    names = random_names(constructor)
    one, other = registered(built(constructor, seed=1)), registered(built(constructor, seed=2))
    assert not [name for name in names if same_bits(one[name], other[name])]
    ours = samples(lambda seed: built(constructor, seed=seed), names, at_least=4096)
    theirs = samples(lambda seed: plain(constructor, seed=seed), names, at_least=4096)
    for name in names:
        assert_same_distribution(ours[name], theirs[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_two_random_tensors_of_a_model_are_alike(dtype):
    model = built(lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)), nn.LSTM(16, 16, 2)), dtype)
    seen = {}
    for name, tensor in model.named_parameters():
        assert seen.setdefault(tuple(tensor.flatten()[:16].tolist()), name) == name


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_torch_makes_by_deepcopy_are_equal(dtype):
    # TransformerDecoder copies the layer it is given, values included, and leaves them so.
    model = built(lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24), 3), dtype)
    for layer in model.layers[1:]:
        assert_same_bits(layer, model.layers[0])
    assert model.layers[1].linear1.weight.data_ptr() != model.layers[0].linear1.weight.data_ptr()


def test_torch_seeds_decide_when_no_seed_is_given():
    def build():
        with fastinit.on("cpu", "bf16"):
            return nn.Linear(64, 64)

    torch.manual_seed(3)
    first, second = build(), build()
    torch.manual_seed(3)
    assert_same_bits(first, build())
    assert not same_bits(first.weight, second.weight)

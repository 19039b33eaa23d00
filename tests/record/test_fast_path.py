"""The fast path changes nothing: models and random programs have the same bits and facts with it and without it."""

import contextlib
import gc
import random
import sys
import weakref

import pytest
import torch
from models import SEED, module_cases, registered, same_bits
from programs import OPERATIONS, SIDE
from test_programs import inside, kinds, strides
from torch import nn
from torch.nn import init

import fastinit
from fastinit.record import methods
from fastinit.record.records import Record
from fastinit.record.tensors import Placeholder


@contextlib.contextmanager
def path(fast):
    before = methods.fast_path.in_use
    methods.use(fast)
    try:
        yield
    finally:
        methods.use(before)


def both_ways(make):
    """What a function returns with the fast path and without it: a value, or the type of what it raises."""
    results = []
    for fast in (True, False):
        with path(fast):
            try:
                results.append(make())
            except Exception as error:
                results.append(type(error))
    return results


def facts(module, report=None):
    tensors = registered(module)
    about = {
        name: (tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.is_leaf, type(tensor))
        for name, tensor in tensors.items()
    }
    counts = report and (report.parameters, report.bytes, report.fills_executed, report.fills_dropped)
    return about, kinds(module), strides(module), counts, sorted(tensors)


def assert_same(left, right):
    assert left[1:] == right[1:]
    for name, tensor in registered(left[0]).items():
        assert same_bits(tensor, registered(right[0])[name]), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("constructor", [pytest.param(c, id=name) for name, c in module_cases()])
def test_a_module_is_the_same(constructor, dtype):
    def make():
        with fastinit.on("cpu", dtype, seed=SEED) as report:
            module = constructor()
            state = torch.get_rng_state()
        return module, facts(module, report), state.tolist(), torch.get_rng_state().tolist()

    fast, slow = both_ways(make)
    if fast is slow is RuntimeError:  # a parameter without a shape as yet has no facts
        assert any(map(nn.parameter.is_lazy, constructor().parameters()))
    else:
        assert_same(fast, slow)


@pytest.mark.parametrize("seed", range(300))
def test_a_random_program_makes_the_same(seed):
    generator = random.Random(seed)
    steps = [
        (
            generator.choice(sorted(OPERATIONS)),
            generator.randrange(8),
            generator.randrange(8),
            generator.randrange(SIDE),
            generator.choice([0.1, -0.5, 1.0, 2.0, 0.0]),
        )
        for _ in range(generator.randint(1, 12))
    ]

    def make():
        module = inside(steps, dtype)
        return module, facts(module), module.facts, repr(module.seen)

    dtype = generator.choice(["fp32", "bf16", "fp16"])
    fast, slow = both_ways(make)
    if isinstance(fast, tuple) and isinstance(slow, tuple):
        assert_same(fast, slow)
    else:
        assert fast is slow


def test_numbers_of_versions_and_refusals_are_torchs():
    def make():
        with fastinit.on("cpu", "fp32", seed=SEED):
            parameter = nn.Parameter(torch.empty(3, 4))
            init.kaiming_uniform_(parameter)
            init.zeros_(parameter)
            init.normal_(parameter, std=2)
            version = parameter._version
            with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
                parameter.uniform_(-1, 1)
            size = parameter.size(), parameter.size(-1), parameter.dim(), parameter.shape, parameter.grad_fn
            with pytest.raises(IndexError):
                parameter.size(2)
            computed = parameter * 2
            return version, size, type(computed.grad_fn), parameter.tolist(), parameter.dtype, parameter.device

    fast, slow = both_ways(make)
    assert fast == slow


def test_a_mode_of_the_caller_sees_functions_of_init_with_the_fast_path():
    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    seen = []
    with path(True), fastinit.on("cpu", seed=SEED):
        linear = nn.Linear(2, 2)
        with Names():
            init.uniform_(linear.weight)
    assert "uniform_" in seen


def layers_and_what_is_like_them():
    """Initializations that are equal to earlier ones, and some that only look so."""
    made = [nn.Linear(8, 8) for _ in range(3)]
    made += [nn.Embedding(8, 8), nn.Embedding(8, 8, padding_idx=1), nn.Embedding(8, 8)]
    tensors = [init.constant_(torch.empty(3), value) for value in (0.0, -0.0, 0, False)]
    for a in (1, 1.0, True, 2, "1", None, torch.tensor(1.0), [1]):
        try:
            tensors.append(init.kaiming_uniform_(torch.empty(8, 8), a=a))
        except (ValueError, TypeError) as error:  # what torch says of an argument, also after one that was equal
            tensors.append(torch.tensor(float(len(str(error)))))
    bound = torch.tensor(1.0)
    for _ in range(2):  # a number that changes is no value to go by
        tensors.append(init.uniform_(torch.empty(4), 0.0, bound))
        bound.mul_(2)
    torch.manual_seed(1)
    tensors += [made[0].weight.detach(), init.kaiming_uniform_(torch.empty(8, 8), a=1)]
    tensors.append(init.uniform_(torch.empty(4), generator=torch.Generator().manual_seed(2)))
    tensors.append(init.uniform_(torch.empty(4), generator=None))
    filled = torch.empty(8, 8).fill_(2.0)
    tensors += [init.normal_(filled), init.normal_(torch.empty(8, 8)[:4]), init.normal_(torch.empty(8, 8).t())]
    module = nn.Module()
    for number, tensor in enumerate(tensors):
        module.register_buffer(str(number), tensor)
    return nn.ModuleList([*made, module])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_what_is_like_an_earlier_initialization_is_what_it_is_alone(dtype):
    def make():
        with fastinit.on("cpu", dtype, seed=SEED) as report:
            module = layers_and_what_is_like_them()
        return module, facts(module, report), [(each.writes, each.replaced) for each in report.tensors]

    with_it, without = both_ways(make)
    assert_same(with_it, without)


@pytest.mark.parametrize("fast", [True, False])
def test_a_function_in_the_place_of_one_of_init_is_called_for_each_tensor(monkeypatch, fast):
    called = []

    def uniform_(tensor, a=0.0, b=1.0, generator=None):
        called.append(tensor)
        return uniform(tensor, a, b, generator)

    uniform = init.uniform_
    monkeypatch.setattr(init, "uniform_", uniform_)
    with path(fast), fastinit.on("cpu", "fp32", seed=SEED):
        layers = [nn.Linear(8, 8) for _ in range(3)]
    assert len(called) == len({id(each) for each in called if any(each is layer.bias for layer in layers)}) * 2 == 6


def test_an_initializer_that_raises_leaves_the_modes_as_they_were():
    def make():
        with fastinit.on("cpu", seed=SEED):
            parameter = nn.Parameter(torch.empty(3, 4))
            with pytest.raises(ValueError, match="not supported"):
                init.kaiming_uniform_(parameter, mode="fan")
            modes = torch._C._len_torch_function_stack()
            assert type(torch.empty(2)) is Placeholder
            return modes, init.uniform_(parameter).detach().tolist()

    fast, slow = both_ways(make)
    assert fast == slow


def test_torch_has_its_own_functions_afterwards():
    before = torch.overrides.handle_torch_function
    with path(True), fastinit.on("cpu"):
        nn.Linear(2, 2)
        assert torch.overrides.handle_torch_function is not before
    assert torch.overrides.handle_torch_function is before


@pytest.mark.parametrize("fast", [True, False])
def test_nothing_is_left_of_a_block(fast):
    def block():
        with fastinit.on("cpu", "bf16", seed=SEED):
            parts = nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Embedding(5, 4, padding_idx=1)
            model = nn.Sequential(*parts)
        return model

    def kept():
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(isinstance(each, (Record, Placeholder)) for each in objects)

    with path(fast):
        for _ in range(3):
            block()
        held = [torch.float32, torch.bfloat16, Placeholder, Record, torch.Tensor, nn.Parameter, methods.lock]
        before, references = kept(), [sys.getrefcount(each) for each in held]
        for _ in range(100):
            block()
        after, now = kept(), [sys.getrefcount(each) for each in held]
    assert after[0] - before[0] < 50
    assert after[1] == before[1]
    assert all(abs(a - b) < 20 for a, b in zip(references, now, strict=True)), (references, now)


@pytest.mark.parametrize("fast", [True, False])
def test_an_object_keeps_its_identity_and_weak_references_when_it_becomes_real(fast):
    with path(fast), fastinit.on("cpu", seed=SEED):
        linear = nn.Linear(3, 2)
        weight = linear.weight
        weight.mine = "mine"
        ref = weakref.ref(weight)
        assert type(weight) is Placeholder
    assert type(weight) is nn.Parameter and ref() is weight is linear.weight and weight.__dict__ == {"mine": "mine"}
    weight.sum().backward()
    assert weight.grad is not None
    del weight, linear
    gc.collect()
    assert ref() is None


def test_what_functions_of_torch_nn_init_call_may_be_replaced_between_two_layers_that_are_alike(monkeypatch):
    with fastinit.on("cpu", "fp32", seed=SEED):
        one, other = torch.empty(4, 4), torch.empty(4, 4)
        init.kaiming_uniform_(one)
        monkeypatch.setattr(init, "calculate_gain", lambda *args, **kwargs: 1e-3)
        init.kaiming_uniform_(other)
    assert one.abs().max() > 0.1
    assert other.abs().max() < 0.01


def test_functionalization_that_is_ended_before_it_has_begun_is_torchs_afterwards():
    with fastinit.on("cpu", "fp32"):
        torch._disable_functionalization()
        torch._enable_functionalization(reapply_views=True)
        try:
            functional = torch._is_functional_tensor(torch.zeros(2))
        finally:
            torch._disable_functionalization()
        ordinary = torch._is_functional_tensor(torch.zeros(2))
    assert (functional, ordinary) == (True, False)

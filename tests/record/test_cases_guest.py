"""A block is a good guest: it leaves classes alone, and what fails in it or at its end leaves nothing half done."""

import gc
import math
import pickle
import re
import time
import tracemalloc
import warnings

import pytest
import torch
from cases import check, inside, over_dtypes, over_sources, quiet
from models import DTYPES, SEED, assert_same_bits, different, plain, registered, same_bits, state_of_torch
from torch import nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

import fastinit

MAY_BE_WRAPPED = {"__new__", "_make_subclass"}  # of torch.Tensor: no mode and no dispatcher sees these
TENSORS = [torch.Tensor, torch._C.TensorBase]
CLASSES = [nn.Module, nn.Parameter, type(nn.Parameter), nn.Buffer, nn.Linear, nn.Sequential, *TENSORS]


def of_classes():
    """Return every attribute of the classes that constructors use, and every public function of torch.nn.init."""
    found = {
        (each.__name__, name): getattr(value, "__func__", value)
        for each in CLASSES
        for name, value in vars(each).items()
        if not (each in TENSORS and name in MAY_BE_WRAPPED)
    }
    found |= {("init", name): value for name, value in vars(init).items() if not name.startswith("_")}
    return found


WAYS = [{}, {"empty": True}, {"shard": True}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@over_dtypes
def test_entering_a_block_modifies_no_class(way, dtype):
    before = of_classes()
    with fastinit.on("cpu", dtype, seed=SEED, **way):
        during = of_classes()
        layer = nn.Linear(2, 2)
        assert isinstance(layer.weight, nn.Parameter) and isinstance(layer.weight, torch.Tensor)
        with fastinit.on("cpu", "fp16"):
            nested = of_classes()
    after = of_classes()
    for state in (during, nested, after):
        assert state.keys() == before.keys()
        assert [name for name in before if state[name] is not before[name]] == []


@over_dtypes
def test_a_function_of_torch_that_someone_replaces_in_the_block_stays_replaced(dtype):
    for module, name in ((init, "normal_"), (torch, "get_default_dtype"), (torch, "manual_seed"), (torch, "ones")):
        original = getattr(module, name)

        def mine(*args, of=original, **kwargs):
            return of(*args, **kwargs)

        try:
            with fastinit.on("cpu", dtype, seed=SEED):
                setattr(module, name, mine)
                nn.Linear(2, 2)
            assert getattr(module, name) is mine, name
        finally:
            setattr(module, name, original)


def test_what_comes_out_is_torchs_alone():
    def construct():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    model, usual = inside(construct, "bf16"), construct()
    for ours, right in zip(model.modules(), usual.modules(), strict=True):
        assert type(ours) is type(right) and vars(ours).keys() == vars(right).keys()
    for ours, right in zip(registered(model).values(), registered(usual).values(), strict=True):
        assert type(ours) is type(right) and not vars(ours)


class Watching(TorchFunctionMode):
    """Notes what is called, and may change it."""

    def __init__(self, replace=None):
        super().__init__()
        self.seen, self.replace = [], replace or {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        self.seen.append(name)
        return self.replace.get(name, function)(*args, **(kwargs or {}))


INITS = {
    "uniform_": lambda w: init.uniform_(w, -1, 1),
    "normal_": lambda w: init.normal_(w),
    "constant_": lambda w: init.constant_(w, 0.3),
    "kaiming_uniform_": lambda w: init.kaiming_uniform_(w),
    "kaiming_normal_": lambda w: init.kaiming_normal_(w),
    "xavier_uniform_": lambda w: init.xavier_uniform_(w),
    "xavier_normal_": lambda w: init.xavier_normal_(w),
    "ones_": lambda w: init.ones_(w),
    "zeros_": lambda w: init.zeros_(w),
    "method normal_": lambda w: w.data.normal_(0, 0.1),
    "method fill_": lambda w: w.data.fill_(0.1),
    "a layer": lambda w: nn.Linear(4, 4),
}


@pytest.mark.parametrize("name", INITS)
@over_dtypes
def test_a_mode_of_the_users_own_sees_what_initializes(name, dtype):
    def watched():
        parameter = nn.Parameter(torch.empty(4, 4))
        with Watching() as mode:
            INITS[name](parameter)
        return mode.seen

    def writes(names):
        return [each for each in names if each.endswith("_") and not each.endswith("__")]

    theirs, ours = plain(watched, dtype), inside(watched, dtype)
    assert writes(theirs) and [each for each in writes(ours) if each in writes(theirs)] == writes(theirs), ours


@over_dtypes
def test_a_mode_of_the_users_own_may_change_what_initializes(dtype):
    def zeros(*args, **kwargs):
        return kwargs.get("tensor", *args[:1]).data.zero_()

    def construct():
        with Watching({"uniform_": zeros, "xavier_normal_": zeros, "fill_": zeros}) as mode:
            layer = nn.Linear(4, 4)
            for function in (init.uniform_, init.ones_):
                function(layer.weight if function is init.uniform_ else layer.bias)
        assert {"uniform_", "fill_"} <= set(mode.seen)
        return layer

    for run in (plain, inside):
        layer = run(construct, dtype)
        assert not layer.weight.any() and not layer.bias.any()


# What a process keeps -------------------------------------------------------------------------------------------------


def _enter(times, **way):
    for _ in range(times):
        with fastinit.on("cpu", "bf16", seed=0, **way):
            pass


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_entering_allocates_nothing_that_stays(way):
    def growth():
        gc.collect()
        objects, before = len(gc.get_objects()), tracemalloc.get_traced_memory()[0]
        _enter(300, **way)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before, len(gc.get_objects()) - objects

    tracemalloc.start()
    try:
        _enter(300, **way)  # what is put into place once
        # The least of three: now and then a table of the interpreter grows, once.
        size, objects = map(min, zip(*(growth() for _ in range(3)), strict=True))
        assert size < 2000 and objects < 20
    finally:
        tracemalloc.stop()


def test_entering_costs_the_same_with_thousands_of_module_classes_and_the_thousandth_time():
    def cost():
        times = []
        for _ in range(150):
            start = time.perf_counter()
            _enter(1)
            times.append(time.perf_counter() - start)
        return min(times)

    _enter(10)
    few = cost()
    classes = [type(f"Module{k}", (nn.Linear,), {"forward": lambda self, x: x}) for k in range(4000)]
    many = cost()
    assert len(classes) == 4000
    del classes
    gc.collect()
    _enter(700)
    # Which is the least of 150 is repeatable to a few microseconds; a walk over the classes takes a hundred and more.
    assert many < 1.5 * few + 50e-6 and cost() < 1.5 * few + 50e-6


# What others hand in or keep -----------------------------------------------------------------------------------------


class HandsOnByName(nn.Linear):
    """As constraints of a library for Gaussian processes do."""

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        super()._load_from_state_dict(
            state_dict=state_dict,
            prefix=prefix,
            local_metadata=local_metadata,
            strict=strict,
            missing_keys=missing_keys,
            unexpected_keys=unexpected_keys,
            error_msgs=error_msgs,
        )


@pytest.mark.parametrize("assign", [False, True])
@over_dtypes
def test_a_module_may_hand_on_what_it_loads_by_name(assign, dtype):
    state = {"weight": torch.full((2, 2), 0.5, dtype=DTYPES[dtype]), "bias": torch.ones(2, dtype=DTYPES[dtype])}

    def construct():
        layer = HandsOnByName(2, 2)
        return layer, layer.load_state_dict(state, assign=assign)

    layer, result = inside(construct, dtype)
    assert not result.missing_keys and not result.unexpected_keys
    assert (layer.weight == 0.5).all() and (layer.bias == 1).all()


class KeepsItsInit(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.initialize, self.w = function, nn.Parameter(torch.empty(3, 3))
        self.initialize(self.w)


FUNCTIONS = ["normal_", "uniform_", "ones_", "zeros_", "trunc_normal_", "xavier_normal_", "kaiming_uniform_"]


@pytest.mark.parametrize("name", FUNCTIONS)
@over_dtypes
def test_a_module_that_keeps_a_function_of_torch_nn_init_is_pickled(name, dtype):
    before = getattr(init, name)
    model, copy_inside = inside(
        lambda: (lambda model: (model, pickle.loads(pickle.dumps(model))))(KeepsItsInit(getattr(init, name))), dtype
    )
    again = pickle.loads(pickle.dumps(model))
    assert model.initialize is again.initialize is copy_inside.initialize is before is getattr(init, name)
    assert same_bits(again.w.detach(), model.w.detach()) and same_bits(copy_inside.w.detach(), model.w.detach())


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def intact():
    """After the test torch is as before it, and a model is what it always is."""
    expected, before = inside(lambda: nn.Linear(4, 4), "bf16"), state_of_torch()
    yield
    assert not different(before, state_of_torch())
    assert_same_bits(inside(lambda: nn.Linear(4, 4), "bf16"), expected)


def assert_right_or_refused(tensor, right):
    """Fail if a tensor that is left over has another shape than the code gave it, or values that are not its own."""
    assert tensor.shape == right.shape and tensor.dtype == right.dtype
    try:
        read = tensor.detach().clone()
    except RuntimeError as error:
        assert str(error)
        return
    assert same_bits(read, right.detach()), (read, right)


def fill(module, middle):
    module.a = nn.Linear(2, 2)
    module.middle = nn.Parameter(torch.empty(middle))
    module.c = nn.Linear(2, 2)
    module.d = nn.Parameter(torch.arange(3) / 7)


def _left(module, dtype):
    right = quiet(lambda: inside(lambda: (lambda m: (fill(m, 3), m)[1])(nn.Module()), dtype))
    for name, tensor in module.named_parameters():
        if name != "middle":
            assert_right_or_refused(tensor, right.get_parameter(name))
    return right


@over_dtypes
def test_memory_that_is_not_there_leaves_a_module_whose_parts_are_right_or_refused(intact, dtype):
    module = nn.Module()
    with pytest.raises(RuntimeError, match=rf"(?s){2**50}"), fastinit.on("cpu", dtype, seed=SEED):
        fill(module, 1 << 50)
    _left(module, dtype)
    if hasattr(module, "middle"):
        assert module.middle.shape == (1 << 50,)
        with pytest.raises(RuntimeError):
            module.middle.detach().clone()


@over_dtypes
def test_a_warning_that_is_an_error_leaves_a_module_whose_parts_are_right_or_refused(intact, dtype):
    module = nn.Module()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"\bmiddle\b"), fastinit.on("cpu", dtype, seed=SEED):
            fill(module, 3)
    right = _left(module, dtype)
    assert_right_or_refused(module.middle, torch.zeros_like(right.middle))


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit, GeneratorExit])
@over_dtypes
def test_an_exception_in_the_block_leaves_a_module_whose_parts_are_right_or_refused(intact, error, way, dtype):
    module = nn.Module()
    with pytest.raises(error), fastinit.on("cpu", dtype, seed=SEED, **way):
        fill(module, 3)
        module.middle.data.zero_()
        raise error
    if not way:
        right = _left(module, dtype)
        assert_right_or_refused(module.middle, torch.zeros_like(right.middle))
    assert [tuple(p.shape) for p in module.parameters()] == [(3,), (3,), (2, 2), (2,), (2, 2), (2,)]


@over_dtypes
def test_an_inner_block_that_fails_leaves_the_outer_one_as_it_was(intact, dtype):
    with fastinit.on("cpu", dtype, seed=SEED):
        first = nn.Linear(4, 4)
        broken = nn.Module()
        with pytest.raises(RuntimeError), fastinit.on("cpu", "fp16", seed=1):
            fill(broken, 1 << 50)
        with pytest.raises(ZeroDivisionError), fastinit.on("cpu", "fp16", seed=1):
            nn.init.zeros_(first.bias)
            raise ZeroDivisionError
        assert torch.get_default_dtype() == DTYPES[dtype]
        second = nn.Linear(4, 4)
    right = inside(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), dtype)
    assert same_bits(first.weight.detach(), right[0].weight.detach()) and not first.bias.any()
    assert_same_bits(second, right[1])


NOT_FINITE = {
    "times nan": lambda t: t(3) * math.nan,
    "times infinity": lambda t: t(3) * math.inf,
    "minus infinity": lambda t: t(3) - math.inf,
    "divided by zero": lambda t: t(3) / 0,
    "to infinity": lambda t: t(3) ** math.inf,
    "mul_ and add_": lambda t: t(3).mul_(math.inf).add_(-math.inf),
    "clamped to nan": lambda t: t(3).clamp(min=math.nan),
    "clamped to infinity": lambda t: t(3).clamp_(max=-math.inf),
    "filled": lambda t: t(3).fill_(math.nan),
    "full": lambda t: torch.full((3,), math.nan) + t(3),
    "constant_": lambda t: init.constant_(t(3), -math.inf),
    "an empty one": lambda t: torch.zeros(0) * math.nan,
    "zero times infinity": lambda t: (t(3) * 0) * math.inf,
    "masked": lambda t: t(3).masked_fill(t(3) > 0.4, -math.inf).softmax(0),
}


@pytest.mark.parametrize("name", NOT_FINITE)
@over_dtypes
@over_sources
def test_numbers_that_are_not_finite_give_what_they_give_in_torch(name, dtype, source):
    check(NOT_FINITE[name], dtype, source, ulps=1e-9)  # which of the NaNs it is does not matter


def test_a_torch_that_lacks_an_internal_function_has_blocks_that_all_behave_alike(intact, monkeypatch):
    monkeypatch.delattr(torch.jit._recursive, "create_script_module_impl")
    outcomes, before = [], state_of_torch()
    for _ in range(3):
        try:
            with fastinit.on("cpu", "bf16", seed=SEED):
                outcomes.append([type(nn.Linear(1, 1).weight).__name__, torch.get_default_dtype()])
        except Exception as error:
            outcomes.append((type(error), re.sub("0x[0-9a-f]+", "", str(error))))
        assert not different(before, state_of_torch())
        assert not hasattr(torch.jit._recursive, "create_script_module_impl")
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert init.normal_.__code__.co_filename.endswith("init.py")


def test_a_function_that_is_replaced_between_two_blocks_is_what_the_second_one_calls(monkeypatch):
    calls, by_torch = [], torch.get_rng_state
    with fastinit.on("cpu"):
        torch.get_rng_state()
    monkeypatch.setattr(torch, "get_rng_state", lambda: calls.append("mine") or by_torch())
    with fastinit.on("cpu"):
        torch.get_rng_state()
    assert "mine" in calls

"""The native hot path: inside a context, attributes, parameters and factories do what torch's own code does."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from torch import nn

import fastinit
from fastinit import native

torch_setattr, torch_parameter_new = nn.Module.__setattr__, nn.Parameter.__new__


class Plain(nn.Module):
    on_class = 3
    annotated: int

    @property
    def read_only(self):
        return 1

    @property
    def both(self):
        return self._both

    @both.setter
    def both(self, value):
        self.__dict__["_both"] = value


class OwnRegister(nn.Module):
    def register_parameter(self, name, param):
        super().register_parameter(name + "_renamed", param)


class OwnGetattr(nn.Module):
    def __getattr__(self, name):
        if name == "w":
            return 7
        return super().__getattr__(name)


class OwnSetattr(nn.Module):
    def __setattr__(self, name, value):
        super().__setattr__(name.lower(), value)


class Mixin:
    def __setattr__(self, name, value):
        self.__dict__.setdefault("log", []).append(name)
        super().__setattr__(name, value)


class BeforeMixin(nn.Module, Mixin):
    pass


class WithoutInit(nn.Module):
    def __init__(self):
        pass


CLASSES = [Plain, OwnRegister, OwnGetattr, OwnSetattr, BeforeMixin, WithoutInit, nn.ParameterList, nn.Sequential]

VALUES = {
    "int": lambda: 5,
    "None": lambda: None,
    "str": lambda: "text",
    "list": lambda: [1, 2],
    "function": lambda: torch_setattr,
    "parameter": lambda: nn.Parameter(torch.zeros(2, 3)),
    "other parameter": lambda: nn.Parameter(torch.ones(4), requires_grad=False),
    "parameter of integers": lambda: nn.Parameter(torch.arange(3), requires_grad=False),
    "buffer": lambda: nn.Buffer(torch.zeros(2)),
    "transient buffer": lambda: nn.Buffer(torch.zeros(2), persistent=False),
    "tensor": lambda: torch.ones(3),
    "module": lambda: nn.Identity(),
    "lazy": lambda: nn.UninitializedParameter(),
    "class": lambda: nn.Linear,
}

NAMES = ["w", "on_class", "annotated", "read_only", "both", "forward", "training", "a.b", "", "_parameters"]


def assign_twice(cls, name, first, second):
    """What two assignments lead to: the errors, and what the module holds afterwards, in order."""
    module, errors = cls(), []
    for value in (VALUES[first](), VALUES[second]()):
        try:
            setattr(module, name, value)
            errors.append(None)
        except Exception as error:  # whatever torch raises is what is compared
            errors.append((type(error), str(error)))
    held = {key: describe(value) for key, value in module.__dict__.items()}
    order = {key: list(value) for key, value in module.__dict__.items() if isinstance(value, dict)}
    return errors, held, order


def describe(value):
    if isinstance(value, torch.Tensor):
        meta = isinstance(value, nn.UninitializedParameter)
        return type(value), value.dtype, value.requires_grad, None if meta else value.tolist()
    if isinstance(value, nn.Module):
        return type(value)
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    return value


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_assigning_attributes_does_what_torch_does(cls):
    for name, first, second in itertools.product(NAMES, VALUES, VALUES):
        expected = assign_twice(cls, name, first, second)
        with fastinit.on("cpu", "fp32", seed=0):
            actual = assign_twice(cls, name, first, second)
        assert actual == expected, (name, first, second)


@pytest.mark.parametrize("kind", ["parameter", "module"])
def test_hooks_of_others_see_what_is_registered_in_a_context(kind):
    seen = []
    register = {
        "parameter": nn.modules.module.register_module_parameter_registration_hook,
        "module": nn.modules.module.register_module_module_registration_hook,
    }[kind]
    handle = register(lambda module, name, value: seen.append(name))
    try:
        with fastinit.on("cpu", "fp32", seed=0):
            module = nn.Module()
            module.value = VALUES[kind]()
    finally:
        handle.remove()
    assert seen == ["value"]


def test_a_class_that_is_changed_between_two_contexts_is_looked_at_again():
    class Changed(nn.Module):
        pass

    with fastinit.on("cpu", "fp32", seed=0):
        Changed().w = nn.Parameter(torch.zeros(1))
    Changed.w = 1
    with fastinit.on("cpu", "fp32", seed=0), pytest.raises(KeyError, match="already exists"):
        Changed().w = nn.Parameter(torch.zeros(1))


def test_a_class_that_is_changed_inside_a_context_is_looked_at_again():
    class Changed(nn.Module):
        pass

    with fastinit.on("cpu", "fp32", seed=0):
        Changed().w = nn.Parameter(torch.zeros(1))
        Changed.register_parameter = lambda self, name, value: nn.Module.register_parameter(self, name + "_2", value)
        module = Changed()
        module.w = nn.Parameter(torch.zeros(1))
    assert list(module._parameters) == ["w_2"]


def test_what_was_there_is_back_after_a_context():
    # Not torch's own functions in any case: torch.compile leaves a replacement of __init__ behind.
    def methods():
        return nn.Module.__setattr__, nn.Module.__getattr__, nn.Module.__init__, nn.Parameter.__new__

    before = methods()
    with fastinit.on("cpu", "fp32", seed=0):
        assert nn.Module.__setattr__ is not torch_setattr
        assert nn.Parameter.__new__ is not torch_parameter_new
    assert methods() == before


def test_another_librarys_setattr_stays_in_its_place(monkeypatch):
    assigned = []

    def theirs(self, name, value):
        assigned.append(name)
        torch_setattr(self, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", theirs)
    with fastinit.on("cpu", "fp32", seed=0):
        nn.Linear(2, 3)
    assert assigned == ["in_features", "out_features", "weight", "bias"]
    assert nn.Module.__setattr__ is theirs


class CallsOn(nn.Module):
    call_super_init = True


class Cooperative(nn.Module, Mixin):
    call_super_init = True


@pytest.mark.parametrize("args, kwargs", [((), {}), ((1,), {}), ((), {"a": 1})], ids=str)
@pytest.mark.parametrize("cls", [nn.Module, *CLASSES, CallsOn, Cooperative, nn.Identity], ids=lambda cls: cls.__name__)
def test_modules_begin_as_torch_begins_them(cls, args, kwargs):
    def make():
        try:
            module = cls(*args, **kwargs)
        except Exception as error:
            return type(error), str(error)
        return [(key, type(value), value) for key, value in module.__dict__.items()]

    expected = make()
    with fastinit.on("cpu", "fp32", seed=0):
        actual = make()
    assert actual == expected


@pytest.mark.parametrize("cls", [*CLASSES, nn.Linear, nn.BatchNorm1d], ids=lambda cls: cls.__name__)
def test_attributes_are_found_as_torch_finds_them(cls):
    module = cls() if cls in CLASSES else cls(2) if cls is nn.BatchNorm1d else cls(2, 3)

    def found(name):
        try:
            return getattr(module, name)
        except AttributeError as error:
            return str(error)

    names = ["weight", "bias", "running_mean", "w", "training", "missing", "_parameters", "read_only", "0", ""]
    expected = [found(name) for name in names]
    with fastinit.on("cpu", "fp32", seed=0):
        actual = [found(name) for name in names]
    assert all(a is b or a == b for a, b in zip(actual, expected, strict=True))


def test_modules_share_no_containers():
    with fastinit.on("cpu", "fp32", seed=0):
        first, second = nn.Module(), nn.Module()
    for name, value in first.__dict__.items():
        if isinstance(value, (dict, set)):
            assert value is not second.__dict__[name], name


@pytest.mark.parametrize("when", ["before", "inside"])
def test_another_librarys_register_parameter_is_asked(monkeypatch, when):
    registered, register = [], nn.Module.register_parameter

    def theirs(self, name, parameter):
        registered.append(name)
        register(self, name, parameter)

    if when == "before":
        monkeypatch.setattr(nn.Module, "register_parameter", theirs)
    with fastinit.on("cpu", "fp32", seed=0):
        first = nn.Linear(2, 3)
        monkeypatch.setattr(nn.Module, "register_parameter", theirs)
        second = nn.Linear(2, 3)
        monkeypatch.undo()
        third = nn.Linear(2, 3)
    assert registered == ["weight", "bias"] * (2 if when == "before" else 1)
    assert all(linear.weight.abs().sum() > 0 for linear in (first, second, third))


def test_another_librarys_parameter_constructor_is_asked(monkeypatch):
    made = []

    def theirs(cls, data=None, requires_grad=True):
        made.append(tuple(data.shape))
        return torch_parameter_new(cls, data, requires_grad)

    monkeypatch.setattr(nn.Parameter, "__new__", staticmethod(theirs))
    with fastinit.on("cpu", "bf16", seed=0):
        linear = nn.Linear(2, 3)
    assert made == [(3, 2), (3,)]
    assert nn.Parameter.__new__ is theirs
    with fastinit.on("cpu", "bf16", seed=0):
        pass
    assert linear.weight.dtype == torch.bfloat16 and linear.weight.abs().sum() > 0


@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((), {}),
        ((None,), {}),
        ((torch.ones(2),), {"requires_grad": False}),
        ((torch.ones(2), False), {}),
        ((), {"data": torch.ones(2)}),
        ((torch.ones(2), 1), {}),
        ((5,), {}),
        ((torch.arange(3),), {}),
        ((torch.ones(2), True, 1), {}),
        ((), {"tensor": torch.ones(2)}),
    ],
    ids=str,
)
def test_parameters_are_made_as_torch_makes_them(args, kwargs):
    def make():
        try:
            parameter = nn.Parameter(*args, **kwargs)
        except Exception as error:
            return type(error)
        return parameter.shape, parameter.dtype, parameter.requires_grad, type(parameter)

    expected = make()
    with fastinit.on("cpu", "fp32", seed=0):
        actual = make()
    assert actual == expected


@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((2, 3), {}),
        (((2, 3),), {}),
        (([2, 3],), {}),
        ((torch.Size([2, 3]),), {}),
        ((), {"size": (2, 3)}),
        ((0,), {}),
        ((2, 0), {}),
        ((), {}),
        (((),), {}),
        ((True,), {}),
        ((2.0,), {}),
        ((-1,), {}),
        (("a",), {}),
        ((torch.tensor(2),), {}),
        ((2,), {"dtype": torch.int64}),
        ((2,), {"dtype": torch.float16}),
        ((2,), {"dtype": "fp16"}),
        ((2,), {"device": "meta"}),
        ((2,), {"device": None, "dtype": None, "requires_grad": True}),
        ((2,), {"layout": None}),
        ((2,), {"names": None}),
        ((2,), {"unknown": 1}),
        ((2,) * 9, {}),
        ((2**62, 2**62), {}),
        ((2**64,), {}),
    ],
    ids=str,
)
def test_empty_takes_the_arguments_that_torch_takes(args, kwargs):
    def make():
        try:
            made = torch.empty(*args, **kwargs)
            return made.shape, made.dtype, made.device, made.requires_grad, made.stride()
        except Exception as error:
            return type(error)

    expected = make()
    with fastinit.on("cpu", "fp32", seed=0):
        actual = make()
    assert actual == expected


def test_a_mode_inside_the_context_sees_the_factories():
    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    with fastinit.on("cpu", "bf16", seed=0), Counting():
        linear = nn.Linear(2, 3)
    assert seen.count(torch.empty) == 2
    with fastinit.on("cpu", "bf16", seed=0):
        expected = nn.Linear(2, 3)
    assert torch.equal(linear.weight, expected.weight)


def test_entries_hold_nothing_once_they_are_gone():
    class Marker:
        pass

    marker = Marker()
    entry = native.Entry((2,), torch.float32, torch.device("cpu"), ())
    entry.shadow = marker
    entry.name = (Plain, "w")
    gone = weakref.ref(marker)
    del marker
    assert gone() is not None
    del entry
    assert gone() is None


def test_an_entry_begins_without_values_or_memory():
    entry = native.Entry((2,), torch.float32, torch.device("cpu"), ())
    assert (entry.shape, entry.recipe, entry.refs) == ((2,), (), [])
    assert (entry.shadow, entry.storage_key, entry.storage_weak, entry.name, entry.data_ptr) == (None,) * 4 + (0,)
    assert not (entry.again or entry.resident or entry.filled or entry.deferred)
    with pytest.raises(TypeError):
        native.Entry((2,))


# --- methods of classes ---


def test_a_method_that_is_set_is_found_by_instances_subclasses_and_slots():
    class Base:
        __setattr__ = object.__setattr__

        def __getattr__(self, name):
            return "before", name

    class Derived(Base):
        pass

    def read(module):
        # Often enough for the interpreter to remember where it found it.
        return [module.missing for _ in range(100)][-1]

    old = Base.__getattr__
    module = Derived()
    assert read(module) == ("before", "missing")
    for method, answer in ((lambda self, name: ("after", name), "after"), (old, "before")):
        native.set_method(Base, "__getattr__", method)
        assert Base.__dict__["__getattr__"] is method
        assert read(module) == (answer, "missing")
        assert read(type("Later", (Derived,), {})()) == (answer, "missing")

    # What slots know by themselves, and what the class has not had.
    native.set_method(Base, "__setattr__", lambda self, name, value: self.__dict__.update({name: -value}))
    module.value = 1
    assert module.value == -1
    native.set_method(Base, "__setattr__", object.__setattr__)
    module.value = 1
    assert module.value == 1
    native.set_method(Base, "__len__", lambda self: 3)
    assert len(module) == 3
    with pytest.raises(TypeError, match="immutable"):
        native.set_method(dict, "__len__", lambda self: 3)

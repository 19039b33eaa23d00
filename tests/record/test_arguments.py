"""What people write at first for `on`: it works, or the error has the right spelling."""

import pytest
import torch

import fastinit


@pytest.mark.parametrize("name", ["BF16", "torch.bfloat16", "Bf16-True", "bfloat16"])
def test_spellings_of_a_dtype_mean_it(name):
    with fastinit.on("cpu", name):
        assert torch.nn.Linear(2, 2).weight.dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_told_to_keep_its_parameters_in_fp32(name):
    with pytest.raises(ValueError, match=f"dtype='{name}' .* use dtype=\"fp32\""):
        fastinit.on("cpu", name)


@pytest.mark.parametrize("name", ["gpu", "auto"])
def test_devices_that_torch_does_not_have_are_told_cuda(name):
    with pytest.raises(ValueError, match=f"device='{name}' is not a device of torch; use \"cuda\""):
        fastinit.on(name)


def make():
    return torch.nn.Linear(2, 2)


def test_a_decorator_without_arguments_is_refused():
    with pytest.raises(TypeError, match=r'@fastinit\.on\("cuda", "bf16"\)'):
        fastinit.on(make)


def generator():
    yield make()


async def coroutine():
    return make()


async def asynchronous_generator():
    yield make()


@pytest.mark.parametrize("func", [torch.nn.Linear, generator, coroutine, asynchronous_generator])
def test_what_does_not_run_inside_of_a_decorator_is_not_decorated(func):
    with pytest.raises(TypeError, match=f"cannot decorate the .*{func.__name__}; decorate a function"):
        fastinit.on("cpu")(func)


def test_a_decorated_function_makes_its_model_in_a_block():
    assert fastinit.on("cpu", "fp16")(make)().weight.dtype is torch.float16


def test_a_model_is_no_function_to_decorate():
    with pytest.raises(TypeError, match="cannot decorate None; decorate a function"):
        fastinit.on("cpu")(None)


@pytest.mark.parametrize("device", [None, 3.5, "cpu:x", "gpu:0"])
def test_what_is_no_device_is_refused_in_one_sentence(device):
    with pytest.raises(ValueError, match=f"device={device!r} is not a device; use") as caught:
        fastinit.on(device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "function", [fastinit.materialize, fastinit.initialize, fastinit.uninitialized, fastinit.param_init_fn]
)
def test_a_class_in_place_of_a_model_is_refused(function):
    with pytest.raises(TypeError, match=f"fastinit.{function.__name__}: Linear is a class; pass a model"):
        function(torch.nn.Linear)
    with pytest.raises(TypeError, match=f"fastinit.{function.__name__}: it takes a torch.nn.Module, not one of dict"):
        function({"weight": torch.ones(1)})


def test_a_module_in_place_of_a_tensor_is_refused():
    with pytest.raises(TypeError, match=r"tensor=Linear\(.*must be a tensor or a sequence of tensors"):
        fastinit.fill_(make(), fastinit.Normal(), seed=0)

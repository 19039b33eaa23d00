"""What fastinit.on promises beyond the values: clean exit, isolation, seeds, memory, no garbage, aliases, refusals."""

import contextlib
import copy
import io
import math
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from models import (
    DTYPES,
    HALVES,
    SEED,
    assert_rounded_once,
    assert_same_bits,
    assert_same_structure,
    built,
    different,
    plain,
    registered,
    same_bits,
    state_of_torch,
)
from torch import nn
from torch.nn import init
from torch.nn.utils import parametrizations, parametrize

import fastinit

over_dtypes = pytest.mark.parametrize("dtype", DTYPES)
over_halves = pytest.mark.parametrize("dtype", HALVES)


def check(constructor, dtype="bf16"):
    """Fail unless the contract's first clause holds for a constructor: torch's structure, the fp32 model's values."""
    model = built(constructor, dtype)
    assert_same_structure(model, plain(constructor, dtype))
    assert_rounded_once(model, built(constructor, "fp32"))
    return model


def check_deterministic(constructor, dtype="bf16"):
    """The same for a constructor without random numbers, whose values are torch's own."""
    model = check(constructor, dtype)
    assert_rounded_once(model, plain(constructor, "fp32"))
    assert_same_bits(built(constructor, "fp32"), plain(constructor, "fp32"))
    return model


def holding(**tensors):
    """Return a constructor of a module with the results of functions: parameters, or buffers if the name says so."""

    def construct():
        module = nn.Module()
        for name, make in tensors.items():
            if name.startswith("buffer"):
                module.register_buffer(name, make())
            else:
                setattr(module, name, nn.Parameter(make()))
        return module

    return construct


def small_model():
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Embedding(9, 5, padding_idx=1), nn.LSTM(5, 7))


# Clean exit --------------------------------------------------------------------------------------------


@over_dtypes
def test_everything_is_put_back_on_exit(dtype):
    built(small_model, dtype)  # the first block of a process wraps two constructors of torch.Tensor
    before = state_of_torch()
    built(small_model, dtype)
    assert not different(before, state_of_torch())


@over_dtypes
def test_everything_is_put_back_after_an_exception(dtype):
    before = state_of_torch()
    with pytest.raises(KeyError, match="planned"):
        with fastinit.on("cpu", dtype):
            layer = nn.Linear(7, 5)
            raise KeyError("planned")
    assert not different(before, state_of_torch())
    assert layer.weight.dtype == DTYPES[dtype] and torch.isfinite(layer.weight).all() and layer.weight.any()


def test_an_exception_inside_a_constructor_leaves_a_usable_context():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            raise ValueError("planned")

    with fastinit.on("cpu", "bf16", seed=SEED):
        with pytest.raises(ValueError, match="planned"):
            Broken()
        layer = nn.Linear(30, 30)
    # Broken drew streams 0 and 1.
    bound = 1 / math.sqrt(30)
    weight = fastinit.fill_(torch.empty(30, 30), fastinit.Uniform(-bound, bound), seed=SEED, stream=2)
    assert same_bits(layer.weight.detach(), weight.bfloat16())


@pytest.mark.parametrize("outside", [torch.float64, torch.bfloat16])
def test_the_callers_default_dtype_is_put_back(outside):
    torch.set_default_dtype(outside)
    try:
        model = built(small_model, "fp16")
        assert torch.get_default_dtype() == outside
        assert model[0].weight.dtype == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(model, built(small_model, "fp16"))


def test_a_default_dtype_of_half_precision_is_what_dtype_none_means():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fastinit.on("cpu", seed=SEED):
            model = small_model()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(model, built(small_model, "bf16"))


def test_the_model_works_after_the_context_as_any_other():
    model = built(small_model, "bf16")
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    model[0](torch.ones(2, 20, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)
    again = pickle.loads(pickle.dumps(model))
    assert_same_bits(again, model)
    assert_same_bits(copy.deepcopy(model), model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert_same_bits(nn.ModuleList([model]), nn.ModuleList([model]))
    assert {k: v.dtype for k, v in torch.load(file).items()} == {k: v.dtype for k, v in model.state_dict().items()}
    assert model.float()[0].weight.dtype == torch.float32
    for tensor in registered(model).values():
        assert type(tensor) in (nn.Parameter, torch.Tensor) and tensor.untyped_storage().nbytes() == tensor.nbytes


# Seeds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [small_model, lambda: nn.Linear(3, 3), lambda: None, lambda: nn.Transformer(8, 2, 1, 1)]
)
def test_a_context_takes_exactly_one_64_bit_draw_from_torch(make):
    torch.manual_seed(5)
    with fastinit.on("cpu", "bf16"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(after, torch.get_rng_state())


def test_a_seed_leaves_every_generator_of_torch_alone():
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()

    def construct():
        torch.randperm(9), torch.randint(3, (4,)), torch.rand(3), torch.bernoulli(torch.full((3,), 0.5))
        torch.empty(4).exponential_(), torch.normal(torch.zeros(3), 1.0), nn.functional.dropout(torch.ones(4))
        return small_model()

    built(construct, "bf16")
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()


def test_manual_seed_decides_and_models_in_a_row_differ():
    def build():
        with fastinit.on("cpu", "bf16"):
            return small_model()

    torch.manual_seed(1)
    first, second = build(), build()
    torch.manual_seed(1)
    assert_same_bits(first, build())
    assert_same_bits(second, build())
    assert not same_bits(first[0].weight, second[0].weight)


def test_a_seed_overrides_manual_seed():
    torch.manual_seed(1)
    first = built(small_model, seed=3)
    torch.manual_seed(2)
    assert_same_bits(first, built(small_model, seed=3))
    assert not same_bits(first[0].weight, built(small_model, seed=4)[0].weight)


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64 - 1])
def test_all_64_bits_of_a_seed_count(seed):
    model = built(lambda: nn.Embedding(10, 10), seed=seed)
    expected = fastinit.fill_(torch.empty(10, 10), fastinit.Normal(), seed=seed, stream=0)
    assert same_bits(model.weight.detach(), expected)


def test_the_seed_that_was_drawn_can_be_given_back():
    with fastinit.on("cpu", "bf16") as report:
        first = small_model()
    assert_same_bits(first, built(small_model, "bf16", seed=report.seed))


def test_every_random_fill_counts_whether_or_not_it_is_executed():
    def with_a_second_init():
        layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        init.normal_(layers[0].weight)
        layers.append(nn.Linear(8, 8))
        return layers

    model = built(with_a_second_init)
    bound = 1 / math.sqrt(8)
    uniform = fastinit.Uniform(-bound, bound)
    # Two layers take 0 to 3, the second init 4, the third layer 5 and 6; fill 0 is dropped.
    for layer, weight_stream, distribution in ((0, 4, fastinit.Normal()), (1, 2, uniform), (2, 5, uniform)):
        expected = fastinit.fill_(torch.empty(8, 8), distribution, seed=SEED, stream=weight_stream)
        assert same_bits(model[layer].weight.detach(), expected), layer


def test_random_functions_that_torch_executes_repeat_with_the_seed():
    def construct():
        return holding(
            permutation=lambda: torch.randperm(50).float(),
            integers=lambda: torch.randint(0, 99, (50,)) / 7,
            exponential=lambda: torch.empty(50).exponential_(),
            bernoulli=lambda: torch.bernoulli(torch.full((50,), 0.5)),
            around=lambda: torch.normal(torch.arange(50.0), 0.1),
            picked=lambda: torch.rand(50)[torch.randperm(50)],
            dropped=lambda: nn.functional.dropout(torch.ones(50)),
        )()

    one, again, other = built(construct), built(construct), built(construct, seed=SEED + 1)
    assert_same_bits(one, again)
    for name, tensor in registered(one).items():
        assert not same_bits(tensor, registered(other)[name]), name
    assert_rounded_once(built(construct, "bf16"), one)


# Isolation -----------------------------------------------------------------------------------------------


def test_contexts_nest():
    with fastinit.on("cpu", "bf16", seed=1):
        first = nn.Linear(6, 6)
        with fastinit.on("cpu", "fp16", seed=2):
            inner = nn.Linear(6, 6)
            assert torch.get_default_dtype() == torch.float16
        assert torch.get_default_dtype() == torch.bfloat16
        second = nn.Linear(6, 6)
    whole = built(lambda: nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), "bf16", seed=1)
    assert_same_bits(nn.ModuleList([first, second]), whole)
    assert_same_bits(inner, built(lambda: nn.Linear(6, 6), "fp16", seed=2))


def test_an_inner_context_reads_and_writes_tensors_of_the_outer_one():
    with fastinit.on("cpu", "bf16", seed=1):
        layer = nn.Linear(6, 6)
        with fastinit.on("cpu", "bf16", seed=2):
            total = layer.weight.float().sum().item()
            init.ones_(layer.bias)
        with torch.no_grad():
            layer.weight.mul_(2)
    weight = built(lambda: nn.Linear(6, 6), "bf16", seed=1).weight.detach()
    assert total == weight.float().sum().item()
    assert torch.equal(layer.weight.detach(), weight * 2)
    assert (layer.bias == 1).all()


def test_an_inner_device_context_wins():
    def construct():
        with torch.device("meta"):
            inner = nn.Linear(4, 4)
            inner.register_buffer("table", torch.arange(3.0))
        return nn.ModuleList([nn.Linear(4, 4), inner, nn.Linear(4, 4, device="meta"), nn.Linear(4, 4)])

    for dtype in DTYPES:
        assert_same_structure(built(construct, dtype), plain(construct, dtype))


def test_an_outer_device_context_does_not_win():
    with torch.device("meta"):
        model = built(small_model, "bf16")
        assert torch.empty(1).is_meta
    assert_same_bits(model, built(small_model, "bf16"))


def test_threads_that_build_at_once_get_what_each_alone_gets():
    specifications = [("bf16", 1), ("fp16", 2), ("fp32", 3), ("bf16", 4)]
    alone = [built(small_model, dtype, seed=seed) for dtype, seed in specifications]
    together = [None] * len(specifications)
    barrier = threading.Barrier(len(specifications))

    def work(k):
        dtype, seed = specifications[k]
        barrier.wait()
        for _ in range(10):
            together[k] = built(small_model, dtype, seed=seed)

    before = state_of_torch()
    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(specifications))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, expected in zip(together, alone, strict=True):
        assert_same_bits(model, expected)
    assert not different(before, state_of_torch())


def test_a_thread_outside_of_the_context_is_not_affected():
    seen = {}

    def work():
        torch.manual_seed(0)
        seen["dtype"], seen["layer"], seen["default"] = torch.ones(2).dtype, nn.Linear(3, 3), torch.get_default_dtype()
        seen["legacy"] = torch.Tensor(2, 2).fill_(1.0)
        seen["truncated"] = init.trunc_normal_(torch.empty(5))

    state = torch.get_rng_state()
    try:
        with fastinit.on("cpu", "bf16", seed=SEED) as report:
            inside = nn.Linear(3, 3)
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        torch.manual_seed(0)
        expected, truncated = nn.Linear(3, 3), init.trunc_normal_(torch.empty(5))
    finally:
        torch.set_rng_state(state)
    assert seen["dtype"] == seen["default"] == seen["legacy"].dtype == torch.float32
    assert_same_bits(seen["layer"], expected)
    assert same_bits(seen["truncated"], truncated)
    assert report.fills_executed == 2
    assert_same_bits(inside, built(lambda: nn.Linear(3, 3), "bf16"))


def test_the_context_is_a_decorator():
    @fastinit.on("cpu", "bf16", seed=SEED)
    def make(width, depth=1):
        """Make it."""
        if depth:
            return nn.Sequential(nn.Linear(width, width), make(width, depth - 1))
        return nn.Linear(width, width)

    model = make(5)
    assert make.__name__ == "make" and make.__doc__ == "Make it."
    assert_same_bits(model[0], built(lambda: nn.Linear(5, 5), "bf16"))
    assert_same_bits(model[1], built(lambda: nn.Linear(5, 5), "bf16"))
    assert torch.get_default_dtype() == torch.float32


def test_a_context_object_can_be_entered_again():
    context = fastinit.on("cpu", "bf16", seed=SEED)
    with context:
        first = nn.Linear(5, 5)
    with context:
        second = nn.Linear(5, 5)
    assert_same_bits(first, second)


def test_the_defaults_that_constructors_read_are_the_targets():
    with torch.device("meta"), fastinit.on("cpu", "bf16", seed=SEED):
        assert torch.get_default_dtype() == torch.bfloat16
        assert torch.get_default_device() == torch.device("cpu")
        assert torch.empty(0).dtype == torch.bfloat16 and torch.empty(0).device.type == "cpu"
        assert torch.ones(3).dtype == torch.tensor(1.0).dtype == torch.arange(2.0).dtype == torch.bfloat16
        with torch.device("meta"):
            assert torch.get_default_device() == torch.device("meta")
        assert (torch.ones(2) + torch.ones(2, dtype=torch.float32)).dtype == torch.float32


def test_a_constructor_may_change_the_default_dtype_as_libraries_do():
    def construct():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        inner = nn.Linear(5, 5)
        torch.set_default_dtype(before)
        return nn.ModuleList([inner, nn.Linear(5, 5)])

    check(construct, "bf16")
    assert torch.get_default_dtype() == torch.float32


# Dtypes ----------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """The two ways of rotary tables: the dtype named, and left to the default."""

    def __init__(self, dim=16):
        super().__init__()
        named = 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.int64).to(dtype=torch.float) / dim))
        unnamed = 1.0 / (10000 ** (torch.arange(0, dim, 2) / dim))
        self.register_buffer("named", named, persistent=False)
        self.register_buffer("unnamed", unnamed, persistent=False)
        angles = torch.outer(torch.arange(9, dtype=torch.float32), named)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("half_cos", angles.cos().to(torch.get_default_dtype()))
        self.original = self.named


class Schedule(nn.Module):
    """Diffusion-like buffers that are computed from one another."""

    def __init__(self, steps=100):
        super().__init__()
        betas = torch.linspace(1e-4, 0.02, steps)
        alphas = 1.0 - betas
        self.register_buffer("betas", betas)
        self.register_buffer("products", torch.cumprod(alphas, dim=0))
        self.register_buffer("previous", nn.functional.pad(self.products[:-1], (1, 0), value=1.0))
        self.register_buffer("roots", torch.sqrt(1.0 / self.products))
        self.register_buffer("variance", self.betas * (1.0 - self.previous) / (1.0 - self.products))
        self.register_buffer("log_variance", torch.log(self.variance.clamp(min=1e-20)))


class StateSpace(nn.Module):
    """A state-space model's parameters."""

    def __init__(self, inner=24, states=8):
        super().__init__()
        self.A_log = nn.Parameter(torch.log(torch.arange(1, states + 1, dtype=torch.float32).repeat(inner, 1)))
        self.D = nn.Parameter(torch.ones(inner))
        self.dt = nn.Linear(4, inner)
        dt = torch.exp(torch.rand(inner) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        with torch.no_grad():
            self.dt.bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class Positions(nn.Module):
    """Sinusoidal positions, written slice by slice, and relative biases."""

    def __init__(self, length=20, dim=12):
        super().__init__()
        table = torch.zeros(length, dim)
        position = torch.arange(length).unsqueeze(1)
        scale = torch.exp(torch.arange(0, dim, 2) * -(math.log(10000.0) / dim))
        table[:, 0::2] = torch.sin(position * scale)
        table[:, 1::2] = torch.cos(position * scale)
        self.register_buffer("table", table.unsqueeze(0))
        slopes = torch.pow(2.0, -torch.arange(1, 9) * 8 / 8)
        self.register_buffer("alibi", slopes.view(8, 1, 1) * torch.arange(length).view(1, 1, length))
        mask = torch.full((length, length), float("-inf")).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("allowed", torch.tril(torch.ones(length, length, dtype=torch.bool)))
        self.register_buffer("counter", torch.tensor(0))


@pytest.mark.parametrize("model", [Rotary, Schedule, Positions])
@over_dtypes
def test_computed_buffers_are_torchs_fp32_values_rounded_once(model, dtype):
    check_deterministic(model, dtype)


@over_dtypes
def test_named_dtypes_are_kept(dtype):
    model = check(StateSpace, dtype)
    assert model.A_log.dtype == torch.float32 and model.D.dtype == DTYPES[dtype]
    rotary = built(Rotary, dtype)
    assert rotary.named.dtype == rotary.cos.dtype == torch.float32
    assert rotary.unnamed.dtype == rotary.half_cos.dtype == DTYPES[dtype]


NAMED = {
    "float()": lambda: torch.ones(3).float() / 3,
    "double()": lambda: torch.ones(3).double() / 3,
    "to": lambda: torch.ones(3).to(torch.float32) / 3,
    "type": lambda: torch.ones(3).type(torch.float32) / 3,
    "FloatTensor": lambda: torch.FloatTensor([0.1, 0.2]),
    "FloatTensor sizes": lambda: torch.FloatTensor(2, 3).fill_(0.1),
    "from_numpy": lambda: torch.from_numpy(np.array([0.1, 0.2], dtype=np.float32)),
    "tensor of an array": lambda: torch.tensor(np.array([0.1, 0.2], dtype=np.float32)),
    "tensor of fp64": lambda: torch.tensor(np.array([0.1, 0.2])),
    "as_tensor of an array": lambda: torch.as_tensor(np.linspace(0, 1, 5, dtype=np.float32)),
    "sum with dtype": lambda: torch.ones(3, 3).sum(0, dtype=torch.float32) / 7,
    "softmax with dtype": lambda: torch.softmax(torch.ones(3), 0, dtype=torch.float32),
    "mixed sum": lambda: torch.ones(3) / 3 + torch.ones(3, dtype=torch.float32),
    "mixed with a scalar tensor": lambda: torch.ones(3) / 3 + torch.tensor(0.1, dtype=torch.float32),
    "named scalar tensor": lambda: torch.tensor(0.1, dtype=torch.float32),
    "cat": lambda: torch.cat([torch.ones(3) / 3, torch.ones(2, dtype=torch.float32)]),
    "stack of unnamed": lambda: torch.stack([torch.ones(3) / 3, torch.full((3,), 0.1)]),
    "complex": lambda: torch.polar(torch.ones(3, dtype=torch.float32), torch.ones(3, dtype=torch.float32)),
    "half by name": lambda: torch.full((3,), 0.1, dtype=torch.float16),
    "bfloat16 by name": lambda: torch.full((3,), 0.1).bfloat16(),
    "integers": lambda: torch.arange(5),
    "integer quotient": lambda: torch.arange(5) / 3,
    "integer times float": lambda: torch.arange(5) * 0.1,
    "boolean": lambda: torch.ones(4) > 0.5,
    "legacy Tensor of a list": lambda: torch.Tensor([0.1, 0.2, 0.3]),
    "legacy Tensor of sizes": lambda: torch.Tensor(2, 3).fill_(0.1),
    "legacy Tensor of a size": lambda: torch.Tensor(torch.Size([2, 3])).fill_(0.1),
    "new": lambda: torch.ones(2).new(3).fill_(0.1),
    "new_tensor": lambda: torch.ones(2).new_tensor([0.1, 0.2]),
    "new_full": lambda: torch.ones(2, dtype=torch.float32).new_full((3,), 0.1),
    "ones_like": lambda: torch.ones_like(torch.ones(2, dtype=torch.float32)) / 3,
    "full_like with dtype": lambda: torch.full_like(torch.ones(2), 0.1, dtype=torch.float32),
    "scalar_tensor": lambda: torch.scalar_tensor(0.1),
    "tensor of nothing": lambda: torch.tensor([[]]),
    "tensor of bools": lambda: torch.tensor([True, False]),
    "tensor with gradient": lambda: torch.tensor([0.1, 0.2], requires_grad=True),
    "where": lambda: torch.where(torch.arange(4) > 1, 0.1, 0.2),
    "hann": lambda: torch.hann_window(9),
    "logspace": lambda: torch.logspace(0, 1, 5),
    "einsum": lambda: torch.einsum("i,j->ij", torch.arange(3.0) / 3, torch.arange(4.0) / 7),
    "meshgrid": lambda: torch.stack(torch.meshgrid(torch.arange(3) / 7, torch.arange(4) / 3, indexing="ij")),
    "interpolate": lambda: nn.functional.interpolate(torch.linspace(0, 1, 9).view(1, 1, 3, 3), 6, mode="bilinear"),
    "eye": lambda: torch.eye(4) / 3,
    "kron": lambda: torch.kron(torch.eye(2), torch.full((2, 2), 0.1)),
    "fftfreq": lambda: torch.fft.fftfreq(6),
    "matrix exponential": lambda: torch.matrix_exp(torch.full((3, 3), 0.1)),
    "empty then numpy": lambda: torch.from_numpy(np.full(3, 0.1)).to(torch.get_default_dtype()),
    "repeat": lambda: torch.linspace(0, 1, 3).repeat(2, 2),
    "norm": lambda: nn.functional.normalize(torch.arange(1.0, 5.0), dim=0),
    "chunks": lambda: torch.cat(torch.linspace(0, 1, 10).chunk(3)),
    "unbind": lambda: torch.stack(torch.linspace(0, 1, 10).view(2, 5).unbind(0)[::-1]),
    "topk": lambda: torch.linspace(0, 1, 10).topk(3).values,
    "index": lambda: (torch.arange(9) / 7)[torch.tensor([3, 1, 4])],
    "fancy": lambda: torch.linspace(0, 1, 9)[None, ::2].expand(3, -1).contiguous(),
    "out": lambda: torch.mul(torch.full((3,), 0.1), 3, out=torch.empty(3)),
    "masked": lambda: torch.linspace(-1, 1, 9).masked_fill(torch.arange(9) > 4, 0.1),
    "scan": lambda: torch.cumsum(torch.full((9,), 0.1), 0),
    "zero-sized": lambda: torch.zeros(0, 3),
    "multiple in another shape": lambda: 0.3 * torch.ones(3).unsqueeze(-1).unsqueeze(-1),
    "opposite in another shape": lambda: -torch.full((2, 6), 0.1).view(3, 4),
    "difference in another shape": lambda: 1 - torch.full((6,), 0.1).view(2, 3),
    "copy in another shape": lambda: torch.full((2, 3), 0.1).flatten().clone(),
    "copied in another shape": lambda: torch.empty(6).copy_(torch.full((2, 3), 0.1).view(-1)),
    "copied into another shape": lambda: torch.empty(6).view(2, 3).copy_(torch.full((2, 3), 0.1)),
    "eye in another shape": lambda: nn.init.eye_(torch.empty(12).view(4, 3)),
    "integers in the default dtype": lambda: torch.arange(5).to(torch.get_default_dtype()) * 0.3,
    "computed of a transposed one": lambda: torch.arange(6.0).view(2, 3).t() / 3,
    "copy of a transposed one": lambda: (torch.arange(24.0).view(2, 3, 4) / 7).permute(1, 2, 0).clone(),
    "integers copied": lambda: torch.ones(5).copy_(torch.arange(5)).mul_(0.1).add_(0.1),
    "integers copied to all rows": lambda: torch.ones(2, 6).view(4, 3).copy_(torch.arange(3)).mul_(0.1).add_(0.1),
    "integers as another": lambda: torch.arange(5).type_as(torch.ones(2)) / 3,
    "tolist": lambda: torch.tensor([x / 3 for x in torch.linspace(0, 1, 5).tolist()]),
}


@pytest.mark.parametrize("expression", NAMED)
@over_dtypes
def test_a_buffer_has_torchs_dtype_and_the_fp32_value(expression, dtype):
    check_deterministic(holding(buffer=NAMED[expression]), dtype)


NO_HALF_KERNEL = {
    "inverse": lambda: torch.linalg.inv(torch.eye(3) * 3 + 0.1),
    "eigenvalues": lambda: torch.linalg.eigvalsh(torch.diag(torch.arange(1.0, 5.0))),
    "cholesky": lambda: torch.linalg.cholesky(torch.eye(3) * 3 + 0.1),
    "orthogonal factor": lambda: torch.linalg.qr(torch.arange(9.0).view(3, 3)).Q,
    "singular values": lambda: torch.linalg.svdvals(torch.arange(6.0).view(2, 3)),
    "solution": lambda: torch.linalg.solve(torch.eye(3) * 3, torch.ones(3)),
}


@pytest.mark.parametrize("expression", NO_HALF_KERNEL)
@over_halves
def test_what_has_no_half_precision_kernel_works(expression, dtype):
    for constructor in (holding(buffer=NO_HALF_KERNEL[expression]), holding(parameter=NO_HALF_KERNEL[expression])):
        model = built(constructor, dtype)
        assert {tensor.dtype for tensor in registered(model).values()} == {DTYPES[dtype]}
        assert_rounded_once(model, plain(constructor, "fp32"))


@pytest.mark.parametrize(
    "expression", [name for name in NAMED if name not in ("integers", "boolean", "tensor of bools", "zero-sized")]
)
@over_halves
def test_a_parameter_has_torchs_dtype_and_the_fp32_value(expression, dtype):
    check_deterministic(holding(parameter=NAMED[expression]), dtype)


# Constructors that do more than create -------------------------------------------------------------------------------


class Reader(nn.Module):
    """Reads its own random weights."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 10))
        self.scale = nn.Parameter(self.w.norm(dim=1, keepdim=True).detach())
        self.largest = nn.Parameter(torch.tensor(self.w.abs().max().item()))
        self.copied = nn.Parameter(self.w.detach().clone())
        self.listed = nn.Parameter(torch.tensor(self.w[0].tolist()))
        self.text = repr(self.w)
        with torch.no_grad():
            self.w.div_(self.w.norm())
        self.gram = nn.Parameter((self.w @ self.w.t()).detach())
        self.register_buffer("running", self.w.data.mean(0))


class ForwardInside(nn.Module):
    """Finds a size by running a part of itself."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        with torch.no_grad():
            width = self.features(torch.zeros(1, 3, 12, 12)).shape[1]
        self.head = nn.Linear(width, 5)
        width = self.features(torch.rand(2, 3, 12, 12)).size(-1)
        self.other_head = nn.Linear(width, 5)


class DataDependent(nn.Module):
    """Centres itself on the activations of a random batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 6)
        with torch.no_grad():
            activations = self.layer(torch.randn(50, 10))
            self.layer.bias -= activations.mean(0)
            self.layer.weight /= activations.std(0)[:, None]


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList([torch.rand(3), nn.Parameter(torch.full((2,), 0.1)), torch.zeros(2, 2)])
        self.list.append(nn.Parameter(torch.randn(4), requires_grad=False))
        self.dict = nn.ParameterDict({"a": torch.rand(3)})
        self.dict["b"] = nn.Parameter(torch.ones(2) / 3)
        self.buffer = nn.Buffer(torch.full((3,), 0.1), persistent=False)
        self.persistent = nn.Buffer(torch.rand(3))
        self.nothing = nn.Parameter(torch.empty(0))
        self.register_parameter("absent", None)
        self.register_buffer("missing", None)


class Fused(nn.Module):
    """Parameters that are filled part by part, through views held across other operations."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.empty(30, 10))
        q, k, v = self.qkv.data.chunk(3)
        init.xavier_uniform_(q)
        init.normal_(k, std=0.02)
        self.bias = nn.Parameter(torch.zeros(30))
        self.bias.data[10:20].fill_(0.1)
        with torch.no_grad():
            self.bias[20:] = 0.7
        init.constant_(v, 1 / 3)
        q.mul_(0.5)
        flat = self.qkv.detach().view(-1)
        flat[-1] = 9.1
        self.conv = nn.Conv2d(4, 4, 3)
        nn.init.dirac_(self.conv.weight)
        self.conv.weight.data += torch.randn_like(self.conv.weight) * 0.01


class Replaced(nn.Module):
    """Assigns to .data, in the ways that code from before init functions does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.layer.weight.data = torch.rand(4, 6) * 0.1
        self.layer.bias.data = self.layer.bias.data.new(4).fill_(0.3)
        self.other = nn.Linear(6, 4)
        self.other.weight.data.copy_(self.layer.weight.data)
        self.other.bias.data.uniform_(-0.1, 0.1).add_(1.0)
        self.third = nn.Linear(6, 4)
        self.third.weight.data[:, 2:4].zero_()
        self.third.weight.data *= math.sqrt(2)
        self.third.bias = nn.Parameter(torch.from_numpy(np.arange(4) / 3).to(self.third.weight))
        del self.third.weight
        self.third.weight = nn.Parameter(torch.randn(4, 6).mul(0.3), requires_grad=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.view = nn.Parameter(self.embedding.weight.data)
        self.register_buffer("rows", self.embedding.weight.data[2:5])
        init.normal_(self.head.weight, std=0.5)
        self.again = self.head


class Pickler(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(5, 4)
        self.two = copy.deepcopy(self.one)
        self.three = pickle.loads(pickle.dumps(self.one))
        self.four = copy.copy(self.one)
        self.five = nn.Parameter(copy.deepcopy(self.one.weight.data))
        init.zeros_(self.one.weight)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        keep = torch.rand(8, 8) > 0.5
        self.w.data[~keep] = 0
        self.register_buffer("keep", keep)
        self.w.data.masked_fill_(torch.eye(8, dtype=torch.bool), 0.1)
        self.w.data[[0, 3]] = self.w.data[[3, 0]]
        self.w.data.index_fill_(0, torch.tensor([1]), 0.7)
        torch.nn.utils.parameters_to_vector([self.w])


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        for parameter in self.body.parameters():
            parameter.requires_grad = False
        self.body[0].bias.requires_grad_(True)
        self.register_parameter("extra", nn.Parameter(torch.zeros(3), requires_grad=False))
        self.body.eval()
        self.apply(self.reset)

    @staticmethod
    def reset(module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()


class Converted(nn.Module):
    """Converts parts of itself."""

    def __init__(self):
        super().__init__()
        self.single = nn.Linear(5, 5).float()
        self.half = nn.Linear(5, 5).half()
        self.double = nn.Linear(5, 5).to(torch.float64)
        self.same = nn.LayerNorm(5).to("cpu")
        self.default = nn.Linear(5, 5).to(torch.get_default_dtype())
        self.channels = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        self.kept = nn.Parameter(torch.rand(6, 5).t())


class WithGradient(nn.Module):
    """Leaves made with requires_grad, and hooks."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.rand(3, requires_grad=True))
        self.v = nn.Parameter(torch.tensor([0.1, 0.2], requires_grad=True))
        self.w.register_hook(lambda gradient: gradient * 2)


CONSTRUCTORS = {
    c.__name__: c
    for c in (
        *(Reader, ForwardInside, DataDependent, Containers, Fused, Replaced),
        *(Tied, Pickler, Masked, Frozen, Converted, WithGradient),
    )
} | {
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(7, 5)), nn.Linear(5, 3)),
    "old weight_norm": lambda: _old(nn.utils.weight_norm, nn.Conv1d(3, 5, 3)),
    "old spectral_norm": lambda: _old(nn.utils.spectral_norm, nn.Linear(7, 5)),
    "parametrize": lambda: _parametrized(),
    "pruned": lambda: _pruned(),
    "fused eval": lambda: nn.utils.fuse_conv_bn_eval(nn.Conv2d(3, 4, 3).eval(), nn.BatchNorm2d(4).eval()),
}


def _old(function, module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(module)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)

    def right_inverse(self, x):
        return x.triu()


def _parametrized():
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def _pruned():
    from torch.nn.utils import prune

    layer = nn.Linear(6, 6)
    prune.l1_unstructured(layer, "weight", amount=0.3)
    return layer


@pytest.mark.parametrize("name", CONSTRUCTORS)
@over_halves
def test_constructors_that_read_write_and_rearrange_their_parameters(name, dtype):
    check(CONSTRUCTORS[name], dtype)


@pytest.mark.parametrize("size", [5, 16])  # of so many rows torch takes any matrix in bf16 for an orthogonal one
@over_halves
def test_an_orthogonal_parametrization_works_although_torch_has_no_half_precision_qr(dtype, size):
    def construct():
        return parametrizations.orthogonal(nn.Linear(size, size))

    model, exact = built(construct, dtype), built(construct, "fp32")
    assert list(model.state_dict()) == list(plain(construct, "fp32").state_dict())
    assert {value.dtype for value in model.state_dict().values()} == {DTYPES[dtype]}
    assert_rounded_once(model, exact)


@over_halves
def test_spectral_norm_finds_the_largest_singular_value(dtype):
    def construct():
        return parametrizations.spectral_norm(nn.Linear(7, 5))

    model, exact = built(construct, dtype), built(construct, "fp32")
    assert_same_structure(model, plain(construct, dtype))
    assert same_bits(model.parametrizations.weight.original, exact.parametrizations.weight.original.to(DTYPES[dtype]))
    # Its power iteration is a forward pass that autograd sees, which is torch's own and starts from stored weights.
    for name in ("_u", "_v"):
        ours, theirs = (getattr(m.parametrizations.weight[0], name).float() for m in (model, exact))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-7)


def test_aliases_made_in_the_context_are_aliases_after_it():
    with fastinit.on("cpu", "bf16", seed=SEED):
        parameter = nn.Parameter(torch.empty(6, 4))
        data, detached, row, flat = parameter.data, parameter.detach(), parameter[2], parameter.view(-1)
        init.normal_(parameter)
        again = parameter.data
    with torch.no_grad():
        parameter.fill_(0.5)
    for alias in (data, detached, row, flat, again):
        assert (alias == 0.5).all() and alias.dtype == torch.bfloat16
    assert data.data_ptr() == parameter.data_ptr() == again.data_ptr() == flat.data_ptr()


def test_the_end_of_a_block_takes_work_in_proportion_to_the_number_of_aliases():
    def calls(aliases):
        found = []
        with contextlib.ExitStack() as block:
            block.enter_context(fastinit.on("cpu", "bf16", seed=SEED))
            weight = nn.Linear(2, 2).weight
            kept = [weight.detach() for _ in range(aliases)]
            sys.setprofile(lambda frame, event, argument: found.append(event))
            try:
                block.close()
            finally:
                sys.setprofile(None)
        assert all(type(each) is torch.Tensor for each in kept)
        return len(found)

    assert calls(400) < 3 * calls(200)


@over_dtypes
def test_a_parameter_that_gets_other_data_leaves_its_alias_behind(dtype):
    with fastinit.on("cpu", dtype, seed=SEED):
        data = torch.zeros(6)
        parameter = nn.Parameter(data)
        parameter.data = torch.ones(6)
        data.fill_(0.5)
    assert (parameter == 1).all() and (data == 0.5).all()
    with fastinit.on("cpu", dtype, seed=SEED):
        parameter, other = nn.Parameter(torch.zeros(6)), torch.ones(6)
        with torch.no_grad():
            parameter.set_(other)  # by now two tensors of one memory
        other.fill_(0.5)
    assert (parameter == 0.5).all() and parameter.data_ptr() == other.data_ptr()


def test_tensors_that_no_module_owns_are_written_too():
    with fastinit.on("cpu", "bf16", seed=SEED):
        kept = [torch.ones(300), torch.zeros(300), torch.randn(300), torch.rand(300) * 2, torch.arange(300.0) / 7]
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept)
    assert (kept[0] == 1).all() and not kept[1].any() and 0.8 < kept[2].float().std() < 1.2
    assert same_bits(kept[2], fastinit.fill_(torch.empty(300), fastinit.Normal(), seed=SEED, stream=0).bfloat16())
    assert same_bits(kept[3], fastinit.fill_(torch.empty(300), fastinit.Uniform(0, 2), seed=SEED, stream=1).bfloat16())
    assert same_bits(kept[4], (torch.arange(300.0) / 7).bfloat16())


def test_numpy_dlpack_and_addresses_see_final_values():
    with fastinit.on("cpu", "fp32", seed=SEED):
        layer = nn.Linear(10, 10)
        array = layer.weight.detach().numpy()
        capsule = torch.from_dlpack(layer.bias.detach())
        address = layer.weight.data_ptr()
        storage = layer.weight.untyped_storage()
    assert (array == layer.weight.detach().numpy()).all() and array.any()
    assert torch.equal(capsule, layer.bias.detach()) and address == layer.weight.data_ptr()
    assert storage.data_ptr() == address
    assert_same_bits(layer, built(lambda: nn.Linear(10, 10)))


# Checkpoints ---------------------------------------------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_loaded_inside_replaces_the_inits_of_what_it_supplies(dtype, assign):
    source = built(small_model, dtype, seed=1)
    checkpoint = source.state_dict()
    with fastinit.on("cpu", dtype, seed=2) as report:
        model = small_model()
        model.load_state_dict(checkpoint, assign=assign)
    assert_same_structure(model, source)
    assert_same_bits(model, source)
    assert report.fills_executed == 0


@over_dtypes
def test_a_partial_checkpoint_leaves_the_rest_as_the_seed_gives_it(dtype):
    source = built(small_model, dtype, seed=1)
    checkpoint = {name: value for name, value in source.state_dict().items() if name.startswith("0.")}
    with fastinit.on("cpu", dtype, seed=2) as report:
        model = small_model()
        result = model.load_state_dict(checkpoint, strict=False)
    assert set(source.state_dict()) - set(result.missing_keys) == {*checkpoint, "1.num_batches_tracked"}
    assert_same_bits(model[0], source[0])
    assert_same_bits(model[1:], built(small_model, dtype, seed=2)[1:])
    assert report.fills_dropped >= 2


def test_a_checkpoint_of_another_precision_is_converted():
    source = built(small_model, "fp32", seed=1)
    with fastinit.on("cpu", "bf16", seed=2):
        model = small_model()
        model.load_state_dict(source.state_dict())
    assert_rounded_once(model, source)
    assert model[0].weight.dtype == torch.bfloat16


def test_a_model_loads_its_own_checkpoint():
    with fastinit.on("cpu", "bf16", seed=2):
        model = small_model()
        model.load_state_dict(model.state_dict())
        other = small_model()
        other.load_state_dict(model.state_dict())
    assert_same_bits(model, built(small_model, "bf16", seed=2))
    assert_same_bits(model, other)


def test_a_wrong_checkpoint_is_refused_as_in_torch_and_leaves_the_init():
    with fastinit.on("cpu", "bf16", seed=2):
        model = small_model()
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict({"0.weight": torch.zeros(3, 3)}, strict=False)
    assert_same_bits(model, built(small_model, "bf16", seed=2))


def test_saving_inside_the_context_writes_final_values(tmp_path):
    with fastinit.on("cpu", "bf16", seed=2):
        model = small_model()
        torch.save(model.state_dict(), tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt")
    for name, value in model.state_dict().items():
        assert same_bits(saved[name], value), name


# Never garbage -------------------------------------------------------------------------------------------------------


class Forgotten(nn.Module):
    def __init__(self):
        super().__init__()
        self.forgotten = nn.Parameter(torch.empty(1000))
        self.partly = nn.Parameter(torch.empty(100, 10))
        init.ones_(self.partly[:50])


@over_dtypes
def test_a_parameter_that_nobody_writes_is_zero_and_named_in_a_warning(dtype):
    with pytest.warns(UserWarning, match=r"Forgotten\.forgotten"):
        model = built(Forgotten, dtype)
    assert not model.forgotten.any()
    assert (model.partly[:50] == 1).all() and not model.partly[50:].any()


def test_a_tensor_that_is_read_before_it_is_written_is_zero():
    with fastinit.on("cpu", "bf16", seed=SEED), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = torch.empty(1000).sum().item()
        module = nn.Module()
        module.register_buffer("copied", torch.empty(1000) * 2)
    assert read == 0 and not module.copied.any()


# Memory --------------------------------------------------------------------------------------------------------------


def run(code):
    """Run a script in a process of its own, where peak memory can be measured, and return what it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


MEMORY = """
import threading, time, torch, fastinit
from torch import nn

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * {page}

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def make(width, layers):
    def layer():
        module = nn.Linear(width, width)
        nn.init.trunc_normal_(module.weight, std=0.02)
        return module
    return nn.Sequential(*(layer() for _ in range(layers)), nn.Embedding(width, width, padding_idx=0))

with fastinit.on("cpu", "{dtype}", seed=0):
    make(64, 2)
before = resident()
with fastinit.on("cpu", "{dtype}", seed=0) as report:
    model = make(4096, {layers})
nbytes = sum(p.nbytes for p in model.parameters())
assert report.bytes == nbytes
print(nbytes, peak() - before, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype, layers", [("bf16", 11), ("fp32", 5)])
def test_a_large_model_takes_its_bytes_and_no_more(dtype, layers):
    import resource

    nbytes, peak, kept = map(int, run(MEMORY.format(dtype=dtype, layers=layers, page=resource.getpagesize())).split())
    assert nbytes > 380 << 20
    assert peak <= nbytes + (64 << 20)
    assert kept <= nbytes + (64 << 20)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("tpu", "bf16"), ["device", "tpu", "cpu", "cuda"]),
        (("meta", "bf16"), ["device", "meta", "cpu"]),
        (("cpu:x", "bf16"), ["device", "cpu:x"]),
        ((object(), "bf16"), ["device"]),
        (("cpu", "bf17"), ["dtype", "bf17", "bf16"]),
        (("cpu", torch.int8), ["dtype", "int8", "bf16"]),
        (("cpu", torch.complex64), ["dtype", "complex64", "float64"]),
        (("cpu", 16), ["dtype", "16"]),
        (("cpu", []), ["dtype", "bf16"]),
    ],
)
def test_bad_arguments_are_refused_by_name_value_and_remedy(arguments, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        fastinit.on(*arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64, 1.5, "0", True])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises((ValueError, TypeError), match="seed"):
        fastinit.on("cpu", "bf16", seed=seed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_missing_gpu_is_refused_on_entry_and_leaves_nothing_behind(device):
    before = state_of_torch()
    with pytest.raises(RuntimeError, match=r"cuda.*(cpu|GPU)"):
        with fastinit.on(device, "bf16"):
            raise AssertionError("the block must not run")
    assert not different(before, state_of_torch())


@pytest.mark.parametrize(
    "dtype, expected",
    [
        ("fp32", torch.float32),
        ("float32", torch.float32),
        ("32-true", torch.float32),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("16-true", torch.float16),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        (torch.float16, torch.float16),
        (None, torch.float32),
    ],
)
def test_the_usual_spellings_of_a_dtype(dtype, expected):
    with fastinit.on(torch.device("cpu"), dtype):
        assert nn.Linear(2, 2).weight.dtype == expected


# The report ----------------------------------------------------------------------------------------------------------


def test_the_report_counts_parameters_bytes_and_fills():
    with fastinit.on("cpu", "bf16", seed=SEED) as report:
        model = nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10))
        model[0].bias = model[1].bias
    assert report.parameters == 10 * 10 + 10 + 10
    assert report.bytes == 2 * report.parameters
    assert report.fills_executed == 3
    assert report.seconds > 0
    text = str(report)
    assert "120 parameters" in text and "3 fills" in text and "bfloat16" in text


def test_a_training_loop_inside_the_context_is_torchs_own():
    def train(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 8, dtype=torch.bfloat16)).pow(2).mean().backward()
            optimizer.step()
        return model.weight.detach()

    with fastinit.on("cpu", "bf16", seed=0):
        inside = train(nn.Linear(8, 8))
    with fastinit.on("cpu", "bf16", seed=0):
        model = nn.Linear(8, 8)
    assert torch.equal(inside, train(model))


def test_the_report_splits_the_time():
    with fastinit.on("cpu", "bf16", seed=0) as init:
        model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(8)])
    assert init.parameters == sum(parameter.numel() for parameter in model.parameters())
    parts = (init.seconds_python, init.seconds_allocation, init.seconds_fills)
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(init.seconds)


def test_materialize_adds_what_it_does_to_the_report():
    with fastinit.on("cpu", "bf16", seed=0, shard=True) as init:
        model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(8)])
    assert init.fills_executed == 0 and init.seconds_fills == 0.0
    before = init.seconds
    fastinit.materialize(model, report=init)
    parts = (init.seconds_python, init.seconds_allocation, init.seconds_fills)
    assert init.fills_executed == 16 and init.seconds > before
    assert all(part > 0 for part in parts) and sum(parts) == pytest.approx(init.seconds)

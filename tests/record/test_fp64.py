"""fp64, as the context's dtype or named by the code: torch's structure and values, draws of its CPU generator."""

import math

import pytest
import torch
from models import (
    SEED,
    WAYS,
    assert_same_bits,
    assert_same_structure,
    default_dtype,
    made,
    module_cases,
    random_names,
    registered,
    same_bits,
)
from ranks import on_every_rank
from safetensors.torch import save_file
from test_fast_path import both_ways
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import fastinit

CASES = module_cases()


def in_torch(constructor):
    with torch.random.fork_rng(devices=[]), default_dtype(torch.float64):
        torch.manual_seed(0)
        return constructor()


def drawn(key, stream, shape, draw):
    """What docs/stream-v1.md says of fp64, written a second time."""
    state = (key + (stream + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    generator = torch.Generator().manual_seed(state ^ (state >> 31))
    values = torch.empty(shape, dtype=torch.float64)
    draw(values, generator)
    return values


class Net(nn.Module):
    """Each kind of fill, steps, a region, chains that are computed of fills, and values that are no fill."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.embedding = nn.Embedding(9, 4, padding_idx=2)
        self.norm = nn.BatchNorm1d(3)
        self.conv = nn.Conv2d(2, 3, 3)
        nn.init.orthogonal_(self.conv.weight)
        self.lstm = nn.LSTM(3, 4)
        self.cut = nn.Parameter(nn.init.trunc_normal_(torch.empty(30, 7), std=0.02, a=-0.03, b=0.01))
        self.moved = nn.Parameter(torch.randn(6, 5) * 0.1 + 3)
        self.constant = nn.Parameter(torch.full((3, 3), 1 / 3))
        self.rates = nn.Parameter(torch.linspace(0.1, 0.9, 5).log())
        self.register_buffer("gains", torch.ones(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("constructor", [pytest.param(c, id=name) for name, c in CASES])
@pytest.mark.parametrize("way", WAYS)
def test_every_module_of_torch_has_torchs_structure_and_fixed_values(constructor, way):
    ours, reference = made(constructor, way, "fp64"), in_torch(constructor)
    assert_same_structure(ours, reference)
    random = random_names(constructor)
    for name, tensor in registered(reference).items():
        if name not in random and not nn.parameter.is_lazy(tensor):
            assert same_bits(registered(ours)[name], tensor), name
    if way != "at once":
        assert_same_bits(ours, made(constructor, "at once", "fp64"))


def test_fills_are_draws_of_torchs_generator_made_of_key_and_stream():
    model = made(Net, "at once", "fp64")
    bound = 1 / math.sqrt(5)
    expected = {
        "up.weight": (0, lambda x, g: nn.init.kaiming_uniform_(x, a=math.sqrt(5), generator=g)),
        "up.bias": (1, lambda x, g: x.uniform_(-bound, bound, generator=g)),
        "embedding.weight": (2, lambda x, g: x.normal_(generator=g)[2].zero_()),
    }
    for name, (stream, draw) in expected.items():
        tensor = model.get_parameter(name)
        assert torch.equal(tensor, drawn(SEED, stream, tensor.shape, draw)), name
    assert -0.03 <= model.cut.min() < -0.02 and 0.009 < model.cut.max() <= 0.01
    assert torch.equal(model.rates, torch.linspace(0.1, 0.9, 5, dtype=torch.float64).log())
    assert torch.allclose(
        model.conv.weight.flatten(1) @ model.conv.weight.flatten(1).T, torch.eye(3, dtype=torch.float64), atol=1e-14
    )
    assert abs(model.moved.mean() - 3) < 0.2 and model.moved.unique().numel() == 30


def test_fp64_has_names_and_may_be_torchs_default():
    expected = made(Net, "at once", "fp64")
    for name in ("float64", "double", "64", "64-true", torch.float64, "torch.float64"):
        with fastinit.on("cpu", name, seed=SEED) as init:
            assert_same_bits(Net(), expected)
        assert init.dtype is torch.float64
    with default_dtype(torch.float64), fastinit.on("cpu", seed=SEED):
        assert_same_bits(Net(), expected)


@pytest.mark.parametrize("way", WAYS)
def test_the_fast_path_changes_nothing(way):
    fast, plain = both_ways(lambda: made(Net, way, "fp64"))
    assert_same_bits(fast, plain)


def test_without_values_nothing_random_is_drawn_and_all_of_it_can_be_later():
    with fastinit.on("cpu", "fp64", seed=SEED, empty=True) as init:
        model = Net()
    assert {"up.weight", "cut", "moved", "conv.weight"} <= set(fastinit.uninitialized(model))
    assert "rates" not in fastinit.uninitialized(model) and init.fills_deferred >= 10
    with pytest.raises(RuntimeError, match=r"up\.weight .* was created without values"):
        model.up.weight.sum()
    fastinit.initialize(model, ["cut"])
    fastinit.initialize(model)
    assert_same_bits(model, made(Net, "at once", "fp64"))


def test_models_that_change_their_dtype_before_they_have_values_get_the_values_that_they_were_created_for():
    with fastinit.on("cpu", "fp64", seed=SEED, empty=True):
        narrowed = Net()
    narrowed.float()
    fastinit.initialize(narrowed)
    assert_same_bits(narrowed, made(Net, "at once", "fp64").float())
    for dtype in ("fp32", "bf16"):
        with fastinit.on("cpu", dtype, seed=SEED, empty=True):
            widened = Net()
        widened.double()
        fastinit.initialize(widened)
        exact = made(Net, "at once", "fp32").double()
        name = "up.weight"
        assert same_bits(widened.get_parameter(name), exact.get_parameter(name))


def test_windows_are_parts_of_the_whole():
    whole = dict(made(Net, "at once", "fp64").named_parameters())
    with fastinit.on("cpu", "fp64", seed=SEED, shard=True):
        model = Net()

    def window(name, shape):
        return tuple(slice(1, size - 1) for size in shape)

    fastinit.materialize(model, window=window)
    for name, parameter in model.named_parameters():
        if name != "rates":  # computed, and so whole
            assert same_bits(parameter, whole[name][window(name, whole[name].shape)].contiguous()), name


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_are_parts_of_the_whole_on_any_number_of_ranks(world):
    whole = dict(made(Net, "at once", "fp64").named_parameters())

    def on_rank(rank):
        mesh = init_device_mesh("cpu", (world,))
        with fastinit.on("cpu", "fp64", seed=SEED, shard=True):
            model = Net()
        fully_shard(model, mesh=mesh)
        fastinit.materialize(model)
        for name, parameter in model.named_parameters():
            parts = whole[name].chunk(world)
            part = parts[rank] if rank < len(parts) else whole[name][:0]
            assert same_bits(parameter.to_local().contiguous(), part.contiguous()), name
        wide = distribute_tensor(torch.zeros(4, 7, dtype=torch.float64), mesh, [Shard(1)])
        fastinit.fill_(wide, fastinit.Normal(), seed=9, stream=3)
        return wide.to_local()

    wide = fastinit.fill_(torch.zeros(4, 7, dtype=torch.float64), fastinit.Normal(), seed=9, stream=3)
    assert same_bits(torch.cat(on_every_rank(world, on_rank), 1), wide)


DISTRIBUTIONS = [
    fastinit.Normal(1.0, 2.0),
    fastinit.Uniform(-1, 3),
    fastinit.TruncatedNormal(0, 1, -1, 2),
    fastinit.Constant(1 / 3),
]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
def test_fill_draws_the_whole_for_any_part(distribution):
    whole = fastinit.fill_(torch.empty(6, 5, dtype=torch.float64), distribution, seed=7, stream=2)
    part = fastinit.fill_(
        torch.empty(5, 3, dtype=torch.float64).T, distribution, seed=7, stream=2, window=fastinit.Window((6, 5), (2, 0))
    )
    assert same_bits(part.contiguous(), whole[2:5].contiguous())
    draws = {
        fastinit.Normal: lambda x, g: x.normal_(1.0, 2.0, generator=g),
        fastinit.Uniform: lambda x, g: x.uniform_(-1, 3, generator=g),
        fastinit.TruncatedNormal: lambda x, g: nn.init.trunc_normal_(x, 0, 1, -1, 2, generator=g),
        fastinit.Constant: lambda x, g: x.fill_(1 / 3),
    }
    assert same_bits(whole, drawn(7, 2, (6, 5), draws[type(distribution)]))


def test_steps_are_torchs_arithmetic_in_fp64():
    def make():
        model = nn.Module()
        model.x = nn.Parameter(torch.rand(50).mul_(1.9).sub_(0.95).erfinv_().mul_(2**0.5).div_(3).clamp_(-0.5, 0.5))
        return model

    for way in WAYS:
        expected = drawn(SEED, 0, (50,), lambda x, g: x.uniform_(generator=g))
        expected = expected.mul(1.9).sub(0.95).erfinv().mul(2**0.5).div(3).clamp(-0.5, 0.5)
        assert same_bits(made(make, way, "fp64").x.detach(), expected), way


def test_a_seed_of_the_constructors_own_decides_alone():
    def frozen():
        torch.manual_seed(42)
        return nn.Linear(3, 4)

    with fastinit.on("cpu", "fp64", seed=1):
        first = frozen()
    with fastinit.on("cpu", "fp64", seed=2, empty=True):
        nn.Linear(9, 9)
        second = frozen()
    fastinit.initialize(second)
    assert_same_bits(first, second)


def test_tensors_that_exist_already_are_filled_from_the_blocks_streams():
    weight = torch.zeros(4, 6, dtype=torch.float64)
    with fastinit.on("cpu", "fp64", seed=SEED):
        nn.init.normal_(weight, std=2.0)
        weight.T[1:3].uniform_()
    expected = drawn(SEED, 0, (4, 6), lambda x, g: x.normal_(0, 2.0, generator=g))
    expected.T[1:3] = drawn(SEED, 1, (2, 4), lambda x, g: x.uniform_(generator=g))
    assert same_bits(weight, expected)


def test_a_checkpoint_in_another_dtype_is_loaded_and_the_rest_is_drawn(tmp_path):
    exact = made(Net, "at once", "fp64")
    state = {name: tensor.float() for name, tensor in exact.state_dict().items() if name.startswith("up")}
    save_file(state, tmp_path / "model.safetensors")
    report = fastinit.LoadReport()
    model = fastinit.load(
        Net, tmp_path / "model.safetensors", "cpu", "fp64", seed=SEED, strict=False, progress=False, report=report
    )
    assert "cut" in report.missing
    for name, tensor in model.state_dict().items():
        expected = exact.state_dict()[name]
        assert same_bits(tensor, expected.float().double() if name.startswith("up") else expected), name


class Mixed(nn.Module):
    """Dtypes that no context has: named by the code, they come out as in torch."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.linear = nn.Linear(3, 4, dtype=torch.float64)
        self.wave = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
        self.phase = nn.Parameter(torch.ones(5, dtype=torch.complex128) * 1j)
        self.codes = nn.Parameter(torch.randint(0, 9, (6,)), requires_grad=False)
        self.packed = nn.Parameter(torch.zeros(4, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.narrow = nn.Parameter(torch.randn(4, 4).to(torch.float8_e5m2), requires_grad=False)
        self.register_buffer("steps", torch.full((), 3, dtype=torch.int64))
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("way", WAYS)
def test_dtypes_that_the_code_names_come_out_as_in_torch(dtype, way):
    model = made(Mixed, way, dtype)
    reference = Mixed()
    assert_same_structure(model, reference)
    for name in ("packed", "steps", "mask"):
        assert same_bits(model.state_dict()[name], reference.state_dict()[name]), name
    assert torch.equal(model.phase, reference.phase)
    assert model.wave.detach().abs().std() > 0.1 and 0 <= model.codes.min() and model.codes.max() < 9
    assert_same_bits(model, made(Mixed, "at once", dtype))


def test_a_default_dtype_that_the_code_sets_means_what_it_means_in_torch():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                self.linear = nn.Linear(3, 4)
                self.scale = nn.Parameter(torch.linspace(0, 1, 4).exp())
                self.register_buffer("positions", torch.arange(4) / 3)
            finally:
                torch.set_default_dtype(before)
            self.after = nn.Linear(2, 2)

    for dtype in ("bf16", "fp32"):
        model, reference = made(Inner, "at once", dtype), Inner()
        assert model.linear.weight.dtype is torch.float64 and model.after.weight.dtype is not torch.float64
        assert same_bits(model.scale.detach(), reference.scale.detach())
        assert same_bits(model.positions, reference.positions)


def test_names_decide_fp64_streams_where_they_decide_the_others():
    def whole():
        return nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(4, 5)})

    def stage():
        return nn.ModuleDict({"second": nn.Linear(4, 5)})

    models = []
    for make, options in ((whole, {}), (stage, {}), (stage, {"shard": True}), (stage, {"empty": True})):
        with fastinit.on("cpu", "fp64", seed=SEED, streams="name", **options):
            models.append(make())
        fastinit.materialize(models[-1])
        fastinit.initialize(models[-1])
    for model in models[1:]:
        assert_same_bits(model["second"], models[0]["second"])

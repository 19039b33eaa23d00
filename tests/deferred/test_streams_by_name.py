"""`fastinit.on(..., streams="name")`: a tensor's name in its model decides what it draws, docs/stream-v1.md says how.

The reference is written here anew: a hash of the name gives the stream, and `fastinit.fill_` the values of that.
"""

import contextlib
import copy
import functools
import hashlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import golden
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from models import (
    DTYPES,
    HALVES,
    SEED,
    WAYS,
    assert_rounded_once,
    assert_same_bits,
    built,
    default_dtype,
    made,
    module_cases,
    registered,
    same_bits,
)
from programs import ROUNDING, Eager, Program
from ranks import Ranks
from test_fast_path import both_ways
from test_programs import STEPS, differences, thoroughly
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn import init
from torch.nn.utils import parametrizations

import fastinit
from fastinit.record import names

over_dtypes = pytest.mark.parametrize("dtype", DTYPES)
over_ways = pytest.mark.parametrize("way", WAYS)


def named(constructor, way="at once", dtype="fp32", streams="name", **options):
    """Return `constructor()` with all its values, made in one of the WAYS with its streams by name."""
    return made(constructor, way, dtype, streams=streams, **options)


def stream(name, place=0, number=0):
    told = name.encode("utf-8") + number.to_bytes(8, "little") + place.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "little")


def drawn(shape, distribution, *name_place_number, dtype="fp32"):
    """What a fill draws in a tensor of that name, as its n-th one, in the model of that number."""
    memory = torch.empty(shape, dtype=DTYPES[dtype])
    return fastinit.fill_(memory, distribution, seed=SEED, stream=stream(*name_place_number))


class Layer(nn.Module):
    """A random, a constant, a computed and an orthogonal weight, a fused projection, and noise in buffers."""

    def __init__(self, width=8):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.fused = nn.Linear(width, 3 * width)
        for part in self.fused.weight.chunk(3):
            init.xavier_uniform_(part)
        self.rotation = nn.Parameter(torch.empty(width, width))
        init.orthogonal_(self.rotation)
        step = torch.exp(torch.rand(width) * 2.0 - 4.0).clamp(min=1e-4)
        self.step = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.register_buffer("noise", torch.randn(width))
        self.register_buffer("projection", torch.randn(width), persistent=False)


class Model(nn.Module):
    def __init__(self, layers=range(4), embeds=True, adapted=False):
        super().__init__()
        if embeds:
            self.embedding = nn.Embedding(10, 8, padding_idx=3)
        if adapted:
            self.adapter = nn.Linear(8, 8)
        self.layers = nn.ModuleDict({str(layer): Layer() for layer in layers})


def assert_part_of(part, whole):
    """Fail unless every tensor of a model has the bits of the other model's tensor of that name."""
    expected = registered(whole)
    different = [name for name, tensor in registered(part).items() if not same_bits(tensor, expected[name])]
    assert not different, different


# --- the specification ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place", "number", "expected"),
    [
        ("weight", 0, 0, 0x148A5E4D9D7D6946),
        ("weight", 1, 0, 0xE32B09260032E863),
        ("weight", 0, 1, 0x92C13B23A1509C76),
        ("layers.4.attention.weight", 0, 0, 0x6D5C7B8FEC5D2087),
        ("größe", 2, 3, 0xA4BC8E07EC595D34),
    ],
)
def test_known_answers(name, place, number, expected):
    assert names.stream_of(name, place, number) == stream(name, place, number) == expected


@over_dtypes
def test_a_weight_is_drawn_from_the_stream_of_its_name(dtype):
    model = named(lambda: nn.Sequential(nn.Linear(4, 3), nn.Embedding(5, 4)), dtype=dtype)
    for name, tensor in {"0.weight": model[0].weight, "0.bias": model[0].bias}.items():
        assert same_bits(tensor, drawn(tensor.shape, fastinit.Uniform(-0.5, 0.5), name, dtype=dtype))
    assert same_bits(model[1].weight, drawn((5, 4), fastinit.Normal(), "1.weight", dtype=dtype))


@over_ways
def test_the_fills_of_one_tensor_count_their_places_in_what_is_left_of_them(way):
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(30, 4))
            init.uniform_(self.weight)
            init.normal_(self.weight)  # the fill before it is gone
            with torch.no_grad():
                self.weight[3].zero_()  # and a constant has no place
                for row in range(4, 25):
                    self.weight[row].uniform_()

    expected = drawn((30, 4), fastinit.Normal(), "weight", 0)
    expected[3] = 0
    for row in range(4, 25):
        expected[row] = drawn((4,), fastinit.Uniform(), "weight", row - 3)
    assert same_bits(named(Filled, way).weight, expected)


@over_ways
def test_a_name_decides_together_with_the_key(way):
    def constructor():
        return nn.Linear(3, 3)

    assert_same_bits(named(constructor, way), named(constructor, way))
    assert not same_bits(named(constructor, way).weight, named(constructor, way, seed=SEED + 1).weight)
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(named(constructor, way, seed=None).weight)
    assert same_bits(*states) and not same_bits(states[0], named(constructor, way).weight)


# --- what it is for ---------------------------------------------------------------------------------------------------


@over_dtypes
@over_ways
def test_a_stage_that_is_built_alone_has_the_weights_of_the_whole(way, dtype):
    whole = named(Model, dtype=dtype)
    for layers in (range(2), range(2, 4), [3]):
        assert_part_of(named(lambda chosen=layers: Model(chosen, embeds=False), way, dtype), whole)


@over_dtypes
@over_ways
def test_what_is_added_to_a_model_leaves_the_rest_as_it_was(way, dtype):
    larger = named(lambda: Model(range(5), adapted=True), way, dtype)
    assert_part_of(named(Model, way, dtype), larger)


@over_ways
def test_layers_that_threads_build_have_the_weights_of_those_that_are_built_in_order(way):
    def layer(number):
        return named(Layer, way, streams=lambda name: f"layers.{number}.{name}")

    with ThreadPoolExecutor(4) as threads:
        layers = list(threads.map(layer, reversed(range(4))))
    whole = named(Model)
    for built_alone, of_the_whole in zip(reversed(layers), whole.layers.values(), strict=True):
        assert_same_bits(built_alone, of_the_whole)


def test_a_function_numbers_the_layers_of_a_stage_and_gives_its_head_the_embeddings_weights():
    class Language(nn.Module):
        def __init__(self, layers, first=True):
            super().__init__()
            if first:
                self.embedding = nn.Embedding(6, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
            self.head = nn.Linear(8, 6, bias=False)
            init.normal_(self.head.weight)
            if first:
                self.head.weight = self.embedding.weight

    def in_the_whole(name):
        kind, _, rest = name.partition(".")
        if kind == "head":
            return "embedding.weight"
        number, _, rest = rest.partition(".")
        return f"layers.{int(number) + 2}.{rest}"

    whole, stage = named(lambda: Language(4)), named(lambda: Language(2, first=False), streams=in_the_whole)
    assert_same_bits(stage.layers, whole.layers[2:])
    assert same_bits(stage.head.weight, whole.head.weight)


@over_dtypes
def test_a_checkpoint_that_is_loaded_in_the_block_leaves_the_rest_as_it_was(dtype):
    loaded = {"linear.weight": torch.full((8, 8), 0.25)}

    def constructor():
        layer = Layer()
        layer.load_state_dict(loaded, strict=False)
        return layer

    expected = named(Layer, dtype=dtype)
    expected.load_state_dict(loaded, strict=False)
    assert_same_bits(named(constructor, dtype=dtype), expected)


# --- one model, however it is made ------------------------------------------------------------------------------------


@pytest.mark.parametrize("constructor", [pytest.param(c, id=name) for name, c in module_cases()])
def test_every_module_of_torch_is_the_same_in_every_way_and_precision(constructor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules are called in the block, so that their values are used there
        try:
            exact = named(constructor)
        except RuntimeError:
            assert any(map(nn.parameter.is_lazy, constructor().parameters()))
            return
        for way in ("empty", "sharded"):
            if not any(map(nn.parameter.is_lazy, exact.parameters())):
                assert_same_bits(named(constructor, way), exact)
        assert_rounded_once(named(constructor, dtype="bf16"), exact)


@pytest.mark.parametrize(
    "name", [name for name, model in golden.MODELS.items() if golden.transformers or not model.of_transformers]
)
def test_whole_models_are_the_same_in_every_way(name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fastinit.on: names decide")
        exact = named(golden.MODELS[name].make)
        for way in ("empty", "sharded"):
            assert_same_bits(named(golden.MODELS[name].make, way), exact)


@over_dtypes
def test_the_fast_path_changes_nothing(dtype):
    fast, slow = both_ways(lambda: named(Model, dtype=dtype))
    assert_same_bits(fast, slow)


# --- values that are used in the block --------------------------------------------------------------------------------


class Blocks:
    """Contexts for a Program; `exchanged` has, for each in turn, the numbers of order and the streams of names."""

    def __init__(self, dtype="fp32", way="at once"):
        self.dtype, self.way, self.exchanged, self.entered = dtype, way, [], []

    @contextlib.contextmanager
    def __call__(self, seed, dtype=None):
        self.exchanged.append({})
        self.entered.append(self.exchanged[-1])
        try:
            with fastinit.on("cpu", dtype or self.dtype, seed=seed, streams="name", **WAYS[self.way]):
                yield
        finally:
            self.entered.pop()

    def program(self, steps):
        def with_streams(recipe, streams, changed):
            self.entered[-1].update(streams)
            return original(recipe, streams, changed)

        original = names.with_streams
        with mock.patch.object(names, "with_streams", with_streams), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fastinit.on: names decide")
            return Program(steps, self)


class EagerByName(Eager):
    """Torch with its random fills on the streams of names where a block has exchanged their numbers for those."""

    def __init__(self, seed, exchanged):
        super().__init__(seed)
        self.exchanged = exchanged

    def next_stream(self):
        seed, ordinal = super().next_stream()
        return seed, self.exchanged.get(ordinal, ordinal) if seed == self.seed else ordinal


def eagerly(steps, exchanged):
    blocks = iter(exchanged)

    @contextlib.contextmanager
    def context(seed, dtype=torch.float32):
        with default_dtype(dtype), EagerByName(seed, next(blocks)):
            yield

    return Program(steps, context)


@thoroughly
@given(STEPS)
def test_all_that_a_program_sees_and_leaves_agrees_with_what_its_fills_have_drawn(steps):
    blocks = Blocks()
    ours = blocks.program(steps)
    theirs = eagerly(steps, blocks.exchanged)
    assert not differences(ours, theirs)
    assert repr(ours.seen) == repr(theirs.seen)


@pytest.mark.parametrize("dtype", HALVES)
@thoroughly
@given(STEPS)
def test_a_program_in_half_precision_gives_the_fp32_values_rounded_once(dtype, steps):
    steps = [step for step in steps if step[0] not in ROUNDING]
    assert not differences(Blocks(dtype).program(steps), Blocks().program(steps))


@thoroughly
@given(STEPS)
def test_a_program_gives_the_same_without_the_fast_path(steps):
    fast, slow = both_ways(lambda: Blocks().program(steps))
    assert_same_bits(fast, slow)


class Read(nn.Module):
    """A weight whose values are used in the constructor, another one that has its values, and one that has not."""

    def __init__(self, use):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.weight = nn.Parameter(torch.empty(4, 4))
        init.normal_(self.weight)
        self.copy = nn.Parameter(self.weight.detach().clone())
        self.used = use(self.weight)
        self.last = nn.Linear(4, 4, bias=False)


USES = {
    "a norm": lambda weight: weight.detach().norm().item(),
    "an item": lambda weight: float(weight[1, 2]),
    "a list": lambda weight: weight.tolist(),
    "numpy": lambda weight: weight.detach().float().numpy().copy(),
    "a branch": lambda weight: bool((weight > 0).any()),
    "a copy into a part": lambda weight: torch.zeros(8, 4)[2:6].copy_(weight.detach()),
    "a function under autograd that reads nothing": lambda weight: weight.contiguous().shape,
    "a block": lambda weight: built(lambda: nn.Linear(2, 2)).weight.shape,
}


@pytest.mark.parametrize("name", USES)
@over_dtypes
@over_ways
def test_what_is_used_in_the_block_keeps_the_stream_of_its_order_and_a_warning_says_so(way, dtype, name):
    with pytest.warns(UserWarning, match=r"names decide what is drawn, but not of .*(weight|copy)[:,]") as caught:
        model = named(lambda: Read(USES[name]), way, dtype)
    assert sum("names decide" in str(each.message) for each in caught) == 1
    memory = torch.empty(4, 4, dtype=DTYPES[dtype])
    by_order = fastinit.fill_(memory, fastinit.Normal(), seed=SEED, stream=1)
    assert same_bits(model.weight, by_order) and same_bits(model.copy, by_order)
    assert same_bits(model.last.weight, drawn((4, 4), fastinit.Uniform(-0.5, 0.5), "last.weight", dtype=dtype))
    if name == "a list":
        assert model.used == model.weight.tolist() if dtype == "fp32" else model.used != model.weight.tolist()


def test_what_is_used_once_keeps_its_order_in_the_fills_that_follow():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4))
            init.uniform_(self.weight)
            self.largest = self.weight.max().item()
            init.normal_(self.weight)

    for dtype in DTYPES:
        with pytest.warns(UserWarning, match=r"Again\.weight"):
            model = named(Again, dtype=dtype)
        memory = torch.empty(4, 4, dtype=DTYPES[dtype])
        assert same_bits(model.weight, fastinit.fill_(memory, fastinit.Normal(), seed=SEED, stream=1))


@over_ways
def test_what_is_computed_of_random_values_alone_has_the_streams_of_its_name(way):
    def weight_norm():
        layer = parametrizations.weight_norm(nn.Linear(6, 5))
        return nn.Sequential(nn.ModuleDict({"a": layer}), Layer())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = named(weight_norm, way)
    layer = model[0]["a"].parametrizations.weight
    norms = torch.linalg.vector_norm(layer.original1.detach(), dim=1, keepdim=True)
    torch.testing.assert_close(layer.original0.detach(), norms)  # of the very values that the other has
    alone = named(lambda: nn.ModuleList([nn.Identity(), Layer()]), way)
    assert_same_bits(model[1], alone[1])
    expected = torch.empty(8, 8)
    init.orthogonal_(expected, generator=None)
    assert torch.dist(model[1].rotation @ model[1].rotation.T, torch.eye(8)) < 1e-5


# --- which name -------------------------------------------------------------------------------------------------------


@over_ways
def test_a_tie_has_the_first_of_its_names_and_a_copy_the_values_of_the_first(way):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4, bias=False)
            self.embedding = nn.Embedding(4, 4)
            self.head.weight = self.embedding.weight
            self.target = copy.deepcopy(self.embedding)

    model = named(Tied, way)
    assert model.head.weight is model.embedding.weight
    assert same_bits(model.head.weight, drawn((4, 4), fastinit.Normal(), "head.weight"))
    assert same_bits(model.target.weight, model.head.weight)


@over_ways
def test_wrappers_leave_no_trace_in_a_name(way):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.compiled = torch.compile(nn.Linear(4, 4))
            self.checkpointed = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.Linear(4, 4))
            self.parallel = nn.DataParallel(nn.Linear(4, 4))
            self.fsdp = nn.Module()
            self.fsdp._fsdp_wrapped_module = nn.Linear(4, 4)
            self.mine = nn.Module()
            self.mine.module = nn.Linear(4, 4)  # no wrapper's

    model = named(Wrapped, way)
    tensors = {name: tensor for name, tensor in registered(model).items() if name.endswith("weight")}
    clean = ["compiled", "checkpointed.0", "checkpointed.1", "parallel", "fsdp", "mine.module"]
    assert len(tensors) == len(clean)
    for name, tensor in zip(clean, tensors.values(), strict=True):
        assert same_bits(tensor, drawn((4, 4), fastinit.Uniform(-0.5, 0.5), f"{name}.weight"))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _by_its_parameters(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def _by_units(model):
    policy = functools.partial(size_based_auto_wrap_policy, min_num_params=1)
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), auto_wrap_policy=policy)


WRAPPERS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "DDP without a broadcast": functools.partial(nn.parallel.DistributedDataParallel, init_sync=False),
    "DDP, compiled": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
    "FSDP1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "FSDP1 with its parameters": _by_its_parameters,
    "FSDP1 by units": _by_units,
    "FSDP2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
    "checkpoint": checkpoint_wrapper,
}


@pytest.mark.filterwarnings("ignore:.*(FSDP|deprecated|NO_SHARD)")
@over_ways
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_model_that_is_wrapped_in_the_block_has_the_values_of_its_names_before(wrap, way, one_rank):
    def layers():
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))

    def flat(model):
        return torch.cat([getattr(each, "_local_tensor", each).detach().flatten() for each in model.parameters()])

    assert same_bits(flat(named(lambda: WRAPPERS[wrap](layers()), way)), flat(named(layers, way)))


def test_buffers_have_names_and_what_no_module_has_is_drawn_by_its_order():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = torch.randn(3)  # stream 0
            self.register_buffer("noise", torch.randn(3))
            self.register_buffer("hidden", torch.randn(3), persistent=False)

    with fastinit.on("cpu", seed=SEED, streams="name") as report:
        model = Owner()
    assert same_bits(model.plain, fastinit.fill_(torch.empty(3), fastinit.Normal(), seed=SEED))
    assert same_bits(model.noise, drawn((3,), fastinit.Normal(), "noise"))
    assert same_bits(model.hidden, drawn((3,), fastinit.Normal(), "hidden"))
    assert report.streams == "name" and report.fills_by_order == 1
    assert "streams by name (1 by order)" in str(report)

    with pytest.warns(UserWarning, match=r"not of a parameter:"):
        with fastinit.on("cpu", seed=SEED, streams="name"):
            alone = nn.Parameter(torch.randn(3))
    assert same_bits(alone, model.plain)


def test_tensors_that_are_there_before_are_drawn_by_their_order():
    layer = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="names decide"), fastinit.on("cpu", seed=SEED, streams="name"):
        init.normal_(layer.weight)
    assert same_bits(layer.weight, fastinit.fill_(torch.empty(4, 4), fastinit.Normal(), seed=SEED))


def test_models_of_one_block_that_share_a_name_are_told_apart_by_their_number():
    def linear(number, name="weight"):
        return drawn((4, 4), fastinit.Uniform(-0.5, 0.5), name, 0, number)

    with fastinit.on("cpu", seed=SEED, streams="name"):
        ensemble = [nn.Linear(4, 4) for _ in range(3)]
        generator = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        critic = nn.Sequential(generator[0], nn.Linear(4, 4))  # shares its first layer
        apart = nn.ModuleDict({"elsewhere": nn.Linear(4, 4)})
    for number, member in enumerate(ensemble):
        assert same_bits(member.weight, linear(number))
    assert same_bits(generator[0].weight, linear(0, "0.weight"))
    assert same_bits(generator[1].weight, linear(0, "1.weight"))
    assert same_bits(critic[1].weight, linear(1, "1.weight"))
    assert same_bits(apart["elsewhere"].weight, linear(0, "elsewhere.weight"))


def test_modules_in_a_cycle_have_the_names_that_the_first_of_them_gives():
    def constructor():
        parent = nn.Module()
        parent.child = nn.Linear(4, 4)
        parent.child.parent = parent
        return parent

    model = named(constructor)
    assert same_bits(model.child.weight, drawn((4, 4), fastinit.Uniform(-0.5, 0.5), "weight"))


@over_ways
def test_a_seed_that_the_code_sets_decides_alone(way):
    class Frozen(nn.Module):
        def __init__(self, name):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(42)
                self.register_parameter(name, nn.Parameter(torch.randn(4, 4)))
            self.linear = nn.Linear(4, 4)

    one, other = named(lambda: Frozen("one"), way), named(lambda: Frozen("other"), way, seed=SEED + 1)
    assert same_bits(one.one, other.other)
    assert same_bits(one.linear.weight, drawn((4, 4), fastinit.Uniform(-0.5, 0.5), "linear.weight"))


def test_a_decorated_function_draws_by_name():
    @fastinit.on("cpu", seed=SEED, streams="name")
    def create():
        return Model()

    assert_same_bits(create(), named(Model))


def test_bad_arguments_are_refused():
    for streams in ("names", None, 1, ["order"]):
        with pytest.raises(ValueError, match=r"fastinit\.on: streams=.*\"order\", \"name\", or a function"):
            fastinit.on("cpu", streams=streams)
    with pytest.raises(TypeError, match=r"streams= returned None for 'weight'; return the name that counts"):
        named(lambda: nn.Linear(2, 2), streams=lambda name: None)
    with fastinit.on("cpu"):  # nothing is left behind
        assert nn.Linear(2, 2).weight.detach().norm() > 0


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    three = Ranks(3, tmp_path_factory)
    yield three
    three.end()


def _shards(inside, shard, dtype, layers):
    """The names of tensors that are not those of the whole model, where it is sharded in the block or after it."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    with fastinit.on("cpu", dtype, seed=SEED, shard=shard, streams="name"):
        model = Model(layers)
        if inside:
            for layer in model.layers.values():
                fully_shard(layer, mesh=mesh)
    if not inside:
        fully_shard(model, mesh=mesh)
    fastinit.materialize(model)
    whole = registered(named(Model, dtype=dtype))
    wrong = []
    for name, tensor in registered(model).items():
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not same_bits(gathered, whole[name]):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("shard", [False, True], ids=["at once", "sharded"])
@pytest.mark.parametrize("inside", [False, True], ids=["after the block", "in the block"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_hold_the_weights_of_the_whole_also_of_a_stage(ranks, world, inside, shard):
    assert ranks.run(_shards, inside, shard, "bf16", [1, 3], world=world) == [[]] * world


def _one_by_one():
    """Weights of layers that are sharded as they are made, before they have a place in the model."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    with fastinit.on("cpu", seed=SEED, shard=True, streams="name"):
        model = nn.Module()
        model.layers = nn.ModuleList()
        for _ in range(3):
            layer = nn.Linear(4, 4, bias=False)
            fully_shard(layer, mesh=mesh)
            model.layers.append(layer)
        model.weight = nn.Parameter(torch.empty(4, 4))
        init.uniform_(model.weight, -0.5, 0.5)
    fastinit.materialize(model)
    return [model.weight.detach(), *(layer.weight.full_tensor().detach() for layer in model.layers)]


def test_layers_that_are_sharded_one_by_one_as_they_are_made_differ(ranks):
    for weight, *layers in ranks.run(_one_by_one, world=2):
        for number, layer in enumerate(layers):
            assert same_bits(layer, drawn((4, 4), fastinit.Uniform(-0.5, 0.5), "weight", 0, number))
        assert same_bits(weight, drawn((4, 4), fastinit.Uniform(-0.5, 0.5), "weight", 0, 3))

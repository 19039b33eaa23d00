"""Accelerate: models on meta, checkpoints that it loads and dispatches, offloading, `Accelerator.prepare`, and FSDP2.

What Accelerate does without fastinit, on a model that torch made, is what is expected; values that fastinit initializes
are those of a model that it makes alone. FSDP2 runs on gloo processes (see ranks.py).
"""

import doctest
import functools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from models import DTYPES, SEED, Block, assert_same_bits, assert_same_structure, built, plain, registered, same_bits
from ranks import Ranks
from torch import nn
from torch.distributed.tensor import DTensor

import fastinit
import fastinit.accelerate

accelerate = pytest.importorskip("accelerate")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)
TOKENS = torch.arange(8).view(2, 4)


class Scaled(nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)
        self.gain = nn.Parameter(torch.randn(width) * 3)

    def forward(self, hidden):
        return super().forward(hidden) * self.gain


class Net(nn.Module):
    """Random, constant and computed tensors, a tie, buffers that are saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 16))
        nn.init.trunc_normal_(self.body[0].weight, std=0.02)
        self.norm = nn.LayerNorm(16)
        self.scaled = Scaled(16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("noise", torch.rand(16))
        self.register_buffer("table", torch.arange(16.0) / 4, persistent=False)

    def tie_weights(self):
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = self.norm(self.body(self.embedding(tokens).mean(1)) + self.noise + self.table)
        return self.head(self.scaled(hidden))


RANDOM_PARAMETERS = {"embedding.weight", "scaled.weight", "scaled.bias", "scaled.gain"} | {
    f"body.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")
}
# What the partial checkpoint lacks, and of that what is random.
LACKING = {"body.0.weight", "body.0.bias", "norm.weight", "norm.bias", "scaled.gain"}
LACKING_RANDOM = LACKING & RANDOM_PARAMETERS


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Paths: a file, the index of files, and a file with some tensors alone. Their values are of no init."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = plain(Net, seed=7)
    state = {
        name: (tensor * 1.01 + 0.1 if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "head.weight"
    }

    def save(name, names):
        safetensors.save_file({each: state[each] for each in names}, folder / name, metadata={"format": "pt"})

    save("whole.safetensors", state)
    save("part.safetensors", state.keys() - LACKING)
    (folder / "files").mkdir()
    parts = {"one.safetensors": sorted(state)[::2], "two.safetensors": sorted(state)[1::2]}
    for name, names in parts.items():
        save(f"files/{name}", names)
    index = {"weight_map": {each: name for name, names in parts.items() for each in names}}
    (folder / "files" / "model.safetensors.index.json").write_text(json.dumps(index))
    return {name.partition(".")[0]: str(folder / name) for name in ("whole.safetensors", "files", "part.safetensors")}


def on_meta(include_buffers=False):
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = Net()
    model.tie_weights()
    return model


def dispatched(checkpoint, make, **options):
    return accelerate.load_checkpoint_and_dispatch(make(), checkpoint, **options)


def output_of(model):
    with torch.no_grad():
        return model.eval()(TOKENS)


# --- init_empty_weights -----------------------------------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("include_buffers", [False, True])
def test_empty_weights_inside_of_the_block_are_on_meta_as_without_it(dtype, include_buffers):
    with fastinit.on("cpu", dtype, seed=SEED) as report:
        model = on_meta(include_buffers)
    assert_same_structure(model, plain(lambda: on_meta(include_buffers), dtype))
    assert all(parameter.is_meta for parameter in model.parameters())
    # Buffers that are not on meta are filled; of parameters, what the constructor computes with.
    assert report.fills_executed == (0 if include_buffers else 3), str(report)
    assert fastinit.uninitialized(model) == []


@over_dtypes
@pytest.mark.parametrize("include_buffers", [False, True])
def test_the_block_inside_of_empty_weights_gives_what_a_device_context_gives_there(dtype, include_buffers):
    def construct(context):
        with accelerate.init_empty_weights(include_buffers=include_buffers), context():
            return Net()

    model = construct(lambda: fastinit.on("cpu", dtype, seed=SEED))
    assert_same_structure(model, plain(lambda: construct(lambda: torch.device("cpu")), dtype))
    if include_buffers:  # the inner device wins, and the parameters are there
        assert_same_bits(model, built(Net, dtype))


@over_dtypes
@pytest.mark.parametrize("kind", ["whole", "files"])
def test_a_model_on_meta_is_loaded_inside_of_the_block_and_after_it(checkpoints, dtype, kind):
    expected = plain(lambda: dispatched(checkpoints[kind], on_meta, device_map={"": "cpu"}), dtype)
    inside = built(lambda: dispatched(checkpoints[kind], on_meta, device_map={"": "cpu"}), dtype)
    after = dispatched(checkpoints[kind], lambda: built(on_meta, dtype), device_map={"": "cpu"})
    # A buffer that no checkpoint holds is better than torch's where that computes in half precision.
    assert same_bits(inside.table, built(Net, dtype).table) and same_bits(after.table, inside.table)
    for model in (inside, after):
        assert_same_structure(model, expected)
        for name, tensor in model.state_dict().items():
            assert same_bits(tensor, expected.state_dict()[name]), name


# --- checkpoints ------------------------------------------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}], ids=str)
@pytest.mark.parametrize("kind", ["whole", "files", "part"])
def test_what_is_loaded_inside_of_the_block_is_not_initialized(checkpoints, dtype, kind, device_map):
    load = functools.partial(dispatched, checkpoints[kind], Net, device_map=device_map)
    with fastinit.on("cpu", dtype, seed=SEED) as report:
        model = load()
    expected, full = plain(load, dtype), built(Net, dtype)
    assert_same_structure(model, expected)
    lacking = LACKING if kind == "part" else set()
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, (full if name in lacking else expected).state_dict()[name]), name
    assert report.fills_executed == len(lacking), str(report)
    assert torch.isfinite(output_of(model)).all()


@over_dtypes
@pytest.mark.parametrize("options", [{}, {"empty": True}, {"shard": True}], ids=str)
@pytest.mark.parametrize("kind", ["whole", "files"])
def test_models_of_every_kind_are_loaded_after_the_block(checkpoints, dtype, kind, options):
    expected = plain(lambda: dispatched(checkpoints[kind], Net, device_map={"": "cpu"}), dtype)
    with fastinit.on("cpu", dtype, seed=SEED, **options):
        model = Net()
    model = accelerate.load_checkpoint_and_dispatch(model, checkpoints[kind], device_map={"": "cpu"})
    assert fastinit.uninitialized(model) == []
    assert_same_structure(model, expected)
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, expected.state_dict()[name]), name
    assert torch.isfinite(output_of(model)).all()


@over_dtypes
def test_what_a_checkpoint_lacks_is_named_and_initialized_after_it(checkpoints, dtype):
    with fastinit.on("cpu", dtype, seed=SEED, empty=True):
        model = Net()
    model = accelerate.load_checkpoint_and_dispatch(model, checkpoints["part"], device_map={"": "cpu"})
    assert set(fastinit.uninitialized(model)) == LACKING_RANDOM
    with pytest.raises(RuntimeError, match=r"body\.0\.(weight|bias).*nothing has written"):
        model(TOKENS)
    assert set(fastinit.initialize(model)) == LACKING_RANDOM
    assert_same_bits(model, built(lambda: dispatched(checkpoints["part"], Net), dtype))


def test_a_model_on_meta_is_materialized_after_a_checkpoint_that_lacks_some(checkpoints):
    with fastinit.on("cpu", "bf16", seed=SEED, shard=True):
        model = Net()
    accelerate.load_checkpoint_in_model(model, checkpoints["part"], device_map={"": "cpu"})
    assert set(fastinit.uninitialized(model)) == LACKING
    fastinit.materialize(model)
    model = accelerate.dispatch_model(model, {"": "cpu"})
    assert_same_bits(model, built(lambda: dispatched(checkpoints["part"], Net), "bf16"))


# --- dispatch and offloading ------------------------------------------------------------------------------------------


def to_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu", offload_buffers=True)


def to_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def by_map(model, folder):
    devices = dict.fromkeys(("embedding", "norm", "head", "noise", "table"), "cpu") | {"body": "disk", "scaled": "disk"}
    return accelerate.dispatch_model(model, devices, offload_dir=folder)


over_ways = pytest.mark.parametrize("offload", [to_disk, to_cpu, by_map])


@over_ways
@pytest.mark.parametrize("empty", [False, True])
def test_a_model_that_is_offloaded_computes_what_it_computed(tmp_path, offload, empty):
    expected = output_of(built(Net))
    with fastinit.on("cpu", seed=SEED, empty=empty):
        model = Net()
    if empty:
        fastinit.initialize(model)
    model = offload(model, tmp_path)
    assert fastinit.uninitialized(model) == []
    assert model.scaled.weight.is_meta
    assert torch.equal(output_of(model), expected)


def test_what_is_unwritten_is_refused_although_it_is_offloaded():
    with fastinit.on("cpu", seed=SEED, empty=True):
        model = Net()
    fastinit.initialize(model, [name for name in fastinit.uninitialized(model) if name != "scaled.weight"])
    model = to_cpu(model, None)
    assert fastinit.uninitialized(model) == ["scaled.weight"]
    with pytest.raises(RuntimeError, match=r"scaled\.weight .*nothing has written"):
        model(TOKENS)


def test_what_is_offloaded_to_the_cpu_is_initialized_there():
    with fastinit.on("cpu", seed=SEED, empty=True):
        model = Net()
    model = to_cpu(model, None)
    assert "scaled.weight" in fastinit.initialize(model)
    assert fastinit.uninitialized(model) == []
    assert torch.equal(output_of(model), output_of(built(Net)))


@pytest.mark.parametrize("offload", [to_disk, by_map])
def test_what_is_unwritten_is_not_offloaded_to_disk(tmp_path, offload):
    with fastinit.on("cpu", seed=SEED, empty=True):
        model = Net()
    fastinit.initialize(model, [name for name in fastinit.uninitialized(model) if name != "scaled.weight"])
    with pytest.raises(RuntimeError, match=r"scaled\.weight .*nothing has written"):
        offload(model, tmp_path)


# --- Accelerator ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(True)


def trained(model, accelerator=None, prepare=None):
    """The model after three steps, alone or with an accelerator."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    backward = torch.Tensor.backward
    if accelerator is not None:
        model, optimizer = prepare(model, optimizer)
        backward = lambda loss: accelerator.backward(loss)  # noqa: E731
    for _ in range(3):
        loss = model(TOKENS).float().square().mean()
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    return model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_prepared_model_trains_as_it_does_alone(accelerator, dtype):
    expected = trained(built(Net, dtype))
    assert_same_bits(trained(built(Net, dtype), accelerator, accelerator.prepare), expected)
    with fastinit.on(accelerator.device, dtype, seed=SEED):
        model = Net()
    assert_same_bits(trained(model, accelerator, functools.partial(fastinit.accelerate.prepare, accelerator)), expected)


def test_a_model_on_meta_gets_its_values_when_it_is_prepared_for_one_process(accelerator):
    with fastinit.on(accelerator.device, seed=SEED, shard=True):
        model = Net()
    prepare = functools.partial(fastinit.accelerate.prepare, accelerator)
    assert_same_bits(trained(model, accelerator, prepare), trained(built(Net)))


def test_other_objects_are_prepared_as_ever(accelerator):
    loader = torch.utils.data.DataLoader([1, 2, 3])
    assert type(fastinit.accelerate.prepare(accelerator, loader)) is type(accelerator.prepare(loader))


def test_importing_it_imports_no_accelerate():
    code = "import sys, fastinit.accelerate; assert 'accelerate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_of_its_docstring_runs(accelerator):
    names = {"accelerate": accelerate, "fastinit": fastinit, "torch": torch}
    accelerate.state.AcceleratorState._reset_state(True)
    result = doctest.testmod(fastinit.accelerate, extraglobs=names)
    assert result.attempted and not result.failed


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    two = Ranks(2, tmp_path_factory)
    yield two
    two.end()


class Decoder(nn.Module):
    """Sizes that two ranks do not divide, a tie, an init that needs the whole tensor, and a table that is not saved."""

    def __init__(self, width=11):
        super().__init__()
        self.embedding = nn.Embedding(13, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.mixer = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.mixer.weight)
        self.mixer.weight.requires_grad_(False)
        self.head = nn.Linear(width, 13, bias=False)
        self.tie_weights()
        self.register_buffer("table", torch.arange(11.0) / 4, persistent=False)

    def tie_weights(self):
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = self.embedding(tokens) + self.table
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.mixer(hidden))


def fsdp2(dtype, mixed, broadcasts, options, prepare, group):
    """What is found after `prepare`, and after two steps: values, whole, by name, and facts about the parameters."""
    rank, world = group["rank"], group["world_size"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    dist.init_process_group(**group)
    accelerate.state.AcceleratorState._reset_state(True)
    torch.manual_seed(rank)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed)
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=broadcasts,
        )
        # Accelerate takes the plugin on accelerators alone, although all of this runs on CPUs, too.
        accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        if mixed != "no":
            plugin.set_mixed_precision(mixed)
        with fastinit.on("cpu", dtype, **options):
            model = Decoder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model, optimizer = prepare(accelerator, model, optimizer)
        assert plugin.cpu_ram_efficient_loading == broadcasts
        local = [each._local_tensor for each in model.parameters()]
        values = whole(model)
        facts = {
            "sharded": all(isinstance(each, DTensor) for each in model.parameters()),
            "allocated": sum(each.untyped_storage().nbytes() for each in local),
            "tied": model.head.weight is model.embedding.weight,
            "trained": {id(each) for each in optimizer.param_groups[0]["params"]} == set(map(id, model.parameters())),
            "addresses": not any("data_ptr" in vars(each) for each in model.parameters()),
        }
        for _ in range(2):
            loss = model(TOKENS[:, :3]).float().square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return values, facts, whole(model)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


def whole(model):
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in registered(model).items()
    }


def with_fastinit(accelerator, *objects):
    return fastinit.accelerate.prepare(accelerator, *objects)


def with_accelerate(accelerator, *objects):
    return accelerator.prepare(*objects)


def sharded_before(accelerator, model, optimizer):
    """The same in steps, with Accelerate's own function: shard, materialize, then an optimizer."""
    accelerate.utils.fsdp2_prepare_model(accelerator, model)
    fastinit.materialize(model)
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))


@pytest.mark.parametrize(
    "dtype, mixed, broadcasts",
    [("fp32", "no", False), ("fp32", "no", True), ("bf16", "no", False), ("bf16", "bf16", True)],
)
def test_fsdp2_fills_each_ranks_part_and_trains_every_parameter(ranks, dtype, mixed, broadcasts):
    # With mixed precision Accelerate turns what is trained into fp32: values are those of fp32, not rounded first.
    full = built(Decoder, "fp32" if mixed == "bf16" else dtype)
    expected = registered(full)
    arguments = dtype, mixed, broadcasts, {"seed": SEED, "shard": True}, with_fastinit
    results = ranks.run(functools.partial(fsdp2, *arguments), world=2, joined=False)
    for values, facts, after in results:
        assert facts["sharded"] and facts["tied"] and facts["trained"] and facts["addresses"], facts
        assert facts["allocated"] < 0.65 * sum(each.nbytes for each in full.parameters())
        for name, value in values.items():
            exact = expected[name] if value.dtype == expected[name].dtype else expected[name].to(value.dtype)
            assert same_bits(value, exact), name
        same = {name for name, value in after.items() if torch.equal(value, values[name])}
        assert same == {"mixer.weight", "table"}
    assert all(torch.equal(results[0][2][name], results[1][2][name]) for name in results[0][2])


def test_fsdp2_trains_a_sharded_model_as_accelerate_trains_a_whole_one(ranks):
    def run(options, prepare, broadcasts=False):
        arguments = "fp32", "no", broadcasts, {"seed": SEED, **options}, prepare
        return ranks.run(functools.partial(fsdp2, *arguments), world=2, joined=False)[0]

    expected = run({}, with_accelerate)
    ways = [({"shard": True}, with_fastinit), ({"shard": True}, sharded_before), ({}, with_fastinit)]
    for options, prepare in ways:
        values, _, after = run(options, prepare)
        for name in values:
            assert torch.equal(values[name], expected[0][name]), name
            assert torch.equal(after[name], expected[2][name]), name
    broadcast, _, _ = run({}, with_accelerate, broadcasts=True)
    assert all(torch.equal(broadcast[name], expected[0][name]) for name in broadcast)


def test_fsdp2_ranks_that_are_seeded_differently_agree(ranks):
    arguments = "fp32", "no", False, {"shard": True}, with_fastinit
    results = ranks.run(functools.partial(fsdp2, *arguments), world=2, joined=False)
    torch.manual_seed(0)
    with fastinit.on("cpu"):
        expected = Decoder()
    for name, tensor in registered(expected).items():
        assert all(same_bits(values[name], tensor) for values, _, _ in results), name

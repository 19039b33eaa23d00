"""ZeRO-3: partitions hold the bits of the unsharded model, and DeepSpeed takes them for those of its own zero.Init.

Ranks are processes with gloo on the CPU, in which a test runs a function.
"""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch as safetensors_torch
import torch
import torch.distributed as dist
from ranks import SECONDS, Ranks, launched_by_deepspeed, read_bytes
from torch import nn
from torch.nn import functional

import fastinit
import fastinit.deepspeed

pytest.importorskip("deepspeed")

SEED = 0x5EED
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def run_on(tmp_path_factory):
    """What a function returns on each of so many ranks, which DeepSpeed takes for those of a launcher of its own."""
    ranks = Ranks(4, tmp_path_factory)
    yield lambda world, function, *args: ranks.run(_run, function, *args, world=world)
    ranks.end()


def _run(function, *args):
    launched_by_deepspeed()
    return function(*args)


# --- models ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Sizes that no number of ranks divides, ties, frozen parameters, a region that is zero, buffers of all kinds."""

    def __init__(self, width=33):
        super().__init__()
        self.embedding = nn.Embedding(21, width, padding_idx=3)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 21, bias=False)
        self.head.weight = self.embedding.weight
        self.shift = nn.Parameter(torch.zeros(width))
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.statistics = nn.BatchNorm1d(width, affine=False)
        self.register_buffer("rotation", torch.arange(4) ** -0.5, persistent=False)

    def forward(self, tokens, labels):
        hidden = self.norm(self.embedding(tokens))
        hidden = hidden + self.down(functional.gelu(self.up(hidden))) + self.shift
        return functional.cross_entropy(self.head(hidden).float().flatten(0, 1), labels.flatten())


class Unusual(nn.Module):
    """What zero.Init itself cannot create, or that no recipe describes."""

    def __init__(self):
        super().__init__()
        self.orthogonal = nn.Linear(12, 7)
        nn.init.orthogonal_(self.orthogonal.weight, gain=2.0)
        self.scalar = nn.Parameter(torch.tensor(0.3))
        self.computed = nn.Parameter(torch.log(torch.arange(1.0, 8)))
        self.empty = nn.Parameter(torch.empty(0, 5))
        self.single = nn.Parameter(torch.rand(1))
        self.transposed = nn.Parameter(torch.linspace(-1, 1, 15).reshape(3, 5).t())
        self.wide = nn.Parameter(torch.rand(6, dtype=torch.float32))
        self.truncated = nn.Parameter(nn.init.trunc_normal_(torch.empty(3, 9), std=0.5))


def config(dtype="fp32", **zero):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 40, **zero},
    }


def created(constructor, ds_config, dtype="fp32", seed=SEED):
    with fastinit.on("cpu", dtype, seed=seed, shard=fastinit.deepspeed.zero3(ds_config)):
        return constructor()


def unsharded(constructor, dtype="fp32", seed=SEED):
    with fastinit.on("cpu", dtype, seed=seed):
        return constructor()


def created_by_deepspeed(ds_config, values):
    """The same model under zero.Init, with the values of an unsharded one."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = Model()
    model.head.weight = model.embedding.weight
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
            parameter.copy_(values.get_parameter(name))
    return model


def bits(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


def gathered(model):
    import deepspeed

    values = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters(parameter):
            values[name] = parameter.detach().clone()
    return values


def assert_gathers_to(model, whole, dtype):
    expected = dict(whole.named_parameters(remove_duplicate=False))
    values = gathered(model)
    assert list(values) == list(expected)
    for name, value in values.items():
        assert value.dtype == dtype and value.shape == expected[name].shape, name
        assert torch.equal(bits(value), bits(expected[name].to(dtype))), name


def assert_slices_of(model, whole, ranks, index, attribute="ds_tensor"):
    """Each slice, with its padding, is one of the equal parts of the flattened parameter."""
    for name, parameter in model.named_parameters():
        values = whole.get_parameter(name).detach().to(parameter.dtype).reshape(-1)
        parts = functional.pad(values, (0, -len(values) % dist.get_world_size())).reshape(ranks, -1)
        piece = getattr(parameter, attribute)
        assert piece.shape == parts[index].shape and torch.equal(bits(piece), bits(parts[index])), name


def engine(model, ds_config):
    import deepspeed

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return deepspeed.initialize(model=model, config=ds_config, optimizer=optimizer)[0]


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(21, (2, 2 * dist.get_world_size(), 5), generator=generator)


def train(trained, steps=3):
    """Losses of steps on the same batch, of which each rank has an equal part."""
    rank, losses = dist.get_rank(), []
    tokens, labels = batch()[:, 2 * rank : 2 * rank + 2]
    for _ in range(steps):
        loss = trained(tokens, labels)
        trained.backward(loss)
        trained.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses


def train_unsharded(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(*batch())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_parameters_are_the_unsharded_models_bit_for_bit(run_on, dtype):
    run_on(2, _check_values, dtype)


def _check_values(dtype):
    for constructor in (Model, Unusual):
        model, whole = created(constructor, config(dtype), dtype), unsharded(constructor, dtype)
        assert_slices_of(model, whole, ranks=2, index=dist.get_rank())
        assert_gathers_to(model, whole, DTYPES[dtype])
        for name, parameter in whole.named_parameters():
            assert model.get_parameter(name).requires_grad == parameter.requires_grad, name
        buffers = dict(whole.named_buffers())
        for name, buffer in model.named_buffers():
            assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name


def test_parameters_of_a_partition_have_no_memory_but_their_slice(run_on):
    run_on(2, _check_memoryless)


def _check_memoryless():
    for parameter in created(Model, config()).parameters():
        assert parameter.numel() == 0 and parameter.device == torch.device("cpu")
        assert parameter.ds_tensor.untyped_storage().nbytes() == parameter.ds_tensor.nbytes


def test_tied_parameters_are_one_partition_and_references_stay_valid(run_on):
    run_on(2, _check_identity)


def _check_identity():
    references = []

    def constructor():
        model = Model()
        model.up.weight.note = "kept"
        references.extend(model.parameters())
        return model

    model = created(constructor, config())
    assert model.head.weight is model.embedding.weight
    assert all(a is b for a, b in zip(references, model.parameters(), strict=True))
    assert model.up.weight.note == "kept"
    assert len({parameter.ds_id for parameter in references}) == len(references)


def test_ranks_that_were_seeded_differently_agree(run_on):
    run_on(2, _check_agreement)


def _check_agreement():
    torch.manual_seed(dist.get_rank())
    model = created(Model, config(), seed=None)
    torch.manual_seed(0)
    assert_gathers_to(model, unsharded(Model, seed=None), torch.float32)


def test_creation_with_a_seed_does_not_communicate(run_on):
    run_on(2, _check_silence)


def _check_silence():
    shard = fastinit.deepspeed.zero3(config())
    # Rank 1 begins when rank 0 is done: if one needed the other, they would wait for ever.
    for rank in range(2):
        if rank == dist.get_rank():
            with fastinit.on("cpu", "fp32", seed=SEED, shard=shard):
                model = Model()
        dist.barrier()
    assert_gathers_to(model, unsharded(Model), torch.float32)


def test_one_object_serves_any_number_of_models_and_leaves_partitions_alone(run_on):
    run_on(2, _check_several)


def _check_several():
    shard = fastinit.deepspeed.zero3(config())
    with fastinit.on("cpu", seed=1, shard=shard):
        inner = Model()
    with fastinit.on("cpu", seed=2, shard=shard):
        outer = nn.ModuleList([inner, nn.Linear(3, 5)])
    assert_gathers_to(outer[0], unsharded(Model, seed=1), torch.float32)
    assert_gathers_to(outer[1], unsharded(lambda: nn.Linear(3, 5), seed=2), torch.float32)


def test_a_parameter_whose_dtype_the_code_names_is_trained_like_the_others(run_on):
    run_on(2, _check_named_dtype)


def _check_named_dtype():
    model, whole = created(Unusual, config("bf16"), "bf16"), unsharded(Unusual, "bf16")
    assert whole.wide.dtype == torch.float32 and model.wide.dtype == torch.bfloat16
    assert_gathers_to(model, whole, torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_the_slices(run_on):
    run_on(2, _check_memory)


def _check_memory():
    def resident(field):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s*(\d+) kB", status)[1]) * 1024

    created(lambda: nn.Linear(64, 64), config())
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = created(lambda: nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(4))), config())
    grown = resident("VmHWM") - before
    local = sum(parameter.ds_tensor.nbytes for parameter in model.parameters())
    assert local > 128 << 20
    assert grown < local + (64 << 20)


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_rank_loads_its_slices_and_reads_no_more(run_on, tmp_path, dtype):
    whole = unsharded(lambda: Model(333), seed=7)
    safetensors_torch.save_model(whole, tmp_path / "model.safetensors")
    read = run_on(4, _check_load, dtype, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0.9 * size < sum(read) <= 1.1 * size and max(read) <= 0.3 * size


def _check_load(dtype, path):
    model, whole = created(lambda: Model(333), config(dtype), dtype), unsharded(lambda: Model(333), seed=7)
    fastinit.load(model, path, progress=False)  # imports
    model = created(lambda: Model(333), config(dtype), dtype)
    before = read_bytes()
    fastinit.load(model, path, progress=False)
    read = read_bytes() - before
    assert_slices_of(model, whole, ranks=4, index=dist.get_rank())
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.rotation, whole.rotation.to(model.rotation.dtype))
    return read


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_every_kind_of_parameter_is_loaded_into_slices(run_on, tmp_path, name):
    state = {key: value.contiguous() for key, value in unsharded(Unusual, seed=7).state_dict().items()}
    {"model.safetensors": safetensors_torch.save_file, "model.pt": torch.save}[name](state, tmp_path / name)
    run_on(2, _check_load_of_unusual, tmp_path / name)


def _check_load_of_unusual(path):
    model = created(Unusual, config())
    fastinit.load(model, path, progress=False)
    assert_gathers_to(model, unsharded(Unusual, seed=7), torch.float32)


def test_what_does_not_fit_slices_is_refused_and_they_stay(run_on, tmp_path):
    for name, width in (("other", 34), ("model", 33)):
        safetensors_torch.save_model(unsharded(lambda: Model(width)), tmp_path / f"{name}.safetensors")  # noqa: B023
    run_on(2, _check_refused_loads, tmp_path)


def _check_refused_loads(folder):
    model, whole = created(Model, config()), unsharded(Model)
    with pytest.raises(fastinit.CheckpointError, match=r"size mismatch for up\.weight: .*\[68, 34\].*\[66, 33\]"):
        fastinit.load(model, folder / "other.safetensors", progress=False)
    assert_slices_of(model, whole, ranks=2, index=dist.get_rank())
    trained = engine(model, config())
    with pytest.raises(fastinit.CheckpointError, match=r"load them before deepspeed\.initialize"):
        fastinit.load(trained.module, folder / "model.safetensors", progress=False)
    model = created(OwnCode, config())
    with pytest.raises(fastinit.CheckpointError, match=r"OwnCode\._load_from_state_dict is loading code of its own"):
        fastinit.load(model, folder / "model.safetensors", progress=False)


class OwnCode(Model):
    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)


def test_a_model_is_trained_from_a_checkpoint_as_without_shards(run_on, tmp_path):
    safetensors_torch.save_model(unsharded(Model, seed=7), tmp_path / "model.safetensors")
    run_on(2, _check_training_from_a_checkpoint, tmp_path / "model.safetensors")


def _check_training_from_a_checkpoint(path):
    model = created(Model, config())
    fastinit.load(model, path, progress=False)
    assert train(engine(model, config())) == pytest.approx(train_unsharded(unsharded(Model, seed=7)), rel=1e-5)


# --- DeepSpeed's use of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_goes_as_with_zero_init_and_without_shards(run_on, dtype):
    run_on(2, _check_training, dtype)


def _check_training(dtype):
    ds_config, whole = config(dtype), unsharded(Model, dtype)
    ours, theirs = (
        engine(created(Model, ds_config, dtype), ds_config),
        engine(created_by_deepspeed(ds_config, whole), ds_config),
    )
    persistent = {name for name, parameter in ours.module.named_parameters() if parameter.ds_persist}
    assert persistent == {name for name, parameter in whole.named_parameters() if parameter.numel() <= 40}
    losses = train(ours)
    assert losses == train(theirs)
    for (name, value), other in zip(gathered(ours.module).items(), gathered(theirs.module).values(), strict=True):
        assert torch.equal(bits(value), bits(other)), name
    # The ranks average what each half of the batch gives: another order of sums, rounded to the dtype in each step.
    tolerance = 1e-5 if dtype == "fp32" else 2e-2
    assert losses == pytest.approx(train_unsharded(whole), rel=tolerance)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_checkpoints_are_interchanged_with_models_of_zero_init(run_on, tmp_path, dtype):
    run_on(2, _check_checkpoints, dtype, str(tmp_path))


def _check_checkpoints(dtype, directory):
    ds_config = config(dtype)
    ours = engine(created(Model, ds_config, dtype), ds_config)
    train(ours, steps=1)
    ours.save_checkpoint(directory, tag="ours")
    expected = gathered(ours.module)
    theirs = engine(created_by_deepspeed(ds_config, unsharded(Model, dtype, seed=2)), ds_config)
    theirs.save_checkpoint(directory, tag="theirs")
    other = engine(created(Model, ds_config, dtype, seed=3), ds_config)
    for loaded, tag, values in (
        (theirs, "ours", expected),
        (other, "ours", expected),
        (other, "theirs", dict(unsharded(Model, dtype, seed=2).named_parameters(remove_duplicate=False))),
    ):
        assert loaded.load_checkpoint(directory, tag=tag)[0] is not None
        for name, value in gathered(loaded.module).items():
            assert torch.equal(bits(value), bits(values[name])), (tag, name)


def test_the_attributes_are_those_of_zero_init(run_on):
    run_on(2, _check_attributes)


def _check_attributes():
    ours, theirs = created(Model, config()), created_by_deepspeed(config(), unsharded(Model))
    for (name, ours_), theirs_ in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert vars(ours_).keys() == vars(theirs_).keys(), name
        assert vars(ours_.ds_tensor) == vars(theirs_.ds_tensor), name
        assert type(ours_) is type(theirs_) and ours_.shape == theirs_.shape
        for attribute, value in vars(theirs_).items():
            plain = isinstance(value, (int, bool, str, tuple, set, type(None)))
            if plain and attribute != "ds_id":
                assert getattr(ours_, attribute) == value, (name, attribute)
        assert (ours_.ds_status, ours_.ds_param_type) == (theirs_.ds_status, theirs_.ds_param_type)


@pytest.mark.parametrize("pin", [False, True])
def test_slices_that_are_offloaded_to_the_cpu_are_filled_there(run_on, pin):
    run_on(2, _check_offload, pin)


def _check_offload(pin):
    ds_config = config("bf16", offload_param={"device": "cpu", "pin_memory": pin})
    model, whole = created(Model, ds_config, "bf16"), unsharded(Model, "bf16")
    assert_slices_of(model, whole, ranks=2, index=dist.get_rank())
    assert_gathers_to(model, whole, torch.bfloat16)
    losses = train(engine(model, ds_config))
    assert losses == pytest.approx(train_unsharded(whole), rel=2e-2)  # see _check_training


@pytest.mark.slow
def test_hpz_has_its_secondary_partition(run_on):
    run_on(4, _check_secondary)


def _check_secondary():
    ds_config = config(zero_hpz_partition_size=2)
    model, whole = created(Model, ds_config), unsharded(Model)
    assert_slices_of(model, whole, ranks=4, index=dist.get_rank())
    assert_slices_of(model, whole, ranks=2, index=dist.get_rank() % 2, attribute="ds_secondary_tensor")
    assert_gathers_to(model, whole, torch.float32)
    for parameter in model.parameters():
        # Where DeepSpeed gathers from in the first steps.
        parameter.all_gather_coalesced([parameter]).wait()
        parameter.partition()
    parameters = list(model.parameters())
    parameters[0].all_gather_coalesced(parameters).wait()
    for name, parameter in model.named_parameters():
        assert torch.equal(bits(parameter), bits(whole.get_parameter(name))), name
        parameter.partition()
    assert train(engine(model, ds_config)) == pytest.approx(train_unsharded(whole), rel=1e-5)  # see _check_training


def test_four_ranks_gather_what_two_gather(run_on):
    run_on(4, _check_four)


def _check_four():
    for constructor in (Model, Unusual):
        model, whole = created(constructor, config("bf16"), "bf16"), unsharded(constructor, "bf16")
        assert_slices_of(model, whole, ranks=4, index=dist.get_rank())
        assert_gathers_to(model, whole, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_from_every_kind_of_block_the_engine_gathers_the_unsharded_model(run_on, world):
    run_on(world, _check_blocks)


def _check_blocks():
    whole = unsharded(Model, "bf16")
    for shard in ({}, {"empty": True}, {"shard": fastinit.deepspeed.zero3(config("bf16"))}):
        with fastinit.on("cpu", "bf16", seed=SEED, **shard):
            model = Model()
        fastinit.initialize(model)
        assert_gathers_to(engine(model, config("bf16")).module, whole, torch.bfloat16)


@pytest.mark.parametrize("how", ["constructor", "from_config", "from_pretrained"])
def test_transformers_leaves_the_partitions_to_the_block(run_on, tmp_path, how):
    """Its own zero.Init, for the model in the constructor of another, would leave ranks that wait for each other."""
    transformers = pytest.importorskip("transformers")
    with fastinit.on("cpu", "bf16", seed=7):
        transformers.LlamaModel(_llama_config()).save_pretrained(tmp_path)
    run_on(2, _check_transformers, how, str(tmp_path))


def _llama_config():
    import transformers

    return transformers.LlamaConfig(
        vocab_size=21, hidden_size=8, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip


def _check_transformers(how, checkpoint):
    import transformers
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    def constructor():
        if how == "constructor":
            return transformers.LlamaForSequenceClassification(_llama_config())
        if how == "from_config":
            return transformers.AutoModelForSequenceClassification.from_config(_llama_config(), dtype="bfloat16")
        return transformers.LlamaForSequenceClassification.from_pretrained(checkpoint, num_labels=3, dtype="bfloat16")

    whole = unsharded(constructor, "bf16")
    active = HfDeepSpeedConfig(config("bf16"))  # as TrainingArguments(deepspeed=...) holds one
    model = created(constructor, config("bf16"), "bf16")
    assert_slices_of(model, whole, ranks=2, index=dist.get_rank())
    assert_gathers_to(model, whole, torch.bfloat16)
    assert is_deepspeed_zero3_enabled() and active.is_zero3()
    with pytest.raises(ZeroDivisionError):
        created(lambda: 1 / 0, config("bf16"))
    assert is_deepspeed_zero3_enabled()


def test_linear_layers_save_memory_unless_the_configuration_forbids_it(run_on):
    run_on(2, _check_linear)


def _check_linear():
    before = functional.linear
    try:
        functional.linear = torch._C._nn.linear
        created(lambda: nn.Linear(3, 4), config(memory_efficient_linear=False))
        assert functional.linear is torch._C._nn.linear
        created(lambda: nn.Linear(3, 4), config())
        assert functional.linear.__module__ == "deepspeed.runtime.zero.linear"
    finally:
        functional.linear = before


def test_a_model_leaves_no_trace_of_recipes(run_on):
    run_on(2, _check_traces)


def _check_traces():
    model = created(Model, config())
    assert not nn.modules.module._global_forward_pre_hooks
    assert fastinit.uninitialized(model) == []


# --- refusals -------------------------------------------------------------------------------------------------------

REFUSED = {
    "stage": ({"stage": 2}, r"zero_optimization\.stage=2"),
    "nvme": ({"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}, r"offload_param\.device='nvme'"),
    "quantized weights": ({"zero_quantized_weights": True}, r"zero_optimization\.zero_quantized_weights=True"),
    "frozen": (
        {"zero_quantized_nontrainable_weights": True},
        r"zero_optimization\.zero_quantized_nontrainable_weights=True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_before_a_model_is_built(run_on, name):
    zero, message = REFUSED[name]
    run_on(2, _check_refused, config(**zero), message)


def test_quantized_initialization_is_refused(run_on):
    quantized = {**config(), "weight_quantization": {"quantized_initialization": {"num_bits": 4}}}
    run_on(2, _check_refused, quantized, r"ds_config has weight_quantization=")


def _check_refused(ds_config, message):
    with pytest.raises(ValueError, match=message):
        fastinit.deepspeed.zero3(ds_config)


def test_another_dtype_than_the_configurations_is_refused_and_nothing_is_changed(run_on):
    run_on(2, _check_dtype)


def _check_dtype():
    models = []
    with pytest.raises(ValueError, match=r"dtype=torch\.float32, but shard=.* trains in torch\.bfloat16"):
        created(lambda: models.append(nn.Linear(3, 4)), config("bf16"), "fp32")
    (model,) = models
    assert fastinit.materialize(model) == ["weight", "bias"]
    assert torch.equal(model.weight, unsharded(lambda: nn.Linear(3, 4)).weight)


def test_parameters_that_the_code_puts_on_the_meta_device_are_refused(run_on):
    run_on(2, _check_meta)


def _check_meta():
    with pytest.raises(ValueError, match=r"Linear created its parameter 'weight' on the meta device"):
        created(lambda: nn.Linear(3, 4, device="meta"), config())


def test_importing_the_module_does_not_import_deepspeed():
    program = "import sys, fastinit.deepspeed; print('deepspeed' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_without_deepspeed_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"pip install 'torch-fastinit\[deepspeed\]'"):
        fastinit.deepspeed.zero3({})


@pytest.mark.parametrize("version", ["0.12.3", "0.20.0", "1.0.0+unknown"])
def test_versions_that_were_not_tested_are_refused(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(__version__=version))
    with pytest.raises(ImportError, match=re.escape(f"this is {version}")):
        fastinit.deepspeed.zero3({})


def test_the_range_of_versions_is_that_of_the_optional_dependency():
    first, end = (".".join(map(str, version)) for version in fastinit.deepspeed._VERSIONS)
    requirement = f'deepspeed = ["deepspeed>={first},<{end}"]'
    assert requirement in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_without_a_launcher_the_error_says_how_to_start():
    program = "import fastinit.deepspeed; fastinit.deepspeed.zero3({'train_batch_size': 1})"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**environment, "DS_ACCELERATOR": "cpu"},
    )
    assert "start the script with torchrun or deepspeed" in result.stderr

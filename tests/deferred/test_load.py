"""`fastinit.load`: real files of every format, what it refuses and when, and what it costs in memory."""

import enum
import functools
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import (
    DTYPES,
    SEED,
    assert_same_bits,
    assert_same_structure,
    built,
    module_cases,
    plain,
    registered,
    same_bits,
)
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.distributed._shard.sharded_tensor.metadata import MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations

import fastinit
from fastinit import CheckpointError, LoadReport, load
from fastinit.checkpoint import distributed, loading

ROOT = Path(__file__).parents[2]
X = torch.arange(6).reshape(2, 3)


class Net(nn.Module):
    """Random, constant and computed tensors, integers, a tie, and a buffer that is not in the state dict."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(23, 12)
        self.body = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.GELU(), nn.Linear(20, 12))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("table", torch.sin(torch.arange(12.0)))
        self.register_buffer("noise", torch.randn(12), persistent=False)
        self.head = nn.Linear(12, 23, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x).flatten(0, 1) * self.scale + self.table + self.noise
        return self.head(self.body(x))


def trained():
    """A model in fp32 whose tensors are all unlike those of a new one."""
    model = built(Net, seed=1)
    with torch.no_grad():
        for name, tensor in registered(model).items():
            if name != "head.weight":
                tensor.add_(3)
    return model


def save_torch(model, path):
    torch.save(model.state_dict(), path)


def save_bin_shards(model, folder):
    """What transformers wrote before safetensors: torch files and their index."""
    parts = {"a.bin": {}, "b.bin": {}}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        parts["ab"[number % 2] + ".bin"][name] = tensor
    folder.mkdir()
    for file, part in parts.items():
        torch.save(part, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def save_dcp(state, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is")
        dcp.save(state, checkpoint_id=folder)


def save_hub(model, folder, **options):
    folder.mkdir()
    huggingface_hub.save_torch_model(model, folder, **options)


# Each writes a checkpoint of a model under a path.
WRITERS = {
    "model.safetensors": save_model,
    "untied.safetensors": lambda model, path: save_file({n: t.clone() for n, t in model.state_dict().items()}, path),
    "reversed.safetensors": lambda model, path: save_file(
        {n: t.clone() for n, t in reversed(model.state_dict().items())}, path
    ),
    "shards": lambda model, folder: save_hub(model, folder, max_shard_size="2KB"),
    "one_file": save_hub,
    "model.pt": save_torch,
    "lightning.ckpt": lambda model, path: torch.save(
        {"state_dict": model.state_dict(), "epoch": 3, "optimizer_states": [{"state": {0: torch.ones(2)}}]}, path
    ),
    "legacy.pth": lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
    "no_suffix": save_torch,
    "bin_shards": save_bin_shards,
    "dcp": lambda model, folder: save_dcp(model.state_dict(), folder),
    "nested_dcp": lambda model, folder: save_dcp({"state_dict": model.state_dict(), "epoch": 3}, folder),
}
over_formats = pytest.mark.parametrize("name", WRITERS)


def written(tmp_path, name, model):
    WRITERS[name](model, tmp_path / name)
    return tmp_path / name


def saved(tmp_path, state, name="model.pt"):
    torch.save(state, tmp_path / name)
    return tmp_path / name


def quiet_load(model, path, *args, **kwargs):
    """Load without a bar on the CPU, with the seed of `built`."""
    if not isinstance(model, nn.Module):
        kwargs = {"device": "cpu", "seed": SEED, **kwargs}
    return load(model, path, *args, progress=False, **kwargs)


def copies_of(model):
    return {name: tensor.detach().clone() for name, tensor in registered(model).items()}


def assert_loaded(model, source):
    """Fail unless a model has the values of another one's state dict, rounded once."""
    state, expected = model.state_dict(), source.state_dict()
    assert list(state) == list(expected)
    wrong = [name for name in state if not same_bits(state[name], expected[name].to(state[name].dtype))]
    assert not wrong, wrong


def refused(model, path, match, **kwargs):
    """Fail unless loading raises, both into a model, which then is as it was, and for a model to be created."""
    before, objects = copies_of(model), {name: id(tensor) for name, tensor in registered(model).items()}
    with pytest.raises(CheckpointError, match=match) as error:
        quiet_load(model, path, **kwargs)
    assert objects == {name: id(tensor) for name, tensor in registered(model).items()}
    assert all(same_bits(tensor, registered(model)[name]) for name, tensor in before.items())
    dtype = next(model.parameters()).dtype
    with pytest.raises(CheckpointError, match=match):
        quiet_load(type(model), path, dtype=dtype, **kwargs)
    return str(error.value)


# Every format -------------------------------------------------------------------------------------------------------


@over_formats
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_created_model_has_the_checkpoints_values_rounded_once(tmp_path, name, dtype):
    source = trained()
    report = LoadReport()
    model = quiet_load(Net, written(tmp_path, name, source), dtype=dtype, report=report)
    assert_same_structure(model, plain(Net, dtype))
    assert_loaded(model, source)
    assert same_bits(model.noise, built(Net, dtype).noise)
    assert not report.missing and not report.unexpected
    assert model(X).isfinite().all()


@over_formats
def test_a_model_that_is_passed_is_loaded_in_place(tmp_path, name):
    source, model = trained(), built(Net, "bf16")
    before = {name: (id(tensor), tensor.data_ptr()) for name, tensor in registered(model).items()}
    assert quiet_load(model, written(tmp_path, name, source)) is model
    assert before == {name: (id(tensor), tensor.data_ptr()) for name, tensor in registered(model).items()}
    assert_loaded(model, source)
    assert same_bits(model.noise, built(Net, "bf16").noise)


@over_formats
def test_what_is_missing_has_the_bits_of_a_full_initialization(tmp_path, name):
    class Larger(Net):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(12, 30)
            self.norm = nn.LayerNorm(12)

    report = LoadReport()
    path = written(tmp_path, name, trained())
    model = quiet_load(Larger, path, dtype="bf16", strict=False, report=report)
    assert report.missing == ["more.weight", "more.bias", "norm.weight", "norm.bias"] and not report.unexpected
    full = built(Larger, "bf16")
    for missing in report.missing:
        assert same_bits(registered(model)[missing], registered(full)[missing])
    for supplied, tensor in trained().state_dict().items():
        assert same_bits(model.state_dict()[supplied], tensor.to(model.state_dict()[supplied].dtype))
    text = refused(full, path, "missing")
    assert all(missing in text for missing in report.missing)


@over_formats
def test_names_that_the_model_does_not_have_are_refused_or_left_out(tmp_path, name):
    class Smaller(Net):
        def __init__(self):
            super().__init__()
            del self.body[3], self.table
            self.table = 0

    path = written(tmp_path, name, trained())
    text = refused(built(Smaller), path, "unexpected")
    assert all(unexpected in text for unexpected in ("body.3.weight", "body.3.bias", "table"))
    report = LoadReport()
    model = quiet_load(Smaller, path, strict=False, report=report)
    assert sorted(report.unexpected) == ["body.3.bias", "body.3.weight", "table"] and not report.missing
    assert same_bits(model.body[0].weight, trained().body[0].weight)


@pytest.mark.parametrize(("case", "constructor"), module_cases(), ids=[case for case, _ in module_cases()])
def test_every_module_of_torch_is_loaded_as_load_state_dict_would(tmp_path, case, constructor):
    source = built(constructor, "bf16", seed=1)
    if any(nn.parameter.is_lazy(tensor) for tensor in registered(source).values()):
        pytest.skip("has no values yet")
    path = saved(tmp_path, source.state_dict())
    model = quiet_load(constructor, path, dtype="bf16", seed=2)
    assert_same_structure(model, source)
    assert_loaded(model, source)


def test_a_lazy_module_gets_its_shape_from_the_checkpoint(tmp_path):
    source = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    path = saved(tmp_path, source.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        model = quiet_load(lambda: nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d()), path)
    assert_loaded(model, source)
    assert model[0].weight.shape == (5, 7) and model[0].weight.requires_grad


def test_transformers_directories_are_loaded_with_their_ties(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    source = built(lambda: transformers.GPT2LMHeadModel(config), seed=1)
    source.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = quiet_load(lambda: transformers.GPT2LMHeadModel(config), tmp_path, dtype="bf16")
    assert_loaded(model, source)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_class_and_an_open_context_will_do(tmp_path):
    source = trained()
    path = written(tmp_path, "model.safetensors", source)
    with torch.device("meta"), torch.random.fork_rng():
        model = quiet_load(Net, path, dtype="bf16")
    assert_loaded(model, source)


def test_a_load_inside_the_context_runs_no_fill_for_what_it_supplies(tmp_path):
    state = trained().state_dict()
    del state["body.0.weight"], state["body.0.bias"]
    path = saved(tmp_path, state)
    with fastinit.on("cpu", "bf16", seed=SEED) as nothing:
        reference = Net()
        reference.load_state_dict(state, strict=False)
    with fastinit.on("cpu", "bf16", seed=SEED) as init:
        model = Net()
        quiet_load(model, path, strict=False, report=LoadReport())
    assert init.fills_executed == nothing.fills_executed and init.fills_dropped == nothing.fills_dropped
    assert_same_bits(model, reference)
    assert same_bits(model.body[0].weight, built(Net, "bf16").body[0].weight)


# What state dicts mean ----------------------------------------------------------------------------------------------


class WithExtraState(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.state = {"steps": 0}

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = {**state, "weight": self.layer.weight.sum().item()}


@pytest.mark.parametrize("name", ["model.pt", "lightning.ckpt", "dcp"])
def test_extra_state_is_set_after_the_tensors(tmp_path, name):
    source = WithExtraState()
    source.state = {"steps": 7, "mean": torch.ones(3), "list": [1, torch.zeros(2), {"a": "b"}]}
    model = quiet_load(WithExtraState, written(tmp_path, name, source))
    assert model.state["steps"] == 7 and torch.equal(model.state["mean"], torch.ones(3))
    assert torch.equal(model.state["list"][1], torch.zeros(2)) and model.state["list"][2] == {"a": "b"}
    assert model.state["weight"] == source.layer.weight.sum().item()


def test_extra_state_is_missing_or_unexpected_as_a_tensor_would_be(tmp_path):
    state = WithExtraState().state_dict()
    refused(built(lambda: nn.Sequential(nn.Linear(3, 3))), saved(tmp_path, {"0._extra_state": 1}), "0._extra_state")
    del state["_extra_state"]
    path = saved(tmp_path, state)
    model = WithExtraState()
    refused(model, path, "_extra_state")
    assert model.state == {"steps": 0}
    report = LoadReport()
    quiet_load(model, path, strict=False, report=report)
    assert report.missing == ["_extra_state"] and model.state == {"steps": 0}


def test_the_extra_state_of_a_shared_module_is_wanted_once(tmp_path):
    def make():
        model = nn.Module()
        model.one = model.other = WithExtraState()
        return model

    state = {name: value for name, value in make().state_dict().items() if name.startswith("other")}
    state["other._extra_state"] = {"steps": 5}
    assert quiet_load(make, saved(tmp_path, state)).one.state["steps"] == 5


def test_a_failed_load_sets_no_extra_state(tmp_path):
    source = WithExtraState()
    state = {**source.state_dict(), "layer.bias": torch.ones(4), "_extra_state": {"steps": 9}}
    model = WithExtraState()
    refused(model, saved(tmp_path, state), "size mismatch for layer.bias")
    assert model.state == {"steps": 0}


def test_the_count_of_an_old_batch_norm_may_be_missing(tmp_path):
    state = trained().state_dict()
    del state["body.1.num_batches_tracked"]
    path = tmp_path / "model.safetensors"
    del state["head.weight"]
    save_file(state, path)
    model = quiet_load(Net, path)
    assert model.body[1].num_batches_tracked == 0
    assert same_bits(model.body[1].running_var, trained().body[1].running_var)


def test_the_version_that_torch_files_keep_decides_what_may_be_missing(tmp_path):
    state = trained().state_dict()
    del state["body.1.num_batches_tracked"]
    assert state._metadata["body.1"] == {"version": 2}
    refused(built(Net), saved(tmp_path, state), "missing in the checkpoint: body.1.num_batches_tracked")


def test_a_scalar_may_be_stored_with_one_dimension(tmp_path):
    state = trained().state_dict()
    state["scale"] = state["scale"].reshape(1)
    assert quiet_load(Net, saved(tmp_path, state)).scale == trained().scale


def test_checkpoints_from_before_a_parametrization_are_translated(tmp_path):
    def new():
        return parametrizations.weight_norm(nn.Linear(6, 4))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = torch.nn.utils.weight_norm(nn.Linear(6, 4))
    model = quiet_load(new, saved(tmp_path, old.state_dict()))
    assert torch.equal(model.parametrizations.weight.original0, old.weight_g)
    assert torch.equal(model.parametrizations.weight.original1, old.weight_v)


def test_a_hook_of_torch_that_computes_with_the_stored_tensors_can(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        source = torch.nn.utils.spectral_norm(nn.Linear(6, 4))
        state = source.state_dict()
        del state["weight_v"]
        state["weight"] = source.weight.detach()
        path = saved(tmp_path, dict(state))  # without versions, as before torch 1.0
        model = quiet_load(lambda: torch.nn.utils.spectral_norm(nn.Linear(6, 4)), path)
        reference = torch.nn.utils.spectral_norm(nn.Linear(6, 4))
        reference.load_state_dict(dict(state))
    assert_loaded(model, reference)


class Fused(nn.Module):
    """Loads q and k of old checkpoints as one, and keeps a sum of what it loaded."""

    def __init__(self):
        super().__init__()
        self.qk = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.zeros(4))
        self.sum = None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[prefix + "qk"] = torch.cat([state_dict.pop(prefix + "q"), state_dict.pop(prefix + "k")])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.sum = self.qk.detach().sum()


def fused_net():
    return nn.Sequential(nn.Linear(3, 3), Fused())


@pytest.mark.parametrize("name", ["old.safetensors", "old.pt", "dcp"])
def test_a_models_own_loading_code_runs_as_in_load_state_dict(tmp_path, name):
    state = {**built(lambda: nn.Sequential(nn.Linear(3, 3)), seed=1).state_dict()}
    state.update({"1.q": torch.rand(2, 3), "1.k": torch.rand(2, 3), "1.bias": torch.rand(4)})
    path = tmp_path / name
    {"old.safetensors": save_file, "old.pt": torch.save, "dcp": save_dcp}[name](state, path)
    report = LoadReport()
    model = quiet_load(fused_net, path, dtype="bf16", report=report)
    reference = built(fused_net, "bf16")
    reference.load_state_dict(dict(state))
    assert_same_bits(model, reference)
    assert model[1].sum == reference[1].sum
    assert not report.missing and report.converted["0.weight"] == (torch.float32, torch.bfloat16)


def test_what_a_models_own_loading_code_does_not_find_right_is_refused(tmp_path):
    state = {"0.weight": torch.ones(3, 3), "1.q": torch.ones(2, 3), "1.k": torch.ones(2, 3), "1.bias": torch.ones(4)}
    for change, match in (
        ({}, "missing in the checkpoint: 0.bias"),
        ({"0.bias": torch.ones(4)}, "size mismatch for 0.bias"),
        ({"0.bias": torch.full((3,), 1e6)}, "0.bias has the value 1e.06"),
        ({"0.bias": torch.ones(3, dtype=torch.int64)}, "torch.int64 in the checkpoint"),
    ):
        path = saved(tmp_path, {**state, **change})
        with pytest.raises(CheckpointError, match=match):
            quiet_load(fused_net, path, dtype="fp16")
        with pytest.raises(CheckpointError, match=r"may hold a part of the checkpoint: Fused\._load_from_state_dict"):
            quiet_load(built(fused_net, "fp16"), path)


def test_hooks_of_the_model_rename_and_see_what_was_loaded(tmp_path):
    seen = []

    def make():
        model = nn.Sequential(nn.Linear(3, 3))

        def rename(module, state, prefix, *args):
            for name in [name for name in state if name.startswith("model.")]:
                state[name.removeprefix("model.")] = state.pop(name)

        model.register_load_state_dict_pre_hook(rename)
        model.register_load_state_dict_post_hook(lambda module, keys: seen.append(module[0].weight.sum().item()))
        return model

    source = make()
    state = {f"model.{name}": tensor for name, tensor in source.state_dict().items()}
    assert_loaded(quiet_load(make, saved(tmp_path, state)), source)
    assert seen == [source[0].weight.sum().item()]


def test_buffers_that_are_not_persistent_are_unexpected_in_a_checkpoint(tmp_path):
    path = saved(tmp_path, {**trained().state_dict(), "noise": torch.ones(12)})
    refused(built(Net), path, "unexpected in the checkpoint: noise")


# Ties ---------------------------------------------------------------------------------------------------------------


def test_a_tied_tensor_is_supplied_by_any_of_its_names(tmp_path):
    for kept, dropped in (("head.weight", "embedding.weight"), ("embedding.weight", "head.weight")):
        state = trained().state_dict()
        del state[dropped]
        path = tmp_path / f"{kept}.safetensors"
        save_file(state, path)
        model = quiet_load(Net, path, dtype="bf16")
        assert_loaded(model, trained())
        assert model.head.weight is model.embedding.weight


def test_a_part_of_a_tensor_is_supplied_by_the_whole(tmp_path):
    def make():
        model = nn.Module()
        model.whole = nn.Parameter(torch.randn(6, 2))
        model.part = nn.Parameter(torch.empty(0))
        return model

    source, model = make(), make()
    for each in (source, model):
        each.part.data = each.whole.data[2:4]
    save_model(source, tmp_path / "model.safetensors")
    assert list(load_file(tmp_path / "model.safetensors")) == ["whole"]
    quiet_load(model, tmp_path / "model.safetensors")
    assert_loaded(model, source)


def test_two_tensors_for_one_are_refused_and_the_last_wins_if_not_strict(tmp_path):
    state = trained().state_dict()
    state["head.weight"] = state["head.weight"] + 1
    for name, save in (("model.pt", torch.save), ("model.safetensors", save_file)):
        save(state, tmp_path / name)
        refused(built(Net), tmp_path / name, "embedding.weight and head.weight are one tensor in the model")
        model = quiet_load(Net, tmp_path / name, strict=False)
        assert same_bits(model.embedding.weight, state["head.weight"])
    state["head.weight"] = state["embedding.weight"].double()
    assert_loaded(quiet_load(Net, saved(tmp_path, state)), trained())


# Refusals -----------------------------------------------------------------------------------------------------------


@over_formats
def test_all_that_does_not_fit_is_named_at_once(tmp_path, name):
    class Other(Net):
        def __init__(self):
            super().__init__()
            self.body[0] = nn.Linear(12, 21)
            self.scale = nn.Parameter(torch.ones(2))
            self.more = nn.Linear(1, 1)
            self.table = self.table.long()
            del self.body[3]

    text = refused(built(Other), written(tmp_path, name, trained()), "does not fit Other")
    for named in (
        "size mismatch for body.0.weight",
        "size mismatch for body.0.bias",
        "size mismatch for scale",
        "dtype mismatch for table: torch.float32 in the checkpoint, torch.int64 in the model",
        "missing in the checkpoint: more.weight, more.bias",
        "unexpected in the checkpoint: body.3.",
    ):
        assert named in text, text


@pytest.mark.parametrize("stored", [torch.int64, torch.bool, torch.complex64])
def test_a_dtype_of_another_kind_is_refused(tmp_path, stored):
    state = trained().state_dict()
    state["body.0.bias"] = state["body.0.bias"].to(stored)
    state["body.1.num_batches_tracked"] = torch.tensor(2.0)
    text = refused(built(Net), saved(tmp_path, state), f"dtype mismatch for body.0.bias: {stored}")
    assert "dtype mismatch for body.1.num_batches_tracked: torch.float32" in text


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(700, 500))
        self.second = nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "legacy.pth", "dcp"])
@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [
        ("fp16", 1e6, False),
        ("fp16", -65520.0, False),
        ("fp16", 65519.0, True),
        ("bf16", 3.4e38, False),
        ("bf16", 3.389e38, True),
        ("fp32", 3.4e38, True),
        ("fp16", float("inf"), True),
        ("fp16", float("nan"), True),
    ],
)
def test_a_value_beyond_the_models_dtype_is_refused_before_anything_is_written(tmp_path, name, dtype, value, fits):
    source = Wide()
    with torch.no_grad():
        source.first[699, 400] = value
        source.first[0, 0] = float("inf")
        source.second.fill_(5)
    path = written(tmp_path, name, source)
    if fits:
        assert_loaded(quiet_load(Wide, path, dtype=dtype), source)
        assert_loaded(quiet_load(built(Wide, dtype), path), source)
    else:
        text = refused(built(Wide, dtype), path, "first has the value")
        assert f"{value:g} in torch.float32" in text and str(DTYPES[dtype]) in text and "second" not in text


def test_integers_doubles_and_complex_numbers_that_do_not_fit_are_refused_too(tmp_path):
    state = Wide().state_dict()
    state["count"] = torch.tensor([5, 2**31])
    state["second"] = torch.tensor([1.0, 1e300, 2.0], dtype=torch.float64)
    text = refused(built(Wide), saved(tmp_path, state), "count has the value 2.14748e.09 in torch.int64")
    assert "second has the value 1e+300 in torch.float64" in text
    state["count"], state["second"] = torch.tensor([5, -(2**31)]), state["second"].clamp(max=3.0)
    model = quiet_load(Wide, saved(tmp_path, state))
    assert model.count.tolist() == [5, -(2**31)] and model.second.tolist() == [1.0, 3.0, 2.0]

    def complex_model():
        return nn.ParameterList([torch.zeros(2, dtype=torch.complex64)])

    path = saved(tmp_path, {"0": torch.tensor([1.0, 1e300j], dtype=torch.complex128)})
    with pytest.raises(CheckpointError, match=r"0 has the value 1e\+300"):
        quiet_load(complex_model(), path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "legacy.pth", "shards", "bin_shards", "dcp"])
def test_a_truncated_file_is_refused(tmp_path, name):
    path = written(tmp_path, name, trained())
    file = path
    if path.is_dir():
        file = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".distcp"))[-1]
    content = file.read_bytes()
    model = built(Net)
    for length in (0, 1, 7, 8, 40, len(content) // 3, len(content) // 2, len(content) - 100, len(content) - 1):
        file.write_bytes(content[:length])
        refused(model, path, str(tmp_path))
    file.write_bytes(content)
    assert_loaded(quiet_load(model, path), trained())


def test_no_flipped_bit_of_a_safetensors_header_goes_unnoticed(tmp_path):
    def make():
        return nn.Linear(3, 2)

    source, model = make(), make()
    path = tmp_path / "model.safetensors"
    save_model(source, path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    refusals = 0
    for bit in range(header * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        before = copies_of(model)
        try:
            quiet_load(model, path)
        except CheckpointError:
            refusals += 1
            assert all(same_bits(tensor, before[name]) for name, tensor in registered(model).items())
        else:
            assert_loaded(model, source)
    assert refusals > 0.9 * header * 8


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_flipped_bits_of_a_torch_files_pickle_are_refused_or_harmless(tmp_path):
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    path = saved(tmp_path, source.state_dict())
    content = path.read_bytes()
    start = content.index(b"weight")
    for byte in range(start - 40, start + 120):
        flipped = bytearray(content)
        flipped[byte] ^= 4
        path.write_bytes(flipped)
        try:
            quiet_load(model, path)
        except CheckpointError:
            continue
        assert all(tensor.shape == source.state_dict()[name].shape for name, tensor in model.state_dict().items())


def test_what_weights_only_refuses_is_refused_with_torchs_reason(tmp_path):
    path = saved(tmp_path, {"0.weight": torch.ones(1), "config": Path("x")})
    text = refused(built(Net), path, "weights_only=True refuses to unpickle it")
    assert "torch.load(..., weights_only=False)" in text
    with pytest.raises(CheckpointError) as error:
        quiet_load(Net, path)
    assert "Unsupported global" in str(error.value.__cause__)


def test_a_torch_file_without_a_state_dict_is_refused(tmp_path):
    refused(built(Net), saved(tmp_path, [torch.ones(2)]), "it holds a list, not a state dict")
    refused(built(Net), saved(tmp_path, {"epoch": 3}), "missing in the checkpoint: scale")
    refused(built(Net), saved(tmp_path, {0: torch.ones(2)}), "not a state dict, whose keys are names")


def test_a_sparse_tensor_is_refused(tmp_path):
    refused(built(Net), saved(tmp_path, {"scale": torch.eye(2).to_sparse()}), "'scale' is no ordinary, dense tensor")


def test_an_index_has_to_agree_with_its_files(tmp_path):
    path = written(tmp_path, "shards", trained())
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, file = next(iter(content["weight_map"].items()))
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "other": file}}))
    refused(built(Net), path, rf"tensors that their files do not have: other \({file}\)")
    other = next(each for each in content["weight_map"].values() if each != file)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], name: other}}))
    refused(built(Net), path, rf"{name} \({other}\)")
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], name: "gone.safetensors"}}))
    refused(built(Net), index, "do not exist: gone.safetensors")
    for broken in ("", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(broken)
        refused(built(Net), index, "model.safetensors.index.json")
    index.write_text(json.dumps(content))
    assert_loaded(quiet_load(Net, index), trained())


def test_a_distributed_checkpoint_without_its_file_is_refused(tmp_path):
    path = written(tmp_path, "dcp", trained())
    for file in path.glob("*.distcp"):
        file.unlink()
    refused(built(Net), path, "does not exist")


class Run:
    """Pickled: a call, which happens when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker):
    """Pickles that would make a file, each by functions and classes found in another way."""
    return {
        "call": Run(os.mkdir, str(marker)),
        "eval": Run(eval, f"open({str(marker)!r}, 'w')"),
        "torch": Run(torch.save, torch.ones(1), str(marker)),
        "partial": Run(functools.partial(os.mkdir, str(marker))),
        "path": Run(Path.mkdir, Path(marker)),
    }


ATTACKS = list(attacks(""))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_torch_file_runs_nothing(tmp_path, attack):
    marker = tmp_path / "marker"
    path = saved(tmp_path, {"scale": torch.ones(1), "config": attacks(marker)[attack]})
    refused(built(Net), path, "weights_only=True refuses to unpickle it")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it was an attack


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_metadata_of_a_distributed_checkpoint_runs_nothing(tmp_path, attack):
    path = written(tmp_path, "dcp", trained())
    marker = tmp_path / "marker"
    metadata = dcp.FileSystemReader(path).read_metadata()
    metadata.planner_data["x"] = attacks(marker)[attack]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(built(Net), path, "could run code.*its metadata wants .*which torch does not write there")
    assert not marker.exists()
    dcp.FileSystemReader(path).read_metadata()
    assert marker.exists()


def test_metadata_names_classes_by_no_way_round(tmp_path):
    path = written(tmp_path, "dcp", trained())
    for module, name in [
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties.create_from_tensor"),
        ("torch", "float32.__class__"),
        ("torch", "load"),
        ("pathlib", "os"),
        ("builtins", "eval"),
        ("builtins", "getattr.__call__"),
    ]:
        names = [pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, name)]
        (path / ".metadata").write_bytes(pickle.PROTO + b"\x04" + b"".join(names) + pickle.STACK_GLOBAL + pickle.STOP)
        refused(built(Net), path, f"its metadata wants {module}.{name}, which")


class ByGetattr(pickle.Pickler):
    """Pickles members of enums as early releases of Python 3.11 do, Debian 12's among them, on any release."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def pickled_by_getattr(value):
    file = io.BytesIO()
    ByGetattr(file).dump(value)
    return file.getvalue()


def test_a_distributed_checkpoint_that_names_members_of_enums_by_getattr_is_read(tmp_path):
    source = trained()
    path = written(tmp_path, "dcp", source)
    metadata = dcp.FileSystemReader(path).read_metadata()
    # All members, and those of the enum that torch wrote before 2.3, under a name that no tensor has.
    metadata.planner_data["x"] = [*_MEM_FORMAT_ENCODING, *MEM_FORMAT_ENCODING]
    content = pickled_by_getattr(metadata)
    assert b"getattr" in content and pickle.loads(content) == metadata
    (path / ".metadata").write_bytes(content)
    with (path / ".metadata").open("rb") as file:
        assert distributed._MetadataUnpickler(file).load() == metadata
    assert_loaded(quiet_load(Net, path), source)


@pytest.mark.parametrize(
    "owner, name, shown",
    [
        (_MEM_FORMAT_ENCODING, "__class__", "_MEM_FORMAT_ENCODING, '__class__'"),
        (_MEM_FORMAT_ENCODING, "__init__", "_MEM_FORMAT_ENCODING, '__init__'"),
        (_MEM_FORMAT_ENCODING, "_member_map_", "_MEM_FORMAT_ENCODING, '_member_map_'"),
        (_MEM_FORMAT_ENCODING, "mro", "_MEM_FORMAT_ENCODING, 'mro'"),
        (_MEM_FORMAT_ENCODING, "TORCH_OTHER_FORMAT", "_MEM_FORMAT_ENCODING, 'TORCH_OTHER_FORMAT'"),
        (_MEM_FORMAT_ENCODING, ["TORCH_CHANNELS_LAST"], "_MEM_FORMAT_ENCODING, a list"),
        (_MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST, "name", "a _MEM_FORMAT_ENCODING, 'name'"),
        (TensorProperties, "create_from_tensor", "TensorProperties, 'create_from_tensor'"),
        (TensorProperties, "__init__", "TensorProperties, '__init__'"),
        (torch.Size, "numel", "torch.Size, 'numel'"),
        (Path(), "mkdir", "a Pure.*Path, 'mkdir'"),
        ("text", "join", "a str, 'join'"),
        (getattr, "__self__", "a function, '__self__'"),
    ],
)
def test_getattr_finds_nothing_but_members_of_enums_in_metadata(tmp_path, owner, name, shown):
    path = written(tmp_path, "dcp", trained())
    (path / ".metadata").write_bytes(pickled_by_getattr(Run(getattr, owner, name)))
    refused(built(Net), path, rf"could run code.*its metadata wants getattr\(.*{shown}\), which torch does not write")


def test_getattr_finds_no_members_of_an_enum_that_torch_does_not_write():
    # No file gets at another enum, since naming it is refused already: hence without one.
    unknown = enum.Enum("Unknown", "ONE")
    with pytest.raises(pickle.UnpicklingError, match=r"its metadata wants getattr\(.*Unknown, 'ONE'\)"):
        distributed._enum_member(unknown, "ONE")


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_object_of_a_distributed_checkpoint_runs_nothing(tmp_path, attack):
    marker = tmp_path / "marker"
    source = WithExtraState()
    source.state = attacks(marker)[attack]
    refused(WithExtraState(), written(tmp_path, "dcp", source), r"(?s)could run code.*_extra_state")
    assert not marker.exists()


@pytest.mark.parametrize("where", ["../outside.safetensors", "a/../../outside.safetensors", "ABSOLUTE"])
def test_an_index_names_no_file_outside_of_its_directory(tmp_path, where):
    outside = tmp_path / "outside.safetensors"
    save_model(trained(), outside)
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    where = str(outside) if where == "ABSOLUTE" else where
    assert (folder / where).is_file()
    index = {"weight_map": dict.fromkeys(load_file(outside), where)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(built(Net), folder, "names a file outside of its directory")
    # Its own files may lie deeper, or be links, as in the cache of the Hugging Face Hub.
    (folder / "a" / "x.safetensors").symlink_to(outside)
    index = {"weight_map": dict.fromkeys(load_file(outside), "a/x.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_loaded(quiet_load(Net, folder), trained())


@pytest.mark.parametrize("where", ["../{name}", "{folder}/{name}"])
def test_a_distributed_checkpoint_names_no_file_outside_of_its_directory(tmp_path, where):
    path = written(tmp_path, "dcp", trained())
    metadata = dcp.FileSystemReader(path).read_metadata()
    for info in metadata.storage_data.values():
        name = info.relative_path
        info.relative_path = where.format(name=name, folder=tmp_path)
    (path / name).rename(tmp_path / name)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(built(Net), path, "names a file outside of its directory")


def test_a_path_of_another_kind_is_a_value_error_that_says_what_is_accepted(tmp_path):
    text = tmp_path / "model.txt"
    text.write_text("weights")
    (tmp_path / "empty").mkdir()
    for path in (text, tmp_path / "empty"):
        with pytest.raises(ValueError, match=r"is not a checkpoint; pass a \.safetensors file, .*torch\.distributed"):
            quiet_load(Net, path)
    with pytest.raises(FileNotFoundError, match=r"does not exist; pass a \.safetensors file"):
        quiet_load(Net, tmp_path / "gone")
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"several checkpoints, pass one: a\.safetensors, b\.safetensors"):
        quiet_load(Net, tmp_path)
    save_model(trained(), tmp_path / "model.safetensors")
    assert_loaded(quiet_load(Net, tmp_path), trained())


def test_arguments_that_do_not_go_together_are_refused(tmp_path):
    path = written(tmp_path, "model.pt", trained())
    for arguments in ({"device": "cpu"}, {"dtype": "bf16"}, {"seed": 3}):
        with pytest.raises(ValueError, match="are for a model that is created here"):
            load(Net(), path, **arguments)
    with pytest.raises(TypeError, match="must be a module, or a function"):
        load("Net", path)
    with pytest.raises(TypeError, match="returned a dict, not a module"):
        quiet_load(dict, path)
    with pytest.raises(ValueError, match="dtype='int8' is not supported"):
        quiet_load(Net, path, dtype="int8")


def test_tensors_on_meta_are_refused_with_a_remedy(tmp_path):
    path = written(tmp_path, "model.pt", trained())
    model = plain(Net, device="meta")
    with pytest.raises(CheckpointError, match=r"on the meta device: scale, .*to_empty"):
        quiet_load(model, path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_a_loaded_model_keeps_no_file_mapped_and_is_freed_at_once(tmp_path):
    for name in ("model.safetensors", "model.pt", "dcp"):
        path = written(tmp_path, name, trained())
        model = quiet_load(Net, path)
        quiet_load(model, path)
        with open("/proc/self/maps") as file:
            assert str(path) not in file.read()
        alive = weakref.ref(model)
        del model
        assert alive() is None


def changed(path):
    """Files that have the same size and another time."""
    for file in [path] if path.is_file() else path.iterdir():
        os.utime(file, ns=(0, 0))


@over_formats
def test_a_file_that_changes_while_it_is_loaded_is_an_error(tmp_path, monkeypatch, name):
    """What was read may be of both; nobody can tell, so that the whole is refused at the end."""
    path = written(tmp_path, name, trained())
    stream = loading.stream

    def changes(transfers, advance):
        stream(transfers, advance)
        changed(path)

    monkeypatch.setattr(loading, "stream", changes)
    with pytest.raises(CheckpointError, match="has changed since"):
        quiet_load(Net, path)


def test_a_file_that_changes_while_a_models_own_code_loads_it_is_an_error(tmp_path):
    path = written(tmp_path, "model.pt", trained())

    class Changes(Net):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)
            changed(path)

    with pytest.raises(CheckpointError, match="has changed since"):
        quiet_load(Changes, path)


def test_torch_state_is_as_before_after_an_error(tmp_path):
    path = saved(tmp_path, {"x": torch.ones(1)})
    before = (torch.get_rng_state(), torch._C._len_torch_function_stack(), torch.is_grad_enabled())
    with pytest.raises(CheckpointError):
        quiet_load(built(Net), path)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch._C._len_torch_function_stack(), torch.is_grad_enabled())


# Sharded models -----------------------------------------------------------------------------------------------------


def uneven():
    return nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13), nn.Linear(13, 5))


def load_shards(rank, world, folder):
    """One process of the next test."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    model = built(uneven, "bf16", seed=rank)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    source = torch.load(folder / "model.pt")
    for path in ("dcp", "model.pt", "legacy.pt"):
        quiet_load(model, folder / path)
        for name, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert same_bits(whole, source[name].to(tensor.dtype)), (path, name)
            tensor.detach().zero_()
    with pytest.raises(CheckpointError, match=r"0\.weight has the value 1e\+38"):
        quiet_load(model.half(), folder / "large")
    torch.distributed.destroy_process_group()


def test_each_process_reads_its_own_shards_of_files_that_are_not_safetensors(tmp_path):
    source = built(uneven, seed=1)
    save_torch(source, tmp_path / "model.pt")
    torch.save(source.state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_dcp(source.state_dict(), tmp_path / "dcp")
    source[0].weight.data.fill_(1e38)
    save_dcp(source.state_dict(), tmp_path / "large")
    torch.multiprocessing.spawn(load_shards, (2, tmp_path), 2)


class Parallel(nn.Module):
    """A part of a larger model: rows of one matrix, columns of the other, and what every part has."""

    def __init__(self, first, last, norm=nn.BatchNorm1d):
        super().__init__()
        self.up = nn.Linear(200, last - first)
        self.down = nn.Linear(last - first, 200)
        self.norm = norm(200)

    def window(self, first, last):
        cuts = {
            "up.weight": (slice(first, last), slice(None)),
            "up.bias": (slice(first, last),),
            "down.weight": (slice(None), slice(first, last)),
        }
        return lambda name, shape: cuts.get(name)


class OwnNorm(nn.BatchNorm1d):
    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)


@over_formats
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, OwnNorm])
def test_a_window_of_each_parameter_is_loaded(tmp_path, name, norm):
    source = built(lambda: Parallel(0, 501), seed=1)
    path = written(tmp_path, name, source)
    for first, last in ((0, 200), (200, 500), (500, 501), (300, 300)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            model = built(lambda: Parallel(first, last, norm), "bf16")  # noqa: B023
        window = model.window(first, last)
        quiet_load(model, path, window=window)
        for key, tensor in model.state_dict().items():
            whole, slices = source.state_dict()[key], window(key, None)
            part = whole if slices is None else whole[slices]
            assert same_bits(tensor, part.contiguous().to(tensor.dtype)), key


def test_windows_and_shapes_that_do_not_fit_are_refused(tmp_path):
    path = written(tmp_path, "model.safetensors", built(lambda: Parallel(0, 100), seed=1))
    model = built(lambda: Parallel(0, 50))
    with pytest.raises(ValueError, match=r"window\('norm\.bias', \(200,\)\) returned 'all'; return a tuple"):
        quiet_load(model, path, window=lambda name, shape: "all" if name == "norm.bias" else None)
    with pytest.raises(CheckpointError, match=r"size mismatch for up\.weight: .*\[60, 200\].*\[50, 200\]"):
        quiet_load(model, path, window=model.window(40, 100))


def test_of_a_window_no_more_is_read(tmp_path, monkeypatch):
    source = built(lambda: Parallel(0, 600), seed=1)
    path = written(tmp_path, "model.safetensors", source)
    transfers = []
    monkeypatch.setattr(loading, "stream", lambda each, advance: transfers.extend(each))
    model = built(lambda: Parallel(200, 500))
    quiet_load(model, path, window=model.window(200, 500))
    read = sum(each.target.numel() * each.dtype.itemsize for each in transfers)
    assert read == sum(tensor.nbytes for tensor in model.state_dict().values())


# A model without values, reports, bars --------------------------------------------------------------------------------


def test_a_model_made_empty_is_loaded_and_its_missing_tensors_are_initialized(tmp_path):
    state = trained().state_dict()
    del state["body.0.weight"], state["table"]
    path = saved(tmp_path, state)
    with fastinit.on("cpu", "bf16", seed=SEED, empty=True):
        model = Net()
    refused_before = fastinit.uninitialized(model)
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: table, body\.0\.weight"):
        quiet_load(model, path)
    assert fastinit.uninitialized(model) == refused_before
    quiet_load(model, path, strict=False, report=LoadReport())
    full = built(Net, "bf16")
    assert same_bits(model.body[0].weight, full.body[0].weight) and same_bits(model.table, full.table)
    assert same_bits(model.body[3].weight, trained().body[3].weight.bfloat16())


def test_a_model_with_values_keeps_those_that_are_missing(tmp_path):
    state = trained().state_dict()
    del state["body.0.weight"]
    model = built(Net, seed=9)
    before = model.body[0].weight.detach().clone()
    quiet_load(model, saved(tmp_path, state), strict=False, report=LoadReport())
    assert same_bits(model.body[0].weight, before)
    assert same_bits(model.body[0].bias, trained().body[0].bias)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("mask", torch.zeros(3))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_mask_of_the_least_value_of_its_dtype_becomes_infinite_as_in_torch(tmp_path, dtype):
    least = torch.tensor([0.0, torch.finfo(torch.float32).min, 1.0])
    model = quiet_load(Masked, saved(tmp_path, {"weight": torch.ones(3), "mask": least}), dtype=dtype)
    assert torch.equal(model.mask, least.to(model.mask.dtype)) and model.mask[1] == -torch.inf
    for name in ("weight", "mask"):
        state = {"weight": torch.ones(3), "mask": torch.ones(3)}
        state[name] = least if name == "weight" else least * 0.999
        if dtype == "bf16" and name == "mask":
            continue  # which bf16 can hold
        with pytest.raises(CheckpointError, match=f"{name} has the value -3.* beyond the range"):
            quiet_load(Masked, saved(tmp_path, state), dtype=dtype)


def test_the_report_says_what_was_done(tmp_path):
    source = trained()
    state = source.state_dict()
    del state["head.weight"], state["body.3.bias"]
    path = tmp_path / "model.safetensors"
    save_file({**state, "more": torch.ones(2)}, path)
    report = LoadReport()
    quiet_load(Net, path, dtype="bf16", strict=False, report=report)
    assert report.missing == ["body.3.bias"] and report.unexpected == ["more"]
    assert report.converted == {
        name: (torch.float32, torch.bfloat16) for name in state if name != "body.1.num_batches_tracked"
    }
    assert report.bytes == sum(tensor.nbytes for tensor in state.values()) and report.seconds > 0
    assert str(report).startswith(f"loaded {report.bytes / 1024:.4g} KiB in ")
    assert str(report).endswith(f"1 missing, 1 unexpected, {len(state) - 1} converted")


def test_without_a_report_a_warning_names_what_differs(tmp_path):
    path = saved(tmp_path, {f"x{number}": torch.ones(1) for number in range(12)})
    with pytest.warns(UserWarning, match=r"12 unexpected \(x0, .*, x9 and 2 more\)") as caught:
        quiet_load(Net, path, strict=False)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_load(Net, path, strict=False, report=LoadReport())


def test_the_bar_counts_bytes_and_is_optional(tmp_path, capfd, monkeypatch):
    path = written(tmp_path, "model.safetensors", trained())
    load(Net, path, "cpu")
    shown = capfd.readouterr().err
    assert "model.safetensors: 100%" in shown and "B/s" in shown
    load(Net, path, "cpu", progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    load(Net, path, "cpu")
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = written(tmp_path, "model.safetensors", trained())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'torch-fastinit\[load\]'"):
        quiet_load(Net, path)


def test_importing_it_loads_nothing_that_it_reads_with():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastinit.checkpoint\n"
        "new = set(sys.modules) - before\n"
        "print(sorted({name.partition('.')[0] for name in new} - sys.stdlib_module_names))\n"
        "print(sorted(name for name in new if name.startswith('torch.distributed')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split("\n") == ["['fastinit', 'torch']", "[]", ""]


# Memory -------------------------------------------------------------------------------------------------------------

# 240 MB in fp32, of which 98 MB are the largest tensor.
SIZES = (2048, 8, 12_000)

MEASURE = """
import sys, torch
from torch import nn
from fastinit.checkpoint import load
from test_load import SIZES, net

def resident(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))

def growth(function):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    result = function()
    return resident("VmHWM") - before, result

small, large = sys.argv[1:]
load(lambda: net(8, 1, 8), small, "cpu", "bf16", progress=False)
created, model = growth(lambda: load(lambda: net(*SIZES), large, "cpu", "bf16", progress=False))
passed, model = growth(lambda: load(model, large, progress=False))
print(created, passed, sum(parameter.nbytes for parameter in model.parameters()))
"""


def net(width, depth, words):
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)), nn.Embedding(words, width))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
# torch.distributed.checkpoint reads a tensor into memory before it copies it.
@pytest.mark.parametrize(("name", "copies"), [("model.safetensors", 1), ("shards", 1), ("model.pt", 1), ("dcp", 3)])
def test_a_converting_load_takes_the_model_and_its_largest_tensor(tmp_path, name, copies):
    for part, sizes in (("small", (8, 1, 8)), ("large", SIZES)):
        (tmp_path / part).mkdir()
        written(tmp_path / part, name, built(lambda sizes=sizes: net(*sizes)))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small" / name, tmp_path / "large" / name],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    created, passed, size = map(int, done.stdout.split())
    largest, slack = SIZES[0] * SIZES[2] * 4, 16 << 20
    assert created <= size + copies * largest + slack
    assert passed <= copies * largest + slack
    assert created > size and passed > largest / 2  # the measurement sees what it has to

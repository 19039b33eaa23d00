"""Sharded creation over real process groups: every rank holds the bits that the unsharded model has there.

What is expected comes from torch: the unsharded model of the same seed, with its values, is given to the same sharding
code, which cuts it. Ranks are gloo processes (see ranks.py).
"""

import copy
import ctypes
import datetime
import functools
import gc
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from models import SEED, bits, registered, same_bits
from ranks import Ranks, cases, distributions, on_every_rank
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional

import fastinit
from fastinit import materialization

HALF_AND_FULL = pytest.mark.parametrize("dtype", ["fp32", "bf16"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    four = Ranks(4, tmp_path_factory)
    yield four
    four.end()


# --- models -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block whose fused projection is initialized in slices."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width, bias=False)
        for part in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(part)
        nn.init.trunc_normal_(self.down.weight, std=0.02)

    def forward(self, hidden):
        query, key, value = self.qkv(self.norm(hidden)).chunk(3, -1)
        hidden = hidden + functional.scaled_dot_product_attention(query, key, value)
        return hidden + self.down(functional.gelu(self.up(hidden)))


class Model(nn.Module):
    """Sizes that no number of ranks divides, ties, frozen and computed parameters, buffers of all kinds."""

    def __init__(self, width=11, blocks=2, tokens=13):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width, padding_idx=3)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.mixer = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.mixer.weight)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.decay = nn.Parameter(-torch.exp(torch.arange(float(width)) / width))  # computed
        self.gate = nn.Parameter(torch.empty(2).uniform_())  # fewer elements than ranks
        self.statistics = nn.BatchNorm1d(width, affine=False)
        self.register_buffer("noise", torch.randn(7))
        self.register_buffer("rotation", torch.arange(4) ** -0.5, persistent=False)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.mixer(hidden) * self.decay * self.gate[0]
        return self.head(self.statistics(hidden.flatten(0, 1)))


def unsharded(constructor, dtype):
    with fastinit.on("cpu", dtype, seed=SEED):
        return constructor()


def deferred(constructor, dtype="fp32"):
    with fastinit.on("cpu", dtype, seed=SEED, shard=True):
        return constructor()


def assert_same_shards(ours, reference):
    """Fail unless two models that were sharded in the same way are the same on this rank, bit for bit."""
    one, other = registered(ours), registered(reference)
    assert list(one) == list(other)
    for name, tensor in one.items():
        expected = other[name]
        assert type(tensor) is type(expected) and tensor.requires_grad == expected.requires_grad, name
        assert tensor.is_leaf and tensor.dtype == expected.dtype, name
        if isinstance(tensor, DTensor):
            assert tensor.device_mesh == expected.device_mesh and tensor.placements == expected.placements, name
            assert tensor.shape == expected.shape and tensor.stride() == expected.stride(), name
            tensor, expected = tensor._local_tensor, expected._local_tensor
        assert tensor.stride() == expected.stride(), name
        assert same_bits(tensor, expected), name


def assert_created_sharded(shard, constructor, dtype, **how):
    """Shard a deferred model, materialize it, and compare it with the unsharded one that torch shards; returns it."""
    reference, model = unsharded(constructor, dtype), deferred(constructor, dtype)
    reference, model = shard(reference), shard(model)
    sharded = dict(model.named_parameters())
    names = fastinit.materialize(model, **how)
    assert_same_shards(model, reference)
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is parameter for name, parameter in sharded.items()), "other objects"
    assert set(names) <= parameters.keys()
    return model


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def _fully_sharded(model, **how):
    for block in model.blocks:
        fully_shard(block, **how)
    return fully_shard(model, **how)


def _check_fsdp2(dtype):
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = assert_created_sharded(lambda model: _fully_sharded(model, mesh=mesh), Model, dtype)
    assert model.head.weight is model.embedding.weight
    whole = registered(unsharded(Model, dtype))
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.full_tensor(), whole[name]), name
    return {name: parameter._local_tensor.numel() for name, parameter in model.named_parameters()}


@HALF_AND_FULL
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_fsdp2_shards_have_the_bits_of_the_unsharded_model(ranks, world, dtype):
    sizes = ranks.run(_check_fsdp2, dtype, world=world)
    elements = sum(parameter.numel() for parameter in Model().parameters())
    assert sum(sum(each.values()) for each in sizes) == elements
    assert world < 3 or sizes[-1]["gate"] == 0, "the model is to have empty shards, too"


def _mesh_of_two_axes(*names):
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def _check_hsdp(dtype):
    mesh = _mesh_of_two_axes("replicate", "shard")
    model = assert_created_sharded(lambda model: _fully_sharded(model, mesh=mesh), Model, dtype)
    return [bits(parameter._local_tensor) for parameter in model.parameters()]


@HALF_AND_FULL
def test_hsdp_replicas_are_equal_and_have_the_bits_of_the_unsharded_model(ranks, dtype):
    locals_ = ranks.run(_check_hsdp, dtype, world=4)
    for one, other in ((0, 2), (1, 3)):
        assert all(map(torch.equal, locals_[one], locals_[other]))


def _check_dim(dtype):
    mesh = init_device_mesh("cpu", (4,))

    def last_dim(parameter):
        # FSDP2 divides other dimensions than the first only if they divide evenly.
        return Shard(parameter.dim() - 1) if parameter.dim() > 1 and parameter.shape[-1] % 4 == 0 else Shard(0)

    def shard(model):
        return _fully_sharded(model, mesh=mesh, shard_placement_fn=last_dim)

    model = assert_created_sharded(shard, lambda: Model(width=12), dtype)
    assert model.blocks[0].qkv.weight.placements == (Shard(1),)


@HALF_AND_FULL
def test_fsdp2_may_shard_another_dimension_than_the_first(ranks, dtype):
    ranks.run(_check_dim, dtype, world=4)


def _check_mixed_precision():
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    assert_created_sharded(lambda m: _fully_sharded(m, mesh=mesh, mp_policy=policy), Model, "fp32")
    offload = CPUOffloadPolicy(pin_memory=False)
    assert_created_sharded(lambda m: _fully_sharded(m, mesh=mesh, offload_policy=offload), Model, "fp32")
    assert_created_sharded(lambda m: _fully_sharded(m, mesh=mesh, reshard_after_forward=False), Model, "fp32")
    ignoring = assert_created_sharded(lambda m: fully_shard(m, mesh=mesh, ignored_params={m.gate}), Model, "fp32")
    assert type(ignoring.gate) is nn.Parameter and isinstance(ignoring.frozen, DTensor)


def test_policies_of_fsdp2_do_not_change_the_values(ranks):
    ranks.run(_check_mixed_precision, world=2)


# --- tensor parallelism -----------------------------------------------------------------------------------------------


def _tensor_parallel(model, mesh, **how):
    parallelize_module(
        model,
        mesh,
        {
            "embedding": RowwiseParallel(input_layouts=Replicate()),
            "mixer": RowwiseParallel(),
            "head": ColwiseParallel(output_layouts=Replicate()),
            "blocks.*.norm": SequenceParallel(),
            "blocks.*.qkv": ColwiseParallel(),
            "blocks.*.up": ColwiseParallel(),
            "blocks.*.down": RowwiseParallel(),
        },
        **how,
    )
    return model


def _check_tensor_parallel(dtype):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = assert_created_sharded(lambda model: _tensor_parallel(model, mesh), Model, dtype)
    whole = registered(unsharded(Model, dtype))
    distributed = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert {p.placements[0] for p in distributed.values()} == {Shard(0), Shard(1), Replicate()}
    for name, parameter in distributed.items():
        assert same_bits(parameter.full_tensor(), whole[name]), name


@HALF_AND_FULL
@pytest.mark.parametrize("world", [2, 3])
def test_tensor_parallel_shards_have_the_bits_of_the_unsharded_model(ranks, world, dtype):
    ranks.run(_check_tensor_parallel, dtype, world=world)


def _check_fsdp2_over_tensor_parallel(dtype, width):
    mesh = _mesh_of_two_axes("data", "tensor")

    def shard(model):
        return _fully_sharded(_tensor_parallel(model, mesh["tensor"]), mesh=mesh["data"])

    model = assert_created_sharded(shard, lambda: Model(width), dtype)
    assert model.blocks[0].up.weight.device_mesh.ndim == 2
    return {name: parameter._local_tensor for name, parameter in model.named_parameters()}


@HALF_AND_FULL
@pytest.mark.parametrize("width", [11, 12])
def test_fsdp2_over_tensor_parallel_has_the_bits_of_the_unsharded_model(ranks, width, dtype):
    ranks.run(_check_fsdp2_over_tensor_parallel, dtype, width, world=4)


def _check_sharded_inside_of_the_block(dtype, width):
    mesh = _mesh_of_two_axes("data", "tensor")

    def shard(model):
        return _fully_sharded(_tensor_parallel(model, mesh["tensor"]), mesh=mesh["data"])

    reference = shard(unsharded(lambda: Model(width), dtype))
    with fastinit.on("cpu", dtype, seed=SEED, shard=True):
        model = shard(Model(width))
        computed = model.decay._local_tensor
        assert model.mixer.weight.is_meta and model.head.weight.is_meta and not computed.is_meta
    fastinit.materialize(model)
    assert_same_shards(model, reference)


@HALF_AND_FULL
@pytest.mark.parametrize("width", [11, 12])
def test_a_model_that_is_sharded_inside_of_the_block_has_the_bits_of_the_unsharded_one(ranks, width, dtype):
    ranks.run(_check_sharded_inside_of_the_block, dtype, width, world=4)


# --- any placements ---------------------------------------------------------------------------------------------------


def _orthogonal(weight):
    nn.init.orthogonal_(weight) if weight.dim() > 1 else nn.init.uniform_(weight)


def _parts(weight):
    nn.init.uniform_(weight[: (len(weight) + 1) // 2])
    nn.init.normal_(weight[..., ::2], std=3.0)


def _by_hand(weight):
    weight.data.uniform_(-0.9, 0.9).erfinv_().mul_(0.5).clamp_(-0.4, 0.6)
    weight.data[0].zero_()


INITS = st.sampled_from([nn.init.normal_, nn.init.trunc_normal_, nn.init.zeros_, _orthogonal, _parts, _by_hand])


@cases(80)
@given(distributions(), INITS, st.sampled_from(["fp32", "bf16", "fp16"]))
def test_any_placements_on_any_mesh_give_each_rank_its_part(distribution, init, dtype):
    shape, sizes, placements = distribution

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(shape))
            init(self.weight)

    whole = unsharded(One, dtype).weight.detach()

    def check(rank):
        mesh = init_device_mesh("cpu", sizes)
        model = deferred(One, dtype)
        distributed = distribute_tensor(model.weight.detach(), mesh, placements, src_data_rank=None)
        model.weight = weight = nn.Parameter(distributed)
        assert fastinit.materialize(model) == ["weight"]
        assert model.weight is weight
        expected = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        assert same_bits(weight._local_tensor, expected._local_tensor)

    on_every_rank(math.prod(sizes), check)


@cases(80)
@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=4), INITS, st.sampled_from(["fp32", "bf16"]))
def test_any_window_holds_its_part(data, shape, init, dtype):
    bounds = [data.draw(st.tuples(st.integers(0, size), st.integers(0, size))) for size in shape]
    part = tuple(slice(min(pair), max(pair)) for pair in bounds)

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(shape))
            init(self.weight)

    model = deferred(One, dtype)
    fastinit.materialize(model, window=lambda name, shape: part)
    assert same_bits(model.weight, unsharded(One, dtype).weight[part])


@HALF_AND_FULL
def test_windows_of_transposed_parameters_and_of_some_that_share_storage_hold_their_parts(dtype):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.transposed = nn.Parameter(torch.empty(5, 9).T.normal_())
            self.left, self.right = map(nn.Parameter, torch.empty(6, 8).normal_().detach().chunk(2, dim=1))
            self.whole, self.cut = map(nn.Parameter, torch.empty(6, 8).normal_().detach().chunk(2, dim=1))

    parts = {
        "transposed": (slice(3, 8), slice(1, 4)),
        "left": (slice(1, 3), slice(0, 3)),
        "right": (slice(2, 6), slice(1, 4)),
        "whole": None,
        "cut": (slice(1, 3), slice(0, 3)),
    }
    shapes = {}

    def window(name, shape):
        shapes[name] = shape
        return parts[name]

    model, whole = deferred(Views, dtype), unsharded(Views, dtype)
    fastinit.materialize(model, window=window)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in whole.named_parameters()}
    for name, tensor in whole.named_parameters():
        assert same_bits(model.get_parameter(name), tensor[parts[name] or ...]), name


@HALF_AND_FULL
@pytest.mark.parametrize("width", [11, 12])
def test_hsdp_over_tensor_parallelism_on_a_mesh_of_three_axes_has_the_bits_of_the_unsharded_model(width, dtype):
    def check(rank):
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tensor"))

        def shard(model):
            # Nothing is sent on this process group: each rank cuts its own copy.
            _tensor_parallel(model, mesh["tensor"], src_data_rank=None)
            return _fully_sharded(model, mesh=mesh["replicate", "shard"])

        model = assert_created_sharded(shard, lambda: Model(width), dtype)
        assert model.blocks[0].up.weight.device_mesh.ndim == 3

    on_every_rank(8, check)


# --- a rank that keeps a part of the model ----------------------------------------------------------------------------


def _check_pipeline(dtype):
    rank, whole = dist.get_rank(), unsharded(lambda: Model(blocks=4), dtype)
    model = deferred(lambda: Model(blocks=4), dtype)
    for each in (model, whole):
        each.blocks = each.blocks[2 * rank : 2 * rank + 2]
        if rank:
            each.embedding = None
        else:
            del each.head, each.mixer
    names = fastinit.materialize(model)
    assert set(names) == {name for name, _ in model.named_parameters()} - {"decay"}
    assert_same_shards(model, whole)


@HALF_AND_FULL
def test_a_pipeline_stage_gets_the_values_that_its_part_has_in_the_whole_model(ranks, dtype):
    ranks.run(_check_pipeline, dtype, world=2)


def _check_pipeline_of_shards():
    stage = _mesh_of_two_axes("stage", "data")
    rank = stage.get_local_rank("stage")

    def shard(model):
        model.blocks = model.blocks[rank : rank + 1]
        if rank:
            del model.embedding
        return _fully_sharded(model, mesh=stage["data"])

    assert_created_sharded(shard, Model, "bf16")


def test_stages_may_be_sharded(ranks):
    ranks.run(_check_pipeline_of_shards, world=4)


# --- wrappers and copies ----------------------------------------------------------------------------------------------


def _check_wrappers(dtype):
    mesh = init_device_mesh("cpu", (2,))

    def shard(model):
        model.blocks[0] = checkpoint_wrapper(model.blocks[0])
        model.blocks[1].compile(backend="eager")
        return torch.compile(_fully_sharded(model, mesh=mesh), backend="eager")

    model = assert_created_sharded(shard, Model, dtype)
    assert model._orig_mod.head.weight is model._orig_mod.embedding.weight
    assert model._orig_mod.blocks[0]._checkpoint_wrapped_module.qkv.weight.device_mesh == mesh
    tokens = torch.arange(12).view(2, 6)
    assert same_bits(model(tokens), unsharded(Model, dtype)(tokens))


@HALF_AND_FULL
def test_wrappers_for_checkpointing_and_compilation_change_nothing(ranks, dtype):
    ranks.run(_check_wrappers, dtype, world=2)


def _check_copy():
    mesh = init_device_mesh("cpu", (2,))
    reference = unsharded(Model, "bf16")
    _fully_sharded(reference, mesh=mesh)
    model = deferred(Model, "bf16")
    for each in (copy.deepcopy(model), model):
        _fully_sharded(each, mesh=mesh)
        fastinit.materialize(each)
        assert_same_shards(each, reference)


def test_copies_of_a_deferred_model_are_sharded_and_materialized_like_it(ranks):
    ranks.run(_check_copy, world=2)


def _check_submodules(dtype):
    mesh = init_device_mesh("cpu", (2,))
    reference, model = unsharded(Model, dtype), deferred(Model, dtype)
    for each in (reference, model):
        _fully_sharded(each, mesh=mesh)
    assert fastinit.materialize(model.blocks[1].up) == ["weight", "bias"]
    assert same_bits(model.blocks[1].up.weight._local_tensor, reference.blocks[1].up.weight._local_tensor)
    assert model.blocks[0].up.weight.is_meta and model.embedding.weight.is_meta
    assert fastinit.materialize(model.embedding) == ["weight"]
    assert not model.head.weight.is_meta, "tied"
    names = fastinit.materialize(model)
    assert "blocks.0.up.weight" in names and "blocks.1.up.weight" not in names and "head.weight" not in names
    assert_same_shards(model, reference)
    assert fastinit.materialize(model) == []


@HALF_AND_FULL
def test_a_model_is_materialized_module_by_module_with_the_same_bits(ranks, dtype):
    ranks.run(_check_submodules, dtype, world=2)


# --- FSDP1 ------------------------------------------------------------------------------------------------------------


def _check_fsdp1(dtype, use_orig_params, mixed):
    def shard(model, **how):
        how |= {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
        # What a unit flattens together must be of one requires_grad, unless it keeps the original parameters.
        how["ignored_states"] = [] if use_orig_params else [model.frozen]
        for i, block in enumerate(model.blocks if mixed else []):
            model.blocks[i] = FullyShardedDataParallel(block, **how)
        return FullyShardedDataParallel(model, **how)

    reference = shard(unsharded(Model, dtype))
    model = shard(deferred(Model, dtype), param_init_fn=fastinit.param_init_fn)
    fastinit.materialize(model)  # what no unit manages
    assert_same_shards(model, reference)
    assert model.module.head.weight is model.module.embedding.weight
    whole = registered(unsharded(Model, dtype))
    with FullyShardedDataParallel.summon_full_params(model):
        full = {name.replace("_fsdp_wrapped_module.", ""): tensor for name, tensor in registered(model.module).items()}
        assert whole.keys() <= full.keys()
        for name, tensor in whole.items():
            assert same_bits(full[name], tensor), name
    tokens = torch.arange(12).view(2, 6)
    model(tokens).sum().backward()


@HALF_AND_FULL
@pytest.mark.parametrize("use_orig_params", [True, False], ids=["original", "flat"])
@pytest.mark.parametrize("mixed", [True, False], ids=["nested", "one unit"])
def test_fsdp1_units_have_the_bits_of_the_unsharded_model(ranks, dtype, use_orig_params, mixed):
    ranks.run(_check_fsdp1, dtype, use_orig_params, mixed, world=2)


# --- models of transformers -------------------------------------------------------------------------------------------


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=99, pad_token_id=3, **sizes))


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=20, n_layer=2, n_head=4, vocab_size=99, n_positions=17))


def _check_transformers(constructor, layers, dtype):
    mesh = init_device_mesh("cpu", (2,))

    def shard(model):
        for layer in model.get_submodule(layers):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    reference = unsharded(constructor, dtype)
    model = assert_created_sharded(shard, constructor, dtype)
    tied = model.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    tokens = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        assert same_bits(model.eval()(input_ids=tokens).logits, reference.eval()(input_ids=tokens).logits)


@HALF_AND_FULL
@pytest.mark.parametrize("constructor, layers", [(_llama, "model.layers"), (_gpt2, "transformer.h")])
def test_transformers_are_created_sharded_with_the_same_bits_and_logits(ranks, constructor, layers, dtype):
    pytest.importorskip("transformers")
    ranks.run(_check_transformers, constructor, layers, dtype, world=2)


# --- training ---------------------------------------------------------------------------------------------------------


def _optimizer(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def _losses(model, optimizer, tokens):
    losses = []
    for _ in range(3):
        loss = functional.cross_entropy(model(tokens).float(), tokens.flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _check_training(dtype, sizes):
    # All ranks see the same batch. Then gradients are means of 2 or 4 equal numbers, and so exactly those of one rank.
    tokens = torch.arange(12).view(2, 6)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    reference, model = unsharded(Model, dtype), deferred(Model, dtype)
    _fully_sharded(model, mesh=mesh)
    optimizer = _optimizer(model)  # keeps the parameters that there are now
    fastinit.materialize(model)
    addresses = [parameter._local_tensor.data_ptr() for parameter in model.parameters()]
    expected, losses = _losses(reference, _optimizer(reference), tokens), _losses(model, optimizer, tokens)
    assert losses == expected and losses[-1] < losses[0]
    # Shards lie where FSDP2 wants them, with its padding; it would copy others when it is used first.
    assert addresses == [parameter._local_tensor.data_ptr() for parameter in model.parameters()]


@HALF_AND_FULL
@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2)], ids=str)
def test_training_steps_under_fsdp2_have_the_losses_of_the_unsharded_model(ranks, sizes, dtype):
    world = 4 if sizes != (2,) else 2
    ranks.run(_check_training, dtype, sizes, world=world)


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(13, 12)
        self.up, self.down = nn.Linear(12, 18), nn.Linear(18, 12)
        self.head = nn.Linear(12, 13)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        return self.head(hidden + self.down(functional.gelu(self.up(hidden)))).flatten(0, 1)


def _check_tensor_parallel_training():
    tokens = torch.arange(12).view(2, 6)
    mesh = _mesh_of_two_axes("data", "tensor")
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    reference = unsharded(FeedForward, "fp32")
    model = parallelize_module(deferred(FeedForward), mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    fastinit.materialize(model)
    expected, losses = _losses(reference, _optimizer(reference), tokens), _losses(model, _optimizer(model), tokens)
    # A matrix that is divided along the sum is multiplied in another order: a few units in the last place of fp32.
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=0)
    assert losses[-1] < losses[0]


def test_training_steps_under_fsdp2_over_tensor_parallelism_have_the_losses_of_the_unsharded_model(ranks):
    ranks.run(_check_tensor_parallel_training, world=4)


# --- checkpoints ------------------------------------------------------------------------------------------------------


SUPPLIED = ("blocks.0.qkv.weight", "blocks.1.up.bias", "mixer.weight", "statistics.running_mean")


def _check_partial_load(directory, dtype, finish):
    import torch.distributed.checkpoint as dcp

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    reference, model = unsharded(Model, dtype), deferred(Model, dtype)
    with torch.no_grad():
        for name in SUPPLIED:
            registered(reference)[name].uniform_(generator=torch.Generator().manual_seed(1))
    _fully_sharded(reference, mesh=mesh)
    dcp.save({name: registered(reference)[name] for name in SUPPLIED}, checkpoint_id=directory)

    _fully_sharded(model, mesh=mesh)
    names = fastinit.materialize(model, empty=True)
    # A shard without elements has nothing to be written, and a computed parameter has its values.
    parameters = dict(model.named_parameters())
    assert set(names) == parameters.keys() - {"decay"}
    unwritten = {name for name in names if parameters[name]._local_tensor.numel()}
    assert set(fastinit.uninitialized(model)) == unwritten
    dcp.load({name: model.state_dict()[name] for name in SUPPLIED}, checkpoint_id=directory)
    assert set(fastinit.uninitialized(model)) == unwritten - set(SUPPLIED)
    with pytest.raises(RuntimeError, match=r"embedding\.weight.*was created without values"):
        model(torch.zeros(2, 3, dtype=torch.long))
    assert set(finish(model)) == unwritten - set(SUPPLIED)
    assert fastinit.uninitialized(model) == []
    assert_same_shards(model, reference)
    model(torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("world, dtype", [(2, "fp32"), (2, "bf16"), (4, "bf16")])
@pytest.mark.parametrize("finish", [fastinit.materialize, fastinit.initialize])
def test_what_a_distributed_checkpoint_does_not_supply_is_initialized_and_nothing_else(
    ranks, tmp_path, world, dtype, finish
):
    ranks.run(_check_partial_load, str(tmp_path), dtype, finish, world=world)


# --- without torch's parallelism --------------------------------------------------------------------------------------


@HALF_AND_FULL
def test_a_deferred_model_that_is_not_sharded_gets_the_values_that_it_would_have_had(dtype):
    model = assert_created_sharded(lambda model: model, Model, dtype)
    assert {tensor.device.type for tensor in registered(model).values()} == {"cpu"}


def test_a_deferred_model_takes_another_dtype_and_other_flags_before_it_is_materialized():
    model = deferred(Model, "fp32")
    model.mixer.weight.requires_grad_(False)
    model.blocks.to(torch.bfloat16)
    fastinit.materialize(model, "cpu")
    expected = registered(unsharded(Model, "fp32"))
    for name, tensor in registered(model).items():
        dtype = torch.bfloat16 if name.startswith("blocks") else expected[name].dtype
        assert same_bits(tensor, expected[name].to(dtype)), name
    assert not model.mixer.weight.requires_grad and model.embedding.weight.requires_grad


def _check_windows(dtype):
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, model = registered(unsharded(Model, dtype)), deferred(Model, dtype)

    def part(name, shape):
        if name.endswith(("qkv.weight", "mixer.weight")):  # columns
            return (slice(None), slice(rank * shape[1] // world, (rank + 1) * shape[1] // world))
        if name.endswith(("norm.weight", "norm.bias")):
            return None
        return (slice(rank * shape[0] // world, (rank + 1) * shape[0] // world), *[slice(None)] * (len(shape) - 1))

    decay = model.decay  # has its values: no window
    names = fastinit.materialize(model, window=part)
    assert model.decay is decay and model.head.weight is model.embedding.weight
    for name, parameter in model.named_parameters():
        expected = whole[name] if name == "decay" else whole[name][part(name, tuple(whole[name].shape)) or ...]
        assert type(parameter) is nn.Parameter and parameter.requires_grad == whole[name].requires_grad
        assert parameter.is_contiguous() and same_bits(parameter, expected), name
    assert set(names) == {name for name, _ in model.named_parameters()} - {"decay"}


@HALF_AND_FULL
def test_windows_of_ones_own_are_the_parts_of_the_unsharded_model(ranks, dtype):
    ranks.run(_check_windows, dtype, world=3)


# --- what ranks have to agree on --------------------------------------------------------------------------------------


def _collectives():
    """Number of collectives that the default group has begun."""
    return dist.group.WORLD._get_sequence_number_for_group()


def _check_seeds_of_ranks(group, joins_first):
    rank, counts = group["rank"], []
    if joins_first:
        dist.init_process_group(**group)
    torch.manual_seed(100 + rank)
    for dtype in ("fp32", "bf16"):
        before = _collectives() if joins_first else 0
        with fastinit.on("cpu", dtype, shard=True):
            model = Model()
        if not joins_first:
            dist.init_process_group(**group)
            joins_first = True
        mesh = init_device_mesh("cpu", (group["world_size"],))
        _fully_sharded(model, mesh=mesh)
        fastinit.materialize(model.blocks)
        fastinit.materialize(model)
        counts.append(_collectives() - before)
    return counts, {name: bits(parameter.full_tensor()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("joins_first", [True, False], ids=["after", "before"])
def test_ranks_that_were_seeded_differently_get_rank_0s_model_by_one_broadcast(ranks, joins_first):
    results = ranks.run(_check_seeds_of_ranks, joins_first, world=3, joined=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100)
        for dtype in ("fp32", "bf16"):
            with fastinit.on("cpu", dtype):
                expected = Model()
    # torch broadcasts an object in two steps: its size, and itself.
    for counts, parameters in results:
        assert counts == [2, 2]
        for name, parameter in expected.named_parameters():
            assert torch.equal(parameters[name], bits(parameter)), name


def _check_seeds_of_fsdp1(group):
    torch.manual_seed(100 + group["rank"])
    with fastinit.on("cpu", "bf16", shard=True):
        model = FeedForward()
    dist.init_process_group(**group)
    device = torch.device("cpu")
    model = FullyShardedDataParallel(model, param_init_fn=fastinit.param_init_fn, device_id=device)
    with FullyShardedDataParallel.summon_full_params(model):
        # Their memory goes when this block ends.
        return {name: bits(parameter).clone() for name, parameter in model.module.named_parameters()}


def test_fsdp1_of_ranks_that_were_seeded_differently_is_rank_0s_model(ranks):
    results = ranks.run(_check_seeds_of_fsdp1, world=2, joined=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100)
        with fastinit.on("cpu", "bf16"):
            expected = FeedForward()
    for parameters in results:
        assert len(parameters) == 7
        for name, parameter in expected.named_parameters():
            assert torch.equal(parameters[name], bits(parameter)), name


def _check_given_seed():
    before = _collectives()
    with fastinit.on("cpu", "bf16", seed=SEED, shard=True):
        model = Model()
    fastinit.materialize(model, window=lambda name, shape: (slice(0, 1), *[slice(None)] * (len(shape) - 1)))
    assert _collectives() == before
    if dist.get_rank() == 0:  # the other one has gone its way
        with fastinit.on("cpu", "bf16", seed=SEED, shard=True):
            model = Model()
        fastinit.materialize(model)
        assert _collectives() == before


def test_a_seed_that_is_given_needs_no_communication(ranks):
    ranks.run(_check_given_seed, world=2)


def _check_different_models(group):
    model = nn.Sequential()
    for seed in range(1 + group["rank"]):
        torch.manual_seed(seed)
        with fastinit.on("cpu", shard=True):
            model.append(nn.Linear(2, 2))
    dist.init_process_group(**group)
    if group["rank"]:
        with pytest.raises(RuntimeError, match="this rank has 2 seeds to agree on and rank 0 1; create the same model"):
            fastinit.materialize(model)
    else:
        fastinit.materialize(model)


def test_ranks_that_have_created_different_models_are_told(ranks):
    ranks.run(_check_different_models, world=2, joined=False)


def _check_end_of_a_rank(group, step):
    torch.manual_seed(group["rank"])
    with fastinit.on("cpu", shard=True):
        model = Model()
    dist.init_process_group(**group | {"timeout": datetime.timedelta(seconds=10)})
    _fully_sharded(model, mesh=init_device_mesh("cpu", (group["world_size"],)))
    if group["rank"] == 0:
        setattr(materialization, step, lambda *args, **kwargs: os._exit(1))
    fastinit.materialize(model)
    model(torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("step", ["from_rank_0", "allocate", "write_pieces"])
def test_the_end_of_a_rank_in_mid_materialize_is_an_error_for_the_others(ranks, step):
    # Theirs comes from materialize where they wait for the seed, otherwise from the first collective after it.
    ended, *others = ranks.outcomes(_check_end_of_a_rank, step, world=3, joined=False)
    assert ended == ("the process has ended", None)
    for error, _ in others:
        assert "Error" in error and "no answer" not in error
        assert "in materialize" in error or step != "from_rank_0"


class Parts(nn.Module):
    """Keeps the views of its weight that it has filled, which torch forbids to ask whether they are leaves."""

    def __init__(self):
        super().__init__()
        self.fused = nn.Linear(4, 12)
        self.parts = self.fused.weight.chunk(3)
        for part in self.parts:
            nn.init.xavier_uniform_(part)


@HALF_AND_FULL
def test_views_that_a_module_keeps_and_has_filled_are_parts_of_its_weight(dtype):
    model = deferred(Parts, dtype)
    fastinit.materialize(model)
    expected = unsharded(Parts, dtype)
    assert same_bits(model.fused.weight, expected.fused.weight)
    assert torch.equal(torch.cat(model.parts).detach(), model.fused.weight)
    assert model.parts[1].data_ptr() == model.fused.weight[4:8].data_ptr()


# --- memory -----------------------------------------------------------------------------------------------------------


class Large(nn.Module):
    """About 400 MB in fp32, of everything that might be made whole on the way."""

    def __init__(self, orthogonal):
        super().__init__()
        self.embedding = nn.Embedding(30_001, 1024, padding_idx=0)
        self.qkv = nn.ModuleList(nn.Linear(2048, 3 * 2048) for _ in range(2))
        for linear in self.qkv:
            for part in linear.weight.chunk(3):
                nn.init.xavier_uniform_(part)
        self.experts = nn.Parameter(torch.empty(16, 512, 2048))
        for expert in self.experts:
            nn.init.kaiming_normal_(expert)
        self.tall = nn.ModuleList(nn.Linear(128, 1 << 16, bias=False) for _ in range(4))
        for linear in self.tall if orthogonal else ():
            nn.init.orthogonal_(linear.weight)


def _status(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def _growth_of_memory(constructor, dtype):
    """Bytes of this rank's shards, and by how much the peak of resident memory grew while they were created."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def create(constructor):
        model = deferred(constructor, dtype)
        assert all(parameter.is_meta for parameter in model.parameters())
        for module in model.modules():
            if module is not model and module._parameters:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        fastinit.materialize(model)
        return model

    create(lambda: nn.Sequential(nn.Linear(64, 64), nn.Embedding(9, 3)))  # what is imported and set up once
    gc.collect()  # what earlier functions have left would be freed meanwhile, or used again
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak starts anew
    before = _status("VmRSS")
    model = create(constructor)
    held = sum(parameter._local_tensor.nbytes for parameter in model.parameters())
    assert all(parameter._local_tensor.any() for parameter in model.parameters())
    return held, _status("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_rank_needs_the_memory_of_its_shards_and_little_more(ranks, dtype):
    for held, growth in ranks.run(_growth_of_memory, functools.partial(Large, False), dtype, world=2):
        assert held > (200 if dtype == "fp32" else 100) * 10**6
        assert growth <= held + (64 << 20)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of resident memory")
def test_an_init_that_needs_the_whole_tensor_holds_one_at_a_time(ranks):
    whole = 4 * 128 << 16
    for held, growth in ranks.run(_growth_of_memory, functools.partial(Large, True), "fp32", world=2):
        assert growth <= held + whole + (64 << 20)


def test_what_only_caught_exceptions_still_hold_takes_no_memory():
    # torch imports its compiler for the first operator on meta, and catches exceptions on the way.
    code = """
import torch, torch.distributed.tensor, fastinit
with fastinit.on("cpu", shard=True):
    model = torch.nn.Linear(1 << 20, 1 << 20, bias=False)
    torch.nn.init.orthogonal_(model.weight)
assert model.weight.is_meta
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# --- refusals ---------------------------------------------------------------------------------------------------------


def _still_deferred(model):
    return all(p.is_meta for name, p in model.named_parameters() if name != "decay")


def test_a_meta_parameter_that_no_context_has_recorded_is_refused_by_name():
    model = deferred(Model)
    model.head = nn.Linear(11, 13, bias=False, device="meta")
    with pytest.raises(ValueError, match=r"fastinit: head\.weight are on the meta device, and no context has recorded"):
        fastinit.materialize(model)
    assert _still_deferred(model)


def test_a_parameter_that_was_replaced_on_the_meta_device_is_refused_by_name():
    model = deferred(Model)
    model.mixer.weight = nn.Parameter(torch.empty(11, 4, device="meta"))
    with pytest.raises(ValueError, match=r"mixer\.weight are on the meta device, and no context has recorded"):
        fastinit.materialize(model)
    assert _still_deferred(model)


@pytest.mark.parametrize(
    "result", [(slice(0, 1),), slice(0, 1), (0, slice(None)), (slice(0, 4, 2), slice(None))], ids=str
)
def test_a_window_that_does_not_fit_is_refused(result):
    model = deferred(Model)
    message = r"window\('mixer\.weight', \(11, 11\)\) returned .*; return a tuple of 2 slices"
    with pytest.raises(ValueError, match=message):
        fastinit.materialize(model, window=lambda name, shape: result if name == "mixer.weight" else None)
    assert _still_deferred(model)
    fastinit.materialize(model)
    assert_same_shards(model, unsharded(Model, "fp32"))


def test_what_is_on_meta_is_uninitialized_and_initialize_points_to_materialize():
    model = deferred(Model)
    assert set(fastinit.uninitialized(model)) == {name for name, _ in model.named_parameters()} - {"decay"}
    with pytest.raises(ValueError, match=r"are on the meta device; use fastinit.materialize\(model\)"):
        fastinit.initialize(model)
    assert _still_deferred(model)


def test_windows_and_shard_exclude_empty():
    with pytest.raises(ValueError, match="empty=True and window= exclude each other"):
        fastinit.materialize(deferred(Model), window=lambda name, shape: None, empty=True)
    with pytest.raises(ValueError, match=r"shard=True and empty=True exclude each other.*materialize\(.*empty=True"):
        fastinit.on("cpu", shard=True, empty=True)


def _check_refusals_of_shards():
    mesh = init_device_mesh("cpu", (2,))
    model = deferred(Model)
    _fully_sharded(model, mesh=mesh)
    with pytest.raises(ValueError, match="device='cuda', but the model is sharded on a mesh of 'cpu' devices"):
        fastinit.materialize(model, "cuda")
    with pytest.raises(ValueError, match=r"window= was given, but 'frozen' is sharded already, as a DTensor"):
        fastinit.materialize(model, window=lambda name, shape: (slice(None),) * len(shape))
    assert _still_deferred(model)

    partial = deferred(Model)
    whole = DTensor.from_local(partial.mixer.weight.detach(), mesh, [Partial()], run_check=False)
    partial.mixer.weight = nn.Parameter(whole)
    with pytest.raises(ValueError, match=r"contain Partial.*initialize the tensor as Shard or Replicate"):
        fastinit.materialize(partial)
    assert _still_deferred(partial)


def test_shards_on_other_devices_with_windows_or_without_elements_of_their_own_are_refused(ranks):
    ranks.run(_check_refusals_of_shards, world=2)


def _check_failure(step):
    mesh = init_device_mesh("cpu", (2,))
    model = deferred(Model)
    _fully_sharded(model, mesh=mesh)
    kept = getattr(materialization, step)
    calls = []

    def fail_later(*args, **kwargs):
        calls.append(args)
        if len(calls) == (8 if step == "allocate" else 1):
            raise MemoryError("none left")
        return kept(*args, **kwargs)

    setattr(materialization, step, fail_later)
    try:
        with pytest.raises(MemoryError, match="none left"):
            fastinit.materialize(model)
    finally:
        setattr(materialization, step, kept)
    assert all(p._local_tensor.is_meta for name, p in model.named_parameters() if name != "decay")
    fastinit.materialize(model)
    reference = unsharded(Model, "fp32")
    _fully_sharded(reference, mesh=mesh)
    assert_same_shards(model, reference)
    tokens = torch.arange(12).view(2, 6)
    assert same_bits(model(tokens), reference(tokens))


@pytest.mark.parametrize("step", ["allocate", "write_pieces"])
def test_after_a_failure_parameters_are_as_before_and_can_be_materialized(ranks, step):
    ranks.run(_check_failure, step, world=2)

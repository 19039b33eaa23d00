"""Sharded creation on two GPUs with NCCL: on every mesh the bits of the CPU's unsharded model, which then trains.

Skipped where there are fewer. With `--gloo` the ranks are two processes on the CPU.
"""

import datetime
import os
import threading

import pytest
import torch
import torch.distributed as dist
from models import DTYPES, SEED, digest, registered
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from two_gpus import WIDTH, Block, Model, join, kind, loss_of, shard, whole

import fastinit
from fastinit import materialization

MESHES = {
    "FSDP2": {"shard": 2},
    "HSDP 2 x 1": {"replicate": 2, "shard": 1},
    "HSDP 1 x 2": {"replicate": 1, "shard": 2},
    "TP": {"tensor": 2},
    "FSDP2 2 x TP 1": {"shard": 2, "tensor": 1},
    "FSDP2 1 x TP 2": {"shard": 1, "tensor": 2},
}


def recorded(device, dtype, shard=False):
    """A model of the block, on whose seed ranks that are seeded differently agree."""
    torch.manual_seed(SEED + (dist.get_rank() if dist.is_initialized() else 0))
    with fastinit.on(device, dtype, shard=shard):
        return Model()


def existing(device, dtype, **meshes):
    """A model that is sharded and has memory before the block."""
    with torch.device("meta"):
        model = Model().to(DTYPES[dtype])
    shard(model, **meshes)
    model.to_empty(device=device)
    with fastinit.on(device, dtype, seed=SEED):
        model.init_weights()
    return model


ORDERS = {"materialize": recorded, "init_weights": existing}


def digests(device):
    return {f"{order} {dtype}": digest(whole(ORDERS[order](device, dtype))) for dtype in DTYPES for order in ORDERS}


# On the ranks


def collectives():
    """Number of those that the group of all ranks has begun."""
    return dist.group.WORLD._get_sequence_number_for_group()


def train(model, backward=torch.Tensor.backward):
    loss = loss_of(model, kind())
    backward(loss)
    assert loss.isfinite()


def on_mesh(axes):
    mesh = init_device_mesh(kind(), tuple(axes.values()), mesh_dim_names=tuple(axes))
    data = tuple(name for name in axes if name != "tensor")
    meshes = {"data": mesh[data] if data else None, "tensor": mesh["tensor"] if "tensor" in axes else None}
    found = {}
    for dtype in DTYPES:
        begun = collectives()
        model = recorded(kind(), dtype, shard=True)
        assert collectives() == begun + 2, "the size of an object that has rank 0's seed, and the object"
        shard(model, **meshes)
        begun = collectives()
        fastinit.materialize(model)
        assert collectives() == begun
        assert model.head.weight is model.embedding.weight
        assert all(parameter.device.type == kind() for parameter in model.parameters())
        found[f"materialize {dtype}"] = digest(whole(model))
        train(model)
        model = existing(kind(), dtype, **meshes)
        found[f"init_weights {dtype}"] = digest(whole(model))
        train(model)
    return found


def in_fsdp1():
    found = {}
    for dtype in DTYPES:
        model = FullyShardedDataParallel(
            recorded(kind(), dtype, shard=True),
            param_init_fn=fastinit.param_init_fn,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            device_id=torch.device(kind(), torch.cuda.current_device() if kind() == "cuda" else None),
            use_orig_params=True,
        )
        found[f"materialize {dtype}"] = digest(whole(model.module, model))
        train(model)
    return found


def in_zero3():
    join()
    import deepspeed

    found = {}
    for dtype in DTYPES:
        if DTYPES[dtype] not in deepspeed.accelerator.get_accelerator().supported_dtypes():
            continue  # fp16 on CPUs
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
            "bf16": {"enabled": dtype == "bf16"},
            "fp16": {"enabled": dtype == "fp16"},
        }
        model = recorded(kind(), dtype, fastinit.deepspeed.zero3(config))
        optimizer = torch.optim.AdamW(model.parameters())
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
        found[f"materialize {dtype}"] = digest(whole(engine.module))
        train(engine, engine.backward)
        engine.step()
    return found


def ended_in(group, step):
    """Rank 0 ends at that step of `materialize`; rank 1 goes on to the first collective of training."""
    # Before there is a group, so that the seed is agreed on by `materialize`.
    model = recorded("cuda" if group["backend"] == "nccl" else "cpu", "bf16", shard=True)
    # After a timeout NCCL's watchdog sleeps for four times as long, a minute if nobody says otherwise.
    os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "500"
    dist.init_process_group(**group | {"timeout": datetime.timedelta(seconds=10)})
    shard(model, data=init_device_mesh(kind(), (2,)))
    if dist.get_rank() == 0:
        setattr(materialization, step, lambda *args, **kwargs: os._exit(1))
    fastinit.materialize(model)
    train(model)


# Tests


@pytest.fixture(scope="module")
def on_cpu():
    return digests("cpu")


def assert_digests_are(expected, found, record_property):
    record_property("digests", found)
    assert found == {case: expected[case] for case in found}


def test_one_gpu(two_devices, on_cpu, record_property):
    assert_digests_are(on_cpu, digests(two_devices[0]), record_property)


@pytest.mark.parametrize("mesh", MESHES)
def test_of_every_mesh(ranks, on_cpu, mesh, record_property):
    for found in ranks.run(on_mesh, MESHES[mesh], world=2):
        assert_digests_are(on_cpu, found, record_property)


def test_fsdp1(ranks, on_cpu, record_property):
    for found in ranks.run(in_fsdp1, world=2):
        assert_digests_are(on_cpu, found, record_property)


def test_zero3(ranks, on_cpu, record_property):
    pytest.importorskip("deepspeed")
    for found in ranks.run(in_zero3, world=2):
        assert_digests_are(on_cpu, found, record_property)


@pytest.mark.parametrize("step", ["from_rank_0", "write_pieces"])
def test_the_end_of_a_rank_in_mid_materialize_ends_the_other_in_time(ranks, step):
    ended, (error, _) = ranks.outcomes(ended_in, step, world=2, joined=False)
    assert ended == ("the process has ended", None)
    assert error is not None and "no answer" not in error


def test_two_threads_create_on_two_gpus_at_once(two_devices):
    together = threading.Barrier(2, timeout=60)
    found = {}

    def create(index):
        for turn in range(10):
            together.wait()
            for dtype in DTYPES:
                with fastinit.on(two_devices[index], dtype, seed=turn):
                    found[index, turn, dtype] = registered(Model())

    threads = [threading.Thread(target=create, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 * 10 * len(DTYPES)
    for (index, turn, dtype), tensors in found.items():
        with fastinit.on("cpu", dtype, seed=turn):
            expected = Model()
        assert all(tensor.device == two_devices[index] for tensor in tensors.values())
        assert digest(tensors) == digest(registered(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_of_a_side_stream_is_used_on_another(dtype, on_cpu):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # Memory that the side stream is still to write, and which its allocator hands out again at once: fills of
        # another stream would be overwritten.
        torch.cuda._sleep(100_000_000)
        late = [torch.full((WIDTH, 4 * WIDTH), float("nan"), device="cuda") for _ in range(64)]
        del late
        model = recorded("cuda", dtype)
    torch.cuda.current_stream().wait_stream(side)
    tokens = torch.arange(32, device="cuda").view(4, 8)
    logits = model(tokens)
    assert digest(registered(model)) == on_cpu[f"materialize {dtype}"]
    assert torch.equal(logits, recorded("cpu", dtype).to("cuda")(tokens))

"""What creating a large model as its shards costs a rank: time, memory, and whether the values are right.

A Llama-shaped model of torch.nn modules in bf16 under FSDP2 (`fully_shard`), HSDP, FSDP2 over tensor parallelism and
DeepSpeed ZeRO-3: by `fastinit.on(..., shard=...)` and `fastinit.materialize`, beside the meta device, `to_empty` and
the `reset_parameters` of each module, and beside `deepspeed.zero.Init`.

Real ranks are a process for each GPU (nccl), or two on the CPU (gloo); a figure is of the slowest rank. Simulated ones
are played by one process on a group that communicates nothing: mesh, sharding and fills are those of the real rank, its
time holds no communication, and what ranks would disturb each other is not seen. Each rank that is played is a round.
Memory is the peak beyond the rank's own shards and buffers. Pieces of a dozen random tensors of fastinit's model are
compared with what it computes on the CPU, bit for bit.
"""

import math
import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import peers
import pytest
import torch
import torch.distributed as dist

import fastinit
from fastinit.cli import machine, measure, text
from fastinit.cli.models import LLAMA_7B, LLAMA_70B, Decoder, DecoderConfig

# Touvron et al. 2023, table 2; the largest first.
LLAMA_13B = DecoderConfig(vocabulary=32_000, width=5120, layers=40, heads=40, hidden=13_824)
SHAPES = (
    LLAMA_70B,
    DecoderConfig(vocabulary=32_000, width=6656, layers=60, heads=52, hidden=17_920),
    LLAMA_13B,
    LLAMA_7B,
)
BF16 = torch.bfloat16
SIMULATED = 8  # ranks
PLAYED = (0, 3, 7)  # of them, after rank 0 once to import what is imported
DEEPSPEED = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
COMPARED = 2**22  # elements at most of each tensor that is compared


@dataclass(frozen=True, slots=True)
class Part:
    """A kind of sharding: the other way, the mesh of so many ranks (None: they are too few), the names of its
    dimensions, and how many ranks hold each shard."""

    other: str
    mesh: Callable[[int], tuple[int, ...] | None]
    names: tuple[str, ...] = ("data",)
    holders: int = 1


META = "meta, to_empty, reset_parameters"
PARTS = {
    "fsdp2": Part(META, lambda ranks: (ranks,)),
    "hsdp": Part(META, lambda ranks: (2, ranks // 2) if ranks >= 4 else None, ("replicas", "data"), holders=2),
    "fsdp2-tp": Part(META, lambda ranks: (ranks // 2, 2), ("data", "tensor")),
    "zero3": Part("deepspeed.zero.Init", lambda ranks: (ranks,)),
}


@dataclass(frozen=True, slots=True)
class Job:
    """What each process of a part is started with."""

    part: str
    way: str
    ranks: int
    simulated: bool
    device: str
    config: DecoderConfig
    rounds: int

    @property
    def seed(self) -> int | None:
        return 1 if self.simulated else None  # there is nobody to agree with on a key


@dataclass(frozen=True, slots=True)
class Round:
    """One creation on one rank. `different`: tensors whose values are not the CPU's; None if they were not compared."""

    seconds: float
    parts: dict[str, float]
    local_bytes: int
    beyond: int | None
    different: list[str] | None


@pytest.mark.parametrize("way", ["fastinit", "the other way"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind, largest", [("real", LLAMA_13B), ("real", LLAMA_70B), ("simulated", LLAMA_70B)])
def test_sharded(figure, main_device, quick, kind, largest, part, way):
    gpus = torch.cuda.device_count() if main_device.type == "cuda" else 0
    ranks = SIMULATED if kind == "simulated" else gpus if gpus else 2
    config = largest_that_fits(part, ranks, gpus, largest, quick)
    if largest != LLAMA_70B and config == largest_that_fits(part, ranks, gpus, LLAMA_70B, quick):
        pytest.skip("the same as the largest that fits")
    case = f"{part}, {text.count(config.parameters)}, {ranks} {kind} ranks, {main_device.type}"
    way = way if way == "fastinit" else PARTS[part].other
    job = Job(part, way, ranks, kind == "simulated", main_device.type, config, 1 if quick else 3)
    with figure(case, way) as record:
        if ranks == 1 or PARTS[part].mesh(ranks) is None:
            raise peers.Unavailable(f"unsupported: {ranks} ranks are too few")
        peers.require("deepspeed" if part == "zero3" else None)
        if job.simulated:
            rounds = [[each] for each in measure.in_new_process(play_ranks, job, timeout=120)]
        else:
            rounds = list(zip(*measure.on_ranks(run_rank, ranks, job.device, job), strict=True))
        slowest = [max(each, key=lambda of_rank: of_rank.seconds) for each in rounds[1:]]
        everywhere = [of_rank for each in rounds for of_rank in each]
        median = statistics.median_low([each.seconds for each in slowest])
        record(
            [each.seconds for each in slowest],
            parts=next(each.parts for each in slowest if each.seconds == median),
            beyond=max((each.beyond for each in everywhere if each.beyond is not None), default=None),
            local_bytes=max(each.local_bytes for each in everywhere), mesh=PARTS[part].mesh(ranks),
        )  # fmt: skip
    if way == "fastinit":
        compared = [each.different for each in everywhere if each.different is not None]
        assert len(compared) == (1 if job.simulated else ranks) and not any(compared)


def largest_that_fits(part, ranks, gpus, largest, quick):
    """The largest model up to that one of which a rank has room for its share."""
    if not gpus or quick:
        return DecoderConfig.of_size(1_000_000 if quick else 100_000_000)
    room = min(gpu["memory"] for gpu in machine.gpus())
    for config in SHAPES[SHAPES.index(largest) :]:
        tensor = BF16.itemsize * max(config.vocabulary, config.hidden) * config.width
        # A fifth for what the other ways need beyond the model, and for what is no tensor: CUDA's own, NCCL's.
        if PARTS[part].holders * BF16.itemsize * config.parameters // ranks + 4 * tensor < 0.8 * room:
            return config
    return LLAMA_7B


# On the ranks


def run_rank(device: torch.device, job: Job) -> list[Round]:
    """All rounds of a real rank, the first of which imports and compares."""
    return [measure_round(job, device, compare=turn == 0) for turn in range(job.rounds + 1)]


def play_ranks(job: Job) -> list[Round]:
    """One round of rank 0, which imports and compares, and one of each rank that is played."""
    rounds = []
    # torch would divide the ranks among the GPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    for turn, rank in enumerate([0, *PLAYED[: 1 if job.rounds == 1 else None]]):
        with ThreadPoolExecutor(1) as thread:  # torch keeps what it knows of a mesh by thread
            rounds.append(thread.submit(play_rank, job, rank, turn == 0).result())
    return rounds


def play_rank(job: Job, rank: int, compare: bool) -> Round:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(job.ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # DeepSpeed wants it
    dist.init_process_group("fake", rank=rank, world_size=job.ranks, store=FakeStore())
    result = measure_round(job, torch.device(job.device, 0 if job.device == "cuda" else None), compare)
    dist.destroy_process_group()
    return result


def measure_round(job: Job, device: torch.device, compare: bool) -> Round:
    if job.part == "zero3" and job.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        # It would compile an all-reduce through shared memory, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    measure.clean_up(device)
    if device.type == "cpu":
        measure.warm_memory(BF16.itemsize * job.config.parameters * PARTS[job.part].holders // job.ranks)
    if not job.simulated:
        dist.barrier()
    memory, stages = measure.Memory(device), Stages(device)
    model, report = create(job, device, stages)
    local_bytes = sum(local_of(job, each).nbytes for each in model.parameters())
    local_bytes += sum(buffer.nbytes for buffer in model.buffers())
    beyond = memory.beyond(local_bytes)
    different = different_tensors(job, model, report.seed) if compare and report is not None else None
    return Round(sum(stages.seconds.values()), stages.parts(report), local_bytes, beyond, different)


class Stages:
    """Seconds of what is done one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        measure.synchronize(device)
        self._began = time.perf_counter()

    def ended(self, stage: str) -> None:
        measure.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage] = now - self._began
        self._began = now

    def parts(self, report: fastinit.Report | None) -> dict[str, float]:
        """All of them, and of which fastinit's report tells."""
        names = () if report is None else ("allocation", "fills")
        return self.seconds | {f"of it {name}": getattr(report, f"seconds_{name}") for name in names}


def create(job: Job, device: torch.device, stages: Stages) -> tuple[Any, fastinit.Report | None]:
    """The model as this rank has it."""
    if job.part == "zero3":
        return create_partitioned(job, device, stages)
    shard = sharder(job)
    if job.way == "fastinit":
        with fastinit.on(device, BF16, shard=True, seed=job.seed) as report:
            model = Decoder(job.config)
        stages.ended("constructor")
        shard(model)
        stages.ended("sharding")
        fastinit.materialize(model, report=report)
        stages.ended("materialize")
        return model, report
    with measure.default_dtype(BF16), torch.device("meta"):
        model = Decoder(job.config)
    stages.ended("constructor")
    shard(model)
    stages.ended("sharding")
    model.to_empty(device=device)
    stages.ended("to_empty")
    peers.initialize(model)
    stages.ended("reset_parameters")
    return model, None


def create_partitioned(job: Job, device: torch.device, stages: Stages) -> tuple[Any, fastinit.Report | None]:
    import deepspeed

    report = None
    if job.way == "fastinit":
        with fastinit.on(device, BF16, shard=fastinit.deepspeed.zero3(DEEPSPEED), seed=job.seed) as report:
            model = Decoder(job.config)
    else:
        with deepspeed.zero.Init(config_dict_or_path=DEEPSPEED):
            model = Decoder(job.config)
    stages.ended("constructor")
    return model, report


def sharder(job: Job) -> Callable[[Any], None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(job.device, PARTS[job.part].mesh(job.ranks), mesh_dim_names=PARTS[job.part].names)
    data = mesh["data"] if job.part == "fsdp2-tp" else mesh
    by_columns = ("attention.query", "attention.key", "attention.value", "gate", "up")
    plan = {f"layers.*.{name}": ColwiseParallel() for name in by_columns}
    plan |= {f"layers.*.{name}": RowwiseParallel() for name in ("attention.output", "down")}
    plan["embedding"] = RowwiseParallel(input_layouts=Replicate())
    plan["head"] = ColwiseParallel(output_layouts=Replicate())

    def shard(model: Any) -> None:
        if job.part == "fsdp2-tp":
            parallelize_module(model, mesh["tensor"], plan)
        for layer in model.layers:
            fully_shard(layer, mesh=data)
        fully_shard(model, mesh=data)

    return shard


def local_of(job: Job, parameter: Any) -> torch.Tensor:
    return parameter.ds_tensor if job.part == "zero3" else parameter.to_local()


# Values


@torch.no_grad()
def different_tensors(job: Job, model: Any, seed: int) -> list[str]:
    """Which of a dozen random matrices are not, in some rows, what fastinit computes of the same model on the CPU."""
    with fastinit.on("cpu", BF16, seed=seed, shard=True):
        reference = Decoder(job.config)
    parameters = dict(model.named_parameters())
    matrices = sorted(name for name, parameter in reference.named_parameters() if parameter.dim() > 1)
    chosen = sorted(random.Random(0).sample(matrices, min(12, len(matrices))))
    pieces = {name: piece_of(job, name, parameters[name]) for name in chosen}

    def only_pieces(name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        return pieces[name][0] if name in pieces else tuple(slice(0, 0) for _ in shape)

    fastinit.materialize(reference, window=only_pieces)
    expected = dict(reference.named_parameters())
    return [name for name, (_, values) in pieces.items() if not torch.equal(bits(values), bits(expected[name]))]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(torch.int16)


def piece_of(job: Job, name: str, parameter: Any) -> tuple[tuple[slice, ...], torch.Tensor]:
    """Some of the rows of a parameter that this rank has, and where they lie in the whole."""
    if job.part == "zero3":
        # The whole rows of this rank's flat slice.
        columns, size = parameter.ds_shape[1], parameter.ds_tensor.numel()
        begin = dist.get_rank() * size
        end = min(begin + size, parameter.ds_numel)
        row, column = -(-begin // columns), 0
        held = parameter.ds_tensor[row * columns - begin : end // columns * columns - begin].view(-1, columns)
    else:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        # By torch's own account of where a shard lies, not by fastinit's.
        placed = (parameter.shape, parameter.device_mesh, parameter.placements)
        held, (row, column) = parameter.to_local(), compute_local_shape_and_global_offset(*placed)[1]
    rows, columns = held.shape
    count = min(rows, max(COMPARED // columns, 1))
    first = random.Random(name).randrange(rows - count + 1)
    window = (slice(row + first, row + first + count), slice(column, column + columns))
    return window, held[first : first + count]


# Windows


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_rows(figure, main_device, quick, ranks):
    """Creation as the rows that the first of so many ranks would hold, in one process."""
    config = peers.shape_for(main_device, quick, on_cpu=100_000_000)

    def rows(_, shape):
        return (slice(0, math.ceil(shape[0] / ranks)), *(slice(None) for _ in shape[1:])) if shape else ()

    last = {}

    def run():
        measure.clean_up(main_device)
        if main_device.type == "cpu":
            measure.warm_memory(BF16.itemsize * config.parameters // ranks)
        memory, stages = measure.Memory(main_device), Stages(main_device)
        with fastinit.on(main_device, BF16, seed=1, shard=True) as report:
            model = Decoder(config)
        stages.ended("constructor")
        fastinit.materialize(model, window=rows, report=report)
        stages.ended("materialize")
        local_bytes = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        last.update(parts=stages.parts(report), beyond=memory.beyond(local_bytes))
        return sum(stages.seconds.values())

    with figure(f"rows of 1 of {ranks} ranks, {text.count(config.parameters)}, {main_device}", "fastinit") as record:
        record(run).update(last)

"""What creating a large model as its shards costs a rank: time, memory, and whether the values are right.

    python benchmarks/large_sharded.py                     # as large as this machine allows, 70B at most
    python benchmarks/large_sharded.py --quick             # a tiny model, to see that everything runs
    python benchmarks/large_sharded.py --plot FILE.json    # the picture of a run, on a machine with matplotlib

A Llama-shaped model of torch.nn modules in bf16, in four parts, for 8 ranks:

- fsdp2: `fully_shard` on a mesh of 8;
- hsdp: on a mesh of 2 x 4, so that two ranks hold each shard;
- fsdp2-tp: `parallelize_module` and `fully_shard` on a mesh of 4 x 2;
- zero3: DeepSpeed ZeRO-3.

The first three create it under `fastinit.on(..., shard=True)` and `fastinit.materialize`, against the meta device,
`to_empty` and the `reset_parameters` of each module; the last under `fastinit.on(..., shard=zero3(config))`, against
`deepspeed.zero.Init`.

Real ranks, started by torchrun, are one for each GPU (nccl), or CPU processes (gloo) where there is none. Where there
are fewer than 8, one process also plays each of 8 ranks in turn, on a process group that communicates nothing: mesh,
sharding and fills are those of the real rank, its time holds no communication, and what ranks would disturb each other
is not seen. Such figures are called simulated wherever they stand.

Of each creation these seconds are told: the constructor, sharding (which is torch's), fastinit's own Python in
`materialize`, the broadcast of the key, the allocation of memory, the fills. They are those of the slowest rank, of the
repeat whose total is the median; a GPU's allocator holds nothing when a creation starts. Memory is the peak of what was
allocated beyond the rank's own shards and buffers; on the CPU, of resident memory. Pieces of a dozen random tensors are
compared with what fastinit computes on the CPU, bit for bit: gathered from all ranks, or those that a simulated rank
holds.

Each part is a process group of its own, so that one that fails or hangs costs only itself: its error is in the
results. The exit status is 1 if one failed, a value differs, or a limit was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastinit
from fastinit import context, deepspeed, execution, materialization
from fastinit.cli import machine, measure, text
from fastinit.cli.models import LLAMA_7B, LLAMA_70B, Decoder, DecoderConfig

Record = dict[str, Any]

# Touvron et al. 2023, table 2; the largest first.
SHAPES = {
    "70B": LLAMA_70B,
    "33B": DecoderConfig(vocabulary=32_000, width=6656, layers=60, heads=52, hidden=17_920),
    "13B": DecoderConfig(vocabulary=32_000, width=5120, layers=40, heads=40, hidden=13_824),
    "7B": LLAMA_7B,
}
DTYPE = torch.bfloat16
RANKS = 8  # that the plan is for
DEEPSPEED_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
}
COMPARED = 2**22  # elements at most of each tensor that is compared

# What fastinit must keep on GPUs.
AFTER_PYTHON = 0.2  # seconds of broadcast, allocation and fills, for the 70B model
BEYOND = 64 << 20  # bytes of memory beyond the rank's own


# One rank of one part


@dataclass(frozen=True, slots=True)
class Job:
    """What each process of a part is started with.

    Args:
        part: a key of `PARTS`.
        ranks: of the process group.
        mesh: sizes of their mesh's axes.
        simulated: whether this one process plays them all.
        device: "cuda" or "cpu".
        config: the model's shape.
        repeats: of each creation by real ranks; every simulated one creates the model once.
        patience: seconds after which no further repeat or simulated rank starts; after half of them only fastinit's.
        path: of the file for the results.
    """

    part: str
    ranks: int
    mesh: tuple[int, ...]
    simulated: bool
    device: str
    config: DecoderConfig
    repeats: int
    patience: float
    path: Path

    def start(self) -> torch.device:
        if self.device == "cpu":
            dist.init_process_group("gloo")
            return torch.device("cpu")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device


class Clock:
    """Seconds of consecutive stages on this rank; what fastinit does inside of them counts by itself."""

    # Where fastinit calls what is timed.
    INSIDE = (
        ("key broadcast", context, "from_rank_0"),
        ("key broadcast", materialization, "from_rank_0"),
        ("allocation", materialization, "reserve"),
        ("allocation", materialization, "allocate"),
        ("allocation", deepspeed, "reserve"),
        ("allocation", deepspeed, "allocate"),
        ("fills", execution, "run_batch"),
    )

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Clock:
        for stage, module, name in self.INSIDE:
            timed = self._timed(stage, getattr(module, name))
            self._patches.enter_context(mock.patch.object(module, name, timed))
        if dist.get_backend() != "fake":  # a simulated rank has nobody to wait for
            dist.barrier()
        measure.synchronize(self._device)
        self._inside = 0.0
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def lap(self, stage: str) -> None:
        measure.synchronize(self._device)
        now = time.perf_counter()
        self._add(stage, now - self._began - self._inside)
        self._inside = 0.0
        self._began = time.perf_counter()

    def _timed(self, stage: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if stage == "fills":
                    measure.synchronize(self._device)  # until they are done, not only started
                taken = time.perf_counter() - began
                self._add(stage, taken)
                self._inside += taken

        return timed

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


Create = Callable[[Clock], tuple[nn.Module, "int | None"]]


class Piece(NamedTuple):
    """A part of a tensor: where it lies in the whole, and its values."""

    window: tuple[slice, ...]
    values: Tensor


@dataclass(frozen=True, slots=True)
class Ways:
    """What a part measures on one rank.

    Args:
        create: how to create the model, in stages of a clock, by name, fastinit first; it tells the seed.
        local: the memory that this rank has of a parameter.
        piece: something of a parameter; called on all ranks, each time in the same order.
    """

    create: dict[str, Create]
    local: Callable[[Any], Tensor]
    piece: Callable[[str, nn.Parameter], Piece]

    def first(self, count: int) -> Ways:
        return replace(self, create=dict(list(self.create.items())[:count]))


def run_rank(job: Job) -> None:
    """All of a part that this process does: one real rank, or every simulated one in turn."""
    results: Record = {"values": [], "records": []}
    began = time.monotonic()

    def take(rounds: list[Record]) -> int:
        """Add the ranks' results of a round, and say how many of the ways there is time for in another one."""
        for each in rounds:
            results["values"] += each["values"]
            results["records"] += each["records"]
        if not job.simulated and dist.get_rank():
            return 0
        job.path.write_text(json.dumps(results))
        say_progress(job, rounds)
        spent = (time.monotonic() - began) / job.patience if results["records"] else 0.0
        return 2 if spent < 0.5 else 1 if spent < 1 else 0  # fastinit, the first one, on all ranks if possible

    count = 2
    if job.simulated:
        # The first and the last rank before those between them.
        for turn, rank in enumerate(sorted(range(job.ranks), key=lambda rank: rank not in (0, job.ranks - 1))):
            # A thread for each: torch keeps what it knows of a mesh by thread.
            with ThreadPoolExecutor(1) as thread:
                of_rank = thread.submit(simulate, job, rank, count, warm_up=turn == 0).result()
            count = take([of_rank])
            if not count:
                return
        return
    device = job.start()
    ways = PARTS[job.part].make(job, device)
    for repeat in range(job.repeats + 1):  # the first one imports and compiles
        of_rank = measure_ways(job, ways.first(count), device, repeat - 1, keep=repeat > 0, check=repeat == 0)
        agreed = [take(gathered(of_rank))]
        dist.broadcast_object_list(agreed, src=0)
        count = agreed[0]
        if not count:
            break
    dist.destroy_process_group()


def simulate(job: Job, rank: int, count: int, *, warm_up: bool) -> Record:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(job.ranks), "LOCAL_RANK": "0"}
    device = torch.device("cuda", 0) if job.device == "cuda" else torch.device("cpu")
    dist.init_process_group("fake", rank=rank, world_size=job.ranks, store=FakeStore())
    try:
        ways = PARTS[job.part].make(job, device).first(count)
        if warm_up:
            measure_ways(job, ways, device, 0, keep=False, check=False)
        return measure_ways(job, ways, device, 0, keep=True, check=True)
    finally:
        dist.destroy_process_group()


def measure_ways(job: Job, ways: Ways, device: torch.device, repeat: int, *, keep: bool, check: bool) -> Record:
    """One creation in each way, in turns: their records if they are to be kept, and the values if they are checked."""
    found: Record = {"values": [], "records": []}
    for way, create in ways.create.items():
        clean_up(device)
        if device.type == "cpu":
            measure.warm_memory(DTYPE.itemsize * job.config.parameters * PARTS[job.part].holders // job.ranks)
        before = measure.Memory(device)
        record = {"way": way, "rank": dist.get_rank(), "repeat": repeat}
        try:
            with Clock(device) as clock:
                model, seed = create(clock)
        except Exception as error:
            if way == "fastinit":
                raise
            # So that what fails on every rank, for want of memory say, does not cost fastinit's figures.
            found["records"].append({**record, "error": "".join(traceback.format_exception_only(error))[-1500:]})
            continue
        peak = before.peak()
        with torch.no_grad():
            local = sum(ways.local(each).nbytes for each in model.parameters())
            local += sum(buffer.nbytes for buffer in model.buffers())
            if check and way == "fastinit":
                found["values"].append(compare_with_cpu(job.config, ways, model, seed))
        if keep:
            beyond = None if peak is None else peak - local
            found["records"].append({**record, "seconds": clock.seconds, "local bytes": local, "peak beyond": beyond})
        del model
    clean_up(device)
    return found


def clean_up(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gathered(value: Record) -> list[Record]:
    """The values of all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


PROGRESS = "... "  # begins the lines that a part shows while it runs


def say_progress(job: Job, rounds: list[Record]) -> None:
    shown = []
    for each in rounds:
        for record in each["records"]:
            taken = text.seconds(sum(record["seconds"].values())) if "seconds" in record else "failed"
            shown.append(f"{record['way']} {taken}")
    what = f"rank {rounds[0]['records'][0]['rank']}" if job.simulated else f"{len(rounds)} ranks"
    print(f"{PROGRESS}{job.part}, {what}: {', '.join(shown) or 'values compared'}", flush=True)


def compare_with_cpu(config: DecoderConfig, ways: Ways, model: nn.Module, seed: int | None) -> Record:
    """Pieces of a dozen random matrices against what fastinit computes of the same model on the CPU."""
    with fastinit.on("cpu", DTYPE, seed=seed, shard=True):
        reference = Decoder(config)
    matrices = sorted(name for name, parameter in reference.named_parameters() if parameter.dim() > 1)
    parameters = dict(model.named_parameters())
    pieces = {
        name: ways.piece(name, parameters[name])
        for name in sorted(random.Random(0).sample(matrices, min(12, len(matrices))))
    }

    def only_pieces(name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        return pieces[name].window if name in pieces else tuple(slice(0, 0) for _ in shape)

    fastinit.materialize(reference, window=only_pieces)
    expected = dict(reference.named_parameters())
    return {
        "rank": dist.get_rank(),
        "tensors": list(pieces),
        "elements": sum(piece.values.numel() for piece in pieces.values()),
        "different": [
            name for name, piece in pieces.items() if not torch.equal(bits(piece.values.cpu()), bits(expected[name]))
        ],
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def some_rows(name: str, rows: int, columns: int) -> slice:
    """Neighbouring rows, the same on every rank."""
    count = min(rows, max(COMPARED // columns, 1))
    first = random.Random(name).randrange(rows - count + 1)
    return slice(first, first + count)


# Parts


class Part(NamedTuple):
    """How one kind of sharding is measured.

    Args:
        make: its ways on the rank that calls it.
        mesh: sizes of the mesh's axes for so many ranks; None if it makes no sense for them.
        holders: how many ranks hold each shard.
        requires: a package that has to be there.
    """

    make: Callable[[Job, torch.device], Ways]
    mesh: Callable[[int], tuple[int, ...] | None]
    holders: int = 1
    requires: str = "torch"


def dtensor_ways(job: Job, device: torch.device, shard: Callable[[nn.Module], None]) -> Ways:
    """Creation of a model that `shard` turns into DTensors, by fastinit and by torch."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    def by_fastinit(clock: Clock) -> tuple[nn.Module, int]:
        # There is nobody to agree on a key with in a simulation.
        with fastinit.on(device, DTYPE, shard=True, seed=1 if job.simulated else None) as init:
            model = Decoder(job.config)
        clock.lap("constructor")
        shard(model)
        clock.lap("sharding")
        fastinit.materialize(model)
        clock.lap("materialize")
        return model, init.seed

    def by_torch(clock: Clock) -> tuple[nn.Module, None]:
        with measure.default_dtype(DTYPE), torch.device("meta"):
            model: nn.Module = Decoder(job.config)
        clock.lap("constructor")
        shard(model)
        clock.lap("sharding")
        model.to_empty(device=device)
        clock.lap("to_empty")
        with torch.no_grad():
            for module in model.modules():
                if reset := getattr(module, "reset_parameters", None):
                    reset()
        clock.lap("reset_parameters")
        return model, None

    def piece(name: str, parameter: Any) -> Piece:
        if not job.simulated:
            return rows_of(name, parameter.full_tensor())
        local = parameter.to_local()
        # By torch's own account of where a shard lies, not by fastinit's.
        placed = (parameter.shape, parameter.device_mesh, parameter.placements)
        _, starts = compute_local_shape_and_global_offset(*placed)
        rows, columns = local.shape
        chosen = some_rows(name, rows, columns)
        window = (
            slice(starts[0] + chosen.start, starts[0] + chosen.stop),
            slice(starts[1], starts[1] + columns),
        )
        return Piece(window, local[chosen])

    return Ways({"fastinit": by_fastinit, "torch": by_torch}, lambda parameter: parameter.to_local(), piece)


def rows_of(name: str, whole: Tensor) -> Piece:
    chosen = some_rows(name, *whole.shape)
    return Piece((chosen, slice(None)), whole[chosen])


def fsdp2(job: Job, device: torch.device) -> Ways:
    """On a mesh of one axis all ranks share the parameters; with two, those of the second one do."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, job.mesh, mesh_dim_names=("replicas", "shards")[-len(job.mesh) :])

    def shard(model: Any) -> None:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    return dtensor_ways(job, device, shard)


def fsdp2_tp(job: Job, device: torch.device) -> Ways:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.attention.query": ColwiseParallel(),
        "layers.*.attention.key": ColwiseParallel(),
        "layers.*.attention.value": ColwiseParallel(),
        "layers.*.attention.output": RowwiseParallel(),
        "layers.*.gate": ColwiseParallel(),
        "layers.*.up": ColwiseParallel(),
        "layers.*.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    mesh = init_device_mesh(device.type, job.mesh, mesh_dim_names=("data", "tensor"))

    def shard(model: Any) -> None:
        parallelize_module(model, mesh["tensor"], plan)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])

    return dtensor_ways(job, device, shard)


def zero3(job: Job, device: torch.device) -> Ways:
    import deepspeed

    def by_fastinit(clock: Clock) -> tuple[nn.Module, int]:
        placing = fastinit.deepspeed.zero3(DEEPSPEED_CONFIG)
        with fastinit.on(device, DTYPE, shard=placing, seed=1 if job.simulated else None) as init:
            model = Decoder(job.config)
        clock.lap("constructor")
        return model, init.seed

    def by_deepspeed(clock: Clock) -> tuple[nn.Module, None]:
        with deepspeed.zero.Init(config_dict_or_path=DEEPSPEED_CONFIG):
            model = Decoder(job.config)
        clock.lap("constructor")
        return model, None

    def piece(name: str, parameter: Any) -> Piece:
        if not job.simulated:
            with deepspeed.zero.GatheredParameters(parameter):
                return rows_of(name, parameter.detach().clone())
        # The whole rows of this rank's flat slice.
        columns, size = parameter.ds_shape[1], parameter.ds_tensor.numel()
        begin = dist.get_rank() * size
        end = min(begin + size, parameter.ds_numel)
        first = -(-begin // columns)
        rows = parameter.ds_tensor[first * columns - begin : end // columns * columns - begin].view(-1, columns)
        chosen = some_rows(name, *rows.shape)
        return Piece((slice(first + chosen.start, first + chosen.stop), slice(None)), rows[chosen])

    return Ways({"fastinit": by_fastinit, "zero.Init": by_deepspeed}, lambda parameter: parameter.ds_tensor, piece)


PARTS = {
    "fsdp2": Part(fsdp2, lambda ranks: (ranks,)),
    "hsdp": Part(fsdp2, lambda ranks: (2, ranks // 2) if ranks % 2 == 0 and ranks >= 4 else None, holders=2),
    "fsdp2-tp": Part(fsdp2_tp, lambda ranks: (ranks // 2, 2) if ranks % 2 == 0 else None),
    "zero3": Part(zero3, lambda ranks: (ranks,), requires="deepspeed"),
}


# All parts


@dataclass(frozen=True, slots=True)
class Group:
    """So many ranks, real ones or simulated, and the model that they create."""

    ranks: int
    simulated: bool
    device: str
    model: str
    config: DecoderConfig

    def __str__(self) -> str:
        kind = f"simulated one after the other on one {self.device} device" if self.simulated else f"on {self.device}"
        return f"{self.model}, {text.count(self.config.parameters)} parameters in bf16, {self.ranks} ranks {kind}"


def groups(arguments: argparse.Namespace) -> Iterator[Group]:
    """The real ranks first, then the simulated ones."""
    gpus = torch.cuda.device_count()
    # One rank would hold all of the model: no shard, and as a rule no room either.
    real = arguments.ranks if arguments.ranks is not None else gpus if gpus > 1 else 0 if gpus else 2
    simulated = arguments.simulate if arguments.simulate is not None else RANKS if real < RANKS else 0
    for ranks, is_simulated in ((real, False), (simulated, True)):
        if ranks:
            device = "cuda" if gpus >= (1 if is_simulated else ranks) else "cpu"
            yield Group(ranks, is_simulated, device, *shape_for(arguments, ranks, device))


def shape_for(arguments: argparse.Namespace, ranks: int, device: str) -> tuple[str, DecoderConfig]:
    """The model that was asked for, or the largest of which a rank of every part has room for its share."""
    size = arguments.size or ("1M" if arguments.quick else None if device == "cuda" else "350M")
    if size is not None:
        return size, SHAPES.get(size) or DecoderConfig.of_size(text.parse_count(size))
    room = min(gpu["memory"] for gpu in machine.gpus())
    holders = max(PARTS[part].holders for part in arguments.parts if PARTS[part].mesh(ranks))
    for size, config in SHAPES.items():
        whole = DTYPE.itemsize * max(config.vocabulary, config.hidden) * config.width  # of the largest tensor
        # A fifth for what the other ways need beyond the model, and for what is no tensor: CUDA's own, NCCL's.
        if holders * DTYPE.itemsize * config.parameters // ranks + 4 * whole < 0.8 * room:
            return size, config
    return "7B", LLAMA_7B


def run_part(part: str, group: Group, arguments: argparse.Namespace, out: Path) -> Record:
    """Start a part's ranks and wait for them; its results, with an "error" if they did not end well."""
    mesh = PARTS[part].mesh(group.ranks)
    if mesh is None:
        return {"skipped": f"{group.ranks} ranks are too few or not even"}
    if find_spec(PARTS[part].requires) is None:
        return {"missing": PARTS[part].requires}
    path = out / f"{part}-{group.ranks}{'-simulated' if group.simulated else ''}.part.json"
    path.unlink(missing_ok=True)
    log = path.with_suffix(".log")
    job = {
        "part": part,
        "ranks": group.ranks,
        "mesh": mesh,
        "simulated": group.simulated,
        "device": group.device,
        "size": group.model,
        "repeats": arguments.repeats,
        "patience": arguments.patience,
        "path": str(path),
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(group.ranks)]
    command = [sys.executable, *([] if group.simulated else launcher), __file__]
    command += ["--timeout", str(arguments.timeout), "--job", json.dumps(job)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = cores if group.simulated else max(1, cores // group.ranks)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if group.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    elif group.simulated:
        # torch would divide the simulated ranks among the GPUs.
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    began = time.perf_counter()
    error = watched(command, environment, log, arguments.timeout)
    results = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    results = {"mesh": list(mesh), **results, "wall seconds": time.perf_counter() - began}
    if error is None:
        log.unlink()
    else:
        results["error"] = error
    if results.get("values"):
        results["values"] = merged(results["values"])
    if results.get("records"):
        results["summary"] = summarised(results["records"])
        results["limits"] = limits(group, results["summary"]["fastinit"])
    return results


def watched(command: list[str], environment: dict[str, str], log: Path, timeout: float) -> str | None:
    """Run a command, its output in a file and its progress on the terminal; what was the matter, if anything."""
    late = threading.Event()
    written = []
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

        def give_up() -> None:
            late.set()
            stop(process)

        timer = threading.Timer(timeout, give_up)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                if line.startswith(PROGRESS):
                    print(line, end="", flush=True)
                if not late.is_set():  # not what torchrun tells of how it was ended
                    written.append(line)
            status = process.wait()
        finally:
            timer.cancel()
            stop(process)
    if status == 0:
        return None
    what = f"not done after {timeout:g} s" if late.is_set() else f"exit status {status}"
    return f"{what}; the end of {log.name}:\n{''.join(written)[-4000:]}"


def stop(process: subprocess.Popen) -> None:
    """End a command and what it started, if they are not done."""
    for order in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, order)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)


COLOURS = {
    "constructor": "#aec7e8", "sharding": "#dddddd", "materialize": "#6baed6", "key broadcast": "#d62728",
    "allocation": "#2ca02c", "fills": "#1f77b4", "to_empty": "#98df8a", "reset_parameters": "#ff7f0e",
}  # fmt: skip
STAGES = tuple(COLOURS)
PYTHON = STAGES[:3]  # those that `AFTER_PYTHON` does not count


def merged(values: list[Record]) -> Record:
    """What the ranks have compared, as one."""
    return {
        "tensors": values[0]["tensors"],
        "ranks": len(values),
        "elements": sum(each["elements"] for each in values),
        "different": {each["rank"]: each["different"] for each in values if each["different"]},
    }


def summarised(records: list[Record]) -> dict[str, Record]:
    """For each way the stages of the slowest rank, in the repeat whose slowest rank is the median, and memory."""
    summary: dict[str, Record] = {}
    for way in dict.fromkeys(record["way"] for record in records):
        own = [record for record in records if record["way"] == way]
        measured = [record for record in own if "seconds" in record]
        if not measured:
            summary[way] = {"error": own[0]["error"]}
            continue
        slowest: dict[int, Record] = {}
        for record in measured:
            slowest.setdefault(record["repeat"], record)
            slowest[record["repeat"]] = max(slowest[record["repeat"]], record, key=total)
        median = sorted(slowest.values(), key=total)[(len(slowest) - 1) // 2]
        beyond = [record["peak beyond"] for record in measured if record["peak beyond"] is not None]
        summary[way] = {
            "ranks measured": len({record["rank"] for record in measured}),
            "repeats": len(slowest),
            "total": total(median),
            "seconds": {stage: median["seconds"][stage] for stage in STAGES if stage in median["seconds"]},
            "local bytes": max(record["local bytes"] for record in measured),
            "peak beyond": max(beyond, default=None),
        }
        if way == "fastinit":
            summary[way]["after python"] = max(after_python(record) for record in slowest.values())
    return summary


def total(record: Record) -> float:
    return sum(record["seconds"].values())


def after_python(record: Record) -> float:
    return sum(seconds for stage, seconds in record["seconds"].items() if stage not in PYTHON)


def limits(group: Group, record: Record) -> list[Record]:
    """What fastinit has to keep on a GPU, and whether it did."""
    if group.device == "cpu":
        return []
    checked: list[tuple[str, float | None, float]] = [
        ("peak of memory beyond the rank's own, bytes", record["peak beyond"], BEYOND)
    ]
    if group.config == LLAMA_70B:
        checked.append(("broadcast, allocation and fills, seconds", record["after python"], AFTER_PYTHON))
    return [
        {"what": what, "value": value, "limit": limit, "kept": value is not None and value <= limit}
        for what, value, limit in checked
    ]


def report(part: str, results: Record) -> str:
    """A part's results as they are shown on the terminal."""
    for reason in ("skipped", "missing"):
        if reason in results:
            return f"{part}: {reason}, {results[reason]}\n"
    mesh = " x ".join(map(str, results["mesh"]))
    lines = [f"{part}, mesh of {mesh} ({results['wall seconds']:.0f} s in all)"]
    rows, notes = [], []
    for way, record in results.get("summary", {}).items():
        if "error" in record:
            notes.append(f"{way} failed: {record['error']}")
            continue
        stages = ", ".join(f"{stage} {text.seconds(seconds)}" for stage, seconds in record["seconds"].items())
        beyond = "unknown" if record["peak beyond"] is None else text.size(record["peak beyond"])
        measured = f"{record['ranks measured']} of {math.prod(results['mesh'])}"
        rows.append(
            [
                way,
                measured,
                str(record["repeats"]),
                text.seconds(record["total"]),
                text.size(record["local bytes"]),
                beyond,
                stages,
            ]
        )
        if way == "fastinit":
            notes.append(f"fastinit: shards filled {text.seconds(record['after python'])} after Python's part")
    if rows:
        lines.append(text.table(["way", "ranks", "repeats", "total", "local", "peak beyond", "stages"], rows))
    lines += notes
    if results.get("values"):
        values = results["values"]
        elements = text.count(values["elements"])
        compared = f"{len(values['tensors'])} tensors, {elements} elements on {values['ranks']} ranks"
        different = [f"DIFFERENT on rank {rank}: {', '.join(names)}" for rank, names in values["different"].items()]
        lines.append(f"{compared}: {'; '.join(different) or 'equal to the values of the CPU, bit for bit'}")
    for each in results.get("limits", []):
        verdict = "kept" if each["kept"] else "MISSED"
        lines.append(f"{each['what']}: {each['value']:.4g}, at most {each['limit']:.4g}: {verdict}")
    if "error" in results:
        lines.append(f"FAILED: {results['error']}")
    return "\n".join(lines) + "\n"


def is_good(results: Record) -> bool:
    """Whether nothing failed, no value differs and every limit was kept; a way that fastinit is compared with may."""
    return (
        "error" not in results
        and not results.get("values", {}).get("different")
        and all(each["kept"] for each in results.get("limits", []))
    )


def draw(results: Record, path: Path) -> None:
    """Write a PNG: for each way of each part a bar of its stages, memory as text."""
    from matplotlib import pyplot

    from fastinit.cli import plot

    bars = [
        (run, part, way, record)
        for run in results["runs"]
        for part, of_part in run["parts"].items()
        for way, record in of_part.get("summary", {}).items()
        if "seconds" in record
    ]
    figure, axis = pyplot.subplots(figsize=(12, 2.4 + 0.32 * len(bars)))
    for y, (_, _, way, record) in enumerate(bars):
        left = 0.0
        for stage, seconds in record["seconds"].items():
            axis.barh(y, seconds * 1e3, left=left, color=COLOURS[stage])
            left += seconds * 1e3
        beyond = "" if record["peak beyond"] is None else f" + {text.size(record['peak beyond'])}"
        filled = f", filled in {text.seconds(record['after python'])}" if way == "fastinit" else ""
        note = f" {text.seconds(record['total'])}{filled}; {text.size(record['local bytes'])}{beyond}"
        axis.annotate(note, (left, y), va="center", fontsize=8)
    labels = [
        f"{run['model']}, {run['ranks']} ranks{' simulated' if run['simulated'] else ''}, {part}: {way}"
        for run, part, way, _ in bars
    ]
    axis.set_yticks(range(len(bars)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.3)
    axis.set_title("Creation of a sharded model in bf16; a rank's shards + the peak of memory beyond them", fontsize=10)
    used = [stage for stage in COLOURS if any(stage in record["seconds"] for *_, record in bars)]
    keys = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[stage]) for stage in used]
    figure.legend(keys, used, loc="lower center", ncols=len(used), fontsize=8, frameon=False)
    axis.set_xlabel("milliseconds on the slowest rank\n")
    plot.write(figure, results, path)


def save_picture(results: Record, path: Path) -> None:
    try:
        draw(results, path)
        print(f"Written: {path}")
    except ImportError as error:
        print(f"No picture, {error.name} is missing; where it is: --plot {path.with_suffix('.json')}")


def run_all(arguments: argparse.Namespace) -> bool:
    """Whether all parts are good."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = machine.describe()
    about["packages"] |= {"deepspeed": machine.installed("deepspeed")}
    results: Record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": about,
        "settings": {"repeats": arguments.repeats, "patience": arguments.patience, "quick": arguments.quick},
        "runs": [],
    }
    print(machine.summary(about))
    if torch.cuda.device_count() < RANKS:
        print(f"The plan is for {RANKS} GPUs, and this machine has {torch.cuda.device_count()}.")
    good = True
    path = arguments.out / f"large-sharded-{'cuda' if torch.cuda.device_count() else 'cpu'}.json"
    for group in groups(arguments):
        print(f"\n{group}\n", flush=True)
        run: Record = {
            "ranks": group.ranks,
            "simulated": group.simulated,
            "device": group.device,
            "model": group.model,
            "parameters": group.config.parameters,
            "parts": {},
        }
        results["runs"].append(run)
        for part in arguments.parts:
            run["parts"][part] = run_part(part, group, arguments, arguments.out)
            good = good and is_good(run["parts"][part])
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(report(part, run["parts"][part]), flush=True)
    print(f"Written: {path}")
    save_picture(results, path.with_suffix(".png"))
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="real ones, 0 for none; default: the number of GPUs, 2 on the CPU")
    parser.add_argument("--simulate", type=int, help=f"so many ranks, 0 for none; default: {RANKS} if fewer are real")
    parser.add_argument("--size", help=f"{', '.join(SHAPES)} or a number of parameters; default: what has room")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--repeats", type=int, default=3, help="of real ranks; default: %(default)s")
    parser.add_argument(
        "--patience", type=float, default=25, help="seconds for creations of a part; default: %(default)s"
    )
    parser.add_argument("--timeout", type=float, default=90, help="seconds until it is ended; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a tiny model, once")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what a run wrote")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)  # what each rank is started with
    arguments = parser.parse_args()
    if arguments.job is not None:
        faulthandler.dump_traceback_later(arguments.timeout / 2)  # where it is, in case it hangs
        size = arguments.job.pop("size")
        config = SHAPES.get(size) or DecoderConfig.of_size(text.parse_count(size))
        mesh, path = tuple(arguments.job["mesh"]), Path(arguments.job["path"])
        run_rank(Job(**{**arguments.job, "config": config, "mesh": mesh, "path": path}))
        faulthandler.cancel_dump_traceback_later()
        return
    if arguments.plot is not None:
        save_picture(json.loads(arguments.plot.read_text()), arguments.plot.with_suffix(".png"))
        return
    if "LOCAL_RANK" in os.environ:
        raise SystemExit(f"start it without torchrun: python {sys.argv[0]} --ranks {os.environ['WORLD_SIZE']}")
    if arguments.quick:
        arguments.repeats = 1
    if not run_all(arguments):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""What creating a model as its shards costs, per rank: time, memory, and whether the values are right. Writes JSON.

    python benchmarks/sharded.py [--ranks 2] [--size 13B] [--layers 40] [--out DIRECTORY]

On so many GPUs (nccl) or, where there are fewer, CPU processes (gloo), with a Llama-shaped model of torch.nn modules in
bf16:

- fsdp2: the constructor under `fastinit.on(..., shard=True)`, `fully_shard`, `fastinit.materialize`; against the
  constructor on the meta device, `fully_shard`, `to_empty` and the `reset_parameters` of each module;
- tensor-parallel: the same with `parallelize_module` on the second axis of each mesh;
- zero3: the constructor under `fastinit.on(..., shard=fastinit.deepspeed.zero3(config))`, against the constructor under
  `deepspeed.zero.Init`.

What one rank of 1, 2, 4 and 8 takes, which one process can simulate, is in `python -m fastinit bench --suite full`.

Each part is a torchrun of its own, so that one that fails or hangs costs only itself: its error is in the results.
Times are medians over the repeats of the slowest rank; ways that are compared take turns. On a GPU the allocator's
cache is cold (it holds nothing) or warm (it holds what an equal model has just freed). Memory is the peak of what was
allocated beyond the rank's own shards and buffers; on the CPU, of resident memory. A dozen tensors are gathered and
compared with what fastinit computes on the CPU, bit for bit.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastinit
from fastinit.cli import machine, measure, text
from fastinit.cli.models import LLAMA_7B, Decoder, DecoderConfig

LLAMA_13B = DecoderConfig(vocabulary=32_000, width=5120, layers=40, heads=40, hidden=13_824)
SHAPES = {"7B": LLAMA_7B, "13B": LLAMA_13B}
DTYPE = torch.bfloat16
DEEPSPEED_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
}


# One rank of one part


class Rank:
    """What a part works with: the device, the model's shape, and the results, of which rank 0 keeps the file."""

    def __init__(self, config: DecoderConfig, repeats: int, path: Path) -> None:
        self.device = start()
        self.config = config
        self.repeats = repeats
        self.world = dist.get_world_size()
        self.caches = ("cold", "warm") if self.device.type == "cuda" else ("none",)
        self._path = path

    def save(self, results: Any) -> None:
        """Called after each step, so that what was measured before a failure stays."""
        if dist.get_rank() == 0:
            self._path.write_text(json.dumps(results))


def start() -> torch.device:
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


class Clock:
    """Times of consecutive stages on this rank; all ranks start each stage together."""

    def __init__(self, device: torch.device) -> None:
        self.laps: dict[str, float] = {}
        self._device = device
        self._start()

    def lap(self, stage: str) -> None:
        measure.synchronize(self._device)
        self.laps[stage] = time.perf_counter() - self._began
        self._start()

    def _start(self) -> None:
        dist.barrier()
        measure.synchronize(self._device)
        self._began = time.perf_counter()


Creation = tuple[nn.Module, dict[str, float]]
Create = Callable[[DecoderConfig], Creation]


def measure_ways(rank: Rank, ways: dict[str, Create], local_bytes: Callable[[nn.Module], int], cache: str) -> Any:
    """For each way the seconds of each stage, the slowest rank's in each repeat, and the largest memory of any."""
    laps: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    memory: dict[str, list[tuple[int, int]]] = {way: [] for way in ways}
    for repeat in range(rank.repeats + 1):
        for way, create in ways.items():
            clean_up(rank.device)
            if cache == "warm":
                create(rank.config)
                gc.collect()
            elif cache == "none":
                measure.warm_memory(2 * rank.config.parameters // rank.world)
            memory_before = measure.Memory(rank.device)
            model, taken = create(rank.config)
            peak, local = memory_before.peak(), local_bytes(model)
            if peak is None:
                raise RuntimeError("this system cannot reset the peak of resident memory")
            del model
            if repeat:  # the first ones import and compile
                laps[way].append(taken)
                memory[way].append((peak - local, local))
    results = {}
    for way in ways:
        of_ranks = gathered((laps[way], memory[way]))
        results[way] = {
            "seconds": {
                stage: [max(laps[i][stage] for laps, _ in of_ranks) for i in range(rank.repeats)]
                for stage in laps[way][0]
            },
            "local bytes": max(local for _, memory in of_ranks for _, local in memory),
            "peak beyond": max(beyond for _, memory in of_ranks for beyond, _ in memory),
        }
    return results


def clean_up(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gathered(value: Any) -> list[Any]:
    """The values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def compare_with_cpu(rank: Rank, model: nn.Module, seed: int, gather: Callable[[nn.Parameter], Tensor]) -> Any:
    """A dozen tensors, gathered on each rank, against those that fastinit computes for the whole model on the CPU."""
    parameters = dict(model.named_parameters())
    chosen = sorted(random.Random(0).sample(sorted(parameters), min(12, len(parameters))))

    def only_chosen(name: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        return None if name in chosen else tuple(slice(0, 0) for _ in shape)

    with fastinit.on("cpu", DTYPE, seed=seed, shard=True):
        reference = Decoder(rank.config)
    fastinit.materialize(reference, window=only_chosen)
    expected = dict(reference.named_parameters())
    different = [name for name in chosen if not torch.equal(bits(gather(parameters[name]).cpu()), bits(expected[name]))]
    return {
        "tensors": chosen,
        "elements": sum(expected[name].numel() for name in chosen),
        "different": sorted(set().union(*gathered(different))),
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


# Parts


def measure_dtensors(rank: Rank, shard: Callable[[nn.Module], None], caches: Iterable[str], save: Callable) -> None:
    """Creation of a model that `shard` turns into DTensors, by fastinit and by torch."""
    from torch.distributed.tensor import DTensor

    device = rank.device
    seeds = []

    def by_fastinit(config: DecoderConfig) -> Creation:
        clock = Clock(device)
        with fastinit.on(device, DTYPE, shard=True) as init:
            model = Decoder(config)
        clock.lap("constructor")
        shard(model)
        clock.lap("shard")
        fastinit.materialize(model)
        clock.lap("materialize")
        seeds.append(init.seed)
        return model, clock.laps

    def by_torch(config: DecoderConfig) -> Creation:
        clock = Clock(device)
        with measure.default_dtype(DTYPE), torch.device("meta"):
            model = Decoder(config)
        clock.lap("constructor")
        shard(model)
        clock.lap("shard")
        model.to_empty(device=device)
        clock.lap("to_empty")
        with torch.no_grad():
            for module in model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        clock.lap("reset_parameters")
        return model, clock.laps

    def local_bytes(model: nn.Module) -> int:
        locals_ = [each.to_local() if isinstance(each, DTensor) else each for each in model.parameters()]
        return sum(each.nbytes for each in (*locals_, *model.buffers()))

    results: dict[str, Any] = {"times": {}}
    model, _ = by_fastinit(rank.config)
    results["values"] = compare_with_cpu(rank, model, seeds[-1], lambda parameter: parameter.full_tensor())
    save(results)
    del model
    results["ratio of"] = "materialize / (to_empty + reset_parameters)"
    results["ratios"] = {}
    for cache in caches:
        times = measure_ways(rank, {"fastinit": by_fastinit, "torch": by_torch}, local_bytes, cache)
        ours, theirs = (stage_medians(times[way]) for way in ("fastinit", "torch"))
        results["times"][cache] = times
        results["ratios"][cache] = ours["materialize"] / (theirs["to_empty"] + theirs["reset_parameters"])
        save(results)


def stage_medians(record: dict[str, Any]) -> dict[str, float]:
    return {stage: statistics.median(seconds) for stage, seconds in record["seconds"].items()}


def measure_fsdp2(rank: Rank) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(rank.device.type, (rank.world,))

    def shard(model: nn.Module) -> None:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    measure_dtensors(rank, shard, rank.caches, rank.save)


def measure_tensor_parallel(rank: Rank) -> None:
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
    # Two axes of 2 where there are ranks for it; else each axis once.
    meshes = {(rank.world // 2, 2)} if rank.world % 2 == 0 and rank.world >= 4 else {(1, rank.world), (rank.world, 1)}
    results: dict[str, Any] = {}
    for sizes in sorted(meshes):
        mesh = init_device_mesh(rank.device.type, sizes, mesh_dim_names=("data", "tensor"))

        def shard(model: nn.Module, mesh: Any = mesh) -> None:
            parallelize_module(model, mesh["tensor"], plan)
            for layer in model.layers:
                fully_shard(layer, mesh=mesh["data"])
            fully_shard(model, mesh=mesh["data"])

        def save(of_mesh: Any, name: str = f"{sizes[0]} x {sizes[1]}") -> None:
            results[name] = of_mesh
            rank.save(results)

        measure_dtensors(rank, shard, rank.caches[:1], save)
        clean_up(rank.device)


def measure_zero3(rank: Rank) -> None:
    try:
        import deepspeed
    except ImportError as error:
        rank.save({"missing": str(error)})
        return

    def by_fastinit(config: DecoderConfig) -> Creation:
        clock = Clock(rank.device)
        with fastinit.on(rank.device, DTYPE, shard=fastinit.deepspeed.zero3(DEEPSPEED_CONFIG)) as init:
            model = Decoder(config)
        clock.lap("constructor")
        seeds.append(init.seed)
        return model, clock.laps

    def by_deepspeed(config: DecoderConfig) -> Creation:
        clock = Clock(rank.device)
        with deepspeed.zero.Init(config_dict_or_path=DEEPSPEED_CONFIG):
            model = Decoder(config)
        clock.lap("constructor")
        return model, clock.laps

    def local_bytes(model: nn.Module) -> int:
        slices = [parameter.ds_tensor for parameter in model.parameters()]
        return sum(each.nbytes for each in (*slices, *model.buffers()))

    def gather(parameter: nn.Parameter) -> Tensor:
        with deepspeed.zero.GatheredParameters(parameter):
            return parameter.detach().clone()

    seeds: list[int] = []
    results: dict[str, Any] = {"deepspeed": deepspeed.__version__, "times": {}}
    model, _ = by_fastinit(rank.config)
    results["values"] = compare_with_cpu(rank, model, seeds[-1], gather)
    rank.save(results)
    del model
    results["ratio of"] = "constructor under fastinit / under zero.Init"
    results["ratios"] = {}
    for cache in rank.caches:
        ways = {"fastinit": by_fastinit, "zero.Init": by_deepspeed}
        results["times"][cache] = times = measure_ways(rank, ways, local_bytes, cache)
        ours, theirs = (stage_medians(times[way])["constructor"] for way in ways)
        results["ratios"][cache] = ours / theirs
        rank.save(results)


PARTS = {
    "fsdp2": measure_fsdp2,
    "tensor-parallel": measure_tensor_parallel,
    "zero3": measure_zero3,
}


# All parts


def run_part(part: str, arguments: argparse.Namespace, ranks: int, threads: int) -> dict[str, Any]:
    """Start a part's ranks and wait for them; its results, with an "error" if they did not end well."""
    path = part_file(arguments.out, part)
    path.unlink(missing_ok=True)
    log = path.with_suffix(".log")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    command += ["--part", part, "--size", arguments.size, "--repeats", str(arguments.repeats)]
    command += ["--timeout", str(arguments.timeout), "--out", str(arguments.out)]
    if arguments.layers is not None:
        command += ["--layers", str(arguments.layers)]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if torch.cuda.device_count() < ranks:
        environment["DS_ACCELERATOR"] = "cpu"
    began = time.perf_counter()
    with log.open("w") as output:
        ranks_process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            status = ranks_process.wait(arguments.timeout)
            error = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            error = f"not done after {arguments.timeout} s"
        finally:
            written = log.read_text()  # before torchrun adds how it was ended
            stop(ranks_process)
    results = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    results["wall seconds"] = time.perf_counter() - began
    if error is None:
        log.unlink()
    else:
        results["error"] = f"{error}; the end of {log.name}:\n{written[-4000:]}"
    return results


def stop(process: subprocess.Popen) -> None:
    """End torchrun and its ranks, if they are not done."""
    for order in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, order)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                continue


def part_file(folder: Path, part: str) -> Path:
    return folder / f"sharded-{part}.part.json"


def report(part: str, results: dict[str, Any]) -> str:
    """A part's results as they are shown on the terminal."""
    lines = [f"{part} ({results['wall seconds']:.0f} s in all)"]
    if "missing" in results:
        lines.append(f"missing: {results['missing']}")
    if "times" in results:
        lines += times_lines(results)
    for name, of_mesh in results.items():
        if isinstance(of_mesh, dict) and "times" in of_mesh:
            lines += [f"mesh {name}", *times_lines(of_mesh)]
    if "error" in results:
        lines.append(f"FAILED: {results['error']}")
    return "\n".join(lines) + "\n"


def times_lines(results: dict[str, Any]) -> list[str]:
    rows = []
    for cache, ways in results["times"].items():
        for way, record in ways.items():
            medians = stage_medians(record)
            stages = ", ".join(f"{stage} {text.seconds(seconds)}" for stage, seconds in medians.items())
            memory = [text.size(record["local bytes"]), text.size(record["peak beyond"])]
            rows.append([way, cache, text.seconds(sum(medians.values())), *memory, stages])
    lines = [text.table(["way", "cache", "total", "local", "peak beyond", "stages"], rows)]
    for cache, ratio in results.get("ratios", {}).items():
        lines.append(f"{results['ratio of']}, {cache} cache: {ratio:.3g}")
    if "values" in results:
        values = results["values"]
        verdict = f"DIFFERENT: {values['different']}" if values["different"] else "equal to the CPU's, bit for bit"
        lines.append(f"{len(values['tensors'])} gathered tensors, {text.count(values['elements'])} elements: {verdict}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: the number of GPUs, or 2 CPU processes")
    parser.add_argument("--size", default="13B", help='"13B", "7B" or a number of parameters; default: %(default)s')
    parser.add_argument("--layers", type=int, help="instead of the number that the size has")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each part; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="default: %(default)s")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what each rank is started with
    arguments = parser.parse_args()
    config = SHAPES.get(arguments.size) or DecoderConfig.of_size(text.parse_count(arguments.size))
    if arguments.layers is not None:
        config = config.with_layers(arguments.layers)
    if arguments.part is not None:
        faulthandler.dump_traceback_later(arguments.timeout / 2)  # where it is, in case it hangs
        rank = Rank(config, arguments.repeats, part_file(arguments.out, arguments.part))
        PARTS[arguments.part](rank)
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
        return
    if "LOCAL_RANK" in os.environ:
        raise SystemExit(f"start it without torchrun: python {sys.argv[0]} --ranks {os.environ['WORLD_SIZE']}")
    ranks = arguments.ranks or torch.cuda.device_count() or 2
    device = "cuda" if torch.cuda.device_count() >= ranks else "cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "settings": {"ranks": ranks, "device": device, "parameters": config.parameters, "repeats": arguments.repeats},
        "parts": {},
    }
    print(machine.summary(results["machine"]))
    print(f"{text.count(config.parameters)} parameters in bf16, {ranks} ranks on {device}\n", flush=True)
    path = arguments.out / f"sharded-{device}-{ranks}.json"
    for part in arguments.parts:
        threads = max(1, results["machine"]["cpu_cores"] // ranks)
        results["parts"][part] = run_part(part, arguments, ranks, threads)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(report(part, results["parts"][part]), flush=True)
    print(f"Written: {path}")
    if any("error" in part for part in results["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""The parts of the benchmarks: each measures one thing on one device and yields records, which are JSON values.

`--suite full` runs each in a process of its own, `python -m fastinit.cli.sections SETTINGS`: what one leaves in memory,
or a GPU that it has broken, is no part of the next one's figures. The process writes a record a line.

Ways that are compared take turns, so that a drift of the machine hits all. A way or peer that cannot take part has a
record too: `missing` names the package, `unsupported` and `error` say what was the matter.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastinit
from fastinit import native

from . import measure, peers, text
from .models import LLAMA_7B, Decoder, DecoderConfig
from .peers import Missing, Running, Unsupported
from .ways import WAYS, Creator, warm_host
from .worker import Worker
from .workloads import (
    FILLS,
    LIBRARIES,
    PEER_WAYS,
    RANDOM,
    RANKS,
    ROW_BYTES,
    SMALL_ELEMENTS,
    SMALL_FILLS,
    STD,
    Case,
    growth_case,
    growth_sizes,
    model_cases,
    module_cases,
    rows_of_rank_0,
)

Record = dict[str, Any]
BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Settings:
    """Where and how a section measures.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        quick: little work and few repeats, to see that it runs.
        peers: compare with all that there is, not with torch alone.
    """

    device: str
    quick: bool = False
    peers: bool = False

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


# Fills


def measure_kernels(settings: Settings) -> Iterator[Record]:
    """Fills of one tensor that exists already: a record for each distribution, dtype and number of threads, with the
    seconds that each repeat took each peer, and what they are to fastinit's."""
    device = settings.torch_device
    elements = elements_to_fill(settings)
    if device.type == "cuda":
        repeats = 3 if settings.quick else 5 if settings.peers else 11
        thread_counts: list[int | None] = [None]
    else:
        repeats = 3 if settings.quick or settings.peers else 5
        thread_counts = [*sorted({1, torch.get_num_threads()})]
    names = peers.names(device) if settings.peers else ["fastinit", "torch"]
    cases = [
        (distribution, dtype, threads)
        for distribution in (FILLS if settings.peers else RANDOM)
        for dtype in measure.DTYPES
        for threads in thread_counts
    ]
    for distribution, dtype, threads in text.progress(cases, f"fills on {settings.device}", "case"):
        tensor = fastinit.empty(elements, dtype=measure.DTYPES[dtype], device=device)
        with torch_threads(threads):
            fills, absent = prepared(names, distribution, tensor, threads)
            times = take_turns(fills, device, repeats, absent)
            values = {name: values_of(fills[name]) for name in times}
        yield {
            "device": settings.device,
            "distribution": distribution,
            "dtype": dtype,
            "threads": threads,
            "elements": elements,
            "seconds": times,
            "values": values,
            "absent": absent,
            "ratio": ratio_of(times, "torch"),
        }
        del tensor, fills


def elements_to_fill(settings: Settings) -> int:
    if settings.torch_device.type == "cpu":
        return 2**18 if settings.quick else 2**24
    elements = 2**24 if settings.quick else 2**30
    # JAX makes a tensor of its own each time, the next before the last is freed.
    while (4 if settings.peers else 2) * 4 * elements > torch.cuda.mem_get_info(settings.torch_device)[0]:
        elements //= 2
    return elements


def prepared(
    names: Sequence[str], distribution: str, tensor: Tensor, threads: int | None
) -> tuple[dict[str, Running], dict[str, Record]]:
    """The fills of those that can take part, and what is the matter with the others."""
    fills, absent = {}, {}
    for name in names:
        try:
            fills[name] = peers.prepare(name, distribution, tensor, threads)
        except Exception as error:
            if name == "fastinit":
                raise
            absent[name] = absence(error)
    return fills, absent


def absence(error: Exception) -> Record:
    if isinstance(error, Missing):
        return {"missing": str(error)}
    if isinstance(error, Unsupported):
        return {"unsupported": str(error)}
    return {"error": "".join(traceback.format_exception_only(error)).strip()[-1500:]}


PATIENCE = 2.0  # seconds after which a fill on the CPU has been repeated enough


def take_turns(
    fills: dict[str, Running], device: torch.device, repeats: int, absent: dict[str, Record]
) -> dict[str, list[float]]:
    """Seconds of each call, the first of each (which may load code) left out. Who fails goes to `absent`; who is slow
    is called less often."""
    times: dict[str, list[float]] = {name: [] for name in fills}
    for _ in range(repeats + 1):
        for name in list(times):
            if len(times[name]) > 1 and sum(times[name]) > PATIENCE:
                continue
            try:
                times[name].append(measure.timed_fill(fills[name], device))
            except Exception as error:
                if name == "fastinit":
                    raise
                absent[name] = absence(error)
                del times[name]
    return {name: taken[1:] for name, taken in times.items()}


def values_of(fill: Running) -> Record:
    sample = fill.sample().double()
    return {"mean": sample.mean().item(), "std": sample.std().item()}


def values_are_right(record: Record, name: str) -> bool:
    """Whether what a peer wrote has the mean and the standard deviation that were asked for, within 5 %."""
    wanted, values = FILLS[record["distribution"]], record["values"][name]
    tolerance = 0.05 * max(wanted.std, abs(wanted.mean))
    agrees: bool = abs(values["mean"] - wanted.mean) < tolerance and abs(values["std"] - wanted.std) < tolerance
    return agrees


def ratio_of(times: dict[str, list[float]], name: str, base: str = "fastinit") -> float | None:
    """Median time of one to that of the other; None if one has none."""
    if not times.get(name) or not times.get(base):
        return None
    return statistics.median(times[name]) / statistics.median(times[base])


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_layouts(settings: Settings) -> Iterator[Record]:
    """The same number of elements as one tensor and in other layouts: as many small tensors in one call, and as a
    rectangle of a larger tensor. `ratio` is the time to that of the one tensor."""
    device, repeats = settings.torch_device, 3 if settings.quick else 11
    distribution = FILLS["normal"].ours
    count = 50 if settings.quick else SMALL_FILLS
    elements = max(elements_to_fill(settings), count * SMALL_ELEMENTS)
    for dtype in ("fp32", "bf16"):
        whole = fastinit.empty(elements, dtype=measure.DTYPES[dtype], device=device)
        columns = ROW_BYTES // whole.itemsize
        few = whole[: count * SMALL_ELEMENTS]
        parts = few.view(count, SMALL_ELEMENTS)
        box = whole.view(-1, columns)
        window = fastinit.Window((len(box), 8 * columns), (0, 0))

        def fill(tensor: Tensor, window: fastinit.Window | None = None) -> Running:
            return Running(
                lambda: fastinit.fill_(tensor, distribution, seed=1, window=window), lambda: tensor.flatten()
            )

        layouts = {
            f"{count:,} fills of {SMALL_ELEMENTS:,}": {"one": in_one_call(few[None]), "parts": in_one_call(parts)},
            "rectangle, rows of 1 KiB": {"one": fill(whole), "parts": fill(box, window)},
        }
        for name, fills in layouts.items():
            times = take_turns(fills, device, repeats, {})
            yield {
                "device": settings.device,
                "layout": name,
                "dtype": dtype,
                "seconds": times,
                "ratio": ratio_of(times, "parts", "one"),
            }
        del whole, few, parts, box, layouts


def in_one_call(rows: Tensor) -> Running:
    """A fill of each row in one native call, as at a context's end; the Python that puts it together is not timed."""
    dtype = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}[rows.dtype]
    addresses = [row.data_ptr() for row in rows]
    batches: list[native.Batch] = []  # a batch runs once

    def setup(runs: int) -> None:
        for _ in range(runs):
            batches.append(native.Batch())
            for stream, address in enumerate(addresses):
                batches[-1].add(address, rows.shape[1], dtype, native.NORMAL, (0.0, STD), 1, stream)

    def run() -> None:
        if rows.device.type == "cuda":
            batches.pop().run_cuda(rows.get_device(), torch.cuda.current_stream(rows.device).cuda_stream)
        else:
            batches.pop().run_cpu(torch.get_num_threads())

    return Running(run, lambda: rows.flatten(), setup=setup)


# Models


def measure_models(settings: Settings) -> Iterator[Record]:
    """Models in bf16, each in several ways, in this process: see `records_of`."""
    device = settings.torch_device
    cases = model_cases(device, settings.quick, settings.peers)
    if not settings.peers:  # which has them in a section of their own
        cases = module_cases(device, settings.quick) + cases
    repeats = 1 if settings.quick else 3 if settings.peers else 5
    for case in text.progress(cases, f"models on {settings.device}", "model"):
        yield from records_of(case, device, repeats)


def measure_modules(settings: Settings) -> Iterator[Record]:
    """Models of many small modules, whose creation is Python's work: see `records_of`."""
    device = settings.torch_device
    for case in text.progress(module_cases(device, settings.quick, settings.peers), "modules", "model"):
        yield from records_of(case, device, 1 if settings.quick else 5)


def measure_growth(settings: Settings) -> Iterator[Record]:
    """The same kind of model in more and more parameters: see `records_of`."""
    device = settings.torch_device
    for parameters in text.progress(growth_sizes(device, settings.quick), f"growth on {settings.device}", "size"):
        slow = device.type == "cpu" and parameters > 3e8
        repeats = 1 if settings.quick or slow else 3
        case = growth_case(parameters, device)
        for record in records_of(case, device, repeats):
            yield {**record, "growth": int(parameters)}


def records_of(case: Case, device: torch.device, repeats: int) -> list[Record]:
    """A record for each way of creating a model: what `measure.timed_creation` gives, `seconds` for each repeat, the
    rest from the repeat with the most.

    `ratio` is the time to fastinit's. `scale` is the number of fastinit's parameters to this way's, where the way has
    created only a part; the ratio takes it into account.
    """
    identity = {"device": str(device), "model": case.name, "cache": case.cache}
    if case.requires is not None and not peers.importable(case.requires):
        return [{**identity, "missing": case.requires}]
    measured, absent = measure_case(case, device, repeats)
    return summarised(identity, case.ways, measured, absent)


def summarised(
    identity: Record, ways: Iterable[str], measured: dict[str, list[Record]], absent: dict[str, Record]
) -> list[Record]:
    records = []
    for way in ways:
        record = {**identity, "way": way, **absent.get(way, {})}
        runs = measured.get(way)
        if runs:
            record["seconds"] = [each["seconds"] for each in runs]
            for key in ("parameters", "tensor_bytes", "host_growth", "device_peak", "device_unused"):
                record[key] = max((each[key] for each in runs if each[key] is not None), default=None)
            record["split"] = sorted(runs, key=lambda each: each["seconds"])[len(runs) // 2]["split"]
        records.append(record)
    whole = next((record for record in records if record["way"] == "fastinit" and "seconds" in record), None)
    for record in records:
        if whole is not None and "seconds" in record:
            # More, where a way breaks ties, are its own affair.
            record["scale"] = max(whole["parameters"] / record["parameters"], 1.0)
            record["ratio"] = record["scale"] * (
                statistics.median(record["seconds"]) / statistics.median(whole["seconds"])
            )
    return records


def measure_case(case: Case, device: torch.device, repeats: int) -> tuple[dict[str, list[Record]], dict[str, Record]]:
    """What each way's creations measured, and what is the matter with the ways that cannot take part."""
    creators, absent = {}, {}
    for way in case.ways:
        try:
            creators[way] = prepared_way(way, device)
        except Exception as error:
            if way == "fastinit":
                raise
            absent[way] = absence(error)
    measured: dict[str, list[Record]] = {way: [] for way in case.ways if way not in absent}
    parameters = 0

    def create(way: str, keep: bool = True) -> None:
        nonlocal parameters
        if way in absent:
            return
        if case.cache != "warm" or not keep:
            clean_up(device)
        build = case.builder(way)
        warm_host(way, case.part_parameters if build is case.part else parameters, device, BF16)
        try:
            result = measure.timed_creation(creators[way], build, device)[1]
        except Exception as error:
            if way == "fastinit":
                raise
            absent[way] = absence(error)
            measured.pop(way, None)
            return
        parameters = max(parameters, result["parameters"])
        if keep:
            measured[way].append(result)

    if case.cache == "warm":
        # One way after the other: what another way left in the allocator's cache is not what this one would find.
        for way in case.ways:
            create(way, keep=False)
            for _ in range(repeats_of(way, repeats)):
                create(way)
        return measured, absent
    # The first creations do not count: they import what the model needs. The naive way imports nothing.
    for way in case.ways:
        if way != "naive":
            create(way, keep=False)
    for repeat in range(repeats):
        for way in case.ways:
            if repeat < repeats_of(way, repeats):
                create(way)
    return measured, absent


def prepared_way(way: str, device: torch.device) -> Creator:
    required = WAYS[way].requires
    if required is not None and not peers.importable(required):
        raise Missing(required)
    return WAYS[way].prepare(device, BF16)


def repeats_of(way: str, repeats: int) -> int:
    return min(repeats, 2) if way == "naive" else repeats  # seconds each


def clean_up(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


ROUNDS_END = 90.0  # seconds after which no further round of new processes starts


def measure_new_processes(settings: Settings) -> Iterator[Record]:
    """A Llama-shaped model, each time in a process that has created none of its size: see `records_of`. The processes
    of a round start together and create one after the other."""
    device = settings.torch_device
    config = LLAMA_7B if device.type == "cuda" else DecoderConfig.of_size(350_000_000)
    if settings.quick:
        config = DecoderConfig.of_size(1_000_000)
    repeats = 1 if settings.quick else 5 if device.type == "cuda" else 2
    name = "Llama 7B" if config == LLAMA_7B else f"Llama-shaped {text.count(config.parameters)}"
    tasks, absent = [], {}
    for library, requires in LIBRARIES.items():
        for way in ("fastinit", "torch", *PEER_WAYS[library], "naive"):
            missing = [each for each in (requires, WAYS[way].requires) if each and not peers.importable(each)]
            if missing:
                absent[library, way] = {"missing": missing[0]}
            else:
                tasks.append((library, way))
    measured: dict[Any, list[Record]] = {task: [] for task in tasks}
    began = time.monotonic()
    for repeat in text.progress(range(repeats), "new processes", "round"):
        if repeat and time.monotonic() - began > ROUNDS_END:
            break
        workers = {}
        for task in tasks:
            library, way = task
            if task not in absent and (way != "naive" or repeat == 0):
                part = config.with_layers(1) if way == "naive" else config
                workers[task] = Worker(way, part, settings.device, "bf16", library=library, seed=repeat)
        for worker in workers.values():
            worker.wait_until_ready()
        for task, worker in workers.items():
            try:
                measured[task].append(worker.create())
            except RuntimeError as error:
                absent[task] = absence(error)
    for library in LIBRARIES:
        identity = {"device": settings.device, "model": f"{name}, {library}", "cache": "new process"}
        ways = [way for of, way in (*tasks, *absent) if of == library]
        yield from summarised(
            identity,
            dict.fromkeys(ways),
            {way: runs for (of, way), runs in measured.items() if of == library and (of, way) not in absent},
            {way: why for (of, way), why in absent.items() if of == library},
        )


def measure_ranks(settings: Settings) -> Iterator[Record]:
    """What creating a model as the shard of the first of so many ranks takes in one process: the seconds of the
    constructor and of `fastinit.materialize`, the shard's bytes, and the peak of memory beyond them."""
    device = settings.torch_device
    config = LLAMA_7B if device.type == "cuda" else DecoderConfig.of_size(350_000_000)
    if settings.quick:
        config = DecoderConfig.of_size(1_000_000)
    repeats = 1 if settings.quick else 5
    for ranks in text.progress(RANKS, f"ranks on {settings.device}", "number"):
        runs = [create_shard(config, ranks, device) for _ in range(repeats + 1)][1:]
        yield {
            "device": settings.device,
            "parameters": config.parameters,
            "ranks": ranks,
            "seconds": {stage: [run[stage] for run in runs] for stage in ("constructor", "materialize")},
            "local_bytes": runs[0]["local_bytes"],
            "peak_beyond": max((run["peak_beyond"] for run in runs if run["peak_beyond"] is not None), default=None),
        }


def create_shard(config: DecoderConfig, ranks: int, device: torch.device) -> Record:
    clean_up(device)
    if device.type == "cpu":
        measure.warm_memory(BF16.itemsize * config.parameters // ranks)
    memory = measure.Memory(device)
    start = time.perf_counter()
    with fastinit.on(device, BF16, seed=1, shard=True):
        model = Decoder(config)
    measure.synchronize(device)
    constructed = time.perf_counter()
    fastinit.materialize(model, window=rows_of_rank_0(ranks))
    measure.synchronize(device)
    end = time.perf_counter()
    local_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    peak = memory.peak()
    return {
        "constructor": constructed - start,
        "materialize": end - constructed,
        "local_bytes": local_bytes,
        "peak_beyond": None if peak is None else peak - local_bytes,
    }


SECTIONS: dict[str, Callable[[Settings], Iterator[Record]]] = {
    "kernels": measure_kernels,
    "layouts": measure_layouts,
    "new processes": measure_new_processes,
    "growth": measure_growth,
    "models": measure_models,
    "ranks": measure_ranks,
    "modules": measure_modules,
}


def main(name: str, settings: Settings) -> None:
    # Whatever else prints does it on standard error.
    records = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for record in SECTIONS[name](settings):
        print(json.dumps(record), file=records, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Settings(**json.loads(sys.argv[2])))

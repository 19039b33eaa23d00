"""Measure fills and the creation of models against torch, in one run; write a table, JSON and a plot.

Every figure is the median of its repeats. Ways that are compared take turns, so that a drift of the machine hits all.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastinit

from . import machine as machines
from . import measure, text
from .demo import default_device
from .models import LLAMA_7B, Decoder, GPT2Medium

DISTRIBUTIONS = {
    "uniform": (fastinit.Uniform(-1.0, 1.0), lambda tensor: tensor.uniform_(-1.0, 1.0)),
    "normal": (fastinit.Normal(0.0, 0.02), lambda tensor: tensor.normal_(0.0, 0.02)),
    "truncated normal": (
        fastinit.TruncatedNormal(0.0, 0.02, -0.04, 0.04),
        lambda tensor: nn.init.trunc_normal_(tensor, 0.0, 0.02, -0.04, 0.04),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=("kernels", "models", "all"), default="all", help="default: %(default)s")
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:1" (default: a GPU if there is one)')
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("bench-out"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small, few repeats: to see that it runs")


def run(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device or default_device())
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machines.describe(),
        "settings": {"device": str(device), "quick": arguments.quick},
        "kernels": [],
        "models": [],
    }
    print(machines.summary(results["machine"]) + "\n", flush=True)
    if arguments.suite != "models":
        results["kernels"] = measure_kernels(device, arguments.quick)
        print(kernel_table(results["kernels"]) + "\n", flush=True)
    if arguments.suite != "kernels":
        results["models"] = measure_models(device, arguments.quick)
        print(model_table(results["models"]) + "\n", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"bench-{device.type}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"Written: {stem.with_suffix('.json')}")
    try:
        from . import plot
    except ImportError as error:
        print(f"No plot: {error}. Install matplotlib (pip install 'torch-fastinit[bench]').")
    else:
        plot.save(results, stem.with_suffix(".png"))
        print(f"Written: {stem.with_suffix('.png')}")
    return 0


# Kernels


def measure_kernels(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Fills of one tensor that exists already, fastinit and torch: a record for each distribution, dtype and number of
    threads, with the seconds that each repeat took."""
    if device.type == "cuda":
        elements = 2**24 if quick else 2**30
        while 2 * 4 * elements > torch.cuda.mem_get_info(device)[0]:
            elements //= 2
        repeats = 3 if quick else 11
        thread_counts: list[int | None] = [None]
    else:
        elements, repeats = (2**18, 3) if quick else (2**24, 5)
        thread_counts = [*sorted({1, torch.get_num_threads()})]
    cases = [
        (distribution, dtype, threads)
        for distribution in DISTRIBUTIONS
        for dtype in measure.DTYPES
        for threads in thread_counts
    ]
    records = []
    for distribution, dtype, threads in text.progress(cases, "kernels", "case"):
        tensor = fastinit.empty(elements, dtype=measure.DTYPES[dtype], device=device)
        ours, theirs = DISTRIBUTIONS[distribution]

        def fill(tensor=tensor, ours=ours) -> None:
            fastinit.fill_(tensor, ours, seed=1)

        def torch_fill(tensor=tensor, theirs=theirs) -> None:
            theirs(tensor)

        with torch_threads(threads):
            times = take_turns({"fastinit": fill, "torch": torch_fill}, device, repeats)
        records.append(
            {
                "distribution": distribution,
                "dtype": dtype,
                "threads": threads,
                "elements": elements,
                "seconds": times,
                "ratio": statistics.median(times["torch"]) / statistics.median(times["fastinit"]),
            }
        )
        del tensor, fill, torch_fill
    return records


def take_turns(fills: dict[str, Callable[[], None]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the first of each (which may load code) left out."""
    times: dict[str, list[float]] = {name: [] for name in fills}
    for _ in range(repeats + 1):
        for name, fill in fills.items():
            times[name].append(timed_fill(fill, device))
    return {name: taken[1:] for name, taken in times.items()}


CALLS = 8  # between two events on a GPU


def timed_fill(fill: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            # Several, so that Python's part of the first one, before the GPU has anything to do, does not count.
            for _ in range(CALLS):
                fill()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / CALLS
    began = time.perf_counter()
    fill()
    return time.perf_counter() - began


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Models


@dataclass(frozen=True, slots=True)
class Case:
    """A model to create: `build(layers)` makes it with so many layers, all of them without an argument.

    `ways` are those of `measure.WAYS` and "torch fp32", which is "torch" in fp32. `cache` is "cold" (torch's allocator
    holds nothing when creation starts), "warm" (it holds what an equal model just freed) or None for the CPU.
    `part` is the number of layers that the naive way creates, None for all.
    """

    name: str
    build: Callable[..., nn.Module]
    ways: tuple[str, ...]
    cache: str | None = None
    part: int | None = None
    requires: str | None = None


def many_linears(layers: int) -> nn.Module:
    return nn.ModuleList(nn.Linear(64, 64) for _ in range(layers))


def transformers_gpt2(layers: int = 24) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=layers, n_head=16))


def transformers_llama(layers: int = LLAMA_7B.layers) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=LLAMA_7B.vocabulary,
            hidden_size=LLAMA_7B.width,
            intermediate_size=LLAMA_7B.hidden,
            num_hidden_layers=layers,
            num_attention_heads=LLAMA_7B.heads,
        )
    )


def llama(layers: int = LLAMA_7B.layers) -> nn.Module:
    return Decoder(LLAMA_7B.with_layers(layers))


def model_cases(device: torch.device, quick: bool) -> list[Case]:
    linears = 50 if quick else 2000
    gpt2_layers = 2 if quick else 24
    llama_layers = 2 if quick else LLAMA_7B.layers
    caches = ("cold", "warm") if device.type == "cuda" else (None,)
    cases = [
        Case(
            f"{linears} x Linear(64, 64)",
            lambda: many_linears(linears),
            ("fastinit", "torch", "torch fp32"),
            cache=caches[-1],
        )
    ]
    for cache in caches:
        # The naive way hardly notices the cache: once is enough.
        ways = ("fastinit", "torch") if cache == "warm" else ("fastinit", "torch", "naive")
        cases += [
            Case(
                f"GPT-2 medium, {library}",
                lambda layers=gpt2_layers, build=build: build(layers),
                ways,
                cache=cache,
                requires=requires,
            )
            for library, build, requires in (
                ("torch.nn", GPT2Medium, None),
                ("transformers", transformers_gpt2, "transformers"),
            )
        ]
        if device.type == "cuda":
            cases += [
                Case(
                    f"Llama 7B, {library}",
                    lambda layers=llama_layers, build=build: build(layers),
                    ways,
                    cache=cache,
                    part=1,
                    requires=requires,
                )
                for library, build, requires in (
                    ("torch.nn", llama, None),
                    ("transformers", transformers_llama, "transformers"),
                )
            ]
    return cases


def measure_models(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """A record for each model and way in bf16: what `measure.timed_creation` gives, `seconds` for each repeat, the rest
    from the repeat with the most. A model whose library is not installed is recorded as `missing`."""
    repeats = 1 if quick else 5
    records: list[dict[str, Any]] = []
    for case in text.progress(model_cases(device, quick), "models", "model"):
        if case.requires is not None and not importable(case.requires):
            records.append({"model": case.name, "cache": case.cache, "missing": case.requires})
            continue
        for way, measured in measure_case(case, device, repeats).items():
            record: dict[str, Any] = {"model": case.name, "cache": case.cache, "way": way}
            record["seconds"] = [each["seconds"] for each in measured]
            for key in ("parameters", "tensor_bytes", "host_growth", "device_peak", "device_unused"):
                record[key] = max((each[key] for each in measured if each[key] is not None), default=None)
            records.append(record)
    for record in records:
        if "seconds" in record:
            whole = find(records, record, "fastinit")
            record["scale"] = whole["parameters"] / record["parameters"]
            ours = statistics.median(whole["seconds"])
            record["ratio"] = statistics.median(record["seconds"]) * record["scale"] / ours
    return records


def measure_case(case: Case, device: torch.device, repeats: int) -> dict[str, list[dict[str, Any]]]:
    measured: dict[str, list[dict[str, Any]]] = {way: [] for way in case.ways}
    for way in case.ways:
        measure.create_small(*way_and_dtype(way, device))
    # The first creations do not count: they import what the model needs.
    parameters = measure_once(case, "torch", device, 0)["parameters"]
    measure_once(case, "fastinit", device, parameters)
    if case.cache == "warm":
        # One way after the other: what another way left in the allocator's cache is not what this one would find.
        for way in case.ways:
            torch.cuda.empty_cache()
            runs = [measure_once(case, way, device, parameters) for _ in range(repeats_of(way, repeats) + 1)]
            measured[way] = runs[1:]
        return measured
    for repeat in range(repeats):
        for way in case.ways:
            if repeat < repeats_of(way, repeats):
                measured[way].append(measure_once(case, way, device, parameters))
    return measured


def repeats_of(way: str, repeats: int) -> int:
    return min(repeats, 2) if way == "naive" else repeats  # seconds each


def way_and_dtype(way: str, device: torch.device):
    return ("torch", device, torch.float32) if way == "torch fp32" else (way, device, torch.bfloat16)


def measure_once(case: Case, way: str, device: torch.device, parameters: int) -> dict[str, Any]:
    gc.collect()
    if case.cache == "cold":
        torch.cuda.empty_cache()

    def build() -> nn.Module:
        return case.build(case.part) if way == "naive" and case.part is not None else case.build()

    actual_way, _, dtype = way_and_dtype(way, device)
    if device.type == "cpu":
        measure.warm_memory(parameters * (torch.float32 if way == "naive" else dtype).itemsize)
    model, measured = measure.timed_creation(actual_way, build, device, dtype)
    del model
    return measured


def importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def find(records: Iterable[dict[str, Any]], like: dict[str, Any], way: str) -> dict[str, Any]:
    """The record of another way of creating the same model."""
    wanted = (like["model"], like["cache"], way)
    return next(each for each in records if (each["model"], each["cache"], each.get("way")) == wanted)


# Tables


def kernel_table(records: list[dict[str, Any]]) -> str:
    header = ["fill", "dtype", "threads", "elements", "fastinit ns/el", "torch ns/el", "torch / fastinit"]
    rows = []
    for record in records:
        per_element = {
            name: statistics.median(times) / record["elements"] * 1e9 for name, times in record["seconds"].items()
        }
        rows.append(
            [
                record["distribution"],
                record["dtype"],
                "GPU" if record["threads"] is None else str(record["threads"]),
                text.count(record["elements"]),
                f"{per_element['fastinit']:.3g}",
                f"{per_element['torch']:.3g}",
                f"{record['ratio']:.2f}",
            ]
        )
    repeats = len(records[0]["seconds"]["fastinit"])
    return f"Fills, medians of {repeats}:\n\n" + text.table(header, rows)


def model_table(records: list[dict[str, Any]]) -> str:
    header = ["model", "cache", "way", "parameters", "repeats", "time", "way / fastinit"]
    header += ["host growth", "device peak - model", "unused"]
    rows = []
    for record in records:
        cache = record["cache"] or "-"
        if "missing" in record:
            rows.append([record["model"], cache, f"{record['missing']} is not installed", *["-"] * (len(header) - 3)])
            continue
        mark = "~" if record["scale"] > 1.001 else ""
        peak = record["device_peak"]
        rows.append(
            [
                record["model"],
                cache,
                record["way"],
                text.count(record["parameters"]),
                str(len(record["seconds"])),
                mark + text.seconds(statistics.median(record["seconds"]) * record["scale"]),
                f"{mark}{record['ratio']:.3g}",
                size_or_dash(record["host_growth"]),
                size_or_dash(None if peak is None else peak - record["tensor_bytes"]),
                size_or_dash(record["device_unused"]),
            ]
        )
    marked = any(cell.startswith("~") for row in rows for cell in row)
    note = "\n\n~ measured on the number of parameters shown, scaled up to fastinit's" if marked else ""
    return "Creation of models in bf16, medians:\n\n" + text.table(header, rows) + note


def size_or_dash(nbytes: int | None) -> str:
    return "-" if nbytes is None else text.size(nbytes)

"""Measure fills and the creation of models against torch on this machine; write a table, JSON and a plot.

Ways that are compared take turns, so that a drift of the machine hits all. What the project measures itself by, with
other libraries beside it, is in benchmarks/ of its repository.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastinit

from . import machine as machines
from . import results, text
from .demo import checked_device
from .measure import DTYPES, seconds_on_device, torch_threads
from .models import LLAMA_7B, Decoder, DecoderConfig
from .workloads import FILLS, WAYS, elements_to_fill, linears, make_ready, timed_creation

BF16 = torch.bfloat16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:1" (default: a GPU if there is one)')
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("bench-out"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small, few repeats: to see that it runs")


def run(arguments: argparse.Namespace) -> int:
    device = torch.device(checked_device(arguments.device))
    machine = machines.describe()
    print(machines.summary(machine), flush=True)
    document: dict[str, Any] = {
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine_info": {"fastinit": machine},
        "benchmarks": [*fills(device, arguments.quick), *creations(device, arguments.quick)],
    }
    path = arguments.out / f"bench-{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    measured = results.read(document)
    for table in results.tables(measured):
        table.show()
    print(f"Results: {path}")
    try:
        from . import plot
    except ImportError as error:
        print(f"No plot: {error}. Install matplotlib (pip install 'torch-fastinit[bench]').")
        return 0
    plot.save(measured, path.with_suffix(".png"), machines.summary(machine))
    print(f"Plot: {path.with_suffix('.png')}")
    return 0


def fills(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """One tensor that exists already, by fastinit and by torch."""
    elements, threads = elements_to_fill(device, quick), [1, torch.get_num_threads()]
    cases = [
        (distribution, dtype, count)
        for distribution in FILLS
        for dtype in DTYPES
        for count in (dict.fromkeys(threads) if device.type == "cpu" else [None])
    ]
    for distribution, dtype, count in text.progress(cases, "fills"):
        fill = FILLS[distribution]
        tensor = fastinit.empty(elements, dtype=DTYPES[dtype], device=device)
        runs: dict[str, Callable[[], Any]] = {
            "fastinit": partial(fastinit.fill_, tensor, fill.ours, seed=1),
            "torch": partial(fill.torch, tensor),
        }
        seconds: dict[str, list[float]] = {way: [] for way in runs}
        wrong = {}
        with torch_threads(count):
            for _ in range(4 if quick else 8):
                for way, run in runs.items():
                    seconds[way].append(seconds_on_device(run, device))
                    wrong[way] = not fill.are_right(tensor)
        where = "" if count is None else f", {count} thread{'s' if count > 1 else ''}"
        for way in runs:  # the first run may have loaded code
            case = f"{distribution} {dtype}{where}"
            yield results.entry("fills", case, way, seconds[way][1:], elements=elements, wrong=wrong[way])


def creations(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Models in bf16, from an empty allocator cache."""
    small, count = DecoderConfig.of_size(1_000_000), 20 if quick else 2000
    builds: dict[str, Callable[[], torch.nn.Module]] = {
        f"{count:,} x Linear(64, 64)": linears(count),
        "Llama-shaped, 10M": lambda: Decoder(small if quick else DecoderConfig.of_size(10_000_000)),
        "Llama-shaped, 350M": lambda: Decoder(small if quick else DecoderConfig.of_size(350_000_000)),
    }
    if device.type == "cuda":
        builds["Llama 7B"] = lambda: Decoder(small if quick else LLAMA_7B)
    for case, build in text.progress(list(builds.items()), "models"):
        # Seconds for each 1e9 parameters.
        ways = [way for way in WAYS if way != "naive" or case != "Llama 7B"]
        created: dict[str, list[Any]] = {way: [] for way in ways}
        parameters = 0
        for _ in range(2 if quick else 6):
            for way in ways:
                make_ready(WAYS[way], parameters, device, BF16)
                created[way].append(timed_creation(WAYS[way].prepare(device, BF16), build, device)[1])
                parameters = created[way][0].parameters
        for way, runs in created.items():  # the first one imports what the model needs
            yield results.entry("creation in bf16", case, way, [each.seconds for each in runs[1:]], **runs[-1].info())

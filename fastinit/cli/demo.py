"""Create a decoder in half precision with fastinit, train it for a step, and compare two other ways of creating it.

Every way runs in a process of its own. Without --params the model has 1.3B parameters, or as many as the memory allows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastinit
from fastinit import native

from . import machine as machines
from . import text
from .measure import DTYPES, in_new_process
from .models import Decoder, DecoderConfig, training_step
from .workloads import WAYS, make_ready, timed_creation

COMPARED = ("fastinit", "torch", "naive")
PARAMETERS = 1_300_000_000
NAIVE_PARAMETERS = 1_500_000_000  # the naive way takes seconds for each 1e9
SHARE_OF_MEMORY = 0.7  # of what is free now, to leave some to activations and to everybody else


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", metavar="N", help='parameters of the model, such as "1.3B" or "50M"')
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:1" (default: a GPU if there is one)')
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of torch.manual_seed, default: %(default)s")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured to this file")


def run(arguments: argparse.Namespace) -> int:
    device = checked_device(arguments.device)
    config, wanted = choose_config(arguments.params, device, arguments.dtype)
    if wanted is not None:
        print(f"Memory is short for {text.count(wanted)} parameters; the model is scaled down.")
    print(
        f"A decoder of {text.count(config.parameters)} parameters ({config.layers} layers of width {config.width}) on "
        f"{device} in {arguments.dtype}, each way in a process of its own:\n",
        flush=True,
    )
    results = {}
    for way in text.progress(COMPARED, "creating"):
        part = naive_part(config) if way == "naive" else config
        measured = in_new_process(create, way, part, device, arguments.dtype, arguments.seed)
        results[way] = {**measured, "layers": part.layers, "scale": config.parameters / part.parameters}
    machine = machines.describe()
    show_comparison(results, config, device)
    print(f"\n{machines.summary(machine)}")
    if arguments.json:
        settings = {"device": device, "dtype": arguments.dtype, "seed": arguments.seed, "parameters": config.parameters}
        measured = {"machine": machine, "settings": settings, "ways": results}
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n")
    return 0


def create(way: str, config: DecoderConfig, device_name: str, dtype_name: str, seed: int) -> dict[str, Any]:
    """What a creation takes in this process, which has created nothing but a tiny model: lazy imports, the CUDA context
    and the first load of kernels are no part of it. fastinit's model is trained for a step."""
    device, dtype = torch.device(device_name), DTYPES[dtype_name]
    create = WAYS[way].prepare(device, dtype)
    create(lambda: Decoder(DecoderConfig(vocabulary=64, width=64, layers=1, heads=1, hidden=64)))
    make_ready(WAYS[way], config.parameters, device, dtype)
    torch.manual_seed(seed)
    model, created = timed_creation(create, lambda: Decoder(config), device)
    loss = {"loss": training_step(model, config.vocabulary, device)} if way == "fastinit" else {}
    return asdict(created) | loss


def checked_device(argument: str | None) -> str:
    """The device that the command line asks for, or the default one.

    Raises:
        ValueError, RuntimeError: as `fastinit.on`.
    """
    if argument is None:
        return default_device()
    with fastinit.on(argument):
        return argument


def default_device() -> str:
    return "cuda" if native.build_info()["cuda"] and torch.cuda.is_available() else "cpu"


def choose_config(params: str | None, device: str, dtype: str) -> tuple[DecoderConfig, int | None]:
    """The model to create, and the number of parameters that memory was too short for, if it was."""
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else machines.available_memory()
    bytes_per_parameter = 2 * DTYPES[dtype].itemsize  # a training step adds a gradient to each
    if params is not None:
        config = DecoderConfig.of_size(text.parse_count(params))
        needed = config.parameters * bytes_per_parameter
        if free is not None and needed > free:
            raise ValueError(
                f"--params {params}: with its gradients such a model takes {text.size(needed)} in {dtype}, and "
                f"{device} has {text.size(free)} free; choose fewer parameters"
            )
        return config, None
    fitting = PARAMETERS if free is None else int(SHARE_OF_MEMORY * free / bytes_per_parameter)
    if fitting >= PARAMETERS:
        return DecoderConfig.of_size(PARAMETERS), None
    return DecoderConfig.of_size(fitting).at_most(fitting), PARAMETERS


def naive_part(config: DecoderConfig) -> DecoderConfig:
    """As many of the layers as the naive way can create in fp32 on the CPU in bearable time."""
    free = machines.available_memory()
    fitting = NAIVE_PARAMETERS if free is None else SHARE_OF_MEMORY * free / torch.float32.itemsize
    return config.at_most(min(fitting, NAIVE_PARAMETERS))


def show_comparison(results: dict[str, dict[str, Any]], config: DecoderConfig, device: str) -> None:
    """Print a table of the ways, those that created a part of the model scaled up to the whole and marked."""
    on_gpu = device.startswith("cuda")
    header = ["", "time", "x fastinit", "host memory", *(["device memory"] if on_gpu else [])]
    rows, notes = [], []
    for way, result in results.items():
        scale, mark = result["scale"], "~" if result["scale"] > 1 else ""
        seconds = result["seconds"] * scale
        memory = ["host_growth", "device_peak"] if on_gpu else ["host_growth"]
        sizes = ["unknown" if result[key] is None else mark + text.size(result[key] * scale) for key in memory]
        ratio = seconds / results["fastinit"]["seconds"]
        rows.append([WAYS[way].description, mark + text.seconds(seconds), f"{mark}{ratio:.3g}", *sizes])
        if mark:
            notes.append(f"~ measured on {result['layers']} of {config.layers} layers, scaled up")
    model = text.size(results["fastinit"]["tensor_bytes"])
    notes.append(f"The model itself is {model}. Memory is the growth of the peak while it is created.")
    notes.append(f"One training step of fastinit's model: loss {results['fastinit']['loss']:.3f}, finite.")
    text.show_table(header, rows)
    print("\n".join(notes))

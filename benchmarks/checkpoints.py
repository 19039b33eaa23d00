"""What loading a checkpoint costs: against `empty=True`, against the meta device, and in memory. Writes JSON.

    python benchmarks/checkpoints.py [--device cuda] [--layers 32] [--out DIRECTORY]

Measured, in bf16, on a Llama-shaped model of torch.nn modules (6.74B parameters with 32 layers):

- empty: the constructor under `fastinit.on(..., empty=True)`, "unchecked", in full, and on the meta device under
  torch.device, each from an empty allocator cache;
- load: the constructor and a full `load_state_dict` inside of the context, against `empty=True` and the same load
  behind it. The state dict lies on the device, so that the copies take the least time that they can;
- memory: by how much the resident memory of a new process grows at most while `fastinit.load` reads an fp32
  safetensors file into a bf16 model on the CPU.

Ways that are compared take turns; times are medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fastinit
from fastinit.cli import machine, measure, text
from fastinit.cli.models import LLAMA_7B, Decoder, DecoderConfig


def timed(create, device: torch.device) -> tuple[float, Any]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    measure.synchronize(device)
    began = time.perf_counter()
    kept = create()
    measure.synchronize(device)
    return time.perf_counter() - began, kept


def take_turns(ways: dict[str, Any], device: torch.device, repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, create in ways.items():
            taken, kept = timed(create, device)
            del kept
            if repeat:
                seconds[name].append(taken)
    return seconds


def measure_empty(config: DecoderConfig, device: torch.device, repeats: int) -> dict[str, Any]:
    def on(**options):
        with fastinit.on(device, "bf16", seed=1, **options):
            return Decoder(config)

    def meta():
        with measure.default_dtype(torch.bfloat16), torch.device("meta"):
            return Decoder(config)

    ways = {
        "empty=True": lambda: on(empty=True),
        'empty="unchecked"': lambda: on(empty="unchecked"),
        "full": on,
        "meta": meta,
    }
    seconds = take_turns(ways, device, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"seconds": seconds, "empty / meta": medians["empty=True"] / medians["meta"]}


def measure_load(config: DecoderConfig, device: torch.device, repeats: int) -> dict[str, Any]:
    with fastinit.on(device, "bf16", seed=1):
        checkpoint = Decoder(config).state_dict()
    fills = []

    def inside():
        with fastinit.on(device, "bf16", seed=2) as report:
            model = Decoder(config)
            model.load_state_dict(checkpoint)
        fills.append(report.fills_executed)
        return model

    def empty():
        with fastinit.on(device, "bf16", seed=2, empty=True):
            model = Decoder(config)
        model.load_state_dict(checkpoint)
        return model

    seconds = take_turns({"inside": inside, "empty=True, then load": empty}, device, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "seconds": seconds,
        "fills executed inside": max(fills),
        "inside / empty": medians["inside"] / medians["empty=True, then load"],
    }


def measure_memory(parameters: int) -> dict[str, Any]:
    """In a process of its own, whose peak no earlier work has raised."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--load-from", folder, "--parameters", str(parameters)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def load_once(folder: Path, parameters: int) -> dict[str, Any]:
    import safetensors.torch

    config = DecoderConfig.of_size(parameters)
    path = folder / "model.safetensors"
    with fastinit.on("cpu", "fp32", seed=1):
        model = Decoder(config)
    safetensors.torch.save_file(model.state_dict(), path)
    del model
    small = folder / "small.safetensors"
    safetensors.torch.save_file(torch.nn.Linear(2, 2).state_dict(), small)
    fastinit.load(lambda: torch.nn.Linear(2, 2), small, "cpu", "bf16")  # imports
    gc.collect()
    measure.trim_heap()
    if not measure.reset_peak_resident():
        raise SystemExit("this system cannot reset the peak of resident memory")
    before = measure.resident_memory()
    began = time.perf_counter()
    model = fastinit.load(lambda: Decoder(config), path, "cpu", "bf16", progress=False)
    seconds = time.perf_counter() - began
    growth = measure.peak_resident() - before
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "model bytes": sum(each.nbytes for each in model.parameters()),
        "largest tensor in the file": max(each.numel() for each in model.parameters()) * 4,
        "file bytes": path.stat().st_size,
        "growth": growth,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=LLAMA_7B.layers)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--parameters", type=int, default=500_000_000, help="of the model whose memory is measured")
    parser.add_argument("--load-from", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load_from is not None:
        print(json.dumps(load_once(arguments.load_from, arguments.parameters)))
        return
    device = torch.device(arguments.device)
    config = LLAMA_7B.with_layers(arguments.layers)
    with fastinit.on(device, "bf16"):  # loads the kernels
        torch.nn.Linear(8, 8)
    results: dict[str, Any] = {"machine": machine.describe(), "parameters": config.parameters, "device": str(device)}
    print(machine.summary(results["machine"]))
    results["empty"] = measure_empty(config, device, arguments.repeats)
    results["load"] = measure_load(config, device, arguments.repeats)
    results["memory"] = measure_memory(arguments.parameters)
    for name in ("empty", "load"):
        for way, times in results[name]["seconds"].items():
            print(f"{way:24} {text.seconds(statistics.median(times))}")
    print(f"empty=True / meta        {results['empty']['empty / meta']:.2f}")
    print(f"inside / empty + load    {results['load']['inside / empty']:.2f}, ", end="")
    print(f"{results['load']['fills executed inside']} fills executed")
    memory = results["memory"]
    sizes = [text.size(memory[key]) for key in ("growth", "model bytes", "largest tensor in the file")]
    print("load of fp32 into bf16: grew by {}; the model has {}, the largest tensor of the file {}".format(*sizes))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"checkpoints-{device.type}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()

"""What `fabric.init_module()` costs with fastinit enabled and without, in new processes. Writes JSON.

    python benchmarks/fabric.py [--device cuda] [--layers 32] [--repeats 5] [--out DIRECTORY]

A Llama-shaped model of torch.nn modules (6.74B parameters with 32 layers), bf16-true, one device. Each measurement has
a process of its own; with and without fastinit take turns. Before the clock starts, Lightning and the GPU are
initialised and a tensor has been allocated; it stops when the GPU is done. Two times per process:

- first: the first model of the process. On a GPU, torch loads each kernel at its first use; for this model that is
  mostly `pow`, `neg` and `div` of its rotary tables; with fastinit these are computed on the host;
- cold: a second one, after the first was freed and torch's allocator gave its memory back.

(The file is not called lightning.py, because a script's folder comes first where Python looks for packages.)
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastinit.cli import machine, measure
from fastinit.cli.models import LLAMA_7B, Decoder, DecoderConfig

WAYS = ("lightning", "lightning, fastinit enabled")
WHEN = ("first", "cold")


def once(way: str, config: DecoderConfig, device: torch.device) -> dict[str, Any]:
    """In this process: seconds of the first and of a second creation."""
    import lightning

    import fastinit.lightning

    with fastinit.lightning.enabled() if way == WAYS[1] else nullcontext():
        fabric = lightning.Fabric(accelerator=device.type, devices=1, precision="bf16-true")
        torch.ones(1, device=device).sum().item()
        seconds = {}
        for when in WHEN:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            measure.synchronize(device)
            began = time.perf_counter()
            with fabric.init_module():
                model = Decoder(config)
            measure.synchronize(device)
            seconds[when] = time.perf_counter() - began
            parameters = list(model.parameters())
            wrong = [
                each.dtype for each in parameters if each.dtype != torch.bfloat16 or each.device.type != device.type
            ]
            if wrong:
                raise SystemExit(f"{way}: parameters are not in bf16 on {device}")
            std = parameters[0].float().std().item()  # of the embedding, a standard normal
            count = sum(each.numel() for each in parameters)
            del model, parameters
    return {"seconds": seconds, "parameters": count, "std of the embedding": std}


def in_a_process(way: str, config: DecoderConfig, device: torch.device) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--layers", str(config.layers), "--device", str(device)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=LLAMA_7B.layers)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device, config = torch.device(args.device), LLAMA_7B.with_layers(args.layers)
    if args.way:
        print(json.dumps(once(args.way, config, device)))
        return
    runs: dict[str, list[Any]] = {way: [] for way in WAYS}
    for repeat in tqdm(range(args.repeats + 1), desc="processes", unit="pair"):
        for way in WAYS if repeat % 2 else reversed(WAYS):
            result = in_a_process(way, config, device)
            if repeat:  # the first ones read the packages from disk
                runs[way].append(result)
    medians = {
        way: {when: statistics.median(run["seconds"][when] for run in results) for when in WHEN}
        for way, results in runs.items()
    }
    ratios = {when: medians[WAYS[1]][when] / medians[WAYS[0]][when] for when in WHEN}
    document = {
        "machine": machine.describe(),
        "layers": config.layers,
        "runs": runs,
        "median": medians,
        "ratio": ratios,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"fabric-{device.type}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    for way, times in medians.items():
        print(f"{way:30} " + ", ".join(f"{when} {seconds * 1e3:.1f} ms" for when, seconds in times.items()))
    print(f"{'fastinit / lightning':30} " + ", ".join(f"{when} {ratio:.2f} x" for when, ratio in ratios.items()))
    print(path)


if __name__ == "__main__":
    main()

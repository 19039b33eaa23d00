"""What the first model of a process costs, nothing loaded before the clock starts. Writes JSON.

    python benchmarks/first_model.py [--device cuda] [--parameters 6.7e9] [--repeats 3] [--out DIRECTORY]

This is how most programs meet a library: one process, one model. Each measurement has a process of its own, the ways
take turns, and the clock starts when torch, the library and the model's classes are imported and CUDA's context
exists, with no kernel loaded. It stops when the GPU is done. The models: a Llama of torch.nn modules with rotary
tables, and transformers'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastinit
from fastinit.cli import machine, measure
from fastinit.cli.models import LLAMA_7B, DecoderConfig
from fastinit.cli.workloads import llama

WAYS = ("torch.device", "fastinit")
LIBRARIES = ("torch.nn", "transformers")


def once(way: str, library: str, config: DecoderConfig, device: torch.device) -> dict[str, Any]:
    """In this process: seconds until the model is there, and fastinit's own account of them."""
    build = llama(config, library)
    if library == "transformers":
        import transformers

        transformers.LlamaForCausalLM  # noqa: B018 - imports its module
    if device.type == "cuda":
        torch.cuda.init()
        torch.empty(1, device=device)
    measure.synchronize(device)
    began = time.perf_counter()
    if way == "fastinit":
        with fastinit.on(device, "bf16", seed=0) as report:
            model = build()
    else:
        with measure.default_dtype(torch.bfloat16), device:
            model = build()
    measure.synchronize(device)
    seconds = time.perf_counter() - began
    wrong = [name for name, each in model.named_parameters() if each.device.type != device.type]
    assert not wrong, wrong
    result: dict[str, Any] = {"seconds": seconds, "parameters": sum(each.numel() for each in model.parameters())}
    if way == "fastinit":
        result |= {
            "python": report.seconds_python, "allocation": report.seconds_allocation, "fills": report.seconds_fills,
        }  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parameters", type=float, default=LLAMA_7B.parameters)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--once", nargs=2, metavar=("WAY", "LIBRARY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    config = LLAMA_7B if options.parameters == LLAMA_7B.parameters else DecoderConfig.of_size(int(options.parameters))
    if options.once:
        print(json.dumps(once(*options.once, config, device)))
        return
    runs: dict[str, list[dict[str, Any]]] = {}
    rounds = [(library, way) for _ in range(options.repeats) for library in LIBRARIES for way in WAYS]
    for library, way in tqdm(rounds, unit="model"):
        command = [sys.executable, __file__, "--device", options.device, "--parameters", str(options.parameters)]
        done = subprocess.run([*command, "--once", way, library], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{way}, {library} failed:\n{done.stderr[-3000:]}")
        runs.setdefault(f"{library}, {way}", []).append(json.loads(done.stdout.splitlines()[-1]))
    medians = {name: statistics.median(run["seconds"] for run in each) for name, each in runs.items()}
    ratios = {library: medians[f"{library}, fastinit"] / medians[f"{library}, torch.device"] for library in LIBRARIES}
    for library in LIBRARIES:
        ours, theirs = (1e3 * medians[f"{library}, {way}"] for way in ("fastinit", "torch.device"))
        print(f"{library}: fastinit {ours:.1f} ms, torch.device {theirs:.1f} ms, ratio {ratios[library]:.2f}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"first-model-{device.type}.json"
    result = {"machine": machine.describe(), "config": asdict(config), "runs": runs, "ratios": ratios}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()

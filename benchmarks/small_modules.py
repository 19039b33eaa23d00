"""What many small modules and an empty block cost: Python, and nothing else. Prints JSON.

    python benchmarks/small_modules.py [--modules 2000] [--repeats 8]

Microseconds for each `nn.Linear(64, 64)`, the ways taking turns in one process, the minimum of the repeats; and
milliseconds of an empty block once whatever of transformers, timm and torchvision is installed has been imported,
early and late in a thousand: medians of 20 blocks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

import fastinit
from fastinit.cli import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    result: dict[str, float] = {}
    for name in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        device = torch.device(name)
        for _ in range(options.repeats):
            ways: dict[str, AbstractContextManager[Any]] = {
                "plain": nullcontext(),
                "torch.device": device,
                "fastinit, fp32": fastinit.on(device, "fp32"),
                "fastinit, bf16": fastinit.on(device, "bf16"),
            }
            for way, context in ways.items():
                began = time.perf_counter()
                with context:
                    kept = [nn.Linear(64, 64) for _ in range(options.modules)]
                measure.synchronize(device)
                micros = (time.perf_counter() - began) / options.modules * 1e6
                key = f"{name}, {way}, us"
                result[key] = min(result.get(key, micros), micros)
                del kept
    for package in ("transformers", "timm", "torchvision"):
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)
    blocks = []
    for _ in range(1000):
        began = time.perf_counter()
        with fastinit.on("cpu", "fp32"):
            pass
        blocks.append((time.perf_counter() - began) * 1e3)
    result["empty block, about the tenth, ms"] = statistics.median(blocks[5:25])
    result["empty block, about the thousandth, ms"] = statistics.median(blocks[-20:])
    print(json.dumps({key: round(value, 3) for key, value in result.items()}, indent=1))


if __name__ == "__main__":
    main()

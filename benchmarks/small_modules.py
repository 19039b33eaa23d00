"""What creation costs where Python binds it: small modules, warm models, an empty block. Writes JSON.

    python benchmarks/small_modules.py [--modules 2000] [--repeats 8] [--out DIRECTORY]

Microseconds for each `nn.Linear(64, 64)`, and milliseconds for a Llama of torch.nn modules in bf16, with 10M parameters
and on a GPU with 6.74B, torch's allocator emptied before each: the ways taking turns in one process, the minimum of the
repeats. And milliseconds of an empty block once whatever of transformers, timm and torchvision is installed has been
imported, early and late in a thousand: medians of 20 blocks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastinit
from fastinit.cli import machine, measure
from fastinit.cli.models import LLAMA_7B, DecoderConfig
from fastinit.cli.workloads import llama


def milliseconds(build: Callable[[], Any], context: AbstractContextManager[Any], device: torch.device) -> float:
    began = time.perf_counter()
    with context:
        kept = build()
    measure.synchronize(device)
    spent = (time.perf_counter() - began) * 1e3
    del kept
    return spent


@contextmanager
def under_torch(device: torch.device) -> Iterator[None]:
    with measure.default_dtype(torch.bfloat16), device:
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    result: dict[str, float] = {}

    def note(key: str, value: float) -> None:
        result[key] = min(result.get(key, value), value)

    def linears() -> list[nn.Module]:
        return [nn.Linear(64, 64) for _ in range(options.modules)]

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
                each = milliseconds(linears, context, device) / options.modules * 1e3
                note(f"{name}, Linear, {way}, us", each)
        models = {"10M": DecoderConfig.of_size(10_000_000)} | ({"6.74B": LLAMA_7B} if name == "cuda" else {})
        for size, config in models.items():
            build = llama(config, "torch.nn")
            for _ in range(options.repeats):
                for way, context in (("torch.device", under_torch(device)), ("fastinit", fastinit.on(device, "bf16"))):
                    if name == "cuda":
                        torch.cuda.empty_cache()
                    note(f"{name}, {size}, {way}, ms", milliseconds(build, context, device))
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
    figures = {key: round(value, 3) for key, value in result.items()}
    print(json.dumps(figures, indent=1))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"small-modules-{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps({"machine": machine.describe(), "figures": figures}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()

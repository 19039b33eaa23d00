"""What it takes to have a checkpoint's values in a model on the GPU, by fastinit and by others.

    python benchmarks/loading.py [--device cuda] [--layers 32] [--repeats 3] [--folder DIRECTORY] [--out DIRECTORY]

It writes JSON and a picture, and prints a table.

The model is transformers' Llama (6.74B parameters with 32 layers), created and loaded in bf16; the clock runs from
nothing to a model whose values are all there. The checkpoints are written first, so that they lie in the page cache:

- file: one safetensors file in bf16;
- index: half as many layers in four safetensors files;
- fp32: the same as one file in fp32, which is rounded on the way;
- torch: the same in bf16, as torch.save writes it.

Ways take turns. Beside them stand two bounds: threads that read the file into pinned buffers and copy those to the GPU,
with no model and no names; and one copy from pinned memory, the link. The growth of resident memory is that of a load
after the first one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastinit
from fastinit.cli import machine, measure, text
from fastinit.cli.models import LLAMA_7B, DecoderConfig
from fastinit.cli.workloads import llama

Way = Callable[[], Any]


def write_checkpoints(config: DecoderConfig, folder: Path, device: torch.device) -> dict[str, Path]:
    """One directory for each kind of checkpoint, with the configuration that `from_pretrained` wants."""
    paths = {}
    for name, layers, dtype in (
        ("file", config.layers, "bf16"),
        ("index", config.layers // 2, "bf16"),
        ("fp32", config.layers // 2, "fp32"),
        ("torch", config.layers // 2, "bf16"),
    ):
        began = time.perf_counter()
        paths[name] = folder / name
        paths[name].mkdir(parents=True)
        with fastinit.on(device, dtype, seed=1):
            model: Any = llama(config.with_layers(layers), "transformers")()
        model.config.save_pretrained(paths[name])
        state = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
        del model
        if name == "torch":
            torch.save(state, paths[name] / "pytorch_model.bin")
        elif name == "index":
            parts: dict[str, dict[str, torch.Tensor]] = {}
            for number, (key, tensor) in enumerate(state.items()):
                parts.setdefault(f"model-{4 * number // len(state) + 1}-of-4.safetensors", {})[key] = tensor
            for file, part in parts.items():
                save_file(part, paths[name] / file, {"format": "pt"})
            index = {key: file for file, part in parts.items() for key in part}
            (paths[name] / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        else:
            save_file(state, paths[name] / "model.safetensors", {"format": "pt"})
        print(f"{name}: written in {text.seconds(time.perf_counter() - began)}", flush=True)
    return paths


def state_of(path: Path, device: str) -> dict[str, torch.Tensor]:
    """A state dict on a device, as people load it by hand."""
    if (path / "pytorch_model.bin").exists():
        return torch.load(path / "pytorch_model.bin", map_location=device, weights_only=True, mmap=True)
    state: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        state.update(load_file(file, device=device))
    return state


def ways(path: Path, config: DecoderConfig, device: torch.device) -> dict[str, Way]:
    build = llama(config, "transformers")

    def from_pretrained() -> nn.Module:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map=str(device))

    def inside(load: Callable[[], nn.Module]) -> Way:
        def run() -> nn.Module:
            with fastinit.on(device, "bf16"):
                return load()

        return run

    def built_and_loaded() -> nn.Module:
        model = build()
        model.load_state_dict(state_of(path, str(device)))
        return model

    def torch_device() -> nn.Module:
        with measure.default_dtype(torch.bfloat16), device:
            model = build()
        model.load_state_dict(state_of(path, str(device)))
        return model

    def assigned() -> nn.Module:
        with torch.device("meta"):
            model = build()
        model.load_state_dict(state_of(path, str(device)), assign=True)
        return model.to(torch.bfloat16)

    return {
        "fastinit.load": lambda: fastinit.load(build, path, device, "bf16", progress=False),
        "from_pretrained": from_pretrained,
        "from_pretrained in fastinit.on": inside(from_pretrained),
        "meta, state dict on the device, assign": assigned,
        "torch.device, state dict on the device, load_state_dict": torch_device,
        "the same in fastinit.on": inside(built_and_loaded),
    }


def threads_alone(path: Path, device: torch.device, readers: int = 16, nbytes: int = 8 << 20) -> None:
    """What can be expected: every file into memory of the device, by threads that read and copy."""
    buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(readers)]
    for file in sorted(each for each in path.iterdir() if each.suffix in (".safetensors", ".bin")):
        size = file.stat().st_size
        target = torch.empty(size, dtype=torch.uint8, device=device)
        descriptor = os.open(file, os.O_RDONLY)

        def work(number: int, size: int = size, target: Any = target, descriptor: int = descriptor) -> None:
            buffer, view = buffers[number], buffers[number].numpy()
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            for offset in range(number * nbytes, size, readers * nbytes):
                count = os.preadv(descriptor, [view], offset)
                with torch.cuda.stream(stream):
                    target[offset : offset + count].copy_(buffer[:count], non_blocking=True)
                if stream is not None:
                    stream.synchronize()

        with ThreadPoolExecutor(readers) as pool:
            list(pool.map(work, range(readers)))
        os.close(descriptor)


def link(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Bytes per second of one copy from pinned memory."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(3):
        measure.synchronize(device)
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        measure.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return nbytes / min(seconds)


def timed(way: Way, device: torch.device) -> dict[str, Any]:
    """Seconds, and by how much resident memory grew at most."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    measure.trim_heap()
    measure.synchronize(device)
    resets, before = measure.reset_peak_resident(), measure.resident_memory()
    began = time.perf_counter()
    kept = way()
    measure.synchronize(device)
    seconds = time.perf_counter() - began
    del kept
    growth = measure.peak_resident() - before if resets and before is not None else None
    return {"seconds": seconds, "growth": growth}


def measure_checkpoint(path: Path, config: DecoderConfig, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    size = sum(each.stat().st_size for each in path.iterdir() if each.suffix in (".safetensors", ".bin"))
    candidates = ways(path, config, device) | {"threads alone": lambda: threads_alone(path, device)}
    records: dict[str, dict[str, Any]] = {way: {"way": way, "bytes": size, "runs": []} for way in candidates}
    for _ in range(repeats):
        for way, run in candidates.items():
            record = records[way]
            if "error" not in record:
                try:
                    record["runs"].append(timed(run, device))
                except Exception as error:
                    record["error"] = f"{type(error).__name__}: {error}"
    for record in records.values():
        if record["runs"]:
            # The first one makes the pinned buffers and loads what else is loaded once.
            later = [run["seconds"] for run in record["runs"][1:] or record["runs"]]
            record |= {"seconds": statistics.median(later), "rate": size / statistics.median(later)}
    return list(records.values())


def table(results: dict[str, Any]) -> str:
    rows = []
    for name, records in results["checkpoints"].items():
        for record in records:
            if "error" in record:
                rows.append([name, record["way"], record["error"][:60], "", "", ""])
                continue
            growth = record["runs"][-1]["growth"]
            rows.append(
                [
                    name,
                    record["way"],
                    text.seconds(record["seconds"]),
                    text.seconds(record["runs"][0]["seconds"]),
                    f"{record['rate'] / 1e9:.1f}",
                    "" if growth is None else text.size(growth),
                ]
            )
    return text.markdown_table(["checkpoint", "way", "time", "first", "GB/s", "host memory"], rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Gigabytes of file per second, a panel for each checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    checkpoints = results["checkpoints"]
    figure, axes = pyplot.subplots(len(checkpoints), figsize=(9, 2.2 * len(checkpoints)), sharex=True, squeeze=False)
    for axis, (name, records) in zip(axes[:, 0], checkpoints.items(), strict=True):
        done = [record for record in records if "rate" in record][::-1]
        colours = ["tab:orange" if record["way"] == "fastinit.load" else "tab:gray" for record in done]
        bars = axis.barh([record["way"] for record in done], [record["rate"] / 1e9 for record in done], color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_title(f"{name}: {text.size(done[0]['bytes'])}" if done else name, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("GB of file per second, from the page cache into a model")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=LLAMA_7B.layers)
    parser.add_argument("--width", type=int, default=LLAMA_7B.width, help="to try it on a small model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the checkpoints; its file system is what is measured")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    config = LLAMA_7B.with_layers(options.layers)
    if options.width != config.width:
        config = DecoderConfig(vocabulary=1000, width=options.width, layers=options.layers, heads=4, hidden=1024)
    results: dict[str, Any] = {"machine": machine.describe(), "device": str(device), "layers": options.layers}
    print(machine.summary(results["machine"]))
    results["link"] = link(device)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"loading-{device.type}.json"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = write_checkpoints(config, Path(folder), device)
        results["checkpoints"] = {}
        for name, each in paths.items():
            layers = options.layers if name == "file" else options.layers // 2
            results["checkpoints"][name] = measure_checkpoint(each, config.with_layers(layers), device, options.repeats)
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    try:
        plot(results, path.with_suffix(".png"))
    except ImportError:
        print("No picture: matplotlib is not installed")
    print(f"\nOne copy from pinned memory: {results['link'] / 1e9:.1f} GB/s. Written: {path}")


if __name__ == "__main__":
    sys.exit(main())

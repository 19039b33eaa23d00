"""Runs the whole zoo and writes docs/conformance.md: `make zoo`, or `python tests/zoo [--only NAME ...]`.

Each architecture has a process of its own, forked from one that has imported everything, and a time limit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
import transformers
from architectures import CannotBeShrunk, architectures, constructor
from compare import MODES
from models import module_cases
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 300  # seconds an architecture
OK = "ok"

PREAMBLE = """\
# Conformance

Written by `make zoo`: every architecture of transformers in a small size and every module of torch.nn, made by torch
alone and by each mode of fastinit. `tests/zoo/compare.py` has what is compared:

- device: `on("cpu", "fp32")`: keys, shapes, dtypes, ties, buffers; what torch computes or fixes, bit for bit; the
  distribution of each random tensor, by a Kolmogorov-Smirnov test at 10^-8 of up to 20,000 values on each side (of two
  seeds; a tensor of less than 8 elements has too few for that test to find anything);
- bf16: the structure in that default dtype; the fp32 values, rounded once;
- empty, shard: `empty=True` and `initialize`, `shard=True` and `materialize`: the bits of the device mode;
- load: `load_state_dict` inside of the block, with and without `empty=True`: the bits of the state dict.
"""
LIBRARIES = "\n## Libraries\n"
# Failures that are no fault.
KNOWN = {
    ("inkling_mm_model", "bf16"): "torch computes the sizes of this model's layers in the default dtype, and in bf16 "
    "makes layers of other sizes than in fp32; fastinit makes those of fp32",
}


def check(name: str, reports: Connection) -> None:
    """Send the model's class, then each mode's result."""
    warnings.simplefilter("ignore")
    os.close(2)
    os.open(os.devnull, os.O_WRONLY)
    try:
        model, make = TORCH_NN[name] if name in TORCH_NN else constructor(name)
    except CannotBeShrunk as error:
        reports.send(("not built", str(error)))
        return
    reports.send(("model", model))
    for mode, compare in MODES.items():
        try:
            compare(make)
            reports.send((mode, OK))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(str(error).split())[:300] or f"{where.line} ({Path(where.filename).name})"
            reports.send((mode, f"{type(error).__name__}: {reason}"))


def run(names: list[str], jobs: int) -> dict[str, dict[str, str]]:
    context = multiprocessing.get_context("fork")
    results: dict[str, dict[str, str]] = {name: {} for name in names}
    waiting, running = list(reversed(names)), {}
    with tqdm(total=len(names), unit="model") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                reports, theirs = context.Pipe(duplex=False)
                process = context.Process(target=check, args=(name, theirs))
                process.start()
                theirs.close()
                running[reports] = (name, process, time.monotonic())
            for reports in wait(list(running), timeout=1):
                name, process, _ = running[reports]
                try:
                    what, result = reports.recv()
                    results[name][what] = result
                except EOFError:
                    process.join()
                    _fill(results[name], f"the process ended with {process.exitcode}")
                    del running[reports]
                    bar.update()
            for reports, (name, process, began) in list(running.items()):
                if time.monotonic() - began > TIME_LIMIT:
                    process.kill()
                    process.join()
                    _fill(results[name], f"not done after {TIME_LIMIT} s")
                    del running[reports]
                    bar.update()
    return results


def _fill(result: dict[str, str], reason: str) -> None:
    if "not built" not in result:
        result.update({mode: reason for mode in MODES if mode not in result})


def table(results: dict[str, dict[str, str]]) -> str:
    of_torch = {name: result for name, result in results.items() if name in TORCH_NN}
    of_transformers = {name: result for name, result in results.items() if name not in TORCH_NN}
    built = {name: result for name, result in of_transformers.items() if "not built" not in result}
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in ("torch", "transformers"))
    lines = [PREAMBLE, f"{versions}, Python {platform.python_version()}, CPU.", ""]
    lines += ["| | models | " + " | ".join(MODES) + " |", "|---|---|" + "---|" * len(MODES)]
    for title, part in (("torch.nn", of_torch), ("transformers", built)):
        passed = [f"{sum(result[mode] == OK for result in part.values())} of {len(part)}" for mode in MODES]
        lines.append(f"| {title} | {len(part)} | {' | '.join(passed)} |")
    lines.append("")
    failures = [
        f"| {name} | {result.get('model', '')} | {mode} | {KNOWN.get((name, mode)) or _cell(result[mode])} |"
        for name, result in {**of_torch, **built}.items()
        for mode in MODES
        if result[mode] != OK
    ]
    if failures:
        lines += ["## Failures", "", "| | class | mode | reason |", "|---|---|---|---|", *failures, ""]
    lines += ["## Not built", "", "Torch alone builds no small model of these from their default configuration.", ""]
    lines += ["| | the first attempt |", "|---|---|"]
    for name, result in of_transformers.items():
        if "not built" in result:
            lines.append(f"| {name} | {_cell(result['not built'])} |")
    lines += ["", "## Built", "", "The model of each configuration that was made:", ""]
    lines.append(", ".join(f"{name} ({result['model']})" for name, result in built.items()) + ".")
    return "\n".join(lines) + "\n"


def _cell(reason: str) -> str:
    return reason.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some architectures; prints instead of writing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = run(args.only or [*TORCH_NN, *architectures()], args.jobs)
    failed = [
        name
        for name, result in results.items()
        if any(result.get(mode, OK) != OK and (name, mode) not in KNOWN for mode in MODES)
    ]
    if args.only:
        print(*(f"{name}: {result}" for name, result in results.items()), sep="\n")
    else:
        page = ROOT / "docs" / "conformance.md"
        _, title, libraries = page.read_text().partition(LIBRARIES)  # written by another command
        page.write_text(table(results) + title + libraries)
        print("docs/conformance.md")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


TORCH_NN = {f"torch.nn {name}": (name, make) for name, make in module_cases()}

if __name__ == "__main__":
    main()

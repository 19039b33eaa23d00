"""Measure fills and the creation of models against torch, in one run; write tables, JSON and a plot.

Every figure is the median of its repeats. Ways that are compared take turns, so that a drift of the machine hits all.
`--suite full` compares with all other ways and generators of random numbers that are installed, shows how cost grows
with models and ranks, and names what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import figures, tables, text
from . import machine as machines
from .demo import checked_device
from .peers import PEERS
from .sections import SECTIONS, Settings
from .ways import WAYS

SUITES = {"kernels": ["kernels"], "models": ["models"], "all": ["kernels", "models"]}
PACKAGES = ("matplotlib", "numpy", "tqdm")  # of which the version is noted, beside those of ways and peers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=(*SUITES, "full"), default="all", help="default: %(default)s")
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:1" (default: a GPU if there is one)')
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("bench-out"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small, few repeats: to see that it runs")
    parser.add_argument(
        "--time-limit", metavar="SECONDS", type=float, default=1800.0, help="of --suite full; default: %(default)s"
    )
    parser.add_argument("--plot", metavar="JSON", type=Path, help="measure nothing: tables and plot of a result file")


def run(arguments: argparse.Namespace) -> int:
    if arguments.plot is not None:
        show(read(arguments.plot), arguments.plot)
        return 0
    device = torch.device(checked_device(arguments.device))
    full = arguments.suite == "full"
    settings = Settings(str(device), arguments.quick, peers=full)
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machines.describe(),
        "settings": {"suite": arguments.suite, "device": str(device), "quick": arguments.quick},
        "sections": [],
        "kernels": [],
        "models": [],
    }
    if full:
        required = {peer.requires for peer in PEERS.values()} | {way.requires for way in WAYS.values()}
        results["machine"]["peers"] = machines.versions(sorted({*PACKAGES, *filter(None, required)}))
    path = arguments.out / f"{'full' if full else 'bench'}-{device.type}.json"
    print(machines.summary(results["machine"]) + "\n", flush=True)
    if full:
        run_apart(plan(settings), results, path, arguments.time_limit)
    else:
        for name in SUITES[arguments.suite]:
            for record in SECTIONS[name](settings):
                results[name].append(record)
                save(results, path)
    show(results, path)
    return 1 if any("error" in section for section in results["sections"]) else 0


def read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot {path}: {error}; pass a JSON file that bench has written") from error
    if not isinstance(results, dict) or not {"machine", "settings", "kernels", "models"} <= results.keys():
        raise ValueError(f"--plot {path}: these are no results; pass a JSON file that bench has written")
    return results


def plan(settings: Settings) -> list[tuple[str, Settings]]:
    """The sections of the full suite, those first whose figures matter most."""
    sections = [(name, settings) for name in SECTIONS]
    if settings.torch_device.type == "cuda":
        host = Settings("cpu", settings.quick, settings.peers)
        sections += [("modules", host), ("kernels", host), ("growth", host)]
    return sections


def run_apart(sections: list[tuple[str, Settings]], results: dict[str, Any], path: Path, time_limit: float) -> None:
    """Run each section in a process of its own and save its records as they come.

    A section that fails, or is not done when the time is up, has an `error` in `results["sections"]`.
    """
    end = time.monotonic() + time_limit
    for name, settings in text.progress(sections, "suite", "section"):
        section: dict[str, Any] = {"section": name, "device": settings.device, "error": "not done"}
        results["sections"].append(section)
        results.setdefault(name, [])
        save(results, path)
        began = time.monotonic()
        if began < end:
            section["error"] = run_section(name, settings, results, path, end - began)
        else:
            section["error"] = f"not started: the time limit of {time_limit:g} s was reached"
        section["seconds"] = time.monotonic() - began
        if section["error"] is None:
            del section["error"]
        save(results, path)


def run_section(name: str, settings: Settings, results: dict[str, Any], path: Path, seconds_left: float) -> str | None:
    """What was the matter, if anything was."""
    command = [sys.executable, "-m", "fastinit.cli.sections", name, json.dumps(asdict(settings))]
    # A session of its own, so that the processes that the section starts end with it.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        kill_session(process)

    timer = threading.Timer(seconds_left, stop)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            results[name].append(json.loads(line))
            save(results, path)
        status = process.wait()
    finally:
        timer.cancel()
        kill_session(process)
    if stopped.is_set():
        return f"stopped after {seconds_left:.0f} s: the time limit was reached"
    return f"exit status {status}, see standard error" if status else None


def kill_session(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all have ended


def save(results: dict[str, Any], path: Path) -> None:
    """Write the file as a whole: a run that is killed leaves the results that it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(path)


def show(results: dict[str, Any], path: Path) -> None:
    for table in (*tables.all_of(results), figures.table(results)):
        if table:
            print(table + "\n", flush=True)
    print(f"Results: {path}")
    if results["settings"].get("suite") == "full":
        path.with_suffix(".md").write_text(tables.markdown(results))
        print(f"The main tables as Markdown: {path.with_suffix('.md')}")
    try:
        from . import plot
    except ImportError as error:
        print(f"No plot: {error}. Install matplotlib (pip install 'torch-fastinit[bench]').")
        return
    for picture in plot.save(results, path.with_suffix(".png")):
        print(f"Plot: {picture}")

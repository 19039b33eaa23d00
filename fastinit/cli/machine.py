"""What a run ran on: processor, memory, GPUs, versions. Reported by doctor and written into every result file."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

import fastinit
from fastinit import native


def describe() -> dict[str, Any]:
    """This machine and its software as JSON values."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": total_memory(),
        "huge_pages": huge_pages(),
        "gpus": gpus(),
        "driver": driver(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        "fastinit": fastinit.__version__,
        "git_commit": git_commit(),
        "build": dict(native.build_info()),
        "cpu_isa": native.cpu_isa(),
        "cpu_isas": native.cpu_isas(),
        "packages": {name: installed(name) for name in ("rich", "matplotlib", "tqdm")},
    }


def summary(machine: dict[str, Any]) -> str:
    """One line for the head of a table."""
    processors = [f"{machine['cpu']} ({machine['cpu_isa']}, {machine['torch_threads']} threads)"]
    processors += [gpu["name"] for gpu in machine["gpus"]]
    return f"{', '.join(processors)}; torch {machine['torch']}, fastinit {machine['fastinit']}"


def cpu_name() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def total_memory() -> int | None:
    """Bytes of memory that this process may use, the limit of its control group included; None if not known."""
    return _smallest(kernel_bytes("/proc/meminfo", "MemTotal"), _cgroup("memory.max"))


def available_memory() -> int | None:
    """Bytes of memory that can be taken now without swapping; None if not known."""
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    # Pages of the file cache count as used, and are given back when memory is asked for.
    cached = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)$", _read("/sys/fs/cgroup/memory.stat"), re.MULTILINE)))
    unused = None if limit is None or used is None else limit - used + cached
    return _smallest(kernel_bytes("/proc/meminfo", "MemAvailable"), unused)


def kernel_bytes(file: str, field: str) -> int | None:
    """The bytes that one of Linux's files in /proc has in a field; None elsewhere."""
    kibibytes = re.search(rf"^{field}:\s*(\d+) kB$", _read(file), re.MULTILINE)
    return int(kibibytes[1]) * 1024 if kibibytes else None


def huge_pages() -> str | None:
    """The setting of transparent huge pages, "always", "madvise" or "never"; None where the system has none."""
    chosen = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return chosen and chosen[1]


def gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": device.name, "architecture": 10 * device.major + device.minor, "memory": device.total_memory}
        for device in devices
    ]


def driver() -> str | None:
    """Version of the NVIDIA driver, whether or not this torch can use it."""
    version: str | None = collect_env.get_nvidia_driver_version(lambda line: (*subprocess.getstatusoutput(line), ""))
    return version


def git_commit() -> str | None:
    """The commit of the checkout that fastinit is imported from, with "+" if files differ; None outside a checkout.

    The environment variable FASTINIT_COMMIT says it where the files have been copied without their history.
    """
    if os.environ.get("FASTINIT_COMMIT"):
        return os.environ["FASTINIT_COMMIT"]
    package = Path(fastinit.__file__).parent
    git = shutil.which("git")
    if git is None or not (package.parent / ".git").exists():
        return None
    command = [git, "-C", str(package), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Of the distributions that packages come from, None for those that are not installed."""
    # A package does not have the name of its distribution always: cupy comes from one for each CUDA.
    distributions = metadata.packages_distributions()
    return {name: installed(distributions[name][0]) if name in distributions else None for name in packages}


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cgroup(file: str) -> int | None:
    value = _read(f"/sys/fs/cgroup/{file}").strip()
    return int(value) if value.isdecimal() else None


def _smallest(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)

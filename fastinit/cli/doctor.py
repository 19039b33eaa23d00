"""Say what was built, what this machine has, whether fills work, and what to do about what is missing.

The exit status is 0 if fills work wherever they are expected to, else 1.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastinit
from fastinit import native

from . import machine as machines
from . import text

PACKAGES = {
    "rich": "the tables of `python -m fastinit demo` and `bench`",
    "matplotlib": "the plot of `python -m fastinit bench`",
    "tqdm": "a progress bar in `fastinit.load`",
}

# By major version of the CUDA runtime: the oldest driver that it works with (CUDA's release notes, minor version
# compatibility).
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    machine = machines.describe()
    checks = self_checks(machine)
    report = {**machine, "checks": checks, "advice": [*replaced_files(), *advice(machine)]}
    print(json.dumps(report, indent=2) if arguments.json else readable(report))
    return 0 if all(check["passed"] for check in checks) else 1


def self_checks(machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Fill a little with each backend that is there and compare bits with the portable code."""
    fills: dict[str, Callable[[], torch.Tensor]] = {
        f"cpu, {isa}": partial(run_normal, torch.empty(1001), isa) for isa in machine["cpu_isas"]
    }
    for index, gpu in enumerate(machine["gpus"] if machine["build"]["cuda"] else []):
        fills[f"cuda:{index}, {gpu['name']}"] = partial(cuda_normal, index)
    expected = run_normal(torch.empty(1001), "portable")
    return [check(name, fill, expected) for name, fill in fills.items()]


def run_normal(tensor: torch.Tensor, isa: str) -> torch.Tensor:
    batch = native.Batch()
    batch.add(tensor.data_ptr(), tensor.numel(), native.FLOAT32, native.NORMAL, (0.0, 1.0), 1, 0)
    batch.run_cpu(1, isa)
    return tensor


def cuda_normal(index: int) -> torch.Tensor:
    tensor = torch.empty(1001, device=f"cuda:{index}")
    fastinit.fill_(tensor, fastinit.Normal(), seed=1)
    return tensor


def check(name: str, fill: Callable[[], torch.Tensor], expected: torch.Tensor) -> dict[str, Any]:
    try:
        equal = torch.equal(fill().cpu(), expected)
    except RuntimeError as error:
        return {"name": name, "passed": False, "detail": str(error)}
    return {"name": name, "passed": equal, "detail": "same bits" if equal else "bits differ from the portable code's"}


def replaced_files(name: str = "torch-fastinit") -> list[str]:
    """What to do if files of the package are others than were installed: another project's, in a folder of one name."""
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        return []
    replaced = [str(file) for file in files if file.hash and digest(file, file.hash.mode) != file.hash.value]
    if not replaced:
        return []
    return [
        f"{', '.join(replaced)}: not as {name} installed it; another distribution, such as `fastinit`, has written to "
        f"the same folder. pip uninstall fastinit, then pip install --force-reinstall --no-deps {name}."
    ]


def digest(file: metadata.PackagePath, algorithm: str) -> str | None:
    """As in a RECORD of installed files; None for what is no longer there."""
    try:
        digest = hashlib.new(algorithm, file.read_binary()).digest()
    except OSError:
        return None
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def advice(machine: dict[str, Any]) -> list[str]:
    """One sentence for each thing that is missing and what to do about it."""
    build, remedies = machine["build"], []
    if machine["driver"] and not machine["gpus"]:
        remedies.append(
            f"The NVIDIA driver {machine['driver']} is there but torch {machine['torch']} sees no GPU: install a CUDA "
            "build of torch that this driver supports, or check CUDA_VISIBLE_DEVICES."
        )
    if machine["gpus"] and not build["cuda"]:
        remedies.append(
            "torch sees a GPU but fastinit was built without CUDA: install the CUDA toolkit (nvcc on PATH), then "
            "reinstall with FASTINIT_CUDA=1 and pip install --force-reinstall --no-deps --no-cache-dir."
        )
    if build["cuda"] and machine["driver"]:
        oldest = OLDEST_DRIVERS.get(int(build["cuda_version"].partition(".")[0]), 0)
        if int(machine["driver"].partition(".")[0]) < oldest:
            remedies.append(
                f"The driver {machine['driver']} is too old for CUDA {build['cuda_version']} of this build, which "
                f"needs {oldest} or newer: update the driver, or build with an older CUDA toolkit."
            )
    if build["cuda"]:
        compiled = sorted(map(int, build["cuda_architectures"]))
        reach = ", ".join(map(str, compiled))
        for gpu in machine["gpus"]:
            name, architecture = gpu["name"], gpu["architecture"]
            if not runs_on(architecture, compiled):
                remedies.append(
                    f"{name} is sm_{architecture}, which this build for {reach} does not reach: "
                    f"rebuild with FASTINIT_CUDA_ARCHS={architecture}."
                )
    if machine["huge_pages"] == "never":
        remedies.append(
            "Transparent huge pages are off, which makes filling fresh CPU memory slower: "
            "set /sys/kernel/mm/transparent_hugepage/enabled to madvise."
        )
    remedies += [
        f"{name} is not installed, for {use}." for name, use in PACKAGES.items() if not machine["packages"][name]
    ]
    return remedies


def runs_on(architecture: int, compiled: list[int]) -> bool:
    """Whether a GPU can run code compiled for those architectures, the highest of which is also there as PTX.

    Binary code runs on GPUs of the same major version and no lower minor one, PTX on all later ones (CUDA C++
    Programming Guide, compute capability).
    """
    return architecture >= compiled[-1] or any(
        arch // 10 == architecture // 10 and arch <= architecture for arch in compiled
    )


def readable(report: dict[str, Any]) -> str:
    build = report["build"]
    cuda = f"{build['cuda_version']}, for {', '.join(build['cuda_architectures'])} and PTX" if build["cuda"] else "no"
    lines = {
        "fastinit": f"{report['fastinit']} in {Path(fastinit.__file__).parent}",
        "built by": build["compiler"],
        "CUDA half": cuda,
        "torch": f"{report['torch']}, {'CUDA ' + report['torch_cuda'] if report['torch_cuda'] else 'CPU build'}",
        "python": f"{report['python']} on {report['system']}",
        "CPU": f"{report['cpu']}, {report['cpu_cores']} cores, {report['torch_threads']} torch threads",
        "instruction set": f"{report['cpu_isa']} (of {', '.join(report['cpu_isas'])}; FASTINIT_CPU_ISA forces one)",
        "memory": "unknown" if report["memory"] is None else text.size(report["memory"]),
        "huge pages": report["huge_pages"] or "unknown",
        "driver": report["driver"] or "none found",
    }
    for index, gpu in enumerate(report["gpus"]):
        lines[f"cuda:{index}"] = f"{gpu['name']}, sm_{gpu['architecture']}, {text.size(gpu['memory'])}"
    for name, version in report["packages"].items():
        lines[name] = version or "not installed"
    width = max(map(len, lines))
    output = [f"{name.ljust(width)}  {value}" for name, value in lines.items()]
    output += ["", "Fills:"]
    for each in report["checks"]:
        output.append(f"  {'ok    ' if each['passed'] else 'FAILED'} {each['name']}: {each['detail']}")
    if report["advice"]:
        output += ["", "What to do:"] + [f"  - {sentence}" for sentence in report["advice"]]
    return "\n".join(output)

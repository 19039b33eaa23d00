"""Tests that need a GPU: skipped as a whole where there is none, or where the native module was built without CUDA.

What needs two GPUs runs on two processes with NCCL, or with `--gloo` on two processes on the CPU: a rehearsal of the
tests' own code, for machines without GPUs. `--results FILE` writes outcomes, errors and what tests have found as JSON,
after each test anew.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from fastinit import native
from fastinit.cli import machine

PACKAGES = ("accelerate", "deepspeed", "lightning", "transformers")
RESULTS = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--gloo", action="store_true", help="two CPU processes in the place of two GPUs")
    parser.addoption("--results", type=Path, help="JSON file for outcomes")


def pytest_configure(config):
    config.stash[RESULTS] = []


def pytest_collection_modifyitems(config, items):
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        for item in items:
            if item.get_closest_marker("caching_allocator"):
                item.add_marker(pytest.mark.skip(reason="needs torch's caching allocator"))
    if not native.build_info()["cuda"]:
        reason = "fastinit was built without CUDA"
    elif not torch.cuda.is_available():
        reason = "no CUDA device"
    else:
        return
    here = Path(__file__).resolve().parent
    for item in items:
        if here in item.path.parents and not (on_cpus(config) and "two_devices" in item.fixturenames):
            item.add_marker(pytest.mark.skip(reason=reason))


def on_cpus(config):
    return config.getoption("--gloo", False)


@pytest.fixture(scope="session")
def two_devices(request):
    if on_cpus(request.config):
        return [torch.device("cpu")] * 2
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return [torch.device("cuda", index) for index in range(2)]


@pytest.fixture(scope="session")
def new_ranks(two_devices, tmp_path_factory):
    """What fixtures of two processes with a GPU each consist of."""

    def new_ranks():
        # The first collective waits until both have made their first use of a GPU.
        two = Ranks(2, tmp_path_factory, "gloo" if two_devices[0].type == "cpu" else "nccl", timeout=40)
        yield two
        two.end()

    return new_ranks


@pytest.fixture(scope="module")
def ranks(new_ranks):
    yield from new_ranks()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    path = item.config.getoption("--results", None)
    if path and (report.when == "call" or not report.passed):
        check = {
            "check": item.nodeid.partition("cuda/")[2],
            "outcome": report.outcome,
            "seconds": round(call.duration, 2),
        }
        item.config.stash[RESULTS].append(check | dict(item.user_properties) | {"error": report.longreprtext[-4000:]})
        about = {"machine": machine.describe(), "packages": machine.versions(PACKAGES)}
        path.write_text(json.dumps(about | {"checks": item.config.stash[RESULTS]}, indent=1))
    return report


def pytest_terminal_summary(terminalreporter, config):
    """The digests that tests have noted, a line for each test."""
    noted = {check["check"]: check["digests"] for check in config.stash[RESULTS] if "digests" in check}
    if noted:
        cases = list(dict.fromkeys(case for digests in noted.values() for case in digests))
        terminalreporter.section("digests")
        for name, cells in {"": {case: case for case in cases}, **noted}.items():
            terminalreporter.line(f"{name:56}" + " ".join(f"{cells.get(case, '-'):17}" for case in cases))

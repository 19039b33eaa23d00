"""Options of the pytest-benchmark suite, and what its report says of the machine and of who is missing.

    python -m pytest benchmarks [--device cuda] [--quick] [--benchmark-json FILE] [-k "normal and bf16"]

The workloads, the ways and the peers are those of `python -m fastinit bench --suite full`: fastinit.cli.workloads, ways
and peers.
"""

import pytest
import torch

from fastinit.cli import machine, peers
from fastinit.cli.demo import default_device
from fastinit.cli.peers import PEERS
from fastinit.cli.ways import WAYS


def pytest_addoption(parser):
    group = parser.getgroup("fastinit")
    group.addoption("--device", help='"cpu", "cuda" or "cuda:1" (default: a GPU if there is one)')
    group.addoption("--quick", action="store_true", help="small, few rounds: to see that it runs")


def pytest_report_header():
    missing = [f"{name} ({package})" for name, package in required().items() if not peers.importable(package)]
    return [machine.summary(machine.describe()), f"missing: {', '.join(missing) or 'nobody'}"]


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["fastinit"] = machine.describe()
    machine_info["peers"] = machine.versions(sorted({*required().values()}))


def required():
    """The package that each peer and way needs besides torch."""
    return {name: each.requires for name, each in (*PEERS.items(), *WAYS.items()) if each.requires}


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device") or default_device())


@pytest.fixture(scope="session")
def quick(request):
    return request.config.getoption("--quick")

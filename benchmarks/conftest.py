"""What all suites share: options, devices, and the recording of what was measured, in pytest-benchmark's JSON.

A suite measures seconds by `fastinit.cli.measure`, which knows GPUs, other processes and parts of a run, and hands them
to `figure`. pytest-benchmark does the rest: its clock is one that goes forward by what was measured.
"""

import concurrent.futures
import functools
import time
from contextlib import contextmanager

import peers
import pytest
import torch

from fastinit.cli import machine, measure
from fastinit.cli.demo import default_device

# In the order of a run, the main device's before the CPU's: if a time limit ends it, the last ones are missing.
SUITES = "fills first contexts creation layouts growth frameworks sharded loading readers statistics".split()

PACKAGES = "accelerate cupy deepspeed jax lightning numpy safetensors timm torchvision transformers triton".split()


class Clock:
    """A timer for pytest-benchmark."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


CLOCK = Clock()


def pytest_addoption(parser):
    group = parser.getgroup("fastinit")
    group.addoption("--device", help='"cpu", "cuda" or "cuda:1"; default: a GPU if there is one, and the CPU after it')
    group.addoption("--quick", action="store_true", help="small, few rounds: to see that it runs")
    group.addoption("--time-limit", type=float, default=float("inf"), help="seconds after which nothing more starts")
    group.addoption("--samples", type=float, help="of the statistics of fp32 normals; default: 1e11, on a CPU 1e8")


def pytest_configure(config):
    config.began = time.monotonic()
    config.absent, config.not_started = [], []


def devices(config):
    """The one that was asked for, or all: the GPU before the CPU."""
    chosen = config.getoption("--device")
    return [chosen] if chosen else list(dict.fromkeys([default_device(), "cpu"]))


def pytest_generate_tests(metafunc):
    """`device` is each of the devices; suites that are about accelerators where there is one take `main_device`."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices(metafunc.config), indirect=True, scope="session")


@pytest.hookimpl(trylast=True)  # pytest itself sorts by the devices of fixtures
def pytest_collection_modifyitems(config, items):
    main = devices(config)[0]

    def order(item):
        device = item.callspec.params.get("device", main) if hasattr(item, "callspec") else main
        return device != main, SUITES.index(suite_of(item))

    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
    items.sort(key=order)


def suite_of(item):
    return item.path.stem.removeprefix("bench_")


def pytest_runtest_setup(item):
    limit = item.config.getoption("--time-limit")
    if time.monotonic() - item.config.began > limit:
        item.config.not_started.append(item.nodeid)
        pytest.skip(f"not started: the time limit of {limit:g} s was reached")


def pytest_report_header():
    return machine.summary(machine.describe())


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["fastinit"] = machine.describe()
    machine_info["packages"] = machine.versions(PACKAGES)


def pytest_benchmark_update_json(config, output_json):
    output_json["absent"], output_json["not_started"] = config.absent, config.not_started
    output_json["quick"] = config.getoption("--quick")


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="session")
def main_device(request):
    return torch.device(devices(request.config)[0])


@pytest.fixture(scope="session")
def quick(request):
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def once():
    """once(function, *arguments, **options): what it returned or raised the first time, for figures of one run."""

    @functools.cache
    def outcome(function, *arguments, **options):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future

    return lambda *call, **options: outcome(*call, **options).result()


@pytest.fixture(autouse=True)
def no_memory_is_kept():
    """What torch's allocator keeps of one figure would be missing to the processes of another."""
    yield
    measure.clean_up(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))


@pytest.fixture
def figure(request, benchmark):
    """`with figure(case, way) as record:` one figure is measured, and `record(seconds, **info)` takes it.

    `seconds` is a list, or a function that runs once and tells how long that took. Of a function the first run does not
    count (it may import, compile, load kernels), and there are so many `rounds` as fit into `patience` seconds, two at
    least. `info` is written beside the figure: see fastinit.cli.results. A way that is unavailable, or that fails and
    is not fastinit, is absent with its reason, which ends the test.
    """

    @contextmanager
    def figure(case, way):
        named = {"suite": suite_of(request.node), "case": case, "way": way}
        benchmark.group = f"{named['suite']}: {case}"

        def record(seconds, *, rounds=5, patience=10.0, **info):
            if callable(seconds):
                seconds = repeated(seconds, 0 if request.config.getoption("--quick") else rounds, patience)
            remaining = iter(seconds)

            def run():
                CLOCK.now += next(remaining)

            benchmark.pedantic(run, rounds=len(seconds))
            benchmark.extra_info.update(named, **{key: value for key, value in info.items() if value is not None})
            return benchmark.extra_info

        try:
            yield record
        except Exception as error:
            if isinstance(error, peers.Unavailable):
                reason = str(error)
            elif way != "fastinit":
                reason = f"failed: {type(error).__name__}: {error}"[:300]
            else:
                raise
            request.config.absent.append({**named, "reason": reason})
            pytest.skip(f"{case}, {way}: {reason}")

    return figure


def repeated(run, rounds, patience):
    first = run()
    return [run() for _ in range(rounds_for(first, rounds, patience))] or [first]


def rounds_for(first, rounds, patience):
    return max(2, min(rounds, int(patience / max(first, 1e-9)))) if rounds else 0

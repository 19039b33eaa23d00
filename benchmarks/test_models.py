"""Creation of models in bf16 in each way; a group for each model. From an empty allocator cache ("cold") and from one
that holds what an equal model has just freed ("warm"), in one process.

A way whose package is missing is skipped with that reason.
"""

import pytest
import torch

from fastinit.cli import measure, peers, sections
from fastinit.cli.demo import default_device
from fastinit.cli.ways import WAYS, warm_host
from fastinit.cli.workloads import model_cases, module_cases


def cases(device, quick):
    return {
        f"{case.name}, {case.cache or device.type}": case
        for make in (module_cases, model_cases)
        for case in make(device, quick, peers=True)
    }


def pytest_generate_tests(metafunc):
    config = metafunc.config
    device = torch.device(config.getoption("--device") or default_device())
    chosen = cases(device, config.getoption("--quick"))
    pairs = [pytest.param(case, way, id=f"{name}, {way}") for name, case in chosen.items() for way in case.ways]
    metafunc.parametrize(("case", "way"), pairs)


def test_creation(benchmark, device, quick, case, way):
    for package in filter(None, (case.requires, WAYS[way].requires)):
        if not peers.importable(package):
            pytest.skip(f"{package} is not installed")
    create = sections.prepared_way(way, device)
    build = case.builder(way)
    parameters = sum(parameter.numel() for parameter in create(build)[0].parameters())  # imports what the model needs

    def setup():
        if case.cache != "warm":
            sections.clean_up(device)
        warm_host(way, parameters, device, sections.BF16)

    def run():
        create(build)
        measure.synchronize(device)

    benchmark.group = f"{case.name}, {case.cache or device.type}"
    benchmark.pedantic(run, setup=setup, rounds=1 if quick or way == "naive" else 5)
    benchmark.extra_info.update(way=way, parameters=parameters)

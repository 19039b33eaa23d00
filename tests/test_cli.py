"""The commands of `python -m fastinit`, run for real on small models."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastinit
from fastinit.__main__ import main
from fastinit.cli import bench, demo, doctor, text
from fastinit.cli.models import LLAMA_7B, Decoder, DecoderConfig, GPT2Medium, training_step

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # where the processes that demo starts find fastinit, installed or not


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "fastinit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"torch-fastinit {fastinit.__version__}\n"


def test_no_command_is_an_error_that_lists_them(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "doctor|demo|bench" in capsys.readouterr().err


# doctor


def test_doctor_tells_build_machine_and_passed_checks(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert fastinit.__version__ in output and torch.__version__ in output
    assert all(f"ok     cpu, {isa}: same bits" in output for isa in fastinit.native.cpu_isas())
    assert "FAILED" not in output


def test_doctor_prints_json(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fastinit"] == fastinit.__version__
    assert report["build"] == fastinit.native.build_info()
    assert [check["passed"] for check in report["checks"]] == [True] * len(report["checks"])


def test_doctor_fails_when_a_fill_does(capsys, monkeypatch):
    def wrong(tensor, isa):
        return tensor.fill_(isa == "portable")

    monkeypatch.setattr(doctor, "run_normal", wrong)
    monkeypatch.setattr(doctor.native, "cpu_isas", lambda: ["avx2", "portable"])
    assert main(["doctor"]) == 1
    assert "FAILED cpu, avx2: bits differ" in capsys.readouterr().out


MACHINE = {
    "driver": "580.1",
    "torch": "2.13.0+cpu",
    "huge_pages": "always",
    "packages": dict.fromkeys(doctor.PACKAGES, "1.0"),
    "gpus": [],
    "build": {"cuda": True, "cuda_architectures": ["80", "90"]},
}
GPU = {"name": "GPU X", "architecture": 75, "memory": 2**34}


@pytest.mark.parametrize(
    ("difference", "remedy"),
    [
        ({}, "install a CUDA build of torch"),
        ({"gpus": [GPU], "build": {"cuda": False}}, "FASTINIT_CUDA=1"),
        ({"gpus": [GPU]}, "FASTINIT_CUDA_ARCHS=75"),
        ({"driver": None, "huge_pages": "never"}, "transparent_hugepage"),
        ({"driver": None, "packages": {**MACHINE["packages"], "tqdm": None}}, "tqdm is not installed"),
    ],
)
def test_doctor_names_a_remedy_for_what_is_missing(difference, remedy):
    (sentence,) = doctor.advice({**MACHINE, **difference})
    assert remedy in sentence


def test_doctor_has_no_advice_for_a_complete_machine():
    assert doctor.advice({**MACHINE, "gpus": [{**GPU, "architecture": 89}, {**GPU, "architecture": 120}]}) == []


@pytest.mark.parametrize(
    ("architecture", "compiled", "runs"),
    [(90, [80, 90], True), (89, [80, 90], True), (100, [80, 90], True), (75, [80, 90], False), (86, [89, 90], False)],
)
def test_doctor_knows_which_gpus_a_build_reaches(architecture, compiled, runs):
    assert doctor.runs_on(architecture, compiled) is runs


# demo


def test_demo_creates_the_model_in_each_way_and_trains_it(capsys, tmp_path):
    file = tmp_path / "demo.json"
    assert main(["demo", "--params", "2M", "--device", "cpu", "--json", str(file)]) == 0
    output = capsys.readouterr().out
    assert "fastinit.on(device, dtype)" in output and "torch.device + default dtype" in output
    ways = json.loads(file.read_text())["ways"]
    assert set(ways) == {"fastinit", "torch", "naive"}
    assert len({way["parameters"] for way in ways.values()}) == 1
    assert len({way["tensor_bytes"] for way in ways.values()} - {ways["naive"]["tensor_bytes"]}) == 1
    assert all(way["seconds"] > 0 for way in ways.values())
    # An untrained model is about as good as guessing among the 1000 words of the small vocabulary.
    assert abs(ways["fastinit"]["loss"] - math.log(1000)) < 2


def test_demo_reports_a_way_that_failed(capsys):
    assert main(["demo", "--params", "2M", "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err


@pytest.mark.parametrize("params", ["many", "-5", "0", "nan", ""])
def test_demo_refuses_a_bad_number_of_parameters(capsys, params):
    assert main(["demo", f"--params={params}", "--device", "cpu"]) == 2
    assert "is not a number of parameters" in capsys.readouterr().err


def test_demo_scales_the_model_down_when_memory_is_short(monkeypatch):
    monkeypatch.setattr(demo.machines, "available_memory", lambda: 2**30)
    config, wanted = demo.choose_config(None, "cpu", "bf16")
    assert wanted == demo.PARAMETERS
    assert 0.5 * 2**30 / 4 < config.parameters < 2**30 / 4
    monkeypatch.setattr(demo.machines, "available_memory", lambda: 2**40)
    config, wanted = demo.choose_config(None, "cpu", "bf16")
    assert wanted is None and abs(config.parameters / demo.PARAMETERS - 1) < 0.1


def test_demo_gives_the_naive_way_a_part_of_the_layers_and_says_so(monkeypatch):
    monkeypatch.setattr(demo.machines, "available_memory", lambda: 12 * 2**30)
    part = demo.naive_part(LLAMA_7B)
    assert 1 <= part.layers < LLAMA_7B.layers and part.parameters <= demo.NAIVE_PARAMETERS
    whole = {"seconds": 1.0, "host_growth": 100, "tensor_bytes": 100, "scale": 1.0, "layers": 32, "loss": 1.0}
    naive = {**whole, "layers": part.layers, "scale": 4.0}
    table = demo.comparison({"fastinit": whole, "torch": whole, "naive": naive}, LLAMA_7B, "cpu")
    assert "~4 s" in table and f"{part.layers} of 32 layers" in table


# bench


def test_bench_writes_results_and_plot(capsys, tmp_path):
    assert main(["bench", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "torch / fastinit" in output and "GPT-2 medium, torch.nn" in output
    results = json.loads((tmp_path / "bench-cpu.json").read_text())
    assert {"cpu", "driver", "torch", "fastinit", "git_commit"} <= results["machine"].keys()
    kernels = {(record["distribution"], record["dtype"]) for record in results["kernels"]}
    assert len(kernels) == 9
    assert all(len(times) == 3 for record in results["kernels"] for times in record["seconds"].values())
    assert all(record["ratio"] > 0 for record in results["models"] if "missing" not in record)
    if fastinit.cli.machine.installed("matplotlib"):
        assert (tmp_path / "bench-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_bench_reports_a_missing_library_as_missing(monkeypatch, capsys):
    monkeypatch.setattr(bench, "importable", lambda name: False)
    cases = [case for case in bench.model_cases(torch.device("cpu"), quick=True) if case.requires == "transformers"]
    monkeypatch.setattr(bench, "model_cases", lambda device, quick: cases)
    records = bench.measure_models(torch.device("cpu"), quick=True)
    assert records == [{"model": "GPT-2 medium, transformers", "cache": None, "missing": "transformers"}]
    assert "transformers is not installed" in bench.model_table(records)


# what they share


def test_named_model_sizes_are_right():
    with torch.device("meta"):
        llama, gpt2 = Decoder(LLAMA_7B), GPT2Medium()
    assert sum(parameter.numel() for parameter in llama.parameters()) == LLAMA_7B.parameters == 6_738_415_616
    assert len(list(llama.parameters())) == 291
    assert sum(parameter.numel() for parameter in gpt2.parameters()) == 354_823_168


@pytest.mark.parametrize("wanted", [1_000_000, 20_000_000, 350_000_000, 1_300_000_000, 6_700_000_000])
def test_decoder_comes_near_the_number_of_parameters_asked_for(wanted):
    config = DecoderConfig.of_size(wanted)
    assert abs(config.parameters / wanted - 1) < 0.25
    assert config.at_most(wanted / 2).parameters <= wanted / 2 or config.at_most(wanted / 2).layers == 1


def test_models_of_the_benchmark_learn():
    for build in (lambda: Decoder(DecoderConfig.of_size(1_000_000)), lambda: GPT2Medium(layers=1)):
        with fastinit.on("cpu", "fp32", seed=0):
            model = build()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        assert math.isfinite(training_step(model, 1000, torch.device("cpu")))
        assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("written", "number"), [("1.3B", 1_300_000_000), ("350m", 350_000_000), ("5e6", 5_000_000)])
def test_numbers_of_parameters_are_read_as_people_write_them(written, number):
    assert text.parse_count(written) == number


def test_tables_align_columns():
    assert text.table(["a", "bb"], [["x", "1"], ["yyy", "22"]]) == "a    bb\n---  --\nx     1\nyyy  22"

"""The commands of `python -m fastinit`, run for real on small models."""

import base64
import concurrent.futures
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastinit
from fastinit.__main__ import main
from fastinit.cli import bench, demo, doctor, inspect, machine, measure, results, text
from fastinit.cli.models import LLAMA_7B, LLAMA_70B, Decoder, DecoderConfig, training_step
from fastinit.cli.workloads import FILLS, WAYS, linears, timed_creation

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # where the processes that demo starts find fastinit, installed or not


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "fastinit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"torch-fastinit {fastinit.__version__}\n"


def test_no_command_is_an_error_that_lists_them(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "doctor|demo|inspect|bench" in capsys.readouterr().err


# inspect


def test_inspect_tells_of_a_model_that_memory_is_too_short_for(capsys, tmp_path, monkeypatch):
    (tmp_path / "huge_models.py").write_text(
        "from torch import nn\n"
        "def huge():\n"
        "    model = nn.Sequential(*[nn.Linear(1 << 20, 1 << 20) for _ in range(4)], nn.Linear(8, 8))\n"
        "    nn.init.orthogonal_(model[4].weight)\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "huge_models:huge", "--dtype", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert "4,398,050,705,480 parameters" in printed and "computed" in printed
    assert main(["inspect", "huge_models:huge", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"][0]["source"] == "random"


def test_inspect_samples_what_the_model_will_have(tmp_path):
    with fastinit.on("cpu", "fp32", seed=0, shard=True) as report:
        model = torch.nn.ModuleList(
            [torch.nn.Linear(1500, 1000), torch.nn.Embedding(8, 4, 0), torch.nn.Linear(8, 8), torch.nn.LayerNorm(2)]
        )
        torch.nn.init.orthogonal_(model[2].weight)
        torch.nn.init.normal_(model[0].weight[500:], std=3.0)
    sampled = inspect.sampled_stds(model)
    inspect.plot(report.tensors, sampled, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    fastinit.materialize(model)
    assert list(sampled) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert sampled[name] == pytest.approx(parameter.std(correction=0).item(), rel=2e-3), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models", "write it as package.module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("torch.nn:no_such_function", "has no attribute 'no_such_function'"),
        ("math:pi", "is float and no function"),
        ("json:loads", "cannot be called as loads(): missing a required argument: 's'; name what takes no arguments"),
        ("torch.nn:Identity.__doc__.strip", "returned str; it has to return a torch.nn.Module"),
    ],
)
def test_inspect_refuses_what_gives_no_model(name, message, capsys):
    assert main(["inspect", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


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
    "build": {"cuda": True, "cuda_version": "13.0.88", "cuda_architectures": ["80", "90"]},
}
GPU = {"name": "GPU X", "architecture": 75, "memory": 2**34}


@pytest.mark.parametrize(
    ("difference", "remedy"),
    [
        ({}, "install a CUDA build of torch"),
        ({"gpus": [GPU], "build": {"cuda": False}}, "FASTINIT_CUDA=1"),
        ({"gpus": [GPU]}, "FASTINIT_CUDA_ARCHS=75"),
        (
            {"driver": "570.86.15", "gpus": [{**GPU, "architecture": 90}]},
            "CUDA 13.0.88 of this build, which needs 580 or newer",
        ),
        ({"driver": None, "huge_pages": "never"}, "transparent_hugepage"),
        ({"driver": None, "packages": {**MACHINE["packages"], "rich": None}}, "rich is not installed"),
    ],
)
def test_doctor_names_a_remedy_for_what_is_missing(difference, remedy):
    (sentence,) = doctor.advice({**MACHINE, **difference})
    assert remedy in sentence


def test_doctor_has_no_advice_for_a_complete_machine():
    assert doctor.advice({**MACHINE, "gpus": [{**GPU, "architecture": 89}, {**GPU, "architecture": 120}]}) == []


def test_doctor_notices_files_that_another_distribution_has_written(tmp_path, monkeypatch):
    (tmp_path / "sample").mkdir()
    record = ["sample-1.0.dist-info/METADATA,,", "sample-1.0.dist-info/RECORD,,"]
    for name in ("one", "two"):
        path = tmp_path / "sample" / f"{name}.py"
        path.write_text(name)
        digest = base64.urlsafe_b64encode(hashlib.sha256(name.encode()).digest()).decode().rstrip("=")
        record.append(f"sample/{name}.py,sha256={digest},3")
    (tmp_path / "sample-1.0.dist-info").mkdir()
    (tmp_path / "sample-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
    (tmp_path / "sample-1.0.dist-info" / "RECORD").write_text("\n".join(record) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.replaced_files("sample") == []
    (tmp_path / "sample" / "two.py").write_text("of another project")
    (sentence,) = doctor.replaced_files("sample")
    assert sentence.startswith("sample/two.py: not as sample installed it") and "pip uninstall fastinit" in sentence
    assert doctor.replaced_files("no-such-distribution") == []


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


def test_demo_gives_the_naive_way_a_part_of_the_layers_and_says_so(capsys, monkeypatch):
    monkeypatch.setattr(demo.machines, "available_memory", lambda: 12 * 2**30)
    part = demo.naive_part(LLAMA_7B)
    assert 1 <= part.layers < LLAMA_7B.layers and part.parameters <= demo.NAIVE_PARAMETERS
    whole = {"seconds": 1.0, "host_growth": 100, "tensor_bytes": 100, "scale": 1.0, "layers": 32, "loss": 1.0}
    naive = {**whole, "layers": part.layers, "scale": 4.0}
    demo.show_comparison({"fastinit": whole, "torch": whole, "naive": naive}, LLAMA_7B, "cpu")
    table = capsys.readouterr().out
    assert "~4 s" in table and f"{part.layers} of 32 layers" in table


# bench


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_device_that_there_is_not_is_refused_in_one_sentence(command, capsys):
    assert main([command, "--device", "gpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m fastinit {command}: fastinit.on: device='gpu' is not a device of torch; use")


def test_a_model_that_does_not_fit_is_refused_before_anything_is_created(capsys, monkeypatch):
    monkeypatch.setattr(demo.machines, "available_memory", lambda: 4 << 30)
    assert main(["demo", "--params", "100B", "--device", "cpu"]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert "--params 100B: with its gradients such a model takes 371." in line and "cpu has 4 GiB free" in line
    assert output.out == ""
    assert demo.choose_config("1B", "cpu", "bf16")[0].parameters < 2**30


def test_bench_writes_results_and_plot(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FILLS", {"normal": bench.FILLS["normal"]})
    assert main(["bench", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "normal bf16, 1 thread" in output and "Llama-shaped, 350M" in output and "allocation" in output
    document = json.loads((tmp_path / "bench-cpu.json").read_text())
    assert {"cpu", "driver", "torch", "fastinit", "git_commit"} <= document["machine_info"]["fastinit"].keys()
    measured = results.read(document)
    ways = {suite: {each.way for each in measured if each.suite == suite} for suite in ("fills", "creation in bf16")}
    assert ways == {"fills": {"fastinit", "torch"}, "creation in bf16": {"fastinit", "torch", "naive"}}
    assert all(len(each.seconds) == (3 if each.suite == "fills" else 1) for each in measured)
    assert not any(each.info.get("wrong") for each in measured)
    if machine.installed("matplotlib"):
        assert (tmp_path / "bench-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_without_rich_the_remedy_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    for name in [name for name in sys.modules if name.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    for use in (lambda: text.show_table(["a"], [["b"]]), lambda: text.progress(["a"], "before anything is measured")):
        with pytest.raises(RuntimeError, match=re.escape("pip install 'torch-fastinit[demo]'")):
            use()


DOCUMENT = {
    "benchmarks": [
        results.entry("fills", "normal", "fastinit", [2.0, 1.0, 3.0], elements=4e9),
        results.entry("fills", "normal", "torch", [4.0, 4.0], elements=2e9, wrong=True),
        results.entry("creation", "small", "fastinit", [0.5], beyond=2048, parts={"python": 0.25}),
        results.entry("creation", "small", "naive", [0.5], scale=8.0, bytes=1e9),
    ],
    "absent": [{"suite": "fills", "case": "normal", "way": "cuRAND", "reason": "missing: cupy is not installed"}],
}


def test_tables_compare_ways_and_name_who_is_missing():
    fills, creation, parts = results.tables(results.read(DOCUMENT))
    assert fills.header == ["", "fastinit", "torch"]
    # A rate with half of the range between the quartiles; for each element torch took four times as long.
    assert fills.rows == [["normal", "2 G/s ±25%", "0.5 G/s ±0%! (4.00x)"]]
    assert fills.notes[0].startswith("! torch, normal") and fills.notes[1] == "cuRAND: missing: cupy is not installed"
    assert creation.rows == [["small", "500 ms", "~4 s, 0.25 GB/s (8.00x)"]]
    assert parts.rows == [["creation: small, fastinit", "250 ms", "2 KiB"]]
    assert creation.markdown().splitlines()[2] == "| small | 500 ms | ~4 s, 0.25 GB/s (8.00x) |"


def test_tables_are_shown_whole(capsys):
    results.tables(results.read(DOCUMENT))[0].show()
    output = capsys.readouterr().out
    assert "0.5 G/s ±0%! (4.00x)" in output and "cupy is not installed" in output


def test_values_that_were_not_asked_for_are_noticed():
    normal = FILLS["normal"]
    values = fastinit.fill_(torch.empty(2**16), normal.ours, seed=1)
    assert normal.are_right(values)
    assert not normal.are_right(values * 1.1) and not normal.are_right(values + 0.01)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_creates_an_initialized_model(way):
    cpu = torch.device("cpu")
    model, created = timed_creation(WAYS[way].prepare(cpu, torch.bfloat16), linears(4), cpu)
    assert created.parameters == 4 * 64 * 65 and created.tensor_bytes == 2 * created.parameters
    assert bool(created.parts) == (way == "fastinit") and sum(created.parts.values()) <= created.seconds
    for linear in model:
        assert linear.weight.dtype == torch.bfloat16
        # U(-1/8, 1/8), from `kaiming_uniform_` on 64 inputs
        assert 0.06 < linear.weight.float().std() < 0.085 and linear.weight.abs().max() <= 0.125


def square(x):
    return x * x


def test_new_processes_return_what_a_function_does_and_raise_what_it_raises():
    assert measure.in_new_processes(square, [(2,), (3,)]) == [4, 9]
    with pytest.raises(ValueError, match="math domain error"):
        measure.in_new_process(math.sqrt, -1.0)


def test_a_new_process_that_ends_or_hangs_is_an_error():
    with pytest.raises(concurrent.futures.process.BrokenProcessPool):
        measure.in_new_process(os._exit, 1)
    with pytest.raises(TimeoutError, match="sleep was not done after 1 s"):
        measure.in_new_process(time.sleep, 600, timeout=1.0)


def first_rank_fails(device):
    if torch.distributed.get_rank() == 0:
        raise ValueError("as it is to")
    torch.distributed.barrier()


def test_a_rank_that_fails_ends_the_wait_of_the_others():
    with pytest.raises(ValueError, match="as it is to"):
        measure.on_ranks(first_rank_fails, 2, "cpu", timeout=300.0)


# what they share


def test_named_model_sizes_are_right():
    with torch.device("meta"):
        llama, large = Decoder(LLAMA_7B), Decoder(LLAMA_70B)
    assert sum(parameter.numel() for parameter in llama.parameters()) == LLAMA_7B.parameters == 6_738_415_616
    assert len(list(llama.parameters())) == 291
    assert sum(parameter.numel() for parameter in large.parameters()) == LLAMA_70B.parameters == 68_976_648_192
    assert len(list(large.parameters())) == 723


@pytest.mark.parametrize("wanted", [1_000_000, 20_000_000, 350_000_000, 1_300_000_000, 6_700_000_000])
def test_decoder_comes_near_the_number_of_parameters_asked_for(wanted):
    config = DecoderConfig.of_size(wanted)
    assert abs(config.parameters / wanted - 1) < 0.25
    assert config.at_most(wanted / 2).parameters <= wanted / 2 or config.at_most(wanted / 2).layers == 1


def test_models_of_the_benchmark_learn():
    shared_keys = replace(DecoderConfig.of_size(1_000_000), heads=4, key_value_heads=2)
    for build in (
        lambda: Decoder(DecoderConfig.of_size(1_000_000)),
        lambda: Decoder(shared_keys),
    ):
        with fastinit.on("cpu", "fp32", seed=0):
            model = build()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        assert math.isfinite(training_step(model, 1000, torch.device("cpu")))
        assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("written", "number"), [("1.3B", 1_300_000_000), ("350m", 350_000_000), ("5e6", 5_000_000)])
def test_numbers_of_parameters_are_read_as_people_write_them(written, number):
    assert text.parse_count(written) == number

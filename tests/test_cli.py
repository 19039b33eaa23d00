"""The commands of `python -m fastinit`, run for real on small models."""

import base64
import hashlib
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastinit
from fastinit.__main__ import main
from fastinit.cli import bench, demo, doctor, figures, machine, measure, peers, sections, tables, text
from fastinit.cli.models import LLAMA_7B, LLAMA_70B, Decoder, DecoderConfig, GPT2Medium, training_step
from fastinit.cli.sections import Settings
from fastinit.cli.ways import WAYS
from fastinit.cli.worker import Worker
from fastinit.cli.workloads import Case, linears, llama

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
        ({"driver": None, "packages": {**MACHINE["packages"], "tqdm": None}}, "tqdm is not installed"),
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


def test_demo_gives_the_naive_way_a_part_of_the_layers_and_says_so(monkeypatch):
    monkeypatch.setattr(demo.machines, "available_memory", lambda: 12 * 2**30)
    part = demo.naive_part(LLAMA_7B)
    assert 1 <= part.layers < LLAMA_7B.layers and part.parameters <= demo.NAIVE_PARAMETERS
    whole = {"seconds": 1.0, "host_growth": 100, "tensor_bytes": 100, "scale": 1.0, "layers": 32, "loss": 1.0}
    naive = {**whole, "layers": part.layers, "scale": 4.0}
    table = demo.comparison({"fastinit": whole, "torch": whole, "naive": naive}, LLAMA_7B, "cpu")
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


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "No such file"), ("no JSON", "Expecting value"), ("[1]", "these are no results")]
)
def test_a_file_without_results_is_no_plot(content, complaint, tmp_path, capsys):
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    assert main(["bench", "--plot", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m fastinit bench: --plot {file}: ") and complaint in line
    assert line.endswith("pass a JSON file that bench has written")


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


QUICK = Settings("cpu", quick=True, peers=True)
CPU = torch.device("cpu")


def test_bench_reports_a_missing_library_as_missing(monkeypatch):
    monkeypatch.setattr(peers, "importable", lambda name: False)
    case = Case("Llama, transformers", llama(LLAMA_7B, "transformers"), ("fastinit", "torch"), requires="transformers")
    records = sections.records_of(case, CPU, repeats=1)
    assert records == [{"device": "cpu", "model": case.name, "cache": None, "missing": "transformers"}]
    assert "transformers is not installed" in tables.model_table(records)


def test_bench_reports_missing_ways_and_failing_ones_beside_the_others(monkeypatch):
    monkeypatch.setattr(peers, "importable", lambda name: name != "lightning")

    def breaks(device, dtype):
        raise OSError("out of order")

    monkeypatch.setitem(WAYS, "naive", WAYS["naive"].__class__("breaks", breaks))
    case = Case("small", linears(2), ("fastinit", "torch", "fabric", "naive", "transformers"))
    records = {record["way"]: record for record in sections.records_of(case, CPU, repeats=2)}
    assert len(records["fastinit"]["seconds"]) == len(records["torch"]["seconds"]) == 2
    assert records["torch"]["ratio"] > 0
    assert records["fabric"]["missing"] == "lightning"
    assert "out of order" in records["naive"]["error"]
    assert records["transformers"]["unsupported"] == "creates models of transformers alone"
    table = tables.model_table(list(records.values()))
    assert "fabric: lightning is not installed" in table and "naive: failed: OSError: out of order" in table


@pytest.fixture
def few_fills(monkeypatch):
    monkeypatch.setattr(sections, "elements_to_fill", lambda settings: 2**14)
    monkeypatch.setattr(sections, "FILLS", {"normal": sections.FILLS["normal"]})


def test_bench_compares_fills_with_peers_and_names_those_that_are_missing(few_fills, monkeypatch):
    monkeypatch.setattr(peers, "importable", lambda name: name == "numpy")
    records = list(sections.measure_kernels(QUICK))
    (one_thread,) = (each for each in records if each["dtype"] == "fp32" and each["threads"] == 1)
    assert set(one_thread["seconds"]) == {"fastinit", "torch", "NumPy"}
    assert set(one_thread["absent"]) == {"JAX threefry", "JAX rbg"}
    assert one_thread["absent"]["JAX rbg"] == {"missing": "jax"}
    for name in one_thread["seconds"]:
        assert sections.values_are_right(one_thread, name)
    (half,) = (each for each in records if each["dtype"] == "bf16" and each["threads"] == 1)
    assert "fp32 and fp64 alone" in half["absent"]["NumPy"]["unsupported"]
    table = tables.kernel_table(records)
    assert "JAX rbg: jax is not installed" in table and "NumPy / fastinit" in table
    results = {"machine": machine.describe(), "settings": {"device": "cpu"}, "kernels": records}
    (row,) = (line for line in tables.markdown(results).splitlines() if "normal fp32, 1 thread |" in line)
    assert row.split(" | ")[-3:-1] == ["missing", "missing"]


def test_bench_keeps_the_other_times_when_a_peer_fails(few_fills, monkeypatch):
    def prepare(distribution, tensor, threads):
        def run():
            raise RuntimeError("launch failed")

        return peers.Running(run, lambda: tensor)

    monkeypatch.setitem(peers.PEERS, "NumPy", peers.Peer(prepare, devices=("cpu",)))
    for record in sections.measure_kernels(QUICK):
        assert record["absent"]["NumPy"] == {"error": "RuntimeError: launch failed"}
        assert record["ratio"] > 0
    assert "NumPy: failed: RuntimeError: launch failed" in tables.kernel_table([record])


def test_bench_marks_a_peer_whose_values_are_wrong(few_fills):
    record = next(sections.measure_kernels(QUICK))
    assert "!" not in tables.kernel_table([record])
    record["values"]["torch"]["std"] *= 4.5
    assert "! torch's normal fp32 has mean" in tables.kernel_table([record])


@pytest.mark.parametrize("way", WAYS)
def test_each_way_creates_an_initialised_model(way):
    if WAYS[way].requires is not None:
        pytest.importorskip(WAYS[way].requires)
    if way == "transformers":
        pytest.skip("creates models of transformers alone: see the next test")
    model, report = WAYS[way].prepare(CPU, torch.bfloat16)(linears(4))
    assert (report is not None) == way.startswith("fastinit")
    dtype = torch.float32 if way in ("plain", "fastinit fp32", "torch fp32") else torch.bfloat16
    for linear in model:
        assert linear.weight.dtype == dtype and linear.weight.device == CPU
        # U(-1/8, 1/8), from `kaiming_uniform_` on 64 inputs
        assert 0.06 < linear.weight.float().std() < 0.085 and linear.weight.abs().max() <= 0.125


@pytest.mark.parametrize("way", ["fastinit", "torch", "fabric", "accelerate", "transformers"])
def test_each_way_creates_an_initialised_model_of_transformers(way):
    pytest.importorskip("transformers")
    if WAYS[way].requires is not None:
        pytest.importorskip(WAYS[way].requires)
    build = llama(DecoderConfig(vocabulary=64, width=64, layers=1, heads=1, hidden=64), "transformers")
    model, _ = WAYS[way].prepare(CPU, torch.bfloat16)(build)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.device == CPU
        if "norm" in name:
            assert parameter.eq(1).all()
        else:
            assert 0.018 < parameter.float().std() < 0.022


def test_a_new_process_creates_and_says_why_it_could_not():
    config = DecoderConfig(vocabulary=64, width=64, layers=1, heads=1, hidden=64)
    workers = [Worker("fastinit", config, device, "bf16") for device in ("cpu", "cuda:99")]
    for worker in workers:
        worker.wait_until_ready()
    assert workers[0].create()["parameters"] == config.parameters
    with pytest.raises(RuntimeError, match=r"fastinit way failed.*\n(.|\n)*cuda:99"):
        workers[1].create()


def test_full_suite_runs_sections_apart_and_saves_what_each_measured(capsys, monkeypatch, tmp_path):
    nowhere = Settings("cuda:99", quick=True)
    monkeypatch.setattr(bench, "plan", lambda settings: [("layouts", settings), ("models", nowhere), ("ranks", QUICK)])
    assert main(["bench", "--suite", "full", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "full-cpu.json").read_text())
    first, failed, last = results["sections"]
    assert "error" not in first and "error" not in last
    assert "exit status 1" in failed["error"] and results["models"] == []
    assert {each["layout"] for each in results["layouts"]} == {"50 fills of 4,096", "rectangle, rows of 1 KiB"}
    assert [record["ranks"] for record in results["ranks"]] == [1, 2, 4, 8]
    sizes = [record["local_bytes"] for record in results["ranks"]]
    assert all(whole / 2.2 < half < whole / 1.8 for whole, half in itertools.pairwise(sizes))
    assert {"jax", "lightning", "triton"} <= results["machine"]["peers"].keys()
    output = capsys.readouterr().out
    assert "30B on one GPU: seconds" in output and "not measured" in output and "exit status 1" in output
    assert (tmp_path / "full-cpu.md").read_text().startswith(machine.cpu_name())
    if machine.installed("matplotlib"):
        assert (tmp_path / "full-cpu.png").read_bytes().startswith(b"\x89PNG")
    # The tables once more, from the file alone.
    assert main(["bench", "--plot", str(tmp_path / "full-cpu.json")]) == 0
    assert "rectangle, rows of 1 KiB" in capsys.readouterr().out


def test_the_committed_results_give_their_tables_and_plot_again(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    kept = ROOT / "benchmarks" / "results" / "h200" / "full-cuda.json"
    file = tmp_path / kept.name
    file.write_bytes(kept.read_bytes())
    assert main(["bench", "--plot", str(file)]) == 0
    output = capsys.readouterr().out
    assert "Growth of a Llama-shaped model in bf16" in output and "10,000 fills of 4,096" in output
    assert "NVIDIA H200" in file.with_suffix(".md").read_text()
    pictures = {picture.name for picture in tmp_path.glob("*.png")}
    assert "full-cuda.png" in pictures and all(f"Plot: {tmp_path / name}" in output for name in pictures)


def test_full_suite_starts_no_section_after_its_time(tmp_path):
    results = {"sections": []}
    bench.run_apart([("layouts", QUICK)], results, tmp_path / "full.json", time_limit=0.0)
    assert "not started" in results["sections"][0]["error"]
    assert json.loads((tmp_path / "full.json").read_text()) == results


def test_figures_are_held_against_their_goals():
    def kernel(dtype, distribution, rate, **others):
        seconds = {"fastinit": [1.0 / rate], **{name: [1.0 / other] for name, other in others.items()}}
        ratio = rate / others["torch"]
        return {
            "device": "cuda", "dtype": dtype, "distribution": distribution, "threads": None, "elements": 1,
            "seconds": seconds, "ratio": ratio,
        }  # fmt: skip

    results = {
        "machine": {"cpu_isa": "avx512"},
        "settings": {"suite": "full"},
        "kernels": [
            kernel("fp32", "constant", 9.0, torch=10.0),
            kernel("fp32", "uniform", 8.0, torch=4.0),
            kernel("bf16", "normal", 5.0, torch=2.0),
        ],
    }
    kept = {figure.name: (figure.value, figure.kept) for figure in figures.of(results)}
    assert kept["GPU normal bf16: torch / fastinit"] == (2.5, True)
    assert kept["GPU uniform fp32: rate / fastest write of a constant"] == (0.8, False)
    assert kept["30B on one GPU: seconds"] == (None, None)


def test_pytest_benchmark_suite_measures_the_same_workloads(tmp_path):
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "benchmarks.json"
    chosen = "(test_fill and normal and fp32 and not truncated) or (test_creation and Linear)"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--quick",
        "--device",
        "cpu",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*command, f"--benchmark-json={file}", "-k", chosen], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "\nmissing: " in done.stdout
    results = json.loads(file.read_text())
    measured = {
        benchmark["extra_info"].get("peer") or benchmark["extra_info"]["way"] for benchmark in results["benchmarks"]
    }
    assert {"fastinit", "torch", "NumPy", "plain"} <= measured
    assert results["machine_info"]["fastinit"]["fastinit"] == fastinit.__version__


def test_reports_are_split_by_the_parts_of_their_time():
    report = WAYS["fastinit"].prepare(CPU, torch.bfloat16)(linears(1))[1]
    parts = measure.split_of(report)
    assert all(name.startswith("seconds_") and value >= 0 for name, value in parts.items())


# what they share


def test_named_model_sizes_are_right():
    with torch.device("meta"):
        llama, large, gpt2 = Decoder(LLAMA_7B), Decoder(LLAMA_70B), GPT2Medium()
    assert sum(parameter.numel() for parameter in llama.parameters()) == LLAMA_7B.parameters == 6_738_415_616
    assert len(list(llama.parameters())) == 291
    assert sum(parameter.numel() for parameter in large.parameters()) == LLAMA_70B.parameters == 68_976_648_192
    assert len(list(large.parameters())) == 723
    assert sum(parameter.numel() for parameter in gpt2.parameters()) == 354_823_168


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
        lambda: GPT2Medium(layers=1),
    ):
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

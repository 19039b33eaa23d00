"""The harness in benchmarks/: suites run on small models, and what is wrong or missing is found and said."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ranks import on_every_rank

import fastinit
from fastinit.cli import results

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # its modules find each other there, as under pytest

import bench_sharded as sharded  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402

CPU = torch.device("cpu")
SMALL = sharded.DecoderConfig(vocabulary=64, width=64, layers=1, heads=4, hidden=64, key_value_heads=2)


def run(*arguments):
    """Run suites quickly on the CPU; what was shown."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *"-m pytest benchmarks -q --quick --device cpu -p no:cacheprovider".split()]
    done = subprocess.run([*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    pytest.importorskip("pytest_benchmark")
    file = tmp_path_factory.mktemp("benchmarks") / "benchmarks.json"
    chosen = (
        "(test_fill and normal and fp32 and one and not truncated) or (layout and bf16) or rows or (small and Linear)"
    )
    run("-k", chosen, f"--benchmark-json={file}")
    return json.loads(file.read_text())


def test_suites_measure_what_their_tables_name(document):
    measured = results.read(document)
    assert {each.suite for each in measured} == {"fills", "layouts", "creation", "sharded"}
    assert all(each.seconds and min(each.seconds) > 0 for each in measured if "reason" not in each.info)
    fills = {each.way: each for each in measured if each.suite == "fills"}
    assert set(peers.PEERS) - set(fills) == {"cuRAND", "Triton"}  # which a CPU does not have
    assert not any(each.info.get("wrong") for each in fills.values())
    assert {each.way for each in measured if each.suite == "creation"} == {
        "fastinit", "torch", "fastinit fp32", "torch fp32", "plain fp32",
    }  # fmt: skip
    sizes = [each.info["parts"] for each in measured if each.suite == "sharded"]
    assert len(sizes) == 4 and all({"constructor", "materialize", "of it fills"} <= set(each) for each in sizes)


def test_results_name_machine_commit_and_versions(document):
    about = document["machine_info"]["fastinit"]
    assert about["fastinit"] == fastinit.__version__ and about["torch"] == torch.__version__
    assert {"cpu", "driver", "git_commit"} <= about.keys()
    assert {"jax", "lightning", "triton"} <= document["machine_info"]["packages"].keys()
    assert str(about["git_commit"])[:9] in report.about(document)


def test_nothing_starts_after_the_time_limit():
    pytest.importorskip("pytest_benchmark")
    shown = run("--time-limit", "0", "-k", "layout and bf16")
    assert "not started: the time limit of 0 s was reached" in shown and "11 skipped" in shown


@pytest.mark.slow  # processes that import torch, transformers, Lightning and DeepSpeed, by the dozen
def test_every_suite_runs(tmp_path):
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "benchmarks.json"
    run(f"--benchmark-json={file}")
    measured = results.read(json.loads(file.read_text()))
    assert {each.suite for each in measured} == set(
        "fills first contexts creation layouts growth frameworks sharded loading readers statistics".split()
    )
    assert not [each for each in measured if str(each.info.get("reason", "")).startswith("failed")]
    if find_spec("matplotlib") is not None:
        subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", file], check=True)
        assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


# report


def measured(suite, case, way, seconds, **info):
    return results.entry(suite, case, way, [seconds], **info)


def test_goals_are_held_against_what_was_measured():
    document = {
        "benchmarks": [
            measured("fills", "normal bf16, cuda", "fastinit", 1.0, elements=10),
            measured("fills", "normal bf16, cuda", "torch", 3.0, elements=10),
            measured("layouts", "many at once, cuda", "fp32", 4.0, elements=10),
            measured("layouts", "one of as many elements, cuda", "fp32", 1.0, elements=10),
        ]
    }
    rows = {row[0]: row[1:] for row in report.goals_table(results.read(document)).rows}
    assert rows["normal bf16, cuda: torch / fastinit"] == ["3", ">= 2.1", "yes"]
    assert rows["10,000 fills of 4,096, fp32, cuda: time / one fill's"] == ["4", "<= 3", "no"]
    assert rows["normal fp32, cuda: torch / fastinit"] == ["not measured", ">= 1.9", ""]


def test_memory_beyond_a_ranks_own_has_a_limit():
    document = {"benchmarks": [measured("sharded", "a", "fastinit", 1.0, beyond=(64 << 20) + 1)]}
    assert report.beyond_table(results.read(document)).rows == [["a", "64 MiB", "no"]]


def test_the_readme_gets_the_table_of_a_run(tmp_path, monkeypatch):
    case, fill = "Llama-shaped, 6.74B, torch.nn, cuda", "normal bf16, cuda"
    document = {
        "datetime": "2026-01-02T03:04:05",
        "machine_info": {"fastinit": {
            "cpu": "X", "cpu_isa": "avx2", "torch_threads": 2, "gpus": [], "torch": "2.11", "fastinit": "0.1",
            "git_commit": "0123456789abcdef", "driver": "580",
        }},
        "benchmarks": [
            measured("first", case, "fastinit", 1.0), measured("fills", fill, "fastinit", 1.0, elements=1e9),
        ],
    }  # fmt: skip
    file, page = tmp_path / "results.json", tmp_path / "README.md"
    file.write_text(json.dumps(document))
    page.write_text(f"above\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\nbelow\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(file), "--readme", str(page)])
    report.main()
    shown = page.read_text()
    assert f"| {case} | 1 s |" in shown and fill not in shown and "driver 580, commit 012345678, 2026-01-02" in shown
    assert shown.startswith("above\n") and shown.endswith("\nbelow\n") and "old" not in shown
    assert f"| {fill} | 1 G/s |" in file.with_suffix(".md").read_text()


# peers


@pytest.mark.parametrize(
    ("library", "way"),
    [("torch.nn", way) for way in peers.ALL_WAYS if way != "transformers"]
    + [("transformers", way) for way in peers.ALL_WAYS],
)
def test_each_way_creates_an_initialized_model(library, way):
    for package in (peers.ALL_WAYS[way].requires, "transformers" if library == "transformers" else None):
        if package is not None:
            pytest.importorskip(package)
    build = peers.llama(SMALL, library)
    create = peers.prepare_way(way, CPU, torch.bfloat16)
    dtype = torch.float32 if "fp32" in way else torch.bfloat16
    for name, parameter in create(build)[0].named_parameters():
        assert parameter.dtype == dtype and parameter.device == CPU
        assert parameter.eq(1).all() if "norm" in name else 0.015 < parameter.float().std() < 1.1


def test_a_peer_that_is_missing_or_has_no_such_fill_says_so(monkeypatch):
    with pytest.raises(peers.Unavailable, match="unsupported: NumPy writes fp32"):
        peers.prepare("NumPy", "normal", torch.empty(4, dtype=torch.bfloat16))
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(peers.Unavailable, match="missing: numpy is not installed"):
        peers.prepare("NumPy", "normal", torch.empty(4))


# shards


@pytest.mark.parametrize(("part", "ranks"), [("fsdp2", 2), ("hsdp", 4), ("fsdp2-tp", 2)])
def test_a_value_that_differs_is_found_on_its_rank(part, ranks):
    job = sharded.Job(part, "fastinit", ranks, True, "cpu", SMALL, 1)

    def differing_on(rank):
        model, report = sharded.create(job, CPU, sharded.Stages(CPU))
        right = sharded.different_tensors(job, model, report.seed)
        if rank == 1:
            with torch.no_grad():
                model.head.weight.to_local().add_(1)
        return right, sharded.different_tensors(job, model, report.seed)

    expected = [([], ["head.weight"] if rank == 1 else []) for rank in range(ranks)]
    assert on_every_rank(ranks, differing_on) == expected


def test_a_played_rank_measures_each_stage_and_compares():
    job = sharded.Job("fsdp2", "fastinit", 2, True, "cpu", SMALL, 1)
    imported, played = sharded.measure.in_new_process(sharded.play_ranks, job)
    assert imported.different == [] and played.different is None
    assert list(played.parts) == ["constructor", "sharding", "materialize", "of it allocation", "of it fills"]
    assert played.seconds == pytest.approx(sum(list(played.parts.values())[:3]))
    assert played.local_bytes < 1.2 * SMALL.parameters  # half of the elements, two bytes each, and padding


def test_a_real_rank_joins_its_group_and_measures():
    job = sharded.Job("fsdp2", sharded.META, 2, False, "cpu", SMALL, 1)
    ranks = sharded.measure.on_ranks(sharded.run_rank, 2, "cpu", job)
    for rounds in ranks:
        assert len(rounds) == 2 and all(each.different is None for each in rounds)
        assert list(rounds[0].parts) == ["constructor", "sharding", "to_empty", "reset_parameters"]

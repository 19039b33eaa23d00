"""benchmarks/large_sharded.py: every part runs on small models, and what is wrong is found and said."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import on_every_rank

from fastinit.cli.models import LLAMA_70B, DecoderConfig

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "large_sharded.py"


def loaded():
    specification = importlib.util.spec_from_file_location("large_sharded", SCRIPT)
    module = sys.modules["large_sharded"] = importlib.util.module_from_spec(specification)  # for its dataclasses
    specification.loader.exec_module(module)
    return module


large = loaded()
CONFIG = replace(DecoderConfig.of_size(1_000_000), heads=4, key_value_heads=2, layers=1)


def run(folder, *arguments):
    """The results of a quick run on the CPU, and what it showed."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(folder), *arguments]
    command += ["--patience", "600"]  # all ranks, however slow the machine
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "large-sharded-cpu.json").read_text())["runs"], done.stdout


def refuse_what_is_missing(results, ranks):
    """All ranks were measured in both ways, compared their values, and found no difference."""
    assert "error" not in results, results["error"]
    assert results["values"]["ranks"] == ranks and results["values"]["elements"] > 0
    assert len(results["values"]["tensors"]) == 12 and results["values"]["different"] == {}
    ours, theirs = results["summary"].values()
    assert ours["ranks measured"] == theirs["ranks measured"] == ranks
    assert {"constructor", "allocation", "fills"} <= set(ours["seconds"])
    assert ours["total"] == sum(ours["seconds"].values()) > ours["after python"] > 0


def test_a_simulated_rank_is_measured_like_each_of_eight(tmp_path):
    runs, shown = run(tmp_path, "--ranks", "0", "--parts", "fsdp2-tp")
    (results,) = runs[0]["parts"].values()
    assert runs[0]["simulated"] and runs[0]["ranks"] == 8 and "8 ranks simulated one after the other" in shown
    assert results["mesh"] == [4, 2] and "key broadcast" not in results["summary"]["fastinit"]["seconds"]
    refuse_what_is_missing(results, 8)
    whole = 2 * runs[0]["parameters"]
    assert whole / 8 < results["summary"]["fastinit"]["local bytes"] < whole / 7


@pytest.mark.slow  # torchrun three times, and DeepSpeed's import on each rank
def test_real_ranks_and_simulated_ones_run_every_part(tmp_path):
    runs, shown = run(tmp_path, "--ranks", "4")
    assert [(group["ranks"], group["simulated"]) for group in runs] == [(4, False), (8, True)]
    meshes = [{part: results.get("mesh") for part, results in group["parts"].items()} for group in runs]
    with_deepspeed = importlib.util.find_spec("deepspeed") is not None
    for group, hsdp, tensor in ((0, [2, 2], [2, 2]), (1, [2, 4], [4, 2])):
        ranks = runs[group]["ranks"]
        zero = [ranks] if with_deepspeed else None
        assert meshes[group] == {"fsdp2": [ranks], "hsdp": hsdp, "fsdp2-tp": tensor, "zero3": zero}
        for results in runs[group]["parts"].values():
            if results != {"missing": "deepspeed"}:
                refuse_what_is_missing(results, ranks)
        local = {
            part: each["summary"]["fastinit"]["local bytes"] for part, each in runs[group]["parts"].items() if each
        }
        assert local["hsdp"] > 1.9 * local["fsdp2"]
    assert runs[0]["parts"]["fsdp2"]["summary"]["fastinit"]["seconds"]["key broadcast"] > 0
    assert with_deepspeed or "zero3: missing, deepspeed" in shown


def job_for(part, mesh):
    return large.Job(
        part, ranks=2, mesh=mesh, simulated=True, device="cpu", config=CONFIG, repeats=1, patience=1, path=None
    )


@pytest.mark.parametrize(("part", "mesh"), [("fsdp2", (2,)), ("hsdp", (1, 2)), ("fsdp2-tp", (1, 2))])
def test_a_value_that_differs_is_found_on_its_rank(part, mesh):
    def differing_on(rank):
        job = job_for(part, mesh)
        ways = large.PARTS[part].make(job, torch.device("cpu"))
        create = ways.create["fastinit"]

        def changed(clock):
            model, seed = create(clock)
            if rank == 1:
                model.head.weight.detach().to_local()[3, 5] += 1
            return model, seed

        ways = replace(ways, create={"fastinit": changed})
        found = large.measure_ways(job, ways, torch.device("cpu"), 0, keep=True, check=True)
        return found["values"][0]

    values = large.merged(on_every_rank(2, differing_on))
    assert "head.weight" in values["tensors"] and values["different"] == {1: ["head.weight"]}
    results = {"values": values, "mesh": mesh, "wall seconds": 1.0}
    assert not large.is_good(results)
    assert "DIFFERENT on rank 1: head.weight" in large.report(part, results)


def record(rank, repeat, constructor, fills, **others):
    seconds = {"fills": fills, "constructor": constructor}
    return {"way": "fastinit", "rank": rank, "repeat": repeat, "seconds": seconds, "local bytes": 10, **others}


def test_the_summary_is_of_the_slowest_rank_in_the_middle_repeat():
    records = [
        record(rank, repeat, constructor, fills, **{"peak beyond": beyond})
        for rank, repeat, constructor, fills, beyond in (
            (0, 0, 1.0, 0.1, 3), (1, 0, 1.0, 0.4, 5),
            (0, 1, 5.0, 0.2, 3), (1, 1, 1.0, 0.3, 4),
            (0, 2, 2.0, 0.2, None), (1, 2, 1.0, 0.1, 4),
        )
    ]  # fmt: skip
    (summary,) = large.summarised(records).values()
    assert summary == {
        "ranks measured": 2,
        "repeats": 3,
        "total": 2.2,
        "seconds": {"constructor": 2.0, "fills": 0.2},
        "local bytes": 10,
        "peak beyond": 5,
        "after python": 0.4,
    }
    assert list(summary["seconds"]) == ["constructor", "fills"]


def test_a_way_that_fails_costs_only_itself():
    failed = {"way": "torch", "rank": 0, "repeat": 0, "error": "OutOfMemoryError: no"}
    results = {"mesh": [2], "wall seconds": 1.0}
    results["summary"] = large.summarised([record(0, 0, 1.0, 0.1, **{"peak beyond": 0}), failed])
    assert large.is_good(results)
    assert "torch failed: OutOfMemoryError: no" in large.report("fsdp2", results)


def test_limits_hold_for_gpus_and_the_time_for_the_70b_model():
    group = large.Group(8, True, "cuda", "70B", LLAMA_70B)
    good = {"peak beyond": 64 << 20, "after python": 0.2}
    assert [each["kept"] for each in large.limits(group, good)] == [True, True]
    assert [each["kept"] for each in large.limits(group, {"peak beyond": (64 << 20) + 1, "after python": 0.21})] == [
        False
    ] * 2
    assert len(large.limits(replace(group, config=CONFIG), good)) == 1
    assert large.limits(replace(group, device="cpu"), good) == []
    missed = {"mesh": [8], "wall seconds": 1.0, "limits": large.limits(group, {**good, "after python": 0.3})}
    assert not large.is_good(missed)
    assert "0.3, at most 0.2: MISSED" in large.report("fsdp2", missed)


def test_a_part_that_hangs_is_ended_and_says_where(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import time; print('... here', flush=True); time.sleep(600)"]
    error = large.watched(command, dict(os.environ), tmp_path / "part.log", 2)
    assert error == "not done after 2 s; the end of part.log:\n... here\n"
    failing = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    error = large.watched(failing, dict(os.environ), tmp_path / "part.log", 60)
    assert error == "exit status 1; the end of part.log:\nno such thing\n"

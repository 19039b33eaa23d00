"""The scripts under examples/ run as their users run them, on the CPU: alone, or two processes under torchrun."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "inspect_models"))
# Those with a before and an after: the framework that they need.
FRAMEWORKS = {"fabric": "lightning", "lightning_trainer": "lightning", "transformers_finetune": "transformers"}
SHARDED = [script for script in SCRIPTS if script not in FRAMEWORKS and script != "reproducible_across_meshes"]
LOSS = re.compile(r"step \d+: loss (\S+)")
SECONDS = 300


def run(tmp_path, command, script, *arguments):
    """What a script prints; a failure shows all that every process of it printed, and where those that hang are."""
    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONFAULTHANDLER": "1"}
    # No GPU, so that the same happens everywhere; one thread, because the processes share the cores.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    output = tmp_path / "output"
    with (
        output.open("w") as file,
        subprocess.Popen(
            [sys.executable, *command, str(FOLDER / f"{script}.py"), *arguments],
            env=environment,
            cwd=tmp_path,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)  # each process prints its stacks
    printed = output.read_text()
    assert process.returncode == 0, f"{script} {' '.join(arguments)} ended with {process.returncode}:\n{printed}"
    return printed


def losses_of(printed):
    losses = [float(loss) for loss in LOSS.findall(printed)]
    assert len(losses) == 5, printed
    assert 0 < losses[-1] < losses[0] < 20, losses
    return losses


@pytest.mark.parametrize("script", FRAMEWORKS)
def test_a_script_runs_with_its_added_line_and_without(tmp_path, script):
    pytest.importorskip(FRAMEWORKS[script])
    folders = [tmp_path / "after", tmp_path / "before"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor() as pool:
        printed = pool.map(lambda folder, flags: run(folder, [], script, *flags), folders, ([], ["--without"]))
        after, before = map(losses_of, printed)
    assert after != before, "the line changes nothing: the values are torch's own"


def test_the_example_of_a_checkpoint_runs_alone(tmp_path):
    printed = run(tmp_path, [], "checkpoint")
    losses_of(printed)
    assert "for them: ['embedding.weight', 'norm.weight', 'head.weight']" in printed


@pytest.mark.slow  # starts torch five times: 20 s of processor time
def test_weights_are_the_same_on_all_meshes_and_those_of_torch_are_not(tmp_path):
    printed = run(tmp_path, [], "reproducible_across_meshes")
    rows = re.findall(r"^(\d)  .{18}  ([0-9a-f]{16})  ([0-9a-f]{16})$", re.sub(r"(?m)^(\d) +", r"\1  ", printed), re.M)
    assert [ranks for ranks, _, _ in rows] == ["1", "2", "4", "4", "4"], printed
    assert len({ours for _, ours, _ in rows}) == 1 and len({theirs for _, _, theirs in rows}) > 1


@pytest.mark.slow  # each starts torch three times: 15 s of processor time
@pytest.mark.parametrize("script", SHARDED)
def test_an_example_trains_on_two_processes_and_its_loss_falls(tmp_path, script):
    if script == "deepspeed_zero3":
        pytest.importorskip("deepspeed")
    # A free port; every line begins with the process that printed it.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--tee", "3"]
    losses_of(run(tmp_path, torchrun, script))


def test_the_readme_lists_every_example_and_nothing_else():
    listed = re.findall(r"^\| \[\w+\.py\]\((\w+)\.py\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted([*SCRIPTS, "inspect_models"])

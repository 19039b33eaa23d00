"""The scripts under examples/ run as their users run them: torchrun, two processes on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
LOSS = re.compile(r"loss (\S+)")


def run(script, *arguments):
    # No GPU, so that the same happens everywhere; a free port; one thread, because the processes share the cores.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*command, str(FOLDER / f"{script}.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow  # each starts torch three times
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_trains_on_two_processes_and_its_loss_falls(script):
    if script == "deepspeed_zero3":
        pytest.importorskip("deepspeed")
    done = run(script)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in LOSS.findall(done.stdout)]
    assert len(losses) > 1, done.stdout
    assert 0 < losses[-1] < losses[0] < 20, losses


def test_the_readme_lists_every_example_and_nothing_else():
    listed = re.findall(r"^\| \[\w+\.py\]\((\w+)\.py\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == SCRIPTS

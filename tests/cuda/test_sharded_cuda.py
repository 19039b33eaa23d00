"""Sharded creation on two GPUs with NCCL; skipped where there are fewer."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_gpus.py")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("engine", ["fsdp2", "fsdp2_tp", "init_weights", "fsdp1", "zero3"])
def test_shards_have_the_bits_of_the_cpu_and_train(engine):
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # NVLink multicast is not available in every virtual machine.
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0"}
    done = subprocess.run([*command, str(SCRIPT), engine], capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

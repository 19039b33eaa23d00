"""One creation of a `Decoder` in a process of its own: `python -m fastinit.cli.worker SPECIFICATION`, both ends JSON.

Nothing that an earlier creation left behind (allocator caches, imported modules, resident memory) can then favour a
later one. The last line printed is the result.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import torch

from . import measure
from .models import Decoder, DecoderConfig, training_step


def create_decoder(
    way: str, config: DecoderConfig, device: str, dtype: str, *, seed: int, train: bool
) -> dict[str, Any]:
    """What `measure.timed_creation` measures in a new process and, with `train`, the `loss` of one training step.

    Raises:
        RuntimeError: the process failed; the message ends with what it said.
    """
    specification = {
        "way": way, "config": asdict(config), "device": device, "dtype": dtype, "seed": seed, "train": train,
    }  # fmt: skip
    command = [sys.executable, "-m", "fastinit.cli.worker", json.dumps(specification)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last_words = done.stderr.strip()[-1500:] or f"exit status {done.returncode}"
        raise RuntimeError(f"creating the model the {way} way failed ({config.parameters:,} parameters):\n{last_words}")
    return json.loads(done.stdout.splitlines()[-1])


def main(specification: dict[str, Any]) -> dict[str, Any]:
    way, dtype = specification["way"], measure.DTYPES[specification["dtype"]]
    device = torch.device(specification["device"])
    config = DecoderConfig(**specification["config"])
    measure.create_small(way, device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "cpu" or way == "naive":
        measure.warm_memory(config.parameters * (torch.float32 if way == "naive" else dtype).itemsize)
    torch.manual_seed(specification["seed"])
    model, result = measure.timed_creation(way, lambda: Decoder(config), device, dtype)
    if specification["train"]:
        result["loss"] = training_step(model, config.vocabulary, device)
    return result


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

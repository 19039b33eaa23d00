"""One creation of a model in a process of its own: `python -m fastinit.cli.worker SPECIFICATION`, both ends JSON.

Nothing that an earlier creation left behind (allocator caches, resident memory, code that Python has specialised) can
then favour a later one. A worker says that it is ready when everything but the creation is done, and creates when it is
told to: several can start at the same time and still create one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import Any

import torch

from . import measure
from .models import DecoderConfig, training_step
from .ways import WAYS, warm_host
from .workloads import llama

SMALL = DecoderConfig(vocabulary=64, width=64, layers=1, heads=1, hidden=64)


class Worker:
    """A process that will create a Llama-shaped model; with `train`, also train it for a step.

    Args:
        way: one of `ways.WAYS`.
        library: of the model's modules, see `workloads.llama`.
        dtype: one of `measure.DTYPES`.
        seed: of torch.manual_seed.
    """

    def __init__(
        self,
        way: str,
        config: DecoderConfig,
        device: str,
        dtype: str,
        *,
        library: str = "torch.nn",
        seed: int = 0,
        train: bool = False,
    ) -> None:
        specification = {
            "way": way, "library": library, "config": asdict(config), "device": device, "dtype": dtype, "seed": seed,
            "train": train,
        }  # fmt: skip
        self._task = f"creating the model the {way} way failed ({config.parameters:,} parameters)"
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastinit.cli.worker", json.dumps(specification)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip

    def wait_until_ready(self) -> None:
        """Return when all is done that can be before the creation, or the process has failed."""
        if self._process.poll() is None:
            assert self._process.stdout is not None
            self._process.stdout.readline()

    def create(self) -> dict[str, Any]:
        """Have it create the model; then the process ends.

        Returns:
            What `measure.timed_creation` measures and, with `train`, the `loss` of the training step.

        Raises:
            RuntimeError: the process failed; the message ends with what it said.
        """
        reply, _ = self._process.communicate("create\n")
        with self._errors:
            if self._process.returncode == 0:
                created: dict[str, Any] = json.loads(reply.splitlines()[-1])
                return created
            self._errors.seek(0)
            last_words = self._errors.read().strip()[-1500:] or f"exit status {self._process.returncode}"
        raise RuntimeError(f"{self._task}:\n{last_words}")


def main(specification: dict[str, Any]) -> None:
    # Whatever else prints does it on standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    way, dtype = specification["way"], measure.DTYPES[specification["dtype"]]
    device = torch.device(specification["device"])
    config, library = DecoderConfig(**specification["config"]), specification["library"]
    create = WAYS[way].prepare(device, dtype)
    # Lazy imports, the CUDA context and the first load of kernels are no part of what is timed.
    create(llama(SMALL, library))
    measure.synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    warm_host(way, config.parameters, device, dtype)
    torch.manual_seed(specification["seed"])
    print("ready", file=replies, flush=True)
    if not sys.stdin.readline():
        return  # nobody is waiting any more
    model, result = measure.timed_creation(create, llama(config, library), device)
    if specification["train"]:
        result["loss"] = training_step(model, config.vocabulary, device)
    print(json.dumps(result), file=replies, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

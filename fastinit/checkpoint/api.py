"""`load`: a checkpoint streamed into a model, whole or not at all.

Private: it may change with any version.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..context import on
from ..layout import Slices
from ..log import listed
from ..materialization import initialize
from .files import Checkpoint
from .loading import Loading, LoadReport


def load(
    model: nn.Module | Callable[[], nn.Module],
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    seed: int | None = None,
    window: Callable[[str, tuple[int, ...]], Slices | None] | None = None,
    strict: bool = True,
    progress: bool = True,
    report: LoadReport | None = None,
) -> nn.Module:
    """Load a checkpoint into a model, which is created for it if a function is given.

    The model is created under ``fastinit.on(device, dtype, seed=seed, empty=True)``, so that no value is computed that
    the checkpoint supplies. Several threads read the files, straight into the memory of parameters and buffers, or
    through buffers (of 32 MiB; of 128 MiB pinned memory for a GPU), and what arrives is converted to their dtype
    while other parts are read. What lies in another order than in memory is mapped and copied, one tensor at a time. So
    beside the model there is never more in memory than the largest tensor, or the buffers.
    (torch.distributed.checkpoint reads a tensor into memory and copies it there, which takes up to three times that.
    Files of torch before 1.6 are read whole.) torch keeps the pinned buffers for the next load.

    Of a DTensor, of a parameter under DeepSpeed's ZeRO-3 before ``deepspeed.initialize``, and with ``window``, this
    process has its own part, and waits for no other one. It reads no more than that, unless what lies side by side in a
    file is less than 512 bytes of it, or nothing is streamed.

    What a state dict means to ``load_state_dict`` it means here: hooks, versions and extra state included. Loading
    code that the model's own classes bring runs as it would there. Such a model may be left with part of a checkpoint
    that turns out not to fit, and the files stay mapped until it is loaded.

    Args:
        model: a module, or a function (a class, say) that creates one when it is called without arguments.
        path: a .safetensors file; a file written by ``torch.save`` that holds a state dict, plain or under the key
            "state_dict" as Lightning writes it; the index.json of such a checkpoint in several files; a directory with
            one of these; or a directory written by ``torch.distributed.checkpoint``. Nothing in a checkpoint is run:
            torch files are unpickled with ``weights_only=True``, and so are the objects of a distributed checkpoint,
            whose metadata may hold what torch writes there and nothing else. No file outside of its directory is read.
        device, dtype, seed: as for `fastinit.on`, for a model that is created here; device None means "cuda".
        window: for a model with parallelism of your own, the one that `materialize` was given: called with the name of
            each parameter and its shape in the checkpoint, it returns the slices that the model has, or None for all.
        strict: raise if names are missing or unexpected, or if one memory would get two different tensors. False: what
            is missing gets its recorded initialization, with the bits that it would have without the checkpoint, or
            keeps its value if it has one; what is unexpected is left out; and without a report there is a warning.
        progress: show a bar in bytes, if tqdm is installed.
        report: is filled with names, dtypes, bytes and seconds.

    Returns:
        The model, every tensor of which has its values.

    Raises:
        CheckpointError: for a file that is missing, truncated, corrupt or refused by ``weights_only``; for names (if
            strict), shapes and kinds of dtype that do not fit, all of them in one message; for a finite value that the
            model's dtype cannot hold. A model that was passed has its old values then, and none where it had none,
            except that a file which fails after its metadata has been read and found right leaves the model with a
            part of it.
        ValueError: a path that is none of the above; device, dtype or seed together with a module; a window that is no
            such tuple of slices.
        FileNotFoundError: a path that does not exist.
        ImportError: a .safetensors file without the safetensors package.

    Example:
        >>> torch.save({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, "checkpoint.pt")
        >>> model = fastinit.load(lambda: torch.nn.Linear(2, 1), "checkpoint.pt", "cpu", "bf16")
        >>> model.weight
        Parameter containing:
        tensor([[1., 1.]], dtype=torch.bfloat16, requires_grad=True)
    """
    started = time.perf_counter()
    if isinstance(model, nn.Module):
        if not (device is None and dtype is None and seed is None):
            raise ValueError(
                f"fastinit.load: device={device!r}, dtype={dtype!r}, seed={seed!r} are for a model that is created "
                "here; the one that was passed has its own. Leave them out, or pass a function that creates the model"
            )
        checkpoint, made, new = Checkpoint(Path(path)), model, False
    elif callable(model):
        context = on("cuda" if device is None else device, dtype, seed=seed, empty=True)
        checkpoint, made, new = Checkpoint(Path(path)), _created(model, context), True
    else:
        raise TypeError(f"fastinit.load: model={model!r} must be a module, or a function that returns one")
    loading = Loading(made, checkpoint, strict, new, window)
    with _bar(loading.bytes, progress, checkpoint.path) as bar:
        loading.run(bar.update if bar is not None else lambda count: None)
    initialize(made)  # what the checkpoint has not
    done = loading.report
    done.seconds = time.perf_counter() - started
    if report is not None:
        for each in fields(done):
            setattr(report, each.name, getattr(done, each.name))
    elif done.missing or done.unexpected:
        warnings.warn(
            f"fastinit.load: {str(checkpoint.path)!r} and {type(made).__name__} differ: {len(done.missing)} names "
            f"missing in the checkpoint ({listed(done.missing, 10)}), {len(done.unexpected)} unexpected "
            f"({listed(done.unexpected, 10)}). Pass report=fastinit.LoadReport() to have them without this warning",
            stacklevel=2,
        )
    return made


def _created(factory: Callable[[], nn.Module], context: on) -> nn.Module:
    with context:
        model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastinit.load: model={factory!r} returned a {type(model).__name__}, not a module")
    return model


def _bar(total: int, progress: bool, path: Path) -> Any:
    if progress and total:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=path.name)
    return nullcontext()

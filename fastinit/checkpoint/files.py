"""A checkpoint: the files that it consists of, and its tensors by name.

There is a class for each kind of file (`formats`, `distributed`); of all the files one at a time is mapped. A
checkpoint may come from anywhere, so nothing in it is run, and it names no file outside of its own directory.

Private: it may change with any version.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from .distributed import DistributedCheckpoint, check_inside
from .formats import Info, Part, SafetensorsFile, TorchFile

# Below every mode: a device context or a recorder around the caller has no say in how files are read.
_modes_off = torch._C.DisableTorchFunction

_ACCEPTED = (
    "a .safetensors file, a file written by torch.save (.pt, .pth, .bin, .ckpt), the index of a checkpoint in several "
    "files (*.index.json), a directory that holds one of these, or a torch.distributed.checkpoint directory"
)
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# What is looked for in a directory, in this order: first the names that are customary.
_IN_A_DIRECTORY = (
    *("model.safetensors.index.json", "model.safetensors", "*.safetensors.index.json", "*.safetensors"),
    *("pytorch_model.bin.index.json", "pytorch_model.bin", "*.bin.index.json", "*.bin"),
)

# What was read through a mapping counts as this process's memory until the file is unmapped. A file is opened again
# before that exceeds its largest tensor, or this: opening a file costs more than a small tensor.
_MAPPED_BYTES = 64 << 20


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit the model that it was to be loaded into."""


class Checkpoint:
    """All tensors of a checkpoint by name, of which one file at a time is mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.versions: Mapping[str, Any] | None = None
        self._file_of: dict[str, Any] = {}
        self._open: Any = None
        self._touched = 0
        files, indexed = self._find()
        for file in files.values():
            self._file_of.update(dict.fromkeys((*file.tensors, *file.objects), file))
            self.versions = self.versions or file.versions
        lost = [f"{name} ({file})" for name, file in indexed.items() if name not in files[file].tensors]
        if lost:
            raise CheckpointError(
                f"fastinit.load: the index {str(path)!r} names tensors that their files do not have: {', '.join(lost)}"
            )
        self._file_of.update((name, files[file]) for name, file in indexed.items())
        self.tensors: dict[str, Info] = {
            name: info for file in files.values() for name, info in file.tensors.items() if self._file_of[name] is file
        }
        self.objects = [name for name in self._file_of if name not in self.tensors]
        self._limit = max([_MAPPED_BYTES, *(info.nbytes for info in self.tensors.values())])

    def _find(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The files by name, and which of them an index says that a tensor is in."""
        path = self.path
        if not path.exists():
            raise FileNotFoundError(f"fastinit.load: path={str(path)!r} does not exist; pass {_ACCEPTED}")
        if path.is_dir():
            if (path / ".metadata").is_file():
                return {path.name: self._opened(DistributedCheckpoint, path)}, {}
            path = self.path = _only_one_in(path)
        if path.name.endswith(".index.json"):
            indexed = _read_index(path)
            names = list(dict.fromkeys(indexed.values()))
            gone = [name for name in names if not (path.parent / name).is_file()]
            if gone:
                raise CheckpointError(
                    f"fastinit.load: files that the index {str(path)!r} names do not exist: {', '.join(gone)}; "
                    "complete the download or copy"
                )
        else:
            indexed, names = {}, [path.name]
        return {name: self._opened(_kind_of_file(path.parent / name), path.parent / name) for name in names}, indexed

    def _opened(self, kind: Callable[[Path], Any], path: Path) -> Any:
        try:
            with _modes_off():
                self.close()
                self._open = kind(path)
                return self._open
        except ImportError as error:
            raise ImportError(
                f"fastinit.load: {str(path)!r} needs the package {error.name!r}: pip install 'torch-fastinit[load]'"
            ) from error
        except Exception as error:
            raise CheckpointError(_unreadable(path, error)) from error

    def _use(self, file: Any, nbytes: int) -> None:
        if file is not self._open or (file.is_mapped and self._touched + nbytes > self._limit):
            self.close()
        self._open = file
        self._touched += nbytes

    def close(self) -> None:
        """Unmap what is mapped; the next read opens its file again."""
        if self._open is not None:
            self._open.close()
        self._open, self._touched = None, 0

    def parts(self, name: str) -> list[Part]:
        """What a tensor consists of; nothing if it is stored in another way than as ranges of bytes."""
        parts: list[Part] = self._guarded(lambda: self._file_of[name].parts(name), name)
        return parts

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU.

        Mapped tensors have to be dropped before the next call: the file cannot be unmapped before.
        """
        self._use(self._file_of[name], self.tensors[name].nbytes)
        tensor: torch.Tensor = self._guarded(lambda: self._file_of[name].read(name), name)
        return tensor

    def read_object(self, name: str) -> Any:
        """Extra state, which may be a tensor or contain some: a copy, which keeps no file mapped."""
        read = self.read if name in self.tensors else self._file_of[name].read_object
        return self._guarded(lambda: deepcopy(read(name)), name)

    def read_all(self) -> OrderedDict[str, Any]:
        """All of it at once, as a state dict; None for what is no tensor and no extra state."""
        state: OrderedDict[str, Any] = OrderedDict()
        for name, file in self._file_of.items():
            if name in self.tensors:
                state[name] = self._guarded(partial(file.read, name), name)
            else:
                state[name] = self.read_object(name) if name.endswith(_EXTRA_STATE_KEY_SUFFIX) else None
        return state

    def check(self) -> None:
        """Raise CheckpointError unless all files are still what they were when their metadata was read."""
        try:
            for file in set(self._file_of.values()):
                for stored in file.files:
                    stored.check()
        except OSError as error:
            raise self.failed(error) from error

    def _guarded(self, read: Callable[[], Any], name: str) -> Any:
        try:
            with _modes_off():
                return read()
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{_unreadable(self.path, error)} ({name!r})") from error
        except Exception as error:
            raise self.failed(error, name) from error

    def failed(self, error: Exception, name: str | None = None) -> CheckpointError:
        """What to raise after an error in reading a tensor, or any of them, of files whose metadata was right."""
        return CheckpointError(
            f"fastinit.load: {'tensors' if name is None else repr(name)} could not be read from {str(self.path)!r}, "
            "which is corrupt or has changed since it was opened; a model that was passed may hold a part of it: "
            f"{error}"
        )


def _only_one_in(directory: Path) -> Path:
    for pattern in _IN_A_DIRECTORY:
        found = sorted(directory.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"fastinit.load: path={str(directory)!r} holds several checkpoints, pass one: {names}")
        if found:
            return found[0]
    raise ValueError(f"fastinit.load: path={str(directory)!r} is not a checkpoint; pass {_ACCEPTED}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        indexed: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in indexed.values()):
            raise TypeError("its weight_map does not name a file for each tensor")
        check_inside(indexed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(_unreadable(path, error)) from error
    return indexed


def _kind_of_file(path: Path) -> Callable[[Path], Any]:
    if path.suffix == ".safetensors":
        return SafetensorsFile
    if path.suffix in _TORCH_SUFFIXES or zipfile.is_zipfile(path):
        return TorchFile
    raise ValueError(f"fastinit.load: path={str(path)!r} is not a checkpoint; pass {_ACCEPTED}")


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
        return (
            f"fastinit.load: {str(path)!r} holds more than tensors, and weights_only=True refuses to unpickle it. Save "
            "model.state_dict() instead; or, if you trust the file, unpickle it with torch.load(..., "
            f"weights_only=False) and pass the result to model.load_state_dict. {error}"
        )
    if isinstance(error, pickle.UnpicklingError) and path.is_dir():
        return (
            f"fastinit.load: {str(path)!r} is corrupt, or holds what is refused because it could run code; if you "
            f"trust it, use torch.distributed.checkpoint.load. {error}"
        )
    return f"fastinit.load: {str(path)!r} cannot be read, it is truncated, corrupt or of another format: {error}"

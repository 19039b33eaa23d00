"""The files of a checkpoint: which tensors they have, and one tensor at a time of them.

Reading is left to safetensors and torch. `Checkpoint` finds the files, knows the name, shape and dtype of each tensor
from their metadata, and maps one file at a time. There is a class for each kind of file.

A checkpoint may come from anywhere, so nothing in it is run, and it names no file outside of its own directory.

Private: it may change with any version.
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from enum import EnumMeta
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from .layout import Box, Window, contiguous_strides, flat_box
from .streaming import StoredFile

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


class _Info(NamedTuple):
    """A stored tensor, and where in its file its bytes are, if they lie there as in a contiguous tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Part(NamedTuple):
    """Some values of a tensor that lie in a file one after the other, and where in the whole tensor they belong."""

    file: StoredFile
    offset: int
    box: Box


class _Safetensors:
    """The tensors of one safetensors file, mapped."""

    is_mapped = True
    objects: tuple[str, ...] = ()
    versions = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self.stored = StoredFile.at(path)
        file = self._opened()
        offsets = self._offsets()
        self.tensors = {
            name: info._replace(offset=offsets.get(name))
            for name, info in _in_order({name: file.get_tensor(name) for name in file.keys()}).items()
        }

    def _offsets(self) -> dict[str, int]:
        """From the header, which safetensors has checked."""
        if sys.byteorder != "little":
            return {}
        with self._path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}

    def _opened(self) -> Any:
        if self._file is None:
            from safetensors import safe_open

            self._file = safe_open(self._path, framework="pt", device="cpu")
        return self._file

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._opened().get_tensor(name)
        return tensor

    def close(self) -> None:
        self._file = None


class _TorchFile:
    """The tensors of one file that torch.save has written, mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: Mapping[str, Any] | None = None
        self.stored = StoredFile.at(path)
        # Only the format of torch 1.6 and later, a zip file, can be mapped.
        self.is_mapped = zipfile.is_zipfile(path)
        self._storages: list[int] = []
        values = self._opened()
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        start = self._mapped_at()
        self.tensors = {
            name: info._replace(offset=_offset(tensors[name], start)) for name, info in _in_order(tensors).items()
        }
        self.objects = tuple(name for name in values if name not in tensors)
        self.versions = getattr(values, "_metadata", None)

    def _opened(self) -> Mapping[str, Any]:
        if self._values is None:
            self._storages = []
            location: Any = self._noted if self.is_mapped else "cpu"
            values = torch.load(self._path, map_location=location, weights_only=True, mmap=self.is_mapped)
            if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
                values = values["state_dict"]
            if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
                raise TypeError(f"it holds a {type(values).__name__}, not a state dict, whose keys are names")
            self._values = values
        return self._values

    def _noted(self, storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        if storage.nbytes():
            self._storages.append(storage.data_ptr())
        return storage

    def _mapped_at(self) -> int | None:
        """The address that the file is mapped at; None if that cannot be told, or if its bytes are not what is read.

        torch keeps to itself which record of the file a storage is. But there is one address from which all of them are
        as far away as records are from the start of the file.
        """
        if not self.is_mapped or not self._storages:
            return None
        records: Any = torch._C.PyTorchFileReader(str(self._path))
        if records.has_record("byteorder") and records.get_record("byteorder").decode() != sys.byteorder:
            return None
        offsets = {records.get_record_offset(name) for name in records.get_all_records()}
        first, *others = sorted(self._storages)
        starts = [first - offset for offset in offsets if (first - offset) % mmap.ALLOCATIONGRANULARITY == 0]
        starts = [start for start in starts if all(address - start in offsets for address in others)]
        return starts[0] if len(starts) == 1 else None

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._opened()[name].detach()
        return tensor

    def read_object(self, name: str) -> Any:
        return self._opened()[name]

    def close(self) -> None:
        self._values = None


class _Distributed:
    """The tensors of a torch.distributed.checkpoint directory, read one by one.

    Every process reads for itself: nothing here waits for another one.
    """

    is_mapped = False
    versions = None

    def __init__(self, path: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self._path = path
        self._reader = FileSystemReader(path)
        with (path / ".metadata").open("rb") as file:  # the reader itself would run whatever the pickle says
            self._metadata = _MetadataUnpickler(file).load()
        self._reader.set_up_storage_reader(self._metadata, True)
        self._check_sizes()
        # A value that is a dict or a list is stored in parts, and the keys that lead to each part apart from its name.
        infos, paths = self._metadata.state_dict_metadata, self._metadata.planner_data or {}
        parts = {stored: tuple(paths.get(stored, (stored,))) for stored in infos}
        if any(keys[0] == "state_dict" and len(keys) > 1 for keys in parts.values()):
            parts = {stored: keys[1:] for stored, keys in parts.items() if keys[0] == "state_dict"}
        self.tensors: dict[str, _Info] = {}
        self._parts: dict[str, dict[str, tuple[Any, ...]]] = {}
        for stored, keys in parts.items():
            self._parts.setdefault(keys[0], {})[stored] = keys
            info = infos[stored]
            if len(keys) == 1 and isinstance(info, TensorStorageMetadata):
                self.tensors[keys[0]] = _Info(tuple(info.size), info.properties.dtype)
        self.objects = tuple(name for name in self._parts if name not in self.tensors)

    def _check_sizes(self) -> None:
        self._stored: dict[str, StoredFile] = {}
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        _check_inside(ends)
        for name, end in ends.items():
            file = self._path / name
            if not file.is_file():
                raise FileNotFoundError(f"its file {name!r} does not exist")
            self._stored[name] = StoredFile.at(file)
            if file.stat().st_size < end:
                raise ValueError(f"its file {name!r} has {file.stat().st_size} bytes of at least {end}")

    def _load(self, stored: str) -> Any:
        from torch.distributed.checkpoint import DefaultLoadPlanner
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        class Planner(DefaultLoadPlanner):
            def load_bytes(self, read_item: Any, value: Any) -> None:
                self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)  # torch's: False

        planner = Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        info = self._metadata.state_dict_metadata[stored]
        state: dict[str, Any] = {stored: None}
        if isinstance(info, TensorStorageMetadata):
            state[stored] = torch.empty(info.size, dtype=info.properties.dtype, device="cpu")
        planner.set_up_planner(state, self._metadata, True)
        plan = planner.finish_plan(planner.create_local_plan())
        self._reader.read_data(plan, planner).wait()
        return state[stored]

    def parts(self, name: str) -> list[Part]:
        """Of a tensor: each chunk of it is a torch file within a file."""
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.utils import _create_file_view

        (stored,) = self._parts[name]
        info = self._metadata.state_dict_metadata[stored]
        parts = []
        for chunk in info.chunks:
            where = self._metadata.storage_data[MetadataIndex(stored, chunk.offsets)]
            path, sizes = self._path / where.relative_path, tuple(chunk.sizes)
            if getattr(where, "transform_descriptors", None):
                return []  # compressed, say
            with path.open("rb") as file:
                offset = _offset_within(
                    _create_file_view(file, where.offset, where.length), sizes, info.properties.dtype
                )
            if offset is None:
                return []
            window = Window(tuple(info.size), tuple(chunk.offsets))
            box = Box(0, sizes, contiguous_strides(sizes), window.index_offset, window.index_strides)
            parts.append(Part(self._stored[where.relative_path], where.offset + offset, box))
        return parts

    def read(self, name: str) -> torch.Tensor:
        (stored,) = self._parts[name]
        tensor: torch.Tensor = self._load(stored)
        return tensor

    def read_object(self, name: str) -> Any:
        from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

        values = {stored: self._load(stored) for stored in self._parts[name]}
        return unflatten_state_dict(values, self._parts[name])[name]

    def close(self) -> None:
        """Nothing is kept open."""


class _MetadataUnpickler(pickle.Unpickler):
    """Of the metadata of a torch.distributed.checkpoint; knows the classes that torch writes there and no others."""

    _KNOWN = frozenset(
        [
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "Metadata"),
            ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            ("torch.distributed.checkpoint.metadata", "StorageMeta"),
            ("torch.distributed.checkpoint.metadata", "TensorProperties"),
            ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            # As torch wrote it before 2.3.
            ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
            ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
        ]
    )

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where it was written, on any system
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in self._KNOWN:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        raise pickle.UnpicklingError(f"its metadata wants {module}.{name}, which torch does not write there")


def _enum_member(owner: Any, name: Any) -> Any:
    """What stands for `getattr` in the metadata.

    Early releases of Python 3.11, such as Debian 12's, pickle a member of an enum as `getattr(enum, name)`. So the
    members of the known enums are what is found here, and not by `getattr`, which would find methods, too.
    """
    if isinstance(owner, EnumMeta) and (owner.__module__, owner.__qualname__) in _MetadataUnpickler._KNOWN:
        member = owner.__members__.get(name) if isinstance(name, str) else None
        if isinstance(member, owner):
            return member
    # Not the repr of an object that the file describes: it may be half built.
    of = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else f"a {type(owner).__name__}"
    wanted = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
    raise pickle.UnpicklingError(f"its metadata wants getattr({of}, {wanted}), which torch does not write there")


def _check_inside(names: Iterable[str]) -> None:
    """That names of files stay below their directory. (Links may lead out of it: those are the user's.)"""
    for name in names:
        if PurePath(name).anchor or ".." in PurePath(name).parts:
            raise ValueError(f"it names a file outside of its directory, {name!r}")


def _offset_within(view: Any, sizes: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Where the values of the tensor that a torch file holds begin in it; None if they are not there in order."""
    with torch.serialization.skip_data():
        tensor = torch.load(view, map_location="cpu", weights_only=True)
    view.seek(0)
    records: Any = torch._C.PyTorchFileReader(view)
    swapped = records.has_record("byteorder") and records.get_record("byteorder").decode() != sys.byteorder
    if swapped or (tuple(tensor.shape), tensor.dtype) != (sizes, dtype) or not tensor.is_contiguous():
        return None
    offset: int = records.get_record_offset("data/0") + tensor.storage_offset() * dtype.itemsize
    return offset


def _offset(mapped: torch.Tensor, start: int | None) -> int | None:
    """Where in the file that is mapped from `start` on the values of a tensor lie, if they lie there in order."""
    in_order = mapped.numel() and mapped.is_contiguous() and not mapped.is_conj() and not mapped.is_neg()
    return mapped.data_ptr() - start if start is not None and in_order else None


def _in_order(tensors: Mapping[str, torch.Tensor]) -> dict[str, _Info]:
    """Shape and dtype of mapped tensors, in the order in which they lie in their file."""
    for name, tensor in tensors.items():
        dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not dense or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            kind = tensor.layout if type(tensor) is torch.Tensor else type(tensor).__name__
            raise TypeError(f"{name!r} is no ordinary, dense tensor ({kind}, {tensor.dtype}, {tensor.device})")
    names = sorted(tensors, key=lambda name: tensors[name].data_ptr())
    return {name: _Info(tuple(tensors[name].shape), tensors[name].dtype) for name in names}


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
        self.tensors: dict[str, _Info] = {
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
                return {path.name: self._opened(_Distributed, path)}, {}
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
        file, info = self._file_of[name], self.tensors[name]
        if isinstance(file, _Distributed):
            found: list[Part] = self._guarded(lambda: file.parts(name), name)
            return found
        return [] if info.offset is None else [Part(file.stored, info.offset, flat_box(0, math.prod(info.shape)))]

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
        _check_inside(indexed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(_unreadable(path, error)) from error
    return indexed


def _kind_of_file(path: Path) -> Callable[[Path], Any]:
    if path.suffix == ".safetensors":
        return _Safetensors
    if path.suffix in _TORCH_SUFFIXES or zipfile.is_zipfile(path):
        return _TorchFile
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

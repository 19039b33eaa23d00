"""Directories of torch.distributed.checkpoint: the metadata, and one tensor at a time, by one process alone.

Private: it may change with any version.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterable
from enum import EnumMeta
from pathlib import Path, PurePath
from typing import Any

import torch

from ..layout import Box, Window, contiguous_strides
from .formats import Info, Part
from .streaming import StoredFile


class DistributedCheckpoint:
    """The tensors of such a directory, read one by one.

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
        self.tensors: dict[str, Info] = {}
        self._parts: dict[str, dict[str, tuple[Any, ...]]] = {}
        for stored, keys in parts.items():
            self._parts.setdefault(keys[0], {})[stored] = keys
            info = infos[stored]
            if len(keys) == 1 and isinstance(info, TensorStorageMetadata):
                self.tensors[keys[0]] = Info(tuple(info.size), info.properties.dtype)
        self.objects = tuple(name for name in self._parts if name not in self.tensors)

    def _check_sizes(self) -> None:
        self._stored: dict[str, StoredFile] = {}
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        check_inside(ends)
        for name, end in ends.items():
            file = self._path / name
            if not file.is_file():
                raise FileNotFoundError(f"its file {name!r} does not exist")
            self._stored[name] = StoredFile.at(file)
            if file.stat().st_size < end:
                raise ValueError(f"its file {name!r} has {file.stat().st_size} bytes of at least {end}")
        self.files = list(self._stored.values())

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


def check_inside(names: Iterable[str]) -> None:
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

"""Files of tensors, safetensors' and torch's: their metadata, and one tensor at a time, mapped.

Reading is left to safetensors and torch. What lies in a file as in a contiguous tensor is known by its place there.

Private: it may change with any version.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..layout import Box, flat_box
from .streaming import StoredFile


class Info(NamedTuple):
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


class SafetensorsFile:
    """The tensors of one safetensors file, mapped."""

    is_mapped = True
    objects: tuple[str, ...] = ()
    versions = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._stored = StoredFile.at(path)
        self.files = [self._stored]
        self.tensors = self._infos()

    def _infos(self) -> dict[str, Info]:
        """Of all tensors, in their order in the file; from the header, which safetensors has checked."""
        file = self._opened()
        with self._path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        header.pop("__metadata__", None)
        # What a name of the format means is asked of safetensors, with one tensor of each.
        example = {entry["dtype"]: name for name, entry in header.items()}
        dtypes = {stored: file.get_tensor(name).dtype for stored, name in example.items()}
        infos = {}
        known = sys.byteorder == "little"
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            info = Info(tuple(entry["shape"]), dtypes[entry["dtype"]], 8 + length + start if known else None)
            # Two numbers of four bits are one element in torch, and two in the header.
            packed = info.nbytes != end - start
            infos[name] = info._replace(shape=tuple(file.get_tensor(name).shape)) if packed else info
        return infos

    def _opened(self) -> Any:
        if self._file is None:
            from safetensors import safe_open

            self._file = safe_open(self._path, framework="pt", device="cpu")
        return self._file

    def parts(self, name: str) -> list[Part]:
        return _one_part(self._stored, self.tensors[name])

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._opened().get_tensor(name)
        return tensor

    def close(self) -> None:
        self._file = None


class TorchFile:
    """The tensors of one file that torch.save has written, mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: Mapping[str, Any] | None = None
        self._stored = StoredFile.at(path)
        self.files = [self._stored]
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

    def parts(self, name: str) -> list[Part]:
        return _one_part(self._stored, self.tensors[name])

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._opened()[name].detach()
        return tensor

    def read_object(self, name: str) -> Any:
        return self._opened()[name]

    def close(self) -> None:
        self._values = None


def _one_part(file: StoredFile, info: Info) -> list[Part]:
    return [] if info.offset is None else [Part(file, info.offset, flat_box(0, math.prod(info.shape)))]


def _offset(mapped: torch.Tensor, start: int | None) -> int | None:
    """Where in the file that is mapped from `start` on the values of a tensor lie, if they lie there in order."""
    in_order = mapped.numel() and mapped.is_contiguous() and not mapped.is_conj() and not mapped.is_neg()
    return mapped.data_ptr() - start if start is not None and in_order else None


def _in_order(tensors: Mapping[str, torch.Tensor]) -> dict[str, Info]:
    """Shape and dtype of mapped tensors, in the order in which they lie in their file."""
    for name, tensor in tensors.items():
        dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not dense or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            kind = tensor.layout if type(tensor) is torch.Tensor else type(tensor).__name__
            raise TypeError(f"{name!r} is no ordinary, dense tensor ({kind}, {tensor.dtype}, {tensor.device})")
    names = sorted(tensors, key=lambda name: tensors[name].data_ptr())
    return {name: Info(tuple(tensors[name].shape), tensors[name].dtype) for name in names}

"""Tensors of a weight file to be, and the writing of such files piece by piece: safetensors, and torch's zip files.

An `Entry` is a name and the views (of mapped files) whose rows make up its tensor; nothing is read before it is
written, and then 1 MB at a time, so the size of a model does not matter. Knows no layout of names.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import checked_tensor

__all__ = ["Entry", "same_content", "write_safetensors", "write_torch"]

Progress = Callable[[int], object]  # told the bytes that were done since it was told last

_CHUNK = 1 << 20  # bytes; 16 MB is no faster and costs 50 to 90 MB of memory more
_ALIGNMENT = 64  # bytes, of every tensor in torch's files
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


@dataclass(frozen=True)
class Entry:
    """A tensor to write: the rows of `parts`, one after the other, as `dtype`."""

    name: str
    parts: tuple[Tensor, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, *parts: Tensor, dtype: torch.dtype | None = None) -> Entry:
        """In `dtype`, or as the first of `parts` is stored. Integers stay integers."""
        own = parts[0].dtype
        return cls(name, parts, dtype if dtype is not None and own.is_floating_point else own)

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0]
        return (sum(len(part) for part in self.parts), *first.shape[1:]) if first.dim() else ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[np.ndarray]:
        """The bytes of the tensor, in order.

        Raises:
            CheckpointError: NaN, infinity, or a number that the dtype cannot hold.
        """
        for part in self.parts:
            flat = part.reshape(-1)  # a view of contiguous rows; a copy of what was stored transposed
            for piece in flat.split(_CHUNK // max(self.dtype.itemsize, flat.dtype.itemsize)):
                yield self._converted(piece).contiguous().view(torch.uint8).numpy()

    def _converted(self, piece: Tensor) -> Tensor:
        if piece.is_floating_point():
            checked_tensor(piece, self.name, "the checkpoint")
        converted = piece.to(self.dtype)
        if piece.dtype != self.dtype == torch.float16 and not converted.isfinite().all():
            raise CheckpointError(f"{self.name!r} holds numbers beyond float16's 65504: use bfloat16 or float32")
        return converted


def write_safetensors(path: Path, entries: Sequence[Entry], progress: Progress = lambda count: None) -> None:
    """A safetensors file. OSError where it cannot be written."""
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))  # aligned, as the library does
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": _SAFETENSORS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            _copy(entry, file, progress)


def _copy(entry: Entry, file: BinaryIO | Any, progress: Progress) -> None:
    for chunk in entry.chunks():
        file.write(chunk.data)
        progress(chunk.nbytes)


@dataclass(frozen=True)
class _Storage:
    """Where the numbers of a tensor lie in the zip file: data/`key`."""

    key: str
    entry: Entry


class _Pickler(pickle.Pickler):
    """Writes every Entry as `torch.save` would write its tensor; `storages` are then to be written beside."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[_Storage] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return ("storage", _STORAGES[obj.entry.dtype], obj.key, "cpu", math.prod(obj.entry.shape))

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Entry):
            return NotImplemented
        storage = _Storage(str(len(self.storages)), obj)
        self.storages.append(storage)
        stride = tuple(math.prod(obj.shape[i + 1 :]) for i in range(len(obj.shape)))
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, stride, False, OrderedDict())


def write_torch(path: Path, content: dict[str, Any], progress: Progress = lambda count: None) -> None:
    """What `torch.save(content, path)` writes, where an Entry in `content` stands for its tensor. OSError as above."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(_record(archive, path, "data.pkl", stream.tell()), stream.getvalue())
        archive.writestr(_record(archive, path, "byteorder", 6), "little")
        for storage in pickler.storages:
            size = storage.entry.nbytes
            record = _record(archive, path, f"data/{storage.key}", size)
            with archive.open(record, "w", force_zip64=size >= 1 << 31) as file:
                _copy(storage.entry, file, progress)
        archive.writestr(_record(archive, path, "version", 2), "3\n")


def _record(archive: zipfile.ZipFile, path: Path, name: str, size: int) -> zipfile.ZipInfo:
    """A record whose content is aligned, so that the file can be mapped: torch's own padding, an extra field 'FB'."""
    record = zipfile.ZipInfo(f"{path.stem}/{name}")
    start = archive.start_dir + 30 + len(record.filename.encode()) + (20 if size >= 1 << 31 else 0) + 4
    padding = -start % _ALIGNMENT
    record.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return record


def same_content(entry: Entry, tensor: Tensor, progress: Progress = lambda count: None) -> bool:
    """Whether a tensor that was read back is, bit for bit, what the entry says."""
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        return False
    found = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    done = 0
    for chunk in entry.chunks():
        if not np.array_equal(found[done : done + chunk.nbytes], chunk):
            return False
        done += chunk.nbytes
        progress(chunk.nbytes)
    return True

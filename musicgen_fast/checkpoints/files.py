"""Files of a checkpoint as a lazy mapping from tensor name to tensor: safetensors, torch `.bin`, sharded or not.

Nothing here knows what the tensors mean. Names and shapes are known before any weight is read, so that every check can
come first; the tensors handed out may be views of the mapped file, so callers copy. A file that is no weight file
(empty, a git-lfs pointer, a web page) is named for what it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .pickled import load_pickle
from .xp_config import shown

__all__ = ["TensorFiles", "check_is_weights", "checked_tensor", "read_json"]

_JSON_LIMIT = 4 << 20  # bytes; a real config has 8 kB, the index of a sharded model 200 kB
_SHARING = 4  # tensors of a torch file may share memory (tied tables do), but not without end
_HEADER_LIMIT = 8 << 20  # bytes of a safetensors header; a released model has 60 to 200 kB


def check_is_weights(path: Path) -> None:
    """CheckpointError naming what `path` is, where it is plainly no weight file: missing, empty, a pointer, a page."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); download it again")
    with open(path, "rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights: the download failed; download it again")
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        shown = start[:40].decode("ascii").strip()
        raise CheckpointError(f"{path} is a text file (it starts with {shown!r}), not weights; download it again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: no JSON, or something else than an object.
    """
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, too many for a configuration file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: of JSON, of UTF-8, of 5000 digits
        if isinstance(error, CheckpointError):
            raise
        if path.is_file():
            text = path.read_bytes()[:64].lstrip()
            if text.startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{path} is a git-lfs pointer; run `git lfs pull` in its folder") from error
        raise CheckpointError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


_REAL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def checked_tensor(tensor: Tensor, name: str, label: str) -> Tensor:
    """`tensor` as it is. CheckpointError unless it holds finite numbers in a precision of weights."""
    if tensor.dtype not in _REAL:
        raise CheckpointError(f"{label}: {name!r} holds {tensor.dtype}, expected real numbers")
    if not _finite(tensor):
        raise CheckpointError(f"{label}: {name!r} holds NaN or infinity; the training diverged or the file is damaged")
    return tensor


def _finite(tensor: Tensor) -> bool:
    """In one pass, faster than isfinite: NaN and infinities survive a sum and an extremum (16 bit: 0.4 ns a number)."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        low, high = torch.aminmax(tensor) if tensor.numel() else (tensor.sum(), tensor.sum())
        return math.isfinite(low) and math.isfinite(high)
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


class TensorFiles(Mapping[str, Tensor]):
    """Tensors of one or several files by name, read when asked for.

    `label` is what messages call the whole; `where(name)` is the file of one tensor.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._files: dict[str, Path] = {}
        self._tensors: dict[str, Tensor] = {}
        self._handles: dict[Path, Any] = {}

    @classmethod
    def from_file(cls, path: Path) -> TensorFiles:
        """A `.safetensors` file, or a `.bin` that holds a flat dict of tensors."""
        files = cls(str(path))
        files._add_file(path)
        return files

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any], path: Path) -> TensorFiles:
        """Tensors already read from `path`; every value is checked."""
        files = cls(str(path))
        files._add_tensors(tensors, path)
        return files

    @classmethod
    def from_index(cls, index: Path, shards: Mapping[str, Path]) -> TensorFiles:
        """A sharded model: `index` is its `*.index.json`, `shards` where each of `shard_names(index)` lies."""
        files = cls(str(index))
        for path in shards.values():
            files._add_file(path)
        for name, shard in _weight_map(index).items():
            if files._files.get(name) != shards[shard]:
                raise CheckpointError(f"{shards[shard]} lacks {name!r}, which {index.name} promises to be there")
        return files

    def _add_file(self, path: Path) -> None:
        check_is_weights(path)
        if path.suffix != ".safetensors":
            self._add_tensors(load_pickle(path), path)
            return
        from safetensors import SafetensorError, safe_open

        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if _HEADER_LIMIT < header < path.stat().st_size:
            raise CheckpointError(f"{path}: its safetensors header has {header} bytes, no list of tensors is that long")
        try:
            handle = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a readable safetensors file ({error}): truncated or damaged; download it again"
            ) from error
        self._handles[path] = handle
        self._files.update(dict.fromkeys(handle.keys(), path))

    def _add_tensors(self, tensors: Any, path: Path) -> None:
        if not isinstance(tensors, Mapping):
            raise CheckpointError(f"{path} holds a {type(tensors).__name__}, expected a dict of tensors")
        size, total = path.stat().st_size, 0
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(f"{path}: {shown(name)} holds a {type(tensor).__name__}, expected a tensor")
            if tensor.device.type != "cpu" or tensor.is_quantized or tensor.layout.__str__() != "torch.strided":
                raise CheckpointError(f"{path}: {name!r} is not a plain dense tensor")
            total += tensor.numel() * tensor.element_size()
            if total > _SHARING * size:  # one number on disk can be a tensor of any shape, every stride 0
                raise CheckpointError(f"{path}: its tensors claim {total} bytes, the file has {size}")
            self._files[name] = path
            self._tensors[name] = tensor

    def where(self, name: str) -> str:
        """The file that holds `name`; the label where no file does."""
        return str(self._files.get(name, self.label))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        if name in self._tensors:
            return tuple(self._tensors[name].shape)
        return tuple(self._handles[self._files[name]].get_slice(name).get_shape())

    def release(self, name: str) -> None:
        """Forgets a tensor that was used for the last time, so that its memory can go."""
        self._tensors.pop(name, None)
        self._files.pop(name, None)

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        if name in self._tensors:
            return self._tensors[name]
        from safetensors import SafetensorError

        try:
            return self._handles[path].get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {name!r} cannot be read ({error}); download it again") from error

    def real(self, name: str) -> Tensor:
        """A tensor as stored. CheckpointError unless it holds finite numbers in a precision of weights."""
        return checked_tensor(self[name], name, self.where(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files


def _weight_map(index: Path) -> dict[str, str]:
    """name -> shard file name of an index, with file names that stay inside the folder."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{index} has no 'weight_map'; it is not the index of a sharded model")
    for name, shard in mapping.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: the shard of {name!r} is {shown(shard)}, expected a plain file name")
    return mapping


def shard_names(index: Path) -> Iterable[str]:
    """File names of the shards that an index lists, each once, in order."""
    return dict.fromkeys(_weight_map(index).values())

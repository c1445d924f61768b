"""Reading `.bin` files (pickles inside a zip) without ever running what they contain.

`torch.load(weights_only=True)` builds tensors and plain containers only. Some published files also carry OmegaConf
nodes and numpy scalars (a configuration that was pickled whole); those names resolve to `Inert`, a class that stores
what it is given and does nothing, so such files load and neither omegaconf nor numpy code runs. Any other global is
refused, by `pickle_check.py` before torch sees the file. There is no second attempt with `weights_only=False`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .pickle_check import check_pickle

__all__ = ["load_pickle", "plain_config"]

_LOCK = threading.Lock()  # torch keeps its allow list in a process-wide set


class Inert:
    """Stands in for a class or function of a pickle: keeps its arguments and state, runs nothing."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Inert:
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty_dict(*factory: Any) -> dict:
    """Stands in for `collections.defaultdict`: torch's reader fills exact dicts only."""
    return {}


_NAMES = {
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.base": ("ContainerMetadata", "Metadata", "Node", "Container", "SCMode"),
    "omegaconf.nodes": (
        *("AnyNode", "ValueNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "BytesNode"),
        *("PathNode", "EnumNode", "InterpolationResultNode"),
    ),
    "typing": ("Any", "Union", "Optional", "List", "Dict", "Tuple"),
    "builtins": ("dict", "list", "tuple", "str", "int", "float", "bool", "bytes", "object"),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "numpy": ("dtype", "ndarray", "bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "numpy.dtypes": ("Float16DType", "Float32DType", "Float64DType", "Int32DType", "Int64DType", "BoolDType"),
    "torch.torch_version": ("TorchVersion",),
}


def _stand_ins() -> list[Any]:
    """(object, dotted name) pairs in the form that `torch.serialization.safe_globals` takes: nothing is imported."""
    pairs = [(Inert, f"{module}.{name}") for module, names in _NAMES.items() for name in names]
    return [*pairs, (_empty_dict, "collections.defaultdict")]


def load_pickle(path: Path) -> Any:
    """The object stored in `path`, tensors mapped from the file where its format allows (zip, torch >= 1.6).

    Raises:
        CheckpointError: anything but tensors, plain containers and the stand-ins; a truncated or damaged file.
    """
    check_pickle(path, _NAMES)
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with _LOCK, torch.serialization.safe_globals(_stand_ins()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        lines = str(error).rpartition("WeightsUnpickler error: ")[2].strip().splitlines()
        shown = lines[0].split(". ")[0][:200] if lines else type(error).__name__
        raise CheckpointError(  # from None: torch's text advises to try weights_only=False
            f"{path} cannot be read as weights ({shown}): truncated, damaged or not a torch file; download it again"
        ) from None


_NODES = 100_000  # of a configuration: a real one has about a thousand


def plain_config(node: Any) -> Any:
    """Dicts, lists and scalars of a pickled OmegaConf tree (made of `Inert`); other values come back as they are.

    Raises:
        ValueError: a tree that is endless or doubles with every level, as references to shared nodes can make it.
    """
    left = [_NODES]

    def plain(node: Any, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > 100:
            raise ValueError("too many values, or nested too deeply")
        if isinstance(node, Inert):
            state = node.state[0] if isinstance(node.state, tuple) and node.state else node.state
            content = state.get("_content", state.get("_val")) if isinstance(state, dict) else None
            return plain(content, depth + 1)
        if isinstance(node, dict):
            return {key: plain(value, depth + 1) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return [plain(value, depth + 1) for value in node]
        return node

    return plain(node, 0)

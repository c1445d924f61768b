"""What a torch file may look like before torch's restricted reader sees it: a list of our own, and bounds on memory.

torch's list lets a pickle ask for memory (`bytearray(10**10)`, tensors of any size) and for slow checks (of sparse
tensors); weights need neither. A file in zip form holds its entries stored, one pickle among them, and no more bytes
than it has, so nothing unpacks to more than lies on disk. Nothing is unpickled here: the names that a pickle asks for
are read from its opcodes.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import CheckpointError

__all__ = ["check_pickle"]

_PICKLE_LIMIT = 1 << 20  # bytes: a released model has 60 to 150 kB, a training checkpoint a few times that
_LIST_LIMIT = 4 << 20  # bytes of a zip file's list of entries: 40000 tensors
_END = b"PK\x05\x06"
_LEGACY_PICKLES = 5  # magic number, protocol, system, object, keys of the storages

_TORCH = {
    "torch": ("Size", "device"),
    "torch._utils": ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"),
    "torch.nn.parameter": ("Parameter",),
    "torch.storage": ("_LegacyStorage",),
    "collections": ("OrderedDict", "Counter", "defaultdict"),
    "_codecs": ("encode",),
    "builtins": ("set", "complex"),
}
_DTYPES = (
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "half",
    "float",
    "double",
    "int32",
    "int64",
    "int8",
    "uint8",
    "bool",
)
# parts of what a training run stores about itself; such a file is meant to be converted, not read
_TRAINING = (
    "omegaconf",
    "dora",
    "flashy",
    "audiocraft",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "argparse",
)


def check_pickle(path: Path, stand_ins: Mapping[str, tuple[str, ...]]) -> None:
    """CheckpointError unless the torch file at `path` asks only for tensors, plain containers and `stand_ins`.

    Args:
        stand_ins: module -> names that the caller replaces by inert classes.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    try:
        names = _globals(io.BytesIO(_zipped_pickle(path)), 1) if start == b"PK\x03\x04" else _legacy(path)
        for module, name in names:  # one by one: code before the damage is named as code
            if not _allowed(module, name, stand_ins):
                raise _refused(path, module, name)
    except (zipfile.BadZipFile, ValueError, EOFError, IndexError, NotImplementedError, OSError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{path} cannot be read as weights ({reason}): truncated, damaged or not a torch file; download it again"
        ) from None


def _refused(path: Path, module: str, name: str) -> CheckpointError:
    asked = f"{module}.{name}"[:100]
    advice = "If you trust its author, ask for (or make) a safetensors file"
    if module.split(".")[0] in _TRAINING:
        advice = "It looks like a training checkpoint; if you made it: `musicgen-fast convert IN OUT --trust-pickle`"
    return CheckpointError(
        f"{path} was refused and nothing in it was run: its pickle asks for {asked}, which no weights need. {advice}"
    )


def _allowed(module: str, name: str, stand_ins: Mapping[str, tuple[str, ...]]) -> bool:
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # torch.save's Python 2
    if module == "torch" and (name in _DTYPES or (name.endswith("Storage") and name not in _BARE_STORAGES)):
        return True
    return name in _TORCH.get(module, ()) or name in stand_ins.get(module, ())


_BARE_STORAGES = ("UntypedStorage", "TypedStorage")  # torch calls these: memory of any size


def _globals(stream: io.BytesIO, pickles: int) -> Iterator[tuple[str, str]]:
    """(module, name) of every global that the next pickles of `stream` ask for, in either spelling of the opcode."""
    for _ in range(pickles):
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                yield module, name
            elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                yield "pickle", opcode.name  # torch does not write them, and its reader does not know them


def _legacy(path: Path) -> Iterator[tuple[str, str]]:
    """Of torch's format from before 1.6: pickles one after the other, then the bare bytes of the tensors."""
    with open(path, "rb") as file:
        start = file.read(_PICKLE_LIMIT)
    if start[:1] != b"\x80":
        raise ValueError("neither a zip file nor a pickle")
    yield from _globals(io.BytesIO(start), _LEGACY_PICKLES)


def _zipped_pickle(path: Path) -> bytes:
    """The one `data.pkl` of a torch file in zip form, whose entries are checked."""
    size = path.stat().st_size
    _check_list_of_entries(path, size)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("constants.pkl") for entry in entries):
            raise CheckpointError(f"{path} is a TorchScript program, which was refused and not run; give weights")
        if sum(entry.file_size for entry in entries) > size:
            raise CheckpointError(f"{path} claims to hold more bytes than it has: not made by torch.save, not unpacked")
        for entry in entries:
            if (
                entry.compress_type != zipfile.ZIP_STORED
                or entry.compress_size != entry.file_size
                or entry.flag_bits & 1
            ):
                raise CheckpointError(
                    f"{path}: {entry.filename[:80]!r} is compressed, as torch.save never does; download the file again"
                )
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"a zip file with {len(pickles)} entries named data.pkl")
        if pickles[0].file_size > _PICKLE_LIMIT:
            raise CheckpointError(
                f"{path}: its data.pkl has {pickles[0].file_size} bytes, no list of tensors is that long"
            )
        return archive.read(pickles[0])


def _check_list_of_entries(path: Path, size: int) -> None:
    """The list of entries can be read at once, and it ends the file: all readers find the same one."""
    with open(path, "rb") as file:
        file.seek(max(0, size - 98))  # 22 bytes, and before them the 76 of zip64
        tail = file.read()
    if len(tail) < 22 or tail[-22:-18] != _END:
        raise ValueError("no list of entries at its end")
    listed = int.from_bytes(tail[-10:-6], "little")
    if listed == 0xFFFFFFFF:
        if tail[:4] != b"PK\x06\x06":
            raise ValueError("no list of entries at its end")
        listed = int.from_bytes(tail[40:48], "little")
    if listed > _LIST_LIMIT:
        raise CheckpointError(f"{path}: its list of entries has {listed} bytes, too many for a model")

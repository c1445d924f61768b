"""A folder with packed weights: what the CPU decoder reads as it is, so that nobody needs the fp32 copy in memory.

    packed.json                the format's number, the precision and every configuration
    packed.safetensors         projections (float32), then the language model, bytes by canonical name in a step's order
    codec.safetensors          canonical names, float32
    text_encoder.safetensors   T5, float32, with spiece.model or tokenizer.json beside it
    style.safetensors          the style conditioner, float32

Codec and T5 stay views of the mapped files; the language model is copied once, into huge pages. Every field, name,
shape and dtype is checked before a byte is used. `musicgen_fast/packed_files.py` writes such folders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..codec import EnCodec
from ..config import CodecConfig, ModelConfig
from ..errors import CheckpointError
from ..packing import PackedWeights, packed_layout, place
from .checkpoint import Checkpoint, TextSource
from .files import TensorFiles
from .layout import Shape, expected_shapes, style_shapes
from .packed_settings import AGAIN, SETTINGS, Settings, read_settings
from .random_weights import ByteTokenizer
from .sources import Source, open_source
from .text import TOKENIZER_FILES, find_tokenizer, read_text_source, text_shapes

__all__ = ["CODEC", "LM", "STYLE", "TEXT", "load_packed", "save_tensors"]

LM, CODEC = "packed.safetensors", "codec.safetensors"
TEXT, STYLE = "text_encoder.safetensors", "style.safetensors"
_PROJECTIONS = ("text_proj.", "melody_proj.")
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file with the tensors in the order given: reading a model is then one stream.

    The library's own writer sorts by name. Tensors are float32 or uint8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # the data starts on a cache line
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def load_packed(
    source: Source,
    settings_path: Path,
    *,
    name: str,
    text_encoder: str | os.PathLike[str] | None,
    cache_dir: str | Path | None,
) -> Checkpoint:
    """A checkpoint whose language model is packed: `packed` is set and `lm` is empty.

    Args:
        settings_path: its packed.json, as found in `source`.

    Raises:
        CheckpointError: another format, a field that is missing, unknown or absurd, a file that does not fit it; or
            nothing here that could run it. MemoryError: no room.
    """
    settings = read_settings(settings_path)
    if not native.available():
        raise CheckpointError(f"{source.label} holds packed weights, which need the C++ extension: {native.why_not()}")
    config, codec_config = settings.config, settings.codec_config
    text = _text(source, settings, text_encoder, cache_dir)
    codec = _tensors(source, CODEC, _codec_shapes(codec_config, settings_path))
    style = None if config.style is None else _tensors(source, STYLE, style_shapes(config.style, config.dim))
    return Checkpoint(
        name=name,
        config=config,
        lm={},
        codec_config=codec_config,
        codec=codec,
        text=text,
        style=style,
        xp_cfg=settings.xp_cfg,
        packed=_language_model(source, config, settings.precision),
    )


# ---- weights


def _language_model(source: Source, config: ModelConfig, precision: str) -> PackedWeights:
    layout = packed_layout(config, precision)
    files = _open(source, LM)
    projections = [(n, shape) for n, shape in expected_shapes(config) if n.startswith(_PROJECTIONS)]
    if config.text is not None and config.text.dim == config.dim and "text_proj.weight" not in files:
        projections = [(n, shape) for n, shape in projections if not n.startswith("text_proj.")]  # the identity
    floats = {n: (torch.float32, shape) for n, shape in projections}
    stored = _checked(files, {**floats, **{n: (torch.uint8, (size,)) for n, _, size in layout}})
    projections_read = {n: stored[n].clone() for n in floats}
    del stored
    tensors = place(layout)
    _read_into(Path(files.label), tensors)
    formats = {n: form for n, form, _ in layout if form is not None}
    return PackedWeights(config, precision, tensors, formats, projections_read)


def _read_into(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill uint8 tensors with those of a checked file: plain reads in file order, no page of it mapped.

    A mapping keeps its pages in the process while they are copied (0.42 GB more at small's size) and faults on each.
    """
    with open(path, "rb", buffering=0) as file:
        start = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start))
        for name, tensor in tensors.items():
            file.seek(8 + start + header[name]["data_offsets"][0])
            left = memoryview(tensor.numpy().data)
            while len(left):
                count = file.readinto(left)
                if not count:
                    raise CheckpointError(f"{path} ends inside of {name}; {AGAIN}")
                left = left[count:]


def _open(source: Source, name: str) -> TensorFiles:
    path = source.find(name)
    if path is None:
        raise source.missing(name)
    return TensorFiles.from_file(path)


def _tensors(source: Source, name: str, shapes: Iterable[tuple[str, Shape]]) -> dict[str, Tensor]:
    """All of a file, float32, as views of it."""
    return _checked(_open(source, name), {n: (torch.float32, shape) for n, shape in shapes})


def _checked(files: TensorFiles, wanted: Mapping[str, tuple[torch.dtype, Shape]]) -> dict[str, Tensor]:
    """Exactly the tensors wanted, mapped and not read yet."""
    for problem, names in (("lacks", wanted.keys() - set(files)), ("has no use for", set(files) - wanted.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"{files.label} {problem} {shown}: it does not belong to its {SETTINGS}; {AGAIN}")
    found = {}
    for name, (dtype, shape) in wanted.items():
        tensor = found[name] = files[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise CheckpointError(
                f"{files.label}: {name} is {tensor.dtype} {list(tensor.shape)}, {SETTINGS} asks for {dtype} "
                f"{list(shape)}: the two do not belong together; {AGAIN}"
            )
    return found


def _codec_shapes(config: CodecConfig, path: Path) -> list[tuple[str, Shape]]:
    try:
        with torch.device("meta"):
            return [(name, tuple(tensor.shape)) for name, tensor in EnCodec(config).state_dict().items()]
    except (RuntimeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: codec_config describes no codec ({error}); {AGAIN}") from error


def _text(
    source: Source,
    settings: Settings,
    text_encoder: str | os.PathLike[str] | None,
    cache_dir: str | Path | None,
) -> TextSource | None:
    """The T5 of the folder or the one asked for (a folder with a tokenizer alone keeps this one)."""
    if settings.text is None:
        return None
    asked = None if text_encoder is None else open_source(text_encoder, cache_dir=cache_dir)
    if asked is not None and asked.find("config.json") is not None:
        return read_text_source(asked)
    tensors = _tensors(source, TEXT, text_shapes(settings.text, f"{source.label}: {SETTINGS}"))
    text = TextSource(config=settings.text, tensors=tensors, origin=source.label)
    if asked is None and settings.tokenizer == "bytes":
        text.tokenizer = ByteTokenizer()
    elif asked is not None or settings.tokenizer == "files":
        place = asked or source
        text.tokenizer_folder = find_tokenizer(place)
        if text.tokenizer_folder is None:
            raise place.missing(*TOKENIZER_FILES)
    return text

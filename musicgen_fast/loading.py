"""From a name to a running model: checkpoint, precision, device, conditioners, codec."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import native
from .arena import move_to_huge_pages
from .checkpoints import Checkpoint, load_checkpoint
from .codec import EnCodec, InterleaveStereo
from .conditioning import Conditioner
from .decoders.cpu_model import PackedTransformer
from .errors import CheckpointError
from .lm import LMModel
from .model import Transformer
from .packing import PACKED_PRECISIONS, pack_weights
from .quantised import quantise

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = (*DTYPES, "int8", "int4", "auto")


@dataclass
class Parts:
    """What a model class is made of."""

    name: str
    lm: LMModel
    codec: EnCodec | InterleaveStereo


def load_parts(
    name: str | Path,
    device: str | torch.device | None = None,
    text_encoder: str | Path | None = None,
    precision: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    style_encoder: str | Path | None = None,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
) -> Parts:
    """Load a checkpoint and build its parts; the arguments of `MusicGen.get_pretrained`."""
    device = pick_device(device)
    asked, precision = precision, pick_precision(precision, device)
    packed = packs(precision, device)
    # What is packed is rounded once, from what the file holds.
    dtype = None if packed and precision != "float32" else DTYPES.get(precision, torch.float16)
    checkpoint = load_checkpoint(
        name, text_encoder=text_encoder, dtype=dtype, revision=revision, cache_dir=cache_dir,
        base=base, adapter=adapter, adapter_scale=adapter_scale, stream=packed,
    )  # fmt: skip
    if checkpoint.packed is not None:
        precision = _own_precision(checkpoint.name, checkpoint.packed.precision, asked, device)
        packed = True
    transformer = _packed(checkpoint, precision) if packed else _unpacked(checkpoint, device, precision)
    conditioner = Conditioner(
        checkpoint.config,
        transformer,
        _text_encoder(checkpoint, device),
        _style(checkpoint, device, style_encoder),
    )
    minimal = {"dataset": {"segment_duration": checkpoint.config.max_duration}}
    lm = LMModel(transformer, conditioner, cfg=_Settings.of(checkpoint.xp_cfg or minimal))
    return Parts(checkpoint.name, lm, _codec(checkpoint, device))


class _Settings(dict):
    """A checkpoint's training configuration, read as `cfg.dataset.segment_duration` or by key, as scripts do."""

    @classmethod
    def of(cls, value: Any) -> Any:
        return cls({k: cls.of(v) for k, v in value.items()}) if isinstance(value, dict) else value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or 'cuda' where there is one. ValueError for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: {error}") from None
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU; use device='cpu' or install a CUDA torch")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} was asked for, but there are {torch.cuda.device_count()} GPUs, from cuda:0"
        )
    return picked


def pick_precision(precision: str | None, device: torch.device) -> str:
    """The precision asked for; None: float32 on a CPU (exact) and float16 on a GPU; 'auto': int8 on a CPU that can.

    ValueError for one that is unknown, or that nothing here can run.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if device.type != "cpu":
        if precision == "int4" or (precision == "int8" and device.type != "cuda"):
            raise ValueError(f"precision {precision!r} does not run on {device.type}; take 'float16'")
        return "float16" if precision in (None, "auto") else precision
    if precision == "auto":
        return "int8" if native.available() else "float32"
    if precision in ("int8", "int4") and not native.available():
        raise ValueError(f"precision {precision!r} needs the C++ extension: {native.why_not()}")
    return precision or "float32"


def packs(precision: str, device: torch.device) -> bool:
    """Whether the CPU decoder serves, which packs weights; MUSICGEN_FAST_DECODER=torch takes the torch decoder.

    What torch can run too it runs where the kernels would be plain C++ (processors without AVX2): there its BLAS is
    the better one.
    """
    if device.type != "cpu" or precision not in PACKED_PRECISIONS or not native.available():
        return False
    if precision not in DTYPES:
        return True
    asked = os.environ.get("MUSICGEN_FAST_DECODER", "")
    return asked == "cpu" or (asked != "torch" and native.extension().linear_isas()[-1] != "baseline")


def _own_precision(name: str, held: str, asked: str | None, device: torch.device) -> str:
    """The precision of a file whose weights are packed: the only one that it can be served with, on a CPU."""
    if device.type != "cpu":
        raise CheckpointError(
            f"{name} holds {held} weights packed for a CPU; take device='cpu', or the original checkpoint on {device}"
        )
    if asked not in (None, "auto", held):
        raise CheckpointError(
            f"{name} holds weights packed as {held}; for precision={asked!r} load the original checkpoint, or convert "
            f"it again (musicgen-fast convert --to packed)"
        )
    return held


def _packed(checkpoint: Checkpoint, precision: str) -> PackedTransformer:
    if precision == "int4":
        log.warning("int4 keeps 4 bits of each weight: other music, and mostly worse; int8 is the safe one")
    try:
        packed = checkpoint.packed or pack_weights(checkpoint.config, checkpoint.lm, precision)
        return PackedTransformer(packed)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from None


def _unpacked(checkpoint: Checkpoint, device: torch.device, precision: str) -> Transformer:
    transformer = Transformer.from_weights(checkpoint.config, checkpoint.lm).to(device)
    checkpoint.lm.clear()  # the only other owner: from here on each matrix is freed as it is moved
    if precision == "int8":
        quantise(transformer)
    if device.type == "cpu":
        move_to_huge_pages(transformer)
    return transformer


def _text_encoder(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The text encoder, or None with a warning where the files came without a tokenizer: texts raise then, clearly."""
    source = checkpoint.text
    if source is None:
        return None
    if source.tokenizer is None and source.tokenizer_folder is None:
        log.warning("%s has no tokenizer files (spiece.model or tokenizer.json): it cannot read texts", source.origin)
        return None
    from .conditioning.text import TextEncoder, TextTokenizer, build_t5

    tokenizer: Any = source.tokenizer
    what = f"{source.tokenizer_folder}: its vocabulary"
    try:  # other people's constructors, on fields that they first look at now: they may raise anything
        if source.tokenizer_folder is not None:
            tokenizer = TextTokenizer.load(source.tokenizer_folder)
        what = f"{source.origin}: the text encoder's configuration"
        t5 = build_t5(source.config, source.tensors, device)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} cannot be used ({error})") from error
    return TextEncoder(t5, tokenizer, device)


def _style(checkpoint: Checkpoint, device: torch.device, style_encoder: str | Path | None) -> Any:
    """The style conditioner. MERT (named, in mert/ beside the model, or the hub's) is loaded at the first waveform."""
    config = checkpoint.config.style
    if checkpoint.style is None or config is None:
        return None
    from .conditioning.style import StyleConditioner

    beside = Path(checkpoint.name) / "mert"
    mert = style_encoder or (beside if beside.is_dir() else config.feature_name)
    config = replace(config, feature_name=str(mert))
    return StyleConditioner.from_weights(config, checkpoint.config.dim, checkpoint.style).to(device)


def _codec(checkpoint: Checkpoint, device: torch.device) -> EnCodec | InterleaveStereo:
    with torch.device("meta"):
        codec = EnCodec(checkpoint.codec_config)
    codec.load_state_dict(checkpoint.codec, strict=True, assign=True)
    codec.eval().requires_grad_(False).to(device)
    config = checkpoint.config
    stereo = config.audio_channels == 2
    wanted = config.num_codebooks // (2 if stereo else 1)
    if wanted > codec.num_codebooks:
        raise CheckpointError(
            f"{checkpoint.name}: the language model writes {wanted} codebooks per channel, "
            f"its codec has {codec.num_codebooks}"
        )
    if wanted < codec.num_codebooks:
        codec.set_num_codebooks(wanted)
    return InterleaveStereo(codec) if stereo else codec

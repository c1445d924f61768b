"""What people take for a MusicGen and is none: recognised by its files or by the names of its tensors, refused by name.

Models of audiocraft that say in their configuration what they are belong to `audiocraft_config.py`. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import CheckpointError
from .files import read_json
from .sources import Source
from .xp_config import shown

__all__ = ["other_folder", "other_model_type", "other_tensors"]

_ONLY = "only MusicGen and AudioGen models are supported"
ENCODEC = "EnCodec, a codec alone (no language model)"
_MODEL_TYPES = {
    "encodec": ENCODEC,
    "dac": "DAC, a codec alone (no language model)",
    "t5": "a T5 text encoder alone",
    "musicgen_decoder": "the decoder of a MusicGen alone, without codec and text encoder",
    "musicgen_melody_decoder": "the decoder of a MusicGen Melody alone, without codec and text encoder",
}
_PIPELINES = {"StableAudio": "Stable Audio", "AudioLDM": "AudioLDM", "MusicLDM": "MusicLDM"}
# beginnings of tensor names in single files
_TENSORS = (
    (("pretransform.", "model.model.transformer.", "conditioner.conditioners."), "Stable Audio (latent diffusion)"),
    (("model.diffusion_model.", "first_stage_model.", "cond_stage_model."), "AudioLDM (latent diffusion)"),
    (("encoder.model.0.conv.", "quantizer.vq.layers.", "encoder.layers.0.conv."), ENCODEC),
    (("condition_provider.conditioners.chords.", "condition_provider.conditioners.melody."), "JASCO (flow matching)"),
)


def other_model_type(model_type: Any, label: str, expected: str) -> CheckpointError:
    """The error for a config.json of another family."""
    known = _MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    if known is not None:
        return CheckpointError(f"{label}model_type is {model_type!r}: the checkpoint is {known}; {_ONLY}")
    return CheckpointError(f"{label}model_type is {shown(model_type)}, expected {expected}; {_ONLY}")


def other_folder(source: Source) -> CheckpointError | None:
    """The error for a folder that holds a model of another kind; None for one that holds nothing known."""
    index = source.find("model_index.json")
    if index is not None:
        pipeline = read_json(index).get("_class_name")
        names = (name for start, name in _PIPELINES.items() if str(pipeline).startswith(start))
        known = next(names, f"a {shown(pipeline)} of diffusers")
        return CheckpointError(f"{index}: the checkpoint is {known}; {_ONLY}")
    settings = source.find("model_config.json")
    if settings is not None:
        raw = read_json(settings)
        known = "Stable Audio" if "diffusion" in str(raw.get("model_type")) else f"a {shown(raw.get('model_type'))}"
        return CheckpointError(f"{settings}: the checkpoint is {known} (stable-audio-tools); {_ONLY}")
    if source.find("compression_state_dict.bin") is not None:
        return CheckpointError(f"{source.label} holds a codec alone (compression_state_dict.bin); {_ONLY}")
    return None


def other_tensors(names: Iterable[str], label: str) -> CheckpointError | None:
    """The error for a file whose tensors are those of another family, by their names."""
    names = list(names)
    for starts, family in _TENSORS:
        if any(name.startswith(starts) for name in names):
            return CheckpointError(f"{label}: the checkpoint is {family}; {_ONLY}")
    return None

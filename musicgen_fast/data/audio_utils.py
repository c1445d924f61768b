"""The import path `audiocraft.data.audio_utils`: rates, channels, PCM and levels.

Only names from `musicgen_fast.audio`; audiocraft's training augmentations (`get_mp3`, `get_aac`) are left out.
"""

from __future__ import annotations

from ..audio import (
    convert_audio,
    convert_audio_channels,
    f32_pcm,
    i16_pcm,
    normalize_audio,
    normalize_loudness,
)

__all__ = [
    "convert_audio",
    "convert_audio_channels",
    "f32_pcm",
    "i16_pcm",
    "normalize_audio",
    "normalize_loudness",
]

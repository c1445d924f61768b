"""The import path `audiocraft.data.audio`: reading and writing files.

Only names from `musicgen_fast.audio`, so that a script runs with its import renamed.
"""

from __future__ import annotations

from ..audio import AudioFileInfo, audio_info, audio_read, audio_write, f32_pcm, normalize_audio

__all__ = ["AudioFileInfo", "audio_info", "audio_read", "audio_write", "f32_pcm", "normalize_audio"]

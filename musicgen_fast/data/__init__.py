"""audiocraft's import paths for sound: `musicgen_fast.data.audio` and `musicgen_fast.data.audio_utils`.

Nothing is defined here; the code is in `musicgen_fast.audio` and `musicgen_fast.loudness`.
"""

from __future__ import annotations

from . import audio, audio_utils

__all__ = ["audio", "audio_utils"]

"""musicgen_fast: MusicGen at the speed of the memory; the same API and the same tokens as audiocraft.

    from musicgen_fast import MusicGen, audio_write
    model = MusicGen.get_pretrained("facebook/musicgen-small")
    wav = model.generate(["lofi beat with warm piano"], seed=7)
    audio_write("lofi", wav[0].cpu(), model.sample_rate, strategy="loudness")

Names are imported when they are first used, so that `import musicgen_fast` costs little beyond torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .audio import audio_read, audio_write
    from .audiogen import AudioGen
    from .config import GenerationParams
    from .errors import CheckpointError
    from .live import accelerate, unaccelerate
    from .musicgen import MusicGen
    from .sampling import filtered_probs, sample

__version__ = "0.1.0"
__all__ = [
    "AudioGen",
    "CheckpointError",
    "GenerationParams",
    "MusicGen",
    "accelerate",
    "audio_read",
    "audio_write",
    "filtered_probs",
    "sample",
    "unaccelerate",
]

_HOME = {
    "AudioGen": "audiogen",
    "CheckpointError": "errors",
    "GenerationParams": "config",
    "MusicGen": "musicgen",
    "accelerate": "live",
    "audio_read": "audio",
    "audio_write": "audio",
    "filtered_probs": "sampling",
    "sample": "sampling",
    "unaccelerate": "live",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

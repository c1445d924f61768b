"""audiocraft's import path: `from musicgen_fast.models import MusicGen, AudioGen`."""

from .audiogen import AudioGen
from .codec import EnCodec as EncodecModel
from .lm import LMModel
from .musicgen import MusicGen

__all__ = ["AudioGen", "EncodecModel", "LMModel", "MusicGen"]

"""Sounds for the tests of `musicgen_fast.audio`, `audio_encode` and `loudness`: seeded noise and sines [C, T] or [T].

Also audiocraft's own `data/audio_utils.py` for comparison, where it is installed.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

RATE = 32000
FORMATS = ("wav", "flac", "ogg", "mp3")
STRATEGIES = ("peak", "clip", "rms", "loudness", "none")


def noise(channels: int = 1, seconds: float = 1.0, level: float = 0.1, rate: int = RATE) -> torch.Tensor:
    """White noise [C, T] within +-1, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(channels, int(seconds * rate), generator=generator) * level).clamp(-0.999, 0.999)


def sine(hertz: float, seconds: float = 1.0, rate: int = RATE, level: float = 1.0) -> torch.Tensor:
    """A float64 sine [T]."""
    return level * torch.sin(torch.arange(int(seconds * rate), dtype=torch.float64) * (2 * math.pi * hertz / rate))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def load_audiocraft_utils(
    monkeypatch: pytest.MonkeyPatch, measure: Callable[[torch.Tensor, int], float]
) -> types.ModuleType:
    """audiocraft's data/audio_utils.py alone, since its package wants av. torchaudio, which the file needs for
    loudness only, is replaced by a stub that answers with `measure`. Skips where audiocraft or julius is missing."""
    spec = importlib.util.find_spec("audiocraft")
    if spec is None or importlib.util.find_spec("julius") is None:
        pytest.skip("audiocraft and julius are not installed: nothing to compare with")
    stub = types.ModuleType("torchaudio")
    stub.transforms = types.SimpleNamespace(Loudness=lambda rate: lambda wav: torch.tensor(measure(wav, rate)))
    monkeypatch.setitem(sys.modules, "torchaudio", stub)
    path = Path(spec.submodule_search_locations[0]) / "data" / "audio_utils.py"
    file_spec = importlib.util.spec_from_file_location("their_audio_utils", path)
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    return module

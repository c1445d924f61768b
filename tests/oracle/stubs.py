"""Stand-ins for what audiocraft imports but MusicGen inference on tiny models never needs.

`tts-webui-audiocraft` is installed without its dependencies (its pins fit neither current torch nor Python), so
torchaudio, xformers, librosa, spacy and others are missing. Each is replaced only where it is not importable.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types

import torch
from torch import nn


def _stub(name: str, **attributes) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    module.__path__ = []
    module.__dict__.update(attributes)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


def _missing(name: str) -> bool:
    if name in sys.modules:
        return False
    try:
        importlib.import_module(name)
    except Exception:  # absent, or there but broken (a torchaudio of another torch)
        for key in [k for k in sys.modules if k == name or k.startswith(name + ".")]:
            del sys.modules[key]
        return True
    return False


class Spectrogram(nn.Module):
    """As much of torchaudio.transforms.Spectrogram as audiocraft's chromagram uses."""

    def __init__(self, n_fft=400, win_length=None, hop_length=None, pad=0, power=2.0, normalized=False, center=True):
        super().__init__()
        self.n_fft, self.hop, self.win = n_fft, hop_length, win_length or n_fft
        self.power, self.normalized, self.center = power, normalized, center
        self.register_buffer("window", torch.hann_window(self.win))

    def forward(self, x):
        spectrum = torch.stft(
            x.reshape(-1, x.shape[-1]), self.n_fft, self.hop, self.win, self.window,
            center=self.center, pad_mode="reflect", return_complex=True,
        )  # fmt: skip
        spectrum = spectrum.reshape(x.shape[:-1] + spectrum.shape[-2:])
        if self.normalized:
            spectrum = spectrum / self.window.pow(2.0).sum().sqrt()
        return spectrum.abs().pow(self.power)


def _chroma(*, sr, n_fft, n_chroma=12, tuning=0.0):
    from transformers.audio_utils import chroma_filter_bank

    bank = chroma_filter_bank(num_frequency_bins=n_fft, num_chroma=n_chroma, sampling_rate=sr, tuning=tuning)
    return bank.astype("float32")


def install() -> None:
    """Fake what is missing. transformers comes first: it probes for torchaudio and librosa when it is imported."""
    from transformers import AutoModel, EncodecModel, RobertaTokenizer, T5EncoderModel, T5Tokenizer  # noqa: F401

    if _missing("torchaudio"):
        _stub("torchaudio")
        _stub("torchaudio.transforms", Spectrogram=Spectrogram)
        _stub("torchaudio.functional")
    if _missing("xformers"):
        _stub("xformers")
        mask = type("LowerTriangularMask", (), {})
        _stub("xformers.ops", unbind=torch.unbind, LowerTriangularMask=mask, memory_efficient_attention=None)
        profiler = types.SimpleNamespace(_Profiler=types.SimpleNamespace(_CURRENT_PROFILER=None))
        _stub("xformers.profiler", profiler=profiler)
    for name in ("av", "torchdiffeq", "spacy"):
        if _missing(name):
            _stub(name)
    if _missing("librosa"):
        _stub("librosa")
        _stub("librosa.filters", chroma=_chroma)
    # audiocraft.models imports every solver (losses, metrics, adversarial training) for a class it needs only to read
    # training checkpoints of codecs
    _stub("audiocraft.solvers")
    _stub("audiocraft.solvers.compression", CompressionSolver=type("CompressionSolver", (), {}))
    if _missing("demucs"):

        class Demucs(nn.Module):
            sources, samplerate, audio_channels = ["drums", "bass", "other", "vocals"], 32000, 1

        _stub("demucs")
        _stub("demucs.pretrained", get_model=lambda name: Demucs())

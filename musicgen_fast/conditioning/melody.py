"""A melody to its chromagram: stems by demucs, spectrogram, twelve pitch classes, the strongest of each frame.

Equal to audiocraft's `ChromaStemConditioner` and `ChromaExtractor` at batch 1, frame for frame. Knows nothing about
the projection to model width or about windows: a caller that generates past the model's window passes the part of
the waveform that belongs to each window.
Shapes: wav [C, T] samples; chroma [frames, 12], a frame every n_fft / 4 samples (128 ms in the released models).
"""

from __future__ import annotations

import random
import threading
from typing import Any

import torch
from torch import Tensor

from ..config import MelodyConfig

__all__ = [
    "ChromaExtractor",
    "chroma_filters",
    "fit_length",
    "load_demucs",
    "melody_chroma",
    "null_chroma",
    "separate_stems",
]

_DEMUCS_MISSING = (
    'separating the melody from drums and bass needs demucs: pip install "musicgen-fast[melody]", '
    "or pass separate=False to take the melody from the mix as it is"
)
_random_lock = threading.Lock()  # of those who swap the state of Python's global generator below


def chroma_filters(sample_rate: int, n_fft: int, n_chroma: int = 12) -> Tensor:
    """Weights [n_chroma, n_fft // 2 + 1] float32 from a power spectrum at `sample_rate` Hz to pitch classes, bin 0 = C.

    transformers' filter bank: bit-equal to librosa 0.11's `filters.chroma(tuning=0)`, which audiocraft uses.
    """
    from transformers.audio_utils import chroma_filter_bank

    bank = chroma_filter_bank(num_frequency_bins=n_fft, num_chroma=n_chroma, sampling_rate=sample_rate, tuning=0.0)
    return torch.from_numpy(bank).float()


class ChromaExtractor:
    """Waveforms to chromagrams (audiocraft `ChromaExtractor`, inf norm); float32 on `device`.

    With `config.argmax` each frame is one-hot at its strongest pitch class; a silent frame then gets bin 0, which is
    what the models were trained on. Without, frames are scaled to a largest value of 1 and silent ones are zero.
    """

    def __init__(self, config: MelodyConfig, device: str | torch.device = "cpu"):
        self.config = config
        self.n_fft = 2**config.radix2_exp
        self.filters = chroma_filters(config.sample_rate, self.n_fft, config.n_chroma).to(device)
        self.window = torch.hann_window(self.n_fft, device=device)

    def __call__(self, wav: Tensor) -> Tensor:
        """[B, T] mono at `config.sample_rate` -> [B, frames, n_chroma] with T // hop + 1 frames.

        Fewer than n_fft samples are padded with silence on both sides to n_fft: five frames. ValueError for other
        shapes.
        """
        if wav.dim() != 2:
            raise ValueError(f"expected mono waveforms [B, T], got shape {tuple(wav.shape)}")
        lacking = max(self.n_fft - wav.shape[-1], 0)
        wav = torch.nn.functional.pad(wav.to(self.window), (lacking // 2, lacking - lacking // 2))
        with torch.no_grad(), torch.autocast(wav.device.type, enabled=False):
            hop = self.n_fft // 4  # torch.stft centres its frames and pads by reflection unless told otherwise
            spectrum = torch.stft(wav, self.n_fft, hop, window=self.window, return_complex=True)
            power = (spectrum / self.window.square().sum().sqrt()).abs().square()
            chroma = (self.filters @ power).transpose(1, 2)
            chroma = chroma / chroma.amax(-1, keepdim=True).clamp_min(1e-6)
            if self.config.argmax:
                chroma = torch.nn.functional.one_hot(chroma.argmax(-1), self.config.n_chroma).float()
        return chroma


def fit_length(chroma: Tensor, length: int) -> Tensor:
    """chroma [frames, n] -> [length, n]: longer is cut, shorter starts over as often as needed; ValueError for none."""
    if len(chroma) == 0:
        raise ValueError("a chromagram needs at least one frame")
    return chroma.repeat(-(-length // len(chroma)), 1)[:length]


def null_chroma(config: MelodyConfig) -> Tensor:
    """Chroma [chroma_length, n_chroma] of no melody: that of silence, so one-hot at bin 0 where argmax is on."""
    chroma = torch.zeros(config.chroma_length, config.n_chroma)
    if config.argmax:
        chroma[:, 0] = 1.0
    return chroma


def load_demucs(device: str | torch.device = "cpu") -> Any:
    """The separation model (demucs' `htdemucs`, 80 MB from its own cache); ImportError says what to install."""
    try:
        from demucs.pretrained import get_model
    except ImportError as error:
        raise ImportError(_DEMUCS_MISSING) from error
    return get_model("htdemucs").to(device).eval()


def separate_stems(
    wav: Tensor, sample_rate: int, device: str | torch.device = "cpu", seed: int | None = None, demucs: Any = None
) -> Tensor:
    """What carries the melody, vocals and other, summed: wav [C, T] -> mono [1, T'], both at `sample_rate` Hz.

    The result lies on `device`.

    Args:
        seed: demucs moves its input by a random time drawn from Python's global `random`. None lets it (audiocraft's
            behaviour); a seed makes the draw that of `random.Random(seed)` and leaves the global generator as it was.
        demucs: what `load_demucs` returned; None loads it for this call.

    ImportError where demucs is not installed.
    """
    model = load_demucs(device) if demucs is None else demucs
    try:
        from demucs.apply import apply_model
        from demucs.audio import convert_audio
    except ImportError as error:
        raise ImportError(_DEMUCS_MISSING) from error

    device = torch.device(device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        mix = convert_audio(wav[None].to(device).float(), sample_rate, model.samplerate, model.audio_channels)
        if seed is None:
            stems = apply_model(model, mix, device=device)  # [1, sources, C, T]
        else:
            with _random_lock:
                state = random.getstate()
                random.seed(seed)
                try:
                    stems = apply_model(model, mix, device=device)
                finally:
                    random.setstate(state)
        melody = stems[:, [model.sources.index("vocals"), model.sources.index("other")]].sum(1)
        return convert_audio(melody, model.samplerate, sample_rate, 1)[0]


def melody_chroma(
    wav: Tensor | None,
    sample_rate: int,
    config: MelodyConfig,
    *,
    separate: bool = True,
    device: str | torch.device = "cpu",
    seed: int | None = None,
    demucs: Any = None,
    extractor: ChromaExtractor | None = None,
) -> Tensor:
    """Chromagram [chroma_length, n_chroma] float32 on `device` of a melody `wav` [C, T] at `sample_rate` Hz.

    audiocraft's order: rate and channels are converted first, then the stems are separated, then comes the chromagram,
    cut or repeated to the length that the model was trained with. None and a single sample (audiocraft's sign for
    "none") give `null_chroma`.

    Args:
        separate: False takes the mix as it is and needs no demucs.
        seed, demucs: see `separate_stems`.
        extractor: reused where given; it must have been made for `config` and `device`.

    Raises:
        ValueError: not [C, T], no samples, NaN or infinite ones. ImportError: demucs is needed and missing.
    """
    if wav is None or wav.shape[-1] == 1:
        return null_chroma(config).to(device)
    if wav.dim() != 2 or wav.numel() == 0:
        raise ValueError(f"a melody must be a waveform [channels, samples], got shape {tuple(wav.shape)}")
    if not torch.isfinite(wav).all():
        raise ValueError("the melody holds NaN or infinite samples")
    from ..audio import convert_audio

    mono = convert_audio(wav.to(device).float(), sample_rate, config.sample_rate, 1)
    if separate:
        mono = separate_stems(mono, config.sample_rate, device, seed, demucs)
    extractor = ChromaExtractor(config, device) if extractor is None else extractor
    return fit_length(extractor(mono)[0], config.chroma_length)

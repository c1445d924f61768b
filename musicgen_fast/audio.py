"""Sound in and out: files, sample rates, channels, PCM. The names and numbers are audiocraft's (`data/audio.py`).

libsndfile is the only codec library (wav, flac, ogg, mp3; reads opus too), julius resamples; no ffmpeg, no torchaudio.
A waveform is a float tensor [C, T] within +-1. Levels are in `loudness.py`, encoders in `audio_encode.py`. Nothing here
knows about models.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from .audio_encode import BLOCK_FRAMES, FORMATS, check_format, clean_tags, encode, replacing
from .loudness import loudness, normalize_audio, normalize_loudness

__all__ = [
    "AudioFileInfo",
    "audio_info",
    "audio_read",
    "audio_write",
    "convert_audio",
    "convert_audio_channels",
    "f32_pcm",
    "i16_pcm",
    "loudness",
    "normalize_audio",
    "normalize_loudness",
]

MAX_READ_SAMPLES = 2**29  # 2 GiB of float32, 93 minutes of 48 kHz stereo: a crafted flac can unpack to far more
_MAX_FILTER = 2**26  # floats in the resampling filters: 256 MB; 44.1 <-> 48 kHz needs 2**14
_UNKNOWN_FRAMES = 2**62  # headers of streamed or torn flac files claim 2**63 - 1


@dataclass(frozen=True)
class AudioFileInfo:
    """Facts from the header of a file: `sample_rate` in Hz, `duration` in seconds, `channels`."""

    sample_rate: int
    duration: float
    channels: int


class _Source(soundfile.SoundFile):
    """soundfile seeks after every read, which fails at the end of a flac of unknown length; we only read forward."""

    def seekable(self) -> bool:
        return False


def _open(filepath: str | Path) -> _Source:
    with open(filepath, "rb"):  # says missing, folder or no permission in Python's words; libsndfile does not
        pass
    try:
        return _Source(str(filepath))
    except (soundfile.LibsndfileError, TypeError) as error:
        raise ValueError(
            f"cannot read {filepath} as audio ({error}); wav, flac, ogg, opus and mp3 are read, convert others first"
        ) from error


def _read_block(file: _Source, frames: int, done: int) -> np.ndarray:
    """Up to `frames` frames as float32 [n, C]; n = 0 at the end."""
    try:
        block: np.ndarray = file.read(frames, dtype="float32", always_2d=True)
        return block
    except soundfile.LibsndfileError as error:
        seconds = done / file.samplerate
        raise ValueError(f"{file.name} is damaged: decoding stopped after {seconds:.2f} s ({error})") from error


def audio_info(filepath: str | Path) -> AudioFileInfo:
    """Sample rate, duration and channels. Files without a length in the header are decoded to count it.
    FileNotFoundError, or ValueError for what is not audio. Source: audiocraft `audio_info`.
    """
    with _open(filepath) as file:
        frames = file.frames
        if frames >= _UNKNOWN_FRAMES:
            frames = 0
            while block := len(_read_block(file, BLOCK_FRAMES, frames)):
                frames += block
        return AudioFileInfo(file.samplerate, frames / file.samplerate, file.channels)


def audio_read(
    filepath: str | Path, seek_time: float = 0.0, duration: float = -1.0, pad: bool = False
) -> tuple[torch.Tensor, int]:
    """Read (wav [C, T] float32, rate in Hz) of `filepath` from `seek_time` seconds on; `duration` <= 0: to the end.

    `pad` adds zeros to int(duration * rate) frames. Memory follows what is decoded, not headers; 2**29 samples at most.
    FileNotFoundError, or ValueError (not audio, damaged, too long, seek past the end). As audiocraft `audio_read`.
    """
    if seek_time < 0:
        raise ValueError(f"seek_time must not be negative, got {seek_time}")
    with _open(filepath) as file:
        rate, channels = file.samplerate, file.channels
        start = int(seek_time * rate)
        wanted = int(duration * rate) if duration > 0 else None
        limit = MAX_READ_SAMPLES // channels
        if pad and wanted is not None and wanted > limit:
            raise ValueError(f"duration {duration} s is more than {MAX_READ_SAMPLES} samples; ask for less")
        past_end = f"seek_time {seek_time} s is past the end of {filepath}"
        if start:
            if start >= file.frames:
                raise ValueError(past_end)
            try:
                file.seek(start)
            except soundfile.LibsndfileError as error:
                raise ValueError(f"cannot seek to {seek_time} s in {filepath}: {error}") from error
        blocks, done = [], 0
        while wanted is None or done < wanted:
            block = _read_block(file, BLOCK_FRAMES if wanted is None else min(BLOCK_FRAMES, wanted - done), done)
            if not len(block):
                break
            done += len(block)
            if done > limit:
                raise ValueError(
                    f"{filepath} holds more than {limit / rate:.0f} s; read parts of it with seek_time and duration"
                )
            blocks.append(torch.from_numpy(np.ascontiguousarray(block.T)))
    if start and wanted != 0 and not done:
        raise ValueError(past_end)
    wav = torch.cat(blocks, dim=1) if blocks else torch.zeros(channels, 0)
    if pad and wanted is not None:
        wav = torch.nn.functional.pad(wav, (0, wanted - done))
    return wav, rate


def _as_wave(wav: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Float32 CPU tensor [C, T]; TypeError for integers, ValueError for more than two dimensions, nothing, NaN, Inf."""
    wave = torch.as_tensor(np.ascontiguousarray(wav) if isinstance(wav, np.ndarray) else wav).detach()
    if not wave.dtype.is_floating_point:
        raise TypeError(f"wav must be floating point within +-1, got {wave.dtype}; convert integers with f32_pcm")
    if wave.dim() == 1:
        wave = wave[None]
    if wave.dim() != 2:
        raise ValueError(f"wav must be [samples] or [channels, samples], got shape {tuple(wave.shape)}; write one item")
    if wave.numel() == 0:
        raise ValueError(f"wav holds no samples (shape {tuple(wave.shape)})")
    wave = wave.to("cpu", torch.float32)
    if not bool(wave.isfinite().all()):
        bad = (~wave.isfinite()).nonzero()
        channel, sample = bad[bad[:, 1].argmin()].tolist()
        nans = int(wave.isnan().sum())
        found = f"{nans} NaN and {len(bad) - nans} Inf"
        raise ValueError(f"wav must be finite: {found}, the first in channel {channel} at sample {sample}")
    return wave


def _sidecar_path(stem_name: str | Path, path: Path, add_suffix: bool) -> Path:
    known = not add_suffix and path.suffix.lower()[1:] in FORMATS
    return path.with_suffix(".json") if known else Path(f"{stem_name}.json")


def audio_write(
    stem_name: str | Path,
    wav: torch.Tensor | np.ndarray,
    sample_rate: int,
    format: str = "wav",
    mp3_rate: int = 320,
    ogg_rate: int | None = None,
    normalize: bool = True,
    strategy: str = "peak",
    peak_clip_headroom_db: float = 1,
    rms_headroom_db: float = 18,
    loudness_headroom_db: float = 14,
    loudness_compressor: bool = False,
    log_clipping: bool = True,
    make_parent_dir: bool = True,
    add_suffix: bool = True,
    *,
    metadata: Mapping[str, str] | None = None,
    sidecar: Mapping[str, Any] | None = None,
) -> Path:
    """Write wav [C, T] or [T] (float, any device, `sample_rate` Hz) to `<stem_name>.<format>` and return the path.

    Args beyond audiocraft's `audio_write`, whose names, order and numbers these are:
        metadata: tags; any of `audio_encode.TAGS`, such as title, comment and software.
        sidecar: what to write as JSON to `<stem_name>.json` beside the sound, after it: the JSON marks a finished pair.

    wav and flac hold 16 bits, rounded to nearest. In kbit/s, `mp3_rate` is a constant bit rate and `ogg_rate` the
    nominal one of Vorbis (None: its default quality), each the nearest that the codec has at this sample rate. Wav
    files over 4 GB become RF64. For levels (`normalize`, `strategy`, ...) see `normalize_audio`; wav itself stays as
    it is. Without `add_suffix` the file is `stem_name`; `make_parent_dir` makes its folder.

    Files are written under temporary names and moved into place: after an error, an interrupt or a crash the old ones
    are as they were. ValueError and TypeError (unknown format or strategy, NaN or Inf, shapes, integers) come before
    anything is written; an OSError says which file and why.
    """
    wave = _as_wave(wav)
    sample_rate = int(sample_rate)
    check_format(format, wave.shape[0], sample_rate)
    tags = clean_tags(metadata, format)
    path = Path(f"{stem_name}.{format}" if add_suffix else stem_name)
    notes = None if sidecar is None else _json(sidecar)
    sidecar_path = _sidecar_path(stem_name, path, add_suffix)
    if notes is not None and sidecar_path == path:
        raise ValueError(f"the sidecar would overwrite {path}; choose another name")
    wave = normalize_audio(
        wave, normalize, strategy, peak_clip_headroom_db, rms_headroom_db, loudness_headroom_db, loudness_compressor,
        log_clipping=log_clipping, sample_rate=sample_rate, stem_name=str(stem_name),
    )  # fmt: skip
    try:
        if make_parent_dir:
            path.parent.mkdir(exist_ok=True, parents=True)
        with ExitStack() as files:
            if notes is not None:
                files.enter_context(replacing(sidecar_path)).write(notes)
            encode(files.enter_context(replacing(path)), wave, sample_rate, format, tags, mp3_rate, ogg_rate)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, f"cannot write {path}: {error.strerror or error}") from error
    return path


def _json(sidecar: Mapping[str, Any]) -> bytes:
    """UTF-8 JSON in the order of `sidecar`; TypeError or ValueError for what JSON cannot hold, NaN and Inf included."""
    text = json.dumps(dict(sidecar), ensure_ascii=False, indent=2, allow_nan=False)
    return (text + "\n").encode("utf-8", "backslashreplace")  # lone surrogates become valid \uXXXX


def convert_audio_channels(wav: torch.Tensor, channels: int = 2) -> torch.Tensor:
    """wav [..., C, T] with `channels` channels: many to one is the mean, one to many repeats (a view), many to fewer
    takes the first; fewer to more is a ValueError. Source: audiocraft `convert_audio_channels`."""
    have = wav.shape[-2]
    if have == channels:
        return wav
    if channels == 1:
        return wav.mean(dim=-2, keepdim=True)
    if have == 1:
        return wav.expand(*wav.shape[:-2], channels, wav.shape[-1])
    if have > channels:
        return wav[..., :channels, :]
    raise ValueError(f"cannot make {channels} channels of {have}: only mono can be spread")


def _resample(wav: torch.Tensor, from_rate: int, to_rate: int) -> torch.Tensor:
    """julius' windowed sinc along the last axis, to floor(T * to_rate / from_rate) samples."""
    import julius

    if wav.numel() == 0:
        return wav.new_zeros(*wav.shape[:-1], wav.shape[-1] * to_rate // from_rate)
    factor = math.gcd(from_rate, to_rate)
    if (from_rate // factor) * (to_rate // factor) > _MAX_FILTER:  # julius holds a filter for each phase of the ratio
        raise ValueError(
            f"cannot resample from {from_rate} to {to_rate} Hz: the rates have almost no common factor, the filters "
            "would fill gigabytes; resample the audio to a usual rate (44100, 48000) first"
        )
    return julius.resample_frac(wav, from_rate, to_rate)


def convert_audio(wav: torch.Tensor, from_rate: float, to_rate: float, to_channels: int) -> torch.Tensor:
    """wav [..., C, T] (float) from `from_rate` to `to_rate` Hz, then with `to_channels` channels, on the same device.

    T becomes floor(T * to_rate / from_rate). Sample for sample audiocraft's `convert_audio`: the filter is julius'
    sinc, because another one (soxr) changes the style tokens of one frame in twenty, and so the music. TypeError for
    integers; ValueError for rates below 1 Hz or almost without a common factor, and for more channels than C, if C > 1.
    """
    source, target = int(from_rate), int(to_rate)
    if source < 1 or target < 1:
        raise ValueError(f"sample rates must be positive, got {from_rate} and {to_rate}")
    if not wav.dtype.is_floating_point:
        raise TypeError(f"wav must be floating point, got {wav.dtype}; convert integers with f32_pcm")
    return convert_audio_channels(wav if source == target else _resample(wav, source, target), to_channels)


def f32_pcm(wav: torch.Tensor) -> torch.Tensor:
    """int16 / 2**15 or int32 / 2**31 of any shape as float32; floats stay; else ValueError. As audiocraft `f32_pcm`."""
    if wav.dtype.is_floating_point:
        return wav
    bits = {torch.int16: 15, torch.int32: 31}.get(wav.dtype)
    if bits is None:
        raise ValueError(f"PCM must be int16, int32 or floating point, got {wav.dtype}")
    return wav.float() / (1 << bits)


def i16_pcm(wav: torch.Tensor) -> torch.Tensor:
    """Float within +-1, any shape, to int16; times 2**15, or 2**15 - 1 where that would overflow. int16 stays as it is.

    ValueError for larger samples and other integers. Source: audiocraft `i16_pcm`.
    """
    if wav.dtype == torch.int16:
        return wav
    if not wav.dtype.is_floating_point:
        raise ValueError(f"expected floating point or int16, got {wav.dtype}")
    if wav.numel() and not wav.abs().max() <= 1:
        raise ValueError(f"samples must lie within +-1, the peak is {wav.abs().max().item():.3f}; rescale or clip")
    scaled = (wav * 2**15).round()
    if scaled.numel() and scaled.max() >= 2**15:
        scaled = (wav * (2**15 - 1)).round()
    return scaled.short()

"""Encoding for `audio.py`: what each format can hold, tags, and files that appear whole or not at all.

Takes a float32 CPU tensor [C, T] and writes it with libsndfile in blocks of 65536 frames, because libsndfile 1.2
crashes the process when 90 s of stereo Vorbis arrive in one call. Knows nothing of levels or of names of files.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np
import soundfile
import torch

__all__ = ["BLOCK_FRAMES", "FORMATS", "TAGS", "WAV_LIMIT", "check_format", "clean_tags", "encode", "replacing"]

BLOCK_FRAMES = 65536
MPEG_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
TAGS = {  # name in soundfile -> frame of ID3v2.4
    "title": "TIT2",
    "artist": "TPE1",
    "album": "TALB",
    "date": "TDRC",
    "genre": "TCON",
    "tracknumber": "TRCK",
    "copyright": "TCOP",
    "comment": "COMM",
    "software": "TSSE",
}
WAV_LIMIT = 2**32 - 2**16  # bytes: a RIFF size has 32 bits; the rest is room for header and tags

_log = logging.getLogger("musicgen_fast.audio")


@dataclass(frozen=True, slots=True)
class Format:
    """What libsndfile 1.2 can do. Beyond the limits of Vorbis (256 channels, 655 kHz) it crashes, hence our own."""

    container: str
    subtype: str
    max_channels: int
    max_rate: int
    tag_bytes: int = 65536  # longest tag that every reader built on libsndfile gives back
    integer: bool = False  # 16-bit samples, rounded here: libsndfile rounds down


FORMATS = {
    "wav": Format("WAV", "PCM_16", 1024, 2**31 - 1, tag_bytes=2040, integer=True),
    "mp3": Format("MP3", "MPEG_LAYER_III", 2, 48000),
    "ogg": Format("OGG", "VORBIS", 255, 192000),
    "flac": Format("FLAC", "PCM_16", 8, 655350, integer=True),
}


class _Quality(TypedDict, total=False):
    compression_level: float
    bitrate_mode: str


def check_format(format: str, channels: int, sample_rate: int) -> None:
    """ValueError, before anything is written, if `format` cannot hold so many channels at this rate."""
    if format == "opus":
        raise ValueError("opus holds 8, 12, 16, 24 or 48 kHz only and MusicGen makes 32 kHz; use 'ogg' (Vorbis)")
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    limits = FORMATS[format]
    if not 1 <= channels <= limits.max_channels:
        raise ValueError(f"{format} holds up to {limits.max_channels} channels, [channels, samples] has {channels}")
    if not 1 <= sample_rate <= limits.max_rate:
        raise ValueError(f"{format} holds up to {limits.max_rate} Hz, got {sample_rate}")
    if format == "mp3" and sample_rate not in MPEG_RATES:
        rates = ", ".join(map(str, MPEG_RATES))
        raise ValueError(f"mp3 holds {rates} Hz, got {sample_rate}; resample with convert_audio")


def clean_tags(metadata: Mapping[str, str] | None, format: str) -> dict[str, str]:
    """`metadata` as text that fits the tags of `format`; ValueError for names that no format keeps.

    Empty values are left out. Too long ones are cut with a warning: a WAV tag over 2047 bytes would hide the others.
    """
    limit, tags = FORMATS[format].tag_bytes, {}
    for name, value in (metadata or {}).items():
        if name not in TAGS:
            raise ValueError(f"unknown tag {name!r}; choose from {', '.join(TAGS)}")
        raw = str(value).replace("\0", "").encode("utf-8", "replace")
        if len(raw) > limit:
            _log.warning("tag %s cut from %d to %d bytes; use a sidecar for long texts", name, len(raw), limit)
        if text := raw[:limit].decode("utf-8", "ignore"):
            tags[name] = text
    return tags


def _id3(tags: Mapping[str, str]) -> bytes:
    """An ID3v2.4 tag in UTF-8. libsndfile hands UTF-8 to LAME as if it were Latin-1, which garbles all but ASCII."""

    def syncsafe(size: int) -> bytes:
        return bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))

    frames = b""
    for name, text in tags.items():
        language = b"XXX\0" if name == "comment" else b""  # unknown language, no description
        body = b"\x03" + language + text.encode()
        frames += TAGS[name].encode() + syncsafe(len(body)) + b"\0\0" + body
    return b"ID3\x04\0\0" + syncsafe(len(frames)) + frames if frames else b""


def _mp3_quality(kbps: float, sample_rate: int) -> _Quality:
    """Constant bit rate. libsndfile maps level 0..1 linearly to highest..lowest rate and drops the fraction."""
    low, high = (32, 320) if sample_rate >= 32000 else (8, 160) if sample_rate >= 16000 else (8, 64)
    level = (high - 0.5 - kbps) / (high - low)  # half a unit keeps the truncation off the next lower rate
    return {"compression_level": min(max(level, 0.0), 1.0), "bitrate_mode": "CONSTANT"}


def _vorbis_nominal(level: float, sample_rate: int, channels: int) -> int:
    """Nominal bit rate in bit/s that Vorbis states in its header for a compression level; 2 ms."""
    probe = io.BytesIO()
    with soundfile.SoundFile(
        probe, "w", sample_rate, channels, "VORBIS", format="OGG", compression_level=level
    ) as file:
        file.write(np.zeros((64, channels), np.float32))
    data = probe.getvalue()
    (nominal,) = struct.unpack_from("<i", data, data.index(b"\x01vorbis") + 20)
    return int(nominal)


def _ogg_quality(kbps: float | None, sample_rate: int, channels: int) -> _Quality:
    """The quality whose nominal rate is `kbps` (what `-b:a` means to ffmpeg's libvorbis), found by bisection."""
    if kbps is None:
        return {}
    low, high = 0.0, 1.0  # the nominal rate falls from level 0 to level 1
    for _ in range(8):
        middle = (low + high) / 2
        if _vorbis_nominal(middle, sample_rate, channels) > kbps * 1000:
            low = middle
        else:
            high = middle
    return {"compression_level": high}


class _Sink:
    """A file for libsndfile that keeps the first error, since no exception crosses C code and its own checks miss a
    disk that fills up while the encoder closes. `prefix` bytes stay in front of what libsndfile takes for the start."""

    def __init__(self, file: BinaryIO, prefix: bytes = b"") -> None:
        self._file, self._base = file, len(prefix)
        self.error: BaseException | None = None
        file.write(prefix)

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                return self._file.write(data)
            except BaseException as error:  # KeyboardInterrupt too: raised again by `check`
                self.error = error
        return 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self.error is None:
            try:
                return self._file.seek(offset + (self._base if whence == os.SEEK_SET else 0), whence) - self._base
            except BaseException as error:
                self.error = error
        return 0

    def tell(self) -> int:
        return self._file.tell() - self._base

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def _pcm16(block: torch.Tensor) -> torch.Tensor:
    """Round to the nearest of 2**16 levels and saturate: sample by sample what ffmpeg writes for audiocraft."""
    return (block * 32768).round_().clamp_(-32768, 32767).to(torch.int16)


def encode(
    file: BinaryIO,
    wav: torch.Tensor,
    sample_rate: int,
    format: str,
    tags: Mapping[str, str],
    mp3_rate: float = 320,
    ogg_rate: float | None = None,
) -> None:
    """Encode wav [C, T] float32 into an open binary file. OSError from the file itself, ValueError from the encoder."""
    channels, frames = wav.shape
    limits = FORMATS[format]
    container = limits.container
    if format == "wav" and 2 * channels * frames > WAV_LIMIT:
        container = "RF64"
    quality: _Quality = {}
    if format == "mp3":
        quality = _mp3_quality(mp3_rate, sample_rate)
    elif format == "ogg":
        quality = _ogg_quality(ogg_rate, sample_rate, channels)
    sink = _Sink(file, _id3(tags) if format == "mp3" else b"")
    try:
        with soundfile.SoundFile(
            sink, "w", sample_rate, channels, limits.subtype, format=container, **quality
        ) as encoder:
            for name, text in tags.items() if format != "mp3" else ():
                setattr(encoder, name, text)
            for start in range(0, frames, BLOCK_FRAMES):
                block = wav[:, start : start + BLOCK_FRAMES].T.contiguous()
                encoder.write((_pcm16(block) if limits.integer else block).numpy())
                sink.check()
    except (soundfile.LibsndfileError, AssertionError) as error:  # soundfile asserts that all frames were taken
        sink.check()
        raise ValueError(f"libsndfile cannot write {format}, {channels} channels, {sample_rate} Hz: {error}") from error
    sink.check()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` at the end, on disk and whole; on any error `path` is untouched.

    It grows as `.musicgen_fast-*.tmp` in the same folder (only a killed process leaves one behind). Links are followed.
    OSError if `path` is a folder or a device.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        code, kind = (errno.EISDIR, "a folder") if path.is_dir() else (errno.EINVAL, "not a regular file")
        raise OSError(code, f"{path} is {kind}")
    temporary = path.with_name(f".musicgen_fast-{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:  # not mkstemp: its files are private, these follow the umask
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

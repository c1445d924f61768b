"""What ends up on disk: whole files or none, bit rates, tags, sidecars (`musicgen_fast.audio_encode`)."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
from pathlib import Path

import pytest
import soundfile
import torch

from musicgen_fast import audio_encode
from musicgen_fast.audio import audio_info, audio_read, audio_write

from .sounds import FORMATS, RATE, names, noise


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("kept")
    for stem in (tmp_path / "file" / "a", tmp_path / "file" / "deep" / "a"):
        for make in (True, False):
            with pytest.raises(OSError, match="cannot write .*a.wav"):
                audio_write(stem, noise(), RATE, make_parent_dir=make)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(IsADirectoryError, match="folder.wav is a folder"):
        audio_write(tmp_path / "folder", noise(), RATE)
    assert names(tmp_path) == ["file", "folder.wav"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs a device file")
def test_devices_are_not_replaced():
    with pytest.raises(OSError, match="not a regular file"):
        audio_write("/dev/null", noise(), RATE, add_suffix=False)


@pytest.mark.skipif(os.name != "posix", reason="file modes and links as on POSIX")
def test_mode_follows_umask_and_links_are_followed(tmp_path):
    old = os.umask(0o027)
    try:
        path = audio_write(tmp_path / "a", noise(), RATE)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640
    (tmp_path / "there").mkdir()
    (tmp_path / "link.wav").symlink_to(tmp_path / "there" / "real.wav")
    audio_write(tmp_path / "link", noise(), RATE)
    assert (tmp_path / "link.wav").is_symlink() and audio_info(tmp_path / "there" / "real.wav").duration == 1.0


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError("odd")])
def test_simulated_os_error(tmp_path, monkeypatch, error):
    def refuse(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(audio_encode.os, "replace", refuse)
    with pytest.raises(type(error), match="cannot write .*a.wav: (Permission denied|odd)"):
        audio_write(tmp_path / "a", noise(), RATE, sidecar={})
    assert names(tmp_path) == []


class Broken(io.FileIO):
    """A file that takes `budget` bytes of new sound and then raises, as a full disk or an interrupt would."""

    budget = 0
    error: BaseException = OSError(errno.ENOSPC, "No space left on device")

    def write(self, data):
        if self.tell() + len(data) > self.budget:
            raise self.error
        return super().write(data)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("format", FORMATS)
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, format, error):
    wav = noise(2, 3.0)
    path = audio_write(tmp_path / "a", wav, RATE, format=format, sidecar={"take": 1}, metadata={"title": "t"})
    before = path.read_bytes()
    whole = len(before)
    monkeypatch.setattr(audio_encode, "open", lambda *args: Broken(*args), raising=False)
    monkeypatch.setattr(Broken, "error", error)
    for budget in (20, 1000, whole // 2, whole - 1):  # the last byte is lost while the encoder closes
        monkeypatch.setattr(Broken, "budget", budget)
        with pytest.raises(type(error), match="cannot write.*No space" if isinstance(error, OSError) else None):
            audio_write(tmp_path / "a", wav, RATE, format=format, sidecar={"take": 2}, metadata={"title": "t"})
        assert path.read_bytes() == before and names(tmp_path) == sorted(["a.json", path.name])
        assert json.loads((tmp_path / "a.json").read_text()) == {"take": 1}
    monkeypatch.setattr(Broken, "budget", 2 * whole)
    audio_write(tmp_path / "a", wav, RATE, format=format, sidecar={"take": 3}, metadata={"title": "t"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"take": 3}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_crash_in_the_middle_leaves_nothing(tmp_path, monkeypatch, error):
    original, calls = soundfile.SoundFile.write, []

    def second_call_fails(self, data):
        calls.append(len(data))
        if len(calls) == 2:
            assert any(name.endswith(".tmp") for name in names(tmp_path))
            raise error
        original(self, data)

    monkeypatch.setattr(soundfile.SoundFile, "write", second_call_fails)
    with pytest.raises(error):
        audio_write(tmp_path / "a", noise(1, 5.0), RATE, sidecar={"seed": 1})
    assert calls == [65536, 65536] and names(tmp_path) == []


MPEG1_KBPS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
MPEG2_KBPS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def mp3_rates(path: Path) -> set[int]:
    """kbit/s of every MPEG layer 3 frame after the first (which may hold LAME's table of contents)."""
    data, rates, at = path.read_bytes(), [], 0
    if data[:3] == b"ID3":
        at = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    while at + 4 <= len(data) and data[at : at + 3] != b"TAG":
        (head,) = struct.unpack_from(">I", data, at)
        version = head >> 19 & 3
        assert head >> 21 == 0x7FF and version in (2, 3), f"no frame at {at}"
        kbps = (MPEG1_KBPS if version == 3 else MPEG2_KBPS)[head >> 12 & 15]
        rate = (44100, 48000, 32000)[head >> 10 & 3] // (1 if version == 3 else 2)
        rates.append(kbps)
        at += (144 if version == 3 else 72) * kbps * 1000 // rate + (head >> 9 & 1)
    return set(rates[1:])


@pytest.mark.parametrize("kbps", [32, 64, 128, 192, 256, 320])
def test_mp3_rate_is_constant(tmp_path, kbps):
    assert mp3_rates(audio_write(tmp_path / "a", noise(2), RATE, format="mp3", mp3_rate=kbps)) == {kbps}


def test_mp3_rate_default_and_bounds(tmp_path):
    assert mp3_rates(audio_write(tmp_path / "a", noise(), RATE, format="mp3")) == {320}
    assert mp3_rates(audio_write(tmp_path / "b", noise(), RATE, format="mp3", mp3_rate=1000)) == {320}
    assert mp3_rates(audio_write(tmp_path / "c", noise(), 44100, format="mp3", mp3_rate=160)) == {160}
    assert mp3_rates(audio_write(tmp_path / "d", noise(), 24000, format="mp3")) == {160}  # the most MPEG-2 has
    assert mp3_rates(audio_write(tmp_path / "e", noise(), 16000, format="mp3", mp3_rate=48)) == {48}


@pytest.mark.parametrize(("channels", "rate"), [(1, 32000), (2, 32000), (2, 48000)])
def test_ogg_rate_is_the_nominal_rate(tmp_path, channels, rate):
    def nominal(kbps):
        data = audio_write(tmp_path / "a", noise(channels), rate, format="ogg", ogg_rate=kbps).read_bytes()
        return struct.unpack_from("<i", data, data.index(b"\x01vorbis") + 20)[0] / 1000

    for kbps in (64, 96, 128, 160):
        assert nominal(kbps) == pytest.approx(kbps, rel=0.02)
    assert nominal(1) <= 64 and nominal(5000) > 180  # clamped to what Vorbis has
    assert nominal(None) == {(1, 32000): 78, (2, 32000): 120, (2, 48000): 128}[channels, rate]


TAGS = {
    "title": "Żółć 音楽 é",
    "comment": '{"prompt": "naïve “quotes” 🎵", "seed": 1}',
    "software": "musicgen_fast 0.1",
    "artist": "Ä",
    "date": "2026",
}


@pytest.mark.parametrize("format", FORMATS)
def test_tags_read_back(tmp_path, format):
    wav = noise(2)
    path = audio_write(tmp_path / "a", wav, RATE, format=format, metadata={**TAGS, "album": ""}, strategy="none")
    with soundfile.SoundFile(path) as file:
        found = file.copy_metadata()
    assert found.pop("software").startswith(TAGS["software"])
    assert {name: found.get(name) for name in found.keys() | TAGS.keys() if name != "software"} == {
        name: text for name, text in TAGS.items() if name != "software"
    }
    tagged, _ = audio_read(path)
    plain, _ = audio_read(audio_write(tmp_path / "b", wav, RATE, format=format, strategy="none"))
    assert torch.equal(tagged, plain)


def test_mp3_tag_is_utf8_id3(tmp_path):
    """Players read ID3, where libsndfile alone would have put UTF-8 bytes into a Latin-1 frame and an ID3v1 trailer."""
    data = audio_write(tmp_path / "a", noise(), RATE, format="mp3", metadata={"title": "é"}).read_bytes()
    assert data.startswith(b"ID3\x04\0\0\0\0\0\x0dTIT2\0\0\0\x03\0\0\x03\xc3\xa9\xff") and data[-128:-125] != b"TAG"


@pytest.mark.parametrize("format", FORMATS)
def test_long_and_odd_tags(tmp_path, format, caplog):
    odd = {"title": "a\0b\ud800", "comment": "é" * 40000, "software": "last"}
    path = audio_write(tmp_path / "a", noise(), RATE, format=format, metadata=odd)
    with soundfile.SoundFile(path) as file:
        assert file.title == "ab?" and file.software.startswith("last")
        assert file.comment == "é" * (1020 if format == "wav" else 32768)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "comment" in caplog.text


def test_sidecar(tmp_path):
    notes = {
        "zeta": 1,
        "alpha": [0.5, None, True],
        "prompt": "Ménage 音楽",
        "nested": {"b": 1, "a": 2},
        "odd": "\udc80",
    }
    audio_write(tmp_path / "take.1", noise(), RATE, sidecar=notes)
    assert names(tmp_path) == ["take.1.json", "take.1.wav"]
    raw = (tmp_path / "take.1.json").read_bytes()
    assert json.loads(raw) == notes and list(json.loads(raw)) == list(notes)
    assert raw.startswith(b'{\n  "zeta": 1,') and raw.endswith(b"}\n") and "Ménage 音楽".encode() in raw
    audio_write(tmp_path / "b.flac", noise(), RATE, format="flac", add_suffix=False, sidecar={})
    audio_write(tmp_path / "c.x", noise(), RATE, add_suffix=False, sidecar={})
    assert names(tmp_path) == ["b.flac", "b.json", "c.x", "c.x.json", "take.1.json", "take.1.wav"]


def test_large_wav_becomes_rf64(tmp_path, monkeypatch):
    wav = noise(2, 0.5)
    monkeypatch.setattr(audio_encode, "WAV_LIMIT", 4 * wav.shape[1] - 1)
    path = audio_write(tmp_path / "a", wav, RATE, strategy="none", metadata={"title": "t"})
    assert path.name == "a.wav" and path.read_bytes()[:4] == b"RF64"
    assert (audio_read(path)[0] - wav).abs().max() <= 0.5 / 32768 + 1e-7
    monkeypatch.setattr(audio_encode, "WAV_LIMIT", 4 * wav.shape[1])
    assert audio_write(tmp_path / "a", wav, RATE).read_bytes()[:4] == b"RIFF"

"""Reading, writing, rates, channels and PCM: `musicgen_fast.audio` and audiocraft's paths under `data`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import soundfile
import torch

from musicgen_fast import audio, audio_encode
from musicgen_fast.audio import (
    audio_info,
    audio_read,
    audio_write,
    convert_audio,
    convert_audio_channels,
    f32_pcm,
    i16_pcm,
)

from .sounds import FORMATS, RATE, STRATEGIES, load_audiocraft_utils, names, noise, sine


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(tmp_path, format, channels):
    # music-like enough for the lossy codecs: two partials, different in each channel
    wav = torch.stack([sine(220 * (c + 1), 2.5, level=0.5) + sine(1330, 2.5, level=0.2) for c in range(channels)])
    path = audio_write(tmp_path / "a", wav.float(), RATE, format=format, strategy="clip")
    assert path == tmp_path / f"a.{format}" and names(tmp_path) == [path.name]
    back, rate = audio_read(path)
    assert rate == RATE and back.dtype == torch.float32 and back.shape == wav.shape and back.is_contiguous()
    error = (back - wav).abs()
    if format in ("wav", "flac"):
        assert error.max() <= 0.5 / 32768 + 1e-7
    else:  # 30 dB below the sound: no shift, no swapped channels, no change of level
        assert error.square().mean() < wav.square().mean() / 1000
    assert audio_info(path) == audio.AudioFileInfo(RATE, 2.5, channels)


def test_wav_rounds_to_nearest_and_saturates(tmp_path):
    wav = torch.tensor([1.0, -1.0, 0.4 / 32768, 0.6 / 32768, -0.6 / 32768, 1.5 / 32768])
    path = audio_write(tmp_path / "a", wav, RATE, strategy="clip", peak_clip_headroom_db=0)
    assert soundfile.read(path, dtype="int16")[0].tolist() == [32767, -32768, 0, 1, -1, 2]


@pytest.mark.parametrize("rate", [16000, 24000, 44100, 48000])
@pytest.mark.parametrize("format", FORMATS)
def test_other_rates(tmp_path, format, rate):
    path = audio_write(tmp_path / "a", noise(rate=rate), rate, format=format)
    assert audio_info(path) == audio.AudioFileInfo(rate, 1.0, 1)


def test_more_than_one_block(tmp_path):
    wav = noise(2, 5.0)
    assert wav.shape[1] > 2 * audio_encode.BLOCK_FRAMES
    for format in ("wav", "flac"):
        back, _ = audio_read(audio_write(tmp_path / "a", wav, RATE, format=format, strategy="none"))
        assert (back - wav).abs().max() <= 0.5 / 32768 + 1e-7


def test_long_stereo_vorbis_survives(tmp_path):
    """One call of libsndfile with 90 s of stereo Vorbis ends the process with SIGSEGV; blocks do not."""
    path = audio_write(tmp_path / "a", noise(2, 95.0), RATE, format="ogg")
    assert audio_info(path).duration == 95.0


def test_input_kinds_and_no_change_in_place(tmp_path):
    wav = noise(2, 0.1, level=0.7)
    kept = wav.clone()
    for strategy in STRATEGIES:
        audio_write(tmp_path / "a", wav, RATE, strategy=strategy, log_clipping=False)
        assert torch.equal(wav, kept)
    reference = (tmp_path / "a.wav").read_bytes()
    for same in (wav.numpy(), wav.numpy()[:, ::-1][:, ::-1], wav.double(), wav.clone().requires_grad_()):
        assert audio_write(tmp_path / "b", same, RATE, strategy="none").read_bytes() == reference
    audio_write(tmp_path / "h", wav.half(), RATE)
    assert audio_info(audio_write(tmp_path / "mono", wav[0], RATE)).channels == 1


def test_signature_is_audiocrafts(tmp_path):
    """Positional use of every argument audiocraft has, in its order."""
    stem = tmp_path / "deep" / "er" / "a"
    path = audio_write(stem, noise(), RATE, "mp3", 128, None, True, "loudness", 1, 18, 16, True, False, True, True)
    assert path == stem.with_name("a.mp3") and path.is_file()


def test_suffix_and_parent(tmp_path):
    assert audio_write(tmp_path / "v1.2", noise(), RATE).name == "v1.2.wav"
    assert audio_write(str(tmp_path / "song.flac"), noise(), RATE, format="flac", add_suffix=False).name == "song.flac"
    with pytest.raises(FileNotFoundError, match="cannot write .*nowhere"):
        audio_write(tmp_path / "nowhere" / "a", noise(), RATE, make_parent_dir=False)


@pytest.mark.parametrize(("value", "words"), [(math.nan, "1 NaN and 0 Inf"), (-math.inf, "0 NaN and 1 Inf")])
def test_not_finite(tmp_path, value, words):
    wav = noise(2)
    wav[1, 77] = value
    with pytest.raises(ValueError, match=f"{words}, the first in channel 1 at sample 77"):
        audio_write(tmp_path / "new" / "a", wav, RATE)
    assert names(tmp_path) == []  # not even the folder


def test_bad_arguments(tmp_path):
    wav, stem = noise(), tmp_path / "a"
    with pytest.raises(TypeError, match="int16.*f32_pcm"):
        audio_write(stem, torch.zeros(1, 10, dtype=torch.int16), RATE)
    with pytest.raises(TypeError, match="floating point"):
        audio_write(stem, np.zeros((1, 10), np.int32), RATE)
    for shape in ((1, 1, 10), (), (1, 0), (0, 10)):
        with pytest.raises(ValueError, match="shape"):
            audio_write(stem, torch.zeros(shape), RATE)
    with pytest.raises(ValueError, match="wav, mp3, ogg, flac"):
        audio_write(stem, wav, RATE, format="aac")
    with pytest.raises(ValueError, match="opus.*48 kHz"):
        audio_write(stem, wav, RATE, format="opus")
    with pytest.raises(ValueError, match="peak, clip, rms, loudness, none"):
        audio_write(stem, wav, RATE, strategy="lufs")
    with pytest.raises(ValueError, match="peak is 1.000"):
        audio_write(stem, torch.ones(1, 10), RATE, strategy="none")
    with pytest.raises(ValueError, match="up to 2 channels"):
        audio_write(stem, noise(3), RATE, format="mp3")
    with pytest.raises(ValueError, match="32001"):
        audio_write(stem, wav, 32001, format="mp3")
    with pytest.raises(ValueError, match="192000 Hz"):  # libsndfile itself crashes at 655350
        audio_write(stem, wav, 655350, format="ogg")
    with pytest.raises(ValueError, match="Hz, got 0"):
        audio_write(stem, wav, 0)
    with pytest.raises(ValueError, match="unknown tag 'prompt'"):
        audio_write(stem, wav, RATE, metadata={"prompt": "x"})
    with pytest.raises(TypeError, match="JSON"):
        audio_write(stem, wav, RATE, sidecar={"x": object()})
    with pytest.raises(ValueError, match="JSON"):
        audio_write(stem, wav, RATE, sidecar={"x": math.nan})
    assert names(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
def test_seek_duration_pad(tmp_path, format):
    path = audio_write(tmp_path / "a", noise(2, 4.0), RATE, format=format)
    whole, _ = audio_read(path)
    for seek, duration in ((0.0, 1.5), (0.5, -1.0), (1.25, 2.5), (3.5, 9.0), (3.999, 0.0)):
        start = int(seek * RATE)
        stop = start + int(duration * RATE) if duration > 0 else whole.shape[1]
        part, rate = audio_read(path, seek, duration)
        assert rate == RATE and part.shape == whole[:, start:stop].shape
        assert (part - whole[:, start:stop]).abs().max() < 1e-4
        padded, _ = audio_read(path, seek, duration, pad=True)
        assert padded.shape[1] == (stop - start if duration > 0 else part.shape[1])
        assert torch.equal(padded[:, : part.shape[1]], part) and not padded[:, part.shape[1] :].any()
    for seek in (4.0, 1e9):
        with pytest.raises(ValueError, match="past the end of .*a"):
            audio_read(path, seek)
    with pytest.raises(ValueError, match="negative"):
        audio_read(path, -1.0)


def test_reads_opus_and_float_wav(tmp_path):
    data = noise(1, 1.0, rate=48000)[0].numpy()
    soundfile.write(tmp_path / "a.opus", data, 48000, format="OGG", subtype="OPUS")
    wav, rate = audio_read(tmp_path / "a.opus")
    assert rate == 48000 and wav.shape == (1, 48000)
    soundfile.write(tmp_path / "b.wav", 3 * data, 48000, subtype="FLOAT")
    assert np.array_equal(audio_read(tmp_path / "b.wav")[0][0].numpy(), 3 * data)


def test_unreadable_files(tmp_path):
    for function in (audio_read, audio_info):
        with pytest.raises(FileNotFoundError, match="missing.wav"):
            function(tmp_path / "missing.wav")
        with pytest.raises(IsADirectoryError):
            function(tmp_path)
        for name, content in (("empty.wav", b""), ("text.mp3", b"hello" * 99), ("x.raw", b"\0" * 99)):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"cannot read .*{name}"):
                function(str(tmp_path / name))


def test_flac_without_a_length_is_read_to_the_end(tmp_path):
    """Streamed flac states no length and libsndfile says 2**63 - 1 frames: count, never allocate from the header."""
    wav = noise(2, 3.0)
    path = audio_write(tmp_path / "a", wav, RATE, format="flac", strategy="none")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert soundfile.info(path).frames == 2**63 - 1
    assert audio_info(path).duration == 3.0
    assert (audio_read(path)[0] - wav).abs().max() <= 0.5 / 32768 + 1e-7
    assert audio_read(path, 1.0)[0].shape == (2, 2 * RATE)


def test_torn_files(tmp_path):
    for format in FORMATS:
        path = audio_write(tmp_path / "a", noise(2, 6.0), RATE, format=format)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if format == "flac":
            with pytest.raises(ValueError, match="a.flac is damaged: decoding stopped after 2.05 s"):
                audio_read(path)
            assert audio_read(path, duration=1.0)[0].shape == (2, RATE)
        else:
            assert 2.0 < audio_read(path)[0].shape[1] / RATE < 3.1


def test_cap_on_what_is_decoded(tmp_path, monkeypatch):
    path = audio_write(tmp_path / "a", noise(2, 1.0), RATE)
    monkeypatch.setattr(audio, "MAX_READ_SAMPLES", 2 * RATE - 1)
    with pytest.raises(ValueError, match="a.wav holds more than 1 s.*seek_time and duration"):
        audio_read(path)
    assert audio_read(path, duration=0.9)[0].shape == (2, 28800)
    with pytest.raises(ValueError, match="ask for less"):
        audio_read(path, duration=1e12, pad=True)
    monkeypatch.setattr(audio, "MAX_READ_SAMPLES", 2 * RATE)
    assert audio_read(path)[0].shape == (2, RATE)


@pytest.mark.parametrize(("source", "target"), [(44100, 32000), (48000, 32000), (32000, 48000), (22050, 32000)])
def test_resampling_length_and_quality(source, target):
    for length in (0, 1, 2, 999, 44117):
        assert convert_audio(torch.zeros(1, length), source, target, 1).shape == (1, int(length * target / source))
    wav = sine(997, 1.0, source, 0.5).float()[None]
    out = convert_audio(wav, source, target, 1)
    ideal = sine(997, 1.0, target, 0.5).float()[None]
    middle = slice(target // 10, -target // 10)
    assert out.dtype == torch.float32 and (out - ideal)[:, middle].abs().max() < 2e-3


def test_resampling_refuses_filters_without_end():
    with pytest.raises(ValueError, match="no common factor"):
        convert_audio(torch.zeros(1, 100), 44101, 32003, 1)


def test_resampling_stops_aliases():
    loud = sine(19000, 1.0, 44100).float()[None]  # above the 16 kHz that 32 kHz can hold
    assert convert_audio(loud, 44100, 32000, 1)[:, 3200:-3200].abs().max() < 1e-3


def test_convert_audio_order_batch_and_dtype():
    wav = noise(6, 0.5).reshape(3, 2, -1)
    out = convert_audio(wav, 32000.0, 16000, 1)
    assert out.shape == (3, 1, 8000)
    one = convert_audio(wav[1], 32000, 16000, 2)
    assert torch.equal(out[1], one.mean(0, keepdim=True))  # resampled first, then mixed
    assert convert_audio(wav, 32000, 32000, 2) is wav
    assert convert_audio(wav.double().requires_grad_(), 32000, 24000, 2).dtype == torch.float64
    assert convert_audio(wav.transpose(0, 1), 32000, 16000, 3).shape == (2, 3, 8000)  # not contiguous
    with pytest.raises(TypeError, match="f32_pcm"):
        convert_audio(torch.zeros(1, 10, dtype=torch.int16), 32000, 16000, 1)
    with pytest.raises(ValueError, match="positive"):
        convert_audio(wav, 0, 16000, 1)


def test_channel_rules():
    wav = noise(3, 0.01)
    assert convert_audio_channels(wav, 3) is wav
    assert torch.equal(convert_audio_channels(wav, 1), wav.mean(0, keepdim=True))
    assert torch.equal(convert_audio_channels(wav, 2), wav[:2])
    assert torch.equal(convert_audio_channels(wav[:1], 4), wav[:1].repeat(4, 1))
    assert convert_audio_channels(wav[None, :1]).shape == (1, 2, 320)
    with pytest.raises(ValueError, match="cannot make 4 channels of 3"):
        convert_audio_channels(wav, 4)


def test_pcm():
    ints = torch.tensor([-32768, -1, 0, 1, 16384, 32766], dtype=torch.int16)
    assert f32_pcm(ints).tolist() == [-1.0, -1 / 32768, 0.0, 1 / 32768, 0.5, 32766 / 32768]
    assert torch.equal(i16_pcm(f32_pcm(ints)), ints) and i16_pcm(ints) is ints
    assert f32_pcm(torch.tensor([-(2**31)], dtype=torch.int32)).item() == -1.0
    assert i16_pcm(torch.tensor([1.0, -1.0, 0.5])).tolist() == [32767, -32767, 16384]  # 2**15 - 1 where 2**15 is over
    assert i16_pcm(torch.zeros(1, 0)).shape == (1, 0)
    with pytest.raises(ValueError, match="uint8"):
        f32_pcm(torch.zeros(2, dtype=torch.uint8))
    for bad in (torch.tensor([1.1]), torch.tensor([math.nan]), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ValueError):
            i16_pcm(bad)


def test_conversion_equals_audiocraft(monkeypatch):
    reference = load_audiocraft_utils(monkeypatch, audio.loudness)
    tones = torch.stack([sine(440, 1.0, 44100, 0.4) + sine(5000, 1.0, 44100, 0.1)] * 2).float()
    theirs = reference.convert_audio(tones, 44100, 32000, 1)
    ours = convert_audio(tones, 44100, 32000, 1)
    assert ours.shape == theirs.shape and (ours - theirs)[:, 100:-100].abs().max() < 2e-3
    for wav, channels in ((noise(3), 1), (noise(3), 2), (noise(1), 2)):
        assert torch.equal(convert_audio_channels(wav, channels), reference.convert_audio_channels(wav, channels))
    for wav in (noise(), torch.tensor([1.0, -1.0, 0.3]), torch.tensor([-1.0, 0.99])):
        assert torch.equal(i16_pcm(wav), reference.i16_pcm(wav))


def test_import_paths():
    import musicgen_fast.data.audio as files
    import musicgen_fast.data.audio_utils as utils

    for module in (files, utils):
        assert module.__all__ and all(getattr(module, name) is getattr(audio, name) for name in module.__all__)
    assert {"audio_info", "audio_read", "audio_write"} <= set(files.__all__)
    assert {"convert_audio", "normalize_audio", "normalize_loudness", "i16_pcm"} <= set(utils.__all__)

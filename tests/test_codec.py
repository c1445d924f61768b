"""EnCodec against both reference implementations: waveforms within fp32 rounding, the same codes; and its interface.

Tiny widths never reach the products that only large filters take, so the comparisons also run with that limit at 0.
"""

from __future__ import annotations

import math

import pytest
import torch

from musicgen_fast.checkpoints.codec_weights import canonical_codec_weights, codec_config_from_audiocraft
from musicgen_fast.codec import EnCodec, InterleaveStereo
from musicgen_fast.config import CodecConfig
from musicgen_fast.seanet import layers

from .codecs import assert_near, audiocraft_cfg, audiocraft_model, loaded, ours, random_codes, small, transformers_model
from .oracle import audiocraft_lm as ac

# what to change in the tiny EncodecConfig below
VARIANTS = {
    "musicgen": {},
    "zeros": {"pad_mode": "constant"},
    "audiogen": {"sampling_rate": 16000, "upsampling_ratios": [8, 5, 4, 2], "num_lstm_layers": 1},
    "deep": {"num_residual_layers": 3, "num_filters": 12, "upsampling_ratios": [4, 3]},
    "deep zeros": {"num_residual_layers": 3, "dilation_growth_rate": 3, "pad_mode": "constant"},
    "even kernels": {"kernel_size": 6, "last_kernel_size": 4, "residual_kernel_size": 2, "num_residual_layers": 2},
    "odd": {"upsampling_ratios": [2, 1, 5], "compress": 3, "hidden_size": 6, "codebook_size": 16},
    "two channels": {"audio_channels": 2, "num_lstm_layers": 3},
}


@pytest.fixture(params=[layers._SMALL_FILTER, 0], ids=["convolutions", "products"])
def either_product(request, monkeypatch):
    monkeypatch.setattr(layers, "_SMALL_FILTER", request.param)


# ---- the references


@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_equals_transformers(variant, either_product):
    model = transformers_model(**VARIANTS[variant])
    codec = ours(model)
    for batch, frames in ((1, 1), (2, 2), (1, 3), (3, 7), (1, 140)):
        codes = random_codes(codec, batch, frames)
        assert_near(codec.decode(codes), model.decode(codes[None], [None])[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_equals_transformers(variant, either_product):
    model = transformers_model(**VARIANTS[variant])
    codec = ours(model)
    hop = codec.config.hop_length
    for batch, samples in ((2, 1), (1, 2), (2, 5), (1, hop - 1), (1, hop), (3, hop + 1), (2, 9 * hop + hop // 2)):
        wav = torch.randn(batch, codec.channels, samples)
        before = wav.clone()
        codes, scale = codec.encode(wav)
        expected = model.encode(wav, bandwidth=model.config.target_bandwidths[-1])[0][0]
        assert scale is None and codes.dtype == torch.int64 and codes.is_contiguous()
        assert codes.shape == (batch, codec.num_codebooks, math.ceil(samples / hop))
        assert torch.equal(codes, expected), (batch, samples)
        assert torch.equal(wav, before)


def test_the_pad_modes_differ():
    """Or the comparisons above could not tell one from the other."""
    codes = torch.randint(64, (1, 4, 5))
    reflect, zeros = (ours(transformers_model(pad_mode=mode)).decode(codes) for mode in ("reflect", "constant"))
    assert (reflect - zeros).abs().max() > 1e-3 * reflect.abs().max()


def test_the_released_size_equals_transformers():
    model = transformers_model(num_filters=64, hidden_size=128, codebook_size=2048)
    codec = ours(model)
    assert codec.config == CodecConfig()
    codes = random_codes(codec, 1, 12)
    wav = codec.decode(codes)
    assert_near(wav, model.decode(codes[None], [None])[0])
    # deeper codebooks see near-ties on random weights; the first must agree
    codes = codec.encode(wav)[0]
    assert torch.equal(codes, model.encode(wav, bandwidth=model.config.target_bandwidths[0])[0][0])


AUDIOCRAFT = {
    "musicgen": {},
    "reflect": {"pad_mode": "reflect"},
    "audiogen": {"ratios": [8, 5, 4, 2], "lstm": 1, "norm": "none"},
    "deep": {"n_residual_layers": 3, "n_filters": 8, "ratios": [4, 3]},
    "without lstm": {"lstm": 0, "ratios": [3, 2, 2]},
}


@ac.needs_audiocraft
@pytest.mark.parametrize("variant", AUDIOCRAFT)
def test_codecs_of_audiocraft(variant, either_product):
    cfg = audiocraft_cfg(**AUDIOCRAFT[variant])
    model = audiocraft_model(cfg)
    config = codec_config_from_audiocraft(cfg)
    codec = loaded(config, canonical_codec_weights(model.state_dict(), config, "a test"))
    assert int(codec.frame_rate) == model.frame_rate and codec.cardinality == model.cardinality
    for batch, frames in ((1, 1), (2, 3), (1, 20)):
        codes = random_codes(codec, batch, frames)
        assert_near(codec.decode(codes), model.decode(codes))
        assert_near(codec.decode_latent(codes), model.decode_latent(codes), 1e-6)
        wav = torch.randn(batch, 1, frames * config.hop_length - 1)
        assert torch.equal(codec.encode(wav)[0], model.encode(wav)[0])


@ac.needs_audiocraft
def test_stereo_equals_audiocraft():
    cfg = audiocraft_cfg()
    model, config = audiocraft_model(cfg), codec_config_from_audiocraft(cfg)
    from audiocraft.models.encodec import InterleaveStereoCompressionModel

    codec = InterleaveStereo(loaded(config, canonical_codec_weights(model.state_dict(), config, "a test")))
    theirs = InterleaveStereoCompressionModel(model)
    for name in ("channels", "num_codebooks", "total_codebooks", "cardinality", "sample_rate", "frame_rate"):
        assert getattr(codec, name) == getattr(theirs, name), name
    codes, wav = random_codes(codec, 2, 5), torch.randn(2, 2, 3000)
    assert_near(codec.decode(codes), theirs.decode(codes))
    assert torch.equal(codec.encode(wav)[0], theirs.encode(wav)[0])
    for side, expected in zip(codec.get_left_right_codes(codes), theirs.get_left_right_codes(codes), strict=True):
        assert torch.equal(side, expected)
    codec.set_num_codebooks(2)
    theirs.set_num_codebooks(2)
    assert codec.num_codebooks == theirs.num_codebooks == 4
    assert torch.equal(codec.encode(wav)[0], theirs.encode(wav)[0])


# ---- the interface


def test_properties():
    codec = small()
    assert (codec.sample_rate, codec.channels, codec.cardinality) == (32000, 1, 64)
    assert codec.frame_rate == 4000.0 and isinstance(codec.frame_rate, float)
    assert codec.num_codebooks == codec.total_codebooks == 4
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_fewer_codebooks():
    codec = small()
    wav = torch.randn(2, 1, 200)
    every, _ = codec.encode(wav)
    codec.set_num_codebooks(2)
    codes, _ = codec.encode(wav)
    assert codec.num_codebooks == 2 and codec.total_codebooks == 4
    assert torch.equal(codes, every[:, :2])
    latents = codec.decode_latent(codes)
    expected = codec.codebooks[0][codes[:, 0]] + codec.codebooks[1][codes[:, 1]]
    assert torch.equal(latents, expected.transpose(1, 2))
    assert_near(codec.decode(codes), codec.decoder(latents.transpose(1, 2)).transpose(1, 2), 1e-6)
    codec.decode(every)  # the count is for encode alone, as in the references


def test_decode_takes_any_integers_and_changes_nothing():
    codec = small()
    codes = random_codes(codec, 2, 9)
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    first, kept = codec.decode(codes), codes.clone()
    assert first.is_contiguous() and torch.equal(codec.decode(codes.to(torch.int16)), first)
    assert torch.equal(codes, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in codec.state_dict().items())


def test_stereo_is_two_mono_passes():
    codec = small()
    stereo = InterleaveStereo(codec)
    codes = random_codes(stereo, 3, 11)
    assert stereo.channels == 2 and stereo.num_codebooks == codes.shape[1] == 8
    left, right = stereo.get_left_right_codes(codes)
    assert torch.equal(left, codes[:, [0, 2, 4, 6]]) and torch.equal(right, codes[:, [1, 3, 5, 7]])
    wav = stereo.decode(codes)
    assert_near(wav, torch.cat([codec.decode(left), codec.decode(right)], dim=1), 1e-6)
    again = stereo.get_left_right_codes(stereo.encode(wav)[0])
    for side, found in enumerate(again):
        assert torch.equal(found, codec.encode(wav[:, side : side + 1])[0])


def test_each_stereo_channel_has_its_own_codes():
    stereo = InterleaveStereo(small())
    codes = random_codes(stereo, 1, 6)
    changed = codes.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 64
    before, after = stereo.decode(codes), stereo.decode(changed)
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.equal(before[:, 1], after[:, 1])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(4, 5, dtype=torch.long), r"\[B, K, T\].*got \[4, 5\]"),
        (torch.zeros(1, 5, 5, dtype=torch.long), r"K from 1 to 4.*got \[1, 5, 5\]"),
        (torch.zeros(1, 4, 0, dtype=torch.long), "T >= 1"),
        (torch.zeros(1, 4, 5), "integers, got torch.float32"),
        (torch.full((1, 4, 5), 64), "from 0 to 63, found 64.*cut them off"),
        (torch.full((1, 4, 5), -1), "found -1"),
    ],
)
def test_wrong_codes(codes, message):
    codec = small()
    for method in (codec.decode, codec.decode_latent):
        with pytest.raises(ValueError, match=message):
            method(codes)


@pytest.mark.parametrize(
    "wav", [torch.zeros(1, 100), torch.zeros(1, 2, 100), torch.zeros(1, 1, 0), torch.zeros(1, 1, 9, dtype=torch.int16)]
)
def test_wrong_waveforms(wav):
    with pytest.raises(ValueError, match=r"float \[B, 1, n\]"):
        small().encode(wav)


def test_other_wrong_arguments():
    codec = small()
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"1 to 4 codebooks, got {n}"):
            codec.set_num_codebooks(n)
    with pytest.raises(ValueError, match="scale"):
        codec.decode(random_codes(codec, 1, 2), torch.ones(1))
    with pytest.raises(ValueError, match="'replicate'"):
        EnCodec(CodecConfig(pad_mode="replicate"))
    with pytest.raises(ValueError, match="mono"):
        InterleaveStereo(small(channels=2))
    stereo = InterleaveStereo(codec)
    with pytest.raises(ValueError, match=r"\[B, 2, n\]"):
        stereo.encode(torch.zeros(1, 1, 100))
    for shape in ((1, 3, 5), (8, 5)):
        with pytest.raises(ValueError, match=r"\[B, 2 K, T\]"):
            stereo.decode(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(RuntimeError):
        stereo.decode_latent(random_codes(stereo, 1, 2))

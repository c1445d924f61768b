"""Both published layouts of EnCodec: names, weight norm, configurations, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from musicgen_fast.checkpoints.codec_weights import (
    canonical_codec_weights,
    codec_config_from_audiocraft,
    codec_config_from_transformers,
)
from musicgen_fast.config import CodecConfig
from musicgen_fast.errors import CheckpointError

from .codecs import (
    assert_near,
    audiocraft_cfg,
    audiocraft_model,
    encodec_config,
    loaded,
    random_codes,
    transformers_model,
)
from .oracle import audiocraft_lm as ac


def folded_state(model) -> dict[str, torch.Tensor]:
    """The state dict without weight norm, each weight the module's own."""
    state = {}
    for name, tensor in model.state_dict().items():
        stem, norm, which = name.partition(".parametrizations.weight.original")
        if not norm:
            state[name] = tensor
        elif which == "1":
            state[f"{stem}.weight"] = model.get_submodule(stem).weight.detach()
    return state


def test_every_form_of_the_weights():
    model = transformers_model()
    config = codec_config_from_transformers(model.config.to_dict())
    state = model.state_dict()
    expected = canonical_codec_weights(state, config, "a test")
    norm = "parametrizations.weight.original"
    old = {name.replace(f"{norm}0", "weight_g").replace(f"{norm}1", "weight_v"): t for name, t in state.items()}
    folded = folded_state(model)
    assert any(name.endswith("weight_g") for name in old) and len(folded) < len(old) == len(state)
    whole_model = {f"audio_encoder.{name}": tensor for name, tensor in state.items()}
    whole_model["decoder.model.decoder.embed_tokens.0.weight"] = torch.zeros(3, 3)
    whole_model["text_encoder.shared.weight"] = torch.zeros(3, 3)
    for tensors in (old, folded, whole_model):
        found = canonical_codec_weights(tensors, config, "a test")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], msg=name)


def test_half_precision_files_become_float32():
    model = transformers_model()
    config = codec_config_from_transformers(model.config.to_dict())
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    weights = canonical_codec_weights(half, config, "a test")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # folded in float32: the only rounding is that of the file
    exact = canonical_codec_weights({name: tensor.float() for name, tensor in half.items()}, config, "a test")
    assert all(torch.equal(weights[name], exact[name]) for name in weights)


def test_the_weights_are_copies():
    model = transformers_model()
    config = codec_config_from_transformers(model.config.to_dict())
    for state in (model.state_dict(), folded_state(model)):
        storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
        weights = canonical_codec_weights(state, config, "a test")
        assert not storages & {tensor.untyped_storage().data_ptr() for tensor in weights.values()}


def edited_state(change) -> tuple[dict, CodecConfig]:
    model = transformers_model()
    state = dict(model.state_dict())
    change(state)
    return state, codec_config_from_transformers(model.config.to_dict())


LAST = "decoder.layers.15.conv.parametrizations.weight.original0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(LAST), f"some.bin: lacks the codec's {LAST}$"),
        (lambda s: s.pop("encoder.layers.13.lstm.bias_hh_l1"), "bias_hh_l1"),
        (lambda s: s.clear(), "and [0-9]+ more"),
        (lambda s: s.update({LAST: torch.ones(1)}), r"original0 has shape \[1\], expected \[1, 1, 1\]"),
        (lambda s: s.update({"decoder.layers.0.conv.bias": torch.ones(3)}), r"shape \[3\], expected \[64\]"),
        (lambda s: s.update({"quantizer.layers.4.codebook.embed": torch.ones(64, 16)}), "no place for.*layers.4"),
        (lambda s: s.update({"encoder.layers.1.shortcut.conv.bias": torch.ones(4)}), "no place for.*shortcut"),
    ],
)
def test_wrong_weights(change, message):
    state, config = edited_state(change)
    with pytest.raises(CheckpointError, match=message):
        canonical_codec_weights(state, config, "some.bin")


def test_more_lstm_layers_than_configured():
    model = transformers_model()
    config = replace(codec_config_from_transformers(model.config.to_dict()), lstm_layers=1)
    with pytest.raises(CheckpointError, match="no place for.*_l1"):
        canonical_codec_weights(model.state_dict(), config, "some.bin")


# ---- configurations


def test_the_released_configuration():
    """facebook/encodec_32khz leaves out what has EncodecConfig's default value."""
    raw = {
        "model_type": "encodec", "sampling_rate": 32000, "num_filters": 64, "codebook_size": 2048,
        "codebook_dim": 128, "upsampling_ratios": [8, 5, 4, 4], "target_bandwidths": [2.2], "use_causal_conv": False,
        "use_conv_shortcut": False, "chunk_length_s": None, "overlap": None, "torch_dtype": "float32",
    }  # fmt: skip
    assert codec_config_from_transformers(raw) == CodecConfig()


@pytest.mark.parametrize("books", [1, 3, 4, 7, 8, 11])
@pytest.mark.parametrize("rate", [16000, 24000, 32000, 44100])
def test_the_number_of_codebooks_is_that_of_transformers(books, rate):
    from transformers import EncodecConfig

    raw = encodec_config(sampling_rate=rate, codebook_size=1024)
    raw["target_bandwidths"] = [0.5, books * math.ceil(rate / 640) * 10 / 1000]
    assert codec_config_from_transformers(raw).num_codebooks == EncodecConfig(**raw).num_quantizers
    del raw["target_bandwidths"]
    assert codec_config_from_transformers(raw).num_codebooks == EncodecConfig(**raw).num_quantizers


def test_defaults_are_those_of_transformers():
    """The default codec is causal with convolutions on its shortcuts, which is refused; all else is taken over."""
    from transformers import EncodecConfig

    off = {"use_causal_conv": False, "use_conv_shortcut": False}
    assert codec_config_from_transformers(off) == codec_config_from_transformers(EncodecConfig(**off).to_dict())
    for name in off:
        with pytest.raises(CheckpointError, match=f"{name} is True.*default"):
            codec_config_from_transformers({key: value for key, value in off.items() if key != name})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_causal_conv", True), ("use_conv_shortcut", True), ("normalize", True), ("chunk_length_s", 1.0),
        ("norm_type", "time_group_norm"), ("trim_right_ratio", 0.5), ("pad_mode", "replicate"), ("codebook_dim", 8),
        ("num_filters", 0), ("kernel_size", "seven"), ("upsampling_ratios", []), ("upsampling_ratios", [2, 0]),
        ("num_lstm_layers", -1), ("target_bandwidths", [0.001]), ("target_bandwidths", None),
        ("target_bandwidths", []), ("audio_channels", True),
    ],
)  # fmt: skip
def test_refused_by_transformers_key(key, value):
    with pytest.raises(CheckpointError, match=key) as caught:
        codec_config_from_transformers(encodec_config() | {key: value})
    shown = value[-1] if isinstance(value, list) and len(value) > 1 else value
    assert repr(shown) in str(caught.value)


def test_audiocraft_configuration():
    config = codec_config_from_audiocraft(audiocraft_cfg())
    assert config == CodecConfig(
        num_filters=4, dimension=16, pad_mode="constant", num_codebooks=4, codebook_size=64, ratios=(8, 5, 4, 4)
    )
    same_override = audiocraft_cfg(encoder={"n_filters": 8}, decoder={"n_filters": 8, "trim_right_ratio": 1.0})
    assert codec_config_from_audiocraft(same_override) == replace(config, num_filters=8)


@ac.needs_audiocraft
def test_defaults_are_those_of_audiocraft():
    cfg = audiocraft_cfg()
    cfg["seanet"] = {"encoder": {}, "decoder": {}, "n_filters": 4}
    cfg["rvq"] = {"kmeans_init": False}
    model, config = audiocraft_model(cfg), codec_config_from_audiocraft(cfg)
    codec = loaded(config, canonical_codec_weights(model.state_dict(), config, "a test"))
    codes = random_codes(codec, 1, 6)
    assert codes.shape[1] == 8 and codec.cardinality == 1024
    assert_near(codec.decode(codes), model.decode(codes))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "compression_model", "dac"), (None, "seanet", None), (None, "rvq", "none"),
        ("encodec", "renormalize", True), ("encodec", "causal", True), ("encodec", "quantizer", "no_quant"),
        ("encodec", "sample_rate", 0), ("seanet", "causal", True), ("seanet", "true_skip", False),
        ("seanet", "activation", "ReLU"), ("seanet", "norm", "time_group_norm"), ("seanet", "pad_mode", "circular"),
        ("seanet", "activation_params", {"alpha": 0.5}), ("seanet", "decoder", {"final_activation": "Tanh"}),
        ("seanet", "decoder", {"trim_right_ratio": 0.5}), ("seanet", "encoder", {"n_filters": 8}),
        ("seanet", "ratios", 8), ("rvq", "n_q", 0),
    ],
)  # fmt: skip
def test_refused_by_audiocraft_key(section, key, value):
    cfg = audiocraft_cfg()
    (cfg if section is None else cfg[section])[key] = value
    named = list(value)[0] if isinstance(value, dict) else key
    shown = list(value.values())[0] if isinstance(value, dict) else value
    with pytest.raises(CheckpointError, match=named) as caught:
        codec_config_from_audiocraft(cfg)
    assert repr(shown) in str(caught.value)

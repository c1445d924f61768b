"""Tiny codecs for tests: transformers', audiocraft's, and ours with random weights or with those of either."""

from __future__ import annotations

import math

import torch

from musicgen_fast.checkpoints.codec_weights import canonical_codec_weights, codec_config_from_transformers
from musicgen_fast.codec import EnCodec
from musicgen_fast.config import CodecConfig

from .oracle import audiocraft_lm as ac


def encodec_config(**changes) -> dict:
    config = {
        "sampling_rate": 32000, "num_filters": 4, "hidden_size": 16, "codebook_size": 64, "num_lstm_layers": 2,
        "upsampling_ratios": [8, 5, 4, 4], "use_causal_conv": False, "use_conv_shortcut": False, **changes,
    }  # fmt: skip
    frames = math.ceil(config["sampling_rate"] / math.prod(config["upsampling_ratios"]))
    kbits = 4 * frames * math.log2(config["codebook_size"]) / 1000
    return {"target_bandwidths": [kbits + 1e-9], **config}  # transformers rounds the number of codebooks down


def transformers_model(**changes):
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(1)
    model = EncodecModel(EncodecConfig(**encodec_config(**changes))).eval().requires_grad_(False)
    for name, buffer in model.named_buffers():
        if name.endswith("embed"):  # transformers leaves the codebooks at zero
            torch.nn.init.normal_(buffer)
    for name, parameter in model.named_parameters():
        if name.endswith("original0"):  # as after training: not the norm of the direction
            parameter *= torch.rand_like(parameter) + 0.5
    return model


def ours(model) -> EnCodec:
    config = codec_config_from_transformers(model.config.to_dict())
    return loaded(config, canonical_codec_weights(model.state_dict(), config, "a test"))


def loaded(config: CodecConfig, weights: dict) -> EnCodec:
    with torch.device("meta"):
        codec = EnCodec(config)
    codec.load_state_dict(weights, strict=True, assign=True)
    return codec


def small(seed: int = 0, **changes) -> EnCodec:
    """A random codec of ours alone."""
    torch.manual_seed(seed)
    defaults = {"num_filters": 4, "dimension": 16, "codebook_size": 64, "ratios": (4, 2), "lstm_layers": 1}
    codec = EnCodec(CodecConfig(**{**defaults, **changes}))
    for name, parameter in codec.named_parameters():
        fan_in = parameter.shape[1:].numel() if name.endswith("weight") else 1
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    return codec


def random_codes(codec, batch: int, frames: int, books: int | None = None) -> torch.Tensor:
    return torch.randint(codec.cardinality, (batch, books or codec.num_codebooks, frames))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs().max()
    assert scale > 1e-3, "the reference is silent: the comparison would show nothing"
    assert (actual - expected).abs().max() <= tolerance * scale


def audiocraft_cfg(**changes) -> dict:
    """The parts of a compression model's xp.cfg that build it, with values as audiocraft's own configuration has."""
    seanet = {
        "dimension": 16, "channels": 1, "causal": False, "n_filters": 4, "n_residual_layers": 1,
        "ratios": [8, 5, 4, 4], "activation": "ELU", "activation_params": {"alpha": 1.0}, "norm": "weight_norm",
        "norm_params": {}, "kernel_size": 7, "residual_kernel_size": 3, "last_kernel_size": 7, "dilation_base": 2,
        "pad_mode": "constant", "true_skip": True, "compress": 2, "lstm": 2, "disable_norm_outer_blocks": 0,
        "encoder": {},
        "decoder": {"trim_right_ratio": 1.0, "final_activation": None, "final_activation_params": None},
    }  # fmt: skip
    return {
        "compression_model": "encodec", "sample_rate": 32000, "channels": 1, "device": "cpu",
        "encodec": {"autoencoder": "seanet", "quantizer": "rvq", "sample_rate": 32000, "channels": 1,
                    "causal": False, "renormalize": False},
        "seanet": {**seanet, **changes},
        "rvq": {"n_q": 4, "q_dropout": False, "bins": 64, "kmeans_init": True},
    }  # fmt: skip


def audiocraft_model(cfg: dict):
    audiocraft = ac.load()
    from omegaconf import OmegaConf

    torch.manual_seed(2)
    model = audiocraft.models.builders.get_compression_model(OmegaConf.create(cfg)).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name.endswith("_codebook.embed"):
            torch.nn.init.normal_(tensor)
        if name.endswith("weight_g"):
            tensor *= torch.rand_like(tensor) + 0.5
    return model

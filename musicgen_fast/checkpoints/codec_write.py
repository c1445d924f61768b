"""From canonical codec weights (`codec.EnCodec`, channels last, weight norm folded) back to transformers' EnCodec.

The inverse of `codec_weights.py`, for `write.py`. Weight norm is put back as (norm, direction) with the weight itself
as the direction, so reading the result again gives the same weights within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..config import CodecConfig

__all__ = ["transformers_codec_config", "transformers_codec_weights"]


def transformers_codec_config(config: CodecConfig) -> dict[str, Any]:
    """The `audio_encoder` section of a config.json."""
    return {
        "model_type": "encodec",
        "sampling_rate": config.sample_rate,
        "audio_channels": config.channels,
        "upsampling_ratios": list(config.ratios),
        "num_filters": config.num_filters,
        "hidden_size": config.dimension,
        "codebook_dim": config.dimension,
        "codebook_size": config.codebook_size,
        "target_bandwidths": [_bandwidth(config)],
        "kernel_size": config.kernel_size,
        "last_kernel_size": config.last_kernel_size,
        "residual_kernel_size": config.residual_kernel_size,
        "num_residual_layers": config.num_residual_layers,
        "dilation_growth_rate": config.dilation_base,
        "compress": config.compress,
        "num_lstm_layers": config.lstm_layers,
        "pad_mode": config.pad_mode,
        "trim_right_ratio": config.trim_right_ratio,
        "norm_type": "weight_norm",
        "use_causal_conv": False,
        "use_conv_shortcut": False,
        "normalize": False,
        "chunk_length_s": None,
        "overlap": None,
    }


def _bandwidth(config: CodecConfig) -> float:
    """kbit/s from which transformers derives the number of codebooks, rounding down: 2.2 for 4 x 2048 at 50 Hz."""
    bits = math.ceil(math.log2(config.codebook_size))
    rate = config.num_codebooks * math.ceil(config.sample_rate / config.hop_length) * bits
    return rate / 1000 if 1000 * (rate / 1000) >= rate else math.nextafter(rate / 1000, math.inf)


def transformers_codec_weights(weights: dict[str, Tensor], config: CodecConfig) -> dict[str, Tensor]:
    """Tensors of an `EncodecModel`, without the statistics of its codebooks (training only).

    Raises:
        ValueError: a codec without an LSTM, which transformers cannot build.
    """
    if not config.lstm_layers:
        raise ValueError("transformers has no EnCodec without an LSTM")
    out: dict[str, Tensor] = {}
    for ours, theirs in (*_encoder_names(config), *_decoder_names(config)):
        if ours.endswith("lstm"):
            out.update({f"{theirs}{k[len(ours) :]}": v.clone() for k, v in weights.items() if k.startswith(f"{ours}.")})
            continue
        weight, bias = weights[f"{ours}.weight"], weights[f"{ours}.bias"]
        direction = _transposed(weight, len(bias)) if ours.endswith(".up") else weight.transpose(1, 2).contiguous()
        out[f"{theirs}.parametrizations.weight.original0"] = direction.flatten(1).norm(dim=1)[:, None, None]
        out[f"{theirs}.parametrizations.weight.original1"] = direction
        out[f"{theirs}.bias"] = bias.clone()
    for k in range(config.num_codebooks):
        out[f"quantizer.layers.{k}.codebook.embed"] = weights[f"codebooks.{k}"].clone()
    return out


def _transposed(weight: Tensor, c_out: int) -> Tensor:
    """[stride C_out, 2 (earlier input first), C_in] -> the [C_in, C_out, 2 stride] of a ConvTranspose1d."""
    earlier, current = weight.unflatten(0, (-1, c_out)).permute(2, 3, 1, 0)
    return torch.cat([current, earlier], dim=-1).contiguous()


def _encoder_names(config: CodecConfig) -> Iterator[tuple[str, str]]:
    """(our module, transformers' module); activations count as layers there."""
    yield "encoder.first", "encoder.layers.0.conv"
    index = 1
    for stage in range(len(config.ratios)):
        yield from _blocks(f"encoder.stages.{stage}", "encoder", index, config)
        index += config.num_residual_layers + 1
        yield f"encoder.stages.{stage}.down", f"encoder.layers.{index}.conv"
        index += 1
    yield "encoder.lstm", f"encoder.layers.{index}.lstm"
    yield "encoder.last", f"encoder.layers.{index + 2}.conv"


def _decoder_names(config: CodecConfig) -> Iterator[tuple[str, str]]:
    yield "decoder.first", "decoder.layers.0.conv"
    yield "decoder.lstm", "decoder.layers.1.lstm"
    index = 3
    for stage in range(len(config.ratios)):
        yield f"decoder.stages.{stage}.up", f"decoder.layers.{index}.conv"
        yield from _blocks(f"decoder.stages.{stage}", "decoder", index + 1, config)
        index += config.num_residual_layers + 2
    yield "decoder.last", f"decoder.layers.{index}.conv"


def _blocks(stage: str, side: str, index: int, config: CodecConfig) -> Iterator[tuple[str, str]]:
    for j in range(config.num_residual_layers):
        yield f"{stage}.blocks.{j}.wide", f"{side}.layers.{index + j}.block.1.conv"
        yield f"{stage}.blocks.{j}.point", f"{side}.layers.{index + j}.block.3.conv"

"""Codecs for files to be: their configurations in both layouts, and their tensors from either layout or from ours.

The inverse of `codec_weights.py`. Between the layouts every tensor stays bit for bit: only names change. From canonical
weights (`codec.EnCodec`, channels last, weight norm folded) weight norm is put back as (norm, direction) with the
weight itself as the direction, so reading the result again gives the same weights within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import CodecConfig
from ..errors import CheckpointError
from .codec_weights import _layers
from .entries import Entry

__all__ = [
    "audiocraft_codec_config",
    "codec_entries",
    "transformers_codec_config",
    "transformers_codec_weights",
]

_GAIN = {"audiocraft": "weight_g", "transformers": "parametrizations.weight.original0"}
_DIRECTION = {"audiocraft": "weight_v", "transformers": "parametrizations.weight.original1"}


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


def audiocraft_codec_config(config: CodecConfig) -> dict[str, Any]:
    """The `xp.cfg` of a compression model: what audiocraft's builders read to make this codec."""
    return {
        "solver": "compression",
        "sample_rate": config.sample_rate,
        "channels": config.channels,
        "compression_model": "encodec",
        "encodec": {
            "autoencoder": "seanet",
            "quantizer": "rvq",
            "sample_rate": config.sample_rate,
            "channels": config.channels,
            "causal": False,
            "renormalize": False,
        },
        "seanet": {
            "dimension": config.dimension,
            "channels": config.channels,
            "causal": False,
            "n_filters": config.num_filters,
            "n_residual_layers": config.num_residual_layers,
            "ratios": list(config.ratios),
            "activation": "ELU",
            "activation_params": {"alpha": 1.0},
            "norm": "weight_norm",
            "norm_params": {},
            "kernel_size": config.kernel_size,
            "residual_kernel_size": config.residual_kernel_size,
            "last_kernel_size": config.last_kernel_size,
            "dilation_base": config.dilation_base,
            "pad_mode": config.pad_mode,
            "true_skip": True,
            "compress": config.compress,
            "lstm": config.lstm_layers,
            "disable_norm_outer_blocks": 0,
            "encoder": {},
            "decoder": {"trim_right_ratio": config.trim_right_ratio, "final_activation": None},
        },
        "rvq": {"n_q": config.num_codebooks, "bins": config.codebook_size, "q_dropout": False},
    }


def codec_entries(tensors: Mapping[str, Tensor], config: CodecConfig, layout: str, source: str) -> list[Entry]:
    """The tensors of a codec file under the names of `layout`, values untouched.

    What a codebook needs for training is made up where the source lacks it: audiocraft loads nothing without.

    Args:
        tensors: names of either layout, without a prefix; weight norm in any of its spellings, or folded.
        layout: 'audiocraft' or 'transformers', of the result.
        source: the file, for messages.
    """
    if layout == "transformers" and not config.lstm_layers:
        raise CheckpointError(f"{source}: its codec has no LSTM; transformers cannot build such an EnCodec")
    old = any(name.startswith(("encoder.model.", "quantizer.vq.")) for name in tensors)
    out = []
    for layer in _layers(config):
        stem, target = layer.published("audiocraft" if old else "transformers"), layer.published(layout)
        for name, shape in layer.tensors().items():
            if name != "weight":
                out.append(Entry.of(f"{target}.{name}", _found(tensors, f"{stem}.{name}", shape, source)))
                continue
            gain, direction = _weight_norm(tensors, stem, shape, source)
            out.append(Entry.of(f"{target}.{_GAIN[layout]}", gain))
            out.append(Entry.of(f"{target}.{_DIRECTION[layout]}", direction))
        if layer.kind == "codebook":
            out += _bookkeeping(tensors, stem, target)
    return out


def _found(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], source: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{source}: lacks the codec's {name!r}")
    if tuple(tensors[name].shape) != shape:
        raise CheckpointError(
            f"{source}: {name!r} has shape {list(tensors[name].shape)}, expected {list(shape)}; "
            "the weights belong to another configuration"
        )
    return tensors[name]


def _weight_norm(
    tensors: Mapping[str, Tensor], stem: str, shape: tuple[int, ...], source: str
) -> tuple[Tensor, Tensor]:
    """(norm, direction) of a convolution, computed where the file has the weight folded."""
    for layout in _GAIN:
        gain, direction = f"{stem}.{_GAIN[layout]}", f"{stem}.{_DIRECTION[layout]}"
        if gain in tensors or direction in tensors:
            return _found(tensors, gain, (shape[0], 1, 1), source), _found(tensors, direction, shape, source)
    weight = _found(tensors, f"{stem}.weight", shape, source)
    return _norm(weight), weight


def _norm(direction: Tensor) -> Tensor:
    return direction.flatten(1).norm(dim=1)[:, None, None]


def _bookkeeping(tensors: Mapping[str, Tensor], stem: str, target: str) -> list[Entry]:
    embed = tensors[f"{stem}.embed"]
    made = {"inited": torch.ones(1), "cluster_size": torch.ones(len(embed)), "embed_avg": embed}
    return [Entry.of(f"{target}.{name}", tensors.get(f"{stem}.{name}", value)) for name, value in made.items()]


def transformers_codec_weights(weights: dict[str, Tensor], config: CodecConfig) -> dict[str, Tensor]:
    """Tensors of an `EncodecModel` from canonical ones, without the statistics of its codebooks (training only).

    Raises:
        ValueError: a codec without an LSTM, which transformers cannot build.
    """
    if not config.lstm_layers:
        raise ValueError("transformers has no EnCodec without an LSTM")
    out: dict[str, Tensor] = {}
    for layer in _layers(config):
        name, stem = layer.name, layer.published("transformers")
        if layer.kind == "codebook":
            out[f"{stem}.embed"] = weights[name].clone()
        elif layer.kind == "lstm":
            out.update({f"{stem}.{part}": weights[f"{name}.{part}"].clone() for part in layer.tensors()})
        else:
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            direction = _transposed(weight, len(bias)) if layer.kind == "up" else weight.transpose(1, 2).contiguous()
            out[f"{stem}.{_GAIN['transformers']}"] = _norm(direction)
            out[f"{stem}.{_DIRECTION['transformers']}"] = direction
            out[f"{stem}.bias"] = bias.clone()
    return out


def _transposed(weight: Tensor, c_out: int) -> Tensor:
    """[stride C_out, 2 (earlier input first), C_in] -> the [C_in, C_out, 2 stride] of a ConvTranspose1d."""
    earlier, current = weight.unflatten(0, (-1, c_out)).permute(2, 3, 1, 0)
    return torch.cat([current, earlier], dim=-1).contiguous()

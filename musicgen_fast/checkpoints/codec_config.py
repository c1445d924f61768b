"""EnCodec's configuration: an `EncodecConfig` of transformers or the xp.cfg of audiocraft -> `CodecConfig`.

What a codec of MusicGen or AudioGen never is (causal, renormalising, chunked, with convolutions on the shortcuts) is
refused by key and value. Reads no files: callers pass parsed JSON or YAML with interpolations resolved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import CodecConfig
from ..errors import CheckpointError
from .xp_config import shown

__all__ = ["codec_config_from_audiocraft", "codec_config_from_transformers"]

# transformers' key, our field, EncodecConfig's default (its files may leave out what has the default value)
_TRANSFORMERS_FIELDS = (
    ("sampling_rate", "sample_rate", 24000),
    ("audio_channels", "channels", 1),
    ("num_filters", "num_filters", 32),
    ("hidden_size", "dimension", 128),
    ("kernel_size", "kernel_size", 7),
    ("last_kernel_size", "last_kernel_size", 7),
    ("residual_kernel_size", "residual_kernel_size", 3),
    ("num_residual_layers", "num_residual_layers", 1),
    ("dilation_growth_rate", "dilation_base", 2),
    ("compress", "compress", 2),
    ("num_lstm_layers", "lstm_layers", 2),
    ("codebook_size", "codebook_size", 1024),
)
# audiocraft's key in `seanet`, our field, the default of SEANetEncoder and SEANetDecoder
_SEANET_FIELDS = (
    ("channels", "channels", 1),
    ("dimension", "dimension", 128),
    ("n_filters", "num_filters", 32),
    ("kernel_size", "kernel_size", 7),
    ("last_kernel_size", "last_kernel_size", 7),
    ("residual_kernel_size", "residual_kernel_size", 3),
    ("n_residual_layers", "num_residual_layers", 3),
    ("dilation_base", "dilation_base", 2),
    ("compress", "compress", 2),
    ("lstm", "lstm_layers", 0),
)
_MAY_BE_ZERO = {"num_residual_layers", "lstm_layers"}
# so that a damaged file cannot ask for more layers than there is time to list them
_MOST = {"num_residual_layers": 64, "lstm_layers": 64, "num_codebooks": 256, "compress": 1 << 10, "ratios": 1 << 10}
_LARGEST = 1 << 20


def codec_config_from_transformers(config: Mapping[str, Any]) -> CodecConfig:
    """The `CodecConfig` of an `EncodecConfig` as parsed JSON; keys left out have transformers' defaults.

    Raises:
        CheckpointError: a codec that is not supported, or a value that makes no sense; the key and value are named.
    """
    _refuse_unless(config, "use_causal_conv", True, (False,))
    _refuse_unless(config, "use_conv_shortcut", True, (False,))
    _refuse_unless(config, "normalize", False, (False,))
    _refuse_unless(config, "chunk_length_s", None, (None,))
    _refuse_unless(config, "norm_type", "weight_norm", ("weight_norm",))
    _refuse_unless(config, "trim_right_ratio", 1.0, (1.0,))
    _refuse_unless(config, "pad_mode", "reflect", ("reflect", "constant"))
    fields = {ours: _whole(config, key, default, ours) for key, ours, default in _TRANSFORMERS_FIELDS}
    if config.get("codebook_dim") is not None:
        _refuse_unless(config, "codebook_dim", None, (fields["dimension"],))
    ratios = _ratios(config, "upsampling_ratios")
    bandwidths = config.get("target_bandwidths", (1.5, 3.0, 6.0, 12.0, 24.0))
    bits = math.ceil(math.log2(fields["codebook_size"]))
    one = math.ceil(fields["sample_rate"] / math.prod(ratios)) * bits  # bit/s of a codebook
    try:
        codebooks = int(1000 * bandwidths[-1] // one)  # in this order: transformers' rounding
    except (TypeError, ValueError, LookupError, ArithmeticError):
        codebooks = 0
    if not 1 <= codebooks <= _MOST["num_codebooks"]:
        raise CheckpointError(
            f"target_bandwidths is {shown(bandwidths)}, expected kbit/s; one codebook takes {one / 1000}"
        )
    return CodecConfig(**fields, ratios=ratios, pad_mode=config.get("pad_mode", "reflect"), num_codebooks=codebooks)


def codec_config_from_audiocraft(cfg: Mapping[str, Any]) -> CodecConfig:
    """The `CodecConfig` of the `xp.cfg` of a compression model, parsed and with interpolations resolved.

    Keys left out have the defaults of audiocraft's classes, as in its `builders.get_compression_model`.

    Raises:
        CheckpointError: a codec that is not supported, or a value that makes no sense; the key and value are named.
    """
    _refuse_unless(cfg, "compression_model", "encodec", ("encodec",))
    encodec, seanet, rvq = (cfg.get(name) for name in ("encodec", "seanet", "rvq"))
    for name, section in (("encodec", encodec), ("seanet", seanet), ("rvq", rvq)):
        if not isinstance(section, Mapping):
            raise CheckpointError(f"{name} is {shown(section)}; the configuration of an EnCodec has that section")
    assert isinstance(encodec, Mapping) and isinstance(seanet, Mapping) and isinstance(rvq, Mapping)
    for key, values in (("autoencoder", ("seanet",)), ("quantizer", ("rvq",)), ("renormalize", (False, None)),
                        ("causal", (False, None))):  # fmt: skip
        _refuse_unless(encodec, key, values[0], values, "encodec.")
    for key in ("encoder", "decoder", "activation_params"):
        if not isinstance(seanet.get(key) or {}, Mapping):
            raise CheckpointError(f"seanet.{key} is {shown(seanet[key])}, expected a mapping")
    sides = [{**seanet, **(seanet.get(side) or {})} for side in ("encoder", "decoder")]
    decoder = sides[1]
    for side in sides:
        _refuse_seanet(side)
    for key in (*(name for name, _, _ in _SEANET_FIELDS), "ratios", "pad_mode"):
        if sides[0].get(key) != decoder.get(key):
            raise CheckpointError(
                f"seanet.{key} is {shown(sides[0].get(key))} in the encoder, {shown(decoder.get(key))} in the decoder; "
                "only codecs with the same on both sides are supported"
            )
    rate = encodec if "sample_rate" in encodec else cfg
    return CodecConfig(
        **{ours: _whole(decoder, key, default, ours, "seanet.") for key, ours, default in _SEANET_FIELDS},
        sample_rate=_whole(rate, "sample_rate", None, "sample_rate"),
        ratios=_ratios(decoder, "ratios", "seanet."),
        pad_mode=decoder.get("pad_mode", "reflect"),
        num_codebooks=_whole(rvq, "n_q", 8, "num_codebooks", "rvq."),
        codebook_size=_whole(rvq, "bins", 1024, "codebook_size", "rvq."),
    )


def _refuse_seanet(side: Mapping[str, Any]) -> None:
    accepted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "causal": (False, (False, None)),
        "activation": ("ELU", ("ELU",)),
        "norm": ("none", ("weight_norm", "none")),
        "true_skip": (True, (True,)),
        "trim_right_ratio": (1.0, (1.0,)),
        "final_activation": (None, (None,)),
        "pad_mode": ("reflect", ("reflect", "constant")),
    }
    for key, (default, values) in accepted.items():
        _refuse_unless(side, key, default, values, "seanet.")
    _refuse_unless(side.get("activation_params") or {}, "alpha", 1.0, (1.0,), "seanet.activation_params.")


def _refuse_unless(
    config: Mapping[str, Any], key: str, default: Any, accepted: tuple[Any, ...], where: str = ""
) -> None:
    value = config.get(key, default)
    if value not in accepted:
        wanted = " or ".join(repr(v) for v in accepted if v is not None) or "unset"
        missing = "" if key in config else " (its default)"
        raise CheckpointError(f"{where}{key} is {shown(value)}{missing}; this codec is not supported, only {wanted}")


def _whole(config: Mapping[str, Any], key: str, default: int | None, field: str, where: str = "") -> int:
    value = config.get(key, default)
    least = 0 if field in _MAY_BE_ZERO else 1
    most = _MOST.get(field, _LARGEST)
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not least <= value <= most or value != int(value):
        raise CheckpointError(f"{where}{key} is {shown(value)}, expected a whole number from {least} to {most}")
    return int(value)


def _ratios(config: Mapping[str, Any], key: str, where: str = "") -> tuple[int, ...]:
    values = config.get(key, (8, 5, 4, 2))
    if not isinstance(values, (list, tuple)) or not 0 < len(values) <= 16:
        raise CheckpointError(f"{where}{key} is {shown(values)}, expected a list of up to 16 strides")
    return tuple(_whole({key: value}, key, None, "ratios", where) for value in values)

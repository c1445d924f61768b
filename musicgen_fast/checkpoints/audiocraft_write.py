"""The training configuration (`xp.cfg`) that an audiocraft file needs, for models that come from elsewhere.

The inverse of `audiocraft_config.py`: plain dicts for YAML, with every field that audiocraft's builders ask for. Knows
no tensors; the codec's own configuration is in `codec_write.py`.
"""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig

__all__ = ["audiocraft_config"]


def audiocraft_config(config: ModelConfig, sample_rate: int) -> dict[str, Any]:
    """The `xp.cfg` of a language model: what audiocraft's builders read to make it (no solver, no training).

    Raises:
        ValueError: a style model; its configuration can only be carried over.
    """
    if config.style is not None:
        raise ValueError("the configuration of a style model cannot be made up: it must come from an audiocraft file")
    pattern, conditioners = config.pattern, _conditioners(config)
    delays = list(pattern.delays) or [k // config.audio_channels for k in range(config.num_codebooks)]
    prefix = config.conditioning == "prefix"
    options = {
        "delay": {"delays": delays, "flatten_first": pattern.flatten_first, "empty_initial": pattern.empty_initial},
        "unroll": {"flattening": list(pattern.flattening), "delays": list(pattern.delays)},
        "coarse_first": {"delays": list(pattern.delays)},
        "musiclm": {"group_by": pattern.group_by},
    }
    return {
        "solver": config.family,
        "sample_rate": sample_rate,
        "channels": config.audio_channels,
        "lm_model": "transformer_lm",
        "dataset": {"segment_duration": config.max_duration},
        "transformer_lm": _transformer_lm(config),
        "codebooks_pattern": {"modeling": pattern.kind, pattern.kind: options.get(pattern.kind, {})},
        "classifier_free_guidance": {"training_dropout": 0.3, "inference_coef": config.cfg_coef},
        "attribute_dropout": {},
        "fuser": {
            "cross_attention_pos_emb": False,
            "cross_attention_pos_emb_scale": 1,
            "sum": [],
            "prepend": list(conditioners) if prefix else [],
            "cross": [] if prefix else list(conditioners),
            "input_interpolate": [],
        },
        "conditioners": conditioners,
        "interleave_stereo_codebooks": {"use": config.audio_channels == 2, "per_timestep": False},
    }


def _conditioners(config: ModelConfig) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    if config.melody is not None:
        chroma = {
            "sample_rate": config.melody.sample_rate,
            "n_chroma": config.melody.n_chroma,
            "radix2_exp": config.melody.radix2_exp,
            "argmax": config.melody.argmax,
            "match_len_on_eval": False,
        }
        parts["self_wav"] = {"model": "chroma_stem", "chroma_stem": chroma}
    if config.text is not None:
        t5 = {"name": config.text.name, "finetune": False, "word_dropout": 0.0, "normalize_text": False}
        parts["description"] = {"model": "t5", "t5": t5}
    return parts


def _transformer_lm(config: ModelConfig) -> dict[str, Any]:
    scale = config.ffn_dim / config.dim
    return {
        "dim": config.dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "hidden_scale": int(scale) if scale == int(scale) else scale,
        "n_q": config.num_codebooks,
        "card": config.vocab_size,
        "dropout": 0.0,
        "activation": "gelu",
        "norm": "layer_norm",
        "norm_first": True,
        "bias_ff": False,
        "bias_attn": False,
        "bias_proj": False,
        "causal": True,
        "custom": False,
        "memory_efficient": True,
        "attention_as_float32": False,
        "positional_embedding": "sin",
        "weight_init": "gaussian",
        "depthwise_init": "current",
        "zero_bias_init": True,
        "cross_attention": False,
        "two_step_cfg": config.two_step_cfg,
    }

"""Configurations of tiny models as audiocraft's training writes them (`xp.cfg`), for the checkpoints of the tests."""

from __future__ import annotations

import copy
from typing import Any

from musicgen_fast.checkpoints import Checkpoint
from musicgen_fast.config import CodecConfig, ModelConfig


def xp_cfg(checkpoint: Checkpoint) -> dict[str, Any]:
    """The training configuration of a MusicGen: interpolations as an export leaves them, some fields of training."""
    config = checkpoint.config
    delays = list(config.pattern.delays)
    prefix = config.conditioning == "prefix"
    conditioners: dict[str, Any] = {"args": {"merge_text_conditions_p": 0.25, "drop_desc_p": 0.5}}
    if config.text is not None:
        t5 = {"name": config.text.name, "finetune": False, "word_dropout": 0.3, "normalize_text": False}
        conditioners["description"] = {"model": "t5", "t5": t5}
    if config.melody is not None:
        conditioners["self_wav"] = {"model": "chroma_stem", "chroma_stem": dict(_CHROMA)}
    if config.style is not None:
        style = {**_STYLE, "bins": config.style.codebook_size}
        conditioners["self_wav"] = {"model": "style", "style": style}
    placed = [name for name in ("self_wav", "description") if name in conditioners]
    return {
        "solver": "musicgen",
        "sample_rate": checkpoint.codec_config.sample_rate,
        "channels": config.audio_channels,
        "lm_model": "transformer_lm",
        "dataset": {"segment_duration": config.max_duration, "batch_size": 192},
        "transformer_lm": _transformer_lm(config),
        "codebooks_pattern": {
            "modeling": "delay",
            "delay": {"delays": delays, "flatten_first": 0, "empty_initial": 0},
            "unroll": {"flattening": [0, 1, 2, 3], "delays": [0, 0, 0, 0]},
            "music_lm": {"group_by": 4},
            "coarse_first": {"delays": [0] * (config.num_codebooks - 1)},
        },
        "classifier_free_guidance": {"training_dropout": 0.3, "inference_coef": config.cfg_coef},
        "attribute_dropout": {"text": {}, "wav": {}},
        "fuser": {
            "cross_attention_pos_emb": False,
            "cross_attention_pos_emb_scale": 1,
            "sum": [],
            "prepend": placed if prefix else [],
            "cross": [] if prefix else placed,
            "input_interpolate": [],
        },
        "conditioners": conditioners,
        "interleave_stereo_codebooks": {"use": config.audio_channels == 2, "per_timestep": False},
        "generate": {"audio": {"sample_rate": "${sample_rate}"}, "home": "${oc.env:HOME}"},
        "optim": {"lr": "${.base}", "base": "1e-4"},
    }


_CHROMA = {
    "sample_rate": "${sample_rate}",
    "n_chroma": 12,
    "radix2_exp": 14,
    "argmax": True,
    "match_len_on_eval": False,
    "eval_wavs": None,
    "n_eval_wavs": 100,
    "cache_path": "/somewhere",
}
_STYLE = {
    "model_name": "mert",
    "transformer_scale": "xsmall",
    "sample_rate": "${sample_rate}",
    "encodec_checkpoint": "//pretrained/facebook/encodec_32khz",
    "encodec_n_q": 3,
    "length": 3.0,
    "ds_factor": 15,
    "n_q_out": 6,
    "eval_q": 3,
    "q_dropout": True,
    "varying_lengths": [1.5, 4.5],
    "batch_norm": True,
    "compute_mask": True,
    "num_codebooks_lm": "${transformer_lm.n_q}",
    "ds_rate_compression": 640,
    "use_middle_of_segment": False,
    "rvq_threshold_ema_dead_code": 0.1,
}


def _transformer_lm(config: ModelConfig) -> dict[str, Any]:
    return {
        "dim": config.dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "hidden_scale": config.ffn_dim // config.dim,
        "n_q": config.num_codebooks,
        "card": config.vocab_size,
        "dropout": 0.0,
        "emb_lr": None,
        "activation": "gelu",
        "norm_first": True,
        "bias_ff": False,
        "bias_attn": False,
        "bias_proj": False,
        "past_context": None,
        "causal": True,
        "custom": False,
        "memory_efficient": True,
        "attention_as_float32": False,
        "layer_scale": None,
        "positional_embedding": "sin",
        "xpos": False,
        "checkpointing": "none",
        "weight_init": "gaussian",
        "depthwise_init": "current",
        "zero_bias_init": True,
        "norm": "layer_norm",
        "cross_attention": False,
        "qk_layer_norm": False,
        "qk_layer_norm_cross": False,
        "attention_dropout": None,
        "kv_repeat": 1,
        "two_step_cfg": config.two_step_cfg,
    }


def codec_xp_cfg(codec: CodecConfig) -> dict[str, Any]:
    """The training configuration of an EnCodec."""
    return {
        "solver": "compression",
        "sample_rate": codec.sample_rate,
        "channels": codec.channels,
        "compression_model": "encodec",
        "encodec": {
            "autoencoder": "seanet",
            "quantizer": "rvq",
            "sample_rate": "${sample_rate}",
            "channels": "${channels}",
            "causal": False,
            "renormalize": False,
        },
        "seanet": {
            "dimension": codec.dimension,
            "channels": "${channels}",
            "causal": "${encodec.causal}",
            "n_filters": codec.num_filters,
            "n_residual_layers": codec.num_residual_layers,
            "ratios": list(codec.ratios),
            "activation": "ELU",
            "activation_params": {"alpha": 1.0},
            "norm": "weight_norm",
            "norm_params": {},
            "kernel_size": codec.kernel_size,
            "residual_kernel_size": codec.residual_kernel_size,
            "last_kernel_size": codec.last_kernel_size,
            "dilation_base": codec.dilation_base,
            "pad_mode": codec.pad_mode,
            "true_skip": True,
            "compress": codec.compress,
            "lstm": codec.lstm_layers,
            "disable_norm_outer_blocks": 0,
            "decoder": {
                "trim_right_ratio": codec.trim_right_ratio,
                "final_activation": None,
                "final_activation_params": None,
            },
            "encoder": {},
        },
        "rvq": {"n_q": codec.num_codebooks, "bins": codec.codebook_size, "q_dropout": False, "decay": 0.99},
    }


def edited(cfg: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with dotted fields set, or removed where the value is `...`."""
    cfg = copy.deepcopy(cfg)
    for field, value in changes.items():
        *path, last = field.split(".")
        section = cfg
        for key in path:
            section = section.setdefault(key, {})
        if value is ...:
            section.pop(last, None)
        else:
            section[last] = value
    return cfg

"""Arguments of transformers' `generate`: which value counts, which are not ours, a request repeated.

Knows names only; needs no class of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# arguments that transformers' generate takes and we never look at
_THEIRS = (
    *("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate"),
    *("prefix_allowed_tokens_fn", "past_key_values", "decoder_attention_mask", "decoder_inputs_embeds"),
)
# settings that make another way of generating
_MODES = (
    *("penalty_alpha", "constraints", "force_words_ids", "dola_layers", "prompt_lookup_num_tokens"),
    *("assistant_early_exit",),
)


def setting(model: Any, generation_config: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """The value that counts: the keyword's, the configuration's that was given, else the model's."""
    for source in (kwargs.get(name), getattr(generation_config, name, None)):
        if source is not None:
            return source
    return getattr(model.generation_config, name, None)


def unsupported_arguments(
    model: Any, generation_config: Any, processors: Any, criteria: Any, kwargs: Mapping[str, Any]
) -> list[str]:
    """What of a call must go to the model's own generate as a whole."""
    names = [name for name in _THEIRS if kwargs.get(name) is not None]
    names += [name for name in _MODES if setting(model, generation_config, kwargs, name) is not None]
    for name in ("num_beams", "num_beam_groups"):
        if (setting(model, generation_config, kwargs, name) or 1) > 1:
            names.append(name)
    if processors is not None and len(processors):
        names.append("logits_processor")
    if criteria is not None and len(criteria):
        names.append("stopping_criteria")
    if model.training:
        names.append("training mode (model.eval() ends it)")
    return names


def expanded(
    inputs: Tensor | None, kwargs: Mapping[str, Any], count: int, num_codebooks: int
) -> tuple[Tensor | None, dict[str, Any]]:
    """Every request `count` times, side by side: [B, ...] -> [B*count, ...]. Token prompts are [B*K, T]."""

    def repeat(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            if name == "decoder_input_ids":
                return value.unflatten(0, (-1, num_codebooks)).repeat_interleave(count, dim=0).flatten(0, 1)
            return value.repeat_interleave(count, dim=0)
        if name == "encoder_outputs" and value is not None:
            return (value[0].repeat_interleave(count, dim=0),)
        return value

    if inputs is None and not any(torch.is_tensor(v) for v in kwargs.values()):
        return inputs, dict(kwargs)
    return repeat("inputs", inputs), {name: repeat(name, value) for name, value in kwargs.items()}

"""The configuration of a PEFT adapter (`adapter_config.json`): refused by name, or the scale of each module's update.

What is computed is plain LoRA, W + scale * alpha / r * B A (alpha / sqrt(r) with `use_rslora`), with PEFT's rules for
which pattern of `rank_pattern` and `alpha_pattern` a module falls under. Reads no file and knows no model.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .xp_config import Section

__all__ = ["LoraConfig"]

# field: what it is; each changes what the adapter computes
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "a bias inside the update",
    "layer_replication": "copied layers",
    "target_parameters": "updates of bare parameters",
    "trainable_token_indices": "trained rows of an embedding",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's layers",
}
# ways to begin the training that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) change it
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_QUANTIFIERS = 3  # of one pattern: what backtracking can cost grows with the length of a name to this power
_SECONDS = 1.0  # for all patterns on all modules; real ones take milliseconds


class LoraConfig:
    """The fields of an `adapter_config.json` that decide the update; `label` is the file."""

    def __init__(self, raw: Mapping[str, Any], label: str) -> None:
        """Raises CheckpointError: another method than LoRA, or a variant of it that is not computed, by name."""
        self.label = label
        fields = Section(dict(raw), f"{label}: ")
        kind = fields.get("peft_type", "LORA")
        if kind != "LORA":
            raise CheckpointError(f"{label}: peft_type is {kind!r}; only LoRA adapters can be merged")
        for field, meaning in _REFUSED.items():
            if raw.get(field):
                raise CheckpointError(f"{fields.name(field)} is {raw[field]!r} ({meaning}); only plain LoRA is merged")
        start = raw.get("init_lora_weights", True)
        if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
            raise CheckpointError(
                f"{fields.name('init_lora_weights')} is {start!r}: the training began by changing the base, so the "
                "update does not fit the original; save it with PEFT's path_initial_model_for_weight_conversion"
            )
        self.base = str(raw.get("base_model_name_or_path") or "")
        self.rank = fields.positive("r", 8)
        self.alpha = fields.finite("lora_alpha", 8)
        self.root = fields.flag("use_rslora")
        self._ranks, self._alphas = (self._patterns(fields, name) for name in ("rank_pattern", "alpha_pattern"))
        self._spent = 0.0

    def scaling(self, module: str, rank: int) -> float:
        """What B A of `module` (its name in the model that was trained) is multiplied by; `rank` is that of A.

        Raises:
            CheckpointError: the configuration gives the module another rank.
        """
        told = self._matching(self._ranks, module, self.rank)
        if told != rank:
            raise CheckpointError(f"{self.label} gives {module!r} the rank {told:g}, its weights have rank {rank}")
        alpha = self._matching(self._alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.root else alpha / rank

    def _patterns(self, fields: Section, name: str) -> list[tuple[re.Pattern[str], float]]:
        """PEFT's rule: the first pattern that matches the end of a module's name, from a dot or its start on."""
        section, patterns = fields.section(name), []
        for text in section.values:
            quantified = len(re.findall(r"(?<!\\)[*+?{]", str(text)))
            if len(str(text)) > 1000 or quantified > _QUANTIFIERS or re.search(r"\)[*+?{]|\(\?", str(text)):
                raise CheckpointError(f"{section.name(str(text)[:80])} is no name or simple pattern of a module")
            try:
                pattern = re.compile(rf"(.*\.)?({text})$")
            except (re.error, RecursionError, OverflowError) as error:
                raise CheckpointError(f"{section.name(str(text)[:80])} is no regular expression ({error})") from error
            patterns.append((pattern, section.finite(text)))
        return patterns

    def _matching(self, patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
        started = time.monotonic()
        for pattern, value in patterns:
            if pattern.match(module):
                return value
            if self._spent + time.monotonic() - started > _SECONDS:
                raise CheckpointError(f"{self.label}: its rank_pattern and alpha_pattern take too long to match")
        self._spent += time.monotonic() - started
        return default

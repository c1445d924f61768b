"""What loading yields: configuration and weights of every part of a model, in one form for every source.

No file access here. `lm` and `codec` are in canonical names (`layout.expected_shapes`, the state dict of
`codec.EnCodec`); the text encoder stays in transformers' T5 names, since transformers runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..config import CodecConfig, ModelConfig
from ..packing import PackedWeights

__all__ = ["Checkpoint", "TextSource", "TextTokenizer"]


class TextTokenizer(Protocol):
    """Turns a text into T5 ids, the end token included."""

    def ids(self, text: str) -> list[int]:
        """Ids of `text`, the closing one included."""
        ...


@dataclass
class TextSource:
    """A T5 encoder: `config` of transformers, its weights `tensors` (float32) and where its tokenizer is.

    Exactly one of `tokenizer_folder` (holds `spiece.model` or `tokenizer.json`) and `tokenizer` is set, or none where
    the files came without a tokenizer: such a model generates, but cannot read text. `origin` is for messages.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer_folder: Path | None = None
    tokenizer: TextTokenizer | None = None
    origin: str = ""


@dataclass
class Checkpoint:
    """A model, loaded.

    Attributes:
        name: what the caller asked for.
        config, codec_config: the shapes of everything.
        lm: canonical names; matrices in the dtype asked for, norms and projections in float32. Empty where the weights
            are packed.
        codec: canonical names, float32.
        text: the T5 encoder; None for a model without text.
        style: the style conditioner (audiocraft's names without `condition_provider.conditioners.self_wav.`, float32).
        xp_cfg: the training configuration of an audiocraft checkpoint, interpolations resolved.
        packed: the language model of a packed folder, in place of `lm`.
    """

    name: str
    config: ModelConfig
    lm: dict[str, Tensor]
    codec_config: CodecConfig
    codec: dict[str, Tensor]
    text: TextSource | None = None
    style: dict[str, Tensor] | None = None
    xp_cfg: dict[str, Any] | None = None
    packed: PackedWeights | None = None

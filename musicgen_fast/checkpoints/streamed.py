"""transformers' layout with the language model left in its file: for converting what does not fit in memory twice.

The same checks as `load_transformers`; only the assembly waits until a tensor is asked for. Knows nothing of what the
weights become.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint
from .codec_weights import canonical_codec_weights
from .files import TensorFiles, read_json
from .layout import Plan, assemble, check, check_nothing_left
from .sources import Source
from .transformers import _IGNORED, CODEC, TEXT, _codec_config, _optional, _plan, _text, model_config

__all__ = ["Streamed", "stream_transformers"]


class Streamed(dict[str, Tensor]):
    """Canonical tensors by name, each read from the file by `pop`, as stored (norms and projections in float32)."""

    def __init__(self, plan: Plan, tensors: TensorFiles) -> None:
        super().__init__(dict.fromkeys(plan))  # type: ignore[arg-type]
        self._plan, self._tensors = plan, tensors

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self:
            return super().pop(name, *default)
        super().pop(name)
        return assemble({name: self._plan[name]}, self._tensors, None)[name]

    def __getitem__(self, name: str) -> Tensor:
        raise TypeError("weights that are streamed are read once, with pop")


def stream_transformers(
    source: Source,
    config_path: Path,
    tensors: TensorFiles,
    *,
    name: str,
    text_encoder: str | os.PathLike[str] | None,
    cache_dir: str | Path | None,
) -> Checkpoint:
    """`load_transformers` whose `lm` is `Streamed`. No two canonical tensors share one of the file, so each of those is
    let go of after its use.

    Raises:
        CheckpointError: as `load_transformers`; weights that are no real numbers only when they are read.
    """
    raw = read_json(config_path)
    generation, features = (_optional(source, f"{part}_config.json") for part in ("generation", "preprocessor"))
    config, codec_config = model_config(raw, config_path, generation, features), _codec_config(raw, config_path)
    plan = _plan(config, tensors)
    check(plan, tensors)
    known = [piece.name for parts in plan.values() for piece in parts]
    check_nothing_left(tensors, [*known, *_IGNORED, *(n for n in tensors if n.startswith((TEXT, CODEC)))])
    codec_tensors = {n: tensors[n] for n in tensors if n.startswith(CODEC)}
    codec = canonical_codec_weights(codec_tensors, codec_config, tensors.label)
    text = _text(source, raw, tensors, text_encoder, cache_dir)
    return Checkpoint(name, config, Streamed(plan, tensors), codec_config, codec, text)

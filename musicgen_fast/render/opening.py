"""A model with its slots, as a run needs it: loaded, and with room for what will come. In this process or a worker."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..musicgen import MusicGen
from .capacity import batch_size
from .engine import Engine
from .item import Item
from .plan import Options
from .requests import rows_of, window_frames

__all__ = ["load_model", "open_engine"]


def load_model(options: Options, device: torch.device, precision: str) -> MusicGen:
    """The model of a run."""
    model = MusicGen.get_pretrained(
        options.model, device, text_encoder=options.text_encoder, style_encoder=options.style_encoder,
        precision=precision, revision=options.revision, cache_dir=options.cache_dir,
    )  # fmt: skip
    model.compat = options.compat
    return model


def open_engine(
    options: Options, items: Sequence[Item], device: torch.device, precision: str, most: int, share: float = 1.0
) -> Engine:
    """The model with as many slots as are asked for or fit.

    Args:
        items: what will come, or enough of it to tell the room that a piece needs.
        most: slots that are of any use. share: of the memory that is free.
    """
    model = load_model(options, device, precision)
    frames, rows = max(window_frames(item, model) for item in items), max(map(rows_of, items))
    limit = options.batch_size
    if limit is None:
        limit = batch_size(model.lm.config, precision, frames, rows, device, share)
    return Engine(model, min(limit, most), frames, options.item_timeout)

"""A model as transformers holds it: any name, folder or random:SIZE becomes a folder with the weights that ours runs.

What the peers of `throughput`, `stream` and `quality` load, so that shapes, weights and texts are ours. Mono and stereo
text models; the others have no class there, or another `generate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from ..checkpoints import Checkpoint, CheckpointError, load_checkpoint
from ..checkpoints.random_weights import ByteTokenizer
from ..checkpoints.write import write_transformers_folder
from ..conditioning.text import TextTokenizer
from .job import AbsentError

__all__ = ["load_folder", "tokenizer_of", "write_folder"]


class Tokenizer(Protocol):
    def ids(self, text: str) -> list[int]:
        """The ids of a text, its end among them."""


def write_folder(folder: Path, model: str, dtype: torch.dtype | None) -> Checkpoint:
    """Write `model`, its matrices in `dtype` (None: as they are stored); returns what was written. AbsentError where
    transformers has no class for it, or its weights are packed for this project's decoder."""
    checkpoint = load_checkpoint(model, dtype=dtype)
    if checkpoint.config.conditioning != "cross" or checkpoint.text is None:
        raise AbsentError("transformers runs here with text models only")
    if checkpoint.packed is not None:
        raise AbsentError("packed weights are for this project's CPU decoder only: give the original checkpoint")
    try:
        write_transformers_folder(folder, checkpoint=checkpoint)
    except ValueError as error:
        raise AbsentError(f"this model cannot be written for transformers: {error}") from error
    return checkpoint


def tokenizer_of(model: str, folder: Path) -> Tokenizer:
    """What `model`, written to `folder`, reads texts with: random weights have no vocabulary of their own."""
    if model.startswith("random:"):
        return ByteTokenizer()
    try:
        return TextTokenizer.load(folder)
    except CheckpointError as error:
        raise AbsentError(str(error)) from error


def load_folder(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """`MusicgenForConditionalGeneration`, ready to generate. Its matrices stay mapped from the folder's files."""
    import transformers as tf

    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    return tf.MusicgenForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)

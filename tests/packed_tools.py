"""Changing the weights of a loaded model whether they are packed or not."""

from __future__ import annotations

import torch

from musicgen_fast import native
from musicgen_fast.decoders.cpu_model import PackedTransformer
from musicgen_fast.lm import LMModel
from musicgen_fast.packing import unpack_weights


def scale_heads(lm: LMModel, factor: float) -> None:
    """Multiply the matrix of the logits: 30 makes them far from flat, so that a condition shows in the tokens."""
    transformer = lm.transformer
    if not isinstance(transformer, PackedTransformer):
        transformer.heads.weight.data *= factor
        return
    packed = transformer.packed
    heads = unpack_weights(packed)["heads.weight"] * factor
    into = packed.tensors["heads.weight"]  # the memory that the decoder reads
    assert native.extension().linear_pack(packed.formats["heads.weight"], torch.Tensor.numpy(heads), into.numpy())

"""Models with random weights: the shapes of a released size (or of any `ModelConfig`), no files, seconds to make.

For benchmarks and tests. The result is an ordinary `Checkpoint`, so everything after loading is the code that real
weights take. Weights are scaled so that activations and logits stay of order one; the music is noise. The text encoder
is a T5 of two layers that reads bytes: its speed is not that of t5-base.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..codec import EnCodec
from ..config import CodecConfig, ModelConfig, StyleConfig, TextConfig, named_config
from ..errors import CheckpointError
from .checkpoint import Checkpoint, TextSource
from .layout import Shape, expected_shapes, stays_float32, style_shapes
from .text import text_shapes

__all__ = ["ByteTokenizer", "random_checkpoint"]

# Normal values drawn once and repeated: 3.3e9 draws of musicgen-large would take a minute, the copies take seconds.
# A prime, so that no matrix has two equal rows.
_BLOCK = 1_048_573


class ByteTokenizer:
    """A tokenizer without a vocabulary: UTF-8 bytes + 3, then the end token 1 (T5's pad, end, unknown are 0, 1, 2)."""

    vocab_size = 259

    def ids(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode("utf-8", errors="replace")] + [1]


def random_checkpoint(
    config: ModelConfig | str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    codec_config: CodecConfig | None = None,
) -> Checkpoint:
    """A checkpoint with random weights, the same for the same arguments.

    Args:
        config: shapes, or the name of a released size ('small-stereo', ...; `config.named_config`).
        dtype: of the matrices of the language model; musicgen-large takes 13 GB in float32 and 6.5 GB in bfloat16.
        codec_config: default: the 32 kHz codec with the model's codebooks and vocabulary.
    """
    name = f"random:{config}" if isinstance(config, str) else "random"
    if isinstance(config, str):
        try:
            config = named_config(config)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if codec_config is None:
        books = config.num_codebooks // config.audio_channels
        codec_config = CodecConfig(num_codebooks=books, codebook_size=config.vocab_size)
    normal = _Normal(seed)
    lm = {name: normal.tensor(name, shape, dtype) for name, shape in expected_shapes(config)}
    return Checkpoint(
        name=name,
        config=config,
        lm=lm,
        codec_config=codec_config,
        codec=_codec(codec_config, normal),
        text=_text(config.text, normal) if config.text is not None else None,
        style=_style(config.style, config.dim, normal) if config.style is not None else None,
    )


class _Normal:
    """Tensors of normal values from one block, each tensor starting elsewhere in it."""

    def __init__(self, seed: int) -> None:
        block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed))
        self.blocks = {torch.float32: torch.cat([block, block])}  # twice: a part from anywhere is one slice
        self.start = 0

    def fill(self, shape: Shape, scale: float, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
        """`shape` of values around `mean` with deviation `scale`."""
        if dtype not in self.blocks:
            self.blocks[dtype] = self.blocks[torch.float32].to(dtype)
        self.start = (self.start + 104_729) % _BLOCK
        block = self.blocks[dtype][self.start : self.start + _BLOCK]
        out = torch.empty(shape, dtype=dtype)
        first, *rest = out.view(-1).split(_BLOCK)
        torch.mul(block[: first.numel()], scale, out=first)
        for part in rest:  # plain copies: 0.14 ms a part in bfloat16, products 0.23
            part.copy_(first[: part.numel()])
        return out.add_(mean) if mean else out

    def tensor(self, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
        """A tensor of the language model by its canonical name."""
        if stays_float32(name, len(shape)):
            dtype = torch.float32
        if name == "emb.weight":
            return self.fill(shape, 0.5, dtype)
        if len(shape) == 2:
            return self.fill(shape, 1 / math.sqrt(shape[1]), dtype)
        return self.fill(shape, 0.05, dtype, mean=1.0 if name.endswith(".weight") else 0.0)


def _codec(config: CodecConfig, normal: _Normal) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in EnCodec(config).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 400
        weights[name] = normal.fill(tuple(shape), 1 / math.sqrt(fan_in))
    return weights


def _text(config: TextConfig, normal: _Normal) -> TextSource:
    d = config.dim
    t5: dict[str, Any] = {
        "model_type": "t5",
        "vocab_size": ByteTokenizer.vocab_size,
        "d_model": d,
        "d_kv": 64 if d % 64 == 0 else d,
        "num_heads": d // 64 if d % 64 == 0 else 1,
        "d_ff": 2 * d,
        "num_layers": 2,
        "feed_forward_proj": "relu",
    }
    tensors = {}
    for name, shape in text_shapes(t5, "random"):
        plain = len(shape) == 1
        tensors[name] = normal.fill(shape, 0.05 if plain else 1 / math.sqrt(shape[-1]), mean=1.0 if plain else 0.0)
    return TextSource(config=t5, tensors=tensors, tokenizer=ByteTokenizer(), origin="random weights")


def _style(config: StyleConfig, dim: int, normal: _Normal) -> dict[str, Tensor]:
    weights = {}
    for name, shape in style_shapes(config, dim):
        if name == "batch_norm.running_var":
            weights[name] = normal.fill(shape, 0.05, mean=1.0)
        elif name.endswith("_codebook.embed"):
            weights[name] = normal.fill(shape, 1.0)
        elif len(shape) == 1:
            norm = name.endswith(("norm1.weight", "norm2.weight"))
            weights[name] = normal.fill(shape, 0.05, mean=1.0 if norm else 0.0)
        else:
            weights[name] = normal.fill(shape, 1 / math.sqrt(shape[-1]))
    return weights

"""What a step must read and what a request holds, in bytes: the floors that measured times are judged by. No torch.

A decoding step multiplies every matrix with a handful of rows, so its time is bounded by reading: the weights once, the
keys and values of every row. Divide by the speed of a machine's memory to get the least time a step can take.
"""

from __future__ import annotations

from .config import ModelConfig
from .pattern import build_pattern

GROUP = 128  # weights that share a float32 scale in int8 and int4
# Bytes a weight, and the format of the keys and values that goes with it where nothing else is said.
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1 + 4 / GROUP, "int4": 0.5 + 4 / GROUP}
KV_FORMAT = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "int8": "int8", "int4": "int8"}


def step_weights(config: ModelConfig, text_tokens: int = 16, texts: int = 1) -> int:
    """Numbers of weights that one step reads; embeddings and norms, some rows of d, are left out.

    Cross-attention reads its two projections, d x d each, or per text 2 x H*N x d where these were folded into the N
    text states (see `decoders/torch.py`): the smaller of the two.
    """
    d = config.dim
    layer = 4 * d * d + 2 * d * config.ffn_dim
    if config.conditioning == "cross" and text_tokens:
        layer += 2 * d * min(d, texts * text_tokens * config.num_heads)
    return config.num_layers * layer + config.num_codebooks * config.vocab_size * d


def step_bytes(
    config: ModelConfig,
    precision: str,
    position: float,
    *,
    kv: str | None = None,
    requests: int = 1,
    branches: int = 2,
    text_tokens: int = 16,
) -> float:
    """Bytes that a step at `position` must read.

    Args:
        precision: of the weights, a key of `WEIGHT_BYTES`.
        kv: of keys and values: float32, bfloat16, float16 or int8; default: what goes with the weights.
        branches: rows per request: 1, 2 with guidance, 3 with double guidance.
    """
    weights = WEIGHT_BYTES[precision] * step_weights(config, text_tokens, requests)
    numbers = kv_numbers(config, position) * requests * branches
    return weights + kv_bytes(config, kv or KV_FORMAT[precision]) * numbers


def kv_bytes(config: ModelConfig, kv: str) -> float:
    """Bytes a key or value. In int8 every head of every position has a float32 scale."""
    return 1 + 4 / config.head_dim if kv == "int8" else WEIGHT_BYTES[kv]


def kv_numbers(config: ModelConfig, positions: float) -> float:
    """Keys and values of one row."""
    return 2 * config.num_layers * config.dim * positions


def window_positions(config: ModelConfig, frame_rate: float) -> int:
    """Positions of a whole window: the steps but the last, and the chroma prefix. A prefixed text comes on top."""
    frames = int(config.max_duration * frame_rate)
    steps = build_pattern(config.pattern, config.num_codebooks, frames).num_steps - 1
    return steps + (config.melody.chroma_length if config.melody else 0)

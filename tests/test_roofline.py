"""The formulas against the tensors themselves."""

from __future__ import annotations

import pytest
import torch

from musicgen_fast.config import named_config
from musicgen_fast.decoders.torch import TorchDecoder
from musicgen_fast.model import Transformer
from musicgen_fast.roofline import kv_numbers, step_bytes, step_weights, window_positions

from .checkpoint_writers import tiny


@pytest.mark.parametrize("kind", ["text", "stereo", "melody"])
def test_weights_of_a_step(kind):
    """All matrices but the embeddings, the text's keys and values, and what the conditioners use."""
    config = tiny(kind).config
    with torch.device("meta"):
        model = Transformer(config)
    skipped = ("emb.", "text_proj.", "melody_proj.", "cross_kv.")
    read = [p for name, p in model.named_parameters() if p.dim() == 2 and not any(s in name for s in skipped)]
    assert step_weights(config, text_tokens=10**6) == sum(p.numel() for p in read)


def test_folded_text():
    """H*N rows in the place of d: worth it below d / H tokens, 64 in the released models."""
    small = named_config("small")
    assert step_weights(small, 64) == step_weights(small, 100) == step_weights(small, 32, texts=2)
    assert step_weights(small, 64) - step_weights(small, 16) == 24 * 2 * 1024 * (1024 - 256)


def test_cache():
    config = tiny("melody").config
    with torch.device("meta"):
        cache = TorchDecoder(Transformer(config)).allocate(2, window_positions(config, 50))
    assert cache.tensor.numel() == 2 * kv_numbers(config, window_positions(config, 50))
    assert window_positions(config, 50) == 1503 + 235


@pytest.mark.parametrize(
    "size,weights,average", [("small", 0.240, 0.290), ("medium", 1.065, 1.213), ("large", 1.890, 2.087)]
)
def test_floors_of_an_h100(size, weights, average):
    """ms per step at 3.0 TB/s in fp16, one request with guidance: without and with the keys of half a window."""
    config = named_config(size)
    assert step_bytes(config, "float16", 0, text_tokens=64) / 3e9 == pytest.approx(weights, rel=0.005)
    assert step_bytes(config, "float16", 750, text_tokens=64) / 3e9 == pytest.approx(average, rel=0.01)


def test_quantised_small():
    """MB a step: 318 M weights with a scale of 4 bytes for 128, and int8 keys with one for 64, as on the CPU."""
    config = named_config("small")
    weights = step_weights(config)
    assert step_bytes(config, "int8", 0) == weights + 4 * weights / 128
    assert step_bytes(config, "int4", 0) == weights / 2 + 4 * weights / 128
    grown = step_bytes(config, "int8", 1500) - step_bytes(config, "int8", 0)
    assert grown == 2 * 2 * 24 * 1500 * (1024 + 4 * 16)  # rows, keys and values, layers, positions, a head's scale
    wide = step_bytes(config, "int8", 1500, kv="bfloat16") - step_bytes(config, "int8", 0)
    assert wide == 2 * 2 * 24 * 1500 * 1024 * 2
    assert step_bytes(config, "int4", 1500) - step_bytes(config, "int4", 0) == grown


def test_more_requests_read_the_weights_once():
    config = named_config("small")
    one, eight = (step_bytes(config, "float32", 500, requests=n, text_tokens=64) for n in (1, 8))
    assert eight - one == pytest.approx(7 * 4 * 2 * kv_numbers(config, 500))

"""Tiny parts of the demo model for its tests: an untrained codec, token sets, sizes, the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from examples.demo_model.codec_data import held_out_songs
from examples.demo_model.codec_init import codec_config, lapped_start
from examples.demo_model.lm import Sizes
from examples.demo_model.text import train_vocabulary, training_captions, write_tokenizer
from examples.demo_model.tokens import make_tokens
from musicgen_fast.conditioning.text import TextTokenizer

SIZES = Sizes(dim=64, layers=2, ffn=96, codes=64, text_dim=128, text_layers=1, text_ffn=64)
CLIPS, FRAMES = 10, 48


def write_codec(folder: Path, codes: int = 64) -> Path:
    """A lapped transform with random codebooks about as wide as its latents, as transformers saves it."""
    from transformers import EncodecModel

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model: Any = EncodecModel(codec_config(filters=4, hidden=16, books=4, codes=codes))
        clips = held_out_songs(4, 50)[:, None]
        lapped_start(model, clips)
        width = float(model.encoder(clips).std())
        for k, layer in enumerate(model.quantizer.layers):
            layer.codebook.embed.normal_(std=width / 2**k)
    model.save_pretrained(folder)
    return folder


def write_token_sets(codec: Path, folder: Path) -> Path:
    """train/ with CLIPS clips of FRAMES frames and held/ with three."""
    make_tokens(codec, folder / "train", CLIPS, FRAMES, batch=4)
    make_tokens(codec, folder / "held", 3, FRAMES, held=True)
    return folder


def make_tokenizer(folder: Path) -> TextTokenizer:
    """The demo's tokenizer, its files in the folder."""
    write_tokenizer(folder, train_vocabulary(training_captions()))
    return TextTokenizer.load(folder)

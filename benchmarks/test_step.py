"""Quick figures for `make bench`: the parts of a step on sizes that take seconds. Released sizes: `bench_step.py`.

Nothing is asserted but that the parts ran: the tests of these parts are in tests/.
"""

from __future__ import annotations

import pytest
import torch

from musicgen_fast.checkpoints.random_weights import random_checkpoint
from musicgen_fast.codec import EnCodec
from musicgen_fast.config import CodecConfig, ModelConfig, TextConfig
from musicgen_fast.decoders.torch import TorchDecoder
from musicgen_fast.model import Transformer
from musicgen_fast.pattern import UNKNOWN, build_pattern
from musicgen_fast.place import Place
from musicgen_fast.sampling import SamplingParams
from musicgen_fast.state import Branch, Conditions, Sampler, State

CONFIG = ModelConfig(dim=512, num_layers=8, num_heads=8, ffn_dim=2048, text=TextConfig(dim=32))
STEPS = 200


def sampler_for(batch: int, seeded: bool) -> Sampler:
    seeds = torch.arange(batch) if seeded else None
    return Sampler(SamplingParams.build(batch, CONFIG.num_codebooks, top_k=250), seeds)


def started_state(decoder: TorchDecoder, batch: int) -> State:
    """A state with its prefill done: guidance, 16 text tokens, room for STEPS columns."""
    text = torch.randn(16, CONFIG.dim)
    conditions = Conditions(batch, [Branch(cross=[text] * batch), Branch()], 2)
    kv = decoder.allocate(conditions.num_rows, STEPS)
    state = State(CONFIG, kv, [0] * conditions.num_rows, conditions, sampler_for(batch, seeded=False))
    decoder.condition(state)
    pattern = build_pattern(CONFIG.pattern, CONFIG.num_codebooks, STEPS - 3)
    empty = torch.full((batch, CONFIG.num_codebooks, STEPS - 3), UNKNOWN)
    state.start_window(pattern, empty, 0, 0)
    decoder.prefill(state)
    return state


@pytest.fixture(scope="module")
def decoder():
    return TorchDecoder(Transformer.from_weights(CONFIG, random_checkpoint(CONFIG).lm))


@pytest.mark.parametrize("seeded", [False, True], ids=["noise", "seeded"])
@pytest.mark.parametrize("batch", [1, 8])
def test_sampler(benchmark, batch, seeded):
    """Guidance, top-k 250 of 2048, one draw for each of 4 codebooks."""
    logits = torch.randn(2, batch, CONFIG.num_codebooks, CONFIG.vocab_size)
    sampler, place = sampler_for(batch, seeded), Place.allocate(batch, CONFIG.num_codebooks, 1, "cpu")
    place.column.zero_()

    def draw() -> None:
        place.sequence.fill_(UNKNOWN)  # a cell that is known is not drawn
        sampler(logits, place)

    benchmark(draw)
    assert (place.sequence != UNKNOWN).all() and not place.status.any()


@pytest.mark.parametrize("batch", [1, 8])
def test_decoder_step(benchmark, decoder, batch):
    """8 layers of width 512: 34 M weights to read, 134 MB."""
    state = started_state(decoder, batch)
    benchmark.pedantic(decoder.step, args=(state,), rounds=100, warmup_rounds=20)
    assert state.column > 2 and state.lengths == [state.column - 1] * 2 * batch


def test_codec_decode(benchmark):
    """2 s of sound by the 32 kHz codec at its released size."""
    codec = EnCodec(CodecConfig())
    codec.load_state_dict(random_checkpoint(CONFIG).codec, assign=True)
    codes = torch.randint(0, 2048, (1, 4, 100))
    wav = benchmark.pedantic(codec.decode, args=(codes,), rounds=5, warmup_rounds=1)
    assert wav.shape == (1, 1, 64000)

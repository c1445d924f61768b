"""Conditions that change at a frame: against a reference that attends to one text or the other at each position."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from musicgen_fast.crossfade import Change
from musicgen_fast.model import Transformer, embed_tokens, position_table
from musicgen_fast.pattern import build_pattern
from musicgen_fast.sampling import SamplingParams
from musicgen_fast.slot_engine import Request, SlotEngine
from musicgen_fast.state import Branch, Conditions

from .engine_tools import (
    DECODERS,
    build_decoder,
    collected,
    plain,
    prompt_of,
    sampler_for,
    streamed,
    text_conditions,
    texts,
)
from .test_engine import SHORT, through_a_file

CFG = 2.0


@pytest.fixture(scope="module", params=DECODERS)
def decoder_for(request):
    return functools.partial(build_decoder, request.param)


@pytest.fixture(scope="module")
def decoder(decoder_for):
    return decoder_for()


def logits_of(model: Transformer, tokens, old, new, switch: int):
    """Logits [S, K, V] of a row that attends to the text `old` before position `switch` and to `new` from there on."""
    x = embed_tokens(model.emb.weight, tokens[None]) + position_table(tokens.shape[1], model.config.dim)
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    late = (torch.arange(tokens.shape[1]) >= switch)[None, :, None]
    for layer in model.layers:
        q, k, v = (layer.heads(part) for part in layer.qkv(layer.norm1(x)).chunk(3, dim=-1))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        x = x + layer.attn_out(rearrange(a, "r h s e -> r s (h e)"))
        q, outs = layer.heads(layer.cross_q(layer.norm_cross(x))), []
        for text in (old, new):
            k, v = (layer.heads(part) for part in layer.cross_kv(text[None]).chunk(2, dim=-1))
            outs.append(layer.cross_out(rearrange(F.scaled_dot_product_attention(q, k, v), "r h s e -> r s (h e)")))
        x = x + torch.where(late, outs[1], outs[0])
        x = x + layer.ffn_out(F.gelu(layer.ffn_in(layer.norm2(x))))
    return model.logits(x)[0]


@pytest.mark.parametrize("frame,fade", [(9, 0), (9, 4), (0, 5), (3, 100), (20, 1), (30, 0)])
def test_tokens_are_those_of_the_mixture(decoder, frame, fade):
    """Greedy: every token is the largest of the logits mixed with weights 1/(n+1) ... n/(n+1), then of the new text.

    At the first frame of a generation there is nothing to fade from.
    """
    old, new = texts(4, seed=1)[0], texts(6, seed=2)[0]
    conditions, after = (Conditions(1, [Branch(cross=[t]), Branch()], 2) for t in (old, new))
    codes = collected(
        streamed(decoder, 26, conditions, sampler_for(1, "greedy", [1]), changes=[Change(frame, after, fade)])
    )
    model, pattern = decoder.model, build_pattern(decoder.config.pattern, 4, 26)
    sequence = pattern.build(codes, 50)[0]
    with torch.no_grad():
        null = model(sequence[None])[0]
        before = logits_of(model, sequence, old, old, 0)
        behind = logits_of(model, sequence, old, new, frame)  # position n: the step of column n + 1, newest frame n
    for column in range(1, pattern.num_steps):
        newest = min(column - 1, 25)
        weight = min(max((newest - frame + 1) / (fade + 1), 0.0), 1.0) if frame else 1.0
        asked, unasked = (torch.lerp(before, behind, weight))[column - 1], null[column - 1]
        best = (unasked + (asked - unasked) * CFG).argmax(-1)
        drawn = torch.from_numpy(pattern.table[column] >= 0)
        assert torch.equal(best[drawn], sequence[drawn, column]), (column, weight)


CASES = {
    "at once": [(7, 0)],
    "before the shadow": [(4, 5)],
    "in the shadow's life": [(11, 2)],
    "at a change": [(14, 0)],
    "over a change": [(13, 4)],
    "behind a change": [(15, 1)],
    "several": [(3, 2), (8, 1), (20, 3), (27, 0), (31, 2)],
}


@pytest.mark.parametrize("seeds", [None, [1, 2]], ids=["noise", "seed"])
@pytest.mark.parametrize("case", CASES)
def test_shadows_change_no_token(decoder, case, seeds):
    changes = [Change(frame, text_conditions(2, seed=frame), fade) for frame, fade in CASES[case]]
    results = []
    for shadow in (True, False):
        torch.manual_seed(3)
        decoder.prefilled.clear()
        generation = streamed(
            decoder, 40, text_conditions(2), sampler_for(2, seeds=seeds), shadow=shadow, changes=changes, **SHORT
        )
        results.append(collected(generation))
        assert generation.steps_done == generation.steps_total
        if shadow:
            assert len(decoder.prefilled) < 4, "windows without a change are shadows still"
    assert torch.equal(*results)
    torch.manual_seed(3)
    unchanged = plain(decoder, 40, text_conditions(2), sampler_for(2, seeds=seeds), **SHORT)
    first = CASES[case][0][0]
    assert torch.equal(results[0][:, 0, :first], unchanged[:, 0, :first])
    assert not torch.equal(results[0][:, :, first:], unchanged[:, :, first:])


def test_fading_to_the_same_text_changes_nothing(decoder):
    conditions = text_conditions(1)
    changes = [Change(5, text_conditions(1), 6)]
    tokens = collected(streamed(decoder, 30, conditions, sampler_for(1, seeds=[1]), changes=changes))
    assert torch.equal(tokens, plain(decoder, 30, conditions, sampler_for(1, seeds=[1])))


@pytest.mark.parametrize("seeds", [None, [1]], ids=["noise", "seed"])
def test_resuming_within_and_behind_a_crossfade(decoder, seeds):
    """The cache was written under two texts: it is written again so."""
    changes = [Change(4, text_conditions(1, seed=4), 3), Change(21, text_conditions(1, seed=21), 2)]

    def run(saved=None):
        sampler = sampler_for(1, seeds=seeds)
        return streamed(decoder, 32, text_conditions(1), sampler, changes=changes, saved=saved, **SHORT)

    torch.manual_seed(6)
    expected = collected(run())
    for stop in (0, 4, 6, 8, 13, 16, 20, 24, 27):
        torch.manual_seed(6)
        generation = run()
        head = [next(generation) for _ in range(stop)]
        saved = through_a_file(generation.save())
        torch.manual_seed(99)
        assert torch.equal(torch.cat([*head, collected(run(saved))], 2), expected), stop


def test_rows_and_caches_during_a_crossfade(decoder_for):
    decoder = decoder_for()
    changes = [Change(frame, text_conditions(1, seed=frame), 3) for frame in (5, 60, 80)]
    list(streamed(decoder, 100, text_conditions(1), sampler_for(1, seeds=[1]), changes=changes))
    assert set(decoder.rows) == {2, 4} and decoder.allocated == 2


def test_requests_with_changes(decoder):
    base, after = text_conditions(1, seed=1), text_conditions(1, seed=2)
    changes = [Change(6, after, 3)]
    params = SamplingParams.build(1, 4, cfg_coef=CFG, cfg_coef_beta=1.5, top_k=20)
    request = Request(prompt_of(1)[0], 30, 30, 18, lambda _: base, params, 5, changes=changes)
    engine = SlotEngine(decoder, 3, 30)
    (number,) = engine.admit(request)
    engine.admit(Request(prompt_of(1)[0], None, 30, 18, lambda _: after, params, 6))
    frames = []
    while number in engine.running:
        frames.append(engine.step()[number])
    expected = collected(streamed(decoder, 30, base, sampler_for(1, seeds=[5]), changes=changes))
    assert torch.equal(torch.cat(frames, 1), expected[0])
    with pytest.raises(ValueError, match="one by one"):
        engine.admit(request, request)


def test_changes_that_cannot_be(decoder_for, decoder):
    conditions, other = text_conditions(1), text_conditions(1, seed=1)
    for changes, message in (
        ([Change(9, other), Change(4, other)], "not over at the next"),
        ([Change(4, other, 6), Change(9, other)], "not over at the next"),
        ([Change(4, other, -1)], "shorter than 0"),
        ([Change(4, text_conditions(1, 1))], "other requests or branches"),
        ([Change(4, text_conditions(2))], "other requests or branches"),
    ):
        with pytest.raises(ValueError, match=message):
            next(streamed(decoder, 40, conditions, sampler_for(1, seeds=[1]), changes=changes))
    prefix = Conditions(1, [Branch(prefix=texts(3)), Branch(prefix=texts(2))], 2)
    with pytest.raises(ValueError, match="cross-attention models only"):
        streamed(decoder_for("prefix"), 40, prefix, sampler_for(1), changes=[Change(4, prefix)])

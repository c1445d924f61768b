"""Tokens against the real audiocraft: same weights, same torch seed, fp32 on CPU."""

from __future__ import annotations

import pytest
import torch

from musicgen_fast.config import PatternConfig

from .oracle import audiocraft_lm as ac
from .oracle import ours

pytestmark = ac.needs_audiocraft

ONE = ["slow piano waltz"]
UNEQUAL = ["slow piano waltz", "fast drums and a very long bass line"]
KINDS = ("text", "stereo", "melody")
SETTINGS = {
    "greedy": {"use_sampling": False},
    "top_k": {"top_k": 250},
    "temperature": {"top_k": 50, "temp": 0.7},
    "plain": {"top_k": 0},
    "top_p": {"top_p": 0.8},
    "top_p_1": {"top_p": 1.0},
    "cfg": {"cfg_coef": 1.7},
    "cold": {"temp": 0.0},
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    theirs = ac.build_lm(request.param)
    return request.param, theirs, ours.lm_of(theirs, request.param)


def same(pair, texts, compat="isolated", **options):
    kind, theirs, mine = pair
    mine.compat = compat
    expected = ac.generate(theirs, texts, kind, **options)
    assert torch.equal(ours.generate(mine, texts, kind, **options), expected)
    return expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_request(pair, setting):
    same(pair, ONE, seed=5, **SETTINGS[setting])


def test_global_generator_ends_in_the_same_state(pair):
    kind, theirs, mine = pair
    ac.generate(theirs, ONE, kind, seed=5)
    expected = torch.get_rng_state()
    ours.generate(mine, ONE, kind, seed=5)
    assert torch.equal(torch.get_rng_state(), expected)


def test_unequal_texts_need_the_compatible_padding(pair):
    expected = same(pair, UNEQUAL, compat="audiocraft", seed=3)
    kind, _, mine = pair
    mine.compat = "isolated"
    isolated = ours.generate(mine, UNEQUAL, kind, seed=3)
    assert torch.equal(isolated[1], expected[1]), "the longest text is not padded in either"
    assert not torch.equal(isolated[0], expected[0]), "audiocraft's padding takes part in the shorter text"


def test_equal_texts_in_a_batch(pair):
    same(pair, ["slow piano waltz", "loud brass band"], seed=2)


def test_unconditional_requests_in_a_batch(pair):
    same(pair, ["slow piano waltz", None, ""], compat="audiocraft", seed=2)
    same(pair, [None, None], seed=2)


def test_prompt_tokens(pair):
    kind, theirs, _ = pair
    prompt = torch.randint(0, theirs.card, (1, theirs.n_q, 7), generator=torch.Generator().manual_seed(1))
    out = same(pair, ONE, seed=4, prompt=prompt)
    assert torch.equal(out[..., :7], prompt)


def test_two_step(pair):
    """audiocraft mixes two-step branches with the model's coefficient (3.0) whatever it is asked for."""
    same(pair, ONE, seed=4, two_step_cfg=True)
    for ignored in (7.0, 1.0):
        same(pair, ONE, compat="audiocraft", seed=4, two_step_cfg=True, cfg_coef=ignored)
    same(pair, UNEQUAL, compat="audiocraft", seed=4, two_step_cfg=True)
    kind, _, mine = pair
    mine.compat = "isolated"
    honoured = [ours.generate(mine, ONE, kind, seed=4, two_step_cfg=True, cfg_coef=c) for c in (3.0, 7.0)]
    assert not torch.equal(*honoured)


def test_double_cfg(pair):
    same(pair, ONE, seed=6, cfg_coef_beta=5.0)
    same(pair, UNEQUAL, compat="audiocraft", seed=6, cfg_coef_beta=2.0, two_step_cfg=True)


def test_melodies_of_unequal_lengths():
    theirs = ac.build_lm("melody")
    pair = ("melody", theirs, ours.lm_of(theirs, "melody"))
    same(pair, UNEQUAL, compat="audiocraft", seed=1, lengths=[50_000, 120_000])
    same(pair, ONE, seed=1, lengths=[1_200_000])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("setting", ["greedy", "top_k", "top_p"])
def test_style_at_the_level_of_the_lm(double, setting):
    theirs = ac.build_lm("style")
    mine = ours.lm_of(theirs, "style")
    options = {**SETTINGS[setting], **({"cfg_coef_beta": 5.0} if double else {})}
    expected = ac.generate(theirs, UNEQUAL, "style", seed=8, **options)
    torch.manual_seed(8)
    got = mine.generate(None, ours.injected_conditions(theirs, UNEQUAL, double=double), max_gen_len=24, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [
    {}, {"two_step_cfg": True}, {"cfg_coef_beta": 5.0},
    {"cfg_coef_beta": 2.0, "two_step_cfg": True, "use_sampling": False},
], ids=str)  # fmt: skip
def test_style_through_our_conditioner(options):
    """Branches, prefix lengths and masks of a style model, around a toy in the place of MERT."""
    theirs = ac.build_lm("style")
    pair = ("style", theirs, ours.lm_of(theirs, "style"))
    same(pair, ONE, seed=8, **options)
    same(pair, UNEQUAL, compat="audiocraft", seed=8, lengths=[20_500, 64_000], **options)
    same(pair, [None, "slow piano"], compat="audiocraft", seed=8, **options)


@pytest.mark.parametrize("dim,heads,card", [(32, 2, 64), (48, 3, 400), (128, 2, 1024), (96, 4, 2048)])
def test_widths_and_vocabularies(dim, heads, card):
    """Heads of 16, 16, 64 and 24."""
    theirs = ac.build_lm("text", dim=dim, num_heads=heads, card=card)
    same(("text", theirs, ours.lm_of(theirs, "text")), ONE, seed=9, top_k=40)


PATTERNS = {
    "parallel": ({}, PatternConfig(kind="parallel")),
    "unroll": ({}, PatternConfig(kind="unroll")),
    "unroll_partial": (
        {"flattening": [0, 1, 1, 1], "delays": [0, 3, 3, 3]},
        PatternConfig(kind="unroll", flattening=(0, 1, 1, 1), delays=(0, 3, 3, 3)),
    ),
    "coarse_first": ({}, PatternConfig(kind="coarse_first")),
    "musiclm": ({}, PatternConfig(kind="musiclm")),
    "flatten_first": ({"flatten_first": 3}, PatternConfig(flatten_first=3)),
    "empty_initial": ({"empty_initial": 2}, PatternConfig(empty_initial=2)),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name):
    options, config = PATTERNS[name]
    kind = {"flatten_first": "delay", "empty_initial": "delay", "unroll_partial": "unroll"}.get(name, name)
    theirs = ac.build_lm("text", provider=ac.pattern_provider(kind, 4, **options))
    pair = ("text", theirs, ours.lm_of(theirs, "text", config))
    same(pair, ONE, seed=3, steps=12)
    if name in ("parallel", "flatten_first", "empty_initial"):
        prompt = torch.randint(0, theirs.card, (1, 4, 5), generator=torch.Generator().manual_seed(1))
        same(pair, ONE, seed=3, steps=12, prompt=prompt)


def test_progress_counts_like_audiocraft(pair):
    kind, theirs, mine = pair
    calls: tuple[list, list] = ([], [])
    ac.generate(theirs, ONE, kind, callback=lambda *c: calls[0].append(c))
    ours.generate(mine, ONE, kind, callback=lambda *c: calls[1].append(c))
    assert calls[0] == calls[1] and calls[0][-1] == (27, 27)

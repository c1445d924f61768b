"""Teacher-forced likelihood against one-token-at-a-time sums and against the loss of transformers' own class."""

from __future__ import annotations

import math

import pytest
import torch

from musicgen_fast import MusicGen
from musicgen_fast.conditioning import ConditioningAttributes
from musicgen_fast.evaluation import Likelihood, negative_log_likelihood, unigram_cross_entropy
from musicgen_fast.pattern import build_pattern

from .checkpoint_writers import tiny, write_transformers
from .oracle import transformers_lm as hf
from .packed_tools import scale_heads

TEXTS = ["slow piano", "80s pop track with bassy drums and a very bright synth", None]
FRAMES = 7


@pytest.fixture(scope="module", params=["text", "stereo", "melody"])
def lm(request, tmp_path_factory):
    folder = write_transformers(tmp_path_factory.mktemp(request.param), tiny(request.param))
    return MusicGen.get_pretrained(folder, device="cpu").lm


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers' model, its tokenizer, this project's language model)"""
    theirs = hf.build("text")
    folder = hf.save(theirs, tmp_path_factory.mktemp("pair"))
    return theirs, hf.tokenizer(folder), MusicGen.get_pretrained(folder, device="cpu").lm


def random_tokens(lm, batch=3, frames=FRAMES, seed=0):
    return torch.randint(lm.card, (batch, lm.num_codebooks, frames), generator=torch.Generator().manual_seed(seed))


def by_hand(lm, tokens, text):
    """[K] nats of one clip [K, T]: a pass over only what precedes each step, and one token read off at a time."""
    (branch,) = lm.conditioner([ConditioningAttributes({"description": text})], guidance="none").branches
    prefix, cross = (None if s is None else s[0][None] for s in (branch.prefix, branch.cross))
    pattern = build_pattern(lm.config.pattern, *tokens.shape)
    totals = [0.0] * len(tokens)
    for step in range(1, pattern.num_steps):
        seen = torch.full((1, len(tokens), step), lm.special_token_id)
        for s in range(step):
            for k, t in enumerate(pattern.table[s]):
                if t >= 0:
                    seen[0, k, s] = tokens[k, t]
        logits = lm.transformer(seen, prefix, cross)[0, -1].double()
        for k, t in enumerate(pattern.table[step]):
            if t >= 0:
                totals[k] -= float(logits[k].log_softmax(-1)[tokens[k, t]])
    return torch.tensor(totals, dtype=torch.float64)


def test_equals_one_token_at_a_time(lm):
    tokens = random_tokens(lm)
    found = negative_log_likelihood(lm, tokens, TEXTS)
    expected = torch.stack([by_hand(lm, clip, text) for clip, text in zip(tokens, TEXTS, strict=True)])
    torch.testing.assert_close(found.totals, expected, rtol=1e-5, atol=1e-5)
    assert found.totals.dtype == torch.float64
    assert found.counts.tolist() == [3 * FRAMES] * lm.num_codebooks
    torch.testing.assert_close(found.per_codebook, expected.sum(0) / (3 * FRAMES), rtol=1e-5, atol=1e-5)
    assert found.mean == pytest.approx(float(expected.sum()) / (3 * FRAMES * lm.num_codebooks), rel=1e-5)


def test_neighbours_do_not_matter(lm):
    tokens = random_tokens(lm)
    together = negative_log_likelihood(lm, tokens, TEXTS).totals
    torch.testing.assert_close(negative_log_likelihood(lm, tokens, TEXTS, batch_size=2).totals, together)
    alone = negative_log_likelihood(lm, tokens[1:2], [ConditioningAttributes({"description": TEXTS[1]})])
    torch.testing.assert_close(alone.totals[0], together[1], rtol=1e-5, atol=1e-5)


def test_no_descriptions_are_the_null_condition(lm):
    tokens = random_tokens(lm)
    null = negative_log_likelihood(lm, tokens)
    assert torch.equal(null.totals, negative_log_likelihood(lm, tokens, [None, None, ""]).totals)
    assert (null.totals - negative_log_likelihood(lm, tokens, TEXTS[:1] * 3).totals).abs().min() > 1e-4


def test_a_model_that_knows_nothing_costs_log_v(tmp_path):
    lm = MusicGen.get_pretrained(write_transformers(tmp_path, tiny()), device="cpu").lm
    scale_heads(lm, 0)
    assert negative_log_likelihood(lm, random_tokens(lm)).per_codebook.tolist() == pytest.approx([math.log(64)] * 4)


def test_the_loss_of_transformers(pair):
    """Its loss is the mean over codebooks of means over the cells whose label is not the padding token."""
    theirs, tokenize, lm = pair
    tokens, text = random_tokens(lm, 1, 12), "slow piano waltz"
    sequence = build_pattern(lm.config.pattern, 4, 12).build(tokens, lm.special_token_id)
    inputs = dict(tokenize([text], return_tensors="pt"))
    fed = sequence[:, :, :-1].flatten(0, 1)
    output = theirs(**inputs, decoder_input_ids=fed, labels=sequence[:, :, 1:].transpose(1, 2).contiguous())
    found = negative_log_likelihood(lm, tokens, [text])
    assert found.mean == pytest.approx(float(output.loss), rel=1e-5)


def test_what_the_model_draws_is_likelier_than_noise(pair):
    lm = pair[2]
    drawn = lm.generate(num_samples=8, max_gen_len=20, top_k=0, seed=0)
    noise = random_tokens(lm, 8, 20)
    assert negative_log_likelihood(lm, drawn).mean < math.log(lm.card) < negative_log_likelihood(lm, noise).mean


def test_clips_of_other_lengths_are_added():
    first = Likelihood(torch.tensor([[4.0, 8.0]], dtype=torch.float64), torch.tensor([4]))
    both = first + Likelihood(torch.tensor([[12.0, 12.0]], dtype=torch.float64), torch.tensor([6]))
    assert both.counts.tolist() == [10, 10]
    assert both.per_codebook.tolist() == [1.6, 2.0]
    assert torch.isnan(first.standard_error).all()


def test_standard_error_is_that_of_a_mean_over_clips():
    per_clip = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    found = Likelihood(per_clip * 5, torch.full((3,), 5)).standard_error
    torch.testing.assert_close(found, per_clip.std(0) / math.sqrt(3))


def test_unigram_by_hand():
    train = torch.tensor([[[0, 0, 0, 1], [2, 2, 2, 2]]])
    test = torch.tensor([[[0, 1], [2, 0]]])
    found = unigram_cross_entropy(train, test, vocab=3, smoothing=1.0)
    expected = [-(math.log(4 / 7) + math.log(2 / 7)) / 2, -(math.log(5 / 7) + math.log(1 / 7)) / 2]
    assert found.tolist() == pytest.approx(expected)
    unsmoothed = unigram_cross_entropy(train, test, vocab=3, smoothing=0.0)
    assert unsmoothed[0] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2) and unsmoothed[1] == math.inf


def test_wrong_input_is_named(pair):
    lm = pair[2]
    tokens = random_tokens(lm)
    for wrong in (tokens[:, :3], tokens.float(), tokens[:, :, :0], tokens + lm.card, tokens - lm.card):
        with pytest.raises(ValueError, match="tokens"):
            negative_log_likelihood(lm, wrong)
    with pytest.raises(ValueError, match="2 descriptions were given for 3 clips"):
        negative_log_likelihood(lm, tokens, TEXTS[:2])
    with pytest.raises(ValueError, match="batch_size"):
        negative_log_likelihood(lm, tokens, batch_size=0)
    with pytest.raises(ValueError, match="test_tokens"):
        unigram_cross_entropy(tokens, tokens + 1, lm.card)
    with pytest.raises(ValueError, match="codebooks"):
        unigram_cross_entropy(tokens, tokens[:, :2], lm.card)

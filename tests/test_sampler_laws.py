"""What every draw obeys: its distribution, its support; nothing matters but logits, parameters and counters."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from musicgen_fast.sampling import Draw, draw, filtered_probs, sample

from .sampler_cases import random_draw
from .test_sampling import skip_if_missing

FILTERS = {
    "none": {},
    "top-k 250": {"top_k": 250},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "all": {"top_k": 300, "top_p": 0.95, "min_p": 0.001, "temperature": 1.3},
}


def exact_probabilities(logits: np.ndarray, temperature=1.0, top_k=0, top_p=0.0, min_p=0.0) -> np.ndarray:
    """The law in float64, by sorting, written without a look at the package."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    keep = np.ones(len(p), bool)
    if top_k:
        keep &= p >= p[order[top_k - 1]]
    if min_p:
        keep &= p >= min_p * p.max()
    if top_p:
        kept = np.where(keep, p, 0)
        before = np.cumsum(kept[order]) - kept[order]
        keep[order[before > top_p * kept.sum()]] = False
    return np.where(keep, p, 0) / p[keep].sum()


def count_draws(logits: torch.Tensor, draws: int, backend: str, **filters) -> np.ndarray:
    """How often each token of one row [V] was drawn, with seeds 0..draws-1 in chunks."""
    counts, chunk = np.zeros(len(logits), np.int64), 50_000
    for first in range(0, draws, chunk):
        n = min(chunk, draws - first)
        rows = logits.view(1, 1, 1, -1).expand(1, n, 1, -1)
        tokens = sample(rows, **filters, seed=torch.arange(first, first + n), step=3, backend=backend)
        counts += np.bincount(tokens.flatten().numpy(), minlength=len(logits))
    return counts


def check_chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """Pearson's statistic with rare tokens pooled (expectation under 5), in standard deviations of its law."""
    expected = p * counts.sum()
    assert counts[p == 0].sum() == 0, "drawn outside of the support"
    rare = (expected < 5) & (p > 0)
    observed, wanted = counts[(p > 0) & ~rare], expected[(p > 0) & ~rare]
    if expected[rare].sum() >= 5:
        observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, expected[rare].sum())
    dof = len(wanted) - 1
    deviation = (((observed - wanted) ** 2 / wanted).sum() - dof) / math.sqrt(2 * dof)
    assert deviation < 6, f"chi-square is {deviation:.1f} standard deviations too large"
    return deviation


def check_law(draws: int, name: str, backend: str, vocab: int = 2048) -> float:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(len(name))) * 2.5
    p = exact_probabilities(logits.numpy(), **FILTERS[name])
    return check_chi_square(count_draws(logits, draws, backend, **FILTERS[name]), p)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("backend,draws,vocab", [("torch", 6_000, 400), ("cpu", 100_000, 2048)])
def test_distribution(backend, draws, vocab, name):
    skip_if_missing(backend)
    check_law(draws, name, backend, vocab)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_distribution_over_a_million_draws(name):
    """5,000,000 draws in all."""
    skip_if_missing("cpu")
    print(f"{name}: chi-square {check_law(1_000_000, name, 'cpu'):+.2f} standard deviations from its mean")


def check_tail(gap: float, draws: int) -> None:
    """One likely token and 4,095 unlikely ones: uniform words cut short, or a floor under E, would starve the tail."""
    logits = torch.full((4096,), -gap)
    logits[77] = 0.0
    counts = count_draws(logits, draws, "cpu")
    tail = np.delete(counts, 77)
    expected = draws * 4095 * math.exp(-gap) / (1 + 4095 * math.exp(-gap))
    print(f"gap {gap}: {tail.sum()} draws in the tail, {expected:.1f} expected")
    assert abs(tail.sum() - expected) < 5 * math.sqrt(expected)
    distinct = 4095 * (1 - math.exp(-expected / 4095))
    assert (tail > 0).sum() > 0.75 * distinct, "few tokens share the tail"


def test_tail():
    skip_if_missing("cpu")
    check_tail(14.0, 60_000)  # 204 expected


@pytest.mark.slow
@pytest.mark.parametrize("gap,draws", [(18.0, 2_000_000), (20.0, 3_000_000)])
def test_far_tail(gap, draws):
    skip_if_missing("cpu")
    check_tail(gap, draws)  # 125 and 25 expected


def test_filtered_probs_is_the_law():
    logits = torch.randn(512, generator=torch.Generator().manual_seed(9)) * 2
    for filters in ({}, {"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 60, "top_p": 0.7, "min_p": 0.01}):
        exact = exact_probabilities(logits.numpy(), **filters)
        given = filtered_probs(logits.view(1, 1, 1, -1), **filters)[0, 0].double().numpy()
        assert np.array_equal(given > 0, exact > 0), filters
        assert np.abs(given - exact).max() < 1e-6


# ---- independence: each property holds for whatever random_draw makes of a seed


def drawn(inputs: Draw, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    mine = copy.copy(inputs)
    mine.tokens, mine.status = inputs.tokens.clone(), inputs.status.clone()
    draw(mine, backend)
    return mine.tokens, mine.status


def take(inputs: Draw, rows: torch.Tensor) -> Draw:
    """The draw with only those requests, in that order; memory laid out anew."""
    p = inputs.params
    tensors = ("cfg_coef", "cfg_coef_beta", "scale", "divisor", "top_k", "top_p", "min_p")
    params = copy.copy(p)
    for name in tensors:
        object.__setattr__(params, name, getattr(p, name)[rows].contiguous())
    part = Draw(inputs.logits[:, rows], params, inputs.tokens[rows].contiguous(), inputs.status[rows].contiguous())
    for name in ("seed", "step", "stream", "noise", "column"):
        value = getattr(inputs, name)
        setattr(part, name, None if value is None else value[rows].contiguous())
    part.frames, part.divide = inputs.frames, inputs.divide
    return part


properties = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
any_seed = st.integers(0, 2**40)
odd_vocab = st.sampled_from([1, 2, 3, 7, 63, 65, 129, 400, 1000, 2047])
backends = pytest.mark.parametrize("backend", ["torch", "cpu"])


@backends
@properties
@given(seed=any_seed, vocab=odd_vocab)
def test_the_place_in_the_batch_does_not_matter(backend, seed, vocab):
    """Permuted, alone, or in a part of the batch: a request gets the same tokens."""
    skip_if_missing(backend)
    inputs = random_draw(seed, 24, vocab=vocab)
    tokens, status = drawn(inputs, backend)
    batch = len(tokens)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    for rows in (order, order[: batch // 2 + 1], order[:1]):
        some_tokens, some_status = drawn(take(inputs, rows), backend)
        assert torch.equal(some_tokens, tokens[rows]) and torch.equal(some_status, status[rows])


@backends
@properties
@given(seed=any_seed, vocab=odd_vocab)
def test_a_neighbours_parameters_do_not_matter(backend, seed, vocab):
    """The others' logits, filters and seeds are replaced by those of another draw, filters that were off included."""
    skip_if_missing(backend)
    shape = {"vocab": vocab, "branches": 2, "dtype": torch.float32, "noise": False, "column": False}
    inputs, other = random_draw(seed, 16, **shape), random_draw(seed + 1, 16, **shape)
    if inputs.status.shape != other.status.shape or inputs.seed is None or other.seed is None:
        return
    tokens, _ = drawn(inputs, backend)
    mixed = take(other, torch.arange(len(tokens)))
    mixed.logits = mixed.logits.contiguous()
    mixed.logits[:, 0] = inputs.logits[:, 0]
    for name in ("cfg_coef", "cfg_coef_beta", "scale", "divisor", "top_k", "top_p", "min_p"):
        getattr(mixed.params, name)[0] = getattr(inputs.params, name)[0]
    for name in ("any_top_k", "any_top_p", "any_min_p", "any_sorted"):
        object.__setattr__(mixed.params, name, True)
    object.__setattr__(mixed.params, "all_greedy", inputs.params.all_greedy and other.params.all_greedy)
    mixed.seed[0], mixed.step[0], mixed.stream[0] = inputs.seed[0], inputs.step[0], inputs.stream[0]
    again, _ = drawn(mixed, backend)
    assert torch.equal(again[0], tokens[0].to(again.dtype))


@backends
@properties
@given(seed=any_seed)
def test_a_longer_vocabulary_of_impossible_tokens_changes_nothing(backend, seed):
    """Noise is counted by token: -inf logits behind the last token leave the draw as it was, top-k included."""
    skip_if_missing(backend)
    inputs = random_draw(seed, 8, vocab=200, noise=False, column=False)
    longer = copy.copy(inputs)
    pad = torch.full((*inputs.logits.shape[:3], 57), -math.inf, dtype=inputs.logits.dtype)
    pad[1:] = 0  # guidance would make NaN of -inf - -inf, and mixes -inf with 0 to -inf while cfg > 0
    longer.logits = torch.cat([inputs.logits, pad], dim=3)
    if inputs.logits.shape[0] > 1:
        return
    tokens, status = drawn(inputs, backend)
    more_tokens, more_status = drawn(longer, backend)
    within = inputs.params.top_k < 200  # at 200 and more the filter is off for one and keeps all for the other
    assert torch.equal(more_tokens[within], tokens[within]) and torch.equal(more_status, status)


@backends
def test_counters_all_matter(backend):
    """Another seed (either half), step, stream or codebook is another draw; the step counts modulo 2^32."""
    skip_if_missing(backend)
    logits = torch.zeros(1, 1, 2, 2048)
    base = {"seed": 5, "step": 9, "stream": 0}
    changes = [{}, {"seed": 6}, {"seed": 5 + 2**32}, {"seed": 5 - 2**63}, {"step": 10}, {"stream": 1}]
    changes += [{"stream": 1 << 24}]
    seen = [tuple(sample(logits, **(base | c), backend=backend)[0].tolist()) for c in changes]
    assert len(set(seen)) == len(changes) and all(a != b for a, b in seen)
    assert sample(logits, seed=5, step=9 + 2**32, backend=backend)[0].tolist() == list(seen[0])

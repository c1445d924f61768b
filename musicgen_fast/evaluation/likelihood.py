"""How well a language model predicts given tokens: teacher-forced negative log-likelihood, codebook by codebook.

Knows nothing of audio and of sampling: tokens [B, K, T] and texts go in, nats come out. Every cell of the pattern that
holds a frame is counted once, predicted from the steps before its own; cells with the special token are inputs only.
Guidance is left out: the figure is that of the conditional (or, without texts, the null) distribution. The mean over
codebooks is the loss that audiocraft's `MusicGenSolver` trains with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning import ConditioningAttributes
from ..config import GenerationParams
from ..lm import LMModel
from ..pattern import Pattern, build_pattern
from ..state import Branch

_NO_GUIDANCE = GenerationParams(cfg_coef=1.0)  # `LMModel.encode` then makes one branch, the conditional one


@dataclass(frozen=True)
class Likelihood:
    """Summed negative log-likelihoods of some clips.

    Attributes:
        totals: float64 [B, K] nats, summed over the frames of each clip and codebook.
        frames: int64 [B] frames of each clip.
    """

    totals: Tensor
    frames: Tensor

    @property
    def counts(self) -> Tensor:
        """int64 [K]: tokens that were scored, per codebook."""
        return self.frames.sum().expand(self.totals.shape[1])

    @property
    def per_codebook(self) -> Tensor:
        """float64 [K]: nats per token."""
        return self.totals.sum(0) / self.frames.sum()

    @property
    def standard_error(self) -> Tensor:
        """float64 [K]: standard error of `per_codebook` over clips (tokens within a clip depend on each other).

        The ratio estimator's: exact for clips of one length. NaN for a single clip.
        """
        count = len(self.totals)
        if count < 2:
            return torch.full_like(self.totals[0], math.nan)
        residual = self.totals - self.frames[:, None] * self.per_codebook
        return (residual.square().sum(0) * count / (count - 1)).sqrt() / self.frames.sum()

    @property
    def mean(self) -> float:
        """Nats per token over all codebooks."""
        return float(self.per_codebook.mean())

    def __add__(self, other: Likelihood) -> Likelihood:
        """The clips of both."""
        return Likelihood(torch.cat([self.totals, other.totals]), torch.cat([self.frames, other.frames]))


@torch.no_grad()
def negative_log_likelihood(
    lm: LMModel,
    tokens: Tensor,
    descriptions: Sequence[str | None | ConditioningAttributes] | None = None,
    *,
    batch_size: int = 8,
) -> Likelihood:
    """Teacher-forced likelihood of clips that all have T frames.

    Args:
        lm: `MusicGen.lm`, in any precision; log-probabilities are taken in float64 from its logits.
        tokens: integers [B, K, T] in 0..V-1. Clips of other lengths need a call of their own (add the results):
            padding would stand where the delay pattern has its special tokens.
        descriptions: a text, None (the null condition) or finished attributes for each clip; None: null for all.
        batch_size: rows in one pass. A row's figure does not depend on who shares its batch under the model's default
            'isolated' padding.

    Raises:
        ValueError: shapes that do not fit, tokens outside of the vocabulary.
    """
    tokens = _checked_tokens(lm, tokens)
    batch, num_codebooks, num_frames = tokens.shape
    if descriptions is not None and len(descriptions) != batch:
        raise ValueError(f"{len(descriptions)} descriptions were given for {batch} clips")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    asked = [_attributes(d) for d in descriptions or [None] * batch]
    pattern = build_pattern(lm.config.pattern, num_codebooks, num_frames)
    totals = torch.zeros(batch, num_codebooks, dtype=torch.float64)
    for first in range(0, batch, batch_size):
        rows = slice(first, first + batch_size)
        sequence = pattern.build(tokens[rows], lm.special_token_id)
        (branch,) = lm.encode(asked[rows], _NO_GUIDANCE).branches
        for group in _equal_lengths(branch, len(sequence)):
            part = sequence[group]
            logits = lm.transformer(part[:, :, :-1], _stacked(branch.prefix, group), _stacked(branch.cross, group))
            totals[torch.tensor(group) + first] = _cell_totals(logits, part, pattern).cpu()
    return Likelihood(totals, torch.full((batch,), num_frames, dtype=torch.int64))


def unigram_cross_entropy(train_tokens: Tensor, test_tokens: Tensor, vocab: int, smoothing: float = 1.0) -> Tensor:
    """Float64 [K], nats per token: `test_tokens` [B, K, T] coded with the token frequencies of `train_tokens`.

    `vocab` is V; ValueError for other shapes, tokens outside of 0..V-1, a negative `smoothing`. What a model reaches
    that knows nothing but how often each token occurs. `smoothing` is added to every count; at 0 a test token that
    training never saw makes the figure infinite.
    """
    for name, tokens in (("train_tokens", train_tokens), ("test_tokens", test_tokens)):
        if tokens.dim() != 3 or tokens.is_floating_point() or tokens.numel() == 0:
            raise ValueError(
                f"{name} must be integers [B, K, T], at least one, got {tokens.dtype} {list(tokens.shape)}"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
            raise ValueError(f"{name} must lie in 0..{vocab - 1}")
    if train_tokens.shape[1] != test_tokens.shape[1]:
        raise ValueError(f"{train_tokens.shape[1]} codebooks in training, {test_tokens.shape[1]} in the test")
    if smoothing < 0:
        raise ValueError(f"smoothing must not be negative, got {smoothing}")
    train, test = token_counts(train_tokens, vocab), token_counts(test_tokens, vocab)
    log_probability = ((train + smoothing) / (train + smoothing).sum(1, keepdim=True)).log()
    seen = torch.where(test > 0, test * log_probability, 0.0)  # 0 * -inf would be NaN
    return -seen.sum(1) / test.sum(1)


def token_counts(tokens: Tensor, vocab: int) -> Tensor:
    """Float64 [K, vocab]: how often each token occurs in tokens [B, K, T]."""
    books = tokens.detach().cpu().to(torch.int64).unbind(1)
    return torch.stack([torch.bincount(book.reshape(-1), minlength=vocab) for book in books]).double()


def _checked_tokens(lm: LMModel, tokens: Tensor) -> Tensor:
    if tokens.dim() != 3 or tokens.shape[1] != lm.num_codebooks or tokens.is_floating_point():
        raise ValueError(f"tokens must be integers [B, {lm.num_codebooks}, T], got {tokens.dtype} {list(tokens.shape)}")
    if tokens.numel() == 0:
        raise ValueError("no tokens were given")
    if int(tokens.min()) < 0 or int(tokens.max()) >= lm.card:
        raise ValueError(f"tokens must lie in 0..{lm.card - 1}")
    return tokens.to(lm.device, torch.int64)


def _attributes(description: str | None | ConditioningAttributes) -> ConditioningAttributes:
    if isinstance(description, ConditioningAttributes):
        return description
    return ConditioningAttributes({"description": description})


def _equal_lengths(branch: Branch, batch: int) -> list[list[int]]:
    """Rows grouped by the lengths of their conditions: a pass of the reference transformer takes no padding."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for b in range(batch):
        lengths = tuple(len(states[b]) for states in (branch.prefix, branch.cross) if states is not None)
        groups.setdefault(lengths, []).append(b)
    return list(groups.values())


def _stacked(states: list[Tensor] | None, rows: list[int]) -> Tensor | None:
    return None if states is None else torch.stack([states[b] for b in rows])


def _cell_totals(logits: Tensor, sequence: Tensor, pattern: Pattern) -> Tensor:
    """Logits [R, S-1, K, V] of steps 1.. of sequence [R, K, S] -> float64 [R, K] nats over the cells with a frame."""
    totals = []
    for k in range(sequence.shape[1]):  # one codebook at a time: float64 logits of all would be the largest tensor here
        steps = torch.from_numpy((pattern.table[:, k] >= 0).nonzero()[0]).to(logits.device)
        scores = logits[:, steps - 1, k].double()
        wanted = scores.gather(2, sequence[:, k, steps, None])[..., 0]
        totals.append((scores.logsumexp(2) - wanted).sum(1))
    return torch.stack(totals, dim=1)

"""Filling the cache of the next window while the current one plays.

Positions restart with every window, so keys and values cannot be carried over a change. But most columns of the next
window hold the same tokens as columns of this one, so a second lane can consume them as they are drawn, one column a
step, at its own positions: what a prefill would compute, without a step that takes longer than the others. Knows the
tables of patterns, nothing of decoders. With delays 0..3, a window of 1500 and a stride of 900:

    step draws column   901 ... 1500   1501         1502         1503         -
    of the next window    1 ...  600    601          602          603       604 ...
    which draws           -        -   codebook 0   0 and 1      0 to 2     all

In the tail (1501 to 1503) both lanes draw: the older one the codebooks whose frames end late, which the newer one takes
over; each reads its own sequence, because they hold different tokens there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .pattern import Pattern
from .state import State


@dataclass(frozen=True, slots=True)
class Overlap:
    """How the columns of two windows correspond.

    Attributes:
        shift: column s of the newer window holds the tokens of column s + shift of the older one.
        first: the column of the newer window from which it draws.
        tail: so many columns from `first` on are written by both.
    """

    shift: int
    first: int
    tail: int

    @property
    def starts(self) -> int:
        """The column of the older window during whose step the newer one consumes its first column."""
        return self.shift + 1

    @property
    def alone(self) -> int:
        """The first column of the newer window that is drawn after the older window has ended."""
        return self.first + self.tail


@lru_cache(maxsize=64)
def overlap_of(old: Pattern, new: Pattern, stride: int, prompt: int) -> Overlap | None:
    """The overlap of two windows `stride` frames apart, of which the newer one knows `prompt` frames.

    None where the columns of the newer window are not columns of the older one: flattened and grouped patterns.
    """
    first = new.first_step(prompt)
    tail = old.num_steps - stride - first
    if tail < 0 or first + tail > new.num_steps or (new.table[0] >= 0).any():
        return None
    ours, theirs = new.table[: first + tail], old.table[stride:]
    same = (ours < 0) | (theirs == ours + stride)
    beyond = (theirs < 0) & (ours + stride >= old.num_frames)
    return Overlap(stride, first, tail) if (same | beyond).all() else None


class Shadow:
    """A lane's tie to the lane of the window before it: a `Source` of tokens.

    Must be stepped behind its source, so that the column to be copied has been drawn.
    """

    def __init__(self, source: State, overlap: Overlap):
        self.source = source
        self.overlap = overlap
        self.first = overlap.first

    def start(self, state: State, step_offset: int) -> None:
        """Silence the sampler in a lane that was just begun: it draws nothing until column `first`."""
        assert state.place is not None
        if state.column < self.first:
            state.place.column.fill_(state.place.sequence.shape[2])
            state.place.step.fill_(step_offset + self.first)

    def copy(self, state: State) -> None:
        """Take the column being written from the source, except where either pattern masks it.

        In the tail the lane may have drawn these cells as well: the source's tokens hold. That order (draw, copy) suits
        a decoder that draws all lanes in one launch.
        """
        column, special = state.column, state.config.special_token
        theirs = self.source.sequence[:, :, column + self.overlap.shift]
        ours = state.sequence[:, :, column]
        ours.copy_(torch.where((theirs != special) & (ours != special), theirs, ours))
        if column == self.first - 1:
            self._begin_to_draw(state)

    def _begin_to_draw(self, state: State) -> None:
        assert state.place is not None and self.source.place is not None
        state.place.column.fill_(self.first)
        # The references draw the whole older window first: its tail keeps the random numbers that come next.
        self.source.sampler.reserve(self.source.place, self.overlap.tail, state.config.vocab_size)

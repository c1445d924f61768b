"""Other conditions from a frame on: the text changes, the self-attention cache stays.

During a crossfade two sets of rows run: the outgoing conditions and the incoming ones, which start from a copy of the
cache. Both read the same tokens; their logits are mixed linearly by frame, and one draw is made from the mixture. Knows
nothing of windows and decoders. Cross-attention models only: a prefix is part of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .state import Cache, Conditions, State


@dataclass(frozen=True)
class Change:
    """From `frame` of the whole generation on `conditions` hold, after a crossfade of `fade` frames (0: at once).

    A window that begins within a crossfade begins with the incoming conditions, and every window reads its prompt under
    the conditions that hold at its first new frame.
    """

    frame: int
    conditions: Conditions
    fade: int = 0


def checked_changes(changes: Sequence[Change]) -> list[Change]:
    """The changes; ValueError where they are out of order or a crossfade runs into the next change."""
    for change, following in zip(changes, changes[1:], strict=False):
        if following.frame < change.frame + max(change.fade, 1):
            raise ValueError(
                f"a change at frame {change.frame} with a crossfade of {change.fade} frames is not over at the next "
                f"change, frame {following.frame}"
            )
    if any(change.fade < 0 for change in changes):
        raise ValueError("a crossfade cannot be shorter than 0 frames")
    return list(changes)


def check_same_rows(changes: Sequence[Change], conditions: Conditions) -> None:
    """ValueError where the rows of a change are not those that run."""
    for change in changes:
        other = change.conditions
        if (other.batch, other.num_rows, other.mix) != (conditions.batch, conditions.num_rows, conditions.mix):
            raise ValueError(
                f"the conditions from frame {change.frame} on are for other requests or branches than those before: "
                "guidance (or its absence) cannot change within a generation"
            )


class Blend:
    """The tie between an outgoing and an incoming lane of one window, for as long as a crossfade lasts."""

    def __init__(self, change: Change, outgoing: State, incoming: State):
        self.change = change
        self.outgoing, self.incoming = outgoing, incoming
        self.weight = 0.0
        self._held: Tensor | None = None
        outgoing.blend = incoming.blend = self

    def at(self, frame: int) -> bool:
        """Set the weight for the column whose newest frame this is; False where the crossfade is over."""
        self.weight = (frame - self.change.frame + 1) / (self.change.fade + 1)
        return self.weight < 1

    def mixed(self, state: State, logits: Tensor) -> Tensor | None:
        """Logits [NB, B, K, V] to draw from; None from the outgoing lane, which is stepped first."""
        if state is self.outgoing:
            self._held = logits
            return None
        assert self._held is not None
        return torch.lerp(self._held, logits, self.weight)

    def end(self) -> State:
        """The incoming lane, on its own from now on."""
        self.outgoing.blend = self.incoming.blend = None
        return self.incoming


def incoming_lane(outgoing: State, change: Change, kv: Cache) -> State:
    """A lane at the place of `outgoing`, with a copy of its cache in `kv`; not yet conditioned."""
    kv.copy_from(outgoing.kv, max(outgoing.lengths))
    lane = State(
        outgoing.config, kv, list(outgoing.lengths), change.conditions, outgoing.sampler,
        place=outgoing.place, slots=outgoing.slots, rows=outgoing.rows,
    )  # fmt: skip
    lane.pattern, lane.column = outgoing.pattern, outgoing.column
    return lane

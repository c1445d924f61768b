"""The draws of a step: one for all lanes that lie side by side in the slots, one each for the others.

A draw takes some 30 us of Python, whether it serves one request or sixteen, and 5 of the sampler for each; so the lanes
of seeded requests with the same branches are drawn as one, straight from the rows of `slots.Slots`. The tokens are the
same: the noise is counted by request. Knows the rows of a pass and their logits, nothing of how those are computed.
Shapes: rows of the pass lane by lane, each lane branch-major; logits [wanted, K, V].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .place import Place, Sampler
from .state import State

__all__ = ["Draws"]


@dataclass
class _Run:
    """Lanes that fill `rows` of their slots without a gap, and where their logits lie among the wanted ones."""

    sampler: Sampler
    place: Place
    states: list[State]
    logits: slice


class Draws:
    """What the lanes of a step draw.

    Attributes:
        wanted: rows of the pass whose logits are needed, in the order in which `draw` takes them. Lanes that follow
            others want none.
    """

    def __init__(self, states: Sequence[State]):
        self._states = states
        self.wanted: list[int] = []
        self._runs: list[_Run] = []
        self._single: dict[int, slice] = {}  # by place in `states`
        joint: dict[tuple, list[tuple[State, int]]] = {}
        first = 0
        for index, state in enumerate(states):
            if not state.follows:
                if state.slots is None or state.blend is not None or state.sampler.seeds is None:
                    self._single[index] = self._want(range(first, first + len(state.lengths)))
                else:
                    kind = state.conditions.mix, len(state.conditions.branches), state.sampler.backend, id(state.slots)
                    joint.setdefault(kind, []).append((state, first))
            first += len(state.lengths)
        for lanes in joint.values():
            self._join(lanes)

    def _want(self, rows: Sequence[int]) -> slice:
        first = len(self.wanted)
        self.wanted += rows
        return slice(first, len(self.wanted))

    def _join(self, lanes: list[tuple[State, int]]) -> None:
        """Cut lanes of one kind where their rows in the slots are not side by side."""
        lanes.sort(key=lambda lane: lane[0].rows.start)
        begin = 0
        for end in range(1, len(lanes) + 1):
            if end < len(lanes) and lanes[end][0].rows.start == lanes[end - 1][0].rows.stop:
                continue
            run = lanes[begin:end]
            states = [state for state, _ in run]
            wanted: list[int] = []
            for branch in range(len(states[0].conditions.branches)):
                for state, first in run:
                    batch = len(state.rows)
                    wanted += range(first + branch * batch, first + (branch + 1) * batch)
            slots = states[0].slots
            assert slots is not None
            sampler, place = slots.part(range(states[0].rows.start, states[-1].rows.stop), states)
            self._runs.append(_Run(sampler, place, states, self._want(wanted)))
            begin = end

    def draw(self, logits: Tensor) -> None:
        """Draw and book the column of every lane, in their order where that matters: lanes copy from those before them.

        Raises ValueError where a draw failed, after every lane has advanced.
        """
        for run in self._runs:
            run.sampler(run.states[0].conditions.expand_logits(logits[run.logits]), run.place)
            run.place.advance()
        for index, state in enumerate(self._states):
            if index in self._single:
                state.draw(logits[self._single[index]])
            else:
                state.drawn()
        for run in self._runs:
            if run.place.status.any():
                for state in run.states:
                    state.check()
        for index in self._single:
            self._states[index].check()

"""A batch of requests in lockstep through its chain of windows: which lanes run in a step, and which frames are done.

A window either begins with a prefill of its prompt, or its lane was filled as a shadow while the window before it
played (`shadow.py`). Both give the same tokens. Knows no device, text or audio, and keeps no more than two windows of
tokens, however long the generation. Shapes: prompt int64 [B, K, P], frames int64 [B, K, t].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .crossfade import Blend, Change, check_same_rows, checked_changes, incoming_lane
from .lanes import Decoder, Guidance, Lane, cache_for, open_lane, tables
from .pattern import UNKNOWN, Pattern, build_pattern, columns_per_frame
from .place import Sampler
from .shadow import Overlap, Shadow, overlap_of
from .slots import Slots
from .state import Conditions, State
from .windows import Window

ConditionsOf = Callable[[Window], Conditions]
WindowAt = Callable[[int], Window | None]


class Chain:
    """B requests that were admitted together.

    For users: `done`; `steps_done`; `steps_total`, None where the windows never end. The other attributes are what
    `saving.py` saves and sets.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: Slots,
        where: range,
        window_at: WindowAt,
        prompt: Tensor,
        conditions_of: ConditionsOf,
        sampler: Sampler,
        *,
        shadow: bool = False,
        endless: bool = False,
        guidance: Sequence[Guidance | None] = (),
        changes: Sequence[Change] = (),
    ):
        """`where`: the slots, from `Slots.take`, which the chain gives back. `shadow`: as in `engine.Generation`."""
        window = window_at(0)
        assert window is not None and len(where) == len(prompt)
        self.done, self.steps_done = False, 0
        self.decoder, self.slots, self.where = decoder, slots, where
        self.window_at, self.conditions_of, self.sampler = window_at, conditions_of, sampler
        self.guidance, self.changes = list(guidance), checked_changes(changes)
        if changes and decoder.config.conditioning != "cross":
            raise ValueError("conditions can change at a frame on cross-attention models only")
        # Prefixes (melody, style) take part in every position and are cut anew per window: nothing can be shared.
        self._shadows = shadow and decoder.config.conditioning == "cross"
        self.index, self.window = 0, window
        self.prompt = prompt[:, :, window.start :]  # known frames of the window, while it has not begun
        self.shape, self.device = tuple(prompt.shape[:2]), prompt.device
        self.lane: Lane | None = None
        self.next: Lane | None = None
        self.in_force = 0  # so many changes hold in the lane
        self._blend: Blend | None = None
        self.started = False
        self.taken = window.start + window.prompt
        self.pending: list[Tensor] = []
        self.steps_total = None if endless else self._count_steps()
        self.alone = self.first(window) + 1
        self.overlap = self.overlap_with_next(0, window, self.alone)

    # -- a step: begin, the decoder's step over the lanes, end --------------------------------------------------------

    def begin(self) -> list[State]:
        """The lanes that take part in the decoder's next step; none where a prefill is due, which `end` runs.

        So a prefill comes behind the step of the others: a launch over all slots finds its columns silent.
        """
        if not self.started:
            return []
        lane, overlap = self.lane, self.overlap
        assert lane is not None
        if self.changes:
            self._change(lane)
        if overlap is not None and self.next is None and lane.state.column == overlap.starts:
            self._start_shadow(lane, overlap)
        lanes = [lane] if self.next is None else [lane, self.next]
        if self.guidance:
            for each in lanes:
                if not each.state.follows:
                    each.guide(self.guidance)
        return [each.state for each in lanes] + ([] if self._blend is None else [self._blend.incoming])

    def end(self) -> None:
        """Finish the step that `begin` began; at the end of a window go over to the next one."""
        if not self.started:
            self._prefill()
        lane = self.lane
        assert lane is not None
        self.steps_done += 1
        if not lane.state.done:
            return
        self._end_blend(lane)
        self.collect()
        following = self.window_at(self.index + 1)
        if following is None:
            self.close()
            return
        self.index += 1
        if self.next is not None and self.overlap is not None:
            self._retire(lane)
            self.lane, self.next = self.next, None
            self.lane.state.source = None
            self.alone = self.overlap.alone
        else:
            self.slots.silence(lane.state.rows)
            self.prompt = lane.state.codes()[:, :, following.start - self.window.start :]
            self.started = False
            self.alone = self.first(following) + 1
        self.window = following
        self.overlap = self.overlap_with_next(self.index, following, self.alone)

    def take(self) -> Tensor:
        """The frames that were finished since the last call, int64 [B, K, t]; the prompt is not among them."""
        self.collect()
        parts, self.pending = self.pending, []
        if len(parts) == 1:
            return parts[0]
        nothing = torch.empty(*self.shape, 0, dtype=torch.int64, device=self.device)
        return torch.cat(parts, dim=2) if parts else nothing

    def close(self) -> None:
        """Free the slots and give the caches back. Finished frames can still be taken."""
        if not self.done:
            self.collect()
        self.done = True
        if self.lane is not None:
            self._end_blend(self.lane)
        for lane in (self.lane, self.next):
            if lane is not None:
                self._retire(lane)
        self.lane = self.next = None
        self.slots.release(self.where)
        self.where = range(0)

    def failed(self) -> bool:
        """Whether some token could not be drawn. Waits for the device."""
        lanes = [lane for lane in (self.lane, self.next) if lane is not None]
        return any(lane.state.place is not None and bool(lane.state.place.status.any()) for lane in lanes)

    # -- windows ------------------------------------------------------------------------------------------------------

    def pattern(self, window: Window) -> Pattern:
        return build_pattern(self.decoder.config.pattern, self.shape[1], window.length)

    def first(self, window: Window) -> int:
        return self.pattern(window).first_step(window.prompt)

    def offset(self, window: Window) -> int:
        return window.start * columns_per_frame(self.decoder.config.pattern, self.shape[1])

    def overlap_with_next(self, index: int, window: Window, alone: int) -> Overlap | None:
        """How window `index` and the next one overlap; None where the next one needs a prefill of its own.

        `alone`: the first column of this window that is drawn in a step without an older lane. A shadow that had to
        begin earlier would be a third lane: that is where windows overlap by half or more.
        """
        following = self.window_at(index + 1) if self._shadows else None
        if following is None:
            return None
        stride = following.start - window.start
        overlap = overlap_of(self.pattern(window), self.pattern(following), stride, following.prompt)
        if overlap is None or overlap.starts < alone:
            return None
        # While both windows run, the conditions must not change: the newer one would have read some of its prompt under
        # others than a prefill does, and a crossfade would add a third set of rows.
        born = window.start + tables(self.pattern(window)).newest[overlap.starts]
        grown = following.start + tables(self.pattern(following)).newest[overlap.alone - 1]
        return None if any(c.frame <= grown and c.frame + c.fade > born for c in self.changes) else overlap

    def _count_steps(self) -> int:
        total, index, overlap = 0, 0, None
        while (window := self.window_at(index)) is not None:
            first = self.first(window) if overlap is None else overlap.alone
            total += self.pattern(window).num_steps - first
            overlap = self.overlap_with_next(index, window, first + (overlap is None))
            index += 1
        return total

    def _prefill(self) -> None:
        """Begin a window with its prompt; in the lane of the one before it if its conditions are the same."""
        window, lane = self.window, self.lane
        conditions = self.conditions_at_start(window)
        check_same_rows(self.changes, conditions)
        self.in_force = self.changes_until(window.start + window.prompt)
        if lane is None or lane.state.conditions is not conditions:
            if lane is not None:
                self._retire(lane)
            lane = self.open(conditions, 0 if lane is None else lane.parity)
        codes = self._unknown(window)
        codes[:, :, : window.prompt] = self.prompt[:, :, : window.prompt]
        lane.state.start_window(self.pattern(window), codes, window.prompt, self.offset(window))
        lane.enter(window, self.pattern(window))
        self.lane, self.started = lane, True
        if self.guidance:
            lane.guide(self.guidance)
        self.decoder.prefill(lane.state)

    def _start_shadow(self, lane: Lane, overlap: Overlap) -> None:
        """Open the lane of the next window at its first column."""
        following = self.window_at(self.index + 1)
        assert following is not None
        sequence = self.pattern(following).build(self._unknown(following), self.decoder.config.special_token)
        self.follow(lane, overlap, following, self.conditions_at_start(following), sequence, 1)

    def follow(
        self, lane: Lane, overlap: Overlap, window: Window, conditions: Conditions, sequence: Tensor, column: int
    ) -> Lane:
        pattern, offset = self.pattern(window), self.offset(window)
        follower = self.open(conditions, 1 - lane.parity, lane.state)
        follower.state.begin_at(pattern, sequence, column, offset)
        follower.enter(window, pattern)
        shadow = Shadow(lane.state, overlap)
        shadow.start(follower.state, offset)
        follower.state.source = shadow
        self.next = follower
        return follower

    def open(self, conditions: Conditions, parity: int, texts_of: State | None = None) -> Lane:
        rows = self.slots.rows(self.where, parity)
        return open_lane(self.decoder, self.slots, rows, parity, conditions, self.sampler, texts_of)

    def _retire(self, lane: Lane) -> None:
        self.slots.silence(lane.state.rows)
        self.slots.keep_cache(lane.state.kv)

    def _unknown(self, window: Window) -> Tensor:
        return torch.full((*self.shape, window.length), UNKNOWN, dtype=torch.int64, device=self.device)

    # -- conditions that change ---------------------------------------------------------------------------------------

    def changes_until(self, frame: int) -> int:
        return sum(change.frame <= frame for change in self.changes)

    def conditions_at_start(self, window: Window) -> Conditions:
        """The conditions that hold at the first new frame of a window."""
        count = self.changes_until(window.start + window.prompt)
        return self.changes[count - 1].conditions if count else self.conditions_of(window)

    def _change(self, lane: Lane) -> None:
        """Begin, carry on and end what the column to be drawn asks for."""
        frame = lane.newest()
        if self._blend is not None and not self._blend.at(frame):
            self._end_blend(lane)
        count = self.changes_until(frame)
        if count <= self.in_force:
            return
        self.in_force, change = count, self.changes[count - 1]
        state = lane.state
        if frame >= change.frame + change.fade:
            state.conditions = change.conditions
            self.decoder.condition(state)
            return
        incoming = incoming_lane(state, change, cache_for(self.decoder, self.slots, len(state.lengths), state.capacity))
        self.decoder.condition(incoming)
        self._blend = Blend(change, state, incoming)
        self._blend.at(frame)

    def _end_blend(self, lane: Lane) -> None:
        if self._blend is not None:
            self.slots.keep_cache(lane.state.kv)
            lane.state, self._blend = self._blend.end(), None

    def collect(self) -> None:
        """Keep the finished frames that were not taken yet."""
        if self.lane is None or not self.started:
            return
        ready = self.lane.ready()
        if ready > self.taken:
            self.pending.append(self.lane.frames(self.taken, ready))
            self.taken = ready

"""The plan of windows for a generation of any length, in whole frames; no torch.

A model generates at most `window` frames from positions that start at 0. Anything longer is a chain of windows: each
starts `stride` frames after the last one and takes the frames that overlap as its prompt. audiocraft does the same in
floating-point seconds, which crashes or loses a frame for one duration in six (36.4 s, 30.06 s); integers do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """`length` frames from frame `start` of the whole; the first `prompt` of them are known already."""

    start: int
    prompt: int
    length: int

    @property
    def end(self) -> int:
        """The frame behind the last one."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Windows that together give `total` frames (None: without end), the first `prompt` of which are given.

    The windows of audiocraft's extended generation: 60 s at 50 frames a second, a window of 1500 and a stride of 900
    give (0, 0, 1500), (900, 600, 1500), (1800, 600, 1200). A prompt of a whole window or more starts the chain where
    the usual overlap of `window - stride` frames is left of it.

    Raises:
        ValueError: nothing to generate, or a stride that leaves no overlap.
    """

    total: int | None
    window: int
    stride: int
    prompt: int = 0

    def __post_init__(self) -> None:
        total = self.total
        if total is not None and total < 1:
            raise ValueError(f"nothing to generate: the duration is shorter than one frame (total = {total})")
        if total is not None and self.prompt >= total:
            raise ValueError(
                f"the prompt ({self.prompt} frames) is as long as the whole audio to generate ({total} frames): "
                "duration includes the prompt, so ask for a longer duration or cut the prompt"
            )
        if (total is None or total > self.window) and not 0 < self.stride < self.window:
            raise ValueError(
                f"a stride of {self.stride} frames must be above 0 and below the window of {self.window} frames"
            )

    def at(self, index: int) -> Window | None:
        """The window of this number, from 0; None behind the last one."""
        if self.total is not None and self.total <= self.window:
            return Window(0, self.prompt, self.total) if index == 0 else None
        overlap = self.window - self.stride
        first = 0 if self.prompt < self.window else self.prompt - overlap
        start = first + index * self.stride
        known = self.prompt if index == 0 else start + overlap
        if self.total is None:
            return Window(start, known - start, self.window)
        return Window(start, known - start, min(self.window, self.total - start)) if known < self.total else None

    def __iter__(self) -> Iterator[Window]:
        index = 0
        while (window := self.at(index)) is not None:
            yield window
            index += 1


def plan_windows(total: int, window: int, stride: int, prompt: int = 0) -> list[Window]:
    """All windows of a generation that ends: `total`, `window`, `stride` and `prompt` in frames; see `WindowPlan`."""
    return list(WindowPlan(total, window, stride, prompt))

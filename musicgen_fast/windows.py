"""The plan of windows for a generation of any length, in whole frames; no torch.

A model generates at most `window` frames from positions that start at 0. Anything longer is a chain of windows: each
starts `stride` frames after the last one and takes the frames that overlap as its prompt. audiocraft does the same in
floating-point seconds, which crashes or loses a frame for one duration in six (36.4 s, 30.06 s); integers do not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """`length` frames from frame `start` of the whole; the first `prompt` of them are known already."""

    start: int
    prompt: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


def plan_windows(total: int, window: int, stride: int, prompt: int = 0) -> list[Window]:
    """Windows that together give `total` frames, the first `prompt` of which are given.

    The windows of audiocraft's extended generation: 60 s at 50 frames a second, a window of 1500 and a stride of 900
    give (0, 0, 1500), (900, 600, 1500), (1800, 600, 1200). A prompt of a whole window or more starts the chain where
    the usual overlap of `window - stride` frames is left of it.

    Raises:
        ValueError: nothing to generate, or a stride that leaves no overlap.
    """
    if total < 1:
        raise ValueError(f"nothing to generate: the duration is shorter than one frame (total = {total})")
    if prompt >= total:
        raise ValueError(
            f"the prompt ({prompt} frames) is as long as the whole audio to generate ({total} frames): "
            "duration includes the prompt, so ask for a longer duration or cut the prompt"
        )
    if total <= window:
        return [Window(0, prompt, total)]
    if not 0 < stride < window:
        raise ValueError(f"a stride of {stride} frames must be above 0 and below the window of {window} frames")
    start = 0 if prompt < window else prompt - (window - stride)
    windows = []
    known = prompt
    while known < total:
        length = min(window, total - start)
        windows.append(Window(start, known - start, length))
        known = start + length
        start += stride
    return windows

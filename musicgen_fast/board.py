"""Fixed memory for the sequences and sampler parameters of N rows, which lanes take and give back.

A captured graph reads and writes these tensors at every replay, so they stay where they are for as long as the board
lives, whoever uses their rows. Every generation may have a board of its own; a decoder with graphs hands out rows of
one that it keeps. Knows nothing of windows or of caches.
"""

from __future__ import annotations

import torch

from .config import ModelConfig
from .place import Place
from .sampling import SamplingParams


class Board:
    """N rows for windows of up to S columns.

    Attributes:
        place: sequence int64 [N, K, S] and counters; params: of all rows; seeds: int64 [N].
    """

    def __init__(self, config: ModelConfig, rows: int, num_steps: int, device: torch.device | str = "cpu"):
        self.place = Place.allocate(rows, config.num_codebooks, num_steps, device)
        self.params = SamplingParams.build(rows, config.num_codebooks, device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._taken = [False] * rows

    @property
    def rows(self) -> int:
        return len(self._taken)

    @property
    def num_steps(self) -> int:
        return self.place.sequence.shape[2]

    @property
    def empty(self) -> bool:
        return not any(self._taken)

    def fits(self, rows: int) -> bool:
        return self._free(rows) is not None

    def take(self, rows: int) -> range:
        """Rows side by side that nobody has, silent; they `fit`."""
        found = self._free(rows)
        assert found is not None, f"the board has no {rows} free rows side by side"
        part = slice(found.start, found.stop)
        self._taken[part] = [True] * rows
        self.place.column[part] = self.num_steps
        self.place.status[part] = 0
        return found

    def give_back(self, rows: range) -> None:
        self._taken[rows.start : rows.stop] = [False] * len(rows)

    def _free(self, rows: int) -> range | None:
        for first in range(self.rows - rows + 1):
            if not any(self._taken[first : first + rows]):
                return range(first, first + rows)
        return None

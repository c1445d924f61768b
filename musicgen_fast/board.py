"""Fixed memory for the sequences and sampler parameters of N rows, which lanes take and give back.

A captured graph reads and writes these tensors at every replay, so they stay where they are for as long as the board
lives, whoever uses their rows. Every generation may have a board of its own; a decoder with graphs hands out rows of
one that it keeps. Knows nothing of windows or of caches.
"""

from __future__ import annotations

import torch

from .config import ModelConfig
from .sampling import SamplingParams
from .state import Place


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

    def take(self, rows: int) -> range | None:
        """Rows side by side that nobody has, silent; None where there are not so many."""
        for first in range(self.rows - rows + 1):
            if not any(self._taken[first : first + rows]):
                self._taken[first : first + rows] = [True] * rows
                self.place.column[first : first + rows] = self.num_steps
                self.place.status[first : first + rows] = 0
                return range(first, first + rows)
        return None

    def give_back(self, rows: range) -> None:
        self._taken[rows.start : rows.stop] = [False] * len(rows)

"""The CUDA decoder: a step of any mix of requests as one captured graph, near the speed of the memory.

Everything that differs between requests lies in device memory at fixed addresses: caches in pools (`cuda_pool.py`),
which row is whose in a table (`cuda_rows.py`), tokens and sampler parameters on a board. So one graph per bucket of
rows serves them all, the draw is part of it, and the host only replays it: it reads nothing back but a look for failed
draws every 50 columns. `cuda_step.py` has the launches.

What a row is computed from is that row alone, in an order that no batch changes, so a request with a seed gets the same
tokens alone and in any batch; in version 1 (torch's own products, the baseline) only in a bucket of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..board import Board
from ..kernels import heuristics
from ..model import Layer, Transformer, position_table
from ..prefill import known_rows, prefill_rows
from ..state import Place, State
from .cuda_graphs import Capture, Launch, Turns
from .cuda_pool import Pool, PooledCache, PooledTexts
from .cuda_rows import TOP_K, Filters, RowTable, board_of, joint_filters
from .cuda_step import Step, Text

_FIRST_ROWS = 16  # of the step's own memory; it doubles when more come
_USUAL_TEXT = 48  # tokens of a description that is not short
_BOARD_ROWS = 64  # of a board, at least: the requests of many generations share it, and its graphs


class CudaDecoder:
    """Runs a `Transformer` step by step. Holds no state of a request but slots of its pools."""

    def __init__(
        self,
        transformer: Transformer,
        ops: Any,
        *,
        capture: Capture,
        kv: str | None = None,
        pdl: bool = False,
        fold: bool = False,
    ):
        """
        Args:
            ops: the functions of a step, from `cuda_ops.py`. capture: from `cuda_graphs.py`.
            kv: None, keys and values in the dtype of the activations, or 'int8': half the memory.
            pdl: let kernels overlap the end of the one before (sm_90 and newer).
            fold: while few short texts run, read them with the projections around them folded in, a tenth less per
                step; then a request's tokens alone are those in a batch only within rounding.
        """
        if kv not in (None, "int8"):
            raise ValueError(f"unknown format {kv!r} of keys and values: expected None or 'int8'")
        self.model, self.config = transformer, transformer.config
        self.dtype, self._device = transformer.dtype, transformer.device
        self._ops, self._capture, self._pdl = ops, capture, pdl
        self._cache = Pool(self.config, torch.int8 if kv else self.dtype, self._device, 128, self._forget_graphs)
        self._texts = Pool(self.config, self.dtype, self._device, 16, self._forget_graphs)
        wide = {"width": self.config.dim}
        self._folded = Pool(self.config, self.dtype, self._device, 16, self._forget_graphs, **wide) if fold else None
        self._boards: list[Board] = []
        self._graphs: dict[tuple, Launch] = {}
        self._memory: Step | None = None
        self._table = RowTable(_FIRST_ROWS, self._device)
        self._positions = position_table(2048, self.config.dim, self._device)
        self._turn = Turns(self._device)  # a pass uses the step's memory

    # -- set-up -------------------------------------------------------------------------------------------------------

    def allocate(self, rows: int, capacity: int) -> PooledCache:
        """Slots of the pool. torch.OutOfMemoryError where there is no room."""
        with self._turn:
            return PooledCache(self._cache, rows, capacity)

    def board_for(self, rows: int, num_steps: int) -> Board:
        """A board with such rows free: one that is there, so that its graphs serve, or a new one."""
        with self._turn:
            for board in self._boards:
                if board.num_steps >= num_steps and board.fits(rows):
                    return board
            for board in [board for board in self._boards if board.empty]:
                self._boards.remove(board)
                self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] != id(board)}
            self._boards.append(Board(self.config, max(rows, _BOARD_ROWS), num_steps, self._device))
            return self._boards[-1]

    @torch.no_grad()
    def condition(self, state: State) -> None:
        """Project the text's keys and values of every layer, for the rows that attend to any."""
        cross = [b.cross for b in state.conditions.branches if b.cross is not None]
        assert all(b.cross is not None for b in state.conditions.branches[: len(cross)]), "null branches come last"
        rows = [states for branch in cross for states in branch]
        state.texts = None
        if not rows:
            return
        with self._turn:
            self._table.forget()
            folded = self._folded if max(len(r) for r in rows) <= self.config.head_dim else None
            state.texts = PooledTexts(self._texts, [len(r) for r in rows], folded)
            for row, text in enumerate(rows):  # one by one: BLAS rounds by the batch
                self._project(state.texts, row, text)

    def _project(self, texts: PooledTexts, row: int, text: Tensor) -> None:
        layers: list[Layer] = list(self.model.layers)  # type: ignore[arg-type]
        for index, layer in enumerate(layers):
            both = layer.cross_kv(text[None].to(self.dtype)).unflatten(-1, (2, self.config.num_heads, -1))
            keys, values = both.permute(2, 0, 3, 1, 4)
            self._texts.write(index, [texts.slots[row]], keys, values)
            if texts.folded is not None:
                texts.folded.pool.write(index, [texts.folded.slots[row]], *layer.folded_text(keys, values))

    def reserve(self, rows: int, capacity: int) -> None:
        """Take memory for so many more rows of `capacity` positions at once; otherwise it grows as rows come, and
        graphs are captured again. torch.OutOfMemoryError where there is no room."""
        with self._turn:
            self._cache.reserve(rows, capacity)
            self._texts.reserve(rows, _USUAL_TEXT)
            self._sized(heuristics.bucket(rows))

    def prepare(self, rows: int, capacity: int, mix: int = 2) -> None:
        """`reserve`, and capture all buckets up to `rows`, the large ones first.

        Otherwise a bucket is captured when it is first used. For requests of `mix` branches without top p and min p.
        """
        with self._turn:
            self.reserve(rows, capacity)
            board = self._boards[-1] if self._boards else self.board_for(1, capacity + 1)
            for bucket in reversed(heuristics.buckets(rows)):
                self._graph(board, bucket, "plain" if self.config.conditioning == "cross" else "none", mix, TOP_K)

    # -- the two functions --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, state: State, draw: bool = True) -> None:
        """Consume the prefix and every known column, then draw the first unknown one.

        Without `draw` the last known column is left to the next `step`, which draws: how a saved state is filled. With
        it, that step follows at once: a generation from nothing but a text is steps alone.
        """
        with self._turn:
            state.lengths = [0] * len(state.lengths)
            self._fill(state)
            if draw:
                self._step_lanes([state])
                state.check()

    @torch.no_grad()
    def step(self, *states: State) -> None:
        """Consume the column that each lane wrote last and draw its next one, in the order of the lanes.

        A failed draw raises after every lane has advanced.
        """
        with self._turn:
            self._step_lanes(states)
        for state in states:
            state.check()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _step_lanes(self, states: Sequence[State]) -> None:
        filters = joint_filters(states)
        logits = self._forward(states, filters)
        for state in states:
            if filters is None:
                state.draw(logits[: len(state.lengths)])
            else:
                state.drawn()
            logits = logits[len(state.lengths) :]

    def _forward(self, states: Sequence[State], filters: Filters | None) -> Tensor:
        """The step in one launch, with the draw if `filters` are given; logits [R, K, V] of the rows of all lanes."""
        rows = sum(len(state.lengths) for state in states)
        bucket = heuristics.bucket(rows)
        mix = max(2, *(state.conditions.mix for state in states))
        text = self._text(states)
        longest = max(max(state.lengths) for state in states)
        assert longest < self._cache.capacity, f"{longest + 1} positions do not fit a cache of {self._cache.capacity}"
        board = board_of(states[0])
        if board is None or any(board_of(state) is not board for state in states):
            return torch.cat([self._forward_alone(state) for state in states])
        launch = self._graph(board, bucket, text, mix, filters)
        self._table.show(states, mix, text == "folded")
        launch()
        return self._counted(states, rows)

    def _forward_alone(self, state: State) -> Tensor:
        """The same without a graph or a draw, for a state that is on no board, or not on that of the others."""
        rows = len(state.lengths)
        bucket = heuristics.bucket(rows)
        board = board_of(state)
        place = state.place if board is None else board.place
        assert place is not None
        step = self._sized(bucket)
        self._table.show([state], 1)
        self._launches(step, bucket, place, "none" if state.texts is None else "plain", 1, None, None)()
        self._table.forget()
        return self._counted([state], rows).clone()

    def _counted(self, states: Sequence[State], rows: int) -> Tensor:
        self._table.advanced()
        for state in states:
            state.lengths = [n + 1 for n in state.lengths]
        assert self._memory is not None
        return self._memory.logits(rows)

    def _text(self, states: Sequence[State]) -> Text:
        """Folded where all of it is, and while that reads less than the projections, which rows share."""
        texts = [state.texts for state in states if state.texts is not None]
        if not texts:
            return "none"
        positions = sum(sum(t.lengths) for t in texts)
        return "folded" if all(t.folded for t in texts) and positions < self.config.head_dim else "plain"

    def _graph(self, board: Board, bucket: int, text: Text, mix: int, filters: Filters | None) -> Launch:
        """The captured step of a bucket, which is captured now if it was not yet."""
        step = self._sized(bucket)
        key = (id(board), bucket, text, mix, filters)
        if key not in self._graphs:
            body = self._launches(step, bucket, board.place, text, mix, filters, board)
            self._table.silence()
            body()  # compiles kernels and sets up libraries, which a capture must not; no row takes part
            self._graphs[key] = self._capture(body)
        return self._graphs[key]

    def _launches(
        self, step: Step, bucket: int, place: Place, text: Text, mix: int, filters: Filters | None,
        board: Board | None,
    ) -> Launch:  # fmt: skip
        table = self._table.bucket(bucket, mix)

        def launch() -> None:
            step.forward(table, place.sequence, text)
            if filters is not None and board is not None:
                step.draw(table, board, filters)
            step.advance(table, place, filters is not None)

        return launch

    def _sized(self, rows: int) -> Step:
        """The step's memory, for so many rows at least."""
        if rows > self._table.size:
            self._table = RowTable(heuristics.bucket(max(rows, 2 * self._table.size)), self._device)
            self._forget_graphs()
        if self._memory is None:
            pools = self._cache, self._texts, self._folded
            self._memory = Step(self.model, self._ops, *pools, self._table.size, self._pdl)
        return self._memory

    def _forget_graphs(self) -> None:
        """What was captured reads memory that is gone."""
        self._graphs.clear()
        self._memory = None

    # -- prefixes and prompts -----------------------------------------------------------------------------------------

    def _fill(self, state: State) -> None:
        """Consume the prefix and the known columns but the last one, request by request: what a request is computed
        from must not depend on the batch, and BLAS rounds by it."""
        conditions, rows = state.conditions, known_rows(self.model, state, state.column - 1)
        state.lengths = [len(row) for row in rows]
        longest = max(state.lengths)
        assert longest < state.capacity, f"{longest} positions do not fit a cache of {state.capacity}"
        if longest == 0:
            return
        if longest > len(self._positions):
            self._positions = position_table(longest, self.config.dim, self._device)
        for request in range(conditions.batch):
            own = list(range(request, len(rows), conditions.batch))
            self._fill_rows(state, own, [rows[r] for r in own])

    def _fill_rows(self, state: State, own: list[int], rows: list[Tensor]) -> None:
        slots = [state.kv.slots[r] for r in own]

        def append(index: int, keys: Tensor, values: Tensor) -> None:
            self._cache.write(index, slots, keys, values)

        texts, mask = [], None
        if state.texts is not None:
            own = [r for r in own if r < len(state.texts.lengths)]
            lengths = torch.tensor([state.texts.lengths[r] for r in own], device=self._device)
            longest = int(max(state.texts.lengths[r] for r in own))
            index = self._texts.index([state.texts.slots[r] for r in own])
            texts = [layer[:, index, :, :longest] for layer in self._texts.tensor]
            mask = (torch.arange(longest, device=self._device) < lengths[:, None])[:, None, None, :]
        prefill_rows(self.model, rows, self._positions, append, texts, mask)

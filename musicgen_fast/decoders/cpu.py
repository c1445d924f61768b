"""The CPU decoder: a whole step of all rows in one call of C++, at the speed of the memory.

Weights in four formats (`packing.py`), its own threads, keys and values in int8, bfloat16 or float32. What it computes
for a row depends on that row alone: a request with seeds gets the same tokens alone and in any batch, with any number
of threads. Several Python threads may use one decoder: their passes run one after the other.

A pass is rows of activations that go through all layers together: one position of each row of some lanes (a step), or
several positions of the rows of one lane (a part of a prefill).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import native
from ..joint import Draws
from ..model import position_table
from ..packing import PackedWeights
from ..state import State

_KV_FORMATS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "int4": "int8"}
_TEXT_FORMATS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16", "int4": "bfloat16"}
_ROWS_PER_PASS = 64  # of a prefill: the kernels read a matrix once for so many rows


@dataclass
class Texts:
    """Keys and values of the texts of a lane's first rows; the others attend to nothing."""

    cache: Any
    lengths: list[int]


class CpuDecoder:
    """Runs packed weights step by step. Holds no state of a request: all of that is in `State`."""

    def __init__(self, packed: PackedWeights, *, threads: int | None = None, kv: str | None = None, isa: str = ""):
        """
        Args:
            threads: at most so many; None: as many as torch uses, and no more than this process may have (affinity and
                cgroup quota). Fewer run while others keep a core busy.
            kv: 'float32', 'bfloat16' or 'int8' keys and values; None: as the precision (int8 for int4).
            isa: of the kernels, for tests; '' is the best that this processor has. int8 and int4 give the same bits on
                all of them, float32 and bfloat16 on all but the baseline.

        Raises:
            RuntimeError: the C++ extension is missing. ValueError: an unknown format.
        """
        c = self.config = packed.config
        self.precision = packed.precision
        self.kv = _KV_FORMATS[packed.precision] if kv is None else kv
        if self.kv not in _KV_FORMATS.values():
            raise ValueError(f"unknown format {kv!r} of keys and values: expected float32, bfloat16 or int8")
        extension = native.extension()
        allowed = extension.available_threads()
        self._native = extension.CpuDecoder(
            {name: tensor.numpy() for name, tensor in packed.tensors.items()}, packed.formats,
            dim=c.dim, heads=c.num_heads, layers=c.num_layers, ffn=c.ffn_dim, codebooks=c.num_codebooks,
            vocab=c.vocab_size, cross=c.conditioning == "cross",
            threads=min(torch.get_num_threads(), allowed) if threads is None else threads, isa=isa,
        )  # fmt: skip

    @property
    def threads(self) -> int:
        """Threads that run a step unless a core is taken."""
        return self._native.pool.size

    # -- set-up -------------------------------------------------------------------------------------------------------

    def allocate(self, rows: int, capacity: int) -> Any:
        """A cache for keys and values. MemoryError, with the size, where there is no room."""
        return self._cache(self.kv, rows, capacity)

    def condition(self, state: State) -> None:
        """Project the text's keys and values of every layer, for the rows that attend to any."""
        cross = [b.cross for b in state.conditions.branches if b.cross is not None]
        assert all(b.cross is not None for b in state.conditions.branches[: len(cross)]), "null branches come last"
        state.texts = self._texts([states for branch in cross for states in branch])

    # -- the two functions --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, state: State, draw: bool = True) -> None:
        """Consume the prefix and every known column, then draw the first unknown one.

        Without `draw` the last known column is left to the next `step`, which draws: how a saved state is filled.
        """
        branches = len(state.conditions.branches)
        tokens = state.fed_tokens(0, None if draw else state.column - 1).repeat(branches, 1, 1)
        prefixes = [p for b in state.conditions.branches for p in (b.prefix or [])]
        columns = tokens.shape[2]
        logits = self._consume(state.kv, state.texts, tokens, prefixes, columns - 1 if draw else columns)
        state.lengths = [n + tokens.shape[2] for n in state.conditions.prefix_lengths()]
        if draw:
            state.write_column(logits[:, 0])

    @torch.no_grad()
    def step(self, *states: State) -> None:
        """Consume the column that each lane wrote last and draw its next one, in the order of the lanes.

        A failed draw raises after every lane has advanced.
        """
        draws = Draws(states)
        draws.draw(self._forward(states, draws.wanted))

    def _forward(self, states: Sequence[State], wanted: list[int]) -> Tensor:
        """The step without its draw: logits [wanted, K, V] of these rows of all lanes."""
        part = _Pass([], wanted=wanted)
        for state in states:
            cache = len(part.caches)
            part.caches += [state.kv] if state.texts is None else [state.kv, state.texts.cache]
            fed = state.sequence.numpy()[:, :, state.column - 1]
            part.tokens += [fed] * len(state.conditions.branches)
            for row, length in enumerate(state.lengths):
                part.segments.append((cache, row, length, 1, *_text_of(state.texts, row, cache + 1), 0))
            state.lengths = [n + 1 for n in state.lengths]
        return self._run(part)

    # -- teacher forcing ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, tokens: Tensor, prefix: Tensor | None = None, cross: Tensor | None = None) -> Tensor:
        """Logits [R, S, K, V] of whole sequences at once: `Transformer.forward`, through this decoder's own arithmetic.

        Args: as there. tokens int64 [R, K, S], prefix [R, P, d], cross [R, N, d].
        """
        rows, _, steps = tokens.shape
        texts = None if cross is None else self._texts(list(cross))
        cache = self.allocate(rows, steps + (0 if prefix is None else prefix.shape[1]))
        return self._consume(cache, texts, tokens, [] if prefix is None else list(prefix), 0)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _cache(self, form: str, rows: int, capacity: int) -> Any:
        c = self.config
        try:
            return native.extension().CpuCache(form, c.num_layers, rows, c.num_heads, c.head_dim, capacity)
        except MemoryError:
            size = 2 * c.num_layers * c.dim * rows * capacity * {"float32": 4, "bfloat16": 2}.get(form, 1) / 2**20
            raise MemoryError(
                f"no room for a {form} KV cache of {rows} rows x {capacity} positions, about {size:.0f} MiB: "
                "render fewer requests at once or shorter windows, or take a smaller precision"
            ) from None

    def _texts(self, texts: list[Tensor]) -> Texts | None:
        if not texts:
            return None
        lengths = [len(text) for text in texts]
        cache = self._cache(_TEXT_FORMATS[self.precision], len(texts), max(lengths))
        for row, text in enumerate(texts):
            self._native.project(text.float().contiguous().numpy(), cache, row)
        return Texts(cache, lengths)

    def _consume(self, cache: Any, texts: Texts | None, tokens: Tensor, prefixes: list[Tensor], wanted: int) -> Tensor:
        """Tokens [R, K, n] behind the rows' prefixes into an empty cache; logits [R, n - wanted, K, V] of the columns
        from `wanted` on."""
        rows, codebooks, columns = tokens.shape
        lengths = [len(p) for p in prefixes] or [0] * rows
        total = max(lengths) + columns
        assert total <= cache.capacity, f"{total} positions do not fit a cache of {cache.capacity}"
        # numpy's memory: where there is none it says MemoryError, torch RuntimeError
        result = torch.from_numpy(np.empty((rows, columns - wanted, codebooks, self.config.vocab_size), np.float32))
        each = max(1, _ROWS_PER_PASS // rows)
        for first in range(0, total, each):
            part = _Pass([cache] if texts is None else [cache, texts.cache])
            targets: list[tuple[int, int]] = []
            for row, prefix in enumerate(lengths):
                last = min(first + each, prefix + columns)
                if last <= first:
                    continue
                fed = range(max(first - prefix, 0), max(last - prefix, 0))
                states = prefixes[row][first : min(last, prefix)] if first < prefix else None
                at = part.add(0, row, first, tokens[row, :, fed.start : fed.stop].T, _text_of(texts, row, 1), states)
                part.wanted += [at + column - fed.start for column in fed if column >= wanted]
                targets += [(row, column - wanted) for column in fed if column >= wanted]
            logits = self._run(part, alike=False)
            for target, own in zip(targets, logits, strict=True):
                result[target] = own
        return result

    def _run(self, part: _Pass, alike: bool = True) -> Tensor:
        """Logits [wanted, K, V] of a pass."""
        c = self.config
        segments = np.array(part.segments, dtype=np.int32)
        self._require_positions(int((segments[:, 2] + segments[:, 3]).max()))
        logits = np.empty((len(part.wanted), c.num_codebooks * c.vocab_size), np.float32)
        self._native.run(
            part.caches,
            segments,
            np.ascontiguousarray(np.concatenate(part.tokens)),  # of columns it may make columns
            torch.cat(part.states).numpy() if part.states else np.empty((0, c.dim), dtype=np.float32),
            np.array(part.wanted, dtype=np.int32),
            logits,
            alike,
        )
        return torch.from_numpy(logits).unflatten(1, (c.num_codebooks, -1))

    def _require_positions(self, count: int) -> None:
        if self._native.positions < count:  # two threads may come here at once: the longer table stays
            self._native.set_positions(position_table(max(count, 2048), self.config.dim).contiguous().numpy())


@dataclass
class _Pass:
    """What `run` of csrc/bind_decoder.cpp takes: caches, and segments of rows with their inputs in order."""

    caches: list[Any]
    segments: list[tuple[int, ...]] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)  # each [n, K]
    states: list[Tensor] = field(default_factory=list)  # each [n, d]
    wanted: list[int] = field(default_factory=list)  # rows whose logits are computed
    rows: int = 0

    def add(
        self, cache: int, row: int, first: int, tokens: Tensor, text: tuple[int, int, int], states: Tensor | None = None
    ) -> int:
        """Positions from `first` on of a row of a cache: states [p, d], then tokens [n, K]. Returns the row of the
        pass that holds the first token."""
        embedded = 0 if states is None else len(states)
        if states is not None:
            self.states.append(states.float())
        self.tokens.append(tokens.numpy())
        self.segments.append((cache, row, first, embedded + len(tokens), *text, embedded))
        at = self.rows + embedded
        self.rows += embedded + len(tokens)
        return at


def _text_of(texts: Texts | None, row: int, cache: int) -> tuple[int, int, int]:
    """A row's text: cache, row and length; (-1, 0, 0) where it attends to none."""
    if texts is None or row >= len(texts.lengths):
        return -1, 0, 0
    return cache, row, texts.lengths[row]

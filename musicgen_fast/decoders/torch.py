"""The torch decoder: static KV cache, one prefill of any length, one step per column; any device, any precision.

What makes it faster than the eager references without a kernel of its own: keys and values are written into a cache
allocated once (they concatenate, O(T^2)); q, k, v are one product and so are the K heads; the text's keys and values
are computed once per generation; null rows skip cross-attention, whose output for them is exactly zero; positions are
a table; the text's keys and values are folded into the projections around them where that is less to read; on a CPU
the weights lie in one huge-page arena (see `arena.py`).

Rows may differ in length (prefixes of different texts): a row's positions are its own, shorter rows are masked. Several
lanes (`State`s) go through the weights as one batch; each attends to its own cache, at its own length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import EPS, Layer, Transformer, embed_tokens, position_table
from ..prefill import known_rows, prefill_rows
from ..state import State
from .torch_cache import Place, RowPlaces, SamePlace, TensorCache, Texts


class TorchDecoder:
    """Runs a `Transformer` step by step. Holds no state of a request: all of that is in `State`."""

    def __init__(self, transformer: Transformer):
        self.model = transformer
        self.config = transformer.config
        self._positions = torch.empty(0, self.config.dim)

    # -- set-up -------------------------------------------------------------------------------------------------------

    def allocate(self, rows: int, capacity: int) -> TensorCache:
        """A KV cache in the model's dtype.

        Zeros, not raw memory: a masked position still takes part as 0 x value, and 0 x NaN is NaN.
        """
        c = self.config
        shape = (c.num_layers, 2, rows, c.num_heads, capacity, c.head_dim)
        return TensorCache(torch.zeros(shape, dtype=self.model.dtype, device=self.model.device))

    def condition(self, state: State) -> None:
        """Project the text's keys and values of every layer, for the rows that attend to any."""
        state.texts = None
        cross = [b.cross for b in state.conditions.branches if b.cross is not None]
        assert all(b.cross is not None for b in state.conditions.branches[: len(cross)]), "null branches come last"
        if not cross:
            return
        rows = [states for branch in cross for states in branch]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.model.dtype)
        lengths = torch.tensor([len(r) for r in rows], device=padded.device)
        texts = state.texts = Texts()
        if int(lengths.min()) < padded.shape[1]:
            inside = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
            texts.mask = inside[:, None, None, :]
        for layer in self._layers():
            kv = F.linear(padded, layer.cross_kv.weight)
            kv = kv.unflatten(-1, (2, self.config.num_heads, -1))  # [Rc, N, 2, H, dh]
            texts.kv.append(kv.permute(2, 0, 3, 1, 4).contiguous())
        # Per row 2 H N d numbers a step, instead of 2 d^2 for all rows: less to read while Rc * N < d / H (64 in the
        # released models). One request of 16 tokens, small, fp32: 151 MB of 1443 MB a step less.
        if len(rows) * padded.shape[1] < self.config.head_dim:
            for layer, kv in zip(self._layers(), texts.kv, strict=True):
                to_scores, to_output = layer.folded_text(*kv)
                texts.absorbed.append((to_scores.flatten(1, 2).contiguous(), to_output.flatten(1, 2).contiguous()))

    # -- the two functions --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, state: State, draw: bool = True) -> None:
        """Consume the prefix and every known column, then draw the first unknown one.

        Without `draw` the last known column is left to the next `step`, which draws: how a saved state is filled.
        """
        rows = known_rows(self.model, state, state.column if draw else state.column - 1)
        lengths = [len(r) for r in rows]
        self._require(state, max(lengths))

        def append(index: int, keys: Tensor, values: Tensor) -> None:
            state.kv.tensor[index, 0, :, :, : keys.shape[2]] = keys
            state.kv.tensor[index, 1, :, :, : keys.shape[2]] = values

        texts, mask = ([], None) if state.texts is None else (state.texts.kv, state.texts.mask)
        x = prefill_rows(self.model, rows, self._position_rows(max(lengths), self.model.device), append, texts, mask)
        state.lengths = lengths
        if draw:
            last = x[torch.arange(len(rows), device=x.device), torch.tensor(lengths, device=x.device) - 1]
            state.write_column(self.model.logits(last))

    @torch.no_grad()
    def step(self, *states: State) -> None:
        """Consume the column that each lane wrote last and draw its next one, in the order of the lanes.

        A failed draw raises after every lane has advanced.
        """
        lanes, logits = self._forward(states)
        for lane in lanes:
            lane.state.draw(logits if len(lanes) == 1 else logits[lane.rows])
        for state in states:
            state.check()

    def _forward(self, states: Sequence[State]) -> tuple[list[_Lane], Tensor]:
        """The step without its draw: logits [R, K, V] of the rows of all lanes."""
        lanes, inputs, start = [], [], 0
        for state in states:
            x, place = self._step_input(state)
            lanes.append(_Lane(state, place, slice(start, start + len(x))))
            inputs.append(x)
            start += len(x)
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        groups = _text_groups(lanes)
        for index, layer in enumerate(self._layers()):
            x = self._step_layer(lanes, groups, index, layer, x)
        for state in states:
            state.lengths = [n + 1 for n in state.lengths]
        return lanes, self.model.logits(x)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _layers(self) -> list[Layer]:
        return list(self.model.layers)  # type: ignore[arg-type]

    def _step_input(self, state: State) -> tuple[Tensor, Place]:
        """The last column's embeddings with their positions, [R, d], and where their keys and values go."""
        lengths = state.lengths
        self._require(state, max(lengths) + 1)
        x = embed_tokens(self.model.emb.weight, state.fed_tokens(state.column - 1))[:, 0]
        x = x.repeat(len(state.conditions.branches), 1)
        if min(lengths) == max(lengths):
            return x + self._position_rows(lengths[0] + 1, x.device)[lengths[0]], SamePlace(lengths[0])
        at = torch.tensor(lengths, device=x.device)
        return x + self._position_rows(max(lengths) + 1, x.device)[at], RowPlaces(at, max(lengths) + 1)

    def _position_rows(self, count: int, device: torch.device) -> Tensor:
        if len(self._positions) < count or self._positions.device != device:
            self._positions = position_table(max(count, 2048), self.config.dim, device)
        return self._positions[:count]

    @staticmethod
    def _require(state: State, positions: int) -> None:
        assert positions <= state.capacity, f"{positions} positions do not fit a cache of {state.capacity}"

    def _step_layer(self, lanes: list[_Lane], groups: list[list[_Lane]], index: int, layer: Layer, x: Tensor) -> Tensor:
        """x [R, d] -> [R, d]. Written with as few dispatches as torch allows: each costs 2 to 5 us on a CPU."""
        dtype, d = self.model.dtype, (self.config.dim,)
        h = F.layer_norm(x, d, layer.norm1.weight, layer.norm1.bias, EPS).to(dtype)
        qkv = F.linear(h, layer.qkv.weight).view(len(x), 3, self.config.num_heads, -1)
        if len(lanes) == 1:
            a = lanes[0].attend(index, qkv)
        else:
            a = torch.cat([lane.attend(index, qkv[lane.rows]) for lane in lanes])
        x = x + F.linear(a, layer.attn_out.weight)
        for group in groups:
            self._add_text(group, index, layer, x)
        h = F.layer_norm(x, d, layer.norm2.weight, layer.norm2.bias, EPS).to(dtype)
        return x + F.linear(F.gelu(F.linear(h, layer.ffn_in.weight)), layer.ffn_out.weight)

    def _add_text(self, lanes: list[_Lane], index: int, layer: Layer, x: Tensor) -> None:
        """Cross-attention of lanes that share the projections around it, added to x [R, d] in place."""
        parts = [x[lane.text_rows] for lane in lanes]
        h, norm = parts[0] if len(parts) == 1 else torch.cat(parts), layer.norm_cross
        h = F.layer_norm(h, (self.config.dim,), norm.weight, norm.bias, EPS).to(self.model.dtype)
        if lanes[0].state.texts.absorbed:
            parts[0] += self._attend_absorbed(lanes[0].state, index, h)
            return
        q = F.linear(h, layer.cross_q.weight).view(len(h), self.config.num_heads, 1, -1)
        if len(parts) == 1:
            parts[0] += F.linear(lanes[0].attend_text(index, q), layer.cross_out.weight)
            return
        sizes = [len(part) for part in parts]
        a = torch.cat([lane.attend_text(index, rows) for lane, rows in zip(lanes, q.split(sizes), strict=True)])
        for part, out in zip(parts, F.linear(a, layer.cross_out.weight).split(sizes), strict=True):
            part += out

    @staticmethod
    def _attend_absorbed(state: State, index: int, h: Tensor) -> Tensor:
        """Cross-attention with the folded projections: normed h [Rc, d] -> [Rc, d]."""
        rows, texts = len(h), state.texts
        to_scores, to_output = texts.absorbed[index]
        scores = torch.bmm(to_scores, h[:, :, None]).view(rows, state.config.num_heads, -1)
        if texts.mask is not None:
            scores = scores.masked_fill(~texts.mask[:, 0], -torch.inf)
        weights = scores.softmax(-1).view(rows, 1, -1)
        return torch.bmm(weights, to_output)[:, 0]


def _text_groups(lanes: list[_Lane]) -> list[list[_Lane]]:
    """Lanes whose texts go through the projections together: one batch reads them once; folded ones are their own."""
    texts = [lane for lane in lanes if lane.state.texts is not None]
    shared = [lane for lane in texts if not lane.state.texts.absorbed]
    return [[lane] for lane in texts if lane.state.texts.absorbed] + ([shared] if shared else [])


@dataclass(slots=True)
class _Lane:
    """A state within the batch of a step: which rows of x [R, d] are its own."""

    state: State
    place: Place
    rows: slice

    @property
    def text_rows(self) -> slice:
        """The rows that attend to a text: those of the first branches."""
        return slice(self.rows.start, self.rows.start + self.state.texts.kv[0].shape[1])

    def attend(self, index: int, qkv: Tensor) -> Tensor:
        """Self-attention of the lane's rows: qkv [R, 3, H, d/H] -> [R, d]."""
        cache = self.state.kv.tensor[index]
        self.place.write(cache, qkv[:, 1:].transpose(0, 1))
        keys, values, mask = self.place.read(cache)
        a = F.scaled_dot_product_attention(qkv[:, 0, :, None], keys, values, attn_mask=mask)
        return a.view(len(qkv), -1)

    def attend_text(self, index: int, q: Tensor) -> Tensor:
        """Cross-attention of queries [Rc, H, 1, d/H] -> [Rc, d], not projected yet."""
        keys, values = self.state.texts.kv[index].unbind()
        a = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.state.texts.mask)
        return a.view(len(q), -1)

"""The decoder of SEANet over pieces of a stream: together they are the decode of the whole, and no row is made twice.

Each convolution keeps the input rows that outputs to come still read, and pads only where the stream really begins and
ends. So a piece costs what its rows cost, whatever its length, and what is kept does not grow. Time-major, [B, T, C].
Knows nothing of codebooks, nor of where a state is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, cat

from .layers import Conv, ResBlock, Upsample, pad_rows
from .stacks import Decoder, spans

__all__ = ["DecoderStream"]


class _Layer(ABC):
    """A layer in a stream. `held`: rows [B, n, C] that later outputs need; `begun`: its left edge is behind it.

    `delay` is how many rows at most the output stays behind what the input could make, at the rate of the output.
    Tensors in `held` are copies, never views of a large buffer, and nothing writes into them.
    """

    held: Tensor
    begun: bool
    delay: int

    @abstractmethod
    def push(self, x: Tensor, last: bool) -> Tensor:
        """Outputs that rows x [B, t, C], t >= 0, complete; all that are left if x is the last (of one row or more)."""

    def parts(self) -> Iterable[_Layer]:
        """Everything with something held: the layer itself, and layers within it."""
        return (self,)


def _after(held: Tensor, x: Tensor, activate: bool, zeros: int = 0) -> Tensor:
    """held, x through ELU if `activate`, and rows of zeros, in one new contiguous buffer."""
    begin, end = held.shape[1], held.shape[1] + x.shape[1]
    rows = x.new_empty(x.shape[0], end + zeros, x.shape[2])
    rows[:, :begin] = held
    if activate:
        torch.ops.aten.elu.out(x, out=rows[:, begin:end])
    else:
        rows[:, begin:end] = x
    rows[:, end:] = 0
    return rows


class _ConvStream(_Layer):
    """`Conv` without a stride. Reflected rows come after the edge: at the start it waits for left + 1 rows."""

    def __init__(self, conv: Conv, batch: int, activate: bool) -> None:
        assert conv.stride == 1
        self.conv, self.activate = conv, activate
        self.reflects = conv.pad_mode == "reflect" and conv.left > 0
        self.begun = not self.reflects
        self.held = conv.weight.new_zeros(batch, conv.left if self.begun else 0, conv.weight.shape[2])
        self.delay = conv.left if self.reflects else conv.right

    def push(self, x: Tensor, last: bool) -> Tensor:
        left, right = self.conv.left, self.conv.right
        rows = _after(self.held, x, self.activate, zeros=right if last and not self.reflects else 0)
        length = rows.shape[1]
        if not self.begun and last and length <= left:  # shorter than its padding: a case of its own, and few rows
            return self.conv.valid(pad_rows(rows, left, right, self.conv.pad_mode, activate=False))
        if last and self.reflects:  # once begun, left + right rows are held at least: the right + 1 that this needs
            rows = cat([rows, rows[:, length - 1 - right : length - 1].flip(1)], dim=1)
        if not self.begun and length > left:
            rows, self.begun = cat([rows[:, 1 : 1 + left].flip(1), rows], dim=1), True
        count = rows.shape[1] - left - right if self.begun else 0
        if count <= 0:
            self.held = rows
            return rows.new_empty(rows.shape[0], 0, self.conv.weight.shape[0])
        self.held = rows[:, count:].clone()
        return self.conv.valid(rows)


class _UpsampleStream(_Layer):
    """`Upsample`, which sums two inputs: holds one row, at first the zeros before the start."""

    def __init__(self, up: Upsample, batch: int) -> None:
        self.up, self.begun, self.delay = up, False, up.cut
        self.held = up.weight.new_zeros(batch, 1, up.weight.shape[2])

    def push(self, x: Tensor, last: bool) -> Tensor:
        if x.shape[1] == 0 and not last:
            return x.new_empty(x.shape[0], 0, self.up.bias.shape[0])
        rows = _after(self.held, x, activate=True, zeros=int(last))
        self.held = rows[:, -1:].clone()
        out = self.up.valid(rows)
        low = 0 if self.begun else self.up.cut
        high = out.shape[1] - (self.up.stride - self.up.cut if last else 0)
        self.begun = True
        return out[:, low:high]


class _BlockStream(_Layer):
    """`ResBlock`: the shortcut waits, in `held`, for the convolution beside it."""

    def __init__(self, block: ResBlock, batch: int) -> None:
        self.block, self.begun = block, True
        self.wide = _ConvStream(block.wide, batch, activate=True)
        self.delay = self.wide.delay
        self.held = block.wide.weight.new_zeros(batch, 0, block.wide.weight.shape[2])

    def push(self, x: Tensor, last: bool) -> Tensor:
        hidden, bias = self.wide.push(x, last), self.block.point.bias
        count = hidden.shape[1]
        early = min(count, self.held.shape[1])
        out = x.new_empty(x.shape[0], count, x.shape[2])
        # adding the bias is what copies: held and x are not joined first, which would move the widest rows once more
        torch.add(self.held[:, :early], bias, out=out[:, :early])
        torch.add(x[:, : count - early], bias, out=out[:, early:])
        self.held = cat([self.held[:, early:], x[:, count - early :]], dim=1)
        return self.block.add_point(out, hidden) if count else out

    def parts(self) -> Iterable[_Layer]:
        return (self, self.wide)


def _stage_layers(stage: Any, batch: int) -> list[_Layer]:
    """Of a `stacks._Stage` of the decoder; Any, for modules in a ModuleList have no type of their own."""
    return [_UpsampleStream(stage.up, batch), *(_BlockStream(block, batch) for block in stage.blocks)]


class DecoderStream:
    """What `Decoder` makes of latents, for latents that come in pieces: any number of `push`, the last with `last`.

    It reads the decoder's weights in place. Not thread-safe; a stream is one batch of `batch` rows.
    """

    def __init__(self, decoder: Decoder, batch: int) -> None:
        self.first = _ConvStream(decoder.first, batch, activate=False)
        self.lstm = lstm = decoder.lstm
        self.memory: tuple[Tensor, Tensor] | None = None
        if lstm is not None:
            zeros = decoder.first.bias.new_zeros(lstm.num_layers, batch, lstm.hidden_size)
            self.memory = (zeros, zeros)
        self.stages = [_stage_layers(stage, batch) for stage in decoder.stages]
        self.last = _ConvStream(decoder.last, batch, activate=True)
        self.ratios = decoder.ratios

    @property
    def look_ahead(self) -> int:
        """Samples by which the output stays behind the input, at most."""
        samples = self.first.delay
        for stride, stage in zip(self.ratios, self.stages, strict=True):
            samples = samples * stride + sum(layer.delay for layer in stage)
        return samples + self.last.delay

    def push(self, latents: Tensor, last: bool = False) -> Tensor:
        """Latents [B, t, dimension] -> the samples [B, n, channels] that they complete; if `last`, all that are left.

        t >= 0, but 1 or more in all before the stream ends.
        """
        x = self.first.push(latents, last)
        if self.lstm is not None and x.shape[1]:
            x, self.memory = self.lstm(x, self.memory)
        return self._upsample(x, 0, last)

    def _upsample(self, x: Tensor, depth: int, last: bool) -> Tensor:
        """Like `Decoder.upsample`, blocks included; here they need no neighbours."""
        if depth == len(self.stages):
            return self.last.push(x, last)
        widest = self.ratios[depth] * (x.shape[2] // 2)
        parts = []
        for low, high in spans(x.shape[1], widest, 1, x):
            y, ends = x[:, low:high], last and high == x.shape[1]
            for layer in self.stages[depth]:
                y = layer.push(y, ends)
            parts.append(self._upsample(y, depth + 1, ends))
        return cat(parts, dim=1) if len(parts) > 1 else parts[0]

    # ---- saving and restoring

    def _parts(self) -> list[_Layer]:
        layers = [self.first, *sum(self.stages, []), self.last]
        return [part for layer in layers for part in layer.parts()]

    def state(self) -> dict[str, Tensor | int]:
        """Copies of all that the stream holds; the keys do not change while it runs."""
        state: dict[str, Tensor | int] = {}
        for i, part in enumerate(self._parts()):
            state[f"held.{i}"], state[f"begun.{i}"] = part.held.clone(), int(part.begun)
        if self.memory is not None:
            state["lstm.hidden"], state["lstm.cell"] = (tensor.clone() for tensor in self.memory)
        return state

    def restore(self, state: dict[str, Tensor | int]) -> None:
        """Go on from a `state`, saved on whatever device; ValueError, and nothing changed, if it does not fit."""
        tensors, flags = {}, {}
        for name, own in self.state().items():
            value = state.get(name)
            if not _alike(own, value, rows_differ=name.startswith("held")):
                raise ValueError(f"{name!r} is missing or not as this decoder has it: a state of another version?")
            if isinstance(own, Tensor) and isinstance(value, Tensor):
                tensors[name] = value.to(own.device).clone()
            else:
                flags[name] = bool(value)
        for i, part in enumerate(self._parts()):
            part.held, part.begun = tensors[f"held.{i}"], flags[f"begun.{i}"]
        if self.memory is not None:
            self.memory = (tensors["lstm.hidden"], tensors["lstm.cell"])


def _alike(own: Tensor | int, other: object, rows_differ: bool) -> bool:
    if not isinstance(own, Tensor) or not isinstance(other, Tensor):
        return type(own) is type(other)
    sizes = [[n for i, n in enumerate(t.shape) if i != 1 or not rows_differ] for t in (own, other)]
    return own.dim() == other.dim() and sizes[0] == sizes[1] and own.dtype == other.dtype

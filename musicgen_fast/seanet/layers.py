"""The layers of SEANet on time-major tensors [B, T, C].

A convolution is here a few matrix products over shifted views of one padded buffer; a strided one reads `stride` rows
as one, and a transposed one writes `stride` rows as one, so nothing is ever shuffled. Weights are channels last. Each
layer pads and computes the whole of what it is given: blocks are the business of `stacks.py`. For streams, whose
padding comes only at their ends, `valid` computes without it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Conv", "Recurrence", "ResBlock", "Upsample", "pad_rows", "padding"]

# oneDNN's convolution on channels-last views takes 0.65 to 1 times as long as products over taps while a filter is
# small; a larger one is repacked by every call. Not on CUDA: cuDNN would use TF32.
_SMALL_FILTER = 1024
_LSTM_STEPS = 2048  # the gates of the whole input at once would be 16 KiB a frame and row


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


def padding(kernel: int, dilation: int = 1, stride: int = 1) -> tuple[int, int]:
    """Rows added to either side; of an odd number the left gets one more."""
    total = (kernel - 1) * dilation + 1 - stride
    return total - total // 2, total // 2


def pad_rows(x: Tensor, left: int, right: int, mode: str, activate: bool) -> Tensor:
    """[B, T, C] -> a new contiguous [B, left + T + right, C], through ELU if `activate`.

    Mode 'reflect' mirrors without repeating the edge. An input too short for that is first continued with zeros,
    which both reference implementations do (audiocraft `pad1d`).
    """
    batch, length, channels = x.shape
    missing = max(left, right) - length + 1 if mode == "reflect" else 0
    if missing > 0 and left + right > 0:
        x = torch.cat([x, x.new_zeros(batch, missing, channels)], dim=1)
        return pad_rows(x, left, right, mode, activate)[:, : left + length + right].contiguous()
    rows = x.new_empty(batch, left + length + right, channels)
    middle = rows[:, left : left + length]
    if activate:
        torch.ops.aten.elu.out(x, out=middle)  # elu(0) = 0: activating before padding is the same as after
    else:
        middle.copy_(x)
    if mode == "reflect":
        rows[:, :left] = middle[:, 1 : 1 + left].flip(1)
        rows[:, left + length :] = middle[:, length - 1 - right : length - 1].flip(1)
    else:
        rows[:, :left] = 0
        rows[:, left + length :] = 0
    return rows


def _sum_of_taps(rows: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1) -> Tensor:
    """Correlate rows [B, T + (k - 1) dilation, C] with weight [N, k, C] -> [B, T, N]."""
    if rows.device.type == "cpu" and weight[0].numel() <= _SMALL_FILTER:
        out = F.conv2d(rows.mT.unsqueeze(2), weight.mT.unsqueeze(2), bias, dilation=(1, dilation))
        return out.squeeze(2).mT.contiguous()
    first, *others = weight.permute(1, 2, 0).expand(rows.shape[0], -1, -1, -1).unbind(1)
    length = rows.shape[1] - len(others) * dilation
    out = torch.baddbmm(bias, rows[:, :length], first)
    for tap, matrix in enumerate(others, 1):
        out.baddbmm_(rows[:, tap * dilation : tap * dilation + length], matrix)
    return out


class Conv(nn.Module):
    """Conv1d with EnCodec's padding: [B, T, C_in] -> [B, ceil(T / stride), C_out] (audiocraft `StreamableConv1d`).

    `weight` is [C_out, kernel, C_in]: torch's, channels last. With a stride, the kernel must be a multiple of it
    (SEANet: twice).
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, pad_mode: str, *, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        assert stride == 1 or (kernel % stride == 0 and dilation == 1)
        self.weight, self.bias = _empty(c_out, kernel, c_in), _empty(c_out)
        self.stride, self.dilation, self.pad_mode = stride, dilation, pad_mode
        self.left, self.right = padding(kernel, dilation, stride)

    def forward(self, x: Tensor, activate: bool = False) -> Tensor:
        to_full_window = -x.shape[1] % self.stride
        return self.valid(pad_rows(x, self.left, self.right + to_full_window, self.pad_mode, activate))

    def valid(self, rows: Tensor) -> Tensor:
        """One output for every window within rows [B, T, C_in], which are contiguous and activated already."""
        c_out, _, c_in = self.weight.shape
        if self.stride > 1:
            rows = rows.view(rows.shape[0], -1, self.stride * c_in)
            return _sum_of_taps(rows, self.weight.view(c_out, -1, self.stride * c_in), self.bias)
        if self.dilation == 1 and c_in <= 2:
            return self._few_inputs(rows)
        if self.dilation == 1 and c_out <= 2:
            return self._few_outputs(rows)
        return _sum_of_taps(rows, self.weight, self.bias, self.dilation)

    def _few_inputs(self, rows: Tensor) -> Tensor:
        """All taps of an output as one row: products with an inner size of 1 or 2 would only move memory."""
        taps, c_in = self.weight.shape[1:]
        shape = (rows.shape[0], rows.shape[1] - taps + 1, taps * c_in)
        windows = rows.as_strided(shape, (rows.stride(0), c_in, 1)).contiguous()
        return F.linear(windows, self.weight.flatten(1), self.bias)

    def _few_outputs(self, rows: Tensor) -> Tensor:
        """One product for all taps, then a sum along its diagonals: 0.4 ms per second of audio, conv1d takes 4."""
        c_out, taps = self.weight.shape[:2]
        parts = F.linear(rows, self.weight.flatten(0, 1))
        shape = (rows.shape[0], rows.shape[1] - taps + 1, c_out, taps)
        strides = (parts.stride(0), c_out * taps, taps, c_out * taps + 1)
        return parts.as_strided(shape, strides).sum(-1).add_(self.bias)


class Upsample(nn.Module):
    """ELU, then ConvTranspose1d with kernel 2 stride, trimmed: [B, T, C_in] -> [B, T stride, C_out].

    Output row t stride + j sums two taps, of inputs t and t - 1, so it is a convolution with two taps that makes
    `stride` rows at a time: weight [stride C_out, 2, C_in], the earlier input first.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.weight, self.bias = _empty(stride * c_out, 2, c_in), _empty(c_out)
        self.stride, self.cut = stride, stride - stride // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.valid(pad_rows(x, 1, 1, "constant", activate=True))
        return out[:, self.cut : self.cut + x.shape[1] * self.stride]

    def valid(self, rows: Tensor) -> Tensor:
        """Untrimmed, of activated rows [B, 1 + T, C_in]: [B, T stride, C_out], from each row and the one before it."""
        out = _sum_of_taps(rows, self.weight, self.bias.repeat(self.stride))
        return out.view(rows.shape[0], -1, self.bias.shape[0])


class ResBlock(nn.Module):
    """x + conv_1(elu(conv_k(elu(x)))) (audiocraft `SEANetResnetBlock`), summed in place: x must be the caller's own."""

    def __init__(self, dim: int, hidden: int, kernel: int, dilation: int, pad_mode: str) -> None:
        super().__init__()
        self.wide = Conv(dim, hidden, kernel, pad_mode, dilation=dilation)
        self.point = Conv(hidden, dim, 1, pad_mode)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wide(x, activate=True)
        return self.add_point(x.add_(self.point.bias), hidden)

    def add_point(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x + conv_1(elu(hidden)) without the bias of conv_1; both arguments are written over."""
        matrix = self.point.weight[:, 0].t().expand(x.shape[0], -1, -1)
        return x.baddbmm_(F.elu_(hidden), matrix)


class Recurrence(nn.LSTM):
    """LSTM with a skip, [B, T, C] -> ([B, T, C], state); its state is nn.LSTM's (h, c), each [layers, B, C].

    Both references start from zeros (state None); feeding a state continues a stream exactly.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        parts = []
        for piece in x.split(_LSTM_STEPS, dim=1):
            batch, length, _ = piece.shape
            # two rows: 0.83 ms a step by hand, 1.26 in oneDNN (4: 1.5 and 1.3); one row: 0.76 and 0.73, but oneDNN
            # first repacks the weights, 20 ms a call
            by_hand = piece.device.type == "cpu" and (batch == 2 or batch == 1 and length < 128)
            run = self._by_hand if by_hand else super().forward
            y, state = run(piece.transpose(0, 1), state)
            parts.append(y.transpose(0, 1) + piece)
        assert state is not None
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], state

    def _by_hand(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What nn.LSTM does: x [T, B, C] -> (y [T, B, C], state)."""
        if state is None:
            state = (x.new_zeros(self.num_layers, *x.shape[1:]), x.new_zeros(self.num_layers, *x.shape[1:]))
        hidden, cell = state[0].clone(), state[1].clone()
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(self.all_weights):
            x = _lstm_steps(F.linear(x, w_ih, b_ih + b_hh), w_hh.t(), hidden[layer], cell[layer])
        return x, (hidden, cell)


def _lstm_steps(inputs: Tensor, matrix: Tensor, hidden: Tensor, cell: Tensor) -> Tensor:
    """One layer over inputs [T, B, 4 C] (gates in, forget, new, out) -> [T, B, C]; hidden and cell [B, C] move on."""
    length, batch, width = inputs.shape
    out = inputs.new_empty(length, batch, width // 4)
    gates = inputs.new_empty(batch, width)
    in_and_forget = gates[:, : width // 2]
    gate_in, gate_forget, new, gate_out = gates.chunk(4, dim=1)
    previous = hidden
    for step, y in zip(inputs.unbind(0), out.unbind(0), strict=True):
        torch.mm(previous, matrix, out=gates).add_(step)  # addmm takes 25 times as long for one row
        in_and_forget.sigmoid_()
        new.tanh_()
        gate_out.sigmoid_()
        cell.mul_(gate_forget).addcmul_(gate_in, new)
        torch.mul(gate_out, cell.tanh(), out=y)
        previous = y
    hidden.copy_(previous)
    return out

"""The encoder and the decoder of SEANet: which layers in which order, and how long inputs are cut.

The convolutions run in blocks of a few MiB, each with the neighbouring rows that its outputs depend on: memory stays
bounded however long the clip, buffers stay in cache, and the result is that of the whole clip. Time-major, [B, T, C].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor, cat, nn

from ..config import CodecConfig
from .layers import Conv, Recurrence, ResBlock, Upsample, padding

__all__ = ["Decoder", "Encoder", "spans"]

# Bytes of the widest activation of a block. CPU: the buffers then stay near the caches and below the size at which
# malloc maps fresh pages for each (whole 10 s: 86 ms per second of audio, in blocks: 70). CUDA: fewer launches.
_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


class _Stage(nn.Module):
    """The residual blocks of one width, with the change of rate before (`up`) or behind them (`down`)."""

    def __init__(self, config: CodecConfig, width: int, up: Upsample | None = None, down: Conv | None = None) -> None:
        super().__init__()
        hidden, kernel = width // config.compress, config.residual_kernel_size
        self.up, self.down = up, down
        self.blocks = nn.ModuleList(
            ResBlock(width, hidden, kernel, config.dilation_base**j, config.pad_mode)
            for j in range(config.num_residual_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.up is not None:
            x = self.up(x)
        for block in self.blocks:
            x = block(x)
        return x if self.down is None else self.down(x, activate=True)


def _contexts(config: CodecConfig) -> tuple[int, list[int]]:
    """How far the convolutions see beyond a span, the farther of both sides.

    Returns:
        encoder: frames around a span of frames at the LSTM; decoder: for each stage, input rows around the rows that
        a span of samples is made from.
    """
    sides = [padding(config.residual_kernel_size, config.dilation_base**j) for j in range(config.num_residual_layers)]
    blocks_left, blocks_right = sum(left for left, _ in sides), sum(right for _, right in sides)
    left = right = 0
    for stride in config.ratios:
        down_left, down_right = padding(2 * stride, stride=stride)
        left = left * stride + down_left + blocks_left
        right = right * stride + down_right + blocks_right
    encoder = math.ceil((max(left, right) + padding(config.kernel_size)[0]) / config.hop_length)
    decoder: list[int] = []
    left, right = padding(config.last_kernel_size)
    for stride in reversed(config.ratios):
        cut = padding(2 * stride, stride=stride)[0]
        left = 1 - (cut - left - blocks_left) // stride
        right = (stride - 1 + right + blocks_right + cut) // stride
        decoder.insert(0, max(left, right))
    return encoder, decoder


def spans(length: int, bytes_each: int, context: int, x: Tensor, budget: int = 1) -> Iterator[tuple[int, int]]:
    """Split range(length) into nearly equal spans, each with activations of about `budget` blocks of x's device."""
    limit = budget * _BLOCK_BYTES["cpu" if x.device.type == "cpu" else "cuda"]
    block = max(limit // (bytes_each * x.shape[0] * x.element_size()), 16 * context)
    count = max(1, round(length / block))
    return pairwise(length * i // count for i in range(count + 1))


class Encoder(nn.Module):
    """Waveform [B, n, channels] -> latents [B, ceil(n / hop), dimension] (audiocraft `SEANetEncoder`)."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.hop, self.width, self.context = config.hop_length, config.num_filters, _contexts(config)[0]
        width = config.num_filters
        self.first = Conv(config.channels, width, config.kernel_size, config.pad_mode)
        self.stages = nn.ModuleList()
        for stride in reversed(config.ratios):
            down = Conv(width, 2 * width, 2 * stride, config.pad_mode, stride=stride)
            self.stages.append(_Stage(config, width, down=down))
            width *= 2
        self.lstm = Recurrence(width, width, config.lstm_layers).requires_grad_(False) if config.lstm_layers else None
        self.last = Conv(width, config.dimension, config.last_kernel_size, config.pad_mode)

    def forward(self, wav: Tensor) -> Tensor:
        """[B, n, channels] -> latents [B, ceil(n / hop), dimension]."""
        x = self.downsample(wav)
        if self.lstm is not None:
            x, _ = self.lstm(x)
        return self.last(x, activate=True)

    def downsample(self, wav: Tensor) -> Tensor:
        """[B, n, channels] -> [B, ceil(n / hop), C]: the convolutions before the LSTM, block by block."""
        parts = []
        # two blocks' worth: only the first stage is that wide
        for low, high in spans(-(-wav.shape[1] // self.hop), self.hop * self.width, self.context, wav, budget=2):
            start = max(0, low - self.context)
            x = self.first(wav[:, start * self.hop : (high + self.context) * self.hop])
            for stage in self.stages:
                x = stage(x)
            parts.append(x[:, low - start : high - start])
        return cat(parts, dim=1)


class Decoder(nn.Module):
    """Latents [B, T, dimension] -> waveform [B, T hop, channels] (audiocraft `SEANetDecoder`).

    Three parts: `first` sees 3 frames to either side, `lstm` all of the past, and `upsample` `contexts[0]` frames to
    either side (1 for the codec of MusicGen). `streaming.py` runs the same layers over pieces.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width = config.num_filters * 2 ** len(config.ratios)
        self.ratios, self.contexts = config.ratios, _contexts(config)[1]
        self.first = Conv(config.dimension, width, config.kernel_size, config.pad_mode)
        self.lstm = Recurrence(width, width, config.lstm_layers).requires_grad_(False) if config.lstm_layers else None
        self.stages = nn.ModuleList()
        for stride in config.ratios:
            self.stages.append(_Stage(config, width // 2, up=Upsample(width, width // 2, stride)))
            width //= 2
        self.last = Conv(width, config.channels, config.last_kernel_size, config.pad_mode)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, T, dimension] -> [B, T hop, channels]."""
        x = self.first(latents)
        if self.lstm is not None:
            x, _ = self.lstm(x)
        return self.upsample(x)

    def upsample(self, x: Tensor, depth: int = 0) -> Tensor:
        """[B, T, C] of stage `depth` -> [B, T x the strides from there on, channels], block by block.

        Each stage splits its own input: deep in the stack the rows to compute twice are a few in thousands.
        """
        if depth == len(self.stages):
            return self.last(x, activate=True)
        length, context, stride = x.shape[1], self.contexts[depth], self.ratios[depth]
        scale = math.prod(self.ratios[depth:])
        parts = []
        for low, high in spans(length, stride * (x.shape[2] // 2), context, x):
            start = max(0, low - context)
            wav = self.upsample(self.stages[depth](x[:, start : high + context]), depth + 1)
            parts.append(wav[:, (low - start) * scale : (high - start) * scale])
        return cat(parts, dim=1) if len(parts) > 1 else parts[0]

"""Where the demo codec starts from: its configuration, and weights that make the untrained network a lapped transform.

Each strided convolution becomes an MDCT (window of two strides) of every channel followed by a rotation to the
principal components of real activations, each transposed convolution the same matrix, and everything else nearly the
identity. Input small, output large: ELU is almost linear near zero, so encoder and decoder already undo each other.
Waveforms are float32 [B, 1, n]. It knows neither the quantiser nor the training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATIOS = (8, 5, 4, 2)  # decoder order; 320 samples a frame
_BLOCK_GAIN = 0.01  # of a residual block's last convolution: near nothing, but not zero, so that gradients flow
_LSTM_GAIN = 0.02
_NOISE = 0.01  # added to every row of norm 1, 40 dB below: equal channels would stay equal for ever
_IDLE = 0.05  # norm of the filters of first-layer channels that carry no signal yet


def codec_config(filters: int = 16, hidden: int = 128, books: int = 4, codes: int = 512) -> Any:
    """transformers' EncodecConfig: 16 kHz mono, 50 frames a second, `books` codebooks of `codes` entries.

    Only what `musicgen_fast.checkpoints.codec_config` accepts: not causal, plain shortcuts, weight norm.
    """
    from transformers import EncodecConfig

    if codes < 2 or codes & (codes - 1):
        raise ValueError(f"codes must be a power of two, got {codes}")
    # Older versions of transformers count 10 bits a code whatever the size, newer ones log2(codes). For 4 books of 512
    # or 1024 codes 2.2 kbit/s means 4 to both; other sizes are right in the newer ones and in musicgen_fast.
    kbits = 2.2 if (books, codes) in ((4, 512), (4, 1024)) else 50 * (books + 0.5) * (codes.bit_length() - 1) / 1000
    config = EncodecConfig(
        sampling_rate=16000, audio_channels=1, upsampling_ratios=list(RATIOS), num_filters=filters, hidden_size=hidden,
        codebook_size=codes, target_bandwidths=[kbits], num_residual_layers=1, num_lstm_layers=1, normalize=False,
        use_causal_conv=False, use_conv_shortcut=False, norm_type="weight_norm", pad_mode="reflect",
    )  # fmt: skip
    if config.num_quantizers != books:
        raise ValueError(f"{books} books of {codes} codes: transformers would derive {config.num_quantizers} books")
    return config


def mdct(stride: int) -> Tensor:
    """Orthonormal lapped transform [stride, 2 stride] under a sine window: with its transpose, the identity."""
    tap = torch.arange(2 * stride, dtype=torch.float64) + 0.5
    band = torch.arange(stride, dtype=torch.float64)[:, None] + 0.5
    window = torch.sin(math.pi * tap / (2 * stride))
    return math.sqrt(2 / stride) * window * torch.cos(math.pi / stride * (tap + stride / 2) * band)


@torch.no_grad()
def lapped_start(model: Any, wav: Tensor, *, scale: float = 0.1, seed: int = 0) -> None:
    """Overwrite the encoder and decoder of a transformers EncodecModel, the components being those of wav.

    Args:
        model: built from `codec_config`, any widths.
        wav: float32 [B, 1, n] on the CPU, a few minutes; n whole frames.
        scale: gain of the first convolution; the last one has its inverse.
    """
    rng = torch.Generator().manual_seed(seed)
    encoder, decoder = list(model.encoder.layers), list(model.decoder.layers)
    down = [i for i, layer in enumerate(encoder) if _stride(layer) > 1]
    up = [i for i, layer in enumerate(decoder) if isinstance(getattr(layer, "conv", None), nn.ConvTranspose1d)]
    for layer in (*encoder, *decoder):
        _quieten(layer)

    taps = encoder[0].conv.weight.shape[-1]
    ends = torch.randn(encoder[0].conv.weight.shape, generator=rng) * (_IDLE / math.sqrt(taps))
    ends[0] = F.one_hot(torch.tensor(taps // 2), taps)  # channel 0 is the waveform itself
    _set(encoder[0].conv, scale * ends)
    x, place = wav, 0
    for index, mirror in zip(down, reversed(up), strict=True):
        x = _run(encoder[place:index], x)
        weight = _lapped(x, encoder[index].conv.weight.shape, encoder[index].conv.stride[0])
        _set(encoder[index].conv, _noisy(weight, rng))
        _set(decoder[mirror].conv, _noisy(weight, rng))
        place = index
    x = _run(encoder[place:-1], x)
    rotation = _components(x, encoder[-1].conv.weight.shape[0])
    _set(encoder[-1].conv, _noisy(_centred(rotation, encoder[-1].conv.weight.shape[-1]), rng))
    _set(decoder[0].conv, _noisy(_centred(rotation.t(), decoder[0].conv.weight.shape[-1]), rng))
    last = torch.zeros_like(decoder[-1].conv.weight)
    last[0, 0, last.shape[-1] // 2] = 1
    _set(decoder[-1].conv, _noisy(last, rng) / scale)


def _stride(layer: nn.Module) -> int:
    conv = getattr(layer, "conv", None)
    return conv.stride[0] if isinstance(conv, nn.Conv1d) else 1


def _quieten(layer: nn.Module) -> None:
    """Residual blocks and LSTMs: a hundredth of what they would add, and no biases: at this scale they cost 8 dB."""
    if hasattr(layer, "block"):
        first, last = layer.block[1].conv, layer.block[-1].conv
        _set(first, first.weight)
        _set(last, last.weight * _BLOCK_GAIN)
    elif hasattr(layer, "lstm"):
        for name, parameter in layer.lstm.named_parameters():
            parameter.mul_(0 if name.startswith("bias") else _LSTM_GAIN)


def _set(conv: nn.Module, weight: Tensor) -> None:
    """Assign through the weight norm, with directions of length 1 and a bias of 0."""
    weight = weight.to(conv.weight.dtype)
    assert weight.shape == conv.weight.shape, (weight.shape, conv.weight.shape)
    norm = weight.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    parts = conv.parametrizations.weight
    parts.original0.copy_(norm)
    parts.original1.copy_(weight / norm)
    conv.bias.zero_()


def _noisy(weight: Tensor, rng: torch.Generator) -> Tensor:
    noise = torch.randn(weight.shape, generator=rng)
    return weight + noise * (_NOISE / math.sqrt(weight[0].numel()))


def _centred(matrix: Tensor, taps: int) -> Tensor:
    """A 1 x 1 convolution [out, in] as the middle of a kernel [out, in, taps]."""
    kernel = matrix.new_zeros(*matrix.shape, taps)
    kernel[:, :, taps // 2] = matrix
    return kernel


def _run(layers: list[nn.Module], x: Tensor) -> Tensor:
    """Through the layers, a clip at a time: minutes of audio at 16 channels would take gigabytes at once."""
    parts = []
    for part in x.split(4):
        for layer in layers:
            part = layer(part)
        parts.append(part)
    return torch.cat(parts)


def _lapped(x: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """Kernel [out, C, 2 stride]: the MDCT of each channel of x [B, C, n], then the main components of all of them."""
    out, channels, _ = shape
    transform = mdct(stride).to(x.dtype)
    bands = F.conv1d(x.reshape(-1, 1, x.shape[-1]), transform[:, None], stride=stride)
    rotation = _components(bands.reshape(x.shape[0], channels * stride, -1), out)
    return (rotation.reshape(-1, stride) @ transform).reshape(out, channels, 2 * stride)


def _components(x: Tensor, count: int) -> Tensor:
    """The `count` orthonormal directions [count, C] that keep most of the energy of x [B, C, T], strongest first.

    More directions than channels: the rest are zeros, as nothing is left to carry.
    """
    flat = x.transpose(0, 1).flatten(1).double()
    _, directions = torch.linalg.eigh(flat @ flat.t())
    found = directions.flip(1)[:, :count].t().to(x.dtype)
    return F.pad(found, (0, 0, 0, count - found.shape[0]))

"""The network in blocks equals the whole, in bounded memory; the LSTM continues from its state."""

from __future__ import annotations

import pytest
import torch

from musicgen_fast.seanet import layers, stacks

from .codecs import assert_near, random_codes, small

BLOCKED = [
    {"lstm_layers": 2},
    {"pad_mode": "constant"},
    {"num_residual_layers": 3, "ratios": (3, 2, 2)},
    {"num_residual_layers": 2, "residual_kernel_size": 5, "kernel_size": 4, "last_kernel_size": 6, "ratios": (5, 1)},
    {"channels": 2, "num_residual_layers": 0},
]


def count_blocks(module: torch.nn.Module) -> list[int]:
    """Lengths of what the module is given, filled in as it runs."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


@pytest.mark.parametrize("changes", BLOCKED)
@pytest.mark.parametrize("frames", [300, 301])
def test_blocks_equal_the_whole(changes, frames, monkeypatch):
    codec = small(**changes)
    codes = random_codes(codec, 2, frames)
    wav = torch.randn(2, codec.channels, frames * codec.config.hop_length - 1)
    whole, codes_of_whole = codec.decode(codes), codec.encode(wav)[0]
    encoded, decoded = count_blocks(codec.encoder.first), count_blocks(codec.decoder.last)
    monkeypatch.setitem(stacks._BLOCK_BYTES, "cpu", 1)  # as small as the contexts allow
    assert_near(codec.decode(codes), whole, 1e-6)
    assert torch.equal(codec.encode(wav)[0], codes_of_whole)
    assert len(encoded) > 2 and len(decoded) > 8


def test_the_contexts_are_not_wider_than_needed():
    """One frame less around a block, and the result is another: the released codec needs 1, 2, 2 and 2 rows."""
    codec = small(ratios=(8, 5, 4, 4), num_filters=2)
    assert codec.decoder.contexts == [1, 2, 2, 2] and codec.encoder.context == 1
    x = torch.randn(1, 40, 32)
    whole = codec.decoder.upsample(x)
    errors = []
    for kept in (1, 0):
        part = codec.decoder.upsample(x[:, 20 - kept : 30 + kept])[:, kept * 640 : (kept + 10) * 640]
        errors.append((part - whole[:, 20 * 640 : 30 * 640]).abs().max() / whole.abs().max())
    assert errors[0] < 1e-6 and errors[1] > 1e-3


def test_memory_does_not_grow_with_the_clip(monkeypatch):
    """The largest tensor of a long decode or encode: latents and waveform, not the activations at the sample rate."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().size() > 0:
                self.elements = max(self.elements, out.untyped_storage().size() // 4)
            return out

    codec = small(ratios=(8, 5, 4), num_filters=8)
    monkeypatch.setitem(stacks._BLOCK_BYTES, "cpu", 1 << 16)
    frames, hop = 1000, 160
    with Largest() as decode:
        wav = codec.decode(random_codes(codec, 1, frames))
    with Largest() as encode:
        codec.encode(wav)
    activations = frames * hop * codec.config.num_filters
    latents, samples = frames * 8 * codec.config.num_filters, frames * hop
    assert wav.numel() == samples
    assert decode.elements <= max(4 * latents, samples) < activations  # 4: the gates of the LSTM
    assert encode.elements <= max(4 * latents, samples) < activations


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_lstm_continues_from_its_state(batch):
    """What a streaming decoder builds on; all of torch's LSTM, the steps by hand, and the cut into pieces agree."""
    torch.manual_seed(3)
    lstm = layers.Recurrence(24, 24, 2).requires_grad_(False)
    x = torch.randn(batch, 300, 24)
    expected, (h, c) = torch.nn.LSTM.forward(lstm, x.transpose(0, 1))
    expected = expected.transpose(0, 1) + x
    y, state = lstm(x)
    assert_near(y, expected, 1e-6)
    torch.testing.assert_close(state, (h, c))
    parts, state = [], None
    for piece in x.split([1, 7, 130, 162], dim=1):
        kept = None if state is None else tuple(part.clone() for part in state)
        y, after = lstm(piece, state)
        assert state is None or all(map(torch.equal, state, kept))
        parts, state = [*parts, y], after
    assert_near(torch.cat(parts, dim=1), expected, 1e-6)
    torch.testing.assert_close(state, (h, c))


def test_the_lstm_in_pieces(monkeypatch):
    codec = small(lstm_layers=2)
    codes = random_codes(codec, 2, 40)
    whole = codec.decode(codes)
    monkeypatch.setattr(layers, "_LSTM_STEPS", 9)
    assert_near(codec.decode(codes), whole, 1e-6)

"""Pieces of a streamed decode against the decode of the whole: any cut, both paddings, stereo, saved and restored.

Exactness is shown in float64, where a missing row or a wrong edge stands out from rounding by ten orders of magnitude,
and the promise (1e-5) in float32.
"""

from __future__ import annotations

import gc
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from musicgen_fast.codec import EnCodec, InterleaveStereo
from musicgen_fast.codec_stream import StreamingDecoder
from musicgen_fast.seanet import layers, stacks

from .codecs import random_codes, small

CODECS = {
    "musicgen": {"ratios": (8, 5, 4, 4), "lstm_layers": 2},
    "musicgen, zeros": {"ratios": (8, 5, 4, 4), "lstm_layers": 2, "pad_mode": "constant"},
    "audiogen, 24 kHz": {"ratios": (8, 5, 4, 2)},
    "zeros": {"pad_mode": "constant"},
    "no lstm": {"lstm_layers": 0, "ratios": (3, 2, 2)},
    "deep": {"num_residual_layers": 3, "ratios": (3, 2, 2), "dilation_base": 3},
    "deep zeros": {"num_residual_layers": 3, "ratios": (3, 2), "pad_mode": "constant"},
    "even kernels": {
        "kernel_size": 6, "last_kernel_size": 4, "residual_kernel_size": 2, "num_residual_layers": 2, "ratios": (1, 2),
    },
    "points": {"kernel_size": 1, "last_kernel_size": 1, "residual_kernel_size": 1},
    "a wait at the end": {"kernel_size": 1, "last_kernel_size": 4, "num_residual_layers": 0, "ratios": (1,)},
    "no blocks, two channels": {"num_residual_layers": 0, "channels": 2},
}  # fmt: skip
RELEASED = ["musicgen", "musicgen, zeros", "audiogen, 24 kHz"]


def tame(dtype: torch.dtype = torch.float64, stereo: bool = False, **changes) -> EnCodec | InterleaveStereo:
    """As small(), with an LSTM that forgets: its weights there magnify rounding at every step."""
    codec = small(**changes).to(dtype)
    if codec.decoder.lstm is not None:
        for parameter in codec.decoder.lstm.parameters():
            parameter.mul_(codec.decoder.lstm.hidden_size**-0.5)
    return InterleaveStereo(codec) if stereo else codec


def streamed(codec, codes: Tensor, sizes: list[int]) -> Tensor:
    """The concatenation over chunks of these sizes, then of the last size again and again."""
    decoder = StreamingDecoder(codec, codes.shape[0])
    parts, at, frame = [], 0, 0
    while frame < codes.shape[2]:
        size = sizes[min(at, len(sizes) - 1)]
        parts.append(decoder.push(codes[:, :, frame : frame + size]))
        at, frame = at + 1, min(frame + size, codes.shape[2])
        assert decoder.emitted == sum(part.shape[2] for part in parts)
        assert 0 <= decoder.pending == frame - decoder.emitted // hop(codec) <= decoder.look_ahead
    parts.append(decoder.finish())
    assert decoder.pending == 0 and decoder.emitted == frame * hop(codec)
    return torch.cat(parts, dim=2)


def hop(codec) -> int:
    return codec.config.hop_length


def assert_exact(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert expected.abs().max() > 0.1, "the reference is silent: the comparison would show nothing"
    assert (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


# ---- equal to the whole


@pytest.mark.parametrize("name", CODECS)
def test_short_clips_in_every_cut(name):
    """Clips shorter than the look-ahead, than the paddings, than the reflections."""
    codec = tame(**CODECS[name])
    for frames in range(1, 8):
        codes = random_codes(codec, 2, frames)
        expected = codec.decode(codes)
        for cuts in range(2 ** (frames - 1)):  # a bit for each place between frames
            ends = [i + 1 for i in range(frames - 1) if cuts >> i & 1] + [frames]
            sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            if frames < 6 or cuts % 5 == 0:
                assert_exact(streamed(codec, codes, sizes), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(CODECS)),
    st.lists(st.integers(1, 13), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
)
def test_any_cut(name, sizes, batch, books, stereo):
    changes = CODECS[name]
    stereo = stereo and "channels" not in changes
    codec = tame(stereo=stereo, **changes)
    codes = random_codes(codec, batch, sum(sizes), books * 2 if stereo else books)
    assert_exact(streamed(codec, codes, sizes), codec.decode(codes))


@pytest.mark.parametrize("limit", [layers._SMALL_FILTER, 0], ids=["convolutions", "products"])
@pytest.mark.parametrize("name", ["musicgen", "musicgen, zeros"])
@pytest.mark.parametrize("stereo", [False, True])
def test_single_precision(name, stereo, limit, monkeypatch):
    """The promise to users is 1e-5 for sound within -1 to 1; here it is a few times as loud, and the limit relative."""
    monkeypatch.setattr(layers, "_SMALL_FILTER", limit)
    codec = tame(torch.float32, stereo, **CODECS[name])
    codes = random_codes(codec, 1, 150)  # one row of 150 frames takes another LSTM than its chunks
    expected = codec.decode(codes)
    for sizes in ([150], [1], [10], [3, 50]):
        assert_exact(streamed(codec, codes, sizes), expected, 2e-6)


@pytest.mark.parametrize("name", CODECS)
def test_a_long_push_in_blocks(name, monkeypatch):
    codec = tame(**CODECS[name])
    codes = random_codes(codec, 2, 100)
    expected = codec.decode(codes)
    lengths: list[int] = []
    valid = layers.Upsample.valid
    monkeypatch.setattr(layers.Upsample, "valid", lambda self, x: (lengths.append(x.shape[1]), valid(self, x))[1])
    monkeypatch.setitem(stacks._BLOCK_BYTES, "cpu", 1)  # as small as blocks get: 16 rows
    decoder = StreamingDecoder(codec, 2)
    parts = [decoder.push(codes[:, :, :3]), decoder.push(codes[:, :, 3:])]
    assert max(lengths) <= 25, "a long push was not cut into blocks"
    assert_exact(torch.cat([*parts, decoder.finish()], dim=2), expected)


def test_a_stream_is_not_its_chunks_decoded_one_by_one():
    """The comparisons can tell a decoder that forgets: one without the past of the LSTM, or without neighbours."""
    codec = tame(**CODECS["musicgen"])
    codes = random_codes(codec, 1, 40)
    expected = codec.decode(codes)
    alone = torch.cat([codec.decode(chunk) for chunk in codes.split(10, dim=2)], dim=2)
    forgetful, parts = StreamingDecoder(codec, 1), []
    for chunk in codes.split(10, dim=2):
        parts.append(forgetful.push(chunk))
        state = forgetful.state()
        forgetful.restore({**state, **{key: torch.zeros_like(state[key]) for key in ("lstm.hidden", "lstm.cell")}})
    parts.append(forgetful.finish())
    for wrong in (alone, torch.cat(parts, dim=2)):
        with pytest.raises(AssertionError):
            assert_exact(wrong, expected, 1e-3)


# ---- how much is held, and done


@pytest.mark.parametrize("name", RELEASED)
def test_the_look_ahead_of_released_codecs(name):
    """2402 samples at 32 kHz, 1203 at 16 and 24: less could not be right, for sound depends on codes as far ahead."""
    codec = tame(**CODECS[name])
    decoder = StreamingDecoder(codec, 1)
    codes = random_codes(codec, 1, 12)
    behind = {640: 2402, 320: 1203}[hop(codec)]
    assert decoder.look_ahead == 4
    assert decoder.push(codes[:, :, :3]).shape == (1, 1, 0) and decoder.pending == 3
    assert decoder.push(codes[:, :, 3:5]).shape[2] == decoder.emitted == 5 * hop(codec) - behind
    assert decoder.push(codes[:, :, 5:11]).shape[2] == 6 * hop(codec) and decoder.pending == 4
    other = codes.clone()
    other[:, :, 11] = (other[:, :, 11] + 1) % codec.cardinality
    changed = (codec.decode(codes) != codec.decode(other))[0, 0].nonzero().min().item()
    assert changed == decoder.emitted, "a sample that came out may not depend on the next frame; the one after it does"


def live_tensor_bytes() -> int:
    """Of all tensors that Python can reach, each storage once: views that keep a large buffer alive count in full."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_memory_does_not_grow():
    codec = tame(torch.float32, ratios=(4, 2))
    decoder = StreamingDecoder(codec, 2)
    codes = random_codes(codec, 2, 5)
    sizes, live = [], []
    for number in range(300):
        decoder.push(codes)
        if number in (4, 100, 299):
            sizes.append({name: getattr(value, "shape", ()) for name, value in decoder.state().items()})
            live.append(live_tensor_bytes())
    assert sizes[0] == sizes[1] == sizes[2] and live[0] == live[1] == live[2]
    held = sum(v.numel() * 4 for v in decoder.state().values() if isinstance(v, Tensor))
    before = live_tensor_bytes()
    del decoder
    assert before - live_tensor_bytes() == held, "more is held than a state says"


def counter() -> FlopCounterMode:
    """torch's, which knows baddbmm but not baddbmm_."""

    def baddbmm_(out: torch.Size, a: torch.Size, b: torch.Size, **_) -> int:
        return 2 * a.numel() * b[2]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: baddbmm_})


@pytest.mark.parametrize("size", [1, 10, 25, 50])
def test_work_is_that_of_one_decode(size):
    """Multiplications: no row is made twice, whatever the chunks."""
    codec = tame(torch.float32, **CODECS["musicgen"])
    codes = random_codes(codec, 2, max(12, 2 * size))  # two rows: the LSTM by hand, whose products are counted
    with counter() as whole:
        codec.decode(codes)
    with counter() as pieces:
        streamed(codec, codes, [size])
    assert 0 < pieces.get_total_flops() <= 1.01 * whole.get_total_flops()


# ---- saved and restored


@pytest.mark.parametrize("name", ["musicgen", "zeros", "no lstm", "even kernels"])
@pytest.mark.parametrize("stereo", [False, True])
@pytest.mark.parametrize("frames", [0, 1, 2, 9, 15])
def test_a_saved_stream_goes_on_elsewhere(name, stereo, frames):
    codec, elsewhere = (tame(stereo=stereo, **CODECS[name]) for _ in range(2))
    codes = random_codes(codec, 2, 15)
    first, second = StreamingDecoder(codec, 2), StreamingDecoder(elsewhere, 2)
    parts = [first.push(codes[:, :, i : i + 1]) for i in range(frames)]
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    if frames:
        first.push(codes[:, :, :1])  # a saved state does not move
    second.push(codes[:, :, :7])  # what the second did before does not count
    second.restore(torch.load(file, weights_only=True))
    assert second.emitted == sum(part.shape[2] for part in parts)
    parts += [second.push(codes[:, :, frames:])] if frames < 15 else []
    parts.append(second.finish())
    assert_exact(torch.cat(parts, dim=2), codec.decode(codes))


def test_one_state_begins_many_streams():
    codec = tame(**CODECS["musicgen"])
    codes = random_codes(codec, 1, 30)
    trunk = StreamingDecoder(codec, 1)
    begun, state = trunk.push(codes[:, :, :10]), trunk.state()
    for seed in range(2):
        torch.manual_seed(seed)
        other = torch.cat([codes[:, :, :10], random_codes(codec, 1, 20)], dim=2)
        branch = StreamingDecoder(codec, 1)
        branch.restore(state)
        assert_exact(torch.cat([begun, branch.push(other[:, :, 10:]), branch.finish()], dim=2), codec.decode(other))


def test_a_finished_stream_stays_finished():
    decoder = StreamingDecoder(tame(), 1)
    decoder.finish()
    other = StreamingDecoder(tame(), 1)
    other.restore(decoder.state())
    with pytest.raises(ValueError, match="push after finish"):
        other.push(torch.zeros(1, 4, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "batch", "stereo", "message"),
    [
        ({"num_filters": 8}, 1, False, "codec.num_filters is 4 there and 8 here"),
        ({"ratios": (2, 4)}, 1, False, "codec.ratio 0 is 4 there and 2 here"),
        ({"ratios": (4, 2, 2)}, 1, False, "codec.ratio 2 is None there and 2 here"),
        ({"pad_mode": "constant"}, 1, False, "codec.reflects is 1 there and 0 here"),
        ({"lstm_layers": 0}, 1, False, "codec.lstm_layers is 1 there"),
        ({"dilation_base": 3}, 1, False, "dilation_base"),
        ({}, 2, False, "batch is 1 there and 2 here"),
        ({}, 1, True, "codec.interleaved is 0 there and 1 here"),
    ],
)
def test_states_of_other_decoders(changes, batch, stereo, message):
    source = StreamingDecoder(tame(), 1)
    source.push(torch.zeros(1, 4, 6, dtype=torch.long))
    codec = tame(stereo=stereo, **changes)
    target = StreamingDecoder(codec, batch)
    codes = random_codes(codec, batch, 12)
    parts = [target.push(codes[:, :, :6])]
    with pytest.raises(ValueError, match=message):
        target.restore(source.state())
    parts += [target.push(codes[:, :, 6:]), target.finish()]
    assert_exact(torch.cat(parts, dim=2), codec.decode(codes))


def test_damaged_states():
    codec = tame()
    decoder = StreamingDecoder(codec, 1)
    decoder.push(random_codes(codec, 1, 6))
    state = decoder.state()
    for name in state:
        with pytest.raises(ValueError):
            decoder.restore({key: value for key, value in state.items() if key != name})
    for name, value in (
        ("lstm.cell", state["lstm.cell"].float()),
        ("lstm.hidden", state["lstm.hidden"][:, :, 1:]),
        ("held.0", state["held.0"][0]),
        ("held.2", 7),
        ("begun.0", torch.ones(1)),
        ("frames", -1),
        ("format", 2),
    ):
        with pytest.raises(ValueError):
            decoder.restore({**state, name: value})


# ---- the interface


def test_wrong_codes_are_the_errors_of_decode_and_change_nothing():
    codec = tame()
    codes = random_codes(codec, 2, 8)
    decoder = StreamingDecoder(codec, 2)
    parts = [decoder.push(codes[:, :, :5])]
    for wrong, message in (
        (codes[0], r"\[B, K, T\]"),
        (torch.tensor(3), r"\[B, K, T\]"),
        (codes[:, :, :0], "T >= 1"),
        (codes.float(), "integers"),
        (codes + codec.cardinality, "from 0 to 63.*cut them off"),
        (torch.full_like(codes, -1), "found -1"),
        (codes[:1], r"2 rows, got codes \[1, 4, 8\]"),
        (codes[:, :3], r"4 codebooks, got codes \[2, 3, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.push(wrong)
    with pytest.raises(ValueError, match="K from 1 to 4"):
        StreamingDecoder(codec, 2).push(torch.cat([codes, codes], dim=1))
    with pytest.raises(ValueError, match=r"\[B, 2 K, T\]"):
        StreamingDecoder(InterleaveStereo(codec), 2).push(codes[:, :3])
    parts += [decoder.push(codes[:, :, 5:].to(torch.int16)), decoder.finish()]
    assert_exact(torch.cat(parts, dim=2), codec.decode(codes))


def test_the_life_of_a_stream():
    codec = tame(stereo=True)
    decoder = StreamingDecoder(codec, 3)
    assert decoder.emitted == decoder.pending == 0 and decoder.finish().shape == (3, 2, 0)
    for call in (decoder.finish, lambda: decoder.push(random_codes(codec, 3, 4))):
        with pytest.raises(ValueError, match="after finish"):
            call()
    for batch in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="batch"):
            StreamingDecoder(codec, batch)


def test_streams_do_not_disturb_each_other_or_the_codec():
    codec = tame(**CODECS["musicgen"])
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    codes = [random_codes(codec, 1, 20) for _ in range(2)]
    streams, parts = [StreamingDecoder(codec, 1) for _ in codes], [[], []]
    for low in range(0, 20, 4):
        for stream, part, own in zip(streams, parts, codes, strict=True):
            piece = own[:, :, low : low + 4].clone()
            sound = stream.push(piece)
            part.append(sound.clone())
            sound.zero_()  # what comes out is the caller's own
            piece.zero_()
    for stream, part, own in zip(streams, parts, codes, strict=True):
        assert_exact(torch.cat([*part, stream.finish()], dim=2), codec.decode(own))
    assert all(torch.equal(tensor, before[name]) for name, tensor in codec.state_dict().items())

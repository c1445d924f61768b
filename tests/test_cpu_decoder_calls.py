"""Bad calls of the compiled CPU decoder: a ValueError or a TypeError that says what is wrong, and never a crash."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musicgen_fast import native
from musicgen_fast.decoders.cpu import CpuDecoder
from musicgen_fast.packing import pack_weights

from .test_cpu_decoder import decoder_of, model_of

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")

SIZES = {"dim": 32, "heads": 2, "layers": 2, "ffn": 64, "codebooks": 4, "vocab": 50, "cross": True}
HUGE = 2**31 - 1


@pytest.fixture(scope="module")
def decoder() -> Any:
    decoder = decoder_of(model_of("cross"), "int8", threads=2)
    decoder._require_positions(2048)
    return decoder


@pytest.fixture(scope="module")
def packed() -> Any:
    model = model_of("cross")
    return pack_weights(model.config, dict(model.state_dict()), "int8")


def arrays(packed: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in packed.tensors.items()}


def a_pass(rows: int = 2, **changes: Any) -> dict[str, Any]:
    """A call of `run` that is right but for `changes`: a position each of the rows of cache 0, their texts in 1."""
    call = {
        "caches": [native.extension().CpuCache("int8", 2, rows, 2, 16, 8) for _ in range(2)],
        "segments": np.array([(0, row, 0, 1, 1, row, 3, 0) for row in range(rows)], np.int32),
        "tokens": np.zeros((rows, 4), np.int64),
        "states": np.empty((0, 32), np.float32),
        "wanted": np.arange(rows, dtype=np.int32),
        "logits": np.empty((rows, 200), np.float32),
    }
    return call | changes


def with_segment(column: int, value: int) -> np.ndarray:
    segments = a_pass()["segments"]
    segments[1, column] = value
    return segments


def test_a_right_call(decoder):
    call = a_pass()
    decoder._native.run(**call)
    assert np.isfinite(call["logits"]).all()


BAD_PASSES = {
    "no such cache": {"segments": with_segment(0, 2)},
    "None for a cache": {"caches": [None, None]},
    "no such row": {"segments": with_segment(1, 2)},
    "a row below 0": {"segments": with_segment(1, -1)},
    "a row twice": {"segments": with_segment(1, 0)},
    "a position below 0": {"segments": with_segment(2, -1)},
    "a position behind the cache": {"segments": with_segment(2, 8)},
    "positions that overflow": {"segments": with_segment(2, HUGE)},
    "no position": {"segments": with_segment(3, 0)},
    "more positions than tokens": {"segments": with_segment(3, 2)},
    "positions without end": {"segments": with_segment(3, HUGE)},
    "no such text": {"segments": with_segment(4, 2)},
    "no such row of a text": {"segments": with_segment(5, 2)},
    "a text of no length": {"segments": with_segment(6, 0)},
    "a text longer than its cache": {"segments": with_segment(6, 9)},
    "states that are not there": {"segments": with_segment(7, 1)},
    "more states than positions": {"segments": with_segment(7, 2)},
    "an unknown token": {"tokens": np.full((2, 4), 51)},
    "a token below 0": {"tokens": np.full((2, 4), -1)},
    "tokens left over": {"tokens": np.zeros((3, 4), np.int64)},
    "states left over": {"states": np.zeros((1, 32), np.float32)},
    "other codebooks": {"tokens": np.zeros((2, 5), np.int64)},
    "other width": {"states": np.empty((0, 31), np.float32)},
    "a row that is not there": {"wanted": np.array([0, 2], np.int32)},
    "fewer logits": {"logits": np.empty((1, 200), np.float32)},
    "narrower logits": {"logits": np.empty((2, 199), np.float32)},
    "nothing": {"segments": np.empty((0, 8), np.int32)},
    "narrow segments": {"segments": np.zeros((2, 7), np.int32)},
}


@pytest.mark.parametrize("case", BAD_PASSES)
def test_bad_passes(decoder, case):
    with pytest.raises(ValueError, match=r"^(run|no|the cache)\b.* "):
        decoder._native.run(**a_pass(**BAD_PASSES[case]))


def test_caches_of_another_model(decoder):
    for sizes in ((2, 2, 1, 32, 8), (3, 2, 2, 16, 8), (2, 2, 2, 15, 8)):
        with pytest.raises(ValueError, match="another model"):
            decoder._native.run(**a_pass(caches=[native.extension().CpuCache("int8", *sizes)] * 2))


BAD_TYPES = {
    "int32 tokens": {"tokens": np.zeros((2, 4), np.int32)},
    "int64 segments": {"segments": a_pass()["segments"].astype(np.int64)} if native.available() else {},
    "flat tokens": {"tokens": np.zeros(8, np.int64)},
    "tokens with gaps": {"tokens": np.zeros((2, 8), np.int64)[:, ::2]},
    "float64 logits": {"logits": np.empty((2, 200))},
    "logits that cannot be written": {"logits": np.broadcast_to(np.float32(0), (2, 200))},
    "None": {"wanted": None},
    "a torch cache": {"caches": [torch.zeros(3)] * 2},
}


@pytest.mark.parametrize("case", BAD_TYPES)
def test_bad_types(decoder, case):
    with pytest.raises(TypeError):
        decoder._native.run(**a_pass(**BAD_TYPES[case]))


def test_logits_may_be_wanted_more_than_once(decoder):
    """More logits than rows: there must be room for what they are computed from."""
    once, often = a_pass(rows=1), a_pass(rows=1)
    often["wanted"], often["logits"] = np.zeros(500, np.int32), np.empty((500, 200), np.float32)
    decoder._native.run(**once)
    decoder._native.run(**often)
    assert (often["logits"] == once["logits"]).all()


INTEGERS = st.one_of(st.integers(-2, 9), st.sampled_from([HUGE, -HUGE - 1, 2**30, 2047, 64]))


@settings(max_examples=400, deadline=None)
@given(
    rows=st.lists(st.lists(INTEGERS, min_size=8, max_size=8), max_size=4),
    tokens=st.lists(st.one_of(st.integers(0, 50), st.sampled_from([-1, 51, 2**62])), max_size=40),
    states=st.integers(0, 4),
    wanted=st.lists(INTEGERS, max_size=5),
    shape=st.tuples(st.integers(0, 5), st.sampled_from([200, 200, 200, 8])),
)
def test_any_numbers(decoder, rows, tokens, states, wanted, shape):
    """Whatever the arrays hold: an error, or logits that are written."""
    call = a_pass(
        segments=np.array(rows, np.int32).reshape(-1, 8),
        tokens=np.array(tokens[: len(tokens) // 4 * 4], np.int64).reshape(-1, 4),
        states=np.ones((states, 32), np.float32),
        wanted=np.array(wanted, np.int32),
        logits=np.full(shape, np.nan, np.float32),
    )
    try:
        decoder._native.run(**call)
    except ValueError:
        return
    assert not np.isnan(call["logits"]).any()


def test_bad_projections(decoder):
    text = native.extension().CpuCache("bfloat16", 2, 2, 2, 16, 8)
    decoder._native.project(np.ones((8, 32), np.float32), text, 1)
    for states, row in ((9, 0), (0, 0), (3, 2), (3, -1)):
        with pytest.raises(ValueError):
            decoder._native.project(np.ones((states, 32), np.float32), text, row)
    with pytest.raises(ValueError, match=r"\[N, dim\]"):
        decoder._native.project(np.ones((3, 31), np.float32), text, 0)
    prefix = decoder_of(model_of("prefix"))
    with pytest.raises(ValueError, match="no cross-attention"):
        prefix._native.project(np.ones((3, 48), np.float32), text, 0)


def test_bad_caches():
    C = native.extension()
    for bad in ((0, 1, 1, 16, 8), (1, 0, 1, 16, 8), (1, 1, -1, 16, 8), (1, 1, 1, 0, 8), (1, 1, 1, 16, 0)):
        with pytest.raises(ValueError, match="at least one"):
            C.CpuCache("float32", *bad)
    with pytest.raises(ValueError, match="2\\^24"):
        C.CpuCache("float32", 1, 1, 1, 16, HUGE)
    with pytest.raises(ValueError, match="int8"):
        C.CpuCache("float16", 1, 1, 1, 16, 8)
    with pytest.raises(MemoryError, match="MiB of keys and values"):
        C.CpuCache("float32", 2**20, 2**20, 2**20, 2**20, 2**20)
    with pytest.raises(TypeError):
        C.CpuCache("float32", 2**40, 1, 1, 16, 8)
    cache = C.CpuCache("int8", 2, 3, 2, 16, 20)
    for other in (
        ("int8", 2, 2, 2, 16, 20),
        ("int8", 1, 3, 2, 16, 20),
        ("float32", 2, 3, 2, 16, 20),
        ("int8", 2, 3, 3, 16, 20),
    ):
        with pytest.raises(ValueError, match="same model"):
            cache.copy_from(C.CpuCache(*other), 4)
    for positions in (-1, 19, 21, HUGE):
        with pytest.raises(ValueError, match="more positions"):
            cache.copy_from(C.CpuCache("int8", 2, 3, 2, 16, 18), positions)


def test_bad_sizes_and_weights(packed):
    make, weights = native.extension().CpuDecoder, arrays(packed)
    make(weights, packed.formats, **SIZES)
    for name in SIZES:
        for value in (0, -1, HUGE, 2**16, 3) if name != "cross" else ():
            with pytest.raises(ValueError):
                make(weights, packed.formats, **{**SIZES, name: value})
    for options in ({"threads": -1}, {"threads": 10**6}, {"isa": "sse9"}):
        with pytest.raises(ValueError):
            make(weights, packed.formats, **SIZES, **options)
    size = len(weights["norm.weight"])
    room = np.zeros(size + 64, np.uint8)
    first = (1 - room.ctypes.data) % 64  # a byte behind a boundary
    for name, value in (
        ("norm.weight", weights["norm.weight"][:-1]),
        ("norm.weight", room[first : first + size]),
        ("layers.1.qkv.weight", weights["layers.1.qkv.weight"][:-64]),
        ("emb.weight", weights["emb.weight"][:-2]),
    ):
        with pytest.raises(ValueError, match=name):
            make({**weights, name: value}, packed.formats, **SIZES)
    for missing in ("norm.bias", "layers.1.cross_kv.weight"):
        with pytest.raises(ValueError, match=missing):
            make({k: v for k, v in weights.items() if k != missing}, packed.formats, **SIZES)
    with pytest.raises(ValueError, match="heads.weight has no format"):
        make(weights, {k: v for k, v in packed.formats.items() if k != "heads.weight"}, **SIZES)
    with pytest.raises(ValueError, match="int8 or int4"):
        make(weights, {**packed.formats, "heads.weight": "int5"}, **SIZES)


def test_bad_options(packed):
    for options, message in (
        ({"kv": "int4"}, "keys and values"),
        ({"isa": "mmx"}, "instruction"),
        ({"threads": -1}, "threads"),
    ):
        with pytest.raises(ValueError, match=message):
            CpuDecoder(packed, **options)


def test_one_format_for_all_projections_of_a_text(packed):
    """Their inputs are prepared once, in the format of the first layer's."""
    model = model_of("cross")
    other = pack_weights(model.config, dict(model.state_dict()), "float32")
    name = "layers.1.cross_kv.weight"
    with pytest.raises(ValueError, match="one format"):
        native.extension().CpuDecoder(
            {**arrays(packed), name: other.tensors[name].numpy()}, {**packed.formats, name: "float32"}, **SIZES
        )


def test_weights_outlive_the_dict_that_they_came_in(packed):
    weights = {name: packed.tensors[name].clone().numpy() for name in packed.tensors}
    aligned = {name: array for name, array in weights.items() if array.ctypes.data % 64 == 0}
    given = {**arrays(packed), **aligned}
    decoder = native.extension().CpuDecoder(given, packed.formats, **SIZES)
    decoder.set_positions(np.zeros((64, 32), np.float32))
    first, second = a_pass(), a_pass()
    decoder.run(**first)
    given.clear()
    aligned.clear()
    weights.clear()
    filled = [np.full(1 << 16, 255, np.uint8) for _ in range(64)]  # takes the place of what was freed
    decoder.run(**second)
    assert len(filled) == 64 and (first["logits"] == second["logits"]).all()


def test_tables_of_positions(packed):
    """The longer one stays: two threads may each bring one."""
    decoder = native.extension().CpuDecoder(arrays(packed), packed.formats, **SIZES)
    with pytest.raises(ValueError, match="table of positions"):
        decoder.run(**a_pass())
    tables = [np.full((n, 32), n, np.float32) for n in (8, 4)]
    decoder.set_positions(tables[0])
    decoder.set_positions(tables[1])
    assert decoder.positions == 8
    decoder.run(**a_pass())
    with pytest.raises(ValueError, match="dim"):
        decoder.set_positions(np.zeros((9, 31), np.float32))

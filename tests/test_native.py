"""The parts of the C++ sampler on every instruction set: published vectors, golden tables, the torch twin's bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from musicgen_fast import native, philox

ASSETS = Path(__file__).parent / "assets"
MAX = 0xFFFFFFFF

needs_extension = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")

# Random123, kat_vectors, philox4x32-10: counter, key, words. The last row's input is digits of pi.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MAX, MAX, MAX, MAX], [MAX, MAX], [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
# Seeds with either half of the key in use, the sign bit set, and steps beyond 32 bits.
SEEDS = [0, 1, -1, 0x1234_5678_9ABC_DEF0, -(2**63)]
STEPS = [0, 7, 1499, 2**31, 2**40 + 5]
STREAMS = [0, 0, 1 << 24, MAX, 2**31]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """x -> E and t -> w, iw, as bit patterns (uint32)."""
    tables = json.loads((ASSETS / "golden_functions.json").read_text())
    return {name: (np.array(table, dtype=np.int64) & MAX).astype(np.uint32) for name, table in tables.items()}


@pytest.fixture(scope="module")
def C() -> Any:
    return native.extension()


def requests() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(SEEDS), torch.tensor(STEPS), torch.tensor(STREAMS)


def skip_if_missing(C: Any, isa: int) -> None:
    if isa > C.BEST_ISA:
        pytest.skip("this processor lacks that instruction set")


def bits(x: torch.Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


@needs_extension
def test_philox_known_answers(C: Any) -> None:
    counters, keys, words = (np.array([row[i] for row in KNOWN_ANSWERS], dtype=np.uint32) for i in range(3))
    out = np.zeros_like(counters)
    C.philox(counters, keys, out)
    np.testing.assert_array_equal(out, words)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers_of_the_torch_twin(counter: list[int], key: list[int], words: list[int]) -> None:
    assert [int(w) for w in philox.philox(*(torch.tensor(v) for v in (*counter, *key)))] == words


@needs_extension
@pytest.mark.parametrize("isa", range(3))
def test_functions_match_the_golden_tables(C: Any, golden: dict[str, np.ndarray], isa: int) -> None:
    skip_if_missing(C, isa)
    E = np.zeros(len(golden["x"]), np.float32)
    C.exponential(golden["x"], E, isa)
    np.testing.assert_array_equal(bits(E), golden["E_bits"])
    w, iw = np.zeros((2, len(golden["t_bits"])), np.float32)
    C.exp2_pair(golden["t_bits"].view(np.float32), w, iw, isa)
    np.testing.assert_array_equal(bits(w), golden["w_bits"])
    np.testing.assert_array_equal(bits(iw), golden["iw_bits"])


def test_functions_of_the_torch_twin_match_the_golden_tables(golden: dict[str, np.ndarray]) -> None:
    E = philox.exponential(torch.from_numpy(golden["x"].astype(np.int64)))
    np.testing.assert_array_equal(bits(E), golden["E_bits"])
    w, iw = philox.exp2_pair(torch.from_numpy(golden["t_bits"].view(np.float32)))
    np.testing.assert_array_equal(bits(w), golden["w_bits"])
    np.testing.assert_array_equal(bits(iw), golden["iw_bits"])


@needs_extension
@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize(("K", "V"), [(4, 2048), (1, 1), (2, 3), (8, 1024), (3, 257), (4, 400), (1, 4096)])
def test_noise_equals_its_torch_twin_bit_for_bit(C: Any, K: int, V: int, isa: int) -> None:
    """257: whole vectors, a partial one, and a last block of which one word is used."""
    skip_if_missing(C, isa)
    out = np.zeros((len(SEEDS), K, V), np.float32)
    C.race_noise(*(x.numpy() for x in requests()), out, isa)
    np.testing.assert_array_equal(bits(out), bits(philox.race_noise(*requests(), K, V)))


@needs_extension
def test_every_word_is_reached_and_none_gives_infinity(C: Any) -> None:
    """A sweep of the 32-bit words at stride 4099, with both ends: finite, positive, and non-increasing in x."""
    x = np.append(np.arange(0, 2**32, 4099, dtype=np.uint32), np.uint32(MAX))
    E = np.zeros(len(x), np.float32)
    C.exponential(x, E)
    assert np.isfinite(E).all() and (E > 0).all() and (np.diff(E.astype(np.float64)) <= 0).all()
    exact = -np.log((x.astype(np.float64) + 0.5) / 2**32)
    assert np.abs(E / exact - 1).max() < 4e-7


@needs_extension
def test_wrong_arguments_are_refused(C: Any) -> None:
    seeds, steps, streams = (x.numpy() for x in requests())
    with pytest.raises(ValueError, match="one entry per row"):
        C.race_noise(seeds[:2], steps, streams, np.zeros((5, 4, 8), np.float32))
    with pytest.raises(TypeError):  # a float64 output would be filled as a copy and lost
        C.race_noise(seeds, steps, streams, np.zeros((5, 4, 8)))
    with pytest.raises(ValueError, match="lacks that instruction set"):
        C.race_noise(seeds, steps, streams, np.zeros((5, 4, 8), np.float32), C.BEST_ISA + 1)


def test_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSICGEN_FAST_NATIVE", "0")
    assert not native.available() and "MUSICGEN_FAST_NATIVE" in native.why_not()
    with pytest.raises(RuntimeError, match="MUSICGEN_FAST_NATIVE=0"):
        native.extension()

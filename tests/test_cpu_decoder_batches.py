"""The CPU decoder among requests: the same tokens alone and in any batch, and caches that copy and hold rows apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from musicgen_fast import native
from musicgen_fast.config import ModelConfig
from musicgen_fast.engine import generate
from musicgen_fast.sampling import SamplingParams
from musicgen_fast.slot_engine import Request, SlotEngine
from musicgen_fast.state import Branch, Conditions, Sampler

from .engine_tools import WAYS, prompt_of
from .test_cpu_decoder import KINDS, decoded, decoder_of, inputs_of, model_of

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")

PRECISIONS = ["float32", "bfloat16", "int8"]
WINDOW, STRIDE = 20, 12


# -- requests -----------------------------------------------------------------------------------------------------


def request(config: ModelConfig, seed: int) -> Request:
    """Every request has another text or prefix, length, prompt, sampler and number of branches."""
    g = torch.Generator().manual_seed(seed)
    states = [torch.randn(1 + seed % 7, config.dim, generator=g)]
    if config.conditioning == "cross":
        branches = [Branch(cross=states), Branch()] if seed % 3 else [Branch(cross=states)]
    else:
        branches = [Branch(prefix=states), Branch(prefix=[torch.zeros(2, config.dim)])]
    conditions = Conditions(1, branches, len(branches))
    way = list(WAYS)[seed % 4]
    params = SamplingParams.build(1, config.num_codebooks, cfg_coef=2.0, **WAYS[way])
    prompt = prompt_of(1, seed % 5, config.num_codebooks)[0] % config.vocab_size
    return Request(prompt, 6 + seed % 23, WINDOW, STRIDE, lambda _: conditions, params, seed)


def alone(decoder: Any, r: Request) -> torch.Tensor:
    sampler = Sampler(r.params, torch.tensor([r.seed]))
    return generate(decoder, list(r.plan()), r.prompt[None], r.conditions_of, sampler)[0, :, r.prompt.shape[1] :]


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str, int], torch.Tensor]:
    """Tokens of requests alone, on one thread."""
    return {}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["odd", "wide", "prefix"])
def test_tokens_do_not_depend_on_the_batch(kind, precision, threads, expected):
    """Batches of 2, 5 and 32, admitted at other times, of other lengths; the torch decoder does not promise this."""
    model = model_of(kind)
    config = model.config
    single = decoder_of(model, precision, threads=1)
    decoder = decoder_of(model, precision, threads=threads)
    for slots, seeds in ((2, range(1, 5)), (5, range(1, 9)), (32, range(33))):
        engine = SlotEngine(decoder, slots, WINDOW)
        waiting, frames, requests = [request(config, seed) for seed in seeds], {}, {}
        while waiting or engine.running:
            for _ in range(3 if slots < 32 else 11):
                if waiting and engine.free:
                    (number,) = engine.admit(waiting[0])
                    requests[number], frames[number] = waiting.pop(0), []
            for number, new in engine.step().items():
                frames[number].append(new)
        for number, r in requests.items():
            key = kind, precision, r.seed
            if key not in expected:
                expected[key] = alone(single, r)
            assert torch.equal(torch.cat(frames[number], 1), expected[key]), (slots, r.seed)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_rows_do_not_see_each_other(precision):
    """Logits of 1 to 40 rows with texts of different lengths: those of the first rows are the same bits."""
    model = model_of("wide")
    inputs = inputs_of(model.config, rows=40, steps=5)
    decoder = decoder_of(model, precision, threads=2)
    whole = decoded(decoder, **inputs, cuts=[1, 2])
    for rows in (1, 2, 4, 5, 16, 33):
        part = decoded(decoder, inputs["tokens"][:rows], cross=inputs["cross"][:rows], cuts=[1, 2])
        assert torch.equal(part, whole[:rows]), rows


# -- caches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["odd", "wide"])
def test_copies_between_capacities(kind, kv):
    """Whatever the capacities and the positions, within a tile of 16 or not: the next step sees the same keys."""
    model = model_of(kind)
    tokens = inputs_of(model.config, rows=2, steps=40)["tokens"]
    decoder = decoder_of(model, kv=kv)

    def logits_after(cache: Any, first: int, last: int) -> np.ndarray:
        """Of position `last` - 1, the positions from `first` on being appended."""
        decoder._require_positions(40)
        out = np.empty((2, decoder.config.num_codebooks * decoder.config.vocab_size), np.float32)
        n = last - first
        segments = np.array([(0, row, first, n, -1, 0, 0, 0) for row in range(2)], np.int32)
        fed = torch.cat([tokens[row, :, first:last].T for row in range(2)]).contiguous().numpy()
        none = np.empty((0, decoder.config.dim), np.float32)
        decoder._native.run([cache], segments, fed, none, np.array([n - 1, 2 * n - 1], np.int32), out)
        return out

    for capacity, other, count in ((40, 17, 15), (17, 40, 16), (24, 40, 17), (39, 40, 39), (33, 65, 1), (40, 40, 32)):
        source = decoder.allocate(2, capacity)
        logits_after(source, 0, count)
        copy = decoder.allocate(2, other)
        logits_after(copy, 0, min(other, 37))  # something is there already
        copy.copy_from(source, count)
        if count + 1 <= min(capacity, other):
            assert (logits_after(copy, count, count + 1) == logits_after(source, count, count + 1)).all()
        fresh = decoder.allocate(2, 40)
        if count + 1 <= other:
            assert (logits_after(copy, count, count + 1) == logits_after(fresh, 0, count + 1)).all()
    source.copy_from(source, 7)
    assert (logits_after(source, 32, 33) == logits_after(decoder.allocate(2, 40), 0, 33)).all()


def test_what_a_cache_takes():
    """Bytes of keys and values: 4, 2 and 1 a number, and 4 a position and head for int8's scales."""
    c = model_of("wide").config
    for kv, each in (("float32", 4 * 32), ("bfloat16", 2 * 32), ("int8", 32 + 4)):
        cache = decoder_of(model_of("wide"), kv=kv).allocate(3, 48)
        assert (cache.rows, cache.capacity) == (3, 48)
        assert cache.bytes == 2 * c.num_layers * c.num_heads * 3 * 48 * each


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_was_used_is_as_good_as_new(kind):
    model = model_of(kind)
    decoder, inputs = decoder_of(model, "int8"), inputs_of(model.config)
    clean = decoded(decoder, **inputs)
    kept = decoder.allocate(2, inputs["tokens"].shape[2] + 8)
    real, decoder.allocate = decoder.allocate, lambda rows, capacity: kept
    for _ in range(2):
        decoded(decoder, **inputs_of(model.config, steps=25 if kind != "prefix" else 20))
        assert torch.equal(decoded(decoder, **inputs, cuts=[3]), clean)
    decoder.allocate = real

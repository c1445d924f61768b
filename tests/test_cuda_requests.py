"""Requests on the CUDA decoder, which computes in torch on the CPU here: slots, memory that grows, threads, faults."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from musicgen_fast.decoders.torch import TorchDecoder
from musicgen_fast.kernels import heuristics
from musicgen_fast.slot_engine import RequestError, SlotEngine
from musicgen_fast.state import Branch, Conditions

from .engine_tools import (
    WAYS,
    WINDOW,
    build_decoder,
    collected,
    plain,
    sampler_for,
    streamed,
    text_conditions,
    texts,
)
from .test_cuda_decoder import decoder_of
from .test_decoder import random_model
from .test_engine import alone, request

# -- requests that come and go ------------------------------------------------------------------------------------


def random_request(generator: torch.Generator):
    def pick(*values):
        return values[int(torch.randint(0, len(values), (1,), generator=generator))]

    seed = int(torch.randint(-(2**62), 2**62, (1,), generator=generator))
    prompt = pick(0, 0, 0, 1, 6)
    window = pick(WINDOW, 20, 12)
    stride = pick(4, 8, 12) if window == 20 else window // 2
    return request(
        seed, total=prompt + pick(1, 4, 9, 17, 33, 50), window=window, stride=stride, text=pick(*range(30)),
        prompt=prompt, branches=pick(1, 2, 2, 2, 3), way=pick(*WAYS),
    )  # fmt: skip


def check_random_requests(seed: int, count: int) -> None:
    """Requests at random times in random numbers of slots, some cancelled: each as if it were alone."""
    generator = torch.Generator().manual_seed(seed)
    decoder, solo = build_decoder("cuda"), build_decoder("cuda")
    chance = lambda: float(torch.rand((), generator=generator))  # noqa: E731
    engine = SlotEngine(decoder, 1 + seed % 8, WINDOW, shadow=bool(seed % 3))
    asked, frames, cancelled = {}, {}, set()
    while engine.running or len(asked) < count:
        while engine.free and len(asked) < count and (chance() < 0.4 or not engine.running):
            r = random_request(generator)
            (number,) = engine.admit(r)
            asked[number], frames[number] = r, []
        for number, new in engine.step().items():
            frames[number].append(new)
        if engine.running and chance() < 0.02:
            cancelled.add(engine.running[0])
            engine.cancel(engine.running[0])
    assert engine.free == 1 + seed % 8
    for number, r in asked.items():
        found, expected = torch.cat(frames[number], 1), alone(solo, r)
        end = found.shape[1] if number in cancelled else expected.shape[1]
        assert torch.equal(found, expected[:, :end]), f"request {number} of seed {seed}"


@pytest.mark.parametrize("seed", range(4))
def test_random_requests(exact, seed):
    check_random_requests(seed, 12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 30))
def test_thousands_of_random_requests(exact, seed):
    check_random_requests(seed, 100)


def no_room(self, slots, capacity):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_on_admission_is_the_request_s_own(exact, monkeypatch):
    """It fails by name; the others go on, and what comes later finds room."""
    decoder = build_decoder("cuda")
    good, late = request(1, total=20), request(3, total=12)
    engine = SlotEngine(decoder, 4, WINDOW)
    (number,) = engine.admit(good)
    frames = {number: [engine.step()[number]]}
    (failing,) = engine.admit(request(2, total=20))
    with monkeypatch.context() as patch:
        patch.setattr(type(decoder._cache), "_memory", no_room)
        with pytest.raises(RequestError, match="out of memory") as caught:
            engine.step()
    assert caught.value.requests == [failing] and engine.running == [number]
    (other,) = engine.admit(late)
    frames[other] = []
    while engine.running:
        for n, new in engine.step().items():
            frames[n].append(new)
    for n, r in ((number, good), (other, late)):
        assert torch.equal(torch.cat(frames[n], 1), alone(build_decoder("cuda"), r))


def test_nan_in_one_row_fails_its_request_alone(exact):
    """Its keys and values lie in the pool that all share."""
    decoder = build_decoder("cuda")
    good, bad = request(1, total=25), request(2, total=25, text=1)
    bad.conditions_of(None).branches[0].cross[0].fill_(float("nan"))
    broken = bad.conditions_of(None)
    bad.conditions_of = lambda _: broken
    engine = SlotEngine(decoder, 2, WINDOW)
    (number,), (failing,) = engine.admit(good), engine.admit(bad)
    frames, failures = [], []
    while engine.running:
        try:
            frames += [new for n, new in engine.step().items() if n == number]
        except RequestError as error:
            failures.append(error.requests)
    assert failures == [[failing]]
    expected = alone(build_decoder("cuda"), good)
    assert torch.equal(torch.cat(frames, 1), expected)
    assert torch.equal(alone(decoder, good), expected), "the slot that held NaN serves again"


def test_several_threads_take_turns(exact):
    decoder = build_decoder("cuda")
    requests = [request(n, total=30, text=n) for n in range(4)]
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: alone(decoder, requests[n])})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, r in enumerate(requests):
        assert torch.equal(found[n], alone(build_decoder("cuda"), r))


# -- memory -------------------------------------------------------------------------------------------------------


def test_pools_grow_around_what_lives_in_them(exact):
    decoder, conditions = build_decoder("cuda"), text_conditions(1)
    first = streamed(decoder, 40, conditions, sampler_for(1, seeds=[1]), window=40, stride=20)
    frames = [next(first) for _ in range(12)]
    longer = Conditions(3, [Branch(cross=texts(40, 3, 17)), Branch()], 2)
    second = plain(decoder, 200, longer, sampler_for(3, seeds=[2, 3, 4]), window=200, stride=100)
    frames += list(first)
    fresh = build_decoder("cuda")
    assert torch.equal(second, plain(fresh, 200, longer, sampler_for(3, seeds=[2, 3, 4]), window=200, stride=100))
    whole = plain(fresh, 40, conditions, sampler_for(1, seeds=[1]), window=40, stride=20)
    assert torch.equal(torch.cat(frames, 2), whole)


def test_slots_come_back_when_nobody_holds_them():
    decoder = build_decoder("cuda")
    for _ in range(3):
        plain(decoder, 40, text_conditions(2), sampler_for(2, seeds=[1, 2]))
        engine = SlotEngine(decoder, 2, WINDOW)
        engine.admit(request(1, total=40))
        engine.step()
        engine.close()
        del engine
    gc.collect()
    assert not any(decoder._cache._taken) and not any(decoder._texts._taken)
    assert len(decoder._cache._taken) == 4, "two requests with two rows were the most"
    assert all(board.empty for board in decoder._boards) and len(decoder._boards) == 1


def test_a_large_cache_gives_way_to_what_is_asked_for():
    """Thirty seconds for one, then five seconds for many: not thirty for many."""
    decoder = build_decoder("cuda")
    del decoder.allocate(2, 1503).slots
    assert decoder._cache.capacity == 1536
    caches = [decoder.allocate(2, 250) for _ in range(8)]
    assert decoder._cache.capacity == 256 and decoder._cache.tensor.shape[2] == 16 and len(caches) == 8


def test_a_longer_window_gets_a_longer_board():
    decoder, conditions = build_decoder("cuda"), text_conditions(1)
    plain(decoder, 20, conditions, sampler_for(1, seeds=[1]))
    plain(decoder, 60, conditions, sampler_for(1, seeds=[1]), window=60, stride=30)
    gc.collect()
    plain(decoder, 90, conditions, sampler_for(1, seeds=[1]), window=90, stride=30)
    assert len(decoder._boards) == 1, "boards that nobody uses go"
    assert {key[0] for key in decoder._graphs} == {id(decoder._boards[0])}


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 64, 129])
def test_buckets(rows):
    assert heuristics.bucket(rows) >= rows and heuristics.bucket(rows) in heuristics.buckets(rows)


def test_a_window_that_is_longer_than_the_first_position_table(exact):
    model = random_model("cross", num_layers=1)
    conditions = text_conditions(1)
    prompt = torch.randint(0, 50, (1, 4, 2300), generator=torch.Generator().manual_seed(1))
    tokens = [
        plain(d, 2306, conditions, sampler_for(1, "greedy", [1]), prompt, window=2400, stride=1200)
        for d in (TorchDecoder(model), decoder_of(model))
    ]
    assert torch.equal(*tokens)


def test_frames_come_while_it_plays():
    decoder, conditions = build_decoder("cuda"), text_conditions(1)
    generation = streamed(decoder, 50, conditions, sampler_for(1, seeds=[1]))
    whole = plain(decoder, 50, conditions, sampler_for(1, seeds=[1]))
    assert torch.equal(collected(generation), whole)

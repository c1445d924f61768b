"""The engine: requests that come and go in slots, saved generations, parameters that change, what ends a run."""

from __future__ import annotations

import functools
import gc
import io
import math
import weakref

import pytest
import torch

from musicgen_fast.config import PatternConfig
from musicgen_fast.engine import Generation, generate
from musicgen_fast.pattern import build_pattern
from musicgen_fast.sampling import Draw, SamplingParams, draw
from musicgen_fast.slot_engine import Request, RequestError, SlotEngine
from musicgen_fast.state import Branch, Conditions, Sampler
from musicgen_fast.windows import WindowPlan

from .engine_tools import (
    DECODERS,
    STRIDE,
    VOCAB,
    WAYS,
    WINDOW,
    CountingTorch,
    build_decoder,
    collected,
    plain,
    prompt_of,
    sampler_for,
    streamed,
    text_conditions,
    texts,
)
from .test_decoder import random_model


@pytest.fixture(scope="module", params=DECODERS)
def decoder_for(request):
    return functools.partial(build_decoder, request.param)


@pytest.fixture(scope="module")
def decoder(decoder_for):
    return decoder_for()


@pytest.fixture(scope="module")
def conditions():
    return text_conditions(1)


# -- one batch, step by step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [PatternConfig(), PatternConfig(kind="coarse_first"), PatternConfig(kind="unroll"), PatternConfig(flatten_first=2)],
    ids=lambda p: f"{p.kind}{p.flatten_first}",
)
def test_frames_come_when_all_their_codebooks_are_known(decoder_for, pattern):
    """And not later: a frame is yielded by the step that draws its last cell."""
    decoder = decoder_for(pattern=pattern)
    conditions = text_conditions(2)
    expected = plain(decoder, 12, conditions, sampler_for(2, seeds=[1, 2]))
    table = build_pattern(pattern, 4, 12).table
    complete = [max((table == t).any(axis=1).nonzero()[0][-1] for t in range(n + 1)) for n in range(12)]
    seen = 0
    for step, frames in enumerate(streamed(decoder, 12, conditions, sampler_for(2, seeds=[1, 2]))):
        assert torch.equal(frames, expected[:, :, seen : seen + frames.shape[2]])
        seen += frames.shape[2]
        assert seen == sum(column <= step + 1 for column in complete)
    assert seen == 12


def test_the_prompt_is_not_yielded(decoder, conditions):
    prompt = prompt_of(1, 7)
    expected = plain(decoder, 40, conditions, sampler_for(1, seeds=[1]), prompt)
    assert torch.equal(expected[:, :, :7], prompt)
    generation = streamed(decoder, 40, conditions, sampler_for(1, seeds=[1]), prompt)
    assert torch.equal(collected(generation), expected[:, :, 7:])
    assert generation.done and generation.steps_done == generation.steps_total
    with pytest.raises(StopIteration):
        next(generation)


def test_closing_lets_go_of_everything(decoder_for, conditions):
    decoder = decoder_for()
    generation = streamed(decoder, None, conditions, sampler_for(1, seeds=[1]))
    for _ in range(25):
        next(generation)
    states = [weakref.ref(lane.state.kv) for lane in (generation._chain.lane, generation._chain.next)]
    generation.close()
    generation.close()
    assert list(generation) == [] and generation.done
    del generation
    gc.collect()
    assert [ref() for ref in states] == [None, None]


def test_a_generation_that_failed_has_ended(decoder_for, conditions):
    decoder = decoder_for()
    generation = streamed(decoder, 40, conditions, sampler_for(1, seeds=[1]))
    next(generation)
    decoder.break_down()
    with pytest.raises(ValueError, match="NaN"):
        next(generation)
    assert generation.done and list(generation) == []
    with pytest.raises(ValueError, match="ended"):
        generation.save()


def test_two_generations_at_once_do_not_meet(decoder):
    a, b = text_conditions(1, seed=1), text_conditions(2, seed=2)
    expected = plain(decoder, 50, a, sampler_for(1, seeds=[1])), plain(decoder, 60, b, sampler_for(2, seeds=[2, 3]))
    runs = streamed(decoder, 50, a, sampler_for(1, seeds=[1])), streamed(decoder, 60, b, sampler_for(2, seeds=[2, 3]))
    parts = [], []
    while not all(run.done for run in runs):
        for run, frames in zip(runs, parts, strict=True):
            frames += [next(run)] if not run.done else []
    for frames, whole in zip(parts, expected, strict=True):
        assert torch.equal(torch.cat(frames, 2), whole)


def test_sizes_that_do_not_fit(decoder, conditions):
    with pytest.raises(ValueError, match="prompt of 0 frames, got 3"):
        Generation(decoder, WindowPlan(40, 30, 18), prompt_of(1, 3), lambda _: conditions, sampler_for(1))
    with pytest.raises(ValueError, match="1 guidance"):
        streamed(decoder, 40, text_conditions(2), sampler_for(2), guidance=[None])
    with pytest.raises(ValueError, match="conditions for 2 requests"):
        list(Generation(decoder, WindowPlan(40, 30, 18), prompt_of(1), lambda _: text_conditions(2), sampler_for(1)))


# -- saved and resumed ---------------------------------------------------------------------------------------------


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Before the first step, in the first window, around the birth of the shadow (step 10), at all columns of a tail (15 to
# 17), in a window that was a shadow and its own shadow's life.
STOPS = (0, 1, 5, 9, 10, 12, 14, 15, 16, 17, 18, 19, 22)
SHORT = {"window": 14, "stride": 9}


@pytest.mark.parametrize("shadow", [True, False], ids=["shadow", "prefill"])
@pytest.mark.parametrize("seeds", [None, [5, 6]], ids=["noise", "seed"])
def test_a_resumed_generation_goes_on_identically(decoder, seeds, shadow):
    conditions = text_conditions(2)
    torch.manual_seed(4)
    expected = plain(decoder, 25, conditions, sampler_for(2, seeds=seeds), **SHORT)
    for stop in STOPS if shadow else (0, 5, 17, 18, 20):
        torch.manual_seed(4)
        generation = streamed(decoder, 25, conditions, sampler_for(2, seeds=seeds), shadow=shadow, **SHORT)
        head = [next(generation) for _ in range(stop)]
        saved = through_a_file(generation.save())
        total = generation.steps_total
        generation.close()
        torch.manual_seed(1234)
        other = text_conditions(2)  # encoded again elsewhere
        options = {"shadow": shadow, "saved": saved, **SHORT}
        resumed = streamed(decoder, 25, other, sampler_for(2, seeds=seeds), **options)
        assert (resumed.steps_done, resumed.steps_total) == (stop, total)
        assert torch.equal(torch.cat([*head, collected(resumed)], 2), expected), stop
        assert resumed.steps_done == total


def test_saving_disturbs_nothing(decoder, conditions):
    generation = streamed(decoder, 25, conditions, sampler_for(1, seeds=[5]), **SHORT)
    frames = []
    for new in generation:
        frames.append(new)
        if not generation.done:
            generation.save()
    assert torch.equal(torch.cat(frames, 2), plain(decoder, 25, conditions, sampler_for(1, seeds=[5]), **SHORT))


def test_conditions_that_were_drawn_are_saved(decoder_for):
    """A style excerpt drawn at random is not drawn again; prompts and prefixes of unequal lengths."""
    decoder = decoder_for("prefix")
    prompt, plan = prompt_of(2, 3), WindowPlan(40, WINDOW, STRIDE, 3)

    def conditions_of(window):
        return Conditions(2, [Branch(prefix=[torch.randn(5, 32), torch.randn(2, 32)]), Branch(prefix=texts(1, 1))], 2)

    torch.manual_seed(2)
    expected = collected(Generation(decoder, plan, prompt, conditions_of, sampler_for(2)))
    for stop in (0, 1, 10, 30, 31):
        torch.manual_seed(2)
        generation = Generation(decoder, plan, prompt, conditions_of, sampler_for(2))
        head = [next(generation) for _ in range(stop)]
        saved = through_a_file(generation.save())
        torch.manual_seed(77)
        resumed = Generation(decoder, plan, prompt, conditions_of, sampler_for(2), saved=saved)
        assert torch.equal(torch.cat([*head, collected(resumed)], 2), expected), stop


def test_states_of_something_else_are_refused(decoder, conditions):
    generation = streamed(decoder, 60, conditions, sampler_for(1, seeds=[5]))
    next(generation)
    saved = generation.save()
    for bad, options in (
        ({}, {}),
        ({**saved, "format": 99}, {}),
        (saved, {"window": 20, "stride": 12}),
        (saved, {"prompt": prompt_of(1, 2)}),
    ):
        with pytest.raises(ValueError, match="saved"):
            streamed(decoder, 60, conditions, sampler_for(1, seeds=[5]), saved=bad, **options)
    with pytest.raises(ValueError, match="another generation"):
        streamed(decoder, 60, text_conditions(2), sampler_for(2, seeds=[5, 6]), saved=saved)


# -- parameters over time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shadow", [True, False], ids=["shadow", "prefill"])
def test_guidance_over_time(decoder, shadow):
    """The values of a column are those of its newest frame, in every window and both lanes of a tail."""
    conditions, seeds = text_conditions(2), [5, 6]
    base = plain(decoder, 60, conditions, sampler_for(2, seeds=seeds))

    def run(*guidance):
        return collected(
            streamed(decoder, 60, conditions, sampler_for(2, seeds=seeds), shadow=shadow, guidance=guidance)
        )

    asked = []
    assert torch.equal(run(lambda frame: asked.append(frame) or (2.0, 1.0), None), base)
    assert asked == [*range(30), 29, 29, 29, *range(30, 48), 47, 47, 47, *range(48, 60), 59, 59, 59] or shadow
    assert sorted(asked) == sorted([*range(60), 29, 29, 29, 47, 47, 47, 59, 59, 59])
    changed = run(None, lambda frame: (2.0, 0.0) if frame >= 40 else (2.0, 1.0))
    assert torch.equal(changed[0], base[0]) and torch.equal(changed[1, 0, :40], base[1, 0, :40])
    assert not torch.equal(changed[1, :, 40:], base[1, :, 40:])
    stronger = run(lambda frame: (6.0, 1.0), None)
    params = SamplingParams.build(2, 4, cfg_coef=torch.tensor([6.0, 2.0]), cfg_coef_beta=1.5, top_k=20)
    assert torch.equal(stronger, plain(decoder, 60, conditions, Sampler(params, torch.tensor(seeds))))


def test_guidance_with_and_without_shadows_is_the_same(decoder, conditions):
    def sweep(frame):
        return 1.0 + frame / 20, 1.3 - frame / 60

    tokens = []
    for shadow in (True, False):
        sampler = sampler_for(1, seeds=[5])
        tokens.append(collected(streamed(decoder, 75, conditions, sampler, shadow=shadow, guidance=[sweep])))
    assert torch.equal(*tokens)


def test_a_temperature_of_zero_and_back(decoder, conditions):
    """Greedy at first: the sampler must notice that it draws again."""
    greedy = plain(decoder, 30, conditions, sampler_for(1, "greedy", seeds=[1]))
    both = collected(
        streamed(decoder, 30, conditions, sampler_for(1, "greedy", seeds=[1]),
                 guidance=[lambda frame: (2.0, 0.0 if frame < 10 else 1.5)])
    )  # fmt: skip
    assert torch.equal(both[:, 0, :10], greedy[:, 0, :10]) and not torch.equal(both, greedy)


# -- slots ---------------------------------------------------------------------------------------------------------


def request(seed, total=20, window=WINDOW, stride=STRIDE, text=0, prompt=0, branches=2, way="top-k", **options):
    conditions = text_conditions(1, branches, seed=text)
    params = SamplingParams.build(1, 4, cfg_coef=2.0, cfg_coef_beta=1.5, **WAYS[way])
    return Request(prompt_of(1, prompt)[0], total, window, stride, lambda _: conditions, params, seed, **options)


def alone(decoder, r: Request):
    sampler = Sampler(r.params, torch.tensor([r.seed]))
    windows, prompt = list(r.plan()), r.prompt[None]
    return generate(decoder, windows, prompt, r.conditions_of, sampler)[0, :, prompt.shape[2] :]


MIX = [
    (0, request(1, total=70, text=1)),
    (0, request(2, total=9, text=2, way="greedy")),
    (4, request(3, total=33, text=3, prompt=5, way="top-p")),
    (13, request(2**63 - 1, total=50, window=20, stride=12, text=4)),
    (20, request(-4, total=25, text=5, branches=1, way="plain")),
    (22, request(5, total=31, text=6, branches=3)),
    (60, request(6, total=4, text=7)),
]


@pytest.mark.parametrize("shadow", [True, False], ids=["shadow", "prefill"])
def test_requests_come_and_go(decoder, shadow):
    """Different lengths, windows, texts, parameters, numbers of branches and times: each as if it were alone."""
    engine = SlotEngine(decoder, 4, WINDOW, shadow=shadow)
    waiting, frames, ends, step = list(MIX), {}, {}, 0
    requests = {}
    while waiting or engine.running:
        while waiting and waiting[0][0] <= step and engine.free:
            (number,) = engine.admit(waiting[0][1])
            requests[number] = waiting.pop(0)[1]
            ends[number] = step + engine.steps_left(number)
        for number, new in engine.step().items():
            frames.setdefault(number, []).append(new)
        step += 1
        for number in requests.keys() - set(engine.running) - {n for n, end in ends.items() if end is None}:
            assert ends[number] == step, "the end was known on admission"
            ends[number] = None
    assert engine.free == 4 and len(requests) == len(MIX)
    for number, r in requests.items():
        assert torch.equal(torch.cat(frames[number], 1), alone(decoder, r)), number


def test_rows_of_free_slots_cost_nothing(decoder_for):
    decoder = decoder_for()
    engine = SlotEngine(decoder, 8, WINDOW)
    engine.admit(request(1, total=10))
    engine.admit(request(2, total=20))
    while engine.running:
        engine.step()
    assert decoder.rows == [2, 2] + [4] * 12 + [2] * 10, "the two prefills, then both, then one"


def test_slots_and_caches_are_used_again(decoder_for):
    decoder = decoder_for()
    engine = SlotEngine(decoder, 2, WINDOW)
    for seed in range(6):
        (number,) = engine.admit(request(seed, total=50))
        while number in engine.running:
            engine.step()
    assert decoder.allocated == 2, "the lane and its shadow"
    assert engine.free == 2 and (engine.slots.place.column == engine.slots.num_steps).all()


def test_cancelling_at_any_time(decoder):
    keep = request(1, total=60, text=1)
    expected = alone(decoder, keep)
    for moment in (0, 1, 10, 19, 31, 34):
        engine = SlotEngine(decoder, 2, WINDOW)
        endless, number = engine.admit(request(9, total=None, text=2))[0], engine.admit(keep)[0]
        assert engine.steps_left(endless) is None and engine.steps_left(number) == 63
        frames = []
        for step in range(63):
            if step == moment:
                engine.cancel(endless)
                assert engine.free == 1 and engine.running == [number]
                with pytest.raises(ValueError, match="is not running"):
                    engine.cancel(endless)
            frames.append(engine.step()[number])
        assert torch.equal(torch.cat(frames, 1), expected) and not engine.running


def test_full_engines_and_long_windows(decoder):
    engine = SlotEngine(decoder, 2, WINDOW)
    with pytest.raises(ValueError, match="do not fit slots of 30"):
        engine.admit(request(1, total=40, window=31))
    with pytest.raises(ValueError, match=r"\[4, frames\]"):
        engine.admit(Request(torch.zeros(3, 0), 10, 30, 18, lambda _: None, SamplingParams.build(1, 3), 1))
    engine.admit(request(1), request(2))
    with pytest.raises(ValueError, match="1 slots side by side are needed, 0 in all are free"):
        engine.admit(request(3))
    engine.close()
    assert engine.free == 2 and engine.step() == {}
    with pytest.raises(ValueError, match="agree"):
        engine.admit(request(1), request(2, total=21))
    with pytest.raises(ValueError, match="same branches"):
        engine.admit(request(1), request(2, branches=1))
        engine.step()


def test_a_batch_in_lockstep_equals_its_requests(decoder):
    engine = SlotEngine(decoder, 3, WINDOW)
    requests = [request(seed, total=55, text=seed) for seed in (1, 2, 3)]
    numbers = engine.admit(*requests)
    frames = {number: [] for number in numbers}
    while engine.running:
        if sum(f.shape[1] for f in frames[numbers[1]]) == 20 and numbers[1] in engine.running:
            engine.cancel(numbers[1])
        for number, new in engine.step().items():
            frames[number].append(new)
    for number, r in zip(numbers, requests, strict=True):
        expected = alone(decoder, r)
        assert torch.equal(torch.cat(frames[number], 1), expected[:, : 20 if number == numbers[1] else None])


def test_noise_mode_is_for_a_batch_of_its_own(decoder):
    """Admitted together into an empty engine it draws what `generate` draws; anything else is refused."""
    conditions = text_conditions(2)
    torch.manual_seed(8)
    expected = plain(decoder, 50, conditions, sampler_for(2))
    parts = [Conditions(1, [Branch(cross=[c]), Branch()], 2) for c in conditions.branches[0].cross]
    noise = [request(None, total=50) for _ in parts]
    for r, part in zip(noise, parts, strict=True):
        r.conditions_of = lambda _, part=part: part
    engine = SlotEngine(decoder, 4, WINDOW)
    torch.manual_seed(8)
    numbers = engine.admit(*noise)
    frames = []
    while engine.running:
        for newcomer in (request(1), request(None)):
            with pytest.raises(ValueError, match="noise mode"):
                engine.admit(newcomer)
        new = engine.step()
        frames.append(torch.stack([new[n] for n in numbers]))
    assert torch.equal(torch.cat(frames, 2), expected)
    engine.admit(request(1))
    with pytest.raises(ValueError, match="noise mode"):
        engine.admit(request(None))
    with pytest.raises(ValueError, match="either all"):
        SlotEngine(decoder, 4, WINDOW).admit(request(1), request(None))


@pytest.mark.parametrize("at_once", [True, False], ids=["prefill", "step"])
def test_a_request_that_fails_takes_no_other_with_it(decoder, at_once):
    good, bad = request(1, total=40, text=1), request(2, total=40, text=2)
    broken = Conditions(1, [Branch(cross=[torch.full((3, 32), math.nan)]), Branch()], 2)
    healthy = bad.conditions_of(None)
    bad.conditions_of = lambda window: broken if at_once or window.start else healthy
    engine = SlotEngine(decoder, 2, WINDOW)
    (number,), (failing,) = engine.admit(good), engine.admit(bad)
    frames, failures = [], []
    while engine.running:
        try:
            frames += [new for n, new in engine.step().items() if n == number]
        except RequestError as error:
            failures.append(error)
            assert error.requests == [failing] and "NaN" in str(error)
            assert engine.running == [number] and engine.free == 1
    assert len(failures) == 1 and torch.equal(torch.cat(frames, 1), alone(decoder, good))


class FixedShape(CountingTorch):
    """A torch decoder like those that replay a graph: one draw for all rows of the slots, whoever is in them."""

    def __init__(self, transformer):
        super().__init__(transformer)
        self.slots, self.launches = None, 0

    @torch.no_grad()
    def step(self, *states):
        drawing = {row for state in states if not state.follows for row in state.rows}
        others = [row for row in range(len(self.slots.seeds)) if row not in drawing]
        assert (self.slots.place.column[others] >= self.slots.num_steps).all(), "the launch must do nothing there"
        lanes, logits = self._forward(states)
        place, seeds = self.slots.place, self.slots.seeds
        whole = torch.full((2, len(seeds), 4, VOCAB), math.nan)
        for lane in lanes:
            rows = lane.state.rows
            whole[:, rows.start : rows.stop] = lane.state.conditions.expand_logits(logits[lane.rows])
        inputs = Draw(whole, self.slots.launch_params(states), place.sequence, place.status, column=place.column)
        inputs.frames, inputs.seed, inputs.step, inputs.stream = place.frames, seeds, place.step, seeds * 0
        draw(inputs, "torch")
        drawn = [state for state in states if not state.follows]
        place.column.add_(1)  # of free and following rows too: they stay outside
        for state in drawn:
            state.place.step.add_(1)
        for state in states:
            state.drawn()
        assert not place.status.any()
        self.launches += 1


@pytest.mark.parametrize("shadow", [True, False], ids=["shadow", "prefill"])
def test_one_launch_over_all_slots_serves_any_mix(shadow):
    """Free slots, shadows, other lengths, prompts: the tensors alone say what is drawn where."""
    decoder = FixedShape(random_model("cross"))
    engine = SlotEngine(decoder, 4, WINDOW, shadow=shadow)
    decoder.slots = engine.slots
    mix = [r for _, r in MIX if r.conditions_of(None).mix == 2]
    frames, requests, step = {}, {}, 0
    for r in mix[:4]:
        (number,) = engine.admit(r)
        requests[number] = r
        frames[number] = []
        for _ in range(3):
            for n, new in engine.step().items():
                frames[n].append(new)
    while engine.running:
        for n, new in engine.step().items():
            frames[n].append(new)
        step += 1
    assert decoder.launches > step
    for number, r in requests.items():
        assert torch.equal(torch.cat(frames[number], 1), alone(build_decoder("torch"), r))

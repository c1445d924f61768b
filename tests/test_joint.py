"""One draw for lanes side by side: the tokens of a draw for each, for any mixture; and what ends in the same step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from musicgen_fast import native, place
from musicgen_fast.config import ModelConfig
from musicgen_fast.joint import Draws
from musicgen_fast.pattern import UNKNOWN, build_pattern
from musicgen_fast.place import Sampler
from musicgen_fast.sampling import SamplingParams
from musicgen_fast.slot_engine import RequestError, SlotEngine
from musicgen_fast.slots import Slots
from musicgen_fast.state import Branch, Conditions, State

from .engine_tools import DECODERS, VOCAB, build_decoder
from .test_decoder import random_model
from .test_engine import MIX, alone, request

BOOKS, FRAMES = 4, 12
PARAMS = [
    {"top_k": 5, "cfg_coef": 3.0},
    {"top_p": 0.7, "temperature": 1.3},
    {"temperature": 0.0},
    {"min_p": 0.1, "cfg_coef": 1.5, "cfg_coef_beta": 4.0},
    {},
]


class Following:
    """A source that is copied from column to column: 7 where nothing is masked."""

    def __init__(self, first: int):
        self.first = first

    def copy(self, state: State) -> None:
        if state.column < self.first:
            state.sequence[:, :, state.column] = 7


def lane(slots: Slots, config: ModelConfig, rows: range, branches: int, mix: int, number: int, seeded: bool) -> State:
    """A lane at a column of its own; every fifth cell of that column is known."""
    batch = len(rows)
    params = SamplingParams.build(batch, BOOKS, **PARAMS[number % len(PARAMS)])
    sampler = slots.sampler(rows, Sampler(params, torch.arange(batch) + 100 * number if seeded else None))
    conditions = Conditions(batch, [Branch() for _ in range(branches)], mix)
    state = State(
        config, None, [0] * conditions.num_rows, conditions, sampler,
        place=slots.place.rows(rows.start, rows.stop), slots=slots, rows=rows,
    )  # fmt: skip
    pattern = build_pattern(config.pattern, BOOKS, FRAMES)
    sequence = pattern.build(torch.full((batch, BOOKS, FRAMES), UNKNOWN), config.special_token)
    column = 3 + number % 7
    sequence[:, number % BOOKS, column] = 11
    state.begin_at(pattern, sequence, column, 50 * number)
    return state


def lanes(slots: Slots, config: ModelConfig) -> list[State]:
    """(slots, branches, mix): batches of two among them, gaps, two kinds of guidance, rows in no order."""
    kinds = [(6, 1, 2, 2), (0, 1, 2, 2), (1, 2, 2, 2), (3, 1, 1, 1), (4, 1, 3, 3), (5, 1, 3, 3), (8, 1, 2, 2),
             (9, 2, 2, 3), (11, 1, 2, 3), (12, 1, 2, 2), (13, 1, 2, 2), (14, 1, 2, 2)]  # fmt: skip
    made = [
        lane(slots, config, range(first, first + batch), branches, mix, number, seeded=first != 14)
        for number, (first, batch, branches, mix) in enumerate(kinds)
    ]
    follower = made[1]
    follower.source = Following(first=99)
    follower.place.column.fill_(slots.num_steps)
    return made


def whole(slots: Slots) -> dict[str, Tensor]:
    own = slots.place
    return {"sequence": own.sequence, "column": own.column, "step": own.step, "status": own.status}


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_one_draw_gives_the_tokens_of_many(backend, monkeypatch):
    """Filters, temperatures, guidance, branches, batches, known cells, a shadow, a lane in noise mode."""
    monkeypatch.setenv("MUSICGEN_FAST_SAMPLER", backend)
    config = random_model("cross").config
    calls = []
    monkeypatch.setattr(place, "draw", lambda inputs, name, real=place.draw: (calls.append(inputs), real(inputs, name)))
    found = []
    for joint in (True, False):
        slots = Slots(config, 16, FRAMES)
        states = lanes(slots, config)
        for step in range(5):
            g = torch.Generator().manual_seed(step)
            logits = 3 * torch.randn(sum(len(s.lengths) for s in states), BOOKS, VOCAB, generator=g)
            torch.manual_seed(step)
            calls.clear()
            if joint:
                draws = Draws(states)
                draws.draw(logits[draws.wanted])
                # 6 | 1 2 | 8 | 12 13, then 3, then 4 5, then 9 10 11, then 14, which takes its noise from torch
                assert len(calls) == 8 and sum(len(c.tokens) for c in calls) == 13
            else:
                for state, own in zip(states, logits.split([len(s.lengths) for s in states]), strict=True):
                    state.write_column(own)
                assert len(calls) == 11
        assert [s.column for s in states] == [8 + n % 7 for n in range(12)]
        found.append(whole(slots))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert (found[0]["sequence"] == UNKNOWN).any() and (found[0]["sequence"][0] == 7).any()


def test_a_draw_that_fails_comes_after_all_others():
    config = random_model("cross").config
    slots = Slots(config, 4, FRAMES)
    states = [lane(slots, config, range(n, n + 1), 2, 2, n, seeded=True) for n in range(4)]
    logits = torch.randn(8, BOOKS, VOCAB)
    logits[4:6] = math.nan
    draws = Draws(states)
    with pytest.raises(ValueError, match=r"\(request, codebook\) \[\(0, "):
        draws.draw(logits[draws.wanted])
    assert [s.column for s in states] == [4 + n for n in range(4)]
    assert slots.place.status.any(1).tolist() == [False, False, True, False]


@pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")
def test_requests_with_the_same_branches_are_drawn_at_once(monkeypatch):
    calls = []
    monkeypatch.setattr(place, "draw", lambda inputs, name, real=place.draw: (calls.append(inputs), real(inputs, name)))
    engine = SlotEngine(build_decoder("cpu"), 8, 30, shadow=False)
    for seed in range(6):
        engine.admit(request(seed, total=20, text=seed, way=["top-k", "top-p", "plain", "greedy"][seed % 4]))
    engine.step()
    calls.clear()
    engine.step()
    assert [len(inputs.tokens) for inputs in calls] == [6]


# -- what ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_frames_of_those_that_ended(name):
    """All frames at once are those of every step; what was given before is not given again."""
    decoder = build_decoder(name)
    engine = SlotEngine(decoder, 7, 30)
    requests = {engine.admit(r)[0]: r for _, r in MIX}
    early = {number: [new] for number, new in engine.step().items()}
    for _ in range(5):
        for number, new in engine.step().items():
            early[number].append(new)
    ended = {}
    while engine.running:
        before = set(engine.running)
        new = engine.step(whole=True)
        assert new.keys() == before - set(engine.running)
        ended |= new
    for number, r in requests.items():
        tokens = torch.cat([*early[number], *([ended[number]] if number in ended else [])], 1)
        assert torch.equal(tokens, alone(decoder, r)), number


@pytest.mark.parametrize("name", DECODERS)
def test_a_request_that_ends_while_another_fails(name):
    """Its last frames come with the next step."""
    decoder = build_decoder(name)
    good, bad = request(1, total=20), request(2, total=40, window=20, stride=12)
    broken = Conditions(1, [Branch(cross=[torch.full((3, 32), math.nan)]), Branch()], 2)
    healthy = bad.conditions_of(None)
    bad.conditions_of = lambda window: broken if window.start else healthy
    engine = SlotEngine(decoder, 2, 30, shadow=False)
    (failing,) = engine.admit(bad)
    engine.step()
    (number,) = engine.admit(good)  # its last step is the one in which the other one begins its second window
    ended = {}
    while number not in ended:
        try:
            ended |= engine.step(whole=True)
        except RequestError as error:
            assert error.requests == [failing] and engine.steps_left(number) == 0
    assert torch.equal(ended[number], alone(decoder, good)) and engine.free == 2 and not engine.running

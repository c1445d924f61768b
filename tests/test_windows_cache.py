"""Windows with one cache: the shadow's tokens are those of a prefill per window, and no step at a change is long."""

from __future__ import annotations

import functools
import types

import pytest
import torch

from musicgen_fast.config import GenerationParams, PatternConfig
from musicgen_fast.engine import Generation, generate
from musicgen_fast.packing import PackedWeights
from musicgen_fast.pattern import build_pattern
from musicgen_fast.shadow import Overlap, overlap_of
from musicgen_fast.state import Branch, Conditions, Sampler
from musicgen_fast.windows import WindowPlan

from .engine_tools import (
    DECODERS,
    STEREO,
    STRIDE,
    WINDOW,
    build_decoder,
    collected,
    plain,
    prompt_of,
    sampler_for,
    streamed,
    text_conditions,
    texts,
)
from .oracle import audiocraft_lm as ac
from .oracle import ours

# One window; two that end right behind the first or anywhere; the last of three and more windows likewise.
TOTALS = (20, 30, 31, 33, 34, 47, 48, 49, 51, 66, 69, 84, 88, 103, 121, 150)


def both(decoder, total, conditions, sampler_of, **options):
    """Tokens and final state of the global generator, with prefills and with shadows."""
    results = []
    for run in (plain, counted):
        torch.manual_seed(9)
        tokens = run(decoder, total, conditions, sampler_of(), **options)
        results.append((tokens, torch.get_rng_state()))
    return results


def counted(decoder, total, conditions, sampler, **options):
    generation = streamed(decoder, total, conditions, sampler, **options)
    tokens = collected(generation, options.get("prompt"))
    assert generation.steps_done == generation.steps_total, "the end is known from the beginning"
    return tokens


def check(decoder, total, conditions, sampler_of, **options):
    (expected, rng), (tokens, rng_after) = both(decoder, total, conditions, sampler_of, **options)
    assert tokens.shape == (conditions.batch, decoder.config.num_codebooks, total)
    assert torch.equal(tokens, expected)
    assert torch.equal(rng, rng_after)
    return tokens


@pytest.fixture(scope="module", params=DECODERS)
def decoder_for(request):
    return functools.partial(build_decoder, request.param)


@pytest.fixture(scope="module")
def decoder(decoder_for):
    return decoder_for()


@pytest.fixture(scope="module")
def conditions():
    return text_conditions(1)


@pytest.mark.parametrize("seeds", [None, [7]], ids=["noise", "seed"])
@pytest.mark.parametrize("total", TOTALS)
def test_every_duration(decoder, conditions, total, seeds):
    tokens = check(decoder, total, conditions, lambda: sampler_for(1, "top-k", seeds))
    assert len(tokens.unique()) > 30, "a wrong draw might go unseen"


@pytest.mark.parametrize("seeds", [None, [7, 8, 2**40]], ids=["noise", "seed"])
@pytest.mark.parametrize("way", ["top-k", "top-p", "plain", "greedy"])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_batches_branches_and_filters(decoder, branches, way, seeds):
    check(decoder, 71, text_conditions(3, branches), lambda: sampler_for(3, way, seeds))


@pytest.mark.parametrize("seeds", [None, [3, 4]], ids=["noise", "seed"])
def test_stereo(decoder_for, seeds):
    decoder = decoder_for(num_codebooks=8, pattern=STEREO)
    for total in (70, 85):
        check(decoder, total, text_conditions(2), lambda: sampler_for(2, "top-k", seeds, 8))


@pytest.mark.parametrize("seeds", [None, [3]], ids=["noise", "seed"])
@pytest.mark.parametrize(
    "pattern,codebooks",
    [
        (PatternConfig(kind="parallel"), 4),
        (PatternConfig(delays=(1, 2, 3, 4)), 4),
        (PatternConfig(delays=(0, 2, 5)), 3),
        (PatternConfig(empty_initial=2), 4),
        (PatternConfig(delays=(0,)), 1),
    ],
    ids=["parallel", "late", "gaps", "empty", "one"],
)
def test_other_delays(decoder_for, pattern, codebooks, seeds):
    """No tail, a first codebook that is late, delays with gaps, more special columns, a single codebook."""
    decoder = decoder_for(num_codebooks=codebooks, pattern=pattern)
    for total in (70, 85):
        decoder.prefilled.clear()
        check(decoder, total, text_conditions(1), lambda: sampler_for(1, "top-k", seeds, codebooks))
        assert len(decoder.prefilled) > 1 and max(decoder.prefilled[-1:]) < 5, "the last run prefilled no window"


@pytest.mark.parametrize("stride", [17, 18, 21, 26, 28, 29])
def test_strides_down_to_an_overlap_of_one_frame(decoder, conditions, stride):
    """Overlaps shorter than the longest delay too: there the copied columns have masked cells."""
    for seeds in (None, [3]):
        decoder.prefilled.clear()
        check(decoder, 95, conditions, lambda s=seeds: sampler_for(1, "plain", s), stride=stride)
    assert decoder.prefilled[-1] == 1 and decoder.prefilled[-2] > 1


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 5},
        {"stride": 15},
        {"stride": 16},
        {"prompt": prompt_of(1, 19)},
        {"prompt": prompt_of(1, 17)},
        {"prompt": prompt_of(1, 41)},
    ],
    ids=lambda o: str({k: getattr(v, "shape", v) for k, v in o.items()}),
)
def test_overlaps_that_need_a_prefill_have_one(decoder, conditions, options):
    """More than one shadow would be alive, or the window's prompt already reaches into the next window's columns."""
    for seeds in (None, [3]):
        decoder.prefilled.clear()
        check(decoder, 100, conditions, lambda s=seeds: sampler_for(1, "top-k", s), **options)
    shadowless = options.get("stride", STRIDE) < 17
    windows = len([n for n in decoder.prefilled if n > 1])
    assert (windows > 6) if shadowless else (windows < 8)


@pytest.mark.parametrize(
    "options,prefills",
    [
        ({"window": 31, "stride": 17}, [1]),
        ({"window": 31, "stride": 16}, [1, 16]),
        ({"prompt": prompt_of(1, 17)}, [18]),
        ({"prompt": prompt_of(1, 18)}, [19, 13]),
    ],
    ids=["stride 17", "stride 16", "prompt 17", "prompt 18"],
)
def test_where_a_shadow_just_fits(decoder, conditions, options, prefills):
    """Positions of the prefills: a shadow begins when the window before it is alone, not a column earlier."""
    check(decoder, 60, conditions, lambda: sampler_for(1), **options)
    decoder.prefilled.clear()
    counted(decoder, 60, conditions, sampler_for(1), **options)
    assert decoder.prefilled == prefills


@pytest.mark.parametrize("kind", ["unroll", "flatten_first"])
def test_patterns_that_are_no_delays(decoder_for, conditions, kind):
    pattern = PatternConfig(flatten_first=3) if kind == "flatten_first" else PatternConfig(kind=kind)
    decoder = decoder_for(pattern=pattern)
    check(decoder, 60, conditions, lambda: sampler_for(1))
    assert len(decoder.prefilled) == 6, "three windows, both ways"


def test_conditions_per_window_are_asked_for_in_turn(decoder_for):
    """Prefixes are cut anew per window: asked for at the change, not before (what draws them is in order)."""
    decoder = decoder_for("prefix")
    asked = {
        window: Conditions(1, [Branch(prefix=texts(4, seed=window)), Branch(prefix=texts(2, seed=9))], 2)
        for window in (0, STRIDE, 2 * STRIDE)
    }
    plan, empty = WindowPlan(60, WINDOW, STRIDE), prompt_of(1)
    torch.manual_seed(1)
    expected = generate(decoder, list(plan), empty, lambda w: asked[w.start], sampler_for(1))
    seen = []
    torch.manual_seed(1)
    generation = Generation(
        decoder, plan, empty, lambda w: seen.append((w.start, generation.steps_done)) or asked[w.start], sampler_for(1)
    )
    assert torch.equal(collected(generation), expected)
    assert seen == [(0, 0), (18, 33), (36, 33 + 21)]


def test_texts_may_change_from_window_to_window(decoder):
    asked = {window: text_conditions(1, seed=window) for window in (0, STRIDE, 2 * STRIDE)}
    plan, empty = WindowPlan(60, WINDOW, STRIDE), prompt_of(1)
    expected = generate(decoder, list(plan), empty, lambda w: asked[w.start], sampler_for(1, seeds=[1]))
    decoder.prefilled.clear()
    tokens = collected(Generation(decoder, plan, empty, lambda w: asked[w.start], sampler_for(1, seeds=[1])))
    assert torch.equal(tokens, expected) and decoder.prefilled == [1]
    assert not torch.equal(tokens, plain(decoder, 60, asked[0], sampler_for(1, seeds=[1])))


def test_no_step_at_a_change_is_long_and_nothing_is_computed_twice(decoder_for, conditions):
    """Counted: one prefill of one position, at most twice the rows, one projection of the text, two caches."""
    decoder = decoder_for()
    generation = streamed(decoder, 200, conditions, sampler_for(1, seeds=[1]))
    sizes = [frames.shape[2] for frames in generation]
    assert decoder.prefilled == [1] and decoder.projected == 1 and decoder.allocated == 2
    assert decoder.rows[0] == 2 and set(decoder.rows[1:]) == {2, 4}
    assert sizes == [0, 0, 0] + [1] * 200, "a frame a step, over all changes"
    assert generation.steps_done == generation.steps_total == 203
    assert len(decoder.rows) == 203
    # the shadow consumes 13 columns and lives through the 3 of the tail
    changes = decoder.rows.count(4) / (13 + 2)
    assert changes == len(range(18, 200 - 12, 18))


@pytest.mark.parametrize("name", DECODERS[:2])  # the CUDA decoder's draws are kernels of its step
def test_shadows_draw_nothing(name, conditions, monkeypatch):
    """One row a step, two in the three steps of a tail; the columns of seeded noise are those of a prefill."""
    decoder = build_decoder(name)
    drawn, inner = [], Sampler.__call__

    def recorded(self, logits, place):
        drawn.extend((generation.steps_done, step) for step in place.step.tolist())  # both lanes of a tail at once
        inner(self, logits, place)

    monkeypatch.setattr(Sampler, "__call__", recorded)
    generation = streamed(decoder, 48, conditions, sampler_for(1, seeds=[1]))
    collected(generation)
    expected = [(step, step + 1) for step in range(33)]
    expected += [(step, step + 1) for step in range(30, 51)]
    assert sorted(drawn) == sorted(expected)


@pytest.mark.parametrize("seeds", [None, [5, 6]], ids=["noise", "seed"])
def test_endless_runs_begin_like_shorter_ones(decoder, seeds):
    """All but the frames after the shorter run's last column, whose input it masks."""
    conditions = text_conditions(2)
    torch.manual_seed(3)
    expected = plain(decoder, 120, conditions, sampler_for(2, seeds=seeds))
    torch.manual_seed(3)
    generation = streamed(decoder, None, conditions, sampler_for(2, seeds=seeds))
    assert generation.steps_total is None
    frames = torch.cat([next(generation) for _ in range(150)], dim=2)
    assert frames.shape[2] == 147
    whole = 120 - 12 - (120 - 12) % STRIDE  # frames of the windows that both runs have as a whole
    assert torch.equal(frames[:, :, :whole], expected[:, :, :whole])
    generation.close()


def test_endless_runs_keep_no_more_than_two_windows(decoder, conditions):
    """Bytes of everything that a running generation refers to, after five windows, ten and more than twenty."""
    generation = streamed(decoder, None, conditions, sampler_for(1, seeds=[1]))
    sizes = []
    for _ in range(2):
        for _ in range(5 * STRIDE):
            next(generation)
        sizes.append(bytes_of(generation))
    for _ in range(12 * STRIDE):
        next(generation)
    sizes.append(bytes_of(generation))
    assert sizes[0] == sizes[1] == sizes[2]


def bytes_of(root) -> int:
    """Of every tensor and cache reachable from an object of the engine; the model and its functions left out."""
    found, seen, todo = {}, set(), [root]
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, (type, types.FunctionType, types.ModuleType, torch.nn.Module, PackedWeights)):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif type(x).__name__ == "CpuCache":
            found[id(x)] = x.bytes
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, (list, tuple, set)):
            todo += x
        elif type(x).__module__.startswith("musicgen_fast") or type(x).__module__.startswith("tests"):
            slots = [n for n in dir(type(x)) if isinstance(getattr(type(x), n), types.MemberDescriptorType)]
            todo += [getattr(x, name) for name in slots] + list(getattr(x, "__dict__", {}).values())
    return sum(found.values())


def test_overlaps_of_tables():
    for config, codebooks in ((STEREO, 8), (PatternConfig(), 4)):
        old, new = (build_pattern(config, codebooks, n) for n in (1500, 700))
        assert overlap_of(old, new, 900, 600) == Overlap(shift=900, first=601, tail=3)
    for config in (PatternConfig(kind="unroll"), PatternConfig(flatten_first=3), PatternConfig(kind="musiclm")):
        old = build_pattern(config, 4, 30)
        assert overlap_of(old, old, 18, 12) is None


@ac.needs_audiocraft
@pytest.mark.parametrize("kind", ["text", "stereo"])
def test_tokens_of_extended_generation(kind):
    """audiocraft's own, with its global generator: 3 windows of 50 frames, 30 apart, each the shadow of the last."""
    theirs = ac.build_musicgen(kind, num_layers=2)
    theirs.max_duration = 2
    theirs.set_generation_params(duration=4.2, extend_stride=1.2, top_k=50)
    torch.manual_seed(11)
    expected = theirs.generate(["slow piano"], return_tokens=True)[1]
    lm, params = ours.lm_of(theirs.lm, kind), GenerationParams(top_k=50)
    conditions = lm.encode(ours.attributes(["slow piano"], kind), params)
    plan, empty = WindowPlan(105, 50, 30), torch.empty(1, lm.num_codebooks, 0, dtype=torch.int64)
    torch.manual_seed(11)
    generation = lm.stream(plan, empty, lambda _: conditions, params, None)
    assert torch.equal(collected(generation), expected)
    assert generation.steps_done == 105 + 3
    rng = torch.get_rng_state()
    torch.manual_seed(11)
    theirs.generate(["slow piano"], return_tokens=True)
    assert torch.equal(torch.get_rng_state(), rng)

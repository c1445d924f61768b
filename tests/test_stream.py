"""`MusicGen.stream` and `resume`: what `generate` gives, in pieces; memory; interruptions; bad input."""

from __future__ import annotations

import gc
import io
import math
import threading
import weakref

import psutil
import pytest
import torch

from musicgen_fast import MusicGen
from musicgen_fast.checkpoints.write import write_transformers_folder
from musicgen_fast.sections import Section

from .checkpoint_writers import tiny
from .packed_tools import scale_heads

RATE = 32000
KINDS = ("text", "stereo", "melody")
TEXTS = ["slow drums", None, "happy rock"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Tiny models with a window of 0.6 s: 30 frames, a stride of 18."""
    root = tmp_path_factory.mktemp("models")
    models = {}
    for kind in KINDS:
        write_transformers_folder(root / kind, checkpoint=tiny(kind, max_duration=0.6))
        models[kind] = MusicGen.get_pretrained(root / kind, device="cpu")
        scale_heads(models[kind].lm, 30)
    return models


@pytest.fixture
def model(loaded):
    loaded["text"].set_generation_params()
    return loaded["text"]


def joined(chunks) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([c.audio for c in chunks], dim=2), torch.cat([c.tokens for c in chunks], dim=2)


def tone(seconds: float) -> torch.Tensor:
    return torch.sin(torch.arange(int(RATE * seconds)) * (6.2832 * 440 / RATE))[None]


def save_and_load(stream) -> dict:
    file = io.BytesIO()
    torch.save(stream.save(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- the same as generate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("duration", [0.04, 0.6, 1.54])
def test_chunks_are_what_generate_gives(loaded, kind, seed, duration):
    model = loaded[kind]
    model.set_generation_params(duration=duration, top_k=20)
    torch.manual_seed(1)
    wav, tokens = model.generate(TEXTS, return_tokens=True, seed=seed)
    for chunk_seconds in (0.02, 0.16, 9.0):
        torch.manual_seed(1)
        chunks = list(model.stream(TEXTS, duration=duration, seed=seed, chunk_seconds=chunk_seconds))
        audio, streamed = joined(chunks)
        assert torch.equal(streamed, tokens)
        torch.testing.assert_close(audio, wav, rtol=0, atol=1e-5)
        starts = [0]
        for chunk in chunks:
            assert chunk.audio.shape[2] == chunk.tokens.shape[2] * 640 and chunk.start_seconds == starts[-1] / 50
            starts.append(starts[-1] + chunk.tokens.shape[2])
        assert max(c.tokens.shape[2] for c in chunks) <= max(1, round(50 * chunk_seconds))


def test_a_melody_is_cut_anew_for_every_window_as_in_generate(loaded):
    model = loaded["melody"]
    model.set_generation_params(duration=1.3)
    melody = [tone(0.5), None]
    expected = model.generate_with_chroma(["calm", "fast"], melody, RATE, separate=False, seed=2, return_tokens=True)[1]
    stream = model.stream(
        ["calm", "fast"], duration=1.3, seed=2, melody_wavs=melody, melody_sample_rate=RATE, separate=False
    )
    assert torch.equal(stream.collect()[1], expected)
    assert not torch.equal(model.stream(["calm", "fast"], duration=1.3, seed=2).collect()[1], expected)


@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_a_continued_recording_comes_first(loaded, seconds):
    for kind in ("text", "stereo"):
        model = loaded[kind]
        model.set_generation_params(duration=1.5)
        recording = torch.randn(2, 2, int(22050 * seconds), generator=torch.Generator().manual_seed(0)) * 0.1
        wav, tokens = model.generate_continuation(recording, 22050, ["a", "b"], return_tokens=True, seed=3)
        stream = model.stream(["a", "b"], duration=1.5, prompt=recording, prompt_sample_rate=22050, seed=3)
        first = next(stream)
        assert stream.steps_done == 0, "the recording is played while nothing is generated yet"
        audio, streamed = joined([first, *stream])
        assert torch.equal(streamed, tokens)
        torch.testing.assert_close(audio, wav, rtol=0, atol=1e-5)


def test_the_first_chunk_comes_after_eight_steps_and_the_others_grow(model):
    stream = model.stream(["x"], duration=3.0, seed=0, chunk_seconds=0.5)
    sizes, steps = [], []
    for chunk in stream:
        sizes.append(chunk.tokens.shape[2])
        steps.append(stream.steps_done)
    assert steps[0] <= 8
    assert sizes[:6] == [1, 2, 4, 8, 16, 25] and set(sizes[5:-1]) == {25} and sum(sizes) == 150
    assert steps == sorted(steps) and stream.steps_done == stream.steps_total


def test_an_endless_stream_begins_as_a_long_one(model):
    """All but the last frames, where the shorter run masks its tail."""
    endless = model.stream(["x"], seed=4, chunk_seconds=0.2)
    assert endless.steps_total is None
    chunks = []
    while endless.seconds < 2.5:
        chunks.append(next(endless))
    endless.close()
    tokens = joined(chunks)[1]
    expected = model.stream(["x"], duration=2.4, seed=4).collect()[1]
    assert torch.equal(tokens[:, :, :117], expected[:, :, :117])
    with pytest.raises(ValueError, match="endless stream cannot be collected"):
        model.stream(["x"]).collect()


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 5])
def test_a_stream_that_is_saved_after_every_chunk_goes_on_the_same(loaded, kind, seed):
    model = loaded[kind]
    model.set_generation_params(top_k=30)
    melody = {"melody_wavs": [tone(0.5), None], "melody_sample_rate": RATE, "separate": False}
    options = {"duration": 1.34, "seed": seed, "chunk_seconds": 0.22, **(melody if kind == "melody" else {})}
    torch.manual_seed(2)
    audio, tokens = model.stream(["a", "b"], **options).collect()
    torch.manual_seed(2)
    stream, chunks = model.stream(["a", "b"], **options), []
    model.set_generation_params(top_k=1)  # what it was asked for is saved with it
    try:
        while True:
            saved = save_and_load(stream)
            torch.rand(5)  # in noise mode the generator's state is saved too
            stream = model.resume(saved)
            chunks.append(next(stream))
    except (StopIteration, ValueError):
        pass
    found = joined(chunks)
    assert torch.equal(found[1], tokens)
    torch.testing.assert_close(found[0], audio, rtol=0, atol=1e-5)


def test_what_cannot_be_resumed(loaded, model):
    saved = save_and_load(model.stream(["a"], duration=1.0, seed=0))
    with pytest.raises(ValueError, match="is of a model of"):
        loaded["stereo"].resume(saved)
    with pytest.raises(ValueError, match="not what Stream.save returns"):
        model.resume({"format": 7})
    scheduled = save_and_load(model.stream(["a"], duration=1.0, seed=0, temperature=lambda s: 1.0))
    with pytest.raises(ValueError, match="pass the same to resume"):
        model.resume(scheduled)
    model.resume(scheduled, temperature=lambda s: 1.0)
    ended = model.stream(["a"], duration=0.1, seed=0)
    list(ended)
    with pytest.raises(ValueError, match="has ended or was closed"):
        ended.save()
    with pytest.raises(ValueError, match="nothing left to collect"):
        ended.collect()


# -- what changes while it plays --------------------------------------------------------------------------------------


def test_functions_of_time_set_guidance_and_temperature(model):
    model.set_generation_params(cfg_coef=2.0, temperature=9.0)
    expected = model.stream(["x"], duration=1.0, seed=1).collect()[1]
    same = model.stream(["x"], duration=1.0, seed=1, cfg_coef=lambda s: 2.0, temperature=lambda s: 9.0).collect()[1]
    assert torch.equal(same, expected)
    asked = []

    def later(seconds):
        asked.append(seconds)
        return 9.0 if seconds < 0.5 else 0.0

    changed = model.stream(["x"], duration=1.0, seed=1, temperature=later).collect()[1]
    assert torch.equal(changed[:, :, :22], expected[:, :, :22]) and not torch.equal(changed, expected)
    assert min(asked) == 0 and max(asked) == pytest.approx(0.98)
    model.set_generation_params(cfg_coef=1.0, temperature=9.0)  # no null branch, but the function needs one
    from_one = model.stream(["x"], duration=1.0, seed=1, cfg_coef=lambda s: 2.0).collect()[1]
    assert torch.equal(from_one, expected)
    model.set_generation_params(use_sampling=False)
    greedy = model.stream(["x"], duration=0.5, seed=1).collect()[1]
    assert torch.equal(model.stream(["x"], duration=0.5, seed=2, cfg_coef=lambda s: 3.0).collect()[1], greedy)
    with pytest.raises(ValueError, match="must be finite"):
        list(model.stream(["x"], duration=0.5, cfg_coef=lambda s: math.nan))


def test_fade_out(model):
    plain = model.stream(["x"], duration=1.0, seed=1).collect()[0]
    faded = model.stream(["x"], duration=1.0, seed=1, fade_out=0.4, chunk_seconds=0.1).collect()[0]
    ramp = torch.ones(RATE)
    first = int(0.6 * RATE)
    ramp[first:] = 1 - torch.arange(RATE - first) / (RATE - first)
    torch.testing.assert_close(faded, plain * ramp, rtol=0, atol=1e-5)
    assert faded[..., -1].abs().max() < 1e-3 * plain.abs().max()


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_a_negative_prompt_takes_the_place_of_the_null_text(loaded, kind):
    """Guidance away from the prompt's own text cancels it: (1 - w) n + w c with n = c is c, whatever w is."""
    model = loaded[kind]
    model.set_generation_params(duration=0.8, cfg_coef=1.0, use_sampling=False)
    unguided = model.generate(["slow drums", "rock"], return_tokens=True)[1]
    model.set_generation_params(duration=0.8, cfg_coef=4.0, use_sampling=False)
    guided = model.generate(["slow drums", "rock"], return_tokens=True)[1]
    texts = ["slow drums", "rock"]
    if kind == "text":  # on a melody model the melody's null differs too
        cancelled = model.generate(texts, return_tokens=True, negative_prompt=texts)[1]
        assert torch.equal(cancelled, unguided) and not torch.equal(guided, unguided)
    away = model.generate(texts, return_tokens=True, negative_prompt=["happy", None])[1]
    assert not torch.equal(away[0], guided[0]) and torch.equal(away[1], guided[1]), "each request has its own"
    streamed = model.stream(texts, duration=0.8, negative_prompt=["happy", None]).collect()[1]
    assert torch.equal(streamed, away)
    both = model.generate(texts, return_tokens=True, negative_prompt="happy")[1]
    assert torch.equal(both[0], away[0]) and not torch.equal(both[1], guided[1])


def test_sections_change_the_prompt_at_their_frame(model):
    model.set_generation_params(top_k=30)
    one = model.stream(["slow drums"], duration=1.5, seed=1).collect()[1]
    same = model.stream(sections=[(0, "slow drums"), (0.7, "slow drums")], duration=1.5, seed=1, crossfade=0.2)
    found = same.collect()[1]
    assert torch.equal(found[:, :, :32], one[:, :, :32])
    for crossfade in (0.0, 0.2):
        sections = [(0, "slow drums"), (0.7, "happy rock")]
        changed = model.stream(sections=sections, duration=1.5, seed=1, crossfade=crossfade).collect()[1]
        first = int((changed != one).any(1)[0].nonzero()[0])
        assert 32 <= first <= 40, "the change begins at its frame, 35, which the first codebooks meet before the last"
    hot = [Section(0, "slow drums"), Section(0.7, "slow drums", cfg_coef=1.0, temperature=9.0)]
    assert not torch.equal(model.stream(sections=hot, duration=1.5, seed=1).collect()[1], one)


@pytest.mark.parametrize("seed", [None, 5])
def test_a_stream_with_sections_can_be_saved_anywhere(model, seed):
    sections = [(0, "slow drums"), Section(0.5, "happy rock", temperature=2.0), (1.1, "b")]
    options = {"sections": sections, "duration": 1.8, "seed": seed, "crossfade": 0.16, "chunk_seconds": 0.1}
    torch.manual_seed(2)
    tokens = model.stream(**options).collect()[1]
    torch.manual_seed(2)
    stream, chunks = model.stream(**options), []
    try:
        while True:
            stream = model.resume(save_and_load(stream))
            chunks.append(next(stream))
    except (StopIteration, ValueError):
        pass
    assert torch.equal(joined(chunks)[1], tokens)


# -- consumers --------------------------------------------------------------------------------------------------------


def test_two_streams_of_one_model_at_once(model):
    expected = [model.stream([text], duration=1.2, seed=7).collect()[1] for text in ("a", "happy")]
    pair = [model.stream([text], duration=1.2, seed=7, chunk_seconds=0.1) for text in ("a", "happy")]
    found: list[list] = [[], []]
    for chunks in zip(*pair, strict=True):
        for one, chunk in zip(found, chunks, strict=True):
            one.append(chunk)
    assert [torch.equal(joined(one)[1], tokens) for one, tokens in zip(found, expected, strict=True)] == [True, True]

    def run(place: int) -> None:
        results[place] = model.stream([("a", "happy")[place]], duration=1.2, seed=7).collect()[1]

    results = [torch.empty(0)] * 2
    threads = [threading.Thread(target=run, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, tokens) for one, tokens in zip(results, expected, strict=True))


def test_a_consumer_that_stops_or_fails_frees_the_memory(model, monkeypatch):
    made: list[weakref.ref] = []
    allocate = model.lm.decoder.allocate

    def noted(rows: int, capacity: int) -> object:
        cache = allocate(rows, capacity)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(model.lm.decoder, "allocate", noted)
    stream = model.stream(["x"], seed=0)
    next(stream)
    assert made and made[-1]() is not None
    stream.close()
    stream.close()
    gc.collect()
    assert [cache() for cache in made] == [None] * len(made) and list(stream) == []

    with pytest.raises(RuntimeError, match="consumer"):
        with model.stream(["x"], seed=0) as stream:
            for _ in stream:
                raise RuntimeError("the consumer broke")
    gc.collect()
    assert [cache() for cache in made] == [None] * len(made) and list(stream) == []
    assert model.stream(["x"], duration=0.1, seed=0).collect()[0].shape[2] == 3200, "the model goes on"


def test_an_interrupt_inside_a_step_ends_the_stream(model, monkeypatch):
    stream = model.stream(["x"], duration=1.0, seed=0)
    next(stream)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.lm.decoder, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert list(stream) == []


def test_nothing_is_made_ahead_of_the_consumer(model):
    stream = model.stream(["x"], seed=0, chunk_seconds=0.1)
    assert stream.steps_done == 0
    for _ in range(6):
        next(stream)
    assert stream.steps_done <= 50 * stream.seconds + 5 + 8


@pytest.mark.slow
def test_ten_minutes_in_flat_memory_begin_as_one_minute(model):
    model.set_generation_params(top_k=10)
    process = psutil.Process()
    stream, minute, after_a_minute = model.stream(["x"], duration=600.0, seed=0), [], 0
    for chunk in stream:
        if chunk.start_seconds < 60:
            minute.append(chunk.tokens)
        elif after_a_minute == 0:
            gc.collect()
            after_a_minute = process.memory_info().rss
    assert stream.seconds == 600.0
    assert process.memory_info().rss - after_a_minute < 15 * 2**20
    expected = model.stream(["x"], duration=60.0, seed=0).collect()[1]
    found = torch.cat(minute, dim=2)[:, :, : 3000 - 3]  # the shorter run masks its last frames
    assert torch.equal(found, expected[:, :, : 3000 - 3])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk_seconds": 0}, ValueError, "chunk_seconds must be above 0"),
        ({"chunk_seconds": "1"}, TypeError, "chunk_seconds must be a number"),
        ({"duration": 0}, ValueError, "duration must be above 0"),
        ({"duration": 0.001}, ValueError, "shorter than one frame"),
        ({"duration": 1e6}, ValueError, "None is endless"),
        ({"fade_out": 1.0}, ValueError, "fade_out needs a duration"),
        ({"fade_out": -1.0, "duration": 2.0}, ValueError, "fade_out must be 0 seconds or more"),
        ({"fade_out": 3.0, "duration": 2.0}, ValueError, "longer than the music"),
        ({"cfg_coef": 3.0}, TypeError, "must be a function of seconds"),
        ({"prompt": torch.zeros(1, 1, 100)}, ValueError, "belong together"),
        ({"prompt": torch.zeros(1, 1, 64000), "prompt_sample_rate": 32000, "duration": 1.0}, ValueError, "as long as"),
        ({"melody_wavs": torch.zeros(1, 100)}, ValueError, "belong together"),
        ({"melody_wavs": torch.zeros(1, 100), "melody_sample_rate": 100}, RuntimeError, "takes no melody"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "2 negative prompts were given for 1"),
        ({"negative_prompt": "noise", "descriptions": [None]}, ValueError, "needs a description"),
        ({"sections": [(0, "a")]}, ValueError, "descriptions or sections, not both"),
        ({"descriptions": None, "sections": []}, ValueError, "sections is empty"),
        ({"descriptions": None, "sections": "a"}, TypeError, "must be a list of"),
        ({"descriptions": None, "sections": [(1, "a")]}, ValueError, "must start at 0"),
        ({"descriptions": None, "sections": [(0, "a"), (5, "b"), (4, "c")]}, ValueError, "out of order"),
        ({"descriptions": None, "sections": [(0, "a"), (5, "b")], "duration": 5.0}, ValueError, "beyond the duration"),
        ({"descriptions": None, "sections": [(0, "a"), (5, "")]}, ValueError, "empty description"),
        ({"descriptions": None, "sections": [(0, "a"), 5]}, TypeError, "a section is"),
        ({"descriptions": None, "sections": [(0, "a")], "crossfade": -1}, ValueError, "crossfade must be 0"),
        (
            {"descriptions": None, "sections": [(0, "a"), (5, "b"), (6, "c")], "crossfade": 1.5},
            ValueError,
            "is not over when the next one starts",
        ),
        ({"seed": [1, 2]}, ValueError, "2 seeds were given for 1"),
        ({"descriptions": "text"}, TypeError, "must be a list"),
    ],
)
def test_bad_input(model, options, error, message):
    with pytest.raises(error, match=message):
        model.stream(**{"descriptions": ["x"], **options})


def test_sections_need_cross_attention(loaded):
    with pytest.raises(ValueError, match="as a prefix"):
        loaded["melody"].stream(sections=[(0, "a")])


def test_a_negative_prompt_without_guidance(model):
    model.set_generation_params(duration=0.1, cfg_coef=1.0)
    with pytest.raises(ValueError, match="needs guidance"):
        model.generate(["x"], negative_prompt="drums")
    with pytest.raises(ValueError, match="needs guidance"):
        model.stream(["x"], negative_prompt="drums")
    with_function = model.stream(["x"], duration=0.5, seed=1, negative_prompt="drums", cfg_coef=lambda s: 2.0)
    model.set_generation_params(cfg_coef=2.0)
    expected = model.stream(["x"], duration=0.5, seed=1, negative_prompt="drums").collect()[1]
    assert torch.equal(with_function.collect()[1], expected)

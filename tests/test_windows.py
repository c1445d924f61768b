"""Durations beyond a window: the plan in whole frames, and the tokens of audiocraft's extended generation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from musicgen_fast.conditioning import Conditioner, ConditioningAttributes
from musicgen_fast.config import GenerationParams
from musicgen_fast.lm import LMModel
from musicgen_fast.model import Transformer
from musicgen_fast.musicgen import MusicGen
from musicgen_fast.state import Sampler
from musicgen_fast.windows import Window, plan_windows

from .checkpoint_writers import tiny
from .oracle import audiocraft_lm as ac
from .oracle import ours


def audiocraft_plan(total: int, window: int, stride: int, prompt: int) -> list[Window]:
    """audiocraft's loop, with its seconds replaced by frames."""
    out, offset = [], 0
    while offset + prompt < total:
        length = min(total - offset, window)
        out.append(Window(offset, prompt, length))
        offset += stride
        prompt = length - stride
    return out


@pytest.mark.parametrize("duration", [31, 36.4, 30.06, 40, 48, 60, 120, 5, 30, 0.02, 36.08, 300])
@pytest.mark.parametrize("stride", [18, 10, 1, 29.98])
def test_every_duration_gives_its_frames(duration, stride):
    total = int(duration * 50)
    windows = plan_windows(total, 1500, int(stride * 50))
    assert windows == audiocraft_plan(total, 1500, int(stride * 50), 0)
    assert windows[-1].end == total == sum(w.length - w.prompt for w in windows)
    assert all(w.length <= 1500 for w in windows)


def test_known_plans():
    assert plan_windows(3000, 1500, 900) == [Window(0, 0, 1500), Window(900, 600, 1500), Window(1800, 600, 1200)]
    assert plan_windows(2000, 1500, 900) == [Window(0, 0, 1500), Window(900, 600, 1100)]
    assert plan_windows(2000, 1500, 900, 100) == [Window(0, 100, 1500), Window(900, 600, 1100)]


@pytest.mark.parametrize("prompt", [1499, 1500, 1501, 4000])
def test_prompts_of_any_length(prompt):
    """A prompt of a window or more (audiocraft fails) leaves the usual overlap to the first window."""
    windows = plan_windows(5000, 1500, 900, prompt)
    assert windows[0].start + windows[0].prompt == prompt
    assert windows[0].prompt == (1499 if prompt == 1499 else 600)
    assert windows[-1].end == 5000


def test_plans_that_cannot_be():
    with pytest.raises(ValueError, match="prompt"):
        plan_windows(100, 1500, 900, 100)
    with pytest.raises(ValueError, match="shorter than one frame"):
        plan_windows(0, 1500, 900)
    with pytest.raises(ValueError, match="stride"):
        plan_windows(2000, 1500, 1500)


def test_default_stride_fits_every_window():
    assert GenerationParams().stride(30.0) == 18.0
    assert GenerationParams().stride(10.0) == pytest.approx(6.0)
    with pytest.raises(ValueError, match="extend_stride"):
        GenerationParams(extend_stride=30).stride(30.0)


@pytest.fixture(scope="module", params=["text", "stereo", "melody"])
def models(request):
    theirs = ac.build_musicgen(request.param, num_layers=2)
    theirs.max_duration = 2  # audiocraft's constructor fails for windows below its default stride of 18 s
    mine = MusicGen("ours", theirs.compression_model, ours.lm_of(theirs.lm, request.param), max_duration=2)
    return request.param, theirs, mine


@ac.needs_audiocraft
def test_tokens_of_extended_generation(models):
    kind, theirs, mine = models
    for duration, stride, prompt_seconds in ((5.0, 1, 0), (3.0, 1.5, 0), (4.0, 1, 0.4)):
        for model in (theirs, mine):
            model.set_generation_params(duration=duration, extend_stride=stride, top_k=50)
        prompt = torch.randn(1, mine.audio_channels, int(prompt_seconds * 32000)) * 0.1
        expected, tokens = (_run(m, kind, prompt) for m in (theirs, mine))
        assert tokens.shape[-1] == int(duration * 25)
        assert torch.equal(tokens, expected)


def _run(model, kind, prompt):
    torch.manual_seed(11)
    if prompt.shape[-1]:
        return model.generate_continuation(prompt, 32000, ["slow piano"], return_tokens=True)[1]
    if kind != "melody":
        return model.generate(["slow piano"], return_tokens=True)[1]
    melody = ac.waveform(0, 150_000)[None]
    options = {"separate": False} if isinstance(model, MusicGen) else {}
    return model.generate_with_chroma(["slow piano"], melody, 32000, return_tokens=True, **options)[1]


@ac.needs_audiocraft
def test_seeds_hold_across_windows_and_batches(models):
    """With seeds, a request's first window does not depend on the duration, nor anything on its neighbours' seeds."""
    _, _, mine = models
    mine.set_generation_params(duration=4, extend_stride=1)
    texts = ["slow piano", "fast drums"]
    both = mine.generate(texts, return_tokens=True, seed=[7, 9])[1]
    assert torch.equal(both, mine.generate(texts, return_tokens=True, seed=[7, 9])[1])
    other = mine.generate(texts, return_tokens=True, seed=[7, 10])[1]
    assert torch.equal(both[0], other[0]) and not torch.equal(both[1], other[1])
    mine.set_generation_params(duration=2)
    assert torch.equal(mine.generate(texts, return_tokens=True, seed=[7, 9])[1], both[:, :, :50])
    consecutive = mine.generate(texts, return_tokens=True, seed=7)[1]
    assert torch.equal(consecutive, mine.generate(texts, return_tokens=True, seed=[7, 8])[1])


@ac.needs_audiocraft
def test_a_request_does_not_depend_on_its_batch(models):
    """Alone, at another place, beside a request without a text: the same tokens."""
    kind, _, mine = models
    mine.set_generation_params(duration=3, extend_stride=1)
    texts, seeds = ["slow piano", None, "fast drums and a very long bass line"], [7, 8, 9]
    tokens = mine.generate(texts, return_tokens=True, seed=seeds)[1]
    for order in ([2, 0, 1], [1, 2], [0], [2]):
        part = mine.generate([texts[i] for i in order], return_tokens=True, seed=[seeds[i] for i in order])[1]
        assert torch.equal(part, tokens[order])


@ac.needs_audiocraft
def test_columns_are_counted_over_all_windows(models, monkeypatch):
    """The noise of a seeded run is numbered by the column of the whole generation: no two windows share it."""
    _, _, mine = models
    mine.set_generation_params(duration=4, extend_stride=1)  # 100 frames in windows of 50, 25 apart
    steps, inner = [], Sampler.__call__

    def recorded(self, logits, place):
        steps.append(place.step.item())
        inner(self, logits, place)

    monkeypatch.setattr(Sampler, "__call__", recorded)
    mine.generate(["slow piano"], seed=3)
    first = list(range(1, 54))
    later = [offset + column for offset in (25, 50) for column in range(26, 54)]
    assert steps == first + later


@ac.needs_audiocraft
def test_every_window_has_its_own_conditions_and_seeds(models, monkeypatch):
    """A waveform plays on from window to window, what its conditioner draws is drawn anew; texts are encoded once."""
    kind, _, mine = models
    mine.set_generation_params(duration=4, extend_stride=1)
    calls, inner = [], Conditioner.__call__

    def record(self, attributes, **options):
        calls.append((attributes[0].wav.get("self_wav"), options["seeds"]))
        return inner(self, attributes, **options)

    monkeypatch.setattr(Conditioner, "__call__", record)
    if kind != "melody":
        mine.generate(["slow piano"], seed=3)
        assert len(calls) == 1
        return
    tune = ac.waveform(0, 90_000)
    mine.generate_with_chroma(["slow piano"], tune, 32000, separate=False, seed=3)
    assert len(calls) == 3 and len({tuple(seeds) for _, seeds in calls}) == 3
    for number, (condition, _) in enumerate(calls):
        assert torch.equal(condition.wav[0], tune.repeat(1, 3)[:, number * 32000 : number * 32000 + 64000])


@pytest.mark.parametrize("duration", [31, 36.4, 30.06, 40, 48, 60, 120, 30.075, 7.019])
def test_durations_through_the_class(duration, monkeypatch):
    """`int(duration * frame_rate)` frames, whatever the floats do."""
    folder = tiny("text")
    with torch.device("meta"):
        transformer = Transformer(folder.config)
    codec = SimpleNamespace(frame_rate=50.0, sample_rate=32000, channels=1)
    model = MusicGen("stub", codec, LMModel(transformer, Conditioner(folder.config, transformer)))
    model.set_generation_params(duration=duration)
    planned = []
    monkeypatch.setattr(model.lm, "_checked_prompt", lambda prompt, batch: prompt)
    monkeypatch.setattr(model.lm, "run", lambda windows, *rest: planned.extend(windows))
    model._generate_tokens([ConditioningAttributes()], None)
    assert planned[-1].end == int(duration * 50) and planned[0].start == 0


@ac.needs_audiocraft
def test_progress_never_passes_its_total(models):
    _, _, mine = models
    mine.set_generation_params(duration=5, extend_stride=1)
    calls = []
    mine.set_custom_progress_callback(lambda *c: calls.append(c))
    mine.generate(["slow piano"], progress=True)
    assert [c[0] for c in calls] == list(range(1, len(calls) + 1))
    assert {c[1] for c in calls} == {len(calls)}


@ac.needs_audiocraft
@pytest.mark.slow
@pytest.mark.parametrize("kind,duration", [("text", 60.0), ("stereo", 40.0), ("melody", 31.0)])
def test_tokens_of_real_lengths(kind, duration):
    """Windows of 30 s and the default stride, to the last of thousands of steps: no drift from the reference."""
    theirs = ac.build_musicgen(kind, num_layers=2)
    mine = MusicGen("ours", theirs.compression_model, ours.lm_of(theirs.lm, kind))
    for model in (theirs, mine):
        model.set_generation_params(duration=duration)
    expected, tokens = (_run(m, kind, torch.empty(1, 1, 0)) for m in (theirs, mine))
    assert tokens.shape[-1] == int(duration * 25)
    assert torch.equal(tokens, expected)

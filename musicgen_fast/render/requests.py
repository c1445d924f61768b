"""From an item of a manifest to a request that a slot can take: texts, recordings, sections, windows.

Each item is encoded alone, so nothing of it depends on its neighbours: the request's tokens are those of
`MusicGen.generate` and its kin with `seed=[item.seed]`. Files are read here, nothing is generated.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from ..audio import audio_read
from ..musicgen import MusicGen
from ..slot_engine import Request
from ..streaming import Options, changes_of, guidance_of, guided
from ..windows import WindowPlan
from .item import Item

__all__ = ["request_of", "rows_of", "window_frames"]


@torch.no_grad()
def request_of(model: MusicGen, item: Item, recording: Path | None) -> Request:
    """What the slots are asked for. Sets the model's generation parameters to those of the item.

    Args:
        recording: the file of `item.melody` or `item.continuation`.

    Raises:
        ValueError: what this model cannot do, or the item's numbers cannot be. OSError: the recording cannot be read.
        ImportError: demucs is needed and missing.
    """
    model.set_generation_params(**asdict(item.params))
    if item.melody and model.lm.config.melody is None and model.lm.config.style is None:
        raise ValueError(f"{model.name} takes no melody: render with a melody or style model")
    if item.sections and model.lm.config.conditioning != "cross":
        raise ValueError(f"{model.name} takes its text as a prefix: sections need a model with cross-attention")
    prompt, melodies = None, None
    if item.continuation and recording is not None:
        seconds = item.continuation_seconds or -1.0
        wav, rate = audio_read(recording, seek_time=item.continuation_start, duration=seconds)
        prompt = model._prompt_audio(wav, rate, item.params.duration)
    elif item.melody and recording is not None:
        wav, rate = audio_read(recording)
        melodies = model._checked_melodies([wav], rate, 1)
    attributes, tokens = model._prepare_tokens_and_attributes([item.prompt], prompt, melodies)
    attributes[0].separate = item.separate
    model._set_negatives(attributes, item.negative_prompt)
    options = Options(item.params.duration, 1.0, 0.0, None, None, item.sections, item.crossfade)
    params = guided(model.params(), options)
    frame_rate, seeds = model.frame_rate, [item.seed]
    window, stride = int(model.max_duration * frame_rate), int(params.stride(model.max_duration) * frame_rate)
    known = model.lm._checked_prompt(tokens, 1)[0]
    plan = WindowPlan(int(params.duration * frame_rate), window, stride, known.shape[1])
    first = [w for w in (plan.at(0), plan.at(1)) if w is not None]
    guidance = guidance_of(options, params, frame_rate, 1)
    return Request(
        known, plan.total, window, stride, model._conditions(attributes, params, seeds, first),
        model.lm.sampler(params, 1, seeds).params, item.seed, guidance[0] if guidance else None,
        changes_of(model, item.sections, round(item.crossfade * frame_rate), attributes, params),
    )  # fmt: skip


def window_frames(item: Item, model: MusicGen) -> int:
    """Frames of the longest window of an item."""
    rate = model.frame_rate
    return min(max(1, int(item.params.duration * rate)), int(model.max_duration * rate))


def rows_of(item: Item) -> int:
    """Rows of keys and values that an item holds at most: one for each branch, twice as many while sections cross."""
    unguided = item.params.cfg_coef == 1 and all(section.cfg_coef is None for section in item.sections)
    branches = 3 if item.params.cfg_coef_beta is not None else 1 if unguided else 2
    return branches * (2 if len(item.sections) > 1 and item.crossfade else 1)

"""Clips to be scored: somebody's recordings through the codec, or tokens that the float32 model draws itself.

A clip carries what its text becomes, too (T5 ids and states), so that whoever scores it needs no text encoder of its
own. Knows neither precisions nor providers. Shapes: a clip's tokens are [K, T], at most one window long.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..audio import audio_read, convert_audio
from ..conditioning import ConditioningAttributes

__all__ = ["Clip", "Recorded", "load_clips", "own_samples", "read_manifest", "recorded", "save_clips"]

PROMPTS = (
    "a calm piano with soft strings, slow",
    "fast drum and bass with a bright synth lead",
    "80s pop track with bassy drums and synth",
    "acoustic guitar, warm, in a minor key",
    "a happy chiptune with a square wave and rock drums",
    "a sad flute over quiet bells, no drums",
    "loud distorted electric guitar and heavy drums",
    "a dance beat",
)
_AT_ONCE = 8
_AFTER = 0.5  # seconds encoded behind the end and dropped: the codec looks ahead, and the recording goes on there
_AUDIO, _TEXT = (
    ("audio", "melody"),
    ("prompt", "text", "description", "caption"),
)  # a column, and what else it is called


@dataclass(frozen=True)
class Clip:
    """tokens int64 [K, T], and a text (None: the null condition) with its T5 ids [n] and float32 states [n, D]."""

    tokens: Tensor
    text: str | None = None
    ids: tuple[int, ...] = ()
    states: Tensor | None = None


@dataclass(frozen=True)
class Recorded:
    """A line of a manifest: where the recording is, and its text."""

    audio: Path
    text: str | None


def own_samples(model: Any, count: int, seconds: float) -> list[Clip]:
    """`count` clips that a float32 `MusicGen` draws for built-in prompts, by seeds 0, 1, ....

    Drawn from its own distribution (no guidance, no top-k, temperature 1): the expected difference of another model's
    nats on them is exactly the KL divergence.

    Raises:
        ValueError: more seconds than a window, or less than a frame.
    """
    lm, frames = model.lm, int(seconds * model.frame_rate)
    if seconds > model.max_duration or not frames:
        raise ValueError(
            f"a clip has between one frame and {model.max_duration:g} s, the model's window; not {seconds:g} s"
        )
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    clips: list[Clip] = []
    for first in range(0, count, _AT_ONCE):
        part = texts[first : first + _AT_ONCE]
        asked = [ConditioningAttributes({"description": text}) for text in part]
        seeds = list(range(first, first + len(part)))
        tokens = lm.generate(None, asked, max_gen_len=frames, top_k=0, cfg_coef=1.0, seed=seeds)
        clips += [_clip(lm, codes, text) for codes, text in zip(tokens, part, strict=True)]
    return clips


def recorded(model: Any, rows: list[Recorded], seconds: float | None = None) -> list[Clip]:
    """The beginnings of recordings, at most a window and `seconds` long, in the codec's tokens.

    Raises:
        ValueError: a recording that cannot be read, or is shorter than a frame. OSError: it is not there.
    """
    limit = min(seconds or model.max_duration, model.max_duration)
    frames = int(limit * model.frame_rate)
    clips = []
    for row in rows:
        wav, rate = audio_read(row.audio, duration=limit + _AFTER)
        if wav.shape[-1] * model.frame_rate < rate or not frames:
            raise ValueError(f"{row.audio}: there is less than one frame to score, of {1 / model.frame_rate:g} s")
        wav = convert_audio(wav, rate, model.sample_rate, model.audio_channels)
        codes = model.compression_model.encode(wav[None].to(model.device))[0][0, :, :frames]
        clips.append(_clip(model.lm, codes, row.text))
    return clips


def _clip(lm: Any, codes: Tensor, text: str | None) -> Clip:
    encoder = lm.conditioner.text
    if not text or encoder is None:
        if text:
            lm.conditioner.encode_text(text)  # which says what is missing
        return Clip(codes.cpu())
    return Clip(codes.cpu(), text, tuple(encoder.tokenizer.ids(text)), encoder.encode(text).cpu())


# -- files ------------------------------------------------------------------------------------------------------------


def read_manifest(path: str | Path) -> list[Recorded]:
    """The lines of a manifest, JSONL or CSV or TSV by its suffix: `audio`, relative to the manifest, and `prompt`.

    Both have the other names that `render` knows them by; further columns are passed over, and a line without a prompt
    is scored under the null condition.

    Raises:
        ValueError: a line that is none or has no recording; says which. OSError: the manifest is not there.
    """
    path = Path(path)
    found = []
    for number, row in _rows(path):
        audio, text = _value(row, _AUDIO), _value(row, _TEXT)
        if not audio:
            raise ValueError(f"{path}, line {number}: it has no field 'audio', the path of a recording")
        if not (path.parent / audio).is_file():
            raise ValueError(f"{path}, line {number}: there is no file {audio!r} beside the manifest")
        found.append(Recorded(path.parent / audio, text or None))
    if not found:
        raise ValueError(f"{path} holds no line")
    return found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() in (".csv", ".tsv"):
            reader = csv.DictReader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t")
            yield from ((reader.line_num, row) for row in reader)
            return
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: this is no JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a line is an object with 'audio' and 'prompt'")
            yield number, row


def _value(row: dict[str, Any], names: tuple[str, ...]) -> str:
    named = {str(name).strip().lower(): value for name, value in row.items()}
    return next((str(named[name]) for name in names if named.get(name)), "")


def save_clips(path: str | Path, clips: list[Clip]) -> None:
    """For another process; tensors, numbers and texts alone."""
    torch.save([{**asdict(clip), "ids": list(clip.ids)} for clip in clips], path)


def load_clips(path: str | Path) -> list[Clip]:
    """What `save_clips` wrote."""
    return [Clip(**{**fields, "ids": tuple(fields["ids"])}) for fields in torch.load(path, weights_only=True)]

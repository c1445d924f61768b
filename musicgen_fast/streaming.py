"""From what a user asks of `MusicGen.stream` and `MusicGen.resume` to a `Stream`: checks, plan, schedule, saved state.

Durations are seconds here and frames from here on. `request` dicts hold what a stream was asked for, as plain values,
so that a saved stream can go on in another process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .conditioning import ConditioningAttributes, WavCondition
from .config import MAX_DURATION, GenerationParams
from .crossfade import Change
from .engine import Guidance
from .sections import Section, plain
from .stream import FORMAT, Fade, Finished, Stream
from .windows import WindowPlan

Schedule = Callable[[float], float]  # seconds from the start of the music -> a value


@dataclass(frozen=True)
class Options:
    """How a stream is cut and shaped: the keyword arguments of `MusicGen.stream`."""

    duration: float | None
    chunk_seconds: float
    fade_out: float
    cfg_coef: Schedule | None
    temperature: Schedule | None
    sections: tuple[Section, ...] = ()
    crossfade: float = 0.0

    def __post_init__(self) -> None:
        _positive("chunk_seconds", self.chunk_seconds)
        if self.duration is not None:
            _positive("duration", self.duration)
            if self.duration > MAX_DURATION:
                raise ValueError(
                    f"duration must be at most {MAX_DURATION} seconds, got {self.duration}; None is endless"
                )
        if not 0 <= self.fade_out < math.inf:
            raise ValueError(f"fade_out must be 0 seconds or more, got {self.fade_out}")
        if self.fade_out and self.duration is None:
            raise ValueError("fade_out needs a duration: an endless stream has no end to fade to")
        if self.duration is not None and self.fade_out > self.duration:
            raise ValueError(f"fade_out ({self.fade_out} s) is longer than the music ({self.duration} s)")
        for name in ("cfg_coef", "temperature"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function of seconds; set numbers with set_generation_params")

    @property
    def scheduled(self) -> bool:
        return self.cfg_coef is not None or self.temperature is not None


def _positive(name: str, seconds: float) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, got {type(seconds).__name__}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name} must be above 0 seconds, got {seconds}")


def open_stream(
    model: Any,
    attributes: list[ConditioningAttributes],
    prompt: Tensor,
    params: GenerationParams,
    seeds: list[int] | None,
    options: Options,
) -> Stream:
    """The stream of B requests; prompt int64 [B, K, P]. Texts are encoded here, the first chunk is made when asked for.

    Raises:
        ValueError: a duration that leaves nothing to generate, or that is too short for the fade.
    """
    rate = model.frame_rate
    total = None if options.duration is None else int(options.duration * rate)
    request: dict[str, Any] = {
        "params": asdict(params),
        "seeds": seeds,
        "attributes": [_plain(a) for a in attributes],
        "prompt": prompt.to("cpu", torch.int32),
        "total": total,
        "chunk_frames": max(1, round(options.chunk_seconds * rate)),
        "fade_frames": round(options.fade_out * rate),
        "compat": model.lm.compat,
        "scheduled": options.scheduled,
        "sections": plain(options.sections),
        "crossfade_frames": round(options.crossfade * rate),
        "model": _identity(model),
    }
    return _stream(model, request, attributes, options, None)


def resume_stream(model: Any, saved: dict[str, Any], cfg_coef: Schedule | None, temperature: Schedule | None) -> Stream:
    """A stream that goes on where `Stream.save` was called.

    Raises:
        ValueError: not a saved stream, one of another model, or one whose schedules are missing.
    """
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or "request" not in saved:
        raise ValueError(f"this is not what Stream.save returns (format {FORMAT})")
    request = saved["request"]
    if request["model"] != _identity(model):
        raise ValueError(f"the saved stream is of a model of {request['model']}, this one is {_identity(model)}")
    if request["compat"] != model.lm.compat:
        raise ValueError(f"the saved stream ran with compat = {request['compat']!r}: set it before resuming")
    # The lengths are in the request, in frames.
    sections = tuple(Section(**fields) for fields in request["sections"])
    options = Options(None, 1.0, 0.0, cfg_coef, temperature, sections)
    if request["scheduled"] != options.scheduled:
        told = "with" if request["scheduled"] else "without"
        raise ValueError(f"the saved stream ran {told} functions for cfg_coef or temperature: pass the same to resume")
    attributes = [_attributes(a, model.device) for a in request["attributes"]]
    return _stream(model, request, attributes, options, saved)


def _stream(
    model: Any,
    request: dict[str, Any],
    attributes: list[ConditioningAttributes],
    options: Options,
    saved: dict[str, Any] | None,
) -> Stream:
    params = guided(GenerationParams(**request["params"]), options)
    rate, seeds, total = model.frame_rate, request["seeds"], request["total"]
    prompt = request["prompt"].to(model.device, torch.int64)
    window, stride = int(model.max_duration * rate), int(params.stride(model.max_duration) * rate)
    plan = WindowPlan(total, window, stride, prompt.shape[2])
    fade = None
    if request["fade_frames"]:
        hop = round(model.sample_rate / rate)
        fade = Fade((total - request["fade_frames"]) * hop, total * hop)
    generation: Any
    if saved is not None and saved["generation"] is None:
        generation = Finished(saved["steps"], saved["steps"])
    else:
        first = [w for w in (plan.at(0), plan.at(1)) if w is not None]
        generation = model.lm.stream(
            plan,
            prompt,
            model._conditions(attributes, params, seeds, first),
            params,
            seeds,
            guidance=guidance_of(options, params, rate, len(prompt)),
            changes=changes_of(model, options.sections, request["crossfade_frames"], attributes, params),
            saved=None if saved is None else saved["generation"],
        )
    return Stream(
        generation, model.compression_model, prompt, chunk_frames=request["chunk_frames"], request=request, fade=fade,
        saved=saved,
    )  # fmt: skip


def guided(params: GenerationParams, options: Options) -> GenerationParams:
    """The parameters, with a null branch where guidance changes on the way: a cfg_coef of 1 would leave it out."""
    changing = options.cfg_coef or any(s.cfg_coef is not None for s in options.sections)
    return params.with_(cfg_coef=GenerationParams().cfg_coef) if changing and params.cfg_coef == 1 else params


def guidance_of(options: Options, params: GenerationParams, rate: float, batch: int) -> list[Guidance | None]:
    """Sections and schedules as the engine asks for them: by frame, both values at once."""
    told = any(s.cfg_coef is not None or s.temperature is not None for s in options.sections)
    if not options.scheduled and not told:
        return []
    fixed = {"cfg_coef": params.cfg_coef, "temperature": params.temperature if params.use_sampling else 0.0}

    def value(name: str, seconds: float, section: Section | None) -> float:
        schedule, own = getattr(options, name), getattr(section, name, None)
        return float(own if own is not None else fixed[name] if schedule is None else schedule(seconds))

    def at(frame: int) -> tuple[float, float]:
        seconds = frame / rate
        section = next((s for s in reversed(options.sections) if int(s.start * rate) <= frame), None)
        values = value("cfg_coef", seconds, section), value("temperature", seconds, section)
        if not all(map(math.isfinite, values)):
            raise ValueError(f"cfg_coef and temperature must be finite, got {values} at {seconds:g} s")
        return values

    return [at] * batch


def changes_of(
    model: Any,
    sections: tuple[Section, ...],
    crossfade: int,
    attributes: list[ConditioningAttributes],
    params: GenerationParams,
) -> list[Change]:
    """The conditions of every section but the first, which the requests themselves hold."""
    changes = []
    for section in sections[1:]:
        told = [replace(a, text={**a.text, "description": section.description}) for a in attributes]
        frame = int(section.start * model.frame_rate)
        changes.append(Change(frame, model.lm.encode(told, params), crossfade))
    return changes


def _identity(model: Any) -> dict[str, Any]:
    """What a stream and the model that goes on with it must have in common; weights are not compared."""
    c = model.lm.config
    sizes = {"dim": c.dim, "layers": c.num_layers, "codebooks": c.num_codebooks, "vocabulary": c.vocab_size}
    return {**sizes, "window": model.max_duration, "sample_rate": model.sample_rate}


def _plain(request: ConditioningAttributes) -> dict[str, Any]:
    wavs = {name: (c.wav.detach().to("cpu", copy=True), c.sample_rate[0]) for name, c in request.wav.items()}
    return {"text": dict(request.text), "wav": wavs, "separate": request.separate, "negative": request.negative}


def _attributes(plain: dict[str, Any], device: torch.device) -> ConditioningAttributes:
    wavs = {
        name: WavCondition(wav.to(device), torch.tensor([wav.shape[-1]]), [rate], [None])
        for name, (wav, rate) in plain["wav"].items()
    }
    return ConditioningAttributes(plain["text"], wavs, plain["separate"], plain["negative"])

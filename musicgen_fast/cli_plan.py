"""From parsed options to a `Job`: everything about `musicgen-fast generate` that can be checked without a model.

Prompts, parameters, seeds, recordings, the device, the output folder and the names of the files, so that a mistake
costs seconds and not a download. A request is one piece: a prompt, a variation, a seed. Recordings are float [C, n].
"""

from __future__ import annotations

import argparse
import math
import secrets
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .audio import audio_read
from .checkpoints import SHORT_NAMES
from .cli_output import OutputFolder
from .config import GenerationParams
from .loading import pick_device, pick_precision
from .sections import Section, checked_sections, read_sections

__all__ = ["Job", "Recording", "Request", "check", "crossfade_of", "say", "streams"]

_BATCH_ON_GPU = 8


@dataclass(frozen=True)
class Request:
    """One piece to make. `index` counts prompts, `variation` its variations, both from 0."""

    index: int
    variation: int
    prompt: str | None
    seed: int


@dataclass(frozen=True)
class Recording:
    """A recording to continue or to follow: wav [C, n], and where it was taken from."""

    use: str  # 'continuation' or 'melody'
    path: str
    start: float
    wav: Tensor
    sample_rate: int

    @property
    def seconds(self) -> float:
        return self.wav.shape[-1] / self.sample_rate


@dataclass(frozen=True)
class Job:
    """A command line that was found good."""

    args: argparse.Namespace
    model_name: str
    device: torch.device
    precision: str
    batch_size: int
    params: GenerationParams
    requests: list[Request]
    recording: Recording | None
    output: OutputFolder
    sections: list[Section] | None = None

    @property
    def piped(self) -> bool:
        """Raw samples go to standard output."""
        return _piped(self.args)

    def batches(self) -> list[list[Request]]:
        return [self.requests[i : i + self.batch_size] for i in range(0, len(self.requests), self.batch_size)]

    def name_values(self, request: Request) -> dict[str, Any]:
        """Values of the fields of the file name template."""
        folder = Path(self.model_name)
        model = folder.resolve().name if folder.is_dir() else self.model_name.rpartition("/")[2]
        return {**asdict(request), "model": model}


def check(args: argparse.Namespace) -> Job:
    """The job, with everything checked that needs no model.

    Raises:
        argparse.ArgumentError: a mistake on the command line.
        ValueError, OSError: a recording, the device or the output folder cannot be used.
    """
    params = _params(args)
    sections = _sections(args)
    prompts = _prompts(args, sections)
    _check_streaming(args, len(prompts) * args.variations)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    if seed + len(prompts) * args.variations > 2**63:
        raise argparse.ArgumentError(None, f"--seed {seed} leaves no seeds for all pieces; take a smaller one")
    device = pick_device(args.device)
    name = args.model if Path(args.model).is_dir() else SHORT_NAMES.get(args.model, args.model)
    job = Job(
        args=args,
        model_name=name,
        device=device,
        precision=pick_precision(args.precision, device),
        batch_size=args.batch_size or (_BATCH_ON_GPU if device.type == "cuda" else 1),
        params=params,
        requests=[
            Request(index, variation, prompt, seed + index * args.variations + variation)
            for index, prompt in enumerate(prompts)
            for variation in range(args.variations)
        ],
        recording=_recording(args),
        sections=sections,
        output=OutputFolder(
            Path(args.output_dir),
            args.filename,
            args.format,
            args.loudness or "loudness",
            args.overwrite,
            not args.no_sidecar,
        ),
    )
    for request in job.requests:
        job.output.name(job.name_values(request))
    if not job.piped:
        job.output.prepare()
    if args.seed is None:
        say(args, f"seed {seed} was drawn; --seed {seed} makes the same music again")
    return job


def streams(args: argparse.Namespace) -> bool:
    """Whether the sound is written while it is made."""
    return args.stream or args.endless or args.sections is not None or _piped(args)


def _piped(args: argparse.Namespace) -> bool:
    return args.output_dir == "-"


def _check_streaming(args: argparse.Namespace, pieces: int) -> None:
    def refuse(message: str) -> None:
        raise argparse.ArgumentError(None, message)

    if not streams(args):
        if args.fade_out:
            refuse("--fade-out needs --stream")
        return
    if not 0 <= args.fade_out < math.inf:
        refuse(f"--fade-out must be 0 seconds or more, got {args.fade_out:g}")
    if args.format != "wav":
        refuse(f"--stream writes wav, not {args.format}: other formats cannot be played while they grow")
    if args.loudness in ("loudness", "peak", "rms"):
        refuse(f"--loudness {args.loudness} needs the whole piece; with --stream the samples are written as made")
    if args.endless and pieces > 1:
        refuse(f"--endless makes one piece, {pieces} were asked for")
    if args.endless and args.fade_out:
        refuse("--fade-out needs an end: not with --endless")
    if args.fade_out > args.duration:
        refuse(f"--fade-out {args.fade_out:g} is longer than --duration {args.duration:g}")


def _params(args: argparse.Namespace) -> GenerationParams:
    if args.overlap is not None and not (args.overlap > 0 and math.isfinite(args.overlap)):
        raise argparse.ArgumentError(None, f"--overlap must be above 0 seconds, got {args.overlap:g}")
    try:
        return GenerationParams(
            use_sampling=not args.greedy,
            top_k=args.top_k,
            top_p=args.top_p,
            temperature=args.temperature,
            duration=args.duration,
            cfg_coef=args.cfg_coef,
            cfg_coef_beta=args.cfg_coef_beta,
            two_step_cfg=args.two_step_cfg,
            extend_stride=args.extend_stride,
        )
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from error


def _sections(args: argparse.Namespace) -> list[Section] | None:
    if args.sections is None:
        if args.crossfade is not None:
            raise argparse.ArgumentError(None, "--crossfade needs --sections FILE")
        return None
    sections = read_sections(args.sections)
    return checked_sections(sections, None if args.endless else args.duration, crossfade_of(args))


def crossfade_of(args: argparse.Namespace) -> float:
    """Seconds; the default of `MusicGen.stream` if nothing was said."""
    return 0.5 if args.crossfade is None else float(args.crossfade)


def _prompts(args: argparse.Namespace, sections: list[Section] | None) -> list[str | None]:
    """All prompts in order, `-` replaced by the lines of standard input; None for pieces without one."""
    if sections is not None:
        if args.prompts or args.more_prompts or args.unconditional or args.melody:
            raise argparse.ArgumentError(None, "--sections holds the prompts: no others, and no --melody")
        return [sections[0].description]
    given: list[str | None] = []
    for text in args.prompts + args.more_prompts:
        given += _lines(args) if text == "-" else [text]
    from_audio = args.continuation or args.melody
    if args.unconditional:
        if given or args.melody:
            raise argparse.ArgumentError(None, "--unconditional takes neither prompts nor --melody")
        return [None] * args.unconditional
    if args.prompts + args.more_prompts and not given:
        raise argparse.ArgumentError(None, "there is no prompt on standard input")
    if not given and not from_audio:
        raise argparse.ArgumentError(None, "give a prompt, - to read prompts from standard input, or --unconditional N")
    return given or [None]


def _lines(args: argparse.Namespace) -> list[str]:
    if sys.stdin.isatty():
        say(args, "reading prompts, one a line; Ctrl-D ends")
    lines = (line.strip("\ufeff \t\r\n") for line in sys.stdin)
    return [line for line in lines if line]


def _recording(args: argparse.Namespace) -> Recording | None:
    start, seconds = args.continue_from, args.continue_seconds
    if (start is not None or seconds is not None) and not args.continuation:
        raise argparse.ArgumentError(None, "--continue-from and --continue-seconds need --continue FILE")
    if args.no_separate and not args.melody:
        raise argparse.ArgumentError(None, "--no-separate needs --melody FILE")
    if start is not None and not 0 <= start < math.inf:
        raise argparse.ArgumentError(None, f"--continue-from must be 0 seconds or more, got {start:g}")
    if seconds is not None and not 0 < seconds < math.inf:
        raise argparse.ArgumentError(None, f"--continue-seconds must be above 0, got {seconds:g}")
    path = args.continuation or args.melody
    if path is None:
        return None
    wav, rate = audio_read(path, seek_time=start or 0.0, duration=seconds or -1.0)
    if not wav.numel():
        raise ValueError(f"{path} holds no sound")
    recording = Recording("continuation" if args.continuation else "melody", path, start or 0.0, wav, rate)
    if args.continuation and recording.seconds >= args.duration:
        raise ValueError(
            f"--duration {args.duration:g} includes the recording, which has {recording.seconds:.2f} s: ask for more, "
            "or use less of it with --continue-seconds"
        )
    return recording


def say(args: argparse.Namespace, text: str) -> None:
    """A message on standard error, unless --quiet."""
    if not args.quiet:
        print(f"musicgen-fast: {text}", file=sys.stderr)

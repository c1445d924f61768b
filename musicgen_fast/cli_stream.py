"""`musicgen-fast generate --stream`: a WAV file that grows while it is made, or raw samples on standard output.

The file is a valid WAV file after every chunk, so that it can be played while it grows and nothing is lost when the run
is interrupted. Raw samples are 16-bit little-endian PCM, channels interleaved: what players read from a pipe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from .audio_encode import WAV_LIMIT
from .cli_generate import Reporter, facts_of, load
from .cli_output import pcm16
from .cli_plan import Job, Request, check, crossfade_of, say
from .musicgen import MusicGen
from .sections import plain
from .stream import Stream

_HEADER = 44  # bytes of a PCM header


class WavFile:
    """A 16-bit WAV file whose header tells the truth after every `write`."""

    def __init__(self, path: Path, channels: int, sample_rate: int, overwrite: bool) -> None:
        self.path, self.samples = path, 0
        self.hash = hashlib.sha256()
        self._channels, self._rate = channels, sample_rate
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb" if overwrite else "xb")
        self._head()

    def _head(self) -> None:
        block = 2 * self._channels
        size = self.samples * block
        parts = (b"RIFF", size + _HEADER - 8, b"WAVE", b"fmt ", 16, 1, self._channels, self._rate, self._rate * block)
        self._file.seek(0)
        self._file.write(struct.pack("<4sI4s4sIHHIIHH4sI", *parts, block, 16, b"data", size))
        self._file.seek(0, os.SEEK_END)
        self._file.flush()

    def write(self, wav: Tensor) -> None:
        """wav [C, n] within -1..1."""
        data = pcm16(wav)
        if _HEADER + 2 * self._channels * self.samples + len(data) > WAV_LIMIT:
            raise ValueError(f"{self.path}: a WAV file holds 4 GiB; pipe the samples on with -o - instead")
        self._file.write(data)
        self.hash.update(data)
        self.samples += wav.shape[-1]
        self._head()

    def close(self) -> None:
        self._file.close()


class Pipe:
    """Raw samples to standard output."""

    def __init__(self) -> None:
        self._file = sys.stdout.buffer

    def write(self, wav: Tensor) -> None:
        self._file.write(pcm16(wav))
        self._file.flush()  # a player waits for them

    def close(self) -> None:
        pass


def run(args: argparse.Namespace) -> int:
    """Make what the command line asks for, one piece after the other; returns the exit code."""
    job = check(args)
    try:
        model = load(job)
        if job.piped:
            say(args, f"raw PCM: 16-bit little-endian, {model.sample_rate} Hz, {model.audio_channels} channel(s)")
        with Reporter(args, len(job.requests)) as reporter:
            for request in job.requests:
                _make(model, job, request, reporter)
    except BrokenPipeError:  # the player was closed: that is how one stops it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its exit
        return 0
    except KeyboardInterrupt:
        print("musicgen-fast: interrupted; what was made until then is kept", file=sys.stderr)
        return 0 if args.endless else 130
    return 0


def _make(model: MusicGen, job: Job, request: Request, reporter: Reporter) -> None:
    """One piece. However it ends, the file and its sidecar agree."""
    reporter.next_batch()
    started, first_sound, finished = time.perf_counter(), 0.0, False
    sink = Pipe() if job.piped else _open_file(model, job, request)
    with _stream(model, job, request) as stream:
        try:
            for chunk in stream:
                sink.write(chunk.audio[0].float().cpu().clamp(-1, 1))
                first_sound = first_sound or time.perf_counter() - started
                reporter.step(stream.steps_done, stream.steps_total or 0)
            finished = True
        finally:
            sink.close()
            if isinstance(sink, WavFile):
                taken = time.perf_counter() - started
                speed = stream.seconds / taken
                facts = {"complete": finished, "seconds_taken": taken, "seconds_to_first_sound": first_sound}
                _describe(model, job, request, sink, {**facts, "times_real_time": speed})
                reporter.line(f"{sink.path}  {stream.seconds:.2f} s  seed {request.seed}  {speed:.2f}x real time")


def _open_file(model: MusicGen, job: Job, request: Request) -> WavFile:
    stem = job.output.claim(job.name_values(request))
    path = stem.with_name(f"{stem.name}.wav")
    return WavFile(path, model.audio_channels, model.sample_rate, job.output.overwrite)


def _stream(model: MusicGen, job: Job, request: Request) -> Stream:
    args, recording = job.args, job.recording
    continued = recording if recording is not None and recording.use == "continuation" else None
    melody = recording if recording is not None and recording.use == "melody" else None
    return model.stream(
        [request.prompt] if job.sections is None else None,
        duration=None if args.endless else job.params.duration,
        seed=[request.seed],
        negative_prompt=args.negative_prompt,
        prompt=None if continued is None else continued.wav,
        prompt_sample_rate=None if continued is None else continued.sample_rate,
        melody_wavs=None if melody is None else [melody.wav],
        melody_sample_rate=None if melody is None else melody.sample_rate,
        separate=not args.no_separate,
        fade_out=args.fade_out,
        sections=job.sections,
        crossfade=crossfade_of(args),
    )


def _describe(model: MusicGen, job: Job, request: Request, file: WavFile, facts: dict[str, Any]) -> None:
    """Count the file and write its sidecar."""
    job.output.written += 1
    if not job.output.sidecar:
        return
    if job.sections is not None:
        facts |= {"sections": plain(job.sections), "crossfade": crossfade_of(job.args)}
    sidecar = {
        "file": file.path.name,
        **facts_of(model, job, request),
        **facts,
        "format": "wav",
        "loudness": "none",
        "duration": file.samples / model.sample_rate,
        "sample_rate": model.sample_rate,
        "channels": model.audio_channels,
        "frames": file.samples,
        "sha256": file.hash.hexdigest(),
        "sha256_of": "the samples of the file as 16-bit little-endian PCM, channels interleaved",
    }
    path = file.path.with_suffix(".json")
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)

"""`musicgen-fast generate`: the model is loaded, and batch by batch the requests of a `Job` become files.

Each file is written as soon as its batch is finished, so an interrupt costs the batch that runs and nothing else. What
is checked before is in `cli_plan.py`, names and sidecars are in `cli_output.py`. Waveforms are float [B, C, n].
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .cli_plan import Job, Request, check, say
from .musicgen import MusicGen

_log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Make what the command line asks for; returns the exit code."""
    job = check(args)
    try:
        model = load(job)
        with Reporter(args, len(job.batches())) as reporter:
            for batch in job.batches():
                make(model, job, batch, reporter)
    except KeyboardInterrupt:
        print(f"musicgen-fast: interrupted: {job.output.written} of {len(job.requests)} files written", file=sys.stderr)
        return 130
    return 0


def load(job: Job) -> MusicGen:
    """The model, ready to generate with the job's parameters."""
    args = job.args
    if job.model_name.startswith("random:"):
        say(args, f"{job.model_name} has random weights: expect noise")
    merged = f" with {args.adapter} x {args.adapter_scale:g}" if args.adapter else ""
    say(args, f"loading {job.model_name}{merged} ({job.device}, {job.precision})")
    started = time.perf_counter()
    model = MusicGen.get_pretrained(
        job.model_name,
        job.device,
        text_encoder=args.text_encoder,
        style_encoder=args.style_encoder,
        precision=job.precision,
        revision=args.revision,
        cache_dir=args.cache_dir,
        base=args.base,
        adapter=args.adapter,
        adapter_scale=args.adapter_scale,
    )
    _log.info("loaded in %.1f s", time.perf_counter() - started)
    params = job.params
    if args.overlap is not None:
        if args.overlap >= model.max_duration:
            raise ValueError(f"--overlap {args.overlap:g} must be below the model's window of {model.max_duration:g} s")
        params = params.with_(extend_stride=model.max_duration - args.overlap)
    model.set_generation_params(**asdict(params))
    model.compat = args.compat
    return model


def make(model: MusicGen, job: Job, batch: list[Request], reporter: Reporter) -> None:
    """Make the pieces of a batch and write them."""
    reporter.next_batch()
    started = time.perf_counter()
    wavs = _generate(model, job, batch, reporter).float().cpu()
    taken = time.perf_counter() - started
    given = job.recording.seconds if job.recording and job.recording.use == "continuation" else 0.0
    made = len(batch) * (wavs.shape[-1] / model.sample_rate - given)  # seconds of new sound
    for request, wav in zip(batch, wavs, strict=True):
        facts = facts_of(model, job, request)
        facts |= {"batch": len(batch), "seconds_taken": taken}
        facts |= {"real_time_factor": taken / made, "times_real_time": made / taken}
        path = job.output.write(wav, model.sample_rate, job.name_values(request), facts)
        seconds = wav.shape[-1] / model.sample_rate
        reporter.line(f"{path}  {seconds:.2f} s  seed {request.seed}  {made / taken:.2f}x real time")


def _generate(model: MusicGen, job: Job, batch: list[Request], reporter: Reporter) -> Tensor:
    """wav [B, C, n] of a batch."""
    texts, seeds = [r.prompt for r in batch], [r.seed for r in batch]
    model.set_custom_progress_callback(reporter.step)
    progress, recording, negative = reporter.wanted, job.recording, job.args.negative_prompt
    wav: Tensor
    if recording is None:
        wav = model.generate(texts, progress=progress, seed=seeds, negative_prompt=negative)
    elif recording.use == "continuation":
        prompt = recording.wav.expand(len(batch), -1, -1)
        wav = model.generate_continuation(
            prompt, recording.sample_rate, texts, progress=progress, seed=seeds, negative_prompt=negative
        )
    else:
        melodies = [recording.wav] * len(batch)
        wav = model.generate_with_chroma(
            texts, melodies, recording.sample_rate, progress, separate=not job.args.no_separate, seed=seeds,
            negative_prompt=negative,
        )  # fmt: skip
    return wav


def facts_of(model: MusicGen, job: Job, request: Request) -> dict[str, Any]:
    """What the sidecar says about how a piece was made; times are added by `make`."""
    recording: dict[str, Any] | None = None
    if source := job.recording:
        recording = {"use": source.use, "file": source.path, "from": source.start, "seconds": source.seconds}
        if source.use == "melody":
            recording["separate"] = not job.args.no_separate
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "index": request.index,
        "variation": request.variation,
        "model": job.model_name,
        "revision": job.args.revision,
        "text_encoder": job.args.text_encoder,
        "style_encoder": job.args.style_encoder,
        "base": job.args.base,
        "adapter": job.args.adapter,
        "adapter_scale": job.args.adapter_scale if job.args.adapter else None,
        "parameters": asdict(model.params()),
        "window": model.max_duration,
        "recording": recording,
        "negative_prompt": job.args.negative_prompt,
        "compat": model.compat,
        "device": str(job.device),
        "precision": job.precision,
        "versions": {"musicgen_fast": __version__, "torch": torch.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


# -- what the user sees -----------------------------------------------------------------------------------------------


class Reporter:
    """One line on stdout per file, and a bar on stderr over the steps of all batches where it is wanted."""

    def __init__(self, args: argparse.Namespace, batches: int) -> None:
        from tqdm import tqdm

        off = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
        on_terminal = sys.stderr.isatty() and not args.quiet and not off
        self.wanted: bool = on_terminal if args.progress is None else args.progress
        self.quiet: bool = args.quiet
        self.batches, self.before = batches, 0.0
        self.bar = tqdm(disable=not self.wanted, unit="step", dynamic_ncols=True, leave=False, file=sys.stderr)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.bar.close()

    def next_batch(self) -> None:
        self.before = self.bar.n

    def step(self, done: int, total: int) -> None:
        """Steps of the batch that runs; every batch has the same number of them, 0 if there is no end."""
        self.bar.total = total * self.batches or None  # 0: nobody knows
        self.bar.update(self.before + done - self.bar.n)

    def line(self, text: str) -> None:
        if self.quiet:
            return
        self.bar.clear()
        print(text, flush=True)  # at once, for whoever reads the pipe
        self.bar.refresh()

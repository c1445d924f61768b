"""Seconds of audio per second for a list of pieces: one `MusicGen.generate` per prompt, `musicgen-fast render` of the
same pieces, and batches of transformers, on the same machine in the same run.

Each way runs in a process of its own, which loads the model once; the rounds take turns. What counts is the time from
the first piece to the last one with the model loaded: of the loop and of the batches with and without writing what they
made, of `render` until the last file is on disk. Knows command lines and what they answer, nothing of what lies behind.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .job import turns
from .latency import REFERENCE
from .machine import ROOT
from .providers import OURS, fitting_precision, why_absent
from .throughput_worker import Facts, Task

__all__ = ["LOOP", "RENDER", "Found", "Way", "Work", "pieces", "run_rounds", "speed", "ways"]

_WORDS = "piano drums bass calm fast rock jazz violin synth slow dark bright loop guitar bells strings warm sad".split()
LOOP, RENDER, BATCHES = "generate, one by one", "render", "batches"
_AUDIOCRAFT = (
    "audiocraft is timed by `bench latency` only: it takes its text encoder from the hub by name, so that the whole of "
    "this model cannot be built in it"
)


@dataclass(frozen=True)
class Work:
    """Pieces of `shortest` to `longest` seconds for a model; `threads` None: as many as torch takes."""

    model: str
    precision: str
    device: str = "cpu"
    count: int = 64
    shortest: float = 1.0
    longest: float = 8.0
    threads: int | None = None


@dataclass(frozen=True)
class Way:
    """Who makes the pieces, how, and how many at once."""

    provider: str
    way: str
    batch: int


@dataclass
class Found:
    """What the rounds found: (round, way, facts) of those that ran, and why others did not."""

    measured: list[tuple[int, Way, Facts]] = field(default_factory=list)
    absent: dict[Way, str] = field(default_factory=dict)


def ways(providers: Iterable[str], slots: Iterable[int], peer_batches: Iterable[int]) -> list[Way]:
    """Every way of the providers: ours is the loop and `render` with each number of `slots`."""
    every: list[Way] = []
    for provider in dict.fromkeys(providers):
        if provider == OURS:
            every += [Way(provider, LOOP, 1), *(Way(provider, RENDER, batch) for batch in slots)]
        elif provider == REFERENCE:
            every += [Way(provider, BATCHES, batch) for batch in peer_batches]
        else:
            every.append(Way(provider, LOOP, 1))
    return list(dict.fromkeys(every))


def pieces(work: Work) -> list[dict[str, Any]]:
    """Rows of a manifest, the same for the same work: prompts of 2 to 6 words, durations in tenths of a second."""
    rng = random.Random(0)
    tenths = range(round(10 * work.shortest), round(10 * work.longest) + 1)
    return [
        {"id": f"p{n:03}", "prompt": " ".join(rng.sample(_WORDS, rng.randint(2, 6))),
         "duration": rng.choice(tenths) / 10, "seed": n}
        for n in range(work.count)
    ]  # fmt: skip


def run_rounds(
    work: Work, every: list[Way], rounds: int, say: Callable[[str], object], timeout: float | None = None
) -> Found:
    """Every way once a round, in another order each; one that cannot run is not tried again. `timeout`: of a process,
    in seconds."""
    found = Found()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        runs = _Runs(work, Path(folder), timeout)
        for number, way in turns(every, rounds):
            if way in found.absent:
                continue
            told = f"round {number + 1} of {rounds}: {way.provider}, {way.way}, {way.batch} at once"
            try:
                facts = runs.facts(way, number)
            except _FailedError as why:
                found.absent[way] = str(why)
                say(f"{told}: absent")
                continue
            found.measured.append((number, way, facts))
            say(f"{told}: {speed(facts):.3g} seconds of audio a second")
    return found


def speed(facts: Facts) -> float:
    """Seconds of audio per second: of `render`'s summary with writing, of the others without."""
    return float(facts["audio_seconds"] / facts.get("seconds_busy", facts["seconds"]))


class _FailedError(Exception):
    """A way that has no figures; says why."""


class _Runs:
    """The processes of one bench, with their files in `folder`."""

    def __init__(self, work: Work, folder: Path, timeout: float | None) -> None:
        self._work, self._folder, self._timeout = work, folder, timeout
        self._manifest = folder / "pieces.jsonl"
        self._manifest.write_text("".join(json.dumps(row) + "\n" for row in pieces(work)))
        self._peer: str | None = None  # why there is no folder for the peer; "" once it is written

    def facts(self, way: Way, number: int) -> Facts:
        """What one process found; _FailedError where it found nothing."""
        if reason := _AUDIOCRAFT if way.provider == "audiocraft" else why_absent(way.provider):
            raise _FailedError(reason)
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as out:
            if way.way == RENDER:
                return self._render(way.batch, Path(out) / "out")
            if way.provider == OURS:
                return self._worker("loop", self._work.precision, out)
            self._write_peer()
            return self._worker("transformers", self._peers_precision, out, way.batch)

    @property
    def _peers_precision(self) -> str:
        return fitting_precision(REFERENCE, self._work.precision, self._work.device)

    def _write_peer(self) -> None:
        """Once: it is the same for every batch and round, and large."""
        if self._peer is None:
            (self._folder / "peer").mkdir()
            try:
                self._worker("write", self._peers_precision)
                self._peer = ""
            except _FailedError as why:
                self._peer = str(why)
        if self._peer:
            raise _FailedError(self._peer)

    def _worker(self, kind: str, precision: str, out: str = "", batch: int = 1) -> Facts:
        peer = str(self._folder / "peer")
        task = Task(kind, self._work.model, precision, self._work.device, str(self._manifest), out, peer, batch)
        answer = dict(json.loads(self._process(f"{__package__}.throughput_worker", json.dumps(asdict(task)))))
        if "absent" in answer:
            raise _FailedError(answer["absent"])
        return answer

    def _render(self, batch: int, out: Path) -> Facts:
        work = self._work
        options = ["render", str(self._manifest), "-o", str(out), "--model", work.model, "--device", work.device]
        options += ["--precision", work.precision, "--batch-size", str(batch), "--progress", "none"]
        self._process("musicgen_fast", *options)
        return dict(json.loads((out / "summary.json").read_text()))

    def _process(self, module: str, *arguments: str) -> str:
        """The last line that it printed."""
        settings = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        if self._work.threads is not None:
            settings["OMP_NUM_THREADS"] = str(self._work.threads)
        if self._work.model.startswith("random:"):
            settings["HF_HUB_OFFLINE"] = "1"
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, *arguments], env={**os.environ, **settings},
                capture_output=True, text=True, timeout=self._timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise _FailedError(f"failed: not done after {self._timeout:g} s") from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise _FailedError(f"failed: {said[-1]}")
        return (done.stdout.splitlines() or [""])[-1]

"""One process of `bench stream`: load a provider, stream from it, say when every chunk was there.

    python -m musicgen_fast.bench.stream_worker stream '{"provider": "transformers", "model": "demo", ...}'

prints the JSON document of `measure` as its last line; the fields are those of `stream.StreamJob`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from ..windows import WindowPlan
from .job import AbsentError
from .machine import synchronize
from .providers import OURS
from .stream import StreamJob
from .stream_peer import TransformersPlayer
from .worker import peak_bytes, reset_peak

__all__ = ["OurPlayer", "Player", "Take", "TimedSteps", "measure"]

Take = Callable[[Tensor], bool]  # gets the samples of a chunk [C, n] on the CPU; False: no more of them

# One a stream: the states of a text that was heard before come out of a cache, which no new listener meets.
TEXTS = (
    "a slow calm tune with bells",
    "a fast happy tune with drums",
    "a sad piano with warm strings",
    "a bright lead over deep drums",
    "a soft guitar in a quiet room",
)


class Player(Protocol):
    """A provider. `step_ms` and `changes` (steps at which a window ended) are of the last `play`."""

    @property
    def sample_rate(self) -> int: ...

    @property
    def window(self) -> float | None:
        """Seconds; None where a stream has no windows."""

    @property
    def step_ms(self) -> list[float]: ...

    @property
    def changes(self) -> list[int]: ...

    def prepare(self) -> None:
        """What no user of the provider would do: not timed. Raises AbsentError where it cannot run."""

    def load(self) -> None: ...

    def play(self, text: str, take: Take) -> None: ...


class OurPlayer:
    """`MusicGen.stream`, as docs/streaming.md shows it."""

    def __init__(self, job: StreamJob):
        self.job = job
        self.sample_rate, self.window = 0, job.window
        self._timed: TimedSteps | None = None

    def prepare(self) -> None:
        pass

    def load(self) -> None:
        from .. import MusicGen

        self.model = MusicGen.get_pretrained(self.job.model, self.job.device, precision=self.job.precision)
        if self.job.window is not None:
            self.model.max_duration = self.job.window
            self.model.set_generation_params(duration=self.job.seconds)  # with the stride of this window
        self.sample_rate, self.window = self.model.sample_rate, self.model.max_duration
        lm: Any = self.model.lm
        self._generate, lm.stream = lm.stream, self._stream

    def _stream(self, plan: WindowPlan, *arguments: Any, **options: Any) -> TimedSteps:
        self._timed = TimedSteps(self._generate(plan, *arguments, **options), plan, self.job.device)
        return self._timed

    def play(self, text: str, take: Take) -> None:
        with self.model.stream([text], duration=self.job.seconds, seed=0) as stream:
            for chunk in stream:
                if not take(chunk.audio[0].float().cpu()):
                    break

    @property
    def step_ms(self) -> list[float]:
        return self._timed.ms() if self._timed is not None else []

    @property
    def changes(self) -> list[int]:
        return self._timed.changes() if self._timed is not None else []


class TimedSteps:
    """A generation whose steps are timed, without the codec's work between them.

    On a GPU by events in its queue: to wait for it after every step would keep it from running behind the host.
    """

    def __init__(self, generation: Any, plan: WindowPlan, device: str):
        self._generation, self._plan = generation, plan
        self._cuda = torch.device(device).type == "cuda"
        self._marks: list[tuple[Any, Any]] = []
        self._frames: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generation, name)

    def __next__(self) -> Tensor:
        before = self._mark()
        new: Tensor = next(self._generation)
        self._marks.append((before, self._mark()))
        self._frames.append(new.shape[2])
        return new

    def _mark(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self) -> list[float]:
        """Of every step so far."""
        if self._cuda:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) for before, after in self._marks]
        return [1000 * (after - before) for before, after in self._marks]

    def changes(self) -> list[int]:
        """The steps that finished the last frame of a window, of the whole music's last one not."""
        ends = [window.end for window in self._plan][:-1]
        found, known = [], self._plan.prompt
        for step, new in enumerate(self._frames):
            known += new
            if ends and known >= ends[0]:
                found.append(step)
                ends.pop(0)
        return found


PLAYERS: dict[str, Callable[[StreamJob], Player]] = {OURS: OurPlayer, "transformers": TransformersPlayer}


def measure(job: StreamJob) -> dict[str, Any]:
    """{"load_s", "first", "arrivals", "sounds", "step_ms", "changes", "peak_mib", "window"}, or {"absent": why}.

    `first`: seconds to the first chunk of the first stream after loading and of three more, each left there; then one
    stream is heard to its end: `arrivals` of its chunks, the `sounds` they hold (seconds), `step_ms` of its steps.
    """
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    player = PLAYERS[job.provider](job)
    try:
        player.prepare()
    except AbsentError as reason:
        return {"absent": str(reason)}
    began = perf_counter()
    player.load()
    synchronize(job.device)
    load = perf_counter() - began
    reset_peak(job.device)
    first = [listen(player, text, whole=False)[0][0] for text in TEXTS[:-1]]
    arrivals, sounds = listen(player, TEXTS[-1], whole=True)
    return {
        "load_s": load,
        "first": first,
        "arrivals": arrivals,
        "sounds": sounds,
        "step_ms": player.step_ms,
        "changes": player.changes,
        "peak_mib": round(peak_bytes(job.device) / 2**20),
        "window": player.window,
    }


def prepare(job: StreamJob) -> dict[str, Any]:
    """What the provider reads is written; {} or {"absent": why}."""
    try:
        PLAYERS[job.provider](job).prepare()
    except AbsentError as reason:
        return {"absent": str(reason)}
    return {}


def listen(player: Player, text: str, whole: bool) -> tuple[list[float], list[float]]:
    """When the chunks were there and how long they sound, seconds; the first one only unless `whole`."""
    arrivals: list[float] = []
    sounds: list[float] = []
    began = perf_counter()

    def take(audio: Tensor) -> bool:
        arrivals.append(perf_counter() - began)
        sounds.append(audio.shape[-1] / player.sample_rate)
        return whole

    player.play(text, take)
    return arrivals, sounds


def main(task: str, fields: str) -> None:
    given = json.loads(fields)
    job = StreamJob(**{**given, "starts": tuple(given.get("starts", StreamJob.starts))})
    print(json.dumps({"stream": measure, "prepare": prepare}[task](job)))


if __name__ == "__main__":
    main(*sys.argv[1:])

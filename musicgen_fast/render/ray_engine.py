"""Several processes, GPUs or machines: the same slots in Ray's actors, behind the same calls as `engine.Engine`.

Pieces are pulled: a worker is given one whenever it has a slot free, and answers at least twice a second. A worker that
dies or hangs is replaced; the pieces it had come again, each alone in a worker, so that the one at fault fails alone.
Who has tried what how often stands in our ledger: Ray retries nothing. Files are written by this process only; models
and recordings must lie where every worker finds them. Without an address Ray runs inside of this machine, on loopback.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..loading import pick_device
from .engine import Engine, Result
from .item import Item
from .opening import open_engine
from .plan import Options
from .requests import rows_of

__all__ = ["Crew", "WorkerDiedError", "Worker", "device_of"]

_log = logging.getLogger("musicgen_fast.render")
_PATIENCE = 0.5  # seconds after which a worker answers, whether it has finished something or not
_LONGEST_STEP = (
    30.0  # seconds that an answer may be late on top of a piece's timeout: reading demucs, a swapping machine
)
_PATIENT_START = 120.0  # seconds in which a model should be loaded
_STARTS = 3  # workers in a row that cannot start: then none can
_Given = tuple[str, Item, Path | None, bool]


class WorkerDiedError(RuntimeError):
    """The process of a worker ended while it had a piece."""


def import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: it tells nobody of this run
    try:
        import ray
    except ImportError as error:
        raise ImportError("--engine ray needs Ray: pip install 'musicgen-fast[ray]'") from error
    return ray


def device_of(options: Options) -> torch.device:
    """The device of the workers; the machine that this process is on need not have one."""
    import_ray()
    if options.gpus_per_worker and (options.device or "cuda").startswith("cuda"):
        return torch.device("cuda")  # which one is Ray's business
    device = pick_device("cpu" if options.gpus_per_worker == 0 else options.device)
    return torch.device(device.type)


class Worker:
    """What runs in an actor: an engine of its own. No method outlasts `_PATIENCE` by more than a step."""

    def __init__(
        self, options: Options, items: Sequence[Item], device: str, precision: str, most: int, share: float,
        threads: int,
    ) -> None:  # fmt: skip
        torch.set_num_threads(threads)  # whatever OMP_NUM_THREADS Ray has set
        self._engine: Engine = open_engine(options, items, torch.device(device), precision, most, share)

    def hello(self) -> tuple[int, int]:
        """(slots, sample rate), as soon as the model is there."""
        return self._engine.limit, self._engine.sample_rate

    def work(self, given: Sequence[_Given], waiting: bool) -> tuple[list[Result], dict[str, Any]]:
        """Take these pieces and go on until something is finished or `_PATIENCE` is over."""
        engine, until = self._engine, time.monotonic() + _PATIENCE
        for piece in given:
            engine.admit(*piece)
        results: list[Result] = []
        while engine.pending and not results and time.monotonic() < until:
            results = [_portable(result) for result in engine.step(waiting)]
        if engine.lost is not None:
            os._exit(1)  # a process that has lost its GPU does not get it back
        return results, {name: getattr(engine, name) for name in ("limit", "halved", "busy", "room")}


def _portable(result: Result) -> Result:
    """With an error that survives its way to another process."""
    error = result.error
    if error is None:
        return result
    final = isinstance(error, (ValueError, TypeError)) if result.final is None else result.final
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return replace(result, error=error, final=final)


@dataclass
class _Hand:
    """A worker as this process knows it. `call`: what it was asked last; until it is `ready` that is `hello`."""

    actor: Any
    call: Any
    since: float
    ready: bool = False
    alone: bool = False
    limit: int = 0
    given: list[_Given] = field(default_factory=list)  # not sent yet
    held: list[str] = field(default_factory=list)  # keys
    told: dict[str, Any] = field(default_factory=dict)


class Crew:
    """Workers in the place of one engine; see `engine.Engine` for what is called."""

    shares_process = False

    def __init__(
        self, options: Options, items: Sequence[Item], device: torch.device, precision: str, most: int
    ) -> None:
        """Start Ray, or join the cluster of `options.address`, and the workers. `most`: pieces at once of a worker."""
        self._ray = import_ray()
        self._timeout = options.item_timeout
        gpus = (1.0 if device.type == "cuda" else 0.0) if options.gpus_per_worker is None else options.gpus_per_worker
        self._ours = not self._ray.is_initialized()
        count = options.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self._ours:
            self._start_ray(options.address, max(cores, count or 1))
        if count is None:
            count = max(1, int(self._ray.cluster_resources().get("GPU", 0) / gpus)) if gpus else 1
        threads = max(1, cores // count) if device.type == "cpu" else 1
        share = 1 / count if device.type == "cpu" else min(1.0, gpus or 1.0)
        # Everything that workers share is sent once. A worker that died is replaced here, not by Ray: `held` says what
        # was lost with it.
        kind = self._ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Worker)
        shared = [self._ray.put(value) for value in (options, _longest(items))]
        self._open = lambda: kind.remote(*shared, str(device), precision, most, share, threads)
        self.lost: Exception | None = None
        self._failed_starts, self._warned = 0, False
        self.sample_rate = 0
        self._gone = {"busy": 0, "room": 0}
        self._hands = [self._hire() for _ in range(count)]

    def _start_ray(self, address: str | None, cores: int) -> None:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address is None:
            self._ray.init(num_cpus=cores, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        else:
            self._ray.init(address=address, **quiet)

    def _hire(self) -> _Hand:
        actor = self._open()
        return _Hand(actor, actor.hello.remote(), time.monotonic())

    @property
    def limit(self) -> int:
        """Pieces at once, of all workers."""
        return sum(hand.limit for hand in self._hands)

    @property
    def halved(self) -> int | None:
        return min((hand.told["halved"] for hand in self._hands if hand.told.get("halved")), default=None)

    @property
    def busy(self) -> int:
        return self._sum("busy")

    @property
    def room(self) -> int:
        return self._sum("room")

    def _sum(self, name: str) -> int:
        return self._gone[name] + sum(int(hand.told.get(name, 0)) for hand in self._hands)

    @property
    def pending(self) -> int:
        """Pieces that workers have."""
        return sum(len(hand.held) for hand in self._hands)

    def takes(self, alone: bool = False) -> bool:
        """Whether a worker has a slot free, or nothing at all to do. Waits while no worker is ready."""
        if not any(hand.ready for hand in self._hands):
            self._listen()
            if not self._warned and time.monotonic() - self._hands[0].since > _PATIENT_START:
                self._warned = True
                _log.warning("no worker has started so far: is there room for one? `ray status` tells")
        return self._free(alone) is not None

    def _free(self, alone: bool) -> _Hand | None:
        free = [h for h in self._hands if h.ready and not h.alone and len(h.held) < (1 if alone else h.limit)]
        return min(free, key=lambda hand: len(hand.held), default=None)

    def admit(self, key: str, item: Item, recording: Path | None = None, alone: bool = False) -> None:
        """Give a piece to the worker that has the fewest."""
        hand = self._free(alone)
        assert hand is not None
        hand.alone = alone
        hand.held.append(key)
        hand.given.append((key, item, recording, alone))

    def step(self, waiting: bool = False) -> list[Result]:
        """Send what was admitted, and wait for the next answers."""
        for hand in self._hands:
            if hand.ready and hand.call is None and hand.held:
                hand.call, hand.since = hand.actor.work.remote(hand.given, waiting), time.monotonic()
                hand.given = []
        return self._listen()

    def _listen(self) -> list[Result]:
        """What the workers answer within `_PATIENCE`."""
        calls = {hand.call: number for number, hand in enumerate(self._hands) if hand.call is not None}
        results: list[Result] = []
        # One answer, and whatever else has come by then.
        self._ray.wait(list(calls), num_returns=1, timeout=_PATIENCE)
        done, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in done:
            results += self._hear(calls[call])
        for number, hand in enumerate(self._hands):
            if self._timeout is not None and hand.ready and hand.call is not None:
                if time.monotonic() - hand.since > self._timeout + _LONGEST_STEP:
                    why = TimeoutError(f"a worker did not answer for {self._timeout + _LONGEST_STEP:g} s")
                    results += self._replace(number, why)
        return results

    def _hear(self, number: int) -> list[Result]:
        """The answer of a worker, or the news of its death."""
        hand = self._hands[number]
        call, hand.call = hand.call, None
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            return self._replace(number, WorkerDiedError(" ".join(str(error).split())[:500]))
        if not hand.ready:
            hand.limit, self.sample_rate = answer
            hand.ready, self._failed_starts = True, 0
            return []
        results, hand.told = answer
        hand.limit = hand.told["limit"]
        for result in results:
            hand.held.remove(result.key)
        hand.alone = hand.alone and bool(hand.held)
        return list(results)

    def _replace(self, number: int, why: Exception) -> list[Result]:
        """Another worker for one that is gone; what it had comes again, each alone."""
        hand = self._hands[number]
        if not hand.ready:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS:
                self.lost = why
        _log.warning("a worker is replaced: %s", why)
        for name in self._gone:
            self._gone[name] += int(hand.told.get(name, 0))
        self._ray.kill(hand.actor)
        self._hands[number] = self._hire()
        alone = len(hand.held) == 1
        return [Result(key, error=why, final=False, suspect=not alone) for key in hand.held]

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        if self._ours:
            self._ray.shutdown()
            return
        for hand in self._hands:
            self._ray.kill(hand.actor)


def _longest(items: Sequence[Item]) -> list[Item]:
    """The items that decide how much room is needed, in the place of all: the longest of each kind."""
    kinds = {rows_of(item): item for item in sorted(items, key=lambda item: item.params.duration)}
    return list(kinds.values())

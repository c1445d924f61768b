"""The loop of a run: pieces from the session into the engine, what it makes back to the session, until all is settled.

    plan = make_plan(options)
    code = render(plan)                   # 0 all there, 1 not all, 3 some failed, 130 interrupted

A model is loaded only where something is left to do. The first Ctrl-C lets the pieces finish that are in work, the
second one drops them; the next run goes on where this one ended.
"""

from __future__ import annotations

import logging
import platform
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..loading import pick_device, pick_precision
from .capacity import Memory
from .engine import Engine, Result
from .identity import weights_hash
from .opening import open_engine
from .plan import Plan
from .ray_engine import Crew, device_of
from .resume import Decision
from .session import Session, TooManyFailuresError

__all__ = ["render"]

_log = logging.getLogger("musicgen_fast.render")


def render(plan: Plan) -> int:
    """Make what is left of a plan (of `make_plan`); returns the exit code.

    Raises:
        FolderLockedError: another run is at work in the folder. OSError: files cannot be written any more.
        ValueError: the model, the device or the precision cannot be had.
    """
    options = plan.options
    device = device_of(options) if options.engine == "ray" else pick_device(options.device)
    precision = pick_precision(options.precision, device)
    encoders = [options.text_encoder, options.style_encoder]
    weights = weights_hash(options.model, options.revision, options.cache_dir, encoders)
    session: Session | None = None
    try:
        with Session(plan, weights, precision, facts_of(device)) as session:
            if session.todo:
                _make(session, device, precision)
    except TooManyFailuresError as error:
        _log.error("%s", error)
        return 3
    except KeyboardInterrupt:
        if session is None:
            raise
    return session.exit_code


def facts_of(device: torch.device) -> dict[str, Any]:
    """What ledger, sidecars and summary say of the machine."""
    versions = {"musicgen_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"device": str(device), "versions": versions}


def _make(session: Session, device: torch.device, precision: str) -> None:
    plan, options = session.plan, session.plan.options
    memory = Memory(plan, (options.model, precision, device.type))
    items = [decision.task.item for decision in session.todo]
    most = len(items)
    if options.batch_size is None:
        most = min(most, memory.read() or most)
    engine: Engine | Crew
    if options.engine == "ray":
        engine = Crew(options, items, device, precision, most)
    else:
        engine = open_engine(options, items, device, precision, most)
    with closing(engine), interrupts(session):
        Loop(session, engine, memory).run()


class Loop:
    """Pieces to and fro between a session and an engine."""

    def __init__(self, session: Session, engine: Engine | Crew, memory: Memory) -> None:
        self._session, self._engine, self._memory = session, engine, memory
        self._queue = deque(session.todo)
        self._flying: dict[str, Decision] = {}
        self._halved: int | None = None
        self._kept = 0.0  # seconds for ledger and writer
        self._told = False

    def run(self) -> None:
        """Until everything is settled, or what was in work after an interrupt.

        Raises:
            OSError, TooManyFailuresError: see `Session.retries`.
        """
        session, engine = self._session, self._engine
        try:
            while (self._queue and not session.interrupted) or engine.pending or session.busy:
                self._queue.extend(session.retries())
                if session.interrupted:
                    self._tell()
                else:
                    self._admit()
                if engine.lost is not None:
                    raise engine.lost
                if not engine.pending:
                    session.drain()
                    continue
                for result in engine.step(waiting=bool(self._queue) and not self._queue[0].alone):
                    self._settle(result)
        finally:
            self._measure()

    def _admit(self) -> None:
        queue, engine = self._queue, self._engine
        while queue and engine.takes(queue[0].alone):
            if queue[0].alone and engine.shares_process:
                self._session.drain()  # if it takes the process along, nothing else is to be lost
            decision = queue.popleft()
            began = time.monotonic()
            self._session.start(decision)
            self._kept += time.monotonic() - began
            item = decision.task.item
            self._flying[item.key] = decision
            name = item.melody or item.continuation
            try:
                recording = Path(self._session.plan.inputs.check(name).path) if name else None
            except ValueError as error:  # it was there when the manifest was read
                self._settle(Result(item.key, error=error))
                continue
            engine.admit(item.key, item, recording, decision.alone)

    def _settle(self, result: Result) -> None:
        session, decision, began = self._session, self._flying.pop(result.key), time.monotonic()
        if result.wav is not None:
            tokens = result.tokens if session.plan.options.settings.tokens else None
            session.deliver(decision, result.wav, self._engine.sample_rate, tokens, result.facts)
        elif result.suspect:
            session.release(decision)
            self._queue.append(replace(decision, alone=True))
        elif result.error is not None:
            session.fail(decision, result.error, result.final)
        else:
            session.release(decision)
            self._queue.appendleft(decision)
        self._kept += time.monotonic() - began
        if self._engine.halved != self._halved:
            self._halved = self._engine.halved
            if self._halved is not None:
                self._memory.write(self._halved)

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            _log.warning("interrupted: %d pieces are finished first; Ctrl-C again drops them", len(self._flying))

    def _measure(self) -> None:
        """For the summary."""
        engine = self._engine
        self._session.measured |= {
            "batch_size": engine.limit,
            "slot_occupancy": engine.busy / engine.room if engine.room else None,
            "seconds_bookkeeping": self._kept,
            "peak_memory_bytes": _peak_memory(),
        }


@contextmanager
def interrupts(session: Session) -> Iterator[None]:
    """A first Ctrl-C sets `session.interrupted`, a second one is a KeyboardInterrupt.

    Only where Ctrl-C would be one anyway: not in other threads, and not where somebody else handles or ignores it.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def heard(number: int, frame: Any) -> None:
        if session.interrupted:
            raise KeyboardInterrupt
        session.interrupted = True

    signal.signal(signal.SIGINT, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _peak_memory() -> int | None:
    """Bytes that this process held at most; None where that is not told."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

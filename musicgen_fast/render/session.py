"""A run without its engine: what is to be made, where it goes, and what is kept of it. The engine's loop calls this.

    with Session(plan, weights, precision) as session:        # lock, sweep, ledger; decides what is left
        queue, running = deque(session.todo), {}
        while queue or running or session.busy:
            queue.extend(session.retries())                   # raises where no file can be written any more
            ... session.start(decision)                       # a piece enters a slot
            ... session.deliver(decision, wav, rate)          # it is made: encoded and written by other threads
            ... session.fail(decision, error)                 # or it failed
            if not (queue or running): session.drain()        # the last ones are being written
    return session.exit_code

Leaving the block writes `failures.jsonl`, `summary.json` and `report.html`, also after an exception. A first Ctrl-C is
`session.interrupted = True` and no more admissions; a second one may leave the block as KeyboardInterrupt.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .ledger import History, Ledger, ledger_paths, read_ledgers
from .lock import FolderLock
from .output import Files, Piece, Sink, Stored, ends_run, sweep
from .plan import Plan, last_speed
from .progress import Progress
from .report import Outcome, summarize, write_report, write_summary
from .resume import Decision, decide, write_failures
from .webdataset import TarShards, check_unchanged, remove_shards, unrecorded
from .writer import Writer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Session", "TooManyFailuresError"]

_log = logging.getLogger("musicgen_fast.render")
_PATIENCE = 10.0  # seconds that a second Ctrl-C waits for the pieces that are being written


class TooManyFailuresError(RuntimeError):
    """As many pieces failed as --max-failures allows."""


class Session:
    """See the head of this file.

    Attributes:
        todo: the pieces to make, the longest first; those that must be alone last.
        interrupted: set by whoever catches a Ctrl-C; the exit code is 130 then.
        outcomes: key -> what is known of each piece.
        measured: what the engine's loop found out, for the summary.
    """

    def __init__(self, plan: Plan, weights: str, precision: str = "float32", facts: Mapping[str, Any] | None = None):
        """Take the folder and find out what is left to do.

        Args:
            plan: what to make. weights: `identity.weights_hash`. precision: as it is used, not None.
            facts: for ledger, summary and report: device, versions.

        Raises:
            FolderLockedError: another run is at work there. OSError: it cannot be written to.
            ValueError: a piece changed that is in a tar already, or a link stands where a file is to be.
        """
        self.plan, self.interrupted = plan, False
        self.facts = {"model": plan.options.model, "precision": precision, **(facts or {})}
        self.measured: dict[str, Any] = {}
        self._began, self._first_start = time.monotonic(), 0.0
        self._lock = threading.Lock()
        self._in_flight: dict[str, Decision] = {}
        self._retries: list[Decision] = []
        self._fatal: BaseException | None = None
        self._failed = 0
        with ExitStack() as opened:
            self._open(opened, weights, precision)
            self._opened = opened.pop_all()

    def _open(self, opened: ExitStack, weights: str, precision: str) -> None:
        plan, options = self.plan, self.plan.options
        plan.folder.mkdir(parents=True, exist_ok=True)
        opened.enter_context(FolderLock(plan.folder, options.shard.name, lambda: _tidy(plan)))
        told = {"pid": os.getpid(), "host": socket.gethostname(), "shard": str(options.shard), **self.facts}
        self._ledger = opened.enter_context(Ledger(plan.file("ledger", ".jsonl"), told))
        history = read_ledgers(ledger_paths(plan.folder))
        if options.layout == "webdataset":
            history = self._open_shards(history)
        present = plan.present()
        tasks = plan.tasks(plan.identity(weights, precision))
        decisions = [decide(task, history, present, options.rules) for task in tasks]
        if options.layout == "webdataset":
            check_unchanged(decisions, history, present)
        status = {"render": "open", "skip": "skipped", "failed": "failed"}
        self.outcomes = {d.task.key: Outcome(d.task, status[d.action], d.line or {}) for d in decisions}
        self.todo = [d for d in decisions if d.action == "render"]
        # suspects last, and among them those first that died alone least often: no innocent one waits behind a poison
        self.todo.sort(key=lambda d: (d.alone, d.attempt if d.alone else 0, -d.task.item.params.duration))
        counts = [d.action for d in decisions]
        self.progress = Progress(
            len(self.todo), sum(d.task.item.params.duration for d in self.todo), skipped=counts.count("skip"),
            failed=counts.count("failed"), mode="none" if options.quiet else options.progress,
        )  # fmt: skip
        opened.callback(self.progress.close)
        self._sink: Sink
        if options.layout == "webdataset":
            self._sink = TarShards(plan.folder, options.settings, options.shard.name, options.shard_pieces)
        else:
            self._sink = files = Files(plan.folder, options.settings)
            for decision in self.todo:
                files.check(decision.task.stem)
        self._writer = Writer(self._store, options.writers)

    def _open_shards(self, history: History) -> History:
        """Old tars are removed (--overwrite), or what they hold is entered into the ledger."""
        plan = self.plan
        if plan.options.rules.overwrite:
            remove_shards(plan.folder, plan.options.shard.name)
            return history
        for key, fingerprint, facts in unrecorded(plan.folder, history):
            self._ledger.done(key, fingerprint, **facts)
        return read_ledgers(ledger_paths(plan.folder))

    # -- what the engine tells ----------------------------------------------------------------------------------------

    def start(self, decision: Decision) -> None:
        """A piece enters the engine. OSError where the ledger cannot be written."""
        if not self._first_start:
            self._first_start = time.monotonic()
            self.progress.begin()
        task = decision.task
        self._in_flight[task.key] = decision
        self._ledger.start(task.key, task.fingerprint, decision.attempt, decision.alone)

    def deliver(
        self, decision: Decision, wav: Tensor, sample_rate: int, tokens: Tensor | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """The piece of a `decision` is made: wav float [C, n] of `sample_rate` Hz, `tokens` [K, T] or None, both on the
        CPU best; `facts` for its line. Waits while the writer's queue is full."""
        piece = Piece(decision.task, wav, sample_rate, tokens, decision.attempt, {**self.facts, **(facts or {})})
        self._writer.submit(piece)

    def fail(self, decision: Decision, error: BaseException | str, final: bool | None = None) -> None:
        """The piece of a `decision` failed. It comes back through `retries`, unless another attempt was of no use
        (`final`; None: where the `error` is about values, which will be the same again) or this was the last."""
        task, rules = decision.task, self.plan.options.rules
        if final is None:
            final = isinstance(error, (ValueError, TypeError))
        line = self._ledger.fail(task.key, task.fingerprint, decision.attempt, error, final)
        with self._lock:
            self._in_flight.pop(task.key, None)
            if not final and decision.attempt < rules.max_attempts:
                self._retries.append(Decision(task, "render", decision.attempt + 1, True))
                return
            self.outcomes[task.key] = Outcome(task, "failed", line)
            self._failed += 1
        self.progress.gave_up(task.key, task.item.params.duration, f"{line['error_type']}: {line['error']}")

    def release(self, decision: Decision) -> None:
        """A piece left the engine unfinished through no fault of its own; a later run makes it."""
        with self._lock:
            self._in_flight.pop(decision.task.key, None)
        self._ledger.stop(decision.task.key, decision.task.fingerprint)

    def retries(self) -> list[Decision]:
        """Pieces that failed and are to be made again, each alone: the fault may be its neighbour's. Call it often.

        Raises:
            OSError: files cannot be written any more (a full disk, a folder that became read-only).
            TooManyFailuresError: of --max-failures.
        """
        for failure in self._writer.failures():
            if ends_run(failure.error) or not isinstance(failure.error, Exception):
                self._fatal = self._fatal or failure.error
                continue
            decision = self._in_flight.get(failure.piece.task.key)
            if decision is not None:
                self.fail(decision, failure.error)
        if self._fatal is not None:
            raise self._fatal
        limit = self.plan.options.max_failures
        if limit is not None and self._failed >= limit:
            raise TooManyFailuresError(f"{self._failed} pieces failed; --max-failures ends the run there")
        with self._lock:
            found, self._retries = self._retries, []
        return found

    @property
    def busy(self) -> bool:
        """Pieces are being written, or wait to be made again."""
        return bool(self._writer.waiting or self._retries or self._writer.failed)

    def drain(self) -> None:
        """Wait until everything that was delivered is written or failed."""
        self._writer.drain()

    @property
    def exit_code(self) -> int:
        """0: all is there. 3: some failed. 130: interrupted. 1: some were not made."""
        if self.interrupted:
            return 130
        states = {outcome.status for outcome in self.outcomes.values()}
        return 3 if "failed" in states else 1 if "open" in states else 0

    # -- what happens to what it tells --------------------------------------------------------------------------------

    def _store(self, piece: Piece) -> None:
        """In a thread of the writer."""
        began = time.thread_time()
        stored = self._sink.write(piece)
        for one in stored:
            self._record(one)
        with self._lock:
            spent = self.measured.get("seconds_writing", 0.0) + time.thread_time() - began
            self.measured["seconds_writing"] = spent  # of a processor, beside the model
        if not any(one[0] is piece for one in stored):  # it waits in a tar: a death from here on is not its fault
            self._ledger.stop(piece.task.key, piece.task.fingerprint)

    def _record(self, stored: Stored) -> None:
        piece, written = stored
        task = piece.task
        seconds = {"seconds": piece.facts["seconds_taken"]} if "seconds_taken" in piece.facts else {}
        line = self._ledger.done(
            task.key, task.fingerprint, attempt=piece.attempt, seed=task.item.seed, **seconds, **written.told()
        )
        with self._lock:
            self._in_flight.pop(task.key, None)
            self.outcomes[task.key] = Outcome(task, "done", line)
            self.measured.setdefault("seconds_to_first_file", time.monotonic() - self._began)
        self.progress.finished(task.key, written.audio_seconds, written.files[0][0])

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.interrupted = self.interrupted or isinstance(error, KeyboardInterrupt)
        with self._opened:
            try:
                self._finish(orderly=error is None, patience=_PATIENCE if self.interrupted and error else None)
            except OSError as late:
                if error is None:
                    raise
                _log.warning("%s", late)  # the reason why the run ends is on its way already

    def _finish(self, orderly: bool, patience: float | None) -> None:
        if self._fatal is None:
            self._writer.drain(patience)  # what was made is worth the time to write it
        self._writer.stop()
        self._writer.drain(_PATIENCE)
        try:
            if orderly:
                self.retries()  # the last errors of the writer
            for stored in self._sink.close():
                self._record(stored)
        except TooManyFailuresError:
            pass  # nothing is left to be ended
        finally:
            self._sink.abort()
            self.progress.close()
            for decision in list(self._in_flight.values()) if not self._writer.waiting else ():
                with suppress(OSError):
                    self.release(decision)
            self._write_reports()

    def _write_reports(self) -> None:
        """OSError where there is no room for them; each is written if it can be."""
        plan, outcomes, settings = self.plan, list(self.outcomes.values()), self.plan.options.settings
        now = time.monotonic()
        busy = now - self._first_start if self._first_start else None
        facts = {**self.facts, "shard": str(plan.options.shard), **self.measured}
        summary = summarize(outcomes, now - self._began, facts, busy)
        summary["last_times_real_time"] = summary["times_real_time"] or last_speed(plan)
        failed = [(outcome.task, outcome.line) for outcome in outcomes if outcome.status == "failed"]
        with ExitStack() as steps:  # the last one runs first, and all of them run
            steps.callback(write_report, plan.file("report", ".html"), outcomes, summary, plan.folder.resolve().name)
            steps.callback(write_summary, plan.file("summary", ".json"), summary)
            steps.callback(write_failures, plan.file("failures", ".jsonl"), failed, settings.format)
        self.summary = summary


def _tidy(plan: Plan) -> None:
    """While nobody else is in the folder."""
    if removed := sweep(plan.folder):
        _log.info("%d temporary files of a run that died were removed", removed)

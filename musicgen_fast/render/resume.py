"""What is left to do: each piece against what the ledgers say and what lies in the folder. Reads, renders nothing.

A file counts as finished where its ledger line has the fingerprint that is asked for and every file of it is there with
the size it had: that a file exists says little, since other programs leave half ones.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audio_encode import replacing
from .item import Item
from .ledger import History
from .names import named_as

__all__ = ["Decision", "Rules", "Task", "decide", "files_present", "write_failures"]

Present = Callable[[Mapping[str, Any], str], bool]  # (ledger line, name planned) -> it is all there


@dataclass(frozen=True)
class Rules:
    """How a run treats what other runs left.

    Attributes:
        overwrite: render everything. retry_failed: render what failed, with a new set of attempts.
        max_attempts: failures after which a piece is left.
        alone_after: a piece under way at so many deaths of runs is rendered alone, and a death of that counts as an
            attempt, so that one that kills its process ends up failed; 0: never, for runs that somebody else kills.
    """

    overwrite: bool = False
    retry_failed: bool = False
    max_attempts: int = 3
    alone_after: int = 3


@dataclass(frozen=True)
class Task:
    """A piece with the name of its file and its fingerprint."""

    item: Item
    stem: str
    fingerprint: str

    @property
    def key(self) -> str:
        return self.item.key


@dataclass(frozen=True)
class Decision:
    """What becomes of a `task`. `action`: 'render', 'skip' (done) or 'failed' (left).

    `attempt`: the number of the next one, from 1. `alone`: nothing else may be under way with it. `line`: the ledger's,
    for what is not rendered.
    """

    task: Task
    action: str
    attempt: int = 1
    alone: bool = False
    line: Mapping[str, Any] | None = None


def decide(task: Task, history: History, present: Present, rules: Rules) -> Decision:
    """What to do with a piece."""
    state = history.of(task.key, task.fingerprint)
    if rules.overwrite:
        return Decision(task, "render")
    if state.done is not None and present(state.done, task.stem):
        return Decision(task, "skip", line=state.done)
    alone = 0 < rules.alone_after <= state.lost
    if rules.retry_failed:
        return Decision(task, "render", 1, alone)
    if state.final or state.attempts >= rules.max_attempts:
        line = state.failed or {
            "status": "failed",
            "key": task.key,
            "fingerprint": task.fingerprint,
            "attempt": state.attempts,
            "error_type": "ProcessDied",
            "error": f"the process died {state.lost} times while this piece was rendered",
        }
        return Decision(task, "failed", state.attempts + 1, alone, line)
    return Decision(task, "render", state.attempts + 1, alone)


def files_present(folder: Path, suffixes: Iterable[str] = ()) -> Present:
    """For files of their own: all are there, where they are planned to be, as long as they were; and so are those with
    the `suffixes` that are asked for now."""
    wanted = set(suffixes)

    def present(line: Mapping[str, Any], stem: str) -> bool:
        files = line.get("files")
        if not isinstance(files, list) or not files or not all(_is_there(folder, stem, file) for file in files):
            return False
        return wanted <= {file[0].rpartition(".")[2] for file in files}

    return present


def _is_there(folder: Path, stem: str, file: Any) -> bool:
    if not isinstance(file, list) or len(file) != 2 or not isinstance(file[0], str):
        return False
    name, size = file
    if name.rpartition(".")[0] != stem:  # another --filename: the names of the pieces are new
        return False
    try:
        status = os.lstat(folder / name)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def write_failures(path: Path, failed: Iterable[tuple[Task, Mapping[str, Any]]], format: str) -> int:
    """A manifest of the pieces that failed, with the reasons; where there are none, no file. Returns how many.

    Seeds and names are spelled out in it, so rendering it in this `format` gives what was missing, in the same place.
    """
    rows = []
    for task, line in failed:
        why = {"error_type": line.get("error_type"), "error": line.get("error"), "attempts": line.get("attempt")}
        rows.append(json.dumps({**task.item.row(named_as(task.stem, format)), **why}, allow_nan=False))
    if not rows:
        path.unlink(missing_ok=True)
        return 0
    with replacing(path) as file:
        file.write(("\n".join(rows) + "\n").encode())
    return len(rows)

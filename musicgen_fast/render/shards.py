"""Which part of a manifest this process renders: `--shard 3/16`, or the place that Slurm or torchrun gave it.

By the hash of the id, so that a piece stays in its shard whatever lines come or go. Shards count from 1, ranks of
machines from 0. Knows nothing of items.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Shard", "from_environment", "parse_shard"]


@dataclass(frozen=True)
class Shard:
    """Number `index`, from 1, of `count`; ValueError unless there is such a one."""

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ValueError(f"shards count from 1 to their number: {self.index}/{self.count} is none of them")

    @property
    def name(self) -> str:
        """'3-of-16', for names of files; '' for the whole."""
        return "" if self.count == 1 else f"{self.index}-of-{self.count}"

    def has(self, identifier: str) -> bool:
        """Whether a line of this id, with all its variations, belongs to the shard."""
        digest = hashlib.sha256(b"shard " + identifier.encode("utf-8", "backslashreplace")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """'3/16', or 'auto' for what `environment` says. ValueError for anything else."""
    if text.strip().lower() == "auto":
        return from_environment(environment)
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
    if match is None:
        raise ValueError(f"expected a shard such as 3/16, or auto, got {text!r}")
    return Shard(int(match[1]), int(match[2]))


def from_environment(environment: Mapping[str, str]) -> Shard:
    """The shard of this process in a Slurm array, in a Slurm step, in both at once, or under torchrun.

    A step counts only inside of `srun`: in the batch script itself SLURM_NTASKS is set as well, but there is only one
    process. ValueError where none of these variables is set, or one makes no sense.
    """
    shard = None
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        shard = _array(environment)
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        count = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
        step = _ranked("SLURM_PROCID", environment["SLURM_PROCID"], "the number of tasks", count)
        shard = step if shard is None else _nested(shard, step)
    if shard is None and "RANK" in environment and "WORLD_SIZE" in environment:
        shard = _ranked("RANK", environment["RANK"], "WORLD_SIZE", environment["WORLD_SIZE"])
    if shard is None:
        raise ValueError(
            "--shard auto reads SLURM_ARRAY_TASK_ID and _COUNT, SLURM_PROCID inside of srun, or RANK and WORLD_SIZE, "
            "and none of them is set; give --shard i/n"
        )
    return shard


def _array(environment: Mapping[str, str]) -> Shard:
    """Arrays may begin anywhere and skip numbers: `--array=10-30:5` has the tasks 10, 15, 20, 25, 30."""
    number = _number("SLURM_ARRAY_TASK_ID", environment["SLURM_ARRAY_TASK_ID"])
    count = _number("SLURM_ARRAY_TASK_COUNT", environment["SLURM_ARRAY_TASK_COUNT"])
    first = _number("SLURM_ARRAY_TASK_MIN", environment.get("SLURM_ARRAY_TASK_MIN", "0"))
    step = max(1, _number("SLURM_ARRAY_TASK_STEP", environment.get("SLURM_ARRAY_TASK_STEP", "1")))
    place, rest = divmod(number - first, step)
    if rest or not 0 <= place < count:
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID={number} is not one of {count} evenly spaced tasks from {first} on; give --shard i/n"
        )
    return Shard(place + 1, count)


def _ranked(name: str, value: str, counted: str, count: str) -> Shard:
    rank, of = _number(name, value), _number(counted, count)
    if rank >= of:
        raise ValueError(f"{name}={rank} is not below {counted}, {of}")
    return Shard(rank + 1, of)


def _nested(outer: Shard, inner: Shard) -> Shard:
    return Shard((outer.index - 1) * inner.count + inner.index, outer.count * inner.count)


def _number(name: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise ValueError(f"{name}={value[:40]!r} is no number")
    return int(value)

"""What a process is asked to time, and what it may answer instead of times. Knows no provider."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..checkpoints import load_checkpoint
from ..config import ModelConfig, named_config

__all__ = ["AbsentError", "Compiled", "DTYPES", "Job", "PRECISIONS", "Run", "Step", "config_of", "turns"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = (*DTYPES, "int8", "int4")

T = TypeVar("T")
Step = Callable[[], None]  # to be called once a step
Run = Callable[[Step, int], object]  # generate, from this position on


@dataclass(frozen=True)
class Compiled:
    """A `Run` of what was compiled before it, and the seconds which that took."""

    run: Run
    compile_s: float

    def __call__(self, step: Step, start: int) -> object:
        return self.run(step, start)


@dataclass(frozen=True)
class Job:
    """`steps` columns from each of the positions `starts`, the first `warmup` of each block left out.

    `requests` at once, with guidance: two rows each; `text_tokens` states in cross-attention. A time stamp, for which a
    GPU is waited for, after `every` so many steps.
    """

    provider: str
    model: str = "random:small"
    precision: str = "float32"
    device: str = "cpu"
    threads: int = 1
    steps: int = 200
    warmup: int = 20
    starts: tuple[int, ...] = (0,)
    requests: int = 1
    text_tokens: int = 16
    every: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices; AbsentError where torch has no such type."""
        if self.precision not in DTYPES:
            raise AbsentError(f"{self.provider} has no {self.precision} here")
        return DTYPES[self.precision]


class AbsentError(Exception):
    """This provider cannot run here; says why."""


def turns(items: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """(round, item), every item once a round: each round begins one further, so that a slow minute falls on no one
    item alone."""
    for number in range(rounds):
        first = number % max(1, len(items))
        yield from ((number, item) for item in (*items[first:], *items[:first]))


def config_of(model: str) -> ModelConfig:
    """The sizes of `random:SIZE` or of a checkpoint (which is loaded for it). CheckpointError where there is none."""
    if model.startswith("random:"):
        try:
            return named_config(model.removeprefix("random:"))
        except ValueError:
            pass  # the loader says it better
    return load_checkpoint(model, dtype=None).config

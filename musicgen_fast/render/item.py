"""One piece to render, as a frozen value, and what is wrong with a manifest. No files, no torch.

A line of a manifest gives one `Item` for every variation. Times are seconds, seeds 0 to 2**63 - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import MAX_DURATION, GenerationParams
from ..sections import Section, plain

__all__ = ["Item", "Limits", "ManifestError", "Problem"]


@dataclass(frozen=True)
class Limits:
    """What a manifest may ask for: whoever writes it need not be whoever pays for the machine.

    Attributes:
        line_bytes: of one line; of one record where a CSV cell spans lines.
        id_chars, prompt_chars: of an id; of a prompt, a negative prompt, a section or a tag.
        duration: seconds of a piece. variations: of a line. items: pieces of the whole manifest.
        input_seconds, input_bytes: of a recording that is read.
        problems: reading stops after so many.
    """

    line_bytes: int = 65536
    id_chars: int = 512
    prompt_chars: int = 4000
    duration: float = MAX_DURATION
    variations: int = 1000
    items: int = 1_000_000
    input_seconds: float = 600.0
    input_bytes: int = 512 * 2**20
    problems: int = 10_000


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line, from 1; line 0 is the whole manifest."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}" if self.line else self.message


class ManifestError(ValueError):
    """The manifest at `path` cannot be rendered. `problems`: all of them, in the order of the lines."""

    def __init__(self, path: str, problems: Sequence[Problem]):
        self.path = path
        self.problems = sorted(problems, key=lambda problem: problem.line)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  ".join([f"{path}: {count}", *map(str, self.problems)]))


@dataclass(frozen=True)
class Item:
    """One piece.

    Attributes:
        id: of its line, NFC. variation: from 0. key: unique in a manifest, `id`, or `id#variation` behind the first.
        line: in the manifest, from 1. index: of the line's piece or pieces, from 0.
        seed: of its own noise; see `identity.seed_of`.
        prompt: None without one. negative_prompt: what guidance leads away from.
        params: everything that `GenerationParams` holds; `duration` includes a continued recording.
        melody, continuation: paths of recordings, relative to the input root with /.
        continuation_start, continuation_seconds: seconds of the recording: what is continued; None: to its end.
        separate: take drums and bass out of the melody first.
        sections, crossfade: a prompt for every part, in the place of `prompt`; seconds from one to the next.
        output: the name that the manifest asks for, relative, without a suffix.
        tags: of the sound file, see `audio_encode.TAGS`.
    """

    id: str
    line: int
    index: int
    seed: int
    prompt: str | None
    params: GenerationParams
    variation: int = 0
    negative_prompt: str | None = None
    melody: str | None = None
    continuation: str | None = None
    continuation_start: float = 0.0
    continuation_seconds: float | None = None
    separate: bool = True
    sections: tuple[Section, ...] = ()
    crossfade: float = 0.5
    output: str | None = None
    tags: tuple[tuple[str, str], ...] = field(default=())

    @property
    def key(self) -> str:
        """Unique in a manifest: `id`, or `id#variation` behind the first."""
        return f"{self.id}#{self.variation}" if self.variation else self.id

    def row(self, output: str | None = None) -> dict[str, Any]:
        """This piece alone as a line of a JSONL manifest: everything is spelled out, so that no default, no other line
        and no position changes it. `output`: the name it has."""
        row: dict[str, Any] = {"id": self.id, "variation": self.variation, "seed": self.seed}
        if self.sections:
            row |= {"sections": plain(self.sections), "crossfade": self.crossfade}
        elif self.prompt is None and not (self.melody or self.continuation):
            row["unconditional"] = True
        else:
            row["prompt"] = self.prompt
        row |= asdict(self.params)
        for name in ("negative_prompt", "melody", "continuation"):
            if getattr(self, name) is not None:
                row[name] = getattr(self, name)
        if self.continuation:
            row["continue_from"] = self.continuation_start
            row["continue_seconds"] = self.continuation_seconds
        if self.melody:
            row["separate"] = self.separate
        if output or self.output:
            row["output"] = output or self.output
        if self.tags:
            row["tags"] = dict(self.tags)
        return row

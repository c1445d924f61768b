"""Music in sections, each with a prompt of its own: what a user gives, and the file format of `--sections`.

    [(0, "calm intro"), (20, "drums enter"), Section(40, "finale", cfg_coef=5.0)]

Times are seconds from the start of the music. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Section:
    """From `start` seconds on the music follows `description`; None keeps the model's cfg_coef and temperature.

    Raises:
        TypeError: a time or value that is no number, a description that is no text.
        ValueError: what is not finite, an empty description.
    """

    start: float
    description: str
    cfg_coef: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name in ("start", "cfg_coef", "temperature"):
            value = getattr(self, name)
            if value is None and name != "start":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"a section's {name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"a section's {name} must be finite, got {value}")
        if not isinstance(self.description, str):
            raise TypeError(f"the section at {self.start:g} s needs a text, got {type(self.description).__name__}")
        if not self.description.strip():
            raise ValueError(f"the section at {self.start:g} s has an empty description")


Sections = Sequence[Section | tuple[float, str]]


def checked_sections(given: Sections, duration: float | None, crossfade: float) -> list[Section]:
    """The sections that were `given`, in order; `duration` and `crossfade` in seconds.

    Raises:
        TypeError: something that is neither a `Section` nor (seconds, description).
        ValueError: none at all, a first one that does not start at 0, an order that goes back, a start beyond the
            duration, or a crossfade that would not be over when the next section starts.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError("sections must be a list of (seconds, description)")
    sections = [_section(item) for item in given]
    if not sections:
        raise ValueError("sections is empty: give at least (0, description)")
    if sections[0].start != 0:
        raise ValueError(f"the first section must start at 0 seconds, not at {sections[0].start:g}")
    if not 0 <= crossfade < math.inf:
        raise ValueError(f"crossfade must be 0 seconds or more, got {crossfade}")
    for before, after in zip(sections, sections[1:], strict=False):
        if after.start <= before.start:
            raise ValueError(f"sections are out of order: {after.start:g} s comes after {before.start:g} s")
        if before.start > 0 and before.start + crossfade >= after.start:
            raise ValueError(
                f"a crossfade of {crossfade:g} s into the section at {before.start:g} s is not over when the next one "
                f"starts, at {after.start:g} s: make it shorter"
            )
    if duration is not None and sections[-1].start >= duration:
        raise ValueError(f"the section at {sections[-1].start:g} s is beyond the duration of {duration:g} s")
    return sections


def _section(item: Any) -> Section:
    if isinstance(item, Section):
        return item
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(f"a section is (seconds, description) or a Section, got {item!r}")
    return Section(*item)


def read_sections(path: str | Path) -> list[Section]:
    """Sections of a text file, one a line: `0:20 drums enter` or `20 drums enter`; or a JSON list of objects with the
    fields of `Section`. Empty lines and lines that begin with # are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line that is no section; says which.
    """
    text = Path(path).read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            return [Section(**fields) for fields in json.loads(text)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no JSON list of sections: {error}") from error
    sections = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"\s*(?:(\d+):)?(\d+(?:\.\d+)?)[\s,]+(\S.*?)\s*", line)
        if match is None:
            raise ValueError(f"{path}, line {number}: expected a time and a description, such as '0:20 drums enter'")
        minutes, seconds, description = match.groups()
        sections.append(Section(60 * int(minutes or 0) + float(seconds), description))
    return sections


def plain(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """As dicts, to be saved."""
    return [asdict(section) for section in sections]

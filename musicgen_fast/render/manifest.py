"""From a manifest (JSONL, CSV, TSV, or a text with one prompt a line) to `Item`s, with every problem of every line.

Nothing is loaded and nothing is rendered here: a mistake in line 9,999 is reported in the first second. How lines
become rows is in `rows.py`, what a field may hold in `fields.py`. Knows nothing of names of files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..cli_output import safe_name
from ..config import GenerationParams
from ..sections import checked_sections
from .fields import PARAMETERS, parse_row
from .identity import seed_of
from .inputs import Inputs
from .item import Item, Limits, ManifestError, Problem
from .names import numbered
from .rows import FORMATS, read_rows

__all__ = ["FORMATS", "read_manifest"]

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}


def read_manifest(
    path: str | Path,
    defaults: GenerationParams | None = None,
    *,
    seed: int = 0,
    input_root: str | Path | None = None,
    format: str | None = None,
    limits: Limits | None = None,
    ignore_extra: bool = False,
    inputs: Inputs | None = None,
) -> list[Item]:
    """The pieces of a manifest, in its order.

    Args:
        path: of the manifest. limits: on what it may ask for; default: `Limits()`.
        defaults: parameters of what a line leaves open.
        seed: what the seeds of lines without one follow from, together with their ids.
        input_root: recordings lie below it; default: the folder of the manifest.
        format: of FORMATS; default: by the suffix, txt for unknown ones.
        ignore_extra: pass over unknown fields.
        inputs: the recordings, where they were opened already; instead of `input_root`.

    Raises:
        ManifestError: with all problems. OSError: the manifest cannot be read. ValueError: an unknown format.
    """
    path, limits = Path(path), limits or Limits()
    format = format or _SUFFIXES.get(path.suffix.lower(), "txt")
    if format not in FORMATS:
        raise ValueError(f"unknown manifest format {format!r}; choose one of {', '.join(FORMATS)}")
    inputs = inputs or Inputs(input_root if input_root is not None else path.parent, limits)
    builder = _Builder(defaults or GenerationParams(), seed, inputs, limits, ignore_extra, format in ("jsonl", "txt"))
    try:
        with open(path, "rb") as file:
            for line, raw in read_rows(file, format, limits, builder.report, ignore_extra):
                builder.add(line, raw)
    except _TooManyError:
        builder.problems.append(Problem(2**62, f"and perhaps more: reading stopped after {limits.problems} problems"))
    if not builder.items and not builder.problems:
        builder.problems.append(Problem(0, "there is nothing to render in it"))
    if builder.problems:
        raise ManifestError(str(path), builder.problems)
    return builder.items


class _TooManyError(Exception):
    """As many problems as anybody can read."""


# -- items ------------------------------------------------------------------------------------------------------------


class _Builder:
    """Rows in, items and problems out."""

    def __init__(
        self, defaults: GenerationParams, seed: int, inputs: Inputs, limits: Limits, ignore_extra: bool, typed: bool
    ) -> None:
        self.items: list[Item] = []
        self.problems: list[Problem] = []
        self._defaults, self._seed, self._inputs, self._limits = defaults, seed, inputs, limits
        self._ignore_extra, self._typed = ignore_extra, typed
        self._keys: dict[str, int] = {}
        self._same: dict[str, int] = {}
        self._index = 0

    def report(self, line: int, message: str) -> None:
        self.problems.append(Problem(line, message))
        if len(self.problems) >= self._limits.problems:
            raise _TooManyError

    def add(self, line: int, raw: Mapping[str, Any]) -> None:
        """The pieces of one row."""
        row = parse_row(raw, self._limits, typed=self._typed, ignore_extra=self._ignore_extra)
        values, problems = row.values, [*row.problems]
        params = self._defaults
        try:
            params = self._defaults.with_(**{name: values[name] for name in PARAMETERS if name in values})
        except (ValueError, TypeError) as error:
            problems.append(str(error))
        if not row.problems:  # else what is missing may only be misspelt
            problems += _contradictions(values, params, self._inputs)
        for message in problems:
            self.report(line, message)
        if problems:
            return
        index, self._index = self._index, self._index + 1
        one = "variation" in values
        numbers = [values["variation"]] if one else range(values.get("num_variations", 1))
        identifier = values.get("id") or self._derived_id(values)
        for variation in numbers:
            item = self._item(values, params, identifier, line, index, variation, one)
            if item.key in self._keys:
                self.report(line, f"the id {item.key[:80]!r} stands in line {self._keys[item.key]} already")
                return
            self._keys[item.key] = line
            self.items.append(item)
        if len(self.items) > self._limits.items:
            self.report(line, f"with it there are more than {self._limits.items} pieces; render the manifest in parts")
            raise _TooManyError

    def _item(
        self, values: dict[str, Any], params: GenerationParams, identifier: str, line: int, index: int, variation: int,
        one: bool,
    ) -> Item:  # fmt: skip
        sections = values.get("sections", ())
        seed = values.get("seed")
        if seed is None:
            seed = seed_of(self._seed, identifier, variation)
        elif not one:
            seed = (seed + variation) % 2**63
        output = values.get("output")
        return Item(
            id=identifier,
            line=line,
            index=index,
            seed=seed,
            prompt=sections[0].description if sections else values.get("prompt") or None,
            params=params,
            variation=variation,
            negative_prompt=values.get("negative_prompt") or None,
            melody=values.get("melody"),
            continuation=values.get("continuation"),
            continuation_start=values.get("continue_from", 0.0),
            continuation_seconds=values.get("continue_seconds"),
            separate=values.get("separate", True),
            sections=sections,
            crossfade=values.get("crossfade", 0.5),
            output=numbered(output, variation) if output and variation and not one else output,
            tags=values.get("tags", ()),
        )

    def _derived_id(self, values: Mapping[str, Any]) -> str:
        """An id that follows from what the line says, not from where it stands; equal lines are counted."""
        told = {name: values[name] for name in sorted(values) if name not in ("output", "tags", "num_variations")}
        digest = hashlib.sha256(json.dumps(told, default=repr, sort_keys=True).encode()).hexdigest()[:10]
        sections = values.get("sections", ())
        name = f"{safe_name(sections[0].description if sections else values.get('prompt'), 40)}-{digest}"
        self._same[name] = self._same.get(name, 0) + 1
        return name if self._same[name] == 1 else f"{name}-{self._same[name]}"


def _contradictions(values: Mapping[str, Any], params: GenerationParams, inputs: Inputs) -> Iterator[str]:
    """What is wrong with a row whose fields are right one by one."""
    prompt, sections, unconditional = (values.get(name) for name in ("prompt", "sections", "unconditional"))
    melody, continuation, negative = (values.get(name) for name in ("melody", "continuation", "negative_prompt"))
    told = bool(prompt and prompt.strip()) or bool(sections)
    if sections and (prompt or melody):
        yield f"sections hold the prompts: no {'prompt' if prompt else 'melody'} besides"
    if unconditional and (told or melody):
        yield "unconditional takes neither a prompt nor sections nor a melody"
    if not (told or melody or continuation or unconditional):
        yield 'has no prompt ("unconditional": true renders a piece without one)'
    if melody and continuation:
        yield "melody and continuation exclude each other"
    if negative and not told:
        yield "a negative prompt needs a prompt to lead away from"
    if "variation" in values and "num_variations" in values:
        yield "variation is the number of one piece: no num_variations besides"
    if "separate" in values and not melody:
        yield "separate needs a melody"
    if "crossfade" in values and not sections:
        yield "crossfade needs sections"
    if ("continue_from" in values or "continue_seconds" in values) and not continuation:
        yield "continue_from and continue_seconds need a continuation"
    try:
        if sections:
            checked_sections(sections, params.duration, values.get("crossfade", 0.5))
        if melody:
            inputs.check(melody)
    except ValueError as error:
        yield str(error)
    if continuation:
        yield from _continuation(continuation, values, params, inputs)


def _continuation(name: str, values: Mapping[str, Any], params: GenerationParams, inputs: Inputs) -> Iterator[str]:
    try:
        seconds = inputs.check(name).seconds - values.get("continue_from", 0.0)
    except ValueError as error:
        yield str(error)
        return
    if seconds <= 0:
        yield f"continue_from is past the end of {name!r}"
    if min(seconds, values.get("continue_seconds", seconds)) >= params.duration:
        yield (
            f"the duration of {params.duration:g} s includes the recording, of which {seconds:.2f} s are used: "
            "ask for more, or use less of it with continue_seconds"
        )

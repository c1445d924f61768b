"""The fields of a manifest: their names and aliases, and from what stands in a cell to a checked value.

Cells of CSV and TSV are texts, values of JSONL have types; both end as the same values. Each field is checked by itself
and every problem is kept, so that one pass over a manifest finds them all. Knows nothing of lines, files and models.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..audio_encode import TAGS
from ..sections import Section
from .item import Limits

__all__ = ["ALIASES", "IGNORED", "PARAMETERS", "Row", "is_field", "parse_row"]

ALIASES: dict[str, tuple[str, ...]] = {  # name: what else it is called
    "id": ("custom_id", "key"),
    "prompt": ("text", "description", "caption"),
    "negative_prompt": ("negative",),
    "duration": ("secs", "seconds"),
    "seed": (),
    "num_variations": ("variations", "n"),
    "variation": (),
    "unconditional": (),
    "use_sampling": ("do_sample",),
    "top_k": ("topk",),
    "top_p": ("topp",),
    "temperature": ("temp",),
    "cfg_coef": ("guidance", "guidance_scale", "cfg", "cfg_scale", "classifier_free_guidance"),
    "cfg_coef_beta": (),
    "two_step_cfg": (),
    "extend_stride": (),
    "melody": ("audio", "style"),
    "separate": (),
    "continuation": ("continue",),
    "continue_from": ("continuation_start",),
    "continue_seconds": ("continuation_seconds",),
    "sections": (),
    "crossfade": (),
    "output": ("filename",),
    "tags": ("metadata",),
}
IGNORED = ("error", "error_type", "attempts")  # what failures.jsonl says besides
PARAMETERS = (
    "use_sampling", "top_k", "top_p", "temperature", "duration", "cfg_coef", "cfg_coef_beta", "two_step_cfg",
    "extend_stride",
)  # fmt: skip
_CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in (name, *aliases)}
_TEXTS = ("prompt", "negative_prompt", "melody", "continuation", "output")
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Row:
    """The values of a line by the names of ALIASES, only those that were given, and what is wrong with it."""

    values: dict[str, Any]
    problems: list[str]


def parse_row(raw: Mapping[str, Any], limits: Limits, *, typed: bool = True, ignore_extra: bool = False) -> Row:
    """The values of one line.

    Args:
        raw: field or alias -> what stands there; names in any case, with - or _.
        typed: False where every value is a text (CSV); an empty one is then not given.
        ignore_extra: pass over unknown fields instead of refusing them.
    """
    row = Row({}, [])
    spelled: dict[str, str] = {}
    for given, value in raw.items():
        name = _CANONICAL.get(_plain_key(given))
        if name is None:
            if not (ignore_extra or _plain_key(given) in IGNORED):
                row.problems.append(f"unknown field {given[:60]!r} (--ignore-extra passes over such fields)")
            continue
        if _missing(name, value, typed):
            continue
        if name in spelled:
            row.problems.append(f"{name} is given twice, as {spelled[name]!r} and as {given!r}")
            continue
        spelled[name] = given
        try:
            row.values[name] = _READ[name](value, limits, typed)
        except (ValueError, TypeError, RecursionError) as error:
            row.problems.append(f"{given}: {error}")
    return row


def is_field(name: str) -> bool:
    """Whether a column of this name means something, or is known to mean nothing."""
    return _plain_key(name) in _CANONICAL or _plain_key(name) in IGNORED


def _plain_key(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _missing(name: str, value: Any, typed: bool) -> bool:
    """null and an empty cell; a null says "off" where a parameter can be off."""
    if typed:
        return value is None and name not in ("cfg_coef_beta", "extend_stride")
    return not value.strip()


# -- one value --------------------------------------------------------------------------------------------------------


def _text(value: Any, limit: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {_short(value)}")
    if len(value) > limit:
        raise ValueError(f"{len(value)} characters, at most {limit} are allowed")
    for character in value:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise ValueError(f"holds {character!r}, which is no text")
    return value


def _any_text(value: Any, limits: Limits, typed: bool) -> str:
    return _text(value, limits.prompt_chars)


def _identifier(value: Any, limits: Limits, typed: bool) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    text = unicodedata.normalize("NFC", _text(value, limits.id_chars)).strip()
    if not text:
        raise ValueError("is empty")
    return text


def _number(value: Any, limits: Limits, typed: bool) -> float:
    if not typed:
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"expected a number, got {_short(value)}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, got {_short(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {_short(value)}")
    return number


def _optional_number(value: Any, limits: Limits, typed: bool) -> float | None:
    if value is None or not typed and value.strip().lower() in ("none", "null", "off"):
        return None
    return _number(value, limits, typed)


def _whole(value: Any, limits: Limits, typed: bool) -> int:
    number = _number(value, limits, typed)
    if number != int(number) or abs(number) > 2**31:
        raise ValueError(f"expected a whole number, got {_short(value)}")
    return int(number)


def _between(low: float, high: float, what: str) -> Callable[[Any, Limits, bool], float]:
    def read(value: Any, limits: Limits, typed: bool) -> float:
        number = _number(value, limits, typed)
        if not low <= number <= high:
            raise ValueError(f"{what}, got {_short(value)}")
        return number

    return read


def _duration(value: Any, limits: Limits, typed: bool) -> float:
    number = _number(value, limits, typed)
    if not 0 < number <= limits.duration:
        raise ValueError(f"must be above 0 and at most {limits.duration:g} seconds, got {_short(value)}")
    return number


def _variations(value: Any, limits: Limits, typed: bool) -> int:
    number = _whole(value, limits, typed)
    if not 1 <= number <= limits.variations:
        raise ValueError(f"must be 1 to {limits.variations}, got {number}")
    return number


def _variation(value: Any, limits: Limits, typed: bool) -> int:
    number = _whole(value, limits, typed)
    if not 0 <= number < 2**31:
        raise ValueError(f"must be 0 or more, got {number}")
    return number


def _flag(value: Any, limits: Limits, typed: bool) -> bool:
    if isinstance(value, bool):
        return value
    if not typed and value.strip().lower() in _FLAGS:
        return _FLAGS[value.strip().lower()]
    raise ValueError(f"expected true or false, got {_short(value)}")


def _seed(value: Any, limits: Limits, typed: bool) -> int | None:
    """A seed, or None for one that follows from the id. 0 is a seed like any other."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("-1", "none", "random"):
            return None
        value = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else value
    if value == -1 and not isinstance(value, bool):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"expected 0 to 2**63 - 1, or -1, none or random, got {_short(value)}")
    return value


def _json(value: Any, typed: bool) -> Any:
    if typed:
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"the cell must hold JSON: {error}") from None


def _sections(value: Any, limits: Limits, typed: bool) -> tuple[Section, ...]:
    """A list of [seconds, text] or of objects with the fields of `Section`; `prompt` for its description works too."""
    value = _json(value, typed)
    if not isinstance(value, list) or not value:
        raise ValueError('expected a list such as [[0, "calm intro"], [20, "drums enter"]]')
    return tuple(_section(item, limits) for item in value)


def _section(item: Any, limits: Limits) -> Section:
    if isinstance(item, list) and len(item) == 2:
        item = {"start": item[0], "description": item[1]}
    if not isinstance(item, dict):
        raise ValueError(f"a section is [seconds, text] or an object, got {_short(item)}")
    fields = {"description" if key in ("prompt", "text") else key: value for key, value in item.items()}
    wrong = {"start", "description"} - set(fields) or set(fields) - {"start", "description", "cfg_coef", "temperature"}
    if wrong or len(fields) != len(item):
        raise ValueError(f"a section has start, description, cfg_coef and temperature, got {_short(item)}")
    _text(fields["description"], limits.prompt_chars)
    return Section(**fields)


def _tags(value: Any, limits: Limits, typed: bool) -> tuple[tuple[str, str], ...]:
    value = _json(value, typed)
    if not isinstance(value, dict):
        raise ValueError(f'expected an object such as {{"artist": "me"}}, got {_short(value)}')
    if unknown := sorted(set(value) - set(TAGS)):
        raise ValueError(f"unknown tag {unknown[0][:60]!r}; choose from {', '.join(TAGS)}")
    return tuple(sorted((name, _text(text, limits.prompt_chars)) for name, text in value.items()))


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _readers() -> Iterator[tuple[str, Callable[[Any, Limits, bool], Any]]]:
    yield from ((name, _any_text) for name in _TEXTS)
    yield from ((name, _flag) for name in ("use_sampling", "two_step_cfg", "separate", "unconditional"))
    yield from ((name, _number) for name in ("top_p", "temperature", "cfg_coef"))
    yield from ((name, _optional_number) for name in ("cfg_coef_beta", "extend_stride"))
    yield from (("id", _identifier), ("seed", _seed), ("top_k", _whole), ("duration", _duration))
    yield from (("num_variations", _variations), ("variation", _variation), ("sections", _sections), ("tags", _tags))
    yield from ((name, _between(0, 1e6, "must be 0 seconds or more")) for name in ("continue_from", "crossfade"))
    yield "continue_seconds", _between(1e-6, 1e6, "must be above 0 seconds")


_READ = dict(_readers())

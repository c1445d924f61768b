"""Lines of results as `bench plot` and `bench compare` read them: files, what repeats, a short name of the machine.

Needs no torch; knows no benchmark and no plot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Line", "date_of", "latest", "machine_name", "number", "read_lines"]

Line = dict[str, Any]
K = TypeVar("K", bound=Hashable)
_SETS = (("AMX", "amx_"), ("AVX-512", "avx512"), ("AVX2", "avx2"))


def read_lines(paths: Iterable[str | Path]) -> list[Line]:
    """All results of the files in their order. OSError; ValueError where a line is no result."""
    found = []
    for path in paths:
        for row, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {row}: this is no JSON ({error})") from None
            if not isinstance(line, dict) or "benchmark" not in line:
                raise ValueError(f"{path}, line {row}: this is no result of a benchmark: it has no field 'benchmark'")
            found.append(line)
    return found


def number(value: Any) -> float | None:
    """A float, or None for what is no number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def date_of(line: Line) -> str:
    return str((line.get("machine") or {}).get("date") or "")


def latest(lines: Iterable[Line], key: Callable[[Line], K]) -> dict[K, list[Line]]:
    """By key those lines that bear its latest date: the rounds of one run."""
    found: dict[K, list[Line]] = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return {
        name: [line for line in group if date_of(line) == max(map(date_of, group))] for name, group in found.items()
    }


def machine_name(card: dict[str, Any]) -> str:
    """Short: the GPU, or the CPU with its cores and widest instruction set, as virtual machines hide their names."""
    if card.get("gpu"):
        return re.sub(r"^NVIDIA |GeForce ", "", str(card["gpu"]))
    words = re.sub(r"\((R|TM|tm)\)|@.*?GHz", " ", str(card.get("cpu") or "unknown machine")).split()
    sets = [name for name, prefix in _SETS if any(word.startswith(prefix) for word in words)]
    known = re.compile(r"avx|amx_|CPU$|Processor$|\d+-Core$")
    named = " ".join(word for word in words if not known.match(word))
    cores = f", {card['cores']} cores" if card.get("cores") else ""
    return named + (f" ({sets[0]})" if sets else "") + cores

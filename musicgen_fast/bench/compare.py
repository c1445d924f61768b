"""Two files of results side by side: what became slower or larger. Needs no torch, and measures nothing.

Reads the JSON lines of `musicgen-fast bench` and of benchmarks/: one measurement a line, of the same work where all
that names it (provider, precision, model, threads, positions ...) is equal. Lines that repeat a measurement count as
one, by their median.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .result_lines import number, read_lines

__all__ = ["Limit", "Change", "changes", "different_machines", "failed", "load", "parse_limit", "table"]

_NAMES = (
    "benchmark", "section", "provider", "way", "precision", "model", "device", "threads", "requests", "text_tokens",
    "busy_core", "steps", "start", "batch", "pieces", "codebooks", "filter", "dtype", "vocab", "window", "data",
    "clips", "frames", "direction", "chunk", "peer_chunk",
)  # fmt: skip
_ASKED = ("codec", "codec_stream", "stream")  # whose "seconds" are those of the sound, not of the work
# Metric -> (the fields that may hold it, whether less is better)
METRICS = {
    "median": (("ms_per_step", "us", "seconds_per_second"), True),
    "p90": (("ms_p90",), True),
    "p99": (("ms_p99", "gap_p99_ms"), True),
    "peak": (("peak_mib",), True),
    "floor": (("percent_of_floor",), False),
    "speed": (("audio_per_second", "rtfx"), False),
    "ttfa": (("ttfa_ms",), True),
    "nats": (("nats_per_token",), True),
}

Key = tuple[tuple[str, Any], ...]
Results = dict[Key, dict[str, float]]


@dataclass(frozen=True)
class Limit:
    """`metric` may be worse by `share` (0.05 is 5 %)."""

    metric: str
    share: float


@dataclass(frozen=True)
class Change:
    """One measurement in both files, or in one (then the other is None)."""

    key: Key
    before: dict[str, float] | None
    after: dict[str, float] | None

    def worse(self, metric: str) -> float | None:
        """By which share `after` is worse; None where it is not in both. Twice the time is 1."""
        a = (self.before or {}).get(metric)
        b = (self.after or {}).get(metric)
        if not a or not b:
            return None
        return b / a - 1 if METRICS[metric][1] else a / b - 1

    @property
    def name(self) -> str:
        """What tells it from others, for a person."""
        told = dict(self.key)
        words = [str(told[n]) for n in ("provider", "way", "precision", "model", "filter", "direction") if n in told]
        numbers = (
            "section",
            "requests",
            "batch",
            "codebooks",
            "positions",
            "start",
            "window",
            "chunk",
            "seconds",
            "durations",
        )
        return " ".join(words + [f"{n} {told[n]}" for n in numbers if n in told])


def parse_limit(text: str) -> Limit:
    """'median:5%' -> a limit. ValueError for what it is not."""
    metric, _, share = text.partition(":")
    if metric not in METRICS or not share.endswith("%"):
        raise ValueError(
            f"expected METRIC:SHARE% with a metric of {', '.join(METRICS)}, such as median:5%; got {text!r}"
        )
    try:
        value = float(share[:-1]) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"a share is a number of percent, such as 5%; got {share!r}")
    return Limit(metric, value)


def load(path: str | Path) -> tuple[Results, set[str]]:
    """The measurements of a file, and the machines that made them. OSError; ValueError where a line is no result."""
    found: dict[Key, dict[str, list[float]]] = {}
    machines = set()
    for line in read_lines([path]):
        card = line.get("machine") or {}
        machines.add(str(card.get("gpu") or card.get("cpu") or "an unknown machine"))
        values = {metric: value for metric in METRICS if (value := _value(line, metric)) is not None}
        if values:
            kept = found.setdefault(_key(line), {})
            for metric, value in values.items():
                kept.setdefault(metric, []).append(value)
    if not found:
        raise ValueError(f"{path} holds no measurement: were all providers absent?")
    return {key: {m: median(v) for m, v in values.items()} for key, values in found.items()}, machines


def _key(line: dict[str, Any]) -> Key:
    named = [(name, line[name]) for name in _NAMES if line.get(name) is not None]
    if line["benchmark"] in _ASKED and "seconds" in line:
        named.append(("seconds", line["seconds"]))
    if isinstance(line.get("durations"), list):
        named.append(("durations", tuple(line["durations"])))
    positions = line.get("positions")
    if isinstance(positions, list) and all(isinstance(p, int) for p in positions):
        named.append(("positions", "..".join(map(str, positions))))
    return tuple(named)


def _value(line: dict[str, Any], metric: str) -> float | None:
    for name in METRICS[metric][0]:
        value = line.get(name)
        if isinstance(value, dict):  # {"p50", "p10", "p90"}
            value = value.get("p50")
        elif value is None and isinstance(line.get("ms_per_step"), dict):
            value = line["ms_per_step"].get(metric)
        if (found := number(value)) is not None:
            return found
    return None


def changes(before: Results, after: Results) -> list[Change]:
    """In the order of the first file, then what only the second one has."""
    keys = [*before, *(key for key in after if key not in before)]
    return [Change(key, before.get(key), after.get(key)) for key in keys]


def different_machines(before: set[str], after: set[str]) -> str:
    """A sentence where times say nothing of the code, or nothing."""
    if before == after:
        return ""
    return f"made on different machines ({', '.join(sorted(before))}; {', '.join(sorted(after))}): times say little"


def failed(found: list[Change], limits: list[Limit]) -> list[str]:
    """A sentence for each measurement that is worse than a limit allows, or that is gone."""
    told = []
    for change in found:
        if change.after is None and dict(change.key).get("provider") == "musicgen_fast":
            told.append(f"{change.name}: it was measured before and is not any more")
        for limit in limits:
            worse = change.worse(limit.metric)
            if worse is not None and worse > limit.share:
                told.append(
                    f"{change.name}: {limit.metric} is {100 * worse:.1f} % worse, {100 * limit.share:g} % is allowed"
                )
    return told


def table(found: list[Change]) -> str:
    """Markdown; percentages say how much worse the second file is (negative: better)."""
    metrics = [
        m for m in METRICS if any(m in (side or {}) for change in found for side in (change.before, change.after))
    ]
    text = ["| what | " + " | ".join(f"{metric} | worse by" for metric in metrics) + " |"]
    text.append("|---" * (1 + 2 * len(metrics)) + "|")
    for change in found:
        cells = []
        for metric in metrics:
            pair = [(side or {}).get(metric) for side in (change.before, change.after)]
            cells.append(" -> ".join("-" if value is None else f"{value:.4g}" for value in pair))
            worse = change.worse(metric)
            cells.append("" if worse is None else f"{100 * worse:+.1f} %")
        text.append(f"| {change.name} | " + " | ".join(cells) + " |")
    return "\n".join(text)

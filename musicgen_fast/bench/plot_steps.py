"""Times of a step out of lines of results: one `Timed` for a provider and precision, from the three formats there are.

`cpu` lines hold a whole curve; of `latency` there is a line for every stretch of positions, and of `step` (older) one
for every round. Needs no torch; knows nothing of plots.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from .result_lines import Line, date_of, latest, number

__all__ = ["Timed", "timed_runs"]

Span = tuple[float, ...]


@dataclass(frozen=True)
class Timed:
    """`curve` is (position, ms, floor ms) of every stretch, `ms` the average over it, `per_round` of each round."""

    provider: str
    precision: str
    curve: tuple[tuple[float, float, float | None], ...]
    ms: float
    per_round: tuple[float, ...]
    peak_mib: float | None


def timed_runs(lines: list[Line]) -> list[Timed]:
    """Of lines of one kind and scene; in the order of the files. Only stretches that all have, so that averages and
    peaks are of the same work; where none is common, those of the latest line."""
    measured = [line for line in lines if _ms(line) is not None]
    kept = latest(measured, lambda line: (str(line["provider"]), str(line["precision"]), _span(line)))
    spans: dict[tuple[str, str], dict[Span, list[Line]]] = {}
    for (provider, precision, span), group in kept.items():
        spans.setdefault((provider, precision), {})[span] = group
    if not spans:
        return []
    shared = set.intersection(*(set(found) for found in spans.values()))
    if not shared:
        named = max(measured, key=date_of)
        shared = set(spans[str(named["provider"]), str(named["precision"])])
    runs = []
    for (provider, precision), found in spans.items():
        if chosen := [found[span] for span in sorted(shared) if span in found]:
            runs.append(_timed(provider, precision, chosen))
    return runs


def _timed(provider: str, precision: str, stretches: list[list[Line]]) -> Timed:
    curve = tuple(point for group in stretches for point in _points(group[-1]))
    middles = [sum(_span(group[0])) / 2 for group in stretches]
    averages = [median([ms for line in group if (ms := _ms(line)) is not None]) for group in stretches]
    rounds = zip(*(_rounds(group) for group in stretches), strict=False)
    peaks = [peak for group in stretches for line in group if (peak := number(line.get("peak_mib"))) is not None]
    return Timed(
        provider, precision, curve, _average(middles, averages),
        tuple(_average(middles, list(each)) for each in rounds), max(peaks, default=None),
    )  # fmt: skip


def _average(x: list[float], y: list[float]) -> float:
    """Of a curve through the points, from the first to the last one."""
    if len(x) < 2:
        return y[0]
    pairs = list(zip(x, y, strict=True))
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(pairs, pairs[1:], strict=False))
    return area / (x[-1] - x[0])


def _ms(line: Line) -> float | None:
    ms = line.get("ms_per_step")
    return number(ms.get("p50") if isinstance(ms, dict) else ms)


def _rounds(group: list[Line]) -> list[float]:
    """A line a round, or a line with all of them."""
    told = group[-1].get("ms_per_round") if len(group) == 1 else None
    return [float(ms) for ms in told or [_ms(line) for line in group]]


def _span(line: Line) -> Span:
    """First and last position; () where the line is of a whole window."""
    positions = line.get("positions")
    if isinstance(positions, list) and len(positions) == 2 and all(number(p) is not None for p in positions):
        return float(positions[0]), float(positions[1])
    return ()


def _points(line: Line) -> list[tuple[float, float, float | None]]:
    positions, ms = line.get("positions"), _ms(line)
    if span := _span(line):
        return [] if ms is None else [(sum(span) / 2, ms, number(line.get("floor_ms")))]
    blocks = [block for block in positions or [] if isinstance(block, dict)]
    return [(block["position"], block["ms"], number(block.get("floor_ms"))) for block in blocks]

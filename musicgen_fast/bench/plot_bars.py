"""The plots of `bench plot` that are bars: peers, memory, quality, sampler, time to the first sound.

Every bar bears its number, so that axes are needed only where they are logarithmic. Knows no files.
"""

from __future__ import annotations

import re
from math import log
from typing import Any

from .plot_data import OURS, Bar, Picture
from .plot_style import LEFT, MARKERS, SIZES, STEP_MS, WIDTH, Sheet, Theme, label_of, log_ticks, mixed, real_time

__all__ = ["memory", "peers", "quality", "sampler", "stream"]

ROW = 0.23  # inches of a bar with its gap
_SPAN = 1e4  # of a log scale around 0: what is smaller than that share of the largest is next to nothing
_KEY = 0.17  # inches of a row of names
_MUTED = 0.6  # of the strength of a peer's hue, where ours stands out
_PRECISIONS = tuple(MARKERS)


def peers(picture: Picture, theme: Theme) -> Sheet:
    bars: list[Any] = list(picture.content)
    told = "average of " + (picture.note or "the steps timed") + "; ×: times the speed of the best transformers"
    said = [f"{ms:.3g} ms" + (f"   {_times(times)}" if times else "") for ms, times in (b.values for b in bars)]
    sheet, axes = _rows(picture, theme, "Milliseconds per decoding step, with guidance", told, said, 0.22)
    if axes.get_xlim()[1] > STEP_MS:
        axes.axvline(STEP_MS, **real_time(theme))
        axes.annotate(
            "real time", (STEP_MS, 0), xycoords=("data", "axes fraction"), xytext=(0, -3), va="top", ha="center",
            textcoords="offset points", size=SIZES["small"],
        )  # fmt: skip
    return sheet


def _times(ratio: float) -> str:
    """0.59x, 1.0x, 7.3x, 12x."""
    return f"{ratio:.2f}×" if ratio < 0.95 else f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:.0f}×"


def memory(picture: Picture, theme: Theme) -> Sheet:
    bars: list[Any] = list(picture.content)
    where = "peak while generating, not while loading, MiB: process on a CPU, torch reserved on a GPU"
    return _rows(picture, theme, "Memory", where, [f"{bar.values[0]:,.0f} MiB" for bar in bars])[0]


def _rows(
    picture: Picture, theme: Theme, title: str, told: str, said: list[str], below: float = 0.05
) -> tuple[Sheet, Any]:
    """A bar a row, the first on top, its first value as its length and `said` behind it; `below` inches stay free."""
    bars: list[Any] = list(picture.content)
    height = Sheet.TOP + Sheet.BOTTOM + ROW * len(bars) + 0.08 + below
    sheet = Sheet(picture, theme, height, title, told)
    names = [label_of(bar.provider, bar.precision) for bar in bars]
    left = LEFT + sheet.wide(names) + 0.12
    room = sheet.wide(said) + 0.2
    axes = sheet.axes(left, Sheet.BOTTOM + below, WIDTH - left - room, ROW * len(bars))
    colours = [_bar_hue(theme, bar) for bar in bars]
    axes.barh(range(len(bars)), [bar.values[0] for bar in bars], height=0.72, color=colours)
    axes.set_xlim(0, max(bar.values[0] for bar in bars))
    _name_rows(axes, theme, bars, names)
    for row, (bar, text) in enumerate(zip(bars, said, strict=True)):
        _behind(axes, theme, bar, row, bar.values[0], text)
    return sheet, axes


def _bar_hue(theme: Theme, bar: Bar) -> str:
    hue = theme.hue(bar.provider)
    return hue if bar.provider == OURS else mixed(hue, theme.back, _MUTED)


def _name_rows(axes: Any, theme: Theme, bars: list[Bar], names: list[str]) -> None:
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_yticks(range(len(bars)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.set_xticks([], minor=True)
    axes.spines["bottom"].set_visible(False)
    for label, bar in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_color(theme.text)
        label.set_weight("bold" if bar.provider == OURS else "normal")


def _behind(axes: Any, theme: Theme, bar: Bar, row: float, value: float, text: str) -> None:
    axes.annotate(
        text, (max(value, 0), row), xytext=(4, 0), textcoords="offset points", va="center", annotation_clip=False,
        color=theme.text, weight="bold" if bar.provider == OURS else "normal",
        bbox={"facecolor": theme.back, "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def quality(picture: Picture, theme: Theme) -> Sheet:
    bars: list[Any] = sorted(picture.content, key=_by_precision)
    height = Sheet.TOP + Sheet.BOTTOM + ROW * len(bars) + 0.4
    told = "; ".join(filter(None, ["less is better, log scales around 0", picture.note]))
    sheet = Sheet(picture, theme, height, "Quality of each precision, against float32", told)
    names = [label_of(bar.provider, bar.precision) for bar in bars]
    left, between = LEFT + sheet.wide(names) + 0.12, 0.15
    texts = (
        [_percent(bar.values[0]) for bar in bars],
        [_nats(bar.values[1]) for bar in bars],
    )
    rooms = [sheet.wide(said) + 0.12 for said in texts]
    width = (WIDTH - left - between - sum(rooms) - 0.1) / 2
    heads = ("nats per token over float32", "KL from float32, nats")
    for panel in (0, 1):
        start = left + panel * (width + rooms[0] + between)
        axes = sheet.axes(start, Sheet.BOTTOM + 0.1, width, ROW * len(bars))
        values = [bar.values[panel] or 0.0 for bar in bars]
        most = max(map(abs, values)) or 1.0
        least = max(min((abs(v) for v in values if v), default=1.0), most / _SPAN)
        axes.set_xscale("symlog", linthresh=least, linscale=0.5)
        axes.barh(range(len(bars)), values, height=0.72, color=[_bar_hue(theme, bar) for bar in bars])
        axes.set_xlim(min(0.0, *values), max(least, *values))
        axes.axvline(0, color=theme.faint, linewidth=0.8)
        axes.spines["left"].set_visible(False)
        axes.set_title(heads[panel], loc="left", size=SIZES["text"], color=theme.text, pad=5)
        _name_rows(axes, theme, bars, names if panel == 0 else [""] * len(bars))
        for row, bar in enumerate(bars):
            _behind(axes, theme, bar, row, values[row], texts[panel][row])
    return sheet


def _by_precision(bar: Bar) -> tuple[int, bool, str]:
    known = _PRECISIONS.index(bar.precision) if bar.precision in _PRECISIONS else len(_PRECISIONS)
    return known, bar.provider != OURS, bar.provider


def _percent(value: float | None) -> str:
    """+6.6 %, +0.021 %."""
    if value is None or value == 0:
        return "-" if value is None else "0 %"
    return f"{value:+.2g} %" if abs(value) >= 0.001 else "< 0.001 %"


def _nats(value: float | None) -> str:
    if value is None or value == 0:
        return "-" if value is None else "0"
    return f"{value:.2g}" if value >= 1e-7 else "< 1e-7"


def _short(value: float) -> str:
    """9.9, 13, 164, 1.5k, 15k."""
    if value >= 999.5:
        return f"{value / 1000:.1f}k" if value < 9950 else f"{value / 1000:.0f}k"
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def stream(picture: Picture, theme: Theme) -> Sheet:
    """Two bars a row: cold above warm."""
    bars: list[Any] = sorted(picture.content, key=lambda bar: bar.values[1] or bar.values[0])
    height = Sheet.TOP + Sheet.BOTTOM + 2 * ROW * len(bars) + 0.15
    told = "ms; cold: the first call of a process, after loading; warm: later calls; in brackets the sound that it is"
    sheet = Sheet(picture, theme, height, "Time to the first sound", told)
    names = [label_of(bar.provider, bar.precision) for bar in bars]
    said = [[f"{value:,.0f} ms {word}{_holds(bar, word)}" for value, word in _sounds(bar)] for bar in bars]
    left, room = LEFT + sheet.wide(names) + 0.12, sheet.wide([text for each in said for text in each]) + 0.2
    axes = sheet.axes(left, Sheet.BOTTOM + 0.05, WIDTH - left - room, 2 * ROW * len(bars))
    for row, bar in enumerate(bars):
        found = _sounds(bar)
        for number, (value, word) in enumerate(found):
            place = row + (number - (len(found) - 1) / 2) * 0.4
            hue = _bar_hue(theme, bar)
            axes.barh(place, value, height=0.36, color=hue if word == "warm" else mixed(hue, theme.back, 0.45))
            _behind(axes, theme, bar, place, value, said[row][number])
    axes.set_xlim(0, max(value for bar in bars for value, _ in _sounds(bar)))
    _name_rows(axes, theme, bars, names)
    return sheet


def _sounds(bar: Bar) -> list[tuple[float, str]]:
    return [(value, word) for value, word in zip(bar.values[:2], ("cold", "warm"), strict=True) if value is not None]


def _holds(bar: Bar, word: str) -> str:
    """Of the warm bar: ' (20 ms)'."""
    return f" ({bar.values[2]:,.0f} ms)" if word == "warm" and bar.values[2] is not None else ""


def sampler(picture: Picture, theme: Theme) -> Sheet:
    """A panel a filter, in it a group of bars a batch, in each the samplers in one order."""
    bars: list[Any] = list(picture.content)
    kinds, batches = list(dict.fromkeys(bar.panel for bar in bars)), sorted({bar.group for bar in bars})
    order = sorted({bar.provider for bar in bars}, key=_by_speed(bars))
    colours = _sampler_hues(order, theme)
    high, gap = 1.25, 0.4
    height = Sheet.TOP + Sheet.BOTTOM + 0.75 + len(kinds) * (high + gap) - gap + _KEY * (len(order) > 6)
    told = "microseconds for the tokens of a step, log scale; ours (form:backend) first, then peers"
    sheet = Sheet(picture, theme, height, "Time of a draw", told)
    below = _key(sheet, [(label_of(name), colours[name]) for name in order], height - Sheet.TOP - 0.1)
    values = [bar.values[0] for bar in bars]
    low, most = min(values) / 1.6, max(values) * 2.2
    for number, kind in enumerate(kinds):
        bottom = below - 0.38 - high - number * (high + gap)
        axes = sheet.axes(0.55, bottom, WIDTH - 0.7, high)
        axes.set_yscale("log")
        axes.set_ylim(low, most)
        wide = 0.92 / len(order)
        for bar in (bar for bar in bars if bar.panel == kind):
            x = batches.index(bar.group) + (order.index(bar.provider) - (len(order) - 1) / 2) * wide
            axes.bar(x, bar.values[0] - low, bottom=low, width=0.9 * wide, color=colours[bar.provider])
            axes.annotate(
                _short(bar.values[0]), (x, bar.values[0]), xytext=(0, 1.5), textcoords="offset points", ha="center",
                va="bottom", size=5.8, rotation=0 if len(order) < 7 else 90,
            )  # fmt: skip
        axes.set_xlim(-0.5, len(batches) - 0.5)
        axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        axes.tick_params(axis="x", length=0)
        log_ticks(axes.yaxis, low, most, (1,))
        axes.grid(axis="y")
        axes.set_title(_filter_name(kind), loc="left", size=SIZES["text"], weight="bold", color=theme.text, pad=4)
    return sheet


def _by_speed(bars: list[Bar]) -> Any:
    """Ours first; each by its mean logarithm, as one batch of 64 would outweigh all others."""
    times: dict[str, list[float]] = {}
    for bar in bars:
        times.setdefault(bar.provider, []).append(log(bar.values[0] or 1.0))
    return lambda name: (":" not in name, sum(times[name]) / len(times[name]))


def _sampler_hues(order: list[str], theme: Theme) -> dict[str, str]:
    """Ours are shades of one hue, the fastest the strongest."""
    ours = [name for name in order if ":" in name]
    return {
        name: mixed(theme.hue(name), theme.back, 1 - 0.7 * ours.index(name) / len(ours) if name in ours else _MUTED)
        for name in order
    }


def _key(sheet: Sheet, entries: list[tuple[str, str]], y: float) -> float:
    """Squares and names in a row, or two; returns where it stands."""
    x = LEFT
    for name, colour in entries:
        wide = 0.14 + sheet.wide([name], "normal")
        if x + wide > WIDTH - LEFT:
            x, y = LEFT, y - _KEY
        sheet.text(x, y, "■", color=colour, va="center")
        sheet.text(x + 0.14, y, name, va="center")
        x += wide + 0.14
    return y


def _filter_name(kind: str) -> str:
    """top_k250 -> top-k 250."""
    return "no filter" if kind == "none" else re.sub(r"^top_([kp])", r"top-\1 ", kind)

"""Draws the pictures of `plot_data` with matplotlib, as PNG files for light and dark pages.

Needs no display and no pyplot. Knows no lines of results; colours, names and sheets are those of `plot_style`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import plot_bars
from .plot_data import OURS, Curve, Picture
from .plot_style import (
    MARKERS,
    SIZES,
    STEP_MS,
    THEMES,
    WIDTH,
    Sheet,
    Theme,
    label_of,
    log_ticks,
    mixed,
    model_name,
    real_time,
    shade,
    spread,
    theme_settings,
)

__all__ = ["check_matplotlib", "draw", "sheet_of"]

_SLOW = 20  # seconds of sound a second below which real time is marked
_LINE = 0.135  # inches between labels that would overlap


def check_matplotlib() -> None:
    """ImportError, with what to install, where there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib, which is not installed: pip install musicgen-fast[plot]")


def draw(pictures: Iterable[Picture], folder: Path, themes: Iterable[str], scale: int) -> list[Path]:
    """Writes NAME-THEME.png of each, 600 x `scale` pixels wide; returns the files. OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in pictures:
        for name in themes:
            path = folder / f"{picture.name}-{name}.png"
            with theme_settings(THEMES[name]):
                sheet_of(picture, THEMES[name]).save(path, scale)
            written.append(path)
    return written


def sheet_of(picture: Picture, theme: Theme) -> Sheet:
    """The picture, drawn but not written; inside `theme_settings(theme)`."""
    return _DRAW[picture.plot](picture, theme)


# -- curves -----------------------------------------------------------------------------------------------------------


def _step(picture: Picture, theme: Theme) -> Sheet:
    curves: list[Any] = list(picture.content)
    told = "milliseconds, log scale; dashed: floor of ours, the time to read a step's bytes from memory"
    sheet = Sheet(picture, theme, 4.0, "Time of a decoding step, with guidance", told)
    names = [f"{label_of(c.provider, c.precision)}  {c.points[-1][1]:.3g}" for c in curves]
    right = sheet.wide(names) + 0.25
    axes = sheet.axes(0.5, 0.68, WIDTH - 0.5 - right, 4.0 - Sheet.TOP - 0.74)
    axes.set_yscale("log")
    for curve in curves:
        _line(axes, theme, curve)
        if len(curve.floor) > 1:
            axes.plot(*zip(*curve.floor, strict=True), "--", color=shade(theme, OURS, curve.precision), linewidth=1.0)
    values = [y for c in curves for _, y in (*c.points, *c.floor)] + [STEP_MS]
    axes.set_ylim(min(values) / 1.15, max(values) * 1.15)
    axes.set_xlim(0, 1.03 * max(x for c in curves for x, _ in c.points))
    axes.axhline(STEP_MS, **real_time(theme))
    axes.annotate(
        f"real time, {STEP_MS:g} ms", (0, STEP_MS), xytext=(3, 3), textcoords="offset points",
        size=SIZES["small"],
    )  # fmt: skip
    axes.set_xlabel("position of the step, frames (50 a second)")
    log_ticks(axes.yaxis, *axes.get_ylim())
    axes.grid(axis="y")
    _end_labels(axes, theme, curves, names)
    return sheet


def _throughput(picture: Picture, theme: Theme) -> Sheet:
    panels: dict[str, list[Any]] = {}
    for curve in picture.content:
        panels.setdefault(curve.panel, []).append(curve)
    names = {model: [_way(c) for c in curves] for model, curves in panels.items()}
    highs = [max(1.6, sum(_LINE * (name.count("\n") + 1) for name in several)) for several in names.values()]
    gap = 0.5
    height = Sheet.TOP + Sheet.BOTTOM + 0.62 + sum(highs) + gap * (len(highs) - 1)
    slow = any(_most(curves) < _SLOW for curves in panels.values())
    told = "seconds of sound made in a second, by requests at once" + "; dotted: real time" * slow
    sheet = Sheet(picture, theme, height, "Throughput", told)
    right = sheet.wide([name for several in names.values() for name in several]) + 0.25
    bottom = height - Sheet.TOP - 0.24 + gap
    for high, (model, curves) in zip(highs, panels.items(), strict=True):
        bottom -= high + gap
        axes = sheet.axes(0.5, bottom, WIDTH - 0.5 - right, high)
        for curve in curves:
            _line(axes, theme, curve)
        batches = sorted({x for c in curves for x, _ in c.points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [f"{x:g}" for x in batches], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlim(batches[0] / 1.15, batches[-1] * 1.15)
        axes.set_ylim(0, 1.12 * _most(curves))
        axes.grid(axis="y")
        if _most(curves) < _SLOW:
            axes.axhline(1, **real_time(theme))
        axes.set_title(model_name(model), loc="left", size=SIZES["text"], color=theme.text, weight="bold", pad=4)
        _end_labels(axes, theme, curves, names[model])
    axes.set_xlabel("requests at once")
    return sheet


def _most(curves: list[Curve]) -> float:
    return max(y for curve in curves for _, y in curve.points)


def _way(curve: Curve) -> str:
    return "\n".join(filter(None, [label_of(curve.provider, curve.precision), curve.way]))


def _line(axes: Any, theme: Theme, curve: Curve) -> None:
    """Ours thicker; always full, as dashes are the floor."""
    colour, ours = shade(theme, curve.provider, curve.precision), curve.provider == OURS
    axes.plot(
        *zip(*curve.points, strict=True), color=colour, linewidth=1.8 if ours else 1.2, markersize=4,
        marker=MARKERS.get(curve.precision, "o"), markeredgewidth=0, clip_on=False,
    )  # fmt: skip


def _end_labels(axes: Any, theme: Theme, curves: list[Curve], names: list[str]) -> None:
    """Each name at the end of its curve, in its hue, moved where two would overlap, with a thin line to its end."""
    dpi = axes.figure.dpi
    box = axes.get_window_extent()
    ends = [axes.transData.transform(curve.points[-1]) for curve in curves]
    lines = max(name.count("\n") + 1 for name in names)
    apart = lines * _LINE * dpi
    places = spread([y for _, y in ends], apart, box.y0 + apart / 2 - 0.05 * dpi, box.y1 - apart / 2 + 0.05 * dpi)
    for curve, name, (x, y), place in zip(curves, names, ends, places, strict=True):
        to = ((box.x1 + 0.1 * dpi - x) * 72 / dpi, (place - y) * 72 / dpi)
        hue = theme.hue(curve.provider)
        axes.annotate(
            name, curve.points[-1], xytext=to, textcoords="offset points", va="center", annotation_clip=False,
            color=hue, weight="bold" if curve.provider == OURS else "normal",
            arrowprops={
                "arrowstyle": "-", "color": mixed(hue, theme.back, 0.35), "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4,
            },
        )  # fmt: skip


_DRAW: dict[str, Callable[[Picture, Theme], Sheet]] = {
    "step": _step, "throughput": _throughput, "peers": plot_bars.peers, "memory": plot_bars.memory,
    "quality": plot_bars.quality, "sampler": plot_bars.sampler, "stream": plot_bars.stream,
}  # fmt: skip

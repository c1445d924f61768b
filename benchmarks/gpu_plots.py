"""The plots of a GPU report, as SVG files: no library needed, and they show in any browser and on GitHub.

What the report lacks is not drawn. Knows the lines of the sections, not how they were measured.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from gpu_summary import measured

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 780, 400, 70, 40, 250, 50
COLOURS = ("#1f6fb2", "#d1541f", "#2a8f4e", "#8a4fb0", "#b8912a", "#666666", "#c23b6b", "#2aa0a0")
Series = dict[str, list[tuple[float, float]]]  # name -> points; a name that ends in "floor" or "ceiling" is dashed


def draw_plots(report: dict[str, Any], beside: Path) -> list[Path]:
    """Write what can be drawn beside the report; returns the files."""
    sections, machine = report["sections"], report["machine"]
    where = f"{machine.get('gpu') or machine.get('cpu')}, {machine.get('date', '')[:10]}" + " (tiny)" * report["tiny"]
    drawn = {
        "step": lines_svg(f"ms a step, musicgen-small: {where}", "position", "ms", step_series(sections)),
        "batch": lines_svg(f"seconds of sound a second: {where}", "requests", "s/s", batch_series(sections)),
        "ratios": bars_svg(f"ms a step over 30 s, musicgen-small: {where}", step_bars(report["summary"])),
        "products": bars_svg(f"% of the speed of reading: {where}", product_bars(sections)),
    }
    written = []
    for name, svg in drawn.items():
        if svg:
            path = beside.with_name(f"{beside.stem}-{name}.svg")
            path.write_text(svg, encoding="utf-8")
            written.append(path)
    return written


def step_series(sections: dict[str, Any]) -> Series:
    """The device's time of a step against its position, with the floor of each."""
    series: Series = {}
    for line in measured(sections, "step", size="small"):
        if line["precision"] not in ("float16", "int8"):
            continue
        name = f"{line['version']} {line['precision']}" + (", int8 cache" if line["kv"] == "int8" else "")
        series.setdefault(name, []).append((line["position"], line["ms"]))
        if line["version"] == "v3":
            series.setdefault(f"{name}: floor", []).append((line["position"], line["floor_ms"]))
    return series


def batch_series(sections: dict[str, Any]) -> Series:
    series: Series = {}
    for line in measured(sections, "batch"):
        name = "int8 cache" if line["kv"] == "int8" else "float16 cache"
        series.setdefault(name, []).append((line["requests"], line["audio_per_second"]))
        series.setdefault(f"{name}: ceiling", []).append((line["requests"], line["ceiling"]))
    return series


def step_bars(summary: dict[str, Any]) -> list[tuple[str, float]]:
    ours = [(name[6:], found["ms"]) for name, found in summary["windows"].items() if name.startswith("small ")]
    return ours + [(name, found["ms"]) for name, found in summary["peers"].items() if "ms" in found]


def product_bars(sections: dict[str, Any]) -> list[tuple[str, float]]:
    """Two rows: the products of one request."""
    found = measured(sections, "product", rows=2)
    return [(f"{line['product']} {line['d']} {line['who']}", line["percent_of_read"]) for line in found]


def lines_svg(title: str, x_name: str, y_name: str, series: Series) -> str:
    """Empty without points. Both axes begin at 0."""
    points = [point for each in series.values() for point in each]
    if not points:
        return ""
    x_most, y_most = (_rounded(max(p[axis] for p in points)) for axis in (0, 1))

    def at(x: float, y: float) -> str:
        across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return f"{LEFT + across * x / x_most:.1f},{HEIGHT - BOTTOM - up * y / y_most:.1f}"

    parts = []
    for tick in range(6):
        x, y = x_most * tick / 5, y_most * tick / 5
        parts.append(f'<polyline class="grid" points="{at(0, y)} {at(x_most, y)}"/>')
        px, py = at(x, y).split(",")
        parts.append(_label(float(px), HEIGHT - BOTTOM + 18, f"{x:g}", "middle"))
        parts.append(_label(LEFT - 8, float(py) + 4, f"{y:g}", "end"))
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name, "middle"))
    parts.append(_label(8, TOP - 8, y_name, "start"))
    colours: dict[str, str] = {}
    for number, (name, each) in enumerate(series.items()):
        colour = colours.setdefault(name.split(":")[0], COLOURS[len(colours) % len(COLOURS)])
        dashed = ' stroke-dasharray="5 4"' if name.endswith(("floor", "ceiling")) else ""
        path = " ".join(at(x, y) for x, y in sorted(each))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2"{dashed} points="{path}"/>')
        y = TOP + 16 * number + 8
        key = f"{WIDTH - RIGHT + 12},{y} {WIDTH - RIGHT + 36},{y}"
        parts.append(f'<polyline stroke="{colour}" stroke-width="2"{dashed} points="{key}"/>')
        parts.append(_label(WIDTH - RIGHT + 42, y + 4, name, "start"))
    return _svg(title, HEIGHT, parts)


def bars_svg(title: str, bars: list[tuple[str, float]]) -> str:
    """One bar under the other, each with its number, and how many times the first it is."""
    if not bars:
        return ""
    most, parts = max(value for _, value in bars), []
    for number, (name, value) in enumerate(bars):
        y, long = TOP + 10 + 24 * number, (WIDTH - 2 * RIGHT) * value / most
        parts.append(_label(RIGHT - 8, y + 13, name, "end"))
        parts.append(f'<rect x="{RIGHT}" y="{y}" width="{long:.1f}" height="18" fill="{COLOURS[0]}"/>')
        parts.append(_label(RIGHT + long + 6, y + 13, f"{value:.3g}  (x {value / bars[0][1]:.2f})", "start"))
    return _svg(title, TOP + 24 * len(bars) + 30, parts)


def _rounded(most: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(most)) if most > 0 else 1.0
    return next((step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8) if step * power >= most), 10 * power)


def _label(x: float, y: float, said: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def _svg(title: str, height: int, parts: list[str]) -> str:
    style = "text{font:12px sans-serif;fill:#222}.grid{fill:none;stroke:#ddd}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}">'
    back = f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, back, _label(LEFT, 20, title, "start"), *parts, "</svg>", ""])

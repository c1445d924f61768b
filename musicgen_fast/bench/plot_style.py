"""How the plots of `bench plot` look: the colours of light and dark, the names of providers, a sheet with its texts.

One hue a provider, apart also for the colour-blind and readable as text on both backgrounds; shades and markers tell
precisions apart. Sizes are in inches and points of a page of 6 inches, which is a column of 600 CSS pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plot_data import OURS, Picture

__all__ = [
    "LEFT", "MARKERS", "SIZES", "STEP_MS", "THEMES", "WIDTH", "Sheet", "Theme", "label_of", "log_ticks", "mixed",
    "model_name", "real_time", "shade", "spread", "theme_settings",
]  # fmt: skip

WIDTH = 6.0  # inches
STEP_MS = 20.0  # of sound in a step, at 50 frames a second
DPI = 100  # of scale 1
COLOURS = 96  # of a file; the rest are mixtures at the edges of letters
LEFT = 0.12  # inches, where titles begin
SIZES = {"title": 11.0, "text": 8.0, "small": 7.0}
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "D", "int8": "^", "int4": "v"}
_STRENGTH = {"float32": 0.6, "bfloat16": 0.75, "float16": 0.75, "int8": 0.9, "int4": 1.0}
_NAMES = {
    "transformers_compiled": "transformers + compile", "openvino": "OpenVINO", "fast_musicgen": "fast-musicgen",
    "compiled": "torch.compile", "flashinfer": "FlashInfer", "vllm": "vLLM",
}  # fmt: skip
_HUE = {"compiled": "transformers_compiled", "vllm": "openvino", "flashinfer": "fast_musicgen"}


@dataclass(frozen=True)
class Theme:
    """Colours as #rrggbb: page, writing, lesser writing, grid, and one a provider; `other` for those not foreseen."""

    name: str
    back: str
    text: str
    faint: str
    grid: str
    hues: dict[str, str]
    other: str

    def hue(self, provider: str) -> str:
        """Of ours also where the name is a form and a backend of the sampler, such as `draw:cpu`."""
        if ":" in provider:
            return self.hues[OURS]
        return self.hues.get(_HUE.get(provider, provider), self.other)


THEMES = {
    "light": Theme(
        "light", "#ffffff", "#1f2328", "#59636e", "#e4e8ec",
        {OURS: "#0969da", "transformers": "#c03904", "transformers_compiled": "#553b01", "audiocraft": "#b5179e",
         "openvino": "#168458", "fast_musicgen": "#6d1ee0"}, "#59636e",
    ),
    "dark": Theme(
        "dark", "#0d1117", "#e6edf3", "#9198a1", "#262c36",
        {OURS: "#58a6ff", "transformers": "#ee5a24", "transformers_compiled": "#ecd02c", "audiocraft": "#f05ad2",
         "openvino": "#35e0a0", "fast_musicgen": "#a85cff"}, "#9198a1",
    ),
}  # fmt: skip


def mixed(colour: str, back: str, strength: float) -> str:
    """`strength` of a colour on a background; opaque, unlike alpha, so that what lies below does not shine through."""
    pairs = ((int(colour[i : i + 2], 16), int(back[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(strength * a + (1 - strength) * b):02x}" for a, b in pairs)


def shade(theme: Theme, provider: str, precision: str) -> str:
    """The hue of a provider, stronger the fewer bits a weight has."""
    return mixed(theme.hue(provider), theme.back, _STRENGTH.get(precision, 1.0))


def label_of(provider: str, precision: str = "") -> str:
    return f"{_NAMES.get(provider, provider)} {precision}".strip()


def model_name(model: str) -> str:
    """In words where it is random:SIZE."""
    size = model.removeprefix("random:")
    return model if size == model else f"musicgen-{size} shapes, random weights"


def spread(wanted: list[float], apart: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, in their order, at least `apart` from each other, between `low` and `high` where
    there is room; what collides stays centred."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    groups: list[list[float]] = []  # [centre, count]
    for index in order:
        groups.append([wanted[index], 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < apart * (groups[-1][1] + groups[-2][1]) / 2:
            (centre, count), (other, more) = groups.pop(), groups.pop()
            groups.append([(centre * count + other * more) / (count + more), count + more])
    placed = [centre + apart * (i - (count - 1) / 2) for centre, count in groups for i in range(int(count))]
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high - apart * (len(placed) - 1 - i))
    placed = [max(place, low + apart * i) for i, place in enumerate(placed)]
    found = [0.0] * len(wanted)
    for index, place in zip(order, placed, strict=True):
        found[index] = place
    return found


def log_ticks(axis: Any, low: float, high: float, marks: tuple[int, ...] = (1, 2, 5)) -> None:
    """These of every decade, as plain numbers; 1, 2 and 5 where that is fewer than two."""
    ticks = [m * 10.0**e for e in range(-9, 10) for m in marks if low <= m * 10.0**e <= high]
    if len(ticks) < 2 and marks == (1,):
        return log_ticks(axis, low, high)
    axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def real_time(theme: Theme) -> dict[str, Any]:
    """The style of the line that marks real time."""
    return {"color": theme.text, "linewidth": 0.8, "linestyle": (0, (1, 2))}


@contextmanager
def theme_settings(theme: Theme) -> Iterator[None]:
    """matplotlib's own defaults and this theme's colours, whatever a user's matplotlibrc says; undone at the end."""
    import matplotlib

    own: dict[Any, Any] = {
        "font.family": ["DejaVu Sans"], "font.size": SIZES["text"], "text.color": theme.text, "axes.linewidth": 0.6,
        "axes.edgecolor": theme.faint, "axes.labelcolor": theme.faint, "axes.facecolor": theme.back,
        "xtick.color": theme.faint, "ytick.color": theme.faint, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
        "xtick.major.size": 2.5, "ytick.major.size": 2.5, "axes.axisbelow": True, "figure.facecolor": theme.back,
        "grid.color": theme.grid, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(own)
        yield


class Sheet:
    """A page with a title, a line below it and the foot (machine, threads, model, date); axes are placed in inches."""

    TOP, BOTTOM = 0.56, 0.3  # inches that the texts take

    def __init__(self, picture: Picture, theme: Theme, height: float, title: str, told: str):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.theme, self.height = theme, height
        self.figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        self.canvas = FigureCanvasAgg(self.figure)
        self.text(LEFT, height - 0.12, title, va="top", size=SIZES["title"], weight="bold")
        self.text(LEFT, height - 0.34, self._cut(told), va="top", color=theme.faint)
        self.text(LEFT, 0.1, self._cut(_foot(picture)), va="bottom", size=SIZES["small"], color=theme.faint)

    def text(self, x: float, y: float, said: str, **how: Any) -> Any:
        """`x`, `y` in inches from the left lower corner."""
        return self.figure.text(x / WIDTH, y / self.height, said, **how)

    def axes(self, left: float, bottom: float, width: float, height: float) -> Any:
        """Inches."""
        return self.figure.add_axes((left / WIDTH, bottom / self.height, width / WIDTH, height / self.height))

    def wide(self, texts: list[str], weight: str = "bold") -> float:
        """Inches of the widest of the texts, by default as if it were about ours."""
        drawn = [self.figure.text(0, 0, said, weight=weight) for said in texts]
        widths = [text.get_window_extent(self.canvas.get_renderer()).width / DPI for text in drawn]
        for text in drawn:
            text.remove()
        return max(widths, default=0.0)

    def _cut(self, said: str) -> str:
        """What fits in the width: names of machines and data can be of any length."""
        whole = said
        while len(said) > 1 and self.wide([said], "normal") > WIDTH - 2 * LEFT:
            said = said[:-1]
        return whole if said == whole else said[:-1].rstrip() + "…"

    def save(self, path: Path, scale: int) -> None:
        """As a PNG file of few colours, a third of the size; without date and version: the same bytes for the same
        picture. The most frequent colours, the page's among them, stay exact."""
        import numpy as np
        from PIL import Image

        self.figure.set_dpi(DPI * scale)
        self.canvas.draw()
        pixels = np.asarray(self.canvas.buffer_rgba())[..., :3].astype(np.int64)
        packed = pixels @ (1 << 16, 1 << 8, 1)
        found, where, counts = np.unique(packed, return_inverse=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:COLOURS]
        apart = [np.abs((found[:, None] >> bits & 255) - (found[order] >> bits & 255)) for bits in (16, 8, 0)]
        nearest = np.sum(apart, axis=0).argmin(axis=1)
        image = Image.fromarray(nearest[where].reshape(packed.shape).astype(np.uint8))
        image.putpalette([int(colour) >> bits & 255 for colour in found[order] for bits in (16, 8, 0)])
        image.save(path, format="PNG", optimize=True)


def _foot(picture: Picture) -> str:
    threads = picture.scene.threads
    what = model_name(picture.scene.what)
    parts = [picture.scene.machine, f"{threads} thread{'s' * (threads > 1)}" if threads else "", what, picture.date]
    return "  ·  ".join(part for part in parts if part)

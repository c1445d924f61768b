"""What `bench plot` draws, out of lines of results: one `Picture` for a plot and the machine that it was made on.

Reads the JSON lines of `musicgen-fast bench` and of benchmarks/. Of lines that repeat a measurement those of the latest
date count, rounds among them by their median; absent ones (nulls) are left out. Needs no torch, knows no matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median

from .plot_steps import Timed, timed_runs
from .result_lines import Line, date_of, latest, machine_name, number

__all__ = ["OURS", "PLOTS", "Bar", "Curve", "Picture", "Scene", "pictures"]

PLOTS = ("step", "peers", "throughput", "memory", "quality", "sampler", "stream")
OURS = "musicgen_fast"
_ONE, _DECODER = "one by one", "decoder only"  # ways
CODEBOOKS = 4  # of the models for one channel: the sampler is drawn for these where they were measured


@dataclass(frozen=True, order=True)
class Scene:
    """What all of a picture shares; `what` is the model, or the shapes. 0 threads: a GPU, or nobody wrote them down."""

    machine: str
    threads: int = 0
    what: str = ""


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of a provider, and its `floor` (x, y); `way` is what else differs, `panel` where it is drawn."""

    provider: str
    precision: str
    points: tuple[tuple[float, float], ...]
    floor: tuple[tuple[float, float], ...] = ()
    way: str = ""
    panel: str = ""


@dataclass(frozen=True)
class Bar:
    """`values` of a provider: of peers (ms, times the best transformers), memory (MiB), quality (percent, nats), stream
    (cold, warm ms), sampler (microseconds; `panel` is the filter, `group` the batch)."""

    provider: str
    precision: str
    values: tuple[float | None, ...]
    panel: str = ""
    group: int = 0


@dataclass(frozen=True)
class Picture:
    """One image. `plot` is one of PLOTS; `suffix` tells it from others of that plot, or is empty; `note` says what the
    values are of, `date` is the latest day of the lines."""

    plot: str
    scene: Scene
    date: str
    content: tuple[Curve, ...] | tuple[Bar, ...]
    note: str = ""
    suffix: str = ""

    @property
    def name(self) -> str:
        return f"{self.plot}-{self.suffix}" if self.suffix else self.plot


def pictures(lines: list[Line], only: Iterable[str] = PLOTS) -> list[Picture]:
    """What the lines hold of the plots named, in the order of PLOTS, the scenes of each sorted."""
    asked = set(only)
    there = [line for line in lines if not line.get("absent")]
    return [picture for plot in PLOTS if plot in asked for picture in _named(_PICK[plot](there))]


# -- what is common to the plots --------------------------------------------------------------------------------------


def _scene(line: Line, what: str = "") -> Scene:
    card = line.get("machine") or {}
    return Scene(machine_name(card), 0 if card.get("gpu") else line.get("threads") or 0, what)


def _by_scene(lines: Iterable[Line], what: Callable[[Line], str]) -> dict[Scene, list[Line]]:
    found: dict[Scene, list[Line]] = {}
    for line in lines:
        found.setdefault(_scene(line, what(line)), []).append(line)
    return dict(sorted(found.items()))


def _model(line: Line) -> str:
    return str(line.get("model") or (f"random:{line['size']}" if line.get("size") else ""))


def _day(lines: Iterable[Line]) -> str:
    return max((date_of(line) for line in lines), default="")[:10]


def _named(found: list[Picture]) -> list[Picture]:
    """With suffixes of the little that tells the scenes of one plot apart: the machine, if that is enough."""
    if len(found) < 2:
        return found

    words = [(p.scene.machine, f"{p.scene.threads} threads" if p.scene.threads else "", p.scene.what) for p in found]
    ways = [parts for count in (1, 2, 3) for parts in combinations(range(3), count)]
    said = ([" ".join(each[part] for part in parts) for each in words] for parts in ways)
    telling = next(names for names in said if len(set(names)) == len(found))
    return [
        replace(p, suffix=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
        for p, name in zip(found, telling, strict=True)
    ]


def _provider(line: Line) -> str:
    return str(line.get("provider") or OURS)


def _precision(line: Line) -> str:
    return str(line.get("precision") or "")


# -- plots of the time of a step --------------------------------------------------------------------------------------


def _runs(lines: list[Line], kinds: tuple[str, ...]) -> list[tuple[Scene, str, list[Timed]]]:
    """One request at a time on a quiet machine, of the kind of benchmark that was run last: kinds are not mixed."""
    alone = [
        line
        for line in lines
        if line["benchmark"] in kinds
        and line.get("section", "step") == "step"
        and (line.get("requests") or 1) == 1
        and not line.get("busy_core")
    ]
    found = []
    for scene, group in _by_scene(alone, _model).items():
        kind = max(group, key=date_of)["benchmark"]
        same = [line for line in group if line["benchmark"] == kind]
        found.append((scene, _day(same), timed_runs(same)))
    return found


def _step(lines: list[Line]) -> list[Picture]:
    found = []
    for scene, day, runs in _runs(lines, ("cpu", "latency")):
        curves = []
        for run in runs:
            floor = tuple((x, f) for x, _, f in run.curve if f is not None) if run.provider == OURS else ()
            curves.append(Curve(run.provider, run.precision, tuple((x, ms) for x, ms, _ in run.curve), floor))
        if any(len(curve.points) > 1 for curve in curves):
            found.append(Picture("step", scene, day, tuple(curves)))
    return found


def _peers(lines: list[Line]) -> list[Picture]:
    """Ratios are taken within a round, to the precision of transformers that was best in it; then their median."""
    found = []
    for scene, day, runs in _runs(lines, ("cpu", "latency", "step")):
        theirs = [run for run in runs if run.provider == "transformers"]
        bars = []
        for run in sorted(runs, key=lambda run: run.ms):
            pairs = zip(run.per_round, *(peer.per_round for peer in theirs), strict=False)
            ratios = [min(others) / own for own, *others in pairs if others]
            bars.append(Bar(run.provider, run.precision, (run.ms, median(ratios) if ratios else None)))
        places = [x for run in runs for x, _, _ in run.curve]
        note = f"positions {min(places):.0f} to {max(places):.0f}" if places else ""
        if bars:
            found.append(Picture("peers", scene, day, tuple(bars), note))
    return found


def _memory(lines: list[Line]) -> list[Picture]:
    found = []
    for scene, day, runs in _runs(lines, ("cpu", "latency", "step")):
        bars = [Bar(run.provider, run.precision, (run.peak_mib,)) for run in runs if run.peak_mib]
        if bars:
            bars.sort(key=lambda bar: bar.values[0] or 0)
            found.append(Picture("memory", scene, day, tuple(bars)))
    return found


# -- the others -------------------------------------------------------------------------------------------------------


def _throughput(lines: list[Line]) -> list[Picture]:
    """A panel a model. `render` of old is read where the model has no lines of `throughput`, which came after it."""
    points = [(line, point) for line in lines if (point := _sound_rate(line))]
    renewed = {(_scene(line).machine, _model(line)) for line, _ in points if line["benchmark"] == "throughput"}
    threads: dict[str, set[int]] = {}
    for line, _ in points:
        threads.setdefault(_scene(line).machine, set()).add(_scene(line).threads)
    kept: dict[Scene, dict[tuple[str, str, str, str], dict[float, float]]] = {}
    days: dict[Scene, list[Line]] = {}
    for line, (way, batch, rate) in sorted(points, key=lambda point: date_of(point[0])):
        scene, model = _scene(line), _model(line)
        if line["benchmark"] == "render" and (scene.machine, model) in renewed:
            continue
        if 0 in threads[scene.machine] and len(threads[scene.machine]) == 2:
            scene = replace(scene, threads=0)  # nobody wrote them down for some of the lines
        kept.setdefault(scene, {}).setdefault((model, _provider(line), _precision(line), way), {})[batch] = rate
        days.setdefault(scene, []).append(line)
    found = []
    for scene, ways in sorted(kept.items()):
        _join_first_points(ways)
        curves = [
            Curve(provider, precision, tuple(sorted(rates.items())), way=way, panel=model)
            for (model, provider, precision, way), rates in ways.items()
        ]
        found.append(Picture("throughput", scene, _day(days[scene]), tuple(sorted(curves, key=lambda c: c.panel))))
    return found


def _join_first_points(ways: dict[tuple[str, str, str, str], dict[float, float]]) -> None:
    """One by one is the first point of the same work in batches, where that is measured from two on."""
    for key in [key for key in ways if _ONE in key[3]]:
        *same, way = key
        clips = way.partition(_ONE)[2]
        others = [k for k in ways if k != key and list(k[:3]) == same and k[3].endswith(clips) and 1 not in ways[k]]
        others = [k for k in others if not k[3].startswith(_DECODER)]
        if len(others) == 1:
            ways[others[0]] |= ways.pop(key)


def _sound_rate(line: Line) -> tuple[str, float, float] | None:
    """(way, requests at once, seconds of sound a second); None where the line has none."""
    rate, batch, way = line.get("audio_per_second"), line.get("batch") or line.get("requests"), str(line.get("way", ""))
    if line["benchmark"] == "cpu" and line.get("section") == "batch":
        rate, way = (rate or {}).get("30 s"), f"{_DECODER}, 30 s"
    elif line["benchmark"] not in ("render", "throughput"):
        return None
    if told := re.search(r",? *batch (\d+)$", way):
        way, batch = way[: told.start()], batch or int(told[1])
    elif way.endswith(_ONE):
        batch = 1
    if durations := line.get("durations"):
        way += ", " * bool(way) + " to ".join(f"{seconds:g}" for seconds in dict.fromkeys(durations)) + " s"
    known = number(rate), number(batch)
    return None if known[0] is None or known[1] is None else (way, known[1], known[0])


def _quality(lines: list[Line]) -> list[Picture]:
    return _bars(lines, "quality", ("percent_over_float32", "kl_nats"))


def _stream(lines: list[Line]) -> list[Picture]:
    return _bars(lines, "stream", ("ttfa_cold_ms", "ttfa_ms", "first_chunk_ms"))


def _bars(lines: list[Line], plot: str, fields: tuple[str, ...]) -> list[Picture]:
    """A row a provider and precision, with these fields of its lines; of those on the same data as the latest."""
    asked = [
        line for line in lines if line["benchmark"] == plot and any(number(line.get(f)) is not None for f in fields)
    ]
    found = []
    for scene, group in _by_scene(asked, _model).items():
        data = max(group, key=date_of).get("data")
        group = [line for line in group if line.get("data") == data]
        bars = []
        for (provider, precision), same in latest(group, lambda line: (_provider(line), _precision(line))).items():
            values = ([v for line in same if (v := number(line.get(field))) is not None] for field in fields)
            bars.append(Bar(provider, precision, tuple(median(v) if v else None for v in values)))
        found.append(Picture(plot, scene, _day(group), tuple(bars), str(data or "")))
    return found


def _sampler(lines: list[Line]) -> list[Picture]:
    """Ours are `sample:*` and `draw:*`; `noise:*` is a part of them."""
    asked = [line for line in lines if line["benchmark"] == "sampler" and _microseconds(line)]
    asked = [line for line in asked if not _provider(line).startswith("noise")]
    usual = {line["codebooks"] for line in asked}
    shown = CODEBOOKS if CODEBOOKS in usual else min(usual, default=0)
    asked = [line for line in asked if line["codebooks"] == shown]
    found = []
    for scene, group in _by_scene(asked, lambda line: f"{shown} codebooks, {line.get('dtype', 'float32')}").items():
        kept = latest(group, lambda line: (str(line["filter"]), int(line["batch"]), _provider(line)))
        bars = []
        for (kind, batch, provider), same in kept.items():
            times = [us for line in same if (us := _microseconds(line))]
            bars.append(Bar(provider, "", (median(times),), panel=kind, group=batch))
        found.append(Picture("sampler", scene, _day(group), tuple(bars)))
    return found


def _microseconds(line: Line) -> float | None:
    us = line.get("us", line.get("us_per_draw"))
    return number(us.get("p50") if isinstance(us, dict) else us)


_PICK: dict[str, Callable[[list[Line]], list[Picture]]] = {
    "step": _step, "peers": _peers, "throughput": _throughput, "memory": _memory, "quality": _quality,
    "sampler": _sampler, "stream": _stream,
}  # fmt: skip

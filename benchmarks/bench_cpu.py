"""The CPU decoder over a 30 s window, beside its peers: ms a step at several positions, and the average over all.

    python benchmarks/bench_cpu.py --threads 2 --rounds 3 --json benchmarks/results/cpu.jsonl
    python benchmarks/bench_cpu.py --sections batch,threads,busy --precision int8

Blocks of steps are timed at five positions and joined by straight lines. Our decoder and OpenVINO start there with a
cache of zeros, transformers and audiocraft with a prompt of random tokens, whose time is not counted; a step of
fast-musicgen takes as long anywhere, and is timed at the beginning. Sections:
step (all providers), and of ours: batch (8 requests at once against one), threads (1 against --threads), busy (another
process on one core, against one thread without it).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from musicgen_fast.bench.job import Job
from musicgen_fast.bench.latency import COLUMNS, Row, quantile, run_rounds, starts_for
from musicgen_fast.bench.machine import append_json, machine_card
from musicgen_fast.bench.providers import OURS, PROVIDERS

CLIPS = {"30 s": COLUMNS, "10 s": 503}
WARMUP = 8
OUR_PRECISIONS = ("float32", "bfloat16", "int8", "int4")
PEERS = {
    "transformers": ("float32", "bfloat16"),
    "transformers_compiled": ("float32",),
    "audiocraft": ("float32",),
    "openvino": ("int8",),
    "fast_musicgen": ("float32", "bfloat16"),
}
SECTIONS = ("step", "batch", "threads", "busy")


@dataclass(frozen=True)
class Curve:
    """One job in one round: its blocks, in the order of their positions."""

    section: str
    job: Job
    busy: bool
    round: int
    rows: tuple[Row, ...]

    def average(self, value: Callable[[Row], float], columns: int = COLUMNS) -> float:
        """Mean of a value over the first `columns` steps: straight lines between the blocks, level outside of them."""
        at = np.arange(columns)
        return float(np.interp(at, [row.position for row in self.rows], [value(row) for row in self.rows]).mean())

    @property
    def ms(self) -> float:
        return self.average(lambda row: row.median)

    @property
    def percent_of_floor(self) -> float:
        return 100 * self.average(lambda row: row.floor_ms) / self.ms

    @property
    def times_read(self) -> float:
        """Over the median plain read of the same bytes by as many threads."""
        return self.ms / self.average(lambda row: row.floor_p50_ms)

    def audio_per_second(self, columns: int) -> float:
        """Seconds of audio a second, at 50 frames a second."""
        return self.job.requests * 20 / self.average(lambda row: row.median, columns)


@contextmanager
def one_core_busy() -> Iterator[None]:
    """Another process that computes without a pause, on the last core that is ours."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
        yield
    finally:
        process.kill()
        process.wait()


def section_jobs(section: str, base: Job, args: argparse.Namespace) -> list[Job]:
    own = [replace(base, provider=OURS, precision=precision) for precision in args.precision]
    if section == "batch":
        return [replace(job, requests=count) for job in own for count in (1, args.requests)]
    if section == "threads":
        return [replace(job, threads=count) for job in own for count in sorted({1, args.threads})]
    if section == "busy":
        return own
    peers = [(name, precision) for name in args.providers for precision in PEERS.get(name, ())]
    ours = own if OURS in args.providers else []
    return ours + [replace(base, provider=name, precision=precision) for name, precision in peers]


def curves_of(section: str, rows: list[Row], busy: bool = False) -> list[Curve]:
    grouped: dict[tuple[int, Job], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.round, row.job), []).append(row)
    return [
        Curve(section, job, busy, number, tuple(sorted(group, key=lambda row: row.position)))
        for (number, job), group in grouped.items()
    ]


def run_section(section: str, base: Job, args: argparse.Namespace) -> tuple[list[Curve], dict[tuple[str, str], str]]:
    def say(text: str) -> None:
        print(f"{section}: {text}", file=sys.stderr, flush=True)

    jobs = section_jobs(section, base, args)
    if section != "busy":
        rows, absent = run_rounds(jobs, args.rounds, say, args.timeout)
        return curves_of(section, rows), absent
    quiet = [replace(job, threads=1) for job in jobs]
    curves: list[Curve] = []
    absent = {}
    for number in range(args.rounds):  # the one-thread time and the busy one belong to the same minutes
        rows, absent = run_rounds(quiet, 1, say, args.timeout)
        curves += curves_of(section, [replace(row, round=number) for row in rows])
        with one_core_busy():
            rows, gone = run_rounds(jobs, 1, say, args.timeout)
        curves += curves_of(section, [replace(row, round=number) for row in rows], busy=True)
        absent |= gone
    return curves, absent


def faster(curve: Curve, curves: list[Curve], name: str) -> float | None:
    """How many times faster than a peer's best precision in the same round, on the average."""
    times = [c.ms for c in curves if c.job.provider == name and (c.round, c.section) == (curve.round, curve.section)]
    return min(times) / curve.ms if times else None


def compared(curve: Curve, curves: list[Curve]) -> dict[str, float | None]:
    """Ratios within the round: to the peers, and in the other sections to our own simplest case."""
    same = [
        c for c in curves
        if (c.round, c.section, c.job.provider, c.job.precision)
        == (curve.round, curve.section, curve.job.provider, curve.job.precision)
    ]  # fmt: skip
    if curve.section == "step":
        found = {name: faster(curve, curves, name) for name in PEERS}
        plain = [c.ms for c in curves if (c.job.provider, c.job.precision, c.round, c.section)
                 == ("transformers", curve.job.precision, curve.round, "step")]  # fmt: skip
        return found | {"transformers, same precision": plain[0] / curve.ms if plain else None}
    if curve.section == "batch":
        one = [c for c in same if c.job.requests == 1]
        return {f"audio of one, {clip}": curve.audio_per_second(n) / one[0].audio_per_second(n) if one else None
                for clip, n in CLIPS.items()}  # fmt: skip
    one = [c for c in same if c.job.threads == 1 and not c.busy]
    return {"time of one thread": curve.ms / one[0].ms if one else None}


def median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return quantile(known, 0.5) if known else None


def summary(group: list[Curve], curves: list[Curve], card: dict[str, Any]) -> dict[str, Any]:
    """The JSON line of a job over its rounds: medians of what was computed within each round."""
    first, ratios = group[0], [compared(curve, curves) for curve in group]
    job = first.job
    blocks = []
    for rows in zip(*(curve.rows for curve in group), strict=True):
        every = [ms for row in rows for ms in row.ms]
        low, middle, high = (round(quantile(every, q), 3) for q in (0.1, 0.5, 0.9))
        floor = quantile((row.floor_ms for row in rows), 0.5)
        percent = quantile((100 * row.floor_ms / row.median for row in rows), 0.5)
        blocks.append(
            {"position": rows[0].position, "ms": middle, "ms_p10": low, "ms_p90": high, "floor_ms": floor,
             "percent_of_floor": percent}
        )  # fmt: skip
    names = ("provider", "precision", "threads", "requests", "model", "text_tokens")
    return {
        "benchmark": "cpu",
        "section": first.section,
        **{name: getattr(job, name) for name in names},
        "busy_core": first.busy,
        "ms_per_step": quantile((curve.ms for curve in group), 0.5),
        "ms_per_round": [curve.ms for curve in group],
        "percent_of_floor": quantile((curve.percent_of_floor for curve in group), 0.5),
        "times_of_a_plain_read": quantile((curve.times_read for curve in group), 0.5),
        "times": {name: median([r[name] for r in ratios]) for name in ratios[0]},
        "audio_per_second": {
            clip: quantile((curve.audio_per_second(n) for curve in group), 0.5) for clip, n in CLIPS.items()
        },
        "positions": blocks,
        "peak_mib": max(row.peak_mib for curve in group for row in curve.rows),
        "read_gb_s": quantile((row.read_gb_s for curve in group for row in curve.rows), 0.5),
        "machine": card,
    }


def summaries(curves: list[Curve], card: dict[str, Any]) -> list[dict[str, Any]]:
    grouped: dict[Any, list[Curve]] = {}
    for curve in curves:
        grouped.setdefault((curve.section, curve.job, curve.busy), []).append(curve)
    return [summary(group, curves, card) for group in grouped.values()]


def table(lines: list[dict[str, Any]], absent: dict[tuple[str, str], str]) -> str:
    """Markdown of one section."""
    at = [f"{block['position']:.0f}" for block in lines[0]["positions"]] if lines else []
    heads = ["provider", "precision", "threads", "requests", *(f"ms at {p}" for p in at)]
    heads += ["average", "% of floor", "x plain read", "times"]
    text = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for line in lines:
        times = ", ".join(f"{name} {value:.2f}" for name, value in line["times"].items() if value is not None)
        threads = f"{line['threads']}{', a core busy' if line['busy_core'] else ''}"
        cells = [line["provider"], line["precision"], threads, str(line["requests"])]
        cells += [f"{block['ms']:.2f}" for block in line["positions"]]
        cells += [f"{line['ms_per_step']:.2f}", f"{line['percent_of_floor']:.0f}"]
        cells += [f"{line['times_of_a_plain_read']:.2f}", times or "-"]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, *(f"absent: {' '.join(named)}: {why}" for named, why in absent.items())])


def arguments() -> argparse.Namespace:
    def names(known: Any):
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            if set(chosen) - set(known):
                raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {text}")
            return chosen

        return parse

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="random:small")
    parser.add_argument("--sections", type=names(SECTIONS), default=list(SECTIONS), help=",".join(SECTIONS))
    parser.add_argument("--providers", type=names(PROVIDERS), default=list(PROVIDERS), help=",".join(PROVIDERS))
    parser.add_argument(
        "--precision", type=names(OUR_PRECISIONS), default=list(OUR_PRECISIONS),
        help=f"of ours: {','.join(OUR_PRECISIONS)}",
    )  # fmt: skip
    parser.add_argument("--positions", type=int, nargs="+", default=[16, 400, 768, 1100, 1500])
    parser.add_argument("--steps", type=int, default=48, help=f"of a block, the first {WARMUP} left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--requests", type=int, default=8, help="at once, in the section batch")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a process; then it is absent")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a section and job")
    args = parser.parse_args()
    if not WARMUP + 2 < args.steps <= COLUMNS:
        parser.error(f"--steps must be above {WARMUP + 2} and at most {COLUMNS}")
    return args


def main() -> None:
    args = arguments()
    card = machine_card("cpu")
    print(f"{card['cpu']}, {args.threads} threads, torch {torch.__version__}, commit {card['commit']}")
    starts = starts_for(args.positions, args.steps, WARMUP)
    base = Job("", args.model, "", "cpu", args.threads, args.steps, WARMUP, starts)
    for section in args.sections:
        curves, absent = run_section(section, base, args)
        lines = summaries(curves, card)
        print(f"\n## {section}\n\n{table(lines, absent)}", flush=True)
        append_json(args.json, lines)


if __name__ == "__main__":
    main()

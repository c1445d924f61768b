"""Milliseconds per decoding step of any providers: rounds in alternated processes, then a table and JSON lines.

What `musicgen-fast bench latency` and the scripts of `benchmarks/` share. Knows neither models nor command lines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .job import Job, turns
from .parity import COMPARED
from .providers import OURS, fitting_precision, why_absent
from .worker import in_own_process

__all__ = [
    "COLUMNS", "DEFAULT_PROVIDERS", "REFERENCE", "Row", "jobs_for", "lines", "parities", "quantile", "ratio",
    "run_rounds", "starts_for", "table",
]  # fmt: skip

REFERENCE = "transformers"
DEFAULT_PROVIDERS = (OURS, "transformers", "audiocraft", "openvino", "fast_musicgen")
Key = tuple[str, str, int]  # provider, precision, first position
Absent = dict[tuple[str, str], str]
COLUMNS = 1503  # of a window of 30 s
FRAME_RATE = 50  # of the released models: a second of sound takes so many steps
_OF_A_PROCESS = ("peak_mib", "read_gb_s", "load_s", "compile_s", "cold_ms", "codebooks")


@dataclass(frozen=True)
class Row:
    """One block of steps of one provider in one round; `ms` the time of each step."""

    job: Job
    round: int
    start: int
    position: float
    ms: list[float]
    peak_mib: int
    floor_ms: float
    floor_p50_ms: float
    read_gb_s: float
    load_s: float | None = None
    compile_s: float | None = None
    cold_ms: float | None = None
    codebooks: int | None = None

    @property
    def key(self) -> Key:
        return self.job.provider, self.job.precision, self.start

    @property
    def median(self) -> float:
        return quantile(self.ms, 0.5)


def quantile(values: Iterable[float], q: float) -> float:
    return torch.tensor(list(values), dtype=torch.float64).quantile(q).item()


def jobs_for(base: Job, precisions: Iterable[str], providers: Iterable[str] | None) -> list[Job]:
    """One job for every provider and precision, each peer in the nearest precision that it has.

    Without `providers`: ours and those that are installed. What a CPU without bfloat16 and a provider without int8 make
    equal is one job.
    """
    names = [n for n in DEFAULT_PROVIDERS if not why_absent(n)] if providers is None else providers
    jobs = [
        replace(base, provider=name, precision=fitting_precision(name, precision, base.device))
        for precision in precisions
        for name in names
    ]
    return list(dict.fromkeys(jobs))


def run_rounds(
    jobs: list[Job], rounds: int, say: Callable[[str], object], timeout: float | None = None
) -> tuple[list[Row], Absent]:
    """Every job once a round, in another order each; one that cannot run is not tried again."""
    rows: list[Row] = []
    absent: Absent = {}
    for number, job in turns(jobs, rounds):
        named = job.provider, job.precision
        if named in absent:
            continue
        say(f"round {number + 1} of {rounds}: {job.provider} {job.precision}")
        reason = why_absent(job.provider)
        result: dict[str, Any] = {"absent": reason} if reason else in_own_process(job, timeout=timeout)
        if "absent" in result:
            absent[named] = result["absent"]
            continue
        for block in result["blocks"]:
            facts: dict[str, Any] = {name: result.get(name) for name in _OF_A_PROCESS}
            rows.append(Row(job, number, **block, **facts))
    return rows, absent


def parities(jobs: list[Job], absent: Absent, frames: int, say: Callable[[str], object]) -> dict[tuple[str, str], Any]:
    """What `parity.parity` says of every job that ran; 0 frames: nothing is compared."""
    found: dict[tuple[str, str], Any] = {}
    for job in jobs:
        named = job.provider, job.precision
        if named in absent:
            continue
        if not frames or job.provider not in COMPARED:
            why = "random weights of its own; the tests compare its tokens with ours" if frames else "not asked for"
            found[named] = {"ok": None, "why": why}
            continue
        say(f"parity: {job.provider} {job.precision}")
        answer = in_own_process(replace(job, steps=frames, requests=1), "parity")
        found[named] = {"ok": None, "why": answer["absent"]} if "absent" in answer else answer
    return found


def ratio(row: Row, rows: list[Row]) -> float | None:
    """How many times faster than the reference of the same round and position: in the same precision, or its best."""
    others = [o for o in rows if (o.job.provider, o.round, o.start) == (REFERENCE, row.round, row.start)]
    same = [o for o in others if o.job.precision == row.job.precision]
    return min(o.median for o in same or others) / row.median if others else None


def groups(rows: list[Row]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.key].append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][2], item[0][0])))


def lines(
    rows: list[Row], absent: Absent, parity: dict[tuple[str, str], Any], card: dict[str, Any]
) -> list[dict[str, Any]]:
    """The JSON lines: one for a provider, precision and block over all rounds. One that is absent has nulls, and says
    why in `absent`."""
    found = []
    for (provider, precision, _), group in groups(rows).items():
        job, every = group[0].job, [ms for row in group for ms in row.ms]
        low, middle, high, highest = (round(quantile(every, q), 4) for q in (0.1, 0.5, 0.9, 0.99))
        ratios = [r for row in group if (r := ratio(row, rows)) is not None]
        line = _line(job, card) | {
            "ms_per_step": middle,
            "ms_p10": low,
            "ms_p90": high,
            "ms_p99": highest,
            **speeds(middle, job.requests, group[0].codebooks or 4),
            "floor_ms": quantile((row.floor_ms for row in group), 0.5),
            "floor_p50_ms": quantile((row.floor_p50_ms for row in group), 0.5),
            "percent_of_floor": quantile((100 * row.floor_ms / row.median for row in group), 0.5),
            "read_gb_s": quantile((row.read_gb_s for row in group), 0.5),
            "times_faster_than_transformers": quantile(ratios, 0.5) if ratios else None,
            "parity": parity.get((provider, precision), {"ok": None, "why": "not asked for"}),
            "positions": [group[0].start + job.warmup, group[0].start + job.steps],
            "rounds": len(group),
            "ms_per_round": [round(row.median, 4) for row in group],
            "peak_mib": max(row.peak_mib for row in group),
            **{name: _median(getattr(row, name) for row in group) for name in ("load_s", "compile_s", "cold_ms")},
        }
        found.append(line)
    nothing = dict.fromkeys(("ms_per_step", "ms_p10", "ms_p90", "floor_ms", "percent_of_floor", "parity"))
    for (provider, precision), why in absent.items():
        job = Job(provider, precision=precision)
        if rows:
            job = replace(rows[0].job, provider=provider, precision=precision)
        found.append(_line(job, card) | nothing | {"absent": why})
    return found


def speeds(ms: float, requests: int, codebooks: int) -> dict[str, float]:
    """What steps of `ms` mean: {"rtf": seconds of work per second of sound, "rtfx": its inverse, "audio_per_second":
    seconds of sound of all requests, "tokens_per_second": of all codebooks and requests}."""
    rtfx = 1000 / (FRAME_RATE * ms)
    return {
        "rtf": 1 / rtfx,
        "rtfx": rtfx,
        "audio_per_second": rtfx * requests,
        "tokens_per_second": 1000 / ms * codebooks * requests,
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return quantile(known, 0.5) if known else None


def starts_for(positions: Iterable[int], steps: int, warmup: int) -> tuple[int, ...]:
    """Where blocks of `steps` begin whose measured part lies around the positions, within a window."""
    return tuple(dict.fromkeys(max(0, min(p - (warmup + steps) // 2, COLUMNS - steps)) for p in positions))


def _line(job: Job, card: dict[str, Any]) -> dict[str, Any]:
    names = ("provider", "precision", "threads", "model", "device", "steps", "requests", "text_tokens")
    head = {"benchmark": "latency", **{name: getattr(job, name) for name in names}}
    return head | {"machine": card, "versions": card["versions"]}


def table(rows: list[Row], absent: Absent, parity: dict[tuple[str, str], Any] | None = None) -> str:
    """Markdown: the steps of all rounds together; ratio and floor are medians over the rounds."""
    text = [
        f"| provider | precision | positions | ms/step [p10..p90] | x {REFERENCE} | % of floor | peak MiB | parity |",
        "|" + "---|" * 8,
    ]
    for (provider, precision, start), group in groups(rows).items():
        every = [ms for row in group for ms in row.ms]
        low, median, high = (quantile(every, q) for q in (0.1, 0.5, 0.9))
        ratios = [r for row in group if (r := ratio(row, rows)) is not None]
        faster = f"{quantile(ratios, 0.5):.2f}" if ratios else "-"
        floor = quantile((100 * row.floor_ms / row.median for row in group), 0.5)
        job, peak = group[0].job, max(row.peak_mib for row in group)
        span = f"{start + job.warmup}..{start + job.steps} | {median:.2f} [{low:.2f}..{high:.2f}]"
        same = _parity_text((parity or {}).get((provider, precision)))
        text.append(f"| {provider} | {precision} | {span} | {faster} | {floor:.0f} | {peak} | {same} |")
    text += [f"| {provider} | {precision} | absent: {why} | | | | | |" for (provider, precision), why in absent.items()]
    if rows:
        speeds = [row.read_gb_s for row in rows]
        text.append(f"\nmemory read at {min(speeds):.1f} to {max(speeds):.1f} GB/s")
    return "\n".join(text)


def _parity_text(parity: dict[str, Any] | None) -> str:
    if parity is None or parity["ok"] is None:
        return "-"
    parts = ["ok" if parity["ok"] else "NOT OK"]
    if parity.get("logits_error") is not None:
        parts.append(f"logits {parity['logits_error']:.1e}")
    if parity.get("tokens_equal") is not None:
        parts.append(f"tokens {parity['tokens_equal']:.0%}")
    return ", ".join(parts)

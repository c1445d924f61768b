"""Streaming as a listener meets it: when sound begins, whether a player would run dry, what it costs; rounds and table.

What runs in the processes is `stream_worker.py`, and the other implementation `stream_peer.py`. Times are seconds from
the call of a stream to a chunk's samples on the CPU; knows neither models nor command lines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

from .job import Job, turns
from .latency import REFERENCE, Absent, quantile
from .providers import OURS, why_absent
from .worker import in_own_process

__all__ = [
    "METRICS",
    "PROVIDERS",
    "Playback",
    "Row",
    "StreamJob",
    "lines",
    "metrics",
    "playback",
    "run_rounds",
    "table",
]

PROVIDERS = (OURS, REFERENCE)
METRICS = (
    "ttfa_cold_ms", "ttfa_ms", "load_s", "chunks", "first_chunk_ms", "gap_p50_ms", "gap_p99_ms", "gap_max_ms",
    "audio_underrun_s", "underruns", "rtf", "rtfx", "ms_per_step", "longest_step_ratio", "peak_mib",
    "window",
)  # fmt: skip
_KEPT = ("ttfa_cold_ms", "ttfa_ms", "load_s", "gap_max_ms", "audio_underrun_s", "rtf", "ms_per_step", "peak_mib")
_AROUND = 4  # steps before and after a change of windows that belong to it
_SAMPLE = 1 / 48000  # seconds; a silence that is shorter is none


@dataclass(frozen=True)
class StreamJob(Job):
    """A stream of `seconds`, behind four of which only the first chunk is heard.

    `window`: seconds, of ours only; None is the model's. `peer_chunk`: seconds between two decodes of the peer.
    `folder`: where the peer finds or leaves the model in its own format. `steps` and what follows mean nothing here.
    """

    model: str = "demo"
    precision: str = "int8"
    seconds: float = 12.0
    window: float | None = None
    peer_chunk: float = 1.0
    folder: str = ""


@dataclass(frozen=True)
class Playback:
    """What a player heard that began with the first chunk: `silent` seconds of waiting, in so many `underruns`.

    `silent` is also by how much later it would have had to begin to hear no silence.
    """

    silent: float
    underruns: int


def playback(arrivals: Sequence[float], lengths: Sequence[float]) -> Playback:
    """Chunks that came at `arrivals` and hold `lengths` seconds of sound, played as fast as they sound.

    Silence before the first chunk is its latency and none of this; after the last one nothing is waited for.
    """
    silent, underruns = 0.0, 0
    until = arrivals[0] if arrivals else 0.0  # when the sound that the player holds ends
    for at, length in zip(arrivals, lengths, strict=True):
        if at - until > _SAMPLE:
            silent, underruns = silent + at - until, underruns + 1
        until = max(until, at) + length
    return Playback(silent, underruns)


@dataclass(frozen=True)
class Row:
    """One process: a job, its round, and `metrics` of what it answered."""

    job: StreamJob
    round: int
    found: dict[str, float | None]

    @property
    def key(self) -> tuple[str, str]:
        return self.job.provider, self.job.precision


def metrics(answer: dict[str, Any]) -> dict[str, float | None]:
    """METRICS of what `stream_worker.measure` answers; None where there is nothing to say (gaps of one chunk)."""
    arrivals, sounds, steps = answer["arrivals"], answer["sounds"], answer["step_ms"]
    gaps = [1000 * (after - before) for before, after in zip(arrivals, arrivals[1:], strict=False)]
    played, work = playback(arrivals, sounds), arrivals[-1] / sum(sounds)
    typical = quantile(steps, 0.5) if steps else None
    around = [ms for i in answer["changes"] for ms in steps[max(i - _AROUND, 0) : i + _AROUND + 1]]
    cold, *warm = answer["first"]
    return {
        "ttfa_cold_ms": 1000 * cold,
        "ttfa_ms": 1000 * quantile([*warm, arrivals[0]], 0.5),
        "load_s": answer["load_s"],
        "chunks": len(arrivals),
        "first_chunk_ms": 1000 * sounds[0],
        "gap_p50_ms": quantile(gaps, 0.5) if gaps else None,
        "gap_p99_ms": quantile(gaps, 0.99) if gaps else None,
        "gap_max_ms": max(gaps, default=None),
        "audio_underrun_s": played.silent,
        "underruns": played.underruns,
        "rtf": work,
        "rtfx": 1 / work,
        "ms_per_step": typical,
        "longest_step_ratio": max(around) / typical if around and typical else None,
        "peak_mib": answer["peak_mib"],
        "window": answer["window"],
    }


def run_rounds(
    jobs: list[StreamJob], rounds: int, say: Callable[[str], object], timeout: float | None = None
) -> tuple[list[Row], Absent]:
    """Every job once a round, in another order each; one that cannot run is not tried again."""
    rows: list[Row] = []
    absent: Absent = {}
    with TemporaryDirectory(prefix="musicgen-fast-") as folder:

        def ask(job: StreamJob, task: str) -> dict[str, Any]:
            return in_own_process(replace(job, folder=folder), task, timeout, "stream_worker")

        for number, job in turns(jobs, rounds):
            named = job.provider, job.precision
            if named in absent:
                continue
            say(f"round {number + 1} of {rounds}: {job.provider} {job.precision}")
            reason = why_absent(job.provider)
            answer = {"absent": reason} if reason else {}
            if not reason and number == 0 and job.provider != OURS:
                answer = ask(job, "prepare")  # elsewhere: its peak memory is to hold nothing of ours
            if "absent" not in answer:
                answer = ask(job, "stream")
            if "absent" in answer:
                absent[named] = answer["absent"]
            else:
                rows.append(Row(job, number, metrics(answer)))
    return rows, absent


def lines(rows: list[Row], absent: Absent, job: StreamJob, card: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON lines: one a provider and precision, medians over the rounds (peak memory: the most).

    One that is absent has nulls, and says why in `absent`; `job` tells what was asked of it.
    """
    found = []
    for (provider, precision), group in _groups(rows).items():
        values = {name: _over_rounds(group, name) for name in METRICS}
        ratios = {
            "times_sooner_than_transformers": _ratio(group, rows, "ttfa_ms"),
            "times_faster_than_transformers": _ratio(group, rows, "rtf"),
        }
        per_round = {f"{name}_per_round": [_short(row.found[name]) for row in group] for name in _KEPT}
        made = replace(job, provider=provider, precision=precision)
        found.append(_head(made) | values | ratios | {"rounds": len(group)} | per_round | {"machine": card})
    for (provider, precision), why in absent.items():
        made = replace(job, provider=provider, precision=precision)
        found.append(_head(made) | dict.fromkeys(METRICS) | {"rounds": 0, "absent": why, "machine": card})
    return found


def _head(job: StreamJob) -> dict[str, Any]:
    names = ("provider", "precision", "model", "device", "threads", "seconds")
    chunk = None if job.provider == OURS else job.peer_chunk
    return {"benchmark": "stream", **{name: getattr(job, name) for name in names}, "peer_chunk": chunk}


def _groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row.key].append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][0])))


def _over_rounds(group: list[Row], name: str) -> float | None:
    values = [value for row in group if (value := row.found[name]) is not None]
    if not values:
        return None
    return _short(max(values) if name == "peak_mib" else quantile(values, 0.5))


def _short(value: float | None) -> float | None:
    """Four digits behind the point, whole numbers as such."""
    if value is None:
        return None
    return int(value) if value == int(value) else round(value, 4)


def _ratio(group: list[Row], rows: list[Row], name: str) -> float | None:
    """By how much less time than the reference: of each round, in the same precision or its best; then the median."""
    ratios = []
    for row in group:
        others = [o for o in rows if (o.job.provider, o.round) == (REFERENCE, row.round)]
        same = [o for o in others if o.job.precision == row.job.precision] or others
        theirs, own = [value for o in same if (value := o.found[name])], row.found[name]
        if theirs and own:
            ratios.append(min(theirs) / own)
    return _short(quantile(ratios, 0.5)) if ratios else None


def table(said: list[dict[str, Any]]) -> str:
    """Markdown, of `lines`."""
    text = [
        "| provider | precision | first sound, ms (cold) | of, ms | gaps p50 / p99 / max, ms | silent, s (times) "
        f"| ms/step (change) | x real time | x {REFERENCE} (sooner) | load, s | peak MiB |",
        "|" + "---|" * 11,
    ]
    for line in said:
        who = f"| {line['provider']} | {line['precision']} |"
        if "absent" in line:
            text.append(f"{who} absent: {line['absent']} |" + " |" * 8)
            continue
        step = _number(line["ms_per_step"], 2)
        if line["longest_step_ratio"] is not None:
            step += f" (x {line['longest_step_ratio']:.1f})"
        faster, sooner = line["times_faster_than_transformers"], line["times_sooner_than_transformers"]
        gaps = " / ".join(_number(line[f"gap_{name}_ms"]) for name in ("p50", "p99", "max"))
        cells = [
            f"{_number(line['ttfa_ms'])} ({_number(line['ttfa_cold_ms'])})",
            _number(line["first_chunk_ms"]),
            gaps,
            f"{line['audio_underrun_s']:.2f} ({line['underruns']:g})",
            step,
            _number(line["rtfx"], 2),
            "-" if faster is None else f"{faster:.2f} ({_number(sooner, 1)})",
            _number(line["load_s"], 1),
            _number(line["peak_mib"]),
        ]
        text.append(f"{who} {' | '.join(cells)} |")
    return "\n".join(text)


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

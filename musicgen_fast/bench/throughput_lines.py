"""What the rounds of `throughput` come to: a JSON line for each way, and a table. Measures nothing.

Medians over the rounds; ratios are taken within a round, so that a slow minute of the machine moves none of them.
"""

from __future__ import annotations

import os

import torch

from .latency import REFERENCE, quantile
from .providers import OURS, fitting_precision
from .throughput import LOOP, RENDER, Found, Way, Work, speed
from .throughput_worker import Facts

__all__ = ["lines", "table"]


def lines(work: Work, found: Found, card: Facts) -> list[Facts]:
    """A JSON line for each way: medians over the rounds; `times` are ratios within a round. One that is absent has
    nulls, and says why in `absent`."""
    told = []
    for way in dict.fromkeys(way for _, way, _ in found.measured):
        own = [(number, facts) for number, one, facts in found.measured if one == way]
        each = [_figures(work, way, facts, _others(found, number)) for number, facts in own]
        speeds = {"audio_per_second_per_round": [figures["audio_per_second"] for figures in each]}
        medians = {name: _median([figures[name] for figures in each]) for name in each[0]}
        told.append(_line(work, way) | medians | speeds | {"rounds": len(own), "machine": card})
    nothing = dict.fromkeys(("audio_per_second", "tokens_per_second", "times_generate", "times_transformers"))
    for way, why in found.absent.items():
        told.append(_line(work, way) | nothing | {"rounds": 0, "machine": card, "absent": why})
    return told


def _line(work: Work, way: Way) -> Facts:
    return {
        "benchmark": "throughput", "provider": way.provider, "way": way.way, "batch": way.batch, "model": work.model,
        "precision": fitting_precision(way.provider, work.precision, work.device), "device": work.device,
        "threads": work.threads, "pieces": work.count, "durations": [work.shortest, work.longest],
    }  # fmt: skip


def _others(found: Found, number: int) -> Facts:
    """What the ways of a round are held against: our loop, and the best batch of transformers."""
    there = [(way, facts) for at, way, facts in found.measured if at == number]
    loops = [facts for way, facts in there if (way.provider, way.way) == (OURS, LOOP)]
    rates = [facts["tokens_per_audio_second"] for _, facts in there if "tokens_per_audio_second" in facts]
    return {
        "loop": speed(loops[0]) if loops else None,
        "loop_written": _written(loops[0]) if loops else None,
        "transformers": max((speed(facts) for way, facts in there if way.provider == REFERENCE), default=None),
        "tokens": rates[0] if rates else None,  # of a second of audio: `render` does not tell
    }


def _written(facts: Facts) -> float:
    return float(facts["audio_seconds"] / (facts["seconds"] + facts["seconds_writing"]))


def _figures(work: Work, way: Way, facts: Facts, others: Facts) -> dict[str, float | None]:
    mine = speed(facts)

    def times(other: float | None) -> float | None:
        return None if other is None else mine / other

    shared = {
        "audio_per_second": mine,
        "tokens_per_second": None if others["tokens"] is None else mine * others["tokens"],
        "times_generate": times(others["loop"]),
        "times_transformers": times(others["transformers"]),
    }
    if way.way == RENDER:
        return shared | {"times_generate_and_write": times(others["loop_written"])} | _of_render(work, facts)
    return shared | {
        "audio_per_second_written": _written(facts),
        "load_s": facts["load_s"],
        "seconds": facts["seconds"],
        "seconds_writing": facts["seconds_writing"],
        "seconds_to_first_file": facts["seconds_first"],
        "peak_mib": facts["peak_bytes"] / 2**20,
    }


def _of_render(work: Work, facts: Facts) -> dict[str, float | None]:
    """`bookkeeping_percent`: of the time, by ledger and hand-over in the loop that steps the model; `writing_percent`:
    of the processors' time, by the threads that write. `load_s`: until the first piece is admitted."""
    busy, occupancy, peak = facts["seconds_busy"], facts["slot_occupancy"], facts["peak_memory_bytes"]
    on_cpu = torch.device(work.device).type == "cpu"  # of a GPU's memory the summary says nothing
    return {
        "occupancy_percent": None if occupancy is None else 100 * occupancy,
        "bookkeeping_percent": 100 * facts["seconds_bookkeeping"] / busy,
        "writing_percent": 100 * facts["seconds_writing"] / (busy * (os.cpu_count() or 1)),
        "load_s": facts["seconds"] - busy,
        "seconds": busy,
        "seconds_to_first_file": facts["seconds_to_first_file"],
        "peak_mib": peak / 2**20 if on_cpu and peak is not None else None,
    }


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return quantile(known, 0.5) if known else None


def table(told: list[Facts]) -> str:
    """Markdown; columns that a way has no figure for stay empty."""
    heads = {
        "audio_per_second": "audio s/s", "times_transformers": f"x {REFERENCE}", "times_generate": "x generate",
        "times_generate_and_write": "x with writing", "occupancy_percent": "slots %", "bookkeeping_percent": "ledger %",
        "writing_percent": "writing %", "load_s": "load s", "seconds_to_first_file": "first file s",
        "peak_mib": "peak MiB",
    }  # fmt: skip
    text = [f"| provider | precision | way | at once | {' | '.join(heads.values())} |", "|" + "---|" * (len(heads) + 4)]
    for line in told:
        values = ["" if line.get(name) is None else f"{line[name]:.3g}" for name in heads]
        if "absent" in line:
            values[0] = f"absent: {line['absent']}"
        text.append(f"| {line['provider']} | {line['precision']} | {line['way']} | {line['batch']} | "
                    f"{' | '.join(values)} |")  # fmt: skip
    return "\n".join(text)

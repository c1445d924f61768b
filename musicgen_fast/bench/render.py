"""Batch rendering beside the naive loop: one `MusicGen.generate` per prompt, `musicgen-fast render` of the same pieces.

Each way runs in a process of its own, which loads the model once; the rounds take turns. What counts is the time from
the first piece to the last one with the model loaded: of the loop with and without writing what it made, of `render`
until the last file is on disk. Knows the command line and its summary, nothing of what lies behind them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from .latency import quantile
from .machine import ROOT
from .worker import peak_bytes

__all__ = ["Work", "lines", "naive", "pieces", "rounds", "table"]

_WORDS = "piano drums bass calm fast rock jazz violin synth slow dark bright loop guitar bells strings warm sad".split()
Facts = dict[str, Any]
Measured = tuple[int, int, Facts]  # round, batch, what was found


@dataclass(frozen=True)
class Work:
    """Pieces of `shortest` to `longest` seconds for a model on a CPU; `threads` None: as many as torch takes."""

    model: str
    precision: str
    count: int = 64
    shortest: float = 1.0
    longest: float = 8.0
    threads: int | None = None


def pieces(work: Work) -> list[dict[str, Any]]:
    """Rows of a manifest, the same for the same work: prompts of 2 to 6 words, durations in tenths of a second."""
    rng = random.Random(0)
    tenths = range(round(10 * work.shortest), round(10 * work.longest) + 1)
    return [
        {"id": f"p{n:03}", "prompt": " ".join(rng.sample(_WORDS, rng.randint(2, 6))),
         "duration": rng.choice(tenths) / 10, "seed": n}
        for n in range(work.count)
    ]  # fmt: skip


def naive(model_name: str, precision: str, manifest: Path, folder: Path) -> Facts:
    """One `generate` per row, as a script would; in this process.

    {"seconds", "seconds_writing", "seconds_first", "audio_seconds", "peak_bytes"}: `seconds` of `generate` alone.
    """
    from ..audio import audio_write
    from ..musicgen import MusicGen

    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    began = perf_counter()
    model = MusicGen.get_pretrained(model_name, "cpu", precision=precision)
    loaded = perf_counter()
    model.set_generation_params(duration=0.5)
    model.generate(["warm up"], seed=[0])
    began += perf_counter() - loaded  # not counted as time to the first file
    generating = writing = first = audio = 0.0
    for row in rows:
        model.set_generation_params(duration=row["duration"])
        start = perf_counter()
        (wav,) = model.generate([row["prompt"]], seed=[row["seed"]])
        made = perf_counter()
        audio_write(folder / row["id"], wav, model.sample_rate, strategy="loudness")
        writing += perf_counter() - made
        generating += made - start
        audio += wav.shape[-1] / model.sample_rate
        first = first or perf_counter() - began
    return {
        "seconds": generating,
        "seconds_writing": writing,
        "seconds_first": first,
        "audio_seconds": audio,
        "peak_bytes": peak_bytes("cpu"),
    }


def rounds(work: Work, batches: list[int], count: int, timeout: float | None = None) -> Iterator[Measured]:
    """(round, batch, facts) as they are measured, in another order each round; batch 0 is the naive loop.

    Facts of `naive`, or of the summary of `render` (`summary.json`). RuntimeError where a process fails.
    """
    ways = [0, *batches]
    for number in range(count):
        shift = number % len(ways)
        for batch in ways[shift:] + ways[:shift]:
            with tempfile.TemporaryDirectory() as folder:
                yield number, batch, _measured(work, batch, Path(folder), timeout)


def _measured(work: Work, batch: int, folder: Path, timeout: float | None) -> Facts:
    manifest, out = folder / "pieces.jsonl", folder / "out"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in pieces(work)))
    if batch:
        command = ["musicgen_fast", "render", str(manifest), "-o", str(out), "--model", work.model, "--device", "cpu"]
        command += ["--precision", work.precision, "--batch-size", str(batch), "--progress", "none"]
    else:
        command = [f"{__package__}.render", work.model, work.precision, str(manifest), str(out)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = {} if work.threads is None else {"OMP_NUM_THREADS": str(work.threads)}
    done = subprocess.run(
        [sys.executable, "-m", *command], env={**os.environ, "PYTHONPATH": path, **threads},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads((out / "summary.json").read_text() if batch else done.stdout.splitlines()[-1]))


def lines(work: Work, measured: list[Measured], card: Facts) -> list[Facts]:
    """A JSON line for each way: medians over the rounds; `times` are ratios within a round."""
    loops = {number: facts for number, batch, facts in measured if batch == 0}
    told = []
    for way in dict.fromkeys(batch for _, batch, _ in measured):
        own = [(number, facts) for number, batch, facts in measured if batch == way]
        if way:
            each = [_of_render(facts, loops.get(number)) for number, facts in own]
        else:
            each = [_of_loop(facts) for _, facts in own]
        told.append({
            "benchmark": "render", "way": f"render, batch {way}" if way else "generate, one by one",
            "model": work.model, "precision": work.precision, "threads": work.threads, "pieces": work.count,
            "durations": [work.shortest, work.longest],
            **{name: _median([facts[name] for facts in each]) for name in each[0]},
            "audio_per_second_per_round": [facts["audio_per_second"] for facts in each], "machine": card,
        })  # fmt: skip
    return told


def _of_loop(facts: Facts) -> Facts:
    return {
        "audio_per_second": facts["audio_seconds"] / facts["seconds"],
        "audio_per_second_written": facts["audio_seconds"] / (facts["seconds"] + facts["seconds_writing"]),
        "seconds": facts["seconds"],
        "seconds_writing": facts["seconds_writing"],
        "seconds_to_first_file": facts["seconds_first"],
        "peak_mib": facts["peak_bytes"] / 2**20,
    }


def _of_render(facts: Facts, loop: Facts | None) -> Facts:
    """`bookkeeping_percent`: of the time, by ledger and hand-over in the loop that steps the model; `writing_percent`:
    of the processors' time, by the threads that write."""
    busy, audio = facts["seconds_busy"], facts["audio_seconds"]
    speed = audio / busy
    alone = None if loop is None else _of_loop(loop)
    occupancy = facts["slot_occupancy"]
    return {
        "audio_per_second": speed,
        "times_generate": None if alone is None else speed / alone["audio_per_second"],
        "times_generate_and_write": None if alone is None else speed / alone["audio_per_second_written"],
        "occupancy_percent": None if occupancy is None else 100 * occupancy,
        "bookkeeping_percent": 100 * facts["seconds_bookkeeping"] / busy,
        "writing_percent": 100 * facts["seconds_writing"] / (busy * (os.cpu_count() or 1)),
        "seconds": busy,
        "seconds_to_first_file": facts["seconds_to_first_file"],
        "peak_mib": facts["peak_memory_bytes"] / 2**20,
    }


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return quantile(known, 0.5) if known else None


def table(told: list[Facts]) -> str:
    """Markdown; columns that a way has no figure for stay empty."""
    heads = {
        "audio_per_second": "audio s/s", "times_generate": "x generate", "times_generate_and_write": "x with writing",
        "occupancy_percent": "slots %", "bookkeeping_percent": "ledger %", "writing_percent": "writing %",
        "seconds_to_first_file": "first file s", "peak_mib": "peak MiB",
    }  # fmt: skip
    text = [f"| way | {' | '.join(heads.values())} |", "|" + "---|" * (len(heads) + 1)]
    for line in told:
        values = [line.get(name) for name in heads]
        text.append(f"| {' | '.join([line['way'], *('' if v is None else f'{v:.3g}' for v in values)])} |")
    return "\n".join(text)


if __name__ == "__main__":
    Path(sys.argv[4]).mkdir()
    print(json.dumps(naive(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))

"""`benchmarks/bench_cpu.py`: averages over a window, ratios within a round, what each section runs. Times are given."""

from __future__ import annotations

import importlib
import json
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from musicgen_fast.bench.job import Job
from musicgen_fast.bench.latency import Row

with pytest.MonkeyPatch.context() as patch:  # a script, in a folder which is no package
    patch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    bench_cpu = importlib.import_module("bench_cpu")


def row(ms: float, start: int = 0, number: int = 0, provider: str = "musicgen_fast", **job: Any) -> Row:
    made = Job(provider, steps=20, warmup=10, **({"precision": "int8"} | job))
    return Row(made, number, start, start + 15, [ms - 1, ms, ms, ms + 1], 400, ms / 2, ms / 1.5, 12.0)


def curve(ms: list[float], section: str = "step", busy: bool = False, number: int = 0, **job: Any) -> Any:
    rows = [row(m, start, number, **job) for m, start in zip(ms, (0, 985), strict=True)]
    return bench_cpu.Curve(section, rows[0].job, busy, number, tuple(rows))


def test_averages_are_of_lines_between_the_blocks():
    made = curve([10.0, 20.0])  # at 15 and at 1000
    line = [10 + 10 * min(max((t - 15) / 985, 0), 1) for t in range(1503)]
    assert made.ms == pytest.approx(sum(line) / 1503)
    assert made.average(lambda r: r.median, 16) == 10
    assert made.percent_of_floor == pytest.approx(50) and made.times_read == pytest.approx(1.5)
    assert curve([10.0, 10.0], requests=8).audio_per_second(503) == pytest.approx(8 * 2)


def test_comparisons_within_a_round():
    step = [
        curve([10.0, 10.0]),
        curve([50.0, 50.0], provider="transformers", precision="float32"),
        curve([40.0, 40.0], provider="transformers", precision="bfloat16"),
        curve([80.0, 80.0], provider="audiocraft", precision="float32"),
        curve([1.0, 1.0], provider="audiocraft", precision="float32", number=1),
        curve([40.0, 40.0], precision="float32"),
    ]
    times = bench_cpu.compared(step[0], step)
    assert times["transformers"] == 4 and times["audiocraft"] == 8 and times["openvino"] is None
    assert times["transformers, same precision"] is None
    assert bench_cpu.compared(step[5], step)["transformers, same precision"] == 1.25
    batch = [curve([10.0, 10.0], "batch"), curve([20.0, 20.0], "batch", requests=8)]
    assert bench_cpu.compared(batch[1], batch) == pytest.approx({"audio of one, 30 s": 4, "audio of one, 10 s": 4})
    busy = [curve([20.0, 20.0], "busy", threads=1), curve([22.0, 22.0], "busy", busy=True, threads=2)]
    assert bench_cpu.compared(busy[1], busy) == {"time of one thread": pytest.approx(1.1)}
    lines = bench_cpu.summaries(step + batch + busy, {})
    assert [line["section"] for line in lines].count("batch") == 2 and json.dumps(lines)
    text = bench_cpu.table([line for line in lines if line["section"] == "busy"], {("openvino", "int8"): "gone"})
    assert (
        "| 2, a core busy | 1 |" in text and "time of one thread 1.10" in text and "absent: openvino int8: gone" in text
    )


def test_starts_lie_within_the_window():
    starts = bench_cpu.starts_for([16, 400, 1500], 48, bench_cpu.WARMUP)
    assert starts == (0, 372, 1455) and max(starts) + 48 == bench_cpu.COLUMNS


def test_sections(monkeypatch):
    asked: list[tuple[str, int, int, bool]] = []

    def rounds(jobs: list[Job], count: int, *_: Any) -> tuple[list[Row], dict]:
        asked.extend((j.precision, j.threads, j.requests, process.running) for j in jobs)
        return [replace(row(10.0), job=j) for j in jobs], {}

    class Process:
        running, pid = False, os.getpid()

        def __call__(self, *_: Any) -> Any:
            self.running = True
            return self

        def kill(self) -> None:
            self.running = False

        def wait(self) -> None: ...

    process = Process()
    monkeypatch.setattr(bench_cpu, "run_rounds", rounds)
    monkeypatch.setattr(bench_cpu, "subprocess", SimpleNamespace(Popen=process))
    monkeypatch.setattr(bench_cpu.os, "sched_setaffinity", lambda *_: None, raising=False)
    args = Namespace(precision=["int8"], requests=8, threads=2, rounds=2, timeout=None, providers=["openvino"])
    base = Job("", threads=2)
    for section in bench_cpu.SECTIONS:
        curves, _ = bench_cpu.run_section(section, base, args)
        assert curves and all(c.section == section for c in curves)
    step, batch, threads = asked[:1], asked[1:3], asked[3:5]
    assert step == [("int8", 2, 1, False)] and batch == [("int8", 2, 1, False), ("int8", 2, 8, False)]
    assert threads == [("int8", 1, 1, False), ("int8", 2, 1, False)]
    assert asked[5:] == [("int8", 1, 1, False), ("int8", 2, 1, True)] * 2 and not process.running

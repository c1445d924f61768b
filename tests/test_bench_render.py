"""`benchmarks/bench_render.py`: the same pieces for both ways, on a tiny model; medians and ratios of given times."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from musicgen_fast import native
from musicgen_fast.bench.render import Work, lines, pieces, table

from .cli_tools import write_models

with pytest.MonkeyPatch.context() as patch:  # a script, in a folder which is no package
    patch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    bench_render = importlib.import_module("bench_render")


def loop(seconds: float) -> dict:
    return {
        "seconds": seconds,
        "seconds_writing": 2.0,
        "seconds_first": 1.5,
        "audio_seconds": 60.0,
        "peak_bytes": 2**30,
    }


def rendered(seconds: float) -> dict:
    return {
        "seconds_busy": seconds, "audio_seconds": 60.0, "slot_occupancy": 0.97, "seconds_bookkeeping": seconds / 100,
        "seconds_writing": 0.0, "seconds_to_first_file": 3.0, "peak_memory_bytes": 2**31,
    }  # fmt: skip


def test_pieces_are_mixed_and_always_the_same():
    work = Work("demo", "int8", count=64, shortest=1, longest=8)
    rows = pieces(work)
    durations = [row["duration"] for row in rows]
    assert rows == pieces(work) and len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 64
    assert min(durations) >= 1 and max(durations) <= 8 and len(set(durations)) > 30


def test_ratios_are_of_one_round():
    """The machine was twice as slow in the second round, which changes no ratio."""
    measured = [(0, 0, loop(12.0)), (0, 16, rendered(3.0)), (1, 16, rendered(6.0)), (1, 0, loop(24.0))]
    alone, batch = lines(Work("demo", "int8"), measured, {"cpu": "x"})
    assert alone["way"] == "generate, one by one" and alone["audio_per_second"] == pytest.approx((5 + 2.5) / 2)
    assert batch["times_generate"] == pytest.approx(4) and batch["audio_per_second_per_round"] == [20, 10]
    assert batch["times_generate_and_write"] == pytest.approx((14 / 3 + 26 / 6) / 2)
    assert (batch["occupancy_percent"], batch["bookkeeping_percent"]) == (pytest.approx(97), pytest.approx(1))
    assert batch["peak_mib"] == 2048 and json.dumps([alone, batch])
    text = table([alone, batch])
    assert "| render, batch 16 | 15 | 4 |" in text and text.count("\n") == 3
    assert lines(Work("demo", "int8"), measured[1:2], {})[0]["times_generate"] is None


@pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")
def test_both_ways_run(tmp_path, monkeypatch, capsys):
    """In processes of their own, as the script runs them."""
    model = write_models(tmp_path / "models") / "text"
    options = ["--model", str(model), "--count", "5", "--shortest", "0.1", "--longest", "0.5", "--batches", "2"]
    options += ["--rounds", "1", "--threads", "1", "--timeout", "200", "--json", str(tmp_path / "found.jsonl")]
    monkeypatch.setattr(sys, "argv", ["bench_render.py", *options])
    bench_render.main()
    alone, batch = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert (alone["way"], batch["way"]) == ("generate, one by one", "render, batch 2")
    assert batch["times_generate"] == pytest.approx(batch["audio_per_second"] / alone["audio_per_second"])
    assert 50 < batch["occupancy_percent"] <= 100 and 0 < batch["bookkeeping_percent"] < 100
    assert batch["peak_mib"] > 100 and batch["seconds_to_first_file"] > 0 and batch["pieces"] == 5
    assert alone["audio_per_second"] * alone["seconds"] == pytest.approx(batch["audio_per_second"] * batch["seconds"])
    assert "| render, batch 2 |" in capsys.readouterr().out


def test_a_way_that_fails_is_named():
    with pytest.raises(RuntimeError, match="musicgen_fast.bench.render random:unknown failed"):
        list(bench_render.rounds(Work("random:unknown", "int8", count=1), [], 1, 200))

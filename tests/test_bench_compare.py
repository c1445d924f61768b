"""`musicgen-fast bench compare`: a step that became slower is found, noise within the limit is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from musicgen_fast.bench import latency
from musicgen_fast.bench.compare import Limit, load, parse_limit
from musicgen_fast.bench.latency import Row
from musicgen_fast.cli import main

from .test_bench import row

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
CARD = {"cpu": "a CPU", "gpu": None, "versions": {}}


def written(path: Path, rows: list[Row], card: dict[str, Any] = CARD, absent: Any = None) -> str:
    lines = latency.lines(rows, absent or {}, {}, card)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def rows(ours: float, peer: float = 80.0) -> list[Row]:
    return [row("transformers", peer), row("musicgen_fast", ours, "int8"), row("musicgen_fast", 3 * ours, start=500)]


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (0.8, 0), (1.04, 0), (1.06, 1), (1.15, 1)])
def test_a_slower_step_is_found(factor: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = written(tmp_path / "a", rows(20)), written(tmp_path / "b", rows(20 * factor))
    assert main(["bench", "compare", before, after, "--fail-if", "median:5%"]) == code
    said = capsys.readouterr()
    assert f"{100 * (factor - 1):+.1f} %" in said.out
    assert said.err.count("median is") == 2 * code and "transformers" not in said.err
    assert main(["bench", "compare", before, after]) == 0, "without a limit it only tells"


def test_the_share_of_the_floor_falls_where_the_step_does_not(tmp_path: Path) -> None:
    slow_minute = [
        replace(r, ms=[2 * ms for ms in r.ms], floor_ms=2 * r.floor_ms, read_gb_s=r.read_gb_s / 2) for r in rows(20)
    ]
    before, after = written(tmp_path / "a", rows(20)), written(tmp_path / "b", slow_minute)
    assert main(["bench", "compare", before, after, "--fail-if", "floor:5%"]) == 0
    assert main(["bench", "compare", before, after, "--fail-if", "median:5%"]) == 1


def test_a_measurement_of_ours_that_is_gone_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = written(tmp_path / "a", rows(20)), written(tmp_path / "b", rows(20)[:2])
    assert main(["bench", "compare", before, after, "--fail-if", "median:50%"]) == 1
    assert "not any more" in capsys.readouterr().err
    without_peer = written(tmp_path / "c", rows(20)[1:])
    assert main(["bench", "compare", before, without_peer, "--fail-if", "median:50%"]) == 0


def test_other_machines_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(tmp_path / "a", rows(20))
    after = written(tmp_path / "b", rows(20), CARD | {"gpu": "a GPU"})
    assert main(["bench", "compare", before, after]) == 0
    assert "different machines (a CPU; a GPU)" in capsys.readouterr().err


def test_lines_that_repeat_a_measurement_count_once(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "a", rows(20)))
    path.write_text(path.read_text() + "\n" + Path(written(tmp_path / "b", rows(30))).read_text())
    found, _ = load(path)
    assert len(found) == 3 and {round(values["median"]) for values in found.values()} == {80, 25, 75}


COMMITTED = [
    path.name for kind in ("decoder", "step", "codec", "sampler") for path in sorted(RESULTS.glob(f"*-{kind}.jsonl"))
]


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_results_can_be_compared(name: str) -> None:
    path = str(RESULTS / name)
    assert main(["bench", "compare", path, path, "--fail-if", "median:0%", "--fail-if", "peak:0%"]) == 0


ASKED = {"throughput": {"durations": [1.0, 4.0]}, "stream": {"peer_chunk": 0.2}, "quality": {"frames": 40}}
KINDS = [
    (
        {"benchmark": "throughput", "way": "render", "batch": 8, "audio_per_second": 70.0},
        {"audio_per_second": 60.0},
        "speed",
    ),
    ({"benchmark": "stream", "seconds": 12.0, "ttfa_ms": 150.0, "gap_p99_ms": 30.0}, {"ttfa_ms": 180.0}, "ttfa"),
    ({"benchmark": "sampler", "filter": "none", "us": {"p50": 20.0, "p90": 30.0}}, {"us": {"p50": 25.0}}, "median"),
    ({"benchmark": "quality", "data": "own samples", "nats_per_token": 0.2}, {"nats_per_token": 0.24}, "nats"),
    ({"benchmark": "codec", "seconds": 30.0, "seconds_per_second": 0.07}, {"seconds_per_second": 0.09}, "median"),
]


@pytest.mark.parametrize(("line", "later", "metric"), KINDS, ids=[line["benchmark"] for line, _, _ in KINDS])
def test_every_kind_of_result_is_compared(
    line: dict[str, Any], later: dict[str, Any], metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"provider": "musicgen_fast", "precision": "int8", "model": "demo"}
    asked: dict[str, Any] = ASKED.get(line["benchmark"], {"model": "small"})  # other work
    before, after, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    before.write_text(json.dumps(line | named))
    after.write_text(json.dumps(line | named | later))
    other.write_text(json.dumps(line | named | asked))
    assert main(["bench", "compare", str(before), str(after), "--fail-if", f"{metric}:5%"]) == 1
    assert f"{metric} is" in capsys.readouterr().err
    assert main(["bench", "compare", str(after), str(before), "--fail-if", f"{metric}:5%"]) == 0, "better is no fault"
    assert main(["bench", "compare", str(before), str(other)]) == 1
    assert "no measurement in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no measurement"),
        ("{", "line 1: this is no JSON"),
        ('{"benchmark": "latency", "ms_per_step": 1.0}\n[]', "line 2: this is no result"),
        ('{"benchmark": "latency", "provider": "x", "ms_per_step": null, "absent": "why"}', "holds no measurement"),
        ('{"benchmark": "latency", "provider": "x", "ms_per_step": 3.0}', "no measurement in common"),
    ],
)
def test_bad_files_say_what_is_wrong(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b").write_text(content)
    assert main(["bench", "compare", written(tmp_path / "a", rows(20)), str(tmp_path / "b")]) == 1
    assert said in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path / "a"), str(tmp_path / "none")]) == 1


@pytest.mark.parametrize("text", ["median", "median:5", "slowness:5%", "median:x%", "median:-1%", "median:nan%", ""])
def test_bad_limits(text: str) -> None:
    with pytest.raises(ValueError, match="such as"):
        parse_limit(text)
    assert parse_limit("p90:2.5%") == Limit("p90", 0.025)

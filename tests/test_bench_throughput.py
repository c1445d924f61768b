"""`musicgen-fast bench throughput`: the same pieces for every way on tiny models, and what it says of given times."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen_fast import checkpoints, native
from musicgen_fast.bench import throughput, throughput_worker
from musicgen_fast.bench.job import AbsentError
from musicgen_fast.bench.throughput import Found, Way, Work, pieces, run_rounds, ways
from musicgen_fast.bench.throughput_lines import lines, table
from musicgen_fast.bench.throughput_worker import Task, batches, run_transformers, write_peer
from musicgen_fast.checkpoints import Checkpoint
from musicgen_fast.checkpoints.random_weights import ByteTokenizer, random_checkpoint
from musicgen_fast.checkpoints.write import write_transformers_folder
from musicgen_fast.cli import main
from musicgen_fast.config import named_config

from .checkpoint_writers import tiny
from .cli_tools import write_models

LOOP = Way("musicgen_fast", "generate, one by one", 1)
RENDER = Way("musicgen_fast", "render", 16)
PEER = Way("transformers", "batches", 1)
PEERS = Way("transformers", "batches", 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("throughput"))


def made(seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds, "seconds_writing": 2.0, "seconds_first": 1.5, "load_s": 1.0, "audio_seconds": 60.0,
        "tokens_per_audio_second": 200.0, "peak_bytes": 2**30,
    }  # fmt: skip


def rendered(seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds + 2, "seconds_busy": seconds, "audio_seconds": 60.0, "slot_occupancy": 0.97,
        "seconds_bookkeeping": seconds / 100, "seconds_writing": 0.0, "seconds_to_first_file": 3.0,
        "peak_memory_bytes": 2**31,
    }  # fmt: skip


# -- what is asked for, and what is said of given times -------------------------------------------------------------


def test_pieces_are_mixed_and_always_the_same():
    work = Work("demo", "int8", count=64, shortest=1, longest=8)
    rows = pieces(work)
    durations = [row["duration"] for row in rows]
    assert rows == pieces(work) and len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 64
    assert min(durations) >= 1 and max(durations) <= 8 and len(set(durations)) > 30


def test_batches_of_the_peer_waste_the_least():
    rows = [{"id": n, "frames": frames} for n, frames in enumerate((50, 10, 40, 20, 30))]
    assert [[row["frames"] for row in batch] for batch in batches(rows, 2)] == [[10, 20], [30, 40], [50]]


def test_ways_of_the_providers():
    every = ways(["musicgen_fast", "transformers"], [16], [1, 8, 8])
    assert every == [LOOP, RENDER, PEER, PEERS]
    assert ways(["transformers", "audiocraft"], [16], [8]) == [PEERS, Way("audiocraft", "generate, one by one", 1)]


def test_ratios_are_of_one_round():
    """The machine was twice as slow in the second round, which changes no ratio."""
    measured = [
        (0, LOOP, made(12.0)), (0, RENDER, rendered(3.0)), (0, PEER, made(36.0)), (0, PEERS, made(6.0)),
        (1, PEERS, made(12.0)), (1, PEER, made(72.0)), (1, RENDER, rendered(6.0)), (1, LOOP, made(24.0)),
    ]  # fmt: skip
    work = Work("demo", "int8", threads=2)
    alone, batch, peer, peers = told = lines(work, Found(measured), {"cpu": "x"})
    assert (alone["way"], alone["batch"]) == ("generate, one by one", 1)
    assert alone["audio_per_second"] == pytest.approx((5 + 2.5) / 2) and alone["times_generate"] == 1
    assert alone["audio_per_second_written"] == pytest.approx((60 / 14 + 60 / 26) / 2)
    assert batch["times_generate"] == pytest.approx(4) and batch["audio_per_second_per_round"] == [20, 10]
    assert batch["times_transformers"] == pytest.approx(2), "against the best batch"
    assert (peer["times_transformers"], peer["times_generate"]) == (pytest.approx(1 / 6), pytest.approx(1 / 3))
    assert peers["times_transformers"] == 1 and peers["batch"] == 8 and peers["load_s"] == 1
    assert batch["tokens_per_second"] == pytest.approx(200 * 15) and alone["tokens_per_second"] == pytest.approx(750)
    assert batch["times_generate_and_write"] == pytest.approx((14 / 3 + 26 / 6) / 2)
    assert (batch["occupancy_percent"], batch["bookkeeping_percent"]) == (pytest.approx(97), pytest.approx(1))
    assert (batch["peak_mib"], batch["load_s"], batch["rounds"]) == (2048, 2, 2)
    shared = {
        "benchmark": "throughput",
        "model": "demo",
        "device": "cpu",
        "threads": 2,
        "pieces": 64,
        "durations": [1, 8],
    }
    assert all(shared.items() <= line.items() and line["machine"] == {"cpu": "x"} for line in told)
    assert json.dumps(told) and (batch["precision"], peer["precision"] in ("float32", "bfloat16")) == ("int8", True)
    text = table(told)
    assert "| musicgen_fast | int8 | render | 16 | 15 | 2 | 4 |" in text and text.count("\n") == 5


def test_ratios_to_what_did_not_run_are_none():
    (alone,) = lines(Work("demo", "int8"), Found([(1, RENDER, rendered(3.0)), (0, LOOP, made(1.0))]), {})[:1]
    assert alone["audio_per_second"] == 20
    assert (alone["times_generate"], alone["times_transformers"], alone["tokens_per_second"]) == (None, None, None)
    on_gpu = lines(Work("demo", "float16", "cuda"), Found([(0, RENDER, rendered(3.0))]), {})[0]
    assert on_gpu["peak_mib"] is None, "what render tells is not the GPU's"


def test_absent_ways_are_named():
    found = Found([(0, LOOP, made(12.0))], {PEERS: "transformers is not installed (pip install transformers)"})
    told = lines(Work("demo", "int8"), found, {})
    gone = told[1]
    assert gone["absent"].startswith("transformers is not installed") and gone["audio_per_second"] is None
    assert (gone["provider"], gone["way"], gone["batch"], gone["rounds"]) == ("transformers", "batches", 8, 0)
    assert "| 8 | absent: transformers is not installed (pip install transformers) |" in table(told)


# -- the processes -----------------------------------------------------------------------------------------------------


def test_a_way_that_fails_loses_no_other(monkeypatch):
    """What failed once is not tried again, and the model of the peer is written once."""
    asked: list[str] = []

    def process(self: Any, module: str, *arguments: str) -> str:
        asked.append(json.loads(arguments[0])["kind"] if module.endswith("worker") else arguments[0])
        if asked[-1] == "render":
            raise throughput._FailedError("failed: no room")
        return json.dumps(made(1.0) if asked[-1] != "write" else {})

    monkeypatch.setattr(throughput._Runs, "_process", process)
    told: list[str] = []
    found = run_rounds(Work("demo", "float32"), [LOOP, RENDER, PEER, PEERS], 2, told.append)
    assert found.absent == {RENDER: "failed: no room"}
    assert [(number, way) for number, way, _ in found.measured] == [
        (0, LOOP), (0, PEER), (0, PEERS), (1, PEER), (1, PEERS), (1, LOOP),
    ]  # fmt: skip
    assert asked == ["loop", "render", "write", "transformers", "transformers", "transformers", "transformers", "loop"]
    assert "round 1 of 2: musicgen_fast, render, 16 at once: absent" in told
    assert "round 2 of 2: transformers, batches, 8 at once: 60 seconds of audio a second" in told


def test_why_a_process_failed_or_was_late():
    wrong = run_rounds(Work("random:unknown", "int8", count=1), [LOOP], 1, print, 200)
    assert wrong.absent[LOOP].startswith("failed: ") and "unknown" in wrong.absent[LOOP] and not wrong.measured
    late = run_rounds(Work("demo", "int8", count=1), [LOOP], 1, print, 0.01)
    assert late.absent == {LOOP: "failed: not done after 0.01 s"}


def test_audiocraft_is_absent_with_a_reason():
    way = Way("audiocraft", "generate, one by one", 1)
    assert "`bench latency` only" in run_rounds(Work("demo", "int8"), [way], 3, print).absent[way]


# -- the peer ----------------------------------------------------------------------------------------------------------


def peer(model: Path | str, tmp_path: Path, durations: list[float], batch: int = 2, precision: str = "float32") -> Task:
    manifest = tmp_path / "pieces.jsonl"
    rows = [{"id": f"p{n}", "prompt": "calm piano " * (n + 1), "duration": d} for n, d in enumerate(durations)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "peer").mkdir()
    return Task("", str(model), precision, "cpu", str(manifest), str(tmp_path / "out"), str(tmp_path / "peer"), batch)


@pytest.mark.parametrize(("kind", "precision"), [("text", "float32"), ("stereo", "bfloat16")])
def test_transformers_makes_every_piece_at_its_length(tmp_path, monkeypatch, kind, precision):
    import soundfile
    import transformers

    folder = write_transformers_folder(tmp_path / "model", checkpoint=tiny(kind))
    task = peer(folder, tmp_path, [0.3, 0.1, 0.6], precision=precision)
    assert write_peer(task) == {}
    asked: list[Any] = []
    generate = transformers.MusicgenForConditionalGeneration.generate

    def listening(self: Any, **options: Any) -> Any:
        asked.append((self.dtype, options))
        return generate(self, **options)

    monkeypatch.setattr(transformers.MusicgenForConditionalGeneration, "generate", listening)
    facts = run_transformers(task)
    sounds = {path.stem: soundfile.info(path) for path in (tmp_path / "out").glob("*.wav")}
    assert {name: sound.frames for name, sound in sounds.items()} == {"p0": 9600, "p1": 3200, "p2": 19200}
    channels = 1 + (kind == "stereo")
    assert {sound.channels for sound in sounds.values()} == {channels}
    assert facts["audio_seconds"] == pytest.approx(1.0) and facts["tokens_per_audio_second"] == 200 * channels
    assert facts["seconds_first"] > facts["load_s"] > 0 and facts["peak_bytes"] > 2**20 and facts["seconds_writing"] > 0
    warm, first, second = (options for _, options in asked)
    assert {dtype for dtype, _ in asked} == {getattr(torch, precision)}
    assert [options["max_new_tokens"] for options in (warm, first, second)] == [28, 18, 33]
    assert first["attention_mask"].tolist()[0][-1] == 1 and first["attention_mask"].tolist()[1][-1] == 0
    assert [len(o["input_ids"]) for o in (first, second)] == [2, 1]
    assert (first["guidance_scale"], first["top_k"], first["do_sample"]) == (3.0, 250, True)


def test_the_peer_runs_the_shapes_of_random_sizes(tmp_path, monkeypatch):
    """Text encoder and codec at their own sizes, from one checkpoint; the ids are those that ours reads."""

    def shorter(name: str, **options: Any) -> Checkpoint:  # one layer of 24: 0.8 GB less to write
        return random_checkpoint(replace(named_config(name.removeprefix("random:")), num_layers=1), **options)

    monkeypatch.setattr(checkpoints, "load_checkpoint", shorter)
    task = peer("random:small", tmp_path, [0.1], precision="bfloat16")
    write_peer(task)
    config = json.loads((tmp_path / "peer" / "config.json").read_text())
    assert config["decoder"]["hidden_size"] == 1024 and config["decoder"]["vocab_size"] == 2048
    assert config["text_encoder"]["d_model"] == 768 and config["audio_encoder"]["num_filters"] == 64
    (piece,) = json.loads((tmp_path / "peer" / "pieces.json").read_text())["pieces"]
    assert piece["ids"] == ByteTokenizer().ids("calm piano ") and piece["frames"] == 5


def test_models_that_transformers_cannot_run_are_absent(models, tmp_path):
    for number, (model, durations, why) in enumerate((
        (models / "melody", [0.1], "with text models only"),
        (models / "text", [0.1, 1.5], "one window, 1 s here"),
    )):  # fmt: skip
        (tmp_path / str(number)).mkdir()
        with pytest.raises(AbsentError, match=why):
            write_peer(peer(model, tmp_path / str(number), durations))


def test_a_worker_prints_why_it_is_absent(models, tmp_path, capsys):
    task = peer(models / "melody", tmp_path, [0.1])
    throughput_worker.main(json.dumps({**vars(task), "kind": "write"}))
    assert "text models only" in json.loads(capsys.readouterr().out)["absent"]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")
def test_all_ways_run(models, tmp_path, capsys):
    """In processes of their own, as the command runs them."""
    options = ["--model", str(models / "text"), "--pieces", "5", "--shortest", "0.1", "--longest", "0.5"]
    options += ["--batches", "2", "--peer-batches", "3", "--rounds", "1", "--threads", "1", "--device", "cpu"]
    options += ["--timeout", "200", "--providers", "musicgen_fast,transformers,audiocraft", "--json", "-"]
    assert main(["bench", "throughput", *options]) == 0
    out, err = capsys.readouterr()
    alone, batch, theirs, gone = [json.loads(line) for line in out.splitlines()]
    assert [(line["way"], line["batch"]) for line in (alone, batch, theirs)] == [
        ("generate, one by one", 1), ("render", 2), ("batches", 3),
    ]  # fmt: skip
    assert batch["times_generate"] == pytest.approx(batch["audio_per_second"] / alone["audio_per_second"])
    assert batch["times_transformers"] == pytest.approx(batch["audio_per_second"] / theirs["audio_per_second"])
    assert theirs["times_transformers"] == 1 and batch["precision"] == "int8" and batch["threads"] == 1
    assert 50 < batch["occupancy_percent"] <= 100 and 0 < batch["bookkeeping_percent"] < 100
    made_each = [line["audio_per_second"] * line["seconds"] for line in (alone, batch, theirs)]
    assert made_each == [pytest.approx(made_each[0])] * 3, "the same seconds of audio"
    for line in (alone, batch, theirs):
        assert line["peak_mib"] > 100 and line["seconds_to_first_file"] > line["load_s"] > 0 and line["pieces"] == 5
        assert line["tokens_per_second"] == pytest.approx(200 * line["audio_per_second"])
    assert gone["provider"] == "audiocraft" and gone["absent"].startswith("audiocraft is timed by")
    assert "round 1 of 1: transformers, batches, 3 at once" in err and "audiocraft, generate" in err


def test_a_way_of_ours_that_fails_is_an_error(monkeypatch, capsys, tmp_path):
    """After the table and the lines of the others."""

    def answer(self: Any, way: Way, number: int) -> Any:
        if way == RENDER:
            raise throughput._FailedError("failed: no room")
        return made(1.0)

    monkeypatch.setattr(throughput._Runs, "facts", answer)
    options = ["--device", "cpu", "--precision", "float32", "--batches", "16", "--json", str(tmp_path / "lines.jsonl")]
    assert main(["bench", "throughput", *options, "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert err == "musicgen-fast: error: musicgen_fast, render, 16 at once, could not be timed: failed: no room\n"
    assert "| musicgen_fast | float32 | render | 16 | absent: failed: no room |" in out
    written = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [(line["provider"], line["batch"]) for line in written] == [
        ("musicgen_fast", 1), ("transformers", 1), ("transformers", 16), ("musicgen_fast", 16),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--batches", "8,0"], 2, "argument --batches: expected a whole number, at least 1, got '0'"),
        (["--peer-batches", "x"], 2, "argument --peer-batches: expected a whole number, at least 1, got 'x'"),
        (["--shortest", "0.01"], 2, "argument --shortest: expected at least 0.1 seconds, got '0.01'"),
        (["--shortest", "9"], 2, "--longest 8 is below --shortest 9"),
        (["--longest", "nan"], 2, "argument --longest: expected seconds, above 0, got 'nan'"),
        (["--providers", "openvino"], 2, "expected some of musicgen_fast,transformers,audiocraft, got 'openvino'"),
        (["--precision", "int2"], 2, "invalid choice: 'int2'"),
        (["--model", "random:tiny", "--device", "cpu"], 1, "unknown size 'tiny'"),
        (["--device", "abacus"], 1, "unknown device 'abacus'"),
    ],
)  # fmt: skip
def test_mistakes_measure_nothing(options, code, told, capsys):
    try:
        returned = main(["bench", "throughput", *options])
    except SystemExit as stop:
        returned = int(stop.code or 0)
    assert returned == code and told in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys, musicgen_fast.cli as c\ntry: c.main(['bench', 'throughput', '--help'])\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--peer-batches" in done.stdout and done.stdout.splitlines()[-1] == "False"

"""`musicgen-fast bench stream`: what it says of given times, that both players play what they should, and the command.

Times themselves are not looked at. The models are tiny ones in a folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from musicgen_fast import native
from musicgen_fast.bench import stream, stream_peer, stream_worker
from musicgen_fast.bench.job import AbsentError
from musicgen_fast.bench.stream import METRICS, Row, StreamJob, playback
from musicgen_fast.checkpoints.write import write_transformers_folder
from musicgen_fast.cli import main
from musicgen_fast.cli_bench import stream as cli_stream

from .checkpoint_writers import tiny
from .cli_tools import write_models

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """'text' and 'melody' with a window of 1 s, 'stereo'."""
    root = write_models(tmp_path_factory.mktemp("stream"))
    write_transformers_folder(root / "stereo", checkpoint=tiny("stereo"))
    return root


def answer(arrivals: list[float], sounds: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "load_s": 2.0, "first": [0.9, 0.3, 0.5, 0.4], "arrivals": arrivals, "sounds": sounds, "window": 30.0,
        "step_ms": [10.0] * 30, "changes": [], "peak_mib": 400, **changes,
    }  # fmt: skip


def row(provider: str, number: int = 0, precision: str = "int8", **found: float | None) -> Row:
    whole = stream.metrics(answer([0.4, 0.9], [0.5, 0.5])) | found
    return Row(StreamJob(provider, precision=precision), number, whole)


# -- what is said of times --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arrivals,lengths,silent,underruns",
    [
        ([], [], 0, 0),
        ([5.0], [1.0], 0, 0),
        ([5.0, 5.5, 6.5], [1, 1, 1], 0, 0),  # late, but the first
        ([1.0, 3.0, 3.5], [1, 1, 1], 1, 1),  # the second is due at 2, the third at 4
        ([1.0, 2.0, 3.0], [1, 1, 1], 0, 0),  # each when the last one ends
        ([0.1 * n for n in range(1, 40)], [0.1] * 39, 0, 0),  # the same, with rounding
        ([0.0, 2.0, 2.0, 2.0, 7.0], [1, 1, 1, 1, 1], 3, 2),  # what is ahead is played before the next silence
        ([0.0, 0.0, 0.0, 3.5], [1, 1, 1, 9], 0.5, 1),
    ],
)
def test_when_a_player_runs_dry(arrivals, lengths, silent, underruns):
    found = playback(arrivals, lengths)
    assert (found.silent, found.underruns) == (pytest.approx(silent, abs=1e-9), underruns)
    later = [at + found.silent for at in arrivals[:1]] + arrivals[1:]
    assert playback(later, lengths).underruns == 0  # by as much later, and there is no silence


def test_chunks_and_sounds_must_be_as_many():
    with pytest.raises(ValueError):
        playback([1.0, 2.0], [1.0])


def test_metrics_of_given_times():
    steps = [10.0] * 40
    steps[3], steps[19], steps[24] = 900.0, 30.0, 700.0
    found = stream.metrics(answer([0.6, 1.0, 3.0, 3.1], [0.5, 1.0, 1.0, 0.1], step_ms=steps, changes=[15]))
    assert found["ttfa_cold_ms"] == 900 and found["ttfa_ms"] == pytest.approx(450)  # of 0.3, 0.4, 0.5, 0.6
    assert (found["load_s"], found["chunks"], found["first_chunk_ms"], found["peak_mib"]) == (2, 4, 500, 400)
    gaps = [found[f"gap_{name}_ms"] for name in ("p50", "p99", "max")]
    assert gaps == [pytest.approx(400), pytest.approx(1968), pytest.approx(2000)]
    assert found["audio_underrun_s"] == pytest.approx(0.9) and found["underruns"] == 1
    assert found["rtf"] == pytest.approx(3.1 / 2.6) and found["rtfx"] == pytest.approx(2.6 / 3.1)
    assert (found["ms_per_step"], found["longest_step_ratio"], found["window"]) == (10, 3, 30)
    assert tuple(found) == METRICS


def test_one_chunk_has_no_gaps_and_one_window_no_change():
    found = stream.metrics(answer([2.0], [4.0], step_ms=[]))
    nothing = ("gap_p50_ms", "gap_p99_ms", "gap_max_ms", "ms_per_step", "longest_step_ratio")
    assert [name for name in METRICS if found[name] is None] == sorted(nothing, key=METRICS.index)
    assert (found["chunks"], found["audio_underrun_s"], found["rtf"]) == (1, 0, 0.5)


def test_lines_are_medians_over_rounds_and_ratios_within_them():
    rows = [row("musicgen_fast", n, ttfa_ms=10 * (n + 1), rtf=0.1, peak_mib=400 + n) for n in range(3)]
    rows += [row("transformers", n, "bfloat16", ttfa_ms=ms, rtf=rtf) for n, (ms, rtf) in enumerate([(90, 2), (40, 1)])]
    absent = {("transformers", "float16"): "transformers is not installed"}
    asked = StreamJob("", "demo", threads=2, peer_chunk=0.5)
    peer, ours, gone = stream.lines(rows, absent, asked, {"cpu": "x"})
    assert {"benchmark", "provider", "precision", "model", "device", "threads", "seconds", *METRICS} <= set(gone)
    assert all(line["benchmark"] == "stream" and line["machine"] == {"cpu": "x"} for line in (peer, ours, gone))
    assert (ours["ttfa_ms"], ours["ttfa_ms_per_round"], ours["peak_mib"], ours["rounds"]) == (20, [10, 20, 30], 402, 3)
    assert ours["times_sooner_than_transformers"] == 5.5 and ours["times_faster_than_transformers"] == 15
    assert (ours["peer_chunk"], peer["peer_chunk"], peer["precision"]) == (None, 0.5, "bfloat16")
    assert gone["ttfa_ms"] is None and gone["absent"] == "transformers is not installed" and "absent" not in ours
    head, _, *body = stream.table([peer, ours, gone]).splitlines()
    assert body[1].startswith("| musicgen_fast | int8 | 20 (900) | 500 | 500 / 500 / 500 | 0.00 (0) |")
    assert body[2].startswith("| transformers | float16 | absent: transformers is not installed |")
    assert {text.count("|") for text in (head, *body)} == {12}


def test_a_provider_that_fails_is_absent_and_not_tried_again(monkeypatch):
    tried: list[tuple[str, str, str]] = []

    def process(job: StreamJob, task: str, timeout: float | None, module: str) -> dict[str, Any]:
        assert os.path.isdir(job.folder) and timeout == 7
        tried.append((job.provider, task, module))
        return {"absent": "failed: MemoryError"} if job.provider == "transformers" else answer([0.1], [1.0])

    monkeypatch.setattr(stream, "in_own_process", process)
    jobs = [StreamJob("transformers", precision="float32"), StreamJob("musicgen_fast")]
    rows, absent = stream.run_rounds(jobs, 2, lambda _: None, 7)
    assert [r.round for r in rows] == [0, 1] and absent == {("transformers", "float32"): "failed: MemoryError"}
    assert [name for name, *_ in tried] == ["transformers", "musicgen_fast", "musicgen_fast"]
    assert [task for _, task, _ in tried] == ["prepare", "stream", "stream"]
    assert {module for *_, module in tried} == {"stream_worker"}


def test_rounds_take_turns(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(stream, "in_own_process", lambda *_: answer([0.1], [1.0]))
    stream.run_rounds([StreamJob("musicgen_fast"), StreamJob("transformers")], 3, said.append)
    turns = [text.split(": ")[1].split()[0] for text in said]
    assert turns == [*("musicgen_fast", "transformers"), *("transformers", "musicgen_fast")] + turns[:2]


# -- the players ------------------------------------------------------------------------------------------------------


def heard(player: Any, whole: bool = True, text: str = "slow piano") -> list[Tensor]:
    chunks: list[Tensor] = []

    def take(audio: Tensor) -> bool:
        chunks.append(audio)
        return whole

    player.play(text, take)
    return chunks


def peer(model: Path, folder: Path, **job: Any) -> stream_peer.TransformersPlayer:
    asked = {"precision": "float32", "seconds": 1.5, "peer_chunk": 0.4, **job}
    player = stream_peer.TransformersPlayer(StreamJob("transformers", str(model), folder=str(folder), **asked))
    player.prepare()
    player.load()
    return player


@pytest.mark.parametrize("kind", ["text", "stereo"])
def test_the_peer_plays_what_transformers_generates(models, tmp_path, kind):
    """The chunks together are the decode of the tokens, and both are transformers' own for these random numbers."""
    player = peer(models / kind, tmp_path)
    torch.manual_seed(5)
    chunks = heard(player)
    assert player.tokens is not None and player.tokens.shape == (4 if kind == "text" else 8, 75)
    frames = [chunk.shape[1] / 640 for chunk in chunks]
    assert frames == [10, 20, 20, 25]  # 20 columns: 17 frames, of which 7 are kept back; the last ones at once
    sound = torch.cat(chunks, dim=1)
    assert (sound - player.decode(player.tokens)).abs().max() < 1e-5 * sound.abs().max()
    assert len(player.step_ms) == 77 and not player.changes  # 78 columns

    ids = torch.tensor([player.tokenizer.ids("slow piano")])
    torch.manual_seed(5)
    with torch.no_grad():
        whole = player.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=250, guidance_scale=3.0,
            max_new_tokens=78,
        )[0]  # fmt: skip
    assert whole.shape == sound.shape and (sound - whole).abs().max() < 1e-5 * whole.abs().max()


def test_the_peer_may_be_left_and_keeps_the_codec_s_view_back(models, tmp_path, monkeypatch):
    player = peer(models / "text", tmp_path)
    assert [chunk.shape for chunk in heard(player, whole=False)] == [(1, 6400)]
    monkeypatch.setattr(stream_peer, "HELD_BACK", 0)
    sound = torch.cat(heard(player), dim=1)
    assert player.tokens is not None
    assert (sound - player.decode(player.tokens)).abs().max() > 1e-3 * sound.abs().max()


def test_what_the_peer_cannot_do_is_absent(models, tmp_path):
    job = StreamJob("transformers", str(models / "melody"), "float32", folder=str(tmp_path))
    assert "text models only" in stream_worker.measure(job)["absent"]
    with pytest.raises(AbsentError, match="no int8"):
        stream_peer.TransformersPlayer(StreamJob("transformers", folder=str(tmp_path))).prepare()


@pytest.mark.parametrize("window,changes", [(None, []), (1.0, [52, 82])])
def test_ours_plays_whole_windows_and_knows_their_ends(models, window, changes):
    """One step a frame and three for the delays; windows of 50 frames, 30 apart, end with frames 50 and 80."""
    model = str(models / ("text" if window else "stereo"))
    player = stream_worker.OurPlayer(StreamJob("musicgen_fast", model, "float32", seconds=1.9, window=window))
    player.load()
    chunks = heard(player)
    assert chunks[0].shape == (1 if window else 2, 640) and sum(chunk.shape[1] for chunk in chunks) == 95 * 640
    assert player.changes == changes and len(player.step_ms) == 98 and min(player.step_ms) > 0
    assert len(heard(player, whole=False)) == 1 and len(player.step_ms) < 15  # of the last stream


def test_no_listener_meets_a_text_that_is_known(models, monkeypatch):
    said: list[tuple[str, bool]] = []

    class Player(stream_worker.OurPlayer):
        def play(self, text: str, take: Any) -> None:
            more = take(torch.zeros(1, 640))
            said.append((text, more))

    monkeypatch.setitem(stream_worker.PLAYERS, "musicgen_fast", Player)
    found = stream_worker.measure(StreamJob("musicgen_fast", str(models / "text"), "float32"))
    assert len({text for text, _ in said}) == 5 and [more for _, more in said] == [False] * 4 + [True]
    assert len(found["first"]) == 4 and len(found["arrivals"]) == 1 and found["sounds"] == [0.02]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_line_names_what_there_is():
    assert cli_stream.PROVIDERS == stream.PROVIDERS == tuple(stream_worker.PLAYERS)


def test_the_command_runs_both(models, capsys):
    options = "--device cpu --precision float32 --duration 1.9 --peer-chunk 0.5 --rounds 1 --threads 1 --json -"
    assert main(["bench", "stream", "-m", str(models / "text"), *options.split()]) == 0
    out, err = capsys.readouterr()
    ours, peer = (json.loads(line) for line in out.splitlines())
    assert "round 1 of 1: transformers float32" in err
    assert (ours["provider"], peer["provider"]) == ("musicgen_fast", "transformers")
    assert (ours["chunks"], ours["first_chunk_ms"], ours["window"], peer["window"]) == (7, 20, 1, None)
    assert (peer["chunks"], peer["first_chunk_ms"]) == (4, 300) and peer["longest_step_ratio"] is None
    for line in (ours, peer):
        assert line["rtf"] * line["rtfx"] == pytest.approx(1, rel=0.05) and line["peak_mib"] > 50
        assert line["ttfa_cold_ms"] > 0 < line["ms_per_step"] and line["machine"]["cpu"]
        assert line["gap_p50_ms"] <= line["gap_p99_ms"] <= line["gap_max_ms"]
    assert ours["longest_step_ratio"] > 0 and peer["times_sooner_than_transformers"] == 1


def test_a_file_gets_the_lines_and_the_screen_a_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(stream, "in_own_process", lambda *_: answer([0.1], [1.0]))
    argv = ["bench", "stream", "--device", "cpu", "--rounds", "2", "-q", "--json", str(tmp_path / "a.jsonl")]
    assert main([*argv, "--providers", "musicgen_fast"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("| provider | precision |") and not err
    (line,) = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert (line["precision"], line["rounds"], line["rtf_per_round"]) == ("int8", 2, [0.1, 0.1])


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--providers", "audiocraft"], "expected some of musicgen_fast,transformers"),
        (["--precision", "int3"], "got 'int3'"),
        (["--duration", "0"], "expected seconds, above 0"),
        (["--window", "short"], "expected seconds, above 0"),
        (["--peer-chunk", "-1"], "expected seconds, above 0"),
        (["--timeout", "nan"], "expected seconds, above 0"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_mistakes(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "stream", *argv])
    assert message in capsys.readouterr().err


def test_our_own_absence_is_an_error(models, capsys):
    argv = ["bench", "stream", "-m", str(models / "none"), "--device", "cpu", "--providers", "musicgen_fast"]
    assert main([*argv, "--precision", "float32"]) == 1
    out, err = capsys.readouterr()
    assert "| musicgen_fast | float32 | absent: failed: " in out and "could not be timed in float32" in err
    assert main(["bench", "stream", "-m", "random:huge"]) == 1
    assert "unknown size 'huge'" in capsys.readouterr().err
    assert main([*argv, "--timeout", "0.1"]) == 1
    assert "not done after 0.1 s" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys; from musicgen_fast.cli import main\ntry: main(['bench', 'stream', '-h'])\n"
    done = subprocess.run([sys.executable, "-c", code + "finally: print('torch' in sys.modules)"], text=True,
                          capture_output=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False" and "--peer-chunk" in done.stdout


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_shadow_beside_prefill(models, precision):
    """benchmarks/bench_stream.py sees the steps of the decoder that serves: two rows, beside a shadow four."""
    if precision == "int8" and not native.available():
        pytest.skip(f"int8 needs the C++ extension: {native.why_not()}")
    options = f"--precision {precision} --window 1 --seconds 2.5 --rounds 1 --threads 1 --device cpu --json -"
    argv = [sys.executable, str(ROOT / "benchmarks" / "bench_stream.py"), "-m", str(models / "text"), *options.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shadow, prefill = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert (shadow["benchmark"], shadow["way"], prefill["way"], shadow["precision"]) == (
        "windows", "shadow", "prefill", precision,
    )  # fmt: skip
    assert shadow["beside"] > 0 and prefill["beside"] is None and prefill["steps"] > shadow["steps"] > 120
    assert shadow["change"] > 0 and shadow["window"] == 1 and ("CpuDecoder" in done.stdout or precision == "float32")

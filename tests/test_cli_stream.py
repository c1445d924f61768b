"""`musicgen-fast generate --stream`, `--endless` and `-o -`: files that grow, pipes, interrupts, mistakes."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from musicgen_fast import MusicGen, cli_stream
from musicgen_fast.stream import Stream

from .cli_tools import RATE, Runner, names, pcm, sidecar, write_models, write_noise


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(models, tmp_path, monkeypatch, capsys)


def test_a_streamed_file_is_the_file_that_is_written_at_the_end(run: Runner) -> None:
    code, out, _ = run("a", "b", "--seed", "3", "--stream", "--duration", "1.5", "-o", "streamed")
    assert code == 0 and out.count("\n") == 2
    assert run("a", "b", "--seed", "3", "--duration", "1.5", "--loudness", "none", "-o", "whole")[0] == 0
    assert names("streamed") == names("whole") == ["a_3.json", "a_3.wav", "b_4.json", "b_4.wav"]
    for name in ("a_3.wav", "b_4.wav"):
        streamed, whole = (np.frombuffer(pcm(f"{folder}/{name}"), np.int16) for folder in ("streamed", "whole"))
        assert len(streamed) == 1.5 * RATE
        assert np.abs(streamed.astype(int) - whole).max() <= 1, "but for the rounding of float32"
    note = sidecar("streamed/a_3.json")
    assert note["complete"] is True and note["frames"] == 1.5 * RATE and note["seconds_to_first_sound"] > 0
    assert note["sha256"] == hashlib.sha256(pcm("streamed/a_3.wav")).hexdigest()
    assert set(sidecar("whole/a_3.json")) - set(note) == {"batch", "real_time_factor"}


def test_the_file_is_whole_after_every_chunk(run: Runner, monkeypatch) -> None:
    lengths = []
    head = cli_stream.WavFile._head

    def noting(self) -> None:
        head(self)
        if self.samples:
            with soundfile.SoundFile(self.path) as file:
                lengths.append(file.frames)
                assert (file.samplerate, file.channels, file.subtype) == (RATE, 1, "PCM_16")

    monkeypatch.setattr(cli_stream.WavFile, "_head", noting)
    assert run("a", "--stream", "--duration", "0.6")[0] == 0
    assert len(lengths) > 4 and lengths == sorted(lengths) and lengths[-1] == 0.6 * RATE


def test_raw_samples_on_standard_output(run: Runner, monkeypatch) -> None:
    run("a", "--seed", "3", "--stream", "-o", "out")

    class Standard(io.StringIO):
        buffer = io.BytesIO()

    monkeypatch.setattr(sys, "stdout", Standard())
    assert run("a", "--seed", "3", "-o", "-")[0] == 0
    assert sys.stdout.buffer.getvalue() == pcm("out/a_3.wav")  # type: ignore[attr-defined]
    assert sys.stdout.getvalue() == "" and not Path("-").exists()  # type: ignore[attr-defined]


def test_an_interrupt_leaves_a_file_that_can_be_played(run: Runner, monkeypatch) -> None:
    made = Stream.__next__

    def interrupted(self):
        if self.seconds > 0.3:
            raise KeyboardInterrupt
        return made(self)

    monkeypatch.setattr(Stream, "__next__", interrupted)
    for options, code in ((("--stream", "--duration", "3"), 130), (("--endless",), 0)):
        assert run("a", "--seed", "1", "--overwrite", *options)[0] == code
        note = sidecar("out/a_1.json")
        assert note["complete"] is False and 0.3 * RATE < note["frames"] < RATE
        assert soundfile.info("out/a_1.wav").frames == note["frames"]


def test_a_player_that_is_closed_ends_an_endless_run(models: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "musicgen_fast",
        "generate",
        "a",
        "--endless",
        "-o",
        "-",
        "-m",
        str(models / "text"),
    ]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        samples = process.stdout.read(4 * RATE)
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(60) == 0, errors
    assert len(samples) == 4 * RATE and np.frombuffer(samples, np.int16).any()
    assert "raw PCM: 16-bit little-endian, 32000 Hz, 1 channel(s)" in errors and "Traceback" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_in_a_real_process(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "musicgen_fast", "generate", "a", "--endless", "--seed", "1"]
    command += ["-m", str(models / "text")]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        cwd=tmp_path,
        # a test run started in the background hands down an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        path, waited = tmp_path / "out/a_1.wav", time.monotonic() + 60
        while not path.exists() or path.stat().st_size < RATE:
            assert process.poll() is None and time.monotonic() < waited
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()  # an endless run must not outlive a failed test
    assert process.returncode == 0 and b"interrupted" in err and b"Traceback" not in err, err
    assert soundfile.info(path).frames > 0 and path.with_suffix(".json").exists()


def test_what_streams_take_from_the_other_options(run: Runner) -> None:
    write_noise("song.wav", 0.3)
    assert run("a", "--stream", "--continue", "song.wav", "--duration", "0.8", "--seed", "1", "-o", "c")[0] == 0
    assert (
        run("a", "--continue", "song.wav", "--duration", "0.8", "--seed", "1", "--loudness", "none", "-o", "d")[0] == 0
    )
    a, b = (np.frombuffer(pcm(f"{folder}/a_1.wav"), np.int16).astype(int) for folder in "cd")
    assert np.abs(a - b).max() <= 1
    assert (
        run("a", "--stream", "--melody", "song.wav", "--no-separate", "--seed", "1", "-o", "m", model="melody")[0] == 0
    )
    assert run("a", "--stream", "--fade-out", "0.1", "--seed", "1", "-o", "f")[0] == 0
    assert run("a", "--stream", "--seed", "1", "-o", "g")[0] == 0
    assert run("a", "--stream", "--seed", "1", "--negative-prompt", "b", "-o", "n")[0] == 0
    faded, plain, negative = (np.frombuffer(pcm(f"{folder}/a_1.wav"), np.int16).astype(int) for folder in "fgn")
    assert (faded[: 3200 - 1] == plain[: 3200 - 1]).all() and abs(faded[-1]) <= 10 < np.abs(plain[-640:]).max()
    assert (negative != plain).any() and sidecar("n/a_1.json")["negative_prompt"] == "b"
    assert run("a", "--seed", "1", "--negative-prompt", "b", "--loudness", "none", "-o", "w")[0] == 0
    assert np.abs(np.frombuffer(pcm("w/a_1.wav"), np.int16) - negative).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stream", "-f", "mp3"), "writes wav, not mp3"),
        (("--stream", "--loudness", "rms"), "needs the whole piece"),
        (("--endless", "-n", "2"), "makes one piece, 2 were asked for"),
        (("--endless", "--fade-out", "1"), "needs an end"),
        (("--fade-out", "1"), "needs --stream"),
        (("--stream", "--fade-out", "-1"), "0 seconds or more"),
        (("--stream", "--fade-out", "9"), "longer than --duration 0.2"),
    ],
)
def test_mistakes(run: Runner, options: tuple[str, ...], message: str) -> None:
    code, out, err = run("a", *options)
    assert code == 2 and message in err and out == "" and not Path("out").exists()


def test_sections_of_a_file(run: Runner) -> None:
    Path("story.txt").write_text("# a story\n0 a\n\n0:00.5, b loud\n")
    assert run("--sections", "story.txt", "--duration", "1.2", "--seed", "1", "--crossfade", "0.1")[0] == 0
    assert names() == ["a_1.json", "a_1.wav"]
    note = sidecar("out/a_1.json")
    assert [(s["start"], s["description"]) for s in note["sections"]] == [(0, "a"), (0.5, "b loud")]
    assert note["crossfade"] == 0.1
    assert run("a", "--stream", "--duration", "1.2", "--seed", "1", "-o", "plain")[0] == 0
    story, plain = (np.frombuffer(pcm(f"{folder}/a_1.wav"), np.int16) for folder in ("out", "plain"))
    assert (story[: int(0.38 * RATE)] == plain[: int(0.38 * RATE)]).all() and (story != plain).any()
    Path("story.json").write_text('[{"start": 0, "description": "a"}, {"start": 0.5, "description": "b loud"}]')
    assert run("--sections", "story.json", "--duration", "1.2", "--seed", "1", "--crossfade", "0.1", "-o", "j")[0] == 0
    assert pcm("j/a_1.wav") == story.tobytes()


@pytest.mark.parametrize(
    ("content", "options", "code", "message"),
    [
        ("0 a\nthen drums\n", (), 1, "line 2: expected a time and a description"),
        ("1 a\n", (), 1, "must start at 0"),
        ("0 a\n5 b\n", (), 1, "beyond the duration"),
        ("0 a\n0 b\n", (), 1, "out of order"),
        ("0 a\n", ("x",), 2, "--sections holds the prompts"),
        ("[1]", (), 1, "no JSON list of sections"),
        ("", (), 1, "sections is empty"),
        (None, (), 1, "No such file"),
    ],
)
def test_section_files_that_cannot_be_used(run: Runner, content, options, code, message) -> None:
    if content is not None:
        Path("story.txt").write_text(content)
    found, _, err = run(*options, "--sections", "story.txt", "--duration", "2")
    assert found == code and message in err and not Path("out").exists()


def test_a_stream_never_replaces_a_file_unasked(run: Runner, monkeypatch) -> None:
    for _ in range(2):
        assert run("a", "--seed", "1", "--stream", "--no-sidecar")[0] == 0
    assert names() == ["a_1.wav", "a_1_2.wav"]
    monkeypatch.setattr(cli_stream, "WAV_LIMIT", 20_000)
    code, _, err = run("a", "--seed", "2", "--stream", "--duration", "1")
    assert code == 1 and "holds 4 GiB" in err and soundfile.info("out/a_2.wav").frames > 0


def test_negative_prompts_without_guidance_are_refused(run: Runner, models: Path) -> None:
    code, _, err = run("a", "--negative-prompt", "b", "--cfg-coef", "1")
    assert code == 1 and "needs guidance" in err
    assert MusicGen.get_pretrained(models / "text").max_duration == 1.0

"""examples/demo.py, run as `make demo` runs it, but short: the files, the sidecars, and that it says what it plays."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from musicgen_fast.audio import audio_read, loudness

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo.py"
RATE = 32000
SECONDS = 0.2


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder and what was printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(
        [sys.executable, str(DEMO), "-o", str(out), "--duration", str(SECONDS)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_it_says_that_it_makes_noise(demo: tuple[Path, str]) -> None:
    out, printed = demo
    says = "The weights are random, so the sound is noise"
    assert says in printed.splitlines()[1] and says in printed.splitlines()[-1]
    notes = [json.loads(path.read_text())["note"] for path in out.glob("*.json")]
    assert len(notes) >= 4 and all(note.startswith(says) for note in notes)


@pytest.mark.parametrize(("name", "seconds"), [("text-0", 0.2), ("text-1", 0.2), ("text-2", 0.2), ("long", 8.0)])
def test_pieces(demo: tuple[Path, str], name: str, seconds: float) -> None:
    out, printed = demo
    assert soundfile.info(out / f"{name}.wav").frames == seconds * RATE
    note = json.loads((out / f"{name}.json").read_text())
    assert note["parameters"]["duration"] == seconds and note["window"] == 5.0 and note["recording"] is None
    assert note["model"] == str(out / "random-model") and note["times_real_time"] > 0
    assert f"{out / name}.wav  {seconds:.2f} s in " in printed
    with soundfile.SoundFile(out / f"{name}.wav") as file:
        assert file.title == note["prompt"] and "noise" in file.comment


def test_continuation_of_a_recording(demo: tuple[Path, str]) -> None:
    out, printed = demo
    if importlib.util.find_spec("immich_memories_music") is None:
        assert "left out: the recordings are not installed (pip install immich-memories-music" in printed
        pytest.skip("immich-memories-music is not installed: the demo had nothing to continue, and said so")
    note = json.loads((out / "continuation.json").read_text())
    assert note["recording"]["seconds"] == 5.0 and note["recording"]["file"].endswith(".opus")
    assert soundfile.info(out / "continuation.wav").frames == round((5 + SECONDS) * RATE)
    assert "left out" not in printed


def test_without_the_recordings_it_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, p=None: None if "immich" in n else find_spec(n, p))
    monkeypatch.setattr(sys, "argv", ["demo.py", "-o", str(tmp_path)])
    made = []
    monkeypatch.setattr(module, "make_piece", lambda model, path, *rest: made.append(path.name))
    module.main()
    assert made == ["text-0", "text-1", "text-2", "long"]
    assert "recordings are not installed (pip install immich-memories-music==0.1.0" in capsys.readouterr().out


def test_nobodys_ears_are_hurt(demo: tuple[Path, str]) -> None:
    wav, rate = audio_read(demo[0] / "long.wav")
    assert loudness(wav, rate) < -19 and wav.abs().max() < 1

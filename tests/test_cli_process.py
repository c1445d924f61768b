"""The command line in processes of its own: start-up, Ctrl-C, pipes that close."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import soundfile

from musicgen_fast.checkpoints.write import write_transformers_folder
from musicgen_fast.cli import main

from . import checkpoint_writers as writers

RATE = 32000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return str(write_transformers_folder(folder, checkpoint=writers.tiny("text", max_duration=1.0)))


def command(*argv: str, **options: Any) -> subprocess.Popen[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    # a test run started in the background hands down an ignored SIGINT
    reset = (lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None
    return subprocess.Popen([sys.executable, "-m", "musicgen_fast", *argv], preexec_fn=reset, **options)


def test_help_and_version_need_no_torch() -> None:
    code = "import sys; from musicgen_fast.cli import main\ntry: main({!r})\nfinally: print('torch' in sys.modules)"
    for argv in (["--help"], ["generate", "--help"], ["--version"], ["generate", "--nope"], []):
        done = subprocess.run([sys.executable, "-c", code.format(argv)], capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "False" and done.returncode == (
            2 if argv in ([], ["generate", "--nope"]) else 0
        )
        if "--help" in argv:
            for line in ("0    done", "1    failed", "2    a mistake on the command line", "130  interrupted"):
                assert line in done.stdout
    (script,) = entry_points(group="console_scripts", name="musicgen-fast")
    assert script.load() is main


def test_ctrl_c(model: str, tmp_path: Path) -> None:
    argv = ("generate", "-", "-m", model, "--duration", "1", "-o", str(tmp_path / "out"))
    with command(*argv, stdin=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("\n".join(["drum"] * 2000))
        process.stdin.close()
        process.stdout.readline()  # one file is done, the next is being made
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(timeout=60) == 130, err
    wavs = sorted((tmp_path / "out").glob("*.wav"))
    told = int(err.partition("interrupted: ")[2].split()[0])
    assert f"interrupted: {told} of 2000 files written" in err and "Traceback" not in err
    assert 1 <= told <= len(wavs) <= told + 1 < 2000  # Ctrl-C may fall between a file and its count
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".wav", ".json"}, "nothing half-written"
    assert {soundfile.info(p).frames for p in wavs} == {RATE}


def test_a_reader_that_leaves(model: str, tmp_path: Path) -> None:
    argv = ("generate", "a", "b", "-m", model, "--duration", "0.2", "-o", str(tmp_path / "out"))
    with command(*argv) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert "Traceback" not in err and "BrokenPipe" not in err and "Exception ignored" not in err

"""Running the command line in process on tiny models, for the tests of it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from musicgen_fast.checkpoints.write import write_transformers_folder
from musicgen_fast.cli import main

from . import checkpoint_writers as writers

RATE = 32000


def write_models(root: Path) -> Path:
    """Folders 'text' and 'melody' in `root`: tiny models with a window of 1 s."""
    for kind in ("text", "melody"):
        write_transformers_folder(root / kind, checkpoint=writers.tiny(kind, max_duration=1.0))
    return root


class Runner:
    """run(*argv) is `musicgen-fast generate *argv` in tmp_path, 0.2 s long and on the text model unless told."""

    def __init__(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.models, self.monkeypatch, self.capsys = models, monkeypatch, capsys
        monkeypatch.chdir(tmp_path)

    def __call__(self, *argv: str, stdin: str = "", model: str = "text") -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = main(["generate", "-m", str(self.models / model), "--duration", "0.2", *argv])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return code, *self.capsys.readouterr()


def sidecar(pattern: str = "out/*.json") -> dict[str, Any]:
    """The one sidecar of that name."""
    (found,) = Path().glob(pattern)
    loaded: dict[str, Any] = json.loads(found.read_text())
    return loaded


def names(folder: str = "out") -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def pcm(path: str | Path) -> bytes:
    """The samples of a file as 16-bit PCM."""
    samples: bytes = soundfile.read(path, dtype="int16", always_2d=True)[0].tobytes()
    return samples


def write_noise(path: str, seconds: float, rate: int = 16000) -> np.ndarray:
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * rate)).astype(np.float32)
    soundfile.write(path, wav, rate, subtype="FLOAT")
    return wav

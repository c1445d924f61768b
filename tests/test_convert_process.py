"""`musicgen-fast convert` under pressure: memory, Ctrl-C, full disks, inputs and outputs that are not there."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from musicgen_fast.checkpoints import convert as module
from musicgen_fast.checkpoints import load_checkpoint
from musicgen_fast.checkpoints.convert import convert
from musicgen_fast.checkpoints.random_weights import random_checkpoint
from musicgen_fast.cli import main
from musicgen_fast.config import CodecConfig, ModelConfig, TextConfig

from .checkpoint_writers import assert_same, tiny, write_audiocraft, write_transformers
from .test_cli_process import command

MB = 1 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """200 MB in float16, the largest tensor 8.4 MB (16.8 MB in float32)."""
    folder = tmp_path_factory.mktemp("large")
    config = ModelConfig(dim=1024, num_layers=6, num_heads=16, ffn_dim=4096, text=TextConfig(dim=24))
    codec = CodecConfig(num_filters=4, dimension=16, lstm_layers=1)
    checkpoint = random_checkpoint(config, dtype=torch.float16, codec_config=codec)
    yield write_transformers(folder / "model", checkpoint)
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of anonymous memory")
@pytest.mark.parametrize("layout", ["transformers", "audiocraft"])
def test_memory(large: Path, tmp_path: Path, layout: str) -> None:
    """Below 300 MB and 1.3 times the largest tensor, Python and torch included; 400 MB of weights are written."""
    code = f"""
        import sys, threading, time, torch
        from musicgen_fast.checkpoints.convert import convert
        def anonymous():
            lines = open("/proc/self/smaps_rollup").read().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])
        before, peak, over, calls = anonymous(), [0], threading.Event(), [0]
        def look(*_):
            peak[0] = max(peak[0], anonymous())
        def watch():
            while not over.wait(0.05):
                look()
        def progress(done, total):
            calls[0] += 1
            if calls[0] % 16 == 0:  # a look takes 5 ms
                look()
        thread = threading.Thread(target=watch)
        thread.start()
        convert({str(large)!r}, {str(tmp_path / "out")!r}, {layout!r}, precision=torch.float32, progress=progress)
        over.set()
        print(before, peak[0])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split())
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    shutil.rmtree(tmp_path / "out")
    assert size > 400e6
    assert peak < 1.3 * 16.8e6 + 300 * MB
    assert peak - before < 1.3 * 16.8e6 + 60 * MB, "the conversion itself"


def test_ctrl_c(large: Path, tmp_path: Path) -> None:
    """In the middle of writing: exit code 130, and neither a result nor a temporary folder."""
    with command("convert", str(large), str(tmp_path / "out"), "--to", "audiocraft") as process:
        assert process.stderr
        while not any(path.stat().st_size > 20e6 for path in tmp_path.rglob("state_dict.bin")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(timeout=60) == 130, err
    assert err == "musicgen-fast: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_stop_at_any_place_leaves_what_was_there(tmp_path: Path, overwrite: bool) -> None:
    source = write_transformers(tmp_path / "t", tiny("text", seed=1))
    if overwrite:
        write_transformers(tmp_path / "out", tiny("text", seed=2))
    calls = [0]

    def count(done: int, total: int) -> None:
        calls[0] += 1

    convert(source, tmp_path / "whole", "audiocraft", progress=count)
    shutil.rmtree(tmp_path / "whole")
    before = {path.name for path in tmp_path.iterdir()}
    for stop in range(1, calls[0], calls[0] // 7):
        calls[0] = 0

        def interrupt(done: int, total: int, stop: int = stop) -> None:
            calls[0] += 1
            if calls[0] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", "audiocraft", overwrite=overwrite, progress=interrupt)
        assert {path.name for path in tmp_path.iterdir()} == before
    if overwrite:
        assert_same(load_checkpoint(tmp_path / "out").lm, tiny("text", seed=2).lm)


def test_a_failed_move_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_transformers(tmp_path / "t", tiny("text", seed=1))
    write_transformers(tmp_path / "out", tiny("text", seed=2))
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "result":
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(PermissionError):
        convert(source, tmp_path / "out", "audiocraft", overwrite=True)
    assert_same(load_checkpoint(tmp_path / "out").lm, tiny("text", seed=2).lm)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "t"]


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a conversion that fails."""
    assert main(["convert", *argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("musicgen-fast: error: ") and err.count("\n") == 1
    return err


def test_inputs_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert "neither an existing folder nor" in fails(capsys, str(tmp_path / "nothing"), out, "--to", "audiocraft")
    (tmp_path / "empty").mkdir()
    assert "has no config.json or state_dict.bin" in fails(capsys, str(tmp_path / "empty"), out, "--to", "audiocraft")
    folder = write_audiocraft(tmp_path / "a", tiny("text"), text=False)
    assert "needs the text encoder 't5-base'" in fails(capsys, str(folder), out, "--to", "transformers")
    (folder / "compression_state_dict.bin").unlink()
    assert "compression_state_dict.bin" in fails(capsys, str(folder), out, "--to", "audiocraft")
    broken = write_transformers(tmp_path / "t", tiny("text"))
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(50_000)
    assert "truncated or damaged" in fails(capsys, str(broken), out, "--to", "audiocraft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty", "t"]


def test_outputs_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_transformers(tmp_path / "t", tiny("text")))
    (tmp_path / "file").write_text("")
    assert "file: " in fails(capsys, source, str(tmp_path / "file/out"), "--to", "audiocraft")
    if Path("/proc/self").exists():  # not even root makes folders there
        assert "/proc/" in fails(capsys, source, "/proc/nowhere/out", "--to", "audiocraft")
    with pytest.raises(SystemExit, match="2"):
        main(["convert", source, str(tmp_path / "out"), "--to", "onnx"])


@pytest.mark.parametrize("layout", ["transformers", "audiocraft"])
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, layout: str) -> None:
    """As it begins, and in the middle of a file."""
    source, out = str(write_transformers(tmp_path / "t", tiny("text"))), str(tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert f"{out}: the disk has 0.00 GB left" in fails(capsys, source, out, "--to", layout)

    def full(entry: object, file: object, progress: object) -> None:
        if "norm2" in entry.name or "final_layer_norm" in entry.name:  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(entry, file, progress)  # type: ignore[arg-type]

    from musicgen_fast.checkpoints import entries

    copy = entries._copy
    monkeypatch.setattr(entries, "_copy", full)
    assert fails(capsys, source, out, "--to", layout) == f"musicgen-fast: error: {out}: No space left on device\n"
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_disk_that_returns_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    source = str(write_transformers(tmp_path / "t", tiny("text")))
    writer = module.write_safetensors

    def flips(path: Path, *rest: object) -> None:
        writer(path, *rest)  # type: ignore[arg-type]
        with open(path, "r+b") as file:
            file.seek(-100, 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(module, "write_safetensors", flips)
    assert "reads back differently" in fails(capsys, source, str(tmp_path / "out"), "--to", "transformers")
    assert not (tmp_path / "out").exists()

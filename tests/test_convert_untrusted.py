"""A training checkpoint.th: refused unless trusted, and then read where it can reach nothing."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from musicgen_fast.checkpoints import load_checkpoint
from musicgen_fast.cli import main

from .checkpoint_configs import xp_cfg
from .checkpoint_writers import assert_same, audiocraft_state, tiny, write_audiocraft

omegaconf = pytest.importorskip("omegaconf", reason="omegaconf makes the objects that such a checkpoint holds")
FILTERED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


class Code:
    """Runs when it is unpickled."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (textwrap.dedent(self.code), {})


def write_training(folder: Path, kind: str = "text", **more: Any) -> Path:
    """What audiocraft's solver saves, its codec and T5 beside."""
    checkpoint = tiny(kind, seed=6)
    write_audiocraft(folder, checkpoint)
    (folder / "state_dict.bin").unlink()
    package = {
        "best_state": {"model": audiocraft_state(checkpoint)},
        "fsdp_best_state": {},
        "model": {"emb.0.weight": torch.zeros(1)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "history": [{"train": {"loss": 1.0}}],
        "xp.cfg": omegaconf.OmegaConf.create(xp_cfg(checkpoint)),
        "xp.sig": "abc",
        **more,
    }
    torch.save(package, folder / "checkpoint.th")
    return folder


@pytest.mark.parametrize("kind", ["text", "style"])
def test_only_with_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    ran, out = tmp_path / "ran", str(tmp_path / "out")
    folder = write_training(tmp_path / "run", kind, evil=Code(f"open({str(ran)!r}, 'w')"))
    for name in (folder, folder / "checkpoint.th"):
        assert main(["convert", str(name), out, "--to", "audiocraft"]) == 1
        err = capsys.readouterr().err
        assert "is a training checkpoint" in err and "--trust-pickle" in err and err.count("\n") == 1
    assert main(["info", str(folder)]) == 1 and main(["generate", "-m", str(folder), "drum"]) == 1
    assert not ran.exists()
    capsys.readouterr()
    assert main(["convert", str(folder / "checkpoint.th"), out, "--to", "audiocraft", "--trust-pickle"]) == 0
    err = capsys.readouterr().err
    assert ran.exists()
    assert "WARNING: --trust-pickle reads a pickle, which can run any code" in err
    assert "reading the pickle in a process of its own: " in err
    loaded = load_checkpoint(out)
    assert_same(loaded.lm, tiny(kind, seed=6).lm)
    saved = torch.load(tmp_path / "out/state_dict.bin", weights_only=True)["xp.cfg"]
    assert yaml.safe_load(saved) == xp_cfg(tiny(kind, seed=6)), "interpolations and all"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "ran", "run"]


def test_what_a_checkpoint_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It tries to call home, to start programs, to signal us and to read our environment."""
    seen = tmp_path / "seen"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        code = f"""
            import os, socket, _socket, subprocess
            def attempt(act):
                try:
                    act()
                except BaseException as error:
                    return type(error).__name__
                return "done"
            acts = [
                lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]})),
                lambda: _socket.socket(),
                lambda: _socket.socketpair(),
                lambda: os.system("true"),
                lambda: subprocess.run(["true"]),
                lambda: os.fork(),
                lambda: os.kill(os.getppid(), 0),
                lambda: os.environ["HF_TOKEN"],
            ]
            open({str(seen)!r}, "w").write(" ".join(map(attempt, acts)))
        """
        folder = write_training(tmp_path / "run", evil=Code(code))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_TOKEN", "secret")
            argv = ["convert", str(folder), str(tmp_path / "out"), "--to", "transformers", "--trust-pickle"]
            assert main(argv) == 0
        with pytest.raises(TimeoutError):
            server.accept()
    refused = seen.read_text().split()
    assert refused[:6] == ["PermissionError"] * 6 and refused[7] == "KeyError"
    if FILTERED:
        assert refused[6] == "PermissionError"
        assert "the kernel refuses it sockets, new processes and signals" in capsys.readouterr().err


@pytest.mark.skipif(not FILTERED, reason="the filter of system calls is for Linux on x86-64 and arm64")
def test_the_kernel_holds_without_pythons_help() -> None:
    """The filter alone, for a thread that was there before too: nothing of Python stands in the way."""
    code = """
        import errno, os, socket, subprocess, threading
        from musicgen_fast.checkpoints import untrusted
        go, told = threading.Event(), []
        def attempt(act):
            try:
                act()
            except OSError as error:
                return error.errno == errno.EPERM
            return False
        acts = [socket.socket, socket.socketpair, os.fork, lambda: os.execv("/bin/true", ["true"]),
                lambda: subprocess.run(["/bin/true"]), lambda: os.kill(os.getppid(), 0)]
        thread = threading.Thread(target=lambda: (go.wait(), told.extend(map(attempt, acts))))
        thread.start()
        assert untrusted._filter_system_calls()
        go.set()
        thread.join()
        assert told == [True] * 6 and all(map(attempt, acts)), told
        print(open("/proc/self/status").read().split("Seccomp:")[1].split()[0])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("2", "")


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ({"best_state": {}, "model": {}}, "no best_state or model in it"),
        ({"evil": Code("raise OSError('surprise')")}, "OSError: surprise"),
        ({"evil": Code("import os; os._exit(7)")}, "it ended with 7"),
        ({"xp.cfg": {"transformer_lm": 3}}, "transformer_lm is 3, expected a mapping"),
        ({"best_state": {"model": {"emb.0.weight": torch.zeros(2, 2)}}}, "the checkpoint is incomplete"),
    ],
)
def test_broken_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str], package: dict[str, Any], said: str) -> None:
    folder = write_training(tmp_path / "run", **package)
    argv = ["convert", str(folder), str(tmp_path / "out"), "--to", "transformers", "--trust-pickle"]
    assert main(argv) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_classes_that_are_not_installed(tmp_path: Path) -> None:
    """Metrics, schedulers and other objects of the training code are of no interest, and need not be importable."""
    import types

    gone = types.ModuleType("their_training_code")
    exec("class Metric:\n    def __init__(self):\n        self.best = 0.5\n", gone.__dict__)
    sys.modules["their_training_code"] = gone
    try:
        folder = write_training(tmp_path / "run", metric=gone.Metric())
    finally:
        del sys.modules["their_training_code"]
    argv = ["convert", str(folder), str(tmp_path / "out"), "--to", "transformers", "--trust-pickle", "-q"]
    assert main(argv) == 0
    assert_same(load_checkpoint(tmp_path / "out").lm, tiny("text", seed=6).lm)

"""Options of `musicgen-fast generate`, what it says when they are wrong, and what it shows while it works."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from musicgen_fast import MusicGen
from musicgen_fast.audio_encode import FORMATS
from musicgen_fast.cli import _parse, build_parser
from musicgen_fast.conditioning import COMPAT
from musicgen_fast.config import GenerationParams
from musicgen_fast.loading import PRECISIONS
from musicgen_fast.loudness import STRATEGIES

from .cli_tools import Runner, names, sidecar, write_models, write_noise


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(models, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("name", "spellings", "value", "wanted"),
    [
        ("duration", "--duration --secs --seconds", "3", 3.0),
        ("top_k", "--top-k --topk --top_k", "0", 0),
        ("top_p", "--top-p --topp --top_p", "0.5", 0.5),
        ("temperature", "--temperature --temp", "0.5", 0.5),
        ("cfg_coef", "--cfg-coef --guidance --guidance-scale --cfg --cfg-scale --cfg_coef --guidance_scale", "2", 2.0),
        ("cfg_coef_beta", "--cfg-coef-beta --cfg_coef_beta", "2", 2.0),
        ("more_prompts", "--prompt --text --description", "a_b", ["a_b"]),
        ("variations", "-n --variations --num-variations --num_variations", "2", 2),
        ("continuation", "--continue --continuation", "a_b", "a_b"),
        ("melody", "--melody --style", "a_b", "a_b"),
        ("model", "-m --model", "a_b", "a_b"),
        ("device", "-d --device", "cpu", "cpu"),
        ("output_dir", "-o --output-dir --output_dir", "a_b", "a_b"),
        ("format", "-f --format", "mp3", "mp3"),
        ("seed", "--seed", "5", 5),
    ],
)
def test_spellings(name: str, spellings: str, value: str, wanted: object) -> None:
    parser = build_parser()[1]["generate"]
    for spelling in spellings.split():
        assert getattr(_parse(parser, ["x", spelling, value, "y"]), name) == wanted
        if spelling.startswith("--"):
            args = _parse(parser, ["x", f"{spelling}={value}", "y"])
            assert getattr(args, name) == wanted and args.prompts == ["x", "y"]


def test_flags_and_choices_are_those_of_the_library() -> None:
    parser = build_parser()[1]["generate"]
    args = _parse(parser, ["--no-sampling", "--two_step_cfg", "--no_progress", "--no_sidecar", "--no-separate"])
    assert args.greedy and args.two_step_cfg and args.progress is False and args.no_sidecar and args.no_separate
    args = _parse(parser, [])
    choices = {a.dest: set(a.choices) for a in parser._actions if a.choices}
    assert choices == {
        "precision": set(PRECISIONS),
        "compat": set(COMPAT),
        "format": set(FORMATS),
        "loudness": set(STRATEGIES),
    }
    defaults = GenerationParams(duration=10)
    for name in ("top_k", "top_p", "temperature", "duration", "cfg_coef", "cfg_coef_beta", "two_step_cfg"):
        assert getattr(args, name) == getattr(defaults, name)


def test_options_reach_the_model(run: Runner, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    load = MusicGen.get_pretrained

    def get_pretrained(name, device=None, **options):
        seen.update(options, name=name, device=str(device))
        return load(models / "text", precision=options["precision"])

    monkeypatch.setattr(MusicGen, "get_pretrained", staticmethod(get_pretrained))
    loading = "-m small -d cpu --precision bfloat16 --revision r --cache-dir c --text-encoder t --style-encoder s"
    loading += " --base b --adapter a --adapter-scale 0.5"
    sampling = "--top-p 0.8 --top-k 3 --cfg 1.5 --cfg-coef-beta 2 --two-step-cfg --temp 0.7 --extend-stride 0.5"
    assert run("drum", *loading.split(), *sampling.split(), "--compat", "audiocraft")[0] == 0
    assert seen == {
        "name": "facebook/musicgen-small",
        "device": "cpu",
        "precision": "bfloat16",
        "revision": "r",
        "cache_dir": "c",
        "text_encoder": "t",
        "style_encoder": "s",
        "base": "b",
        "adapter": "a",
        "adapter_scale": 0.5,
    }
    note = sidecar()
    assert note["parameters"] == {
        "use_sampling": True,
        "top_k": 3,
        "top_p": 0.8,
        "temperature": 0.7,
        "duration": 0.2,
        "cfg_coef": 1.5,
        "cfg_coef_beta": 2.0,
        "two_step_cfg": True,
        "extend_stride": 0.5,
    }
    assert (note["compat"], note["precision"], note["revision"]) == ("audiocraft", "bfloat16", "r")
    assert (note["model"], note["text_encoder"]) == ("facebook/musicgen-small", "t")
    assert (note["base"], note["adapter"], note["adapter_scale"]) == ("b", "a", 0.5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nope", "1"], "unrecognized arguments: --nope"),
        (["--duration", "long"], "argument --duration/--secs/--seconds: invalid float value: 'long'"),
        (["--duration", "0"], "duration must be above 0"),
        (["--duration", "nan"], "duration must be finite"),
        (["--top-p", "1.5"], "top_p must be at most 1"),
        (["--temperature", "inf"], "temperature must be finite"),
        (["--top-k", "2.5"], "invalid int value: '2.5'"),
        (["--format", "opus"], "invalid choice: 'opus'"),
        (["--loudness", "loud"], "invalid choice: 'loud'"),
        (["--seed", "-2"], "expected 0 to 2**63 - 1, or -1, none or random, got '-2'"),
        (["--seed", str(2**63)], "expected 0 to 2**63 - 1"),
        (["--seed", str(2**63 - 1), "-n", "2"], "leaves no seeds"),
        (["-n", "0"], "expected a whole number above 0, got '0'"),
        (["--batch-size", "-3"], "expected a whole number above 0"),
        (["--overlap", "5", "--extend-stride", "5"], "not allowed with argument"),
        (["--overlap", "0"], "--overlap must be above 0"),
        (["--continue", "a", "--melody", "b"], "not allowed with argument"),
        (["--continue-from", "1"], "need --continue FILE"),
        (["--continue", "a", "--continue-from", "-1"], "--continue-from must be 0 seconds or more"),
        (["--continue", "a", "--continue-seconds", "0"], "--continue-seconds must be above 0"),
        (["--no-separate"], "--no-separate needs --melody"),
        (["--unconditional", "1"], "--unconditional takes neither prompts"),
        (["--dura", "1"], "unrecognized arguments: --dura"),
    ],
)
def test_mistakes_end_with_2_before_anything_happens(
    run: Runner, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.setattr(MusicGen, "get_pretrained", staticmethod(lambda *a, **k: pytest.fail("a model was loaded")))
    code, out, err = run("drum", *argv)
    assert code == 2 and message in err and not out and not Path("out").exists()
    assert err.startswith("usage: musicgen-fast generate")


def test_nothing_to_do_is_a_mistake(run: Runner) -> None:
    assert "give a prompt" in run()[2] and run()[0] == 2
    code, _, err = run("-", stdin="\n  \n")
    assert code == 2 and "no prompt on standard input" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--continue", "missing.wav"], "missing.wav: No such file or directory"),
        (["--continue", "text.txt"], "cannot read text.txt as audio"),
        (["--melody", "empty.wav"], "empty.wav holds no sound"),
        (["--continue", "song.wav"], "--duration 0.2 includes the recording, which has 0.50 s"),
        (["--continue", "song.wav", "--continue-from", "9"], "past the end"),
        (["-o", "text.txt"], "cannot write into the output folder text.txt: File exists"),
        (["-o", "text.txt/sub"], "cannot write into the output folder text.txt/sub: Not a directory"),
        (["-d", "gameboy"], "unknown device 'gameboy'"),
    ],
)
def test_failures_end_with_1_and_one_line_before_the_model(
    run: Runner, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.setattr(MusicGen, "get_pretrained", staticmethod(lambda *a, **k: pytest.fail("a model was loaded")))
    Path("text.txt").write_text("no audio")
    soundfile.write("empty.wav", np.zeros(0), 16000)
    write_noise("song.wav", 0.5)
    code, out, err = run("drum", *argv)
    assert code == 1 and not out
    assert err.startswith("musicgen-fast: error: ") and message in err and err.count("\n") == 1
    code, _, err = run("drum", *argv, "-v")
    assert code == 1 and "Traceback" in err and err.rstrip().splitlines()[-1].startswith("musicgen-fast: error: ")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write into any folder")
def test_a_read_only_folder(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    code, _, err = run("drum", "-o", "locked")
    assert code == 1 and "cannot write into the output folder locked: Permission denied" in err


def test_a_missing_model(run: Runner, tmp_path: Path) -> None:
    code, _, err = run("drum", "--seed", "1", "-m", str(tmp_path / "no-model"))
    assert code == 1 and err.splitlines()[-1].startswith("musicgen-fast: error: ") and "Traceback" not in err
    (tmp_path / "hollow").mkdir()
    code, _, err = run("drum", "-m", "hollow")
    assert code == 1 and "hollow has no config.json or state_dict.bin" in err


# -- what the user sees -----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_for_terminals(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*argv: str, terminal: bool) -> bool:
        stderr = Terminal() if terminal else io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            assert run("drum", "slow", "--seed", "1", *argv)[0] == 0
        return "step" in stderr.getvalue()

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert shown(terminal=True) and not shown(terminal=False)
    assert shown("--progress", terminal=False) and not shown("--no-progress", terminal=True)
    assert not shown("--quiet", terminal=True)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not shown(terminal=True)


def test_the_bar_counts_the_steps_of_all_batches(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from musicgen_fast.cli_generate import Reporter

    counts = []
    step = Reporter.step

    def spied(self: Reporter, done: int, total: int) -> None:
        step(self, done, total)
        counts.append((self.bar.n, self.bar.total))

    monkeypatch.setattr(Reporter, "step", spied)
    assert run("a", "b", "--progress")[0] == 0
    steps = 10 + 3  # 0.2 s of frames, and the delays
    assert counts == [(n, 2 * steps) for n in range(1, 2 * steps + 1)]


def test_quiet(run: Runner) -> None:
    assert run("drum", "-q") == (0, "", "")
    assert len(names()) == 2

"""`musicgen-fast generate`: files, names, sidecars, levels, prompts, seeds, windows, recordings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import musicgen_fast
from musicgen_fast import native
from musicgen_fast.cli import main
from musicgen_fast.cli_output import pcm16, safe_name, set_level
from musicgen_fast.config import GenerationParams

from .cli_tools import RATE, Runner, names, pcm, sidecar, write_models, write_noise


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(models, tmp_path, monkeypatch, capsys)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_a_sidecar_and_a_line(run: Runner, models: Path) -> None:
    code, out, err = run("a Fast drum, é!", "--seed", "7", "--top-k", "5", "--temp", "0.9")
    assert code == 0
    assert names() == ["a-Fast-drum-e_7.json", "a-Fast-drum-e_7.wav"]
    path = Path("out/a-Fast-drum-e_7.wav")
    assert out.startswith(f"{path}  0.20 s  seed 7  ") and out.endswith("x real time\n") and out.count("\n") == 1
    note = sidecar()
    assert (note["prompt"], note["seed"], note["index"], note["variation"]) == ("a Fast drum, é!", 7, 0, 0)
    assert set(note["parameters"]) == {f.name for f in fields(GenerationParams)}
    assert (
        note["parameters"] | {"top_k": 5, "temperature": 0.9, "duration": 0.2, "extend_stride": 0.6}
        == (note["parameters"])
    )
    precision = "int8" if native.available() else "float32"
    assert (note["model"], note["device"], note["precision"]) == (str(models / "text"), "cpu", precision)
    assert (note["compat"], note["window"], note["recording"], note["batch"]) == ("isolated", 1.0, None, 1)
    assert (note["duration"], note["sample_rate"], note["frames"], note["channels"]) == (0.2, RATE, RATE // 5, 1)
    assert note["sha256"] == hashlib.sha256(pcm(path)).hexdigest()
    assert note["versions"] == {"musicgen_fast": musicgen_fast.__version__, "torch": torch.__version__}
    assert note["times_real_time"] * note["real_time_factor"] == pytest.approx(1)
    assert note["seconds_taken"] == pytest.approx(note["real_time_factor"] * 0.2)
    assert note["date"].endswith("+00:00")
    with soundfile.SoundFile(path) as file:
        assert file.title == "a Fast drum, é!" and json.loads(file.comment)["seed"] == 7
        assert file.software.startswith("musicgen_fast ")
    assert "drawn" not in err


@pytest.mark.parametrize("format", ["flac", "ogg", "mp3"])
def test_formats_have_the_same_samples(run: Runner, format: str) -> None:
    assert run("drum", "--seed", "1", "-o", "wav")[0] == 0
    assert run("drum", "--seed", "1", "-f", format)[0] == 0
    path = Path(f"out/drum_1.{format}")
    info = soundfile.info(path)
    assert info.format == format.upper() and info.samplerate == RATE and info.duration >= 0.2
    assert sidecar()["sha256"] == sidecar("wav/*.json")["sha256"]
    assert (format == "flac") == (pcm(path) == pcm("wav/drum_1.wav"))  # flac is the only other lossless one
    assert sidecar()["format"] == format and sidecar()["file"] == path.name


def test_nothing_is_overwritten_unless_asked(run: Runner) -> None:
    Path("out").mkdir()
    Path("out/drum_1.wav").write_text("mine")
    for _ in range(2):
        assert run("drum", "--seed", "1")[0] == 0
    assert [n for n in names() if n.endswith("wav")] == ["drum_1.wav", "drum_1_2.wav", "drum_1_3.wav"]
    assert Path("out/drum_1.wav").read_text() == "mine"
    assert run("drum", "--seed", "1", "-f", "flac")[0] == 0
    assert "drum_1_4.flac" in names(), "the JSON would seem to belong to a wav"
    assert run("drum", "--seed", "1", "--overwrite")[0] == 0
    assert pcm("out/drum_1.wav") == pcm("out/drum_1_2.wav")
    assert run("Drum", "drum", "--filename", "{prompt}", "--overwrite", "-o", "new")[0] == 0
    assert [n for n in names("new") if n.endswith("wav")] == ["Drum.wav", "drum_2.wav"], "one file on some systems"


def test_no_sidecar(run: Runner) -> None:
    assert run("drum", "--seed", "1", "--no-sidecar")[0] == 0
    assert names() == ["drum_1.wav"]


def test_templates(run: Runner, models: Path) -> None:
    argv = ("x/../y", "日本", "--seed", "3", "-n", "2", "--no-sidecar")
    assert run(*argv, "--filename", "{model}/{index:03d}-{variation} {prompt}.wav")[0] == 0
    kanji = "prompt-" + hashlib.sha256("日本".encode()).hexdigest()[:8]
    assert names() == [
        f"text/{index:03d}-{variation} {prompt}.wav"
        for index, prompt in enumerate(("x-..-y", kanji))
        for variation in (0, 1)
    ]


@pytest.mark.parametrize(
    "template",
    ["{nope}", "{prompt.__class__}", "{prompt[0]}", "{}", "{", "", "/abs", "../up", "a/../b", "a//b", "a/", ".hidden",
     "c:x", "a\\b", "a\0", "{prompt}?", "con", "sub/aux.wav", "{seed:z}", "{prompt:d}", "x" * 201, "dot."],
)  # fmt: skip
def test_bad_templates_are_refused(template: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "drum", f"--filename={template}"])
    assert stop.value.code == 2
    assert "argument --filename: " in capsys.readouterr().err


def test_names_stay_inside_the_output_folder(run: Runner) -> None:
    Path("out").mkdir()
    Path("elsewhere").mkdir()
    Path("out/sub").symlink_to(Path("elsewhere").resolve())
    code, _, err = run("drum", "--filename", "sub/{prompt}")
    assert code == 1 and "outside of out" in err and not list(Path("elsewhere").iterdir())
    assert safe_name("../../etc/passwd") == "etc-passwd" and safe_name("...").startswith("prompt-")
    assert safe_name("aux") == "aux-" and safe_name(None) == "unconditional"
    long = safe_name("word " * 100)
    assert len(long) <= 60 and long.endswith("word") and len(safe_name("x" * 500)) == 60


@pytest.mark.parametrize(("strategy", "peak"), [("peak", 10 ** (-1 / 20)), ("clip", 10 ** (-1 / 20)), ("none", 1.0)])
def test_levels(strategy: str, peak: float) -> None:
    wav = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))  # far beyond full scale
    assert set_level(wav, RATE, strategy).abs().max().item() == pytest.approx(peak)
    quiet = set_level(wav * 1e-3, RATE, strategy)
    assert torch.equal(quiet, wav * 1e-3) == (strategy != "peak")


def test_loudness_is_the_default_level(run: Runner) -> None:
    from musicgen_fast.audio import audio_read, loudness

    assert run("drum", "--seed", "1", "--duration", "1")[0] == 0
    assert loudness(*audio_read("out/drum_1.wav")) == pytest.approx(-14, abs=1)  # bent peaks cost a little
    assert sidecar()["loudness"] == "loudness"


def test_pcm16_is_what_wav_files_hold() -> None:
    wav = torch.tensor([[1.0, -1.0, 0.5 / 32768, 1.5 / 32768], [0.0, 0.25, -0.25, 2.0]])
    assert np.frombuffer(pcm16(wav), "<i2").reshape(-1, 2).T.tolist() == [
        [32767, -32768, 0, 2],
        [0, 8192, -8192, 32767],
    ]


# -- prompts and seeds ------------------------------------------------------------------------------------------------


def seeds_and_prompts() -> list[tuple[int, str]]:
    notes = [json.loads(p.read_text()) for p in Path("out").glob("*.json")]
    return sorted((n["seed"], n["prompt"]) for n in notes)


def test_prompts_from_everywhere(run: Runner) -> None:
    code, out, _ = run("a", "--text", "d", "-", "--seed", "0", "b", "--", "-c", stdin="\ufeffs1\n\n  \n s2 \r\n")
    assert code == 0 and out.count("\n") == 6
    assert seeds_and_prompts() == [(0, "a"), (1, "s1"), (2, "s2"), (3, "b"), (4, "-c"), (5, "d")]


def test_variations_have_seeds_of_their_own(run: Runner) -> None:
    assert run("a", "b", "-n", "3", "--seed", "10", "--batch_size", "4")[0] == 0
    assert seeds_and_prompts() == [(10 + i, prompt) for i, prompt in enumerate("aaabbb")]
    assert len({pcm(p) for p in Path("out").glob("*.wav")}) == 6
    assert {json.loads(p.read_text())["batch"] for p in Path("out").glob("*.json")} == {4, 2}


@pytest.mark.parametrize("spelling", [[], ["--seed", "-1"], ["--seed=none"], ["--seed", "Random"]])
def test_a_drawn_seed_is_told_and_repeats(run: Runner, spelling: list[str]) -> None:
    code, out, err = run("drum", *spelling)
    note = sidecar()
    assert code == 0 and f"seed {note['seed']} was drawn" in err and f"seed {note['seed']} " in out
    assert run("drum", "--seed", str(note["seed"]), "-o", "again")[0] == 0
    assert sidecar("again/*.json")["sha256"] == note["sha256"]
    assert pcm(f"again/{note['file']}") == pcm(f"out/{note['file']}")


def test_zero_is_a_seed(run: Runner) -> None:
    hashes = []
    for folder in ("one", "two"):
        _, _, err = run("drum", "--seed", "0", "-o", folder)
        hashes.append(sidecar(f"{folder}/*.json")["sha256"])
        assert "drawn" not in err and sidecar(f"{folder}/*.json")["seed"] == 0
    assert hashes[0] == hashes[1]
    assert run("drum", "--seed", "1")[0] == 0
    assert sidecar()["sha256"] != hashes[0]


def test_a_variation_is_repeated_by_its_own_seed(run: Runner) -> None:
    assert run("a", "b", "-n", "2", "--seed", "4", "--filename", "{index}{variation}")[0] == 0
    assert run("b", "--seed", "7", "-o", "again")[0] == 0
    assert pcm("again/b_7.wav") == pcm("out/11.wav")


def test_unconditional_and_greedy(run: Runner) -> None:
    assert run("--unconditional", "2", "--greedy", "--seed", "1")[0] == 0
    assert [n for n in names() if n.endswith("wav")] == ["unconditional_1.wav", "unconditional_2.wav"]
    assert pcm("out/unconditional_1.wav") == pcm("out/unconditional_2.wav"), "greedy: the seed has no effect"
    note = sidecar("out/unconditional_1.json")
    assert note["prompt"] is None and note["parameters"]["use_sampling"] is False


# -- windows and recordings -------------------------------------------------------------------------------------------


def test_overlap_is_window_minus_stride(run: Runner) -> None:
    argv = ("drum", "--duration", "1.5", "--seed", "1")
    assert run(*argv, "--overlap", "0.3", "-o", "a")[0] == 0
    assert run(*argv, "--extend_stride=0.7", "-o", "b")[0] == 0
    assert run(*argv, "-o", "c")[0] == 0
    a, b, c = (sidecar(f"{folder}/*.json") for folder in "abc")
    assert a["parameters"]["extend_stride"] == pytest.approx(0.7) and a["duration"] == 1.5
    assert a["sha256"] == b["sha256"] != c["sha256"] and c["parameters"]["extend_stride"] == 0.6
    code, _, err = run(*argv, "--overlap", "1")
    assert code == 1 and "--overlap 1 must be below the model's window of 1 s" in err


def test_continuation_from_a_part_of_a_recording(run: Runner) -> None:
    wav = write_noise("song.wav", 1.0)
    soundfile.write("part.wav", wav[4800:8000], 16000, subtype="FLOAT")
    argv = ("drum", "--duration", "0.5", "--seed", "1")
    assert run(*argv, "--continue", "song.wav", "--continue-from", "0.3", "--continue_seconds", "0.2")[0] == 0
    assert run(*argv, "--continuation", "part.wav", "-o", "b")[0] == 0
    note = sidecar()
    assert note["recording"] == {"use": "continuation", "file": "song.wav", "from": 0.3, "seconds": 0.2}
    assert note["duration"] == 0.5
    assert note["sha256"] == sidecar("b/*.json")["sha256"]
    assert note["seconds_taken"] == pytest.approx(note["real_time_factor"] * 0.3), "what was given counts for nothing"
    assert (
        run("--continue", "part.wav", "--duration", "0.5", "--seed", "1", "-n", "2", "--batch-size", "2", "-o", "c")[0]
        == 0
    )
    assert len(list(Path("c").glob("unconditional_*.wav"))) == 2


def test_melody(run: Runner) -> None:
    write_noise("tune.wav", 0.5)
    soundfile.write("tone.wav", np.sin(np.arange(16000) * 0.17).astype(np.float32), 16000)
    hashes = []
    for file in ("tune.wav", "tone.wav"):
        argv = ("drum", "--melody", file, "--no-separate", "--seed", "1", "-o", file[:4])
        assert run(*argv, model="melody")[0] == 0
        note = sidecar(f"{file[:4]}/*.json")
        assert note["recording"]["use"] == "melody" and note["recording"]["separate"] is False
        hashes.append(note["sha256"])
    assert hashes[0] != hashes[1]
    code, _, err = run("drum", "--melody", "tune.wav")
    assert code == 1 and "takes no melody" in err

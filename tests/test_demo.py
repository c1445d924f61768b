"""examples/demo.py, run as `make demo` runs it, but short and on random weights: files, sidecars, levels, errors.

And the page that it writes (examples/demo_page.py): well-formed, every link there, nothing unescaped, and pictures that
show the frequencies and levels that are in the sound.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
import torch

from examples.demo_model.captions import demands
from examples.demo_model.synth import VALUES, Labels, render, song_from
from musicgen_fast.audio import audio_read, loudness
from musicgen_fast.config import GenerationParams

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RATE = 16000
SECONDS = 0.4
PIECES = [f"piece-{i}" for i in range(1, 7)]
NOISE = "The weights are random, so the sound is noise."

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def _examples_on_path() -> Any:
    """As for a script of that folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield


@pytest.fixture(scope="module")
def demo(_examples_on_path: None) -> Any:
    return importlib.import_module("demo")


@pytest.fixture(scope="module")
def pages(_examples_on_path: None) -> Any:
    return importlib.import_module("demo_page")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of a whole run and what was printed; pictures lie in docs/ beside it."""
    root = tmp_path_factory.mktemp("demo")
    argv = ["--model", "random", "-o", str(root / "out"), "--duration", str(SECONDS), "--docs", str(root / "docs")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), *argv],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return root / "out", done.stdout


@pytest.fixture
def run(demo: Any, made: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*argv) in this process: exit code, stdout, stderr. Random model, into tmp_path/out, 0.1 s, if not told."""

    def call(*argv: object) -> tuple[int, str, str]:
        texts = [str(a) for a in argv]
        for option, value in (("-o", tmp_path / "out"), ("--model", made[0] / "random-model"), ("--duration", 0.1)):
            if option not in texts:
                texts += [option, str(value)]
        try:
            code = demo.main(texts)
        except SystemExit as stop:  # argparse
            code = int(str(stop.code))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


# -- the run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PIECES, "long", "continuation"])
def test_pieces(demo: Any, made: tuple[Path, str], name: str) -> None:
    out, printed = made
    seconds = {"long": 4.0, "continuation": 1.5 * SECONDS}.get(name, SECONDS)  # the random model's window is 2 s
    assert soundfile.info(out / f"{name}.wav").frames == round(seconds * RATE)
    note = json.loads((out / f"{name}.json").read_text())
    assert note["parameters"]["duration"] == pytest.approx(seconds) and note["window"] == 2.0
    assert note["model"] == str(out / "random-model") and note["times_real_time"] > 0 and note["note"] == NOISE
    assert note["seed"] == [*PIECES, "long", "continuation"].index(name)
    assert note["batch"] == (6 if name in PIECES else 1)
    given = {"file": "piece-1.wav", "seconds": SECONDS / 2} if name == "continuation" else None
    assert note["continues"] == given
    if name in PIECES:
        assert note["prompt"] == demo.PROMPTS[PIECES.index(name)]
    assert f"{out / name}.wav  {seconds:.2f} s  seed {note['seed']}  {note['prompt']!r}" in printed
    with soundfile.SoundFile(out / f"{name}.wav") as file:
        assert file.title == note["prompt"] and file.comment == NOISE


def test_it_says_that_it_makes_noise_and_how_fast(made: tuple[Path, str]) -> None:
    out, printed = made
    lines = printed.splitlines()
    assert NOISE in lines[2] and lines[-1].endswith(NOISE) and f"Listen: {out / 'index.html'}" in lines[-1]
    assert len(re.findall(r"s of new sound in [\d.]+ s: [\d.]+x real time", printed)) == 3
    assert NOISE in Page(out / "index.html").text


def test_same_seed_same_music(run: Run, tmp_path: Path) -> None:
    """A request's seed decides, not its place in the batch: prompt 2 of two is what it is alone under its seed."""
    both, alone = tmp_path / "both.txt", tmp_path / "alone.txt"
    both.write_text("fast drums\n\n  slow bells \n")
    alone.write_text("slow bells\n")
    assert run("--prompts", both, "--seed", 6, "-o", tmp_path / "a")[0] == 0
    assert run("--prompts", alone, "--seed", 7, "-o", tmp_path / "b")[0] == 0
    first, second = (json.loads((tmp_path / n).read_text()) for n in ("a/piece-2.json", "b/piece-1.json"))
    assert first["prompt"] == second["prompt"] == "slow bells" and first["seed"] == second["seed"] == 7
    wavs = [audio_read((tmp_path / n).with_suffix(".wav"))[0] for n in ("a/piece-2", "b/piece-1")]
    one, other = (wav / wav.abs().max() for wav in wavs)  # each batch has its own gain
    assert torch.allclose(one, other, atol=1e-3)
    assert not (tmp_path / "a" / "piece-3.wav").exists()


def test_the_trained_model_where_there_is_one(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Loaded:
        def __init__(self, name: object) -> None:
            self.name, self.device = name, "cpu"

    monkeypatch.setattr(demo.MusicGen, "get_pretrained", Loaded)
    monkeypatch.setattr(demo, "has_demo_model", lambda: True)
    model, note = demo.load(None, tmp_path)
    assert model.name == "demo" and note == "" and "noise" not in capsys.readouterr().out
    monkeypatch.setattr(demo, "has_demo_model", lambda: False)
    model, note = demo.load(None, tmp_path)
    assert Path(model.name, "model.safetensors").is_file() and note.startswith(NOISE) and "not part of this" in note
    model, note = demo.load("owner/model", tmp_path)
    assert model.name == "owner/model" and note == ""


def test_prompts_are_the_models_words_and_contrast(demo: Any) -> None:
    asked = [demands(prompt) for prompt in demo.PROMPTS]
    for wanted in asked:
        assert {name: len(values) for name, values in wanted.items()} == dict.fromkeys(VALUES, 1)
    for name, values in VALUES.items():
        assert frozenset.union(*(wanted[name] for wanted in asked)) == set(values)
    assert all(asked[0][name] != asked[1][name] for name in VALUES)


# -- levels -----------------------------------------------------------------------------------------------------------


class Player:
    """In the place of a model: plays what it was given."""

    name, device, sample_rate, max_duration = "player", torch.device("cpu"), RATE, 2.0

    def __init__(self, *wavs: torch.Tensor) -> None:
        self.wavs = torch.stack(wavs)[:, None]

    def set_generation_params(self, duration: float) -> None:
        pass

    def params(self) -> GenerationParams:
        return GenerationParams(duration=2.0)

    def generate(self, prompts: list[str], progress: bool, seed: list[int]) -> torch.Tensor:
        assert len(prompts) == len(seed) == len(self.wavs)
        return self.wavs


def _song(loud: str) -> torch.Tensor:
    first = {name: values[0] for name, values in VALUES.items()}
    return torch.from_numpy(render(song_from(Labels(**(first | {"drums": "rock", "loudness": loud})), 1), 150))


@pytest.mark.parametrize("times", [0.2, 1.0, 4.0])
def test_soft_stays_soft_and_nothing_clips(demo: Any, tmp_path: Path, times: float) -> None:
    loud, soft = _song("loud") * times, _song("soft") * times
    tour = demo.Tour(Player(loud, soft), tmp_path, "")
    tour.batch(["loud", "soft"], 3.0, 0)
    tour.model = Player(loud * 9)
    tour.long("louder than anything before", 3.0, 0)
    wavs = {p.stem: audio_read(p)[0] for p in tmp_path.glob("*.wav")}
    assert len(wavs) == 3 and max(wav.abs().max() for wav in wavs.values()) <= 0.892
    levels = {stem: loudness(wav, RATE) for stem, wav in wavs.items()}
    assert levels["piece-1"] - levels["piece-2"] == pytest.approx(6.02, abs=0.05)
    near_peak = wavs["piece-1"].abs().max() > 0.89
    assert near_peak or levels["piece-1"] == pytest.approx(-14, abs=0.1)
    gains = [json.loads((tmp_path / f"piece-{i}.json").read_text())["gain_db"] for i in (1, 2)]
    assert gains[0] == gains[1]


def test_silence_is_left_alone(demo: Any) -> None:
    silence, faint = torch.zeros(1, RATE), torch.full((1, RATE), 1e-4)
    assert demo.common_gain([silence], RATE, 14.0) == 1.0
    assert demo.common_gain([faint, silence], RATE, 14.0) <= demo.MAX_GAIN


def test_nobodys_ears_are_hurt(made: tuple[Path, str]) -> None:
    for path in made[0].glob("piece-*.wav"):
        wav, rate = audio_read(path)
        assert loudness(wav, rate) < -19 and wav.abs().max() < 0.9


# -- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--tempo", "3"), "unrecognized arguments: --tempo"),
        (("--duration", "0"), "0 is not between 0.1 and 600 seconds"),
        (("--duration", "nan"), "nan is not between"),
        (("--seed", "-1"), "-1 is not between 0 and"),
        (("--seed", "x"), "invalid"),
        (("--model", "{tmp}/no/model"), "neither an existing folder nor the id of a hub repository"),
        (("--model", "{tmp}/file"), "is a text file"),
        (("--model", "{tmp}"), "has no"),
        (("--prompts", "{tmp}/none.txt"), "No such file"),
        (("--prompts", "{tmp}/empty"), "holds no prompts"),
        (("--prompts", "{tmp}/latin1"), "is not UTF-8"),
        (("--prompts", "{tmp}/many"), "at most 64"),
        (("--prompts", "{tmp}"), "Is a directory"),
        (("-o", "{tmp}/file"), "is a file, not a folder"),
        (("-o", "{tmp}/file/below"), "cannot write into the output folder"),
        (("--docs", "{tmp}/file"), "is a file, not a folder"),
    ],
)
def test_clear_errors(run: Run, tmp_path: Path, argv: tuple[str, ...], says: str) -> None:
    files = {"file": b"x", "empty": b"\n \n", "latin1": "süß".encode("latin1"), "many": b"drums\n" * 65}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    code, _, error = run(*(text.replace("{tmp}", str(tmp_path)) for text in argv))
    assert code == 2 and says in error and "error: " in error and "Traceback" not in error
    assert not list(tmp_path.rglob("*.wav")) and (tmp_path / "file").read_bytes() == b"x"


def test_a_folder_without_permission(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # not chmod: root may write anywhere
    code, _, error = run()
    assert code == 2 and "cannot write into the output folder" in error and "Permission denied" in error


def test_a_full_disk(demo: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "cannot write piece-1.wav: No space left on device")

    monkeypatch.setattr(demo, "audio_write", full)
    code, _, error = run()
    assert code == 2 and "No space left on device" in error


@pytest.mark.parametrize(("where", "files"), [("get_pretrained", 0), ("generate", 0), ("generate_continuation", 7)])
def test_interrupted(
    demo: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, files: int
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.MusicGen, where, interrupt)
    code, _, error = run()
    assert code == 130 and len(list(tmp_path.rglob("*.wav"))) == files
    if files:
        assert "piece-1.wav, piece-2.wav" in error and "long.wav" in error and "continuation.wav" not in error
        Page(tmp_path / "out" / "index.html").check(articles=7)
    else:
        assert "no sound was written" in error


def test_interrupted_between_two_files(demo: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = demo.audio_write

    def once(stem: Path, *args: object, **options: object) -> Any:
        if stem.name == "piece-2":
            raise KeyboardInterrupt
        return write(stem, *args, **options)

    monkeypatch.setattr(demo, "audio_write", once)
    code, _, error = run()
    assert code == 130 and "Written to" in error and "piece-1.wav;" in error
    Page(tmp_path / "out" / "index.html").check(articles=1)


# -- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """A page's links, elements and visible text. AssertionError for tags that are not closed or badly nested."""

    VOID = {"meta", "img", "link", "br", "hr", "input", "source"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.text = path, ""
        self.elements: list[tuple[str, dict[str, str]]] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, attrs)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def check(self, articles: int) -> None:
        """Of what every page holds."""
        assert [len(self.all(tag)) for tag in ("article", "audio", "figure", "figcaption", "img", "svg", "h2")] == [
            articles
        ] * 7
        assert len(self.all("h1")) == len(self.all("title")) == 1 and self.all("html") == [{"lang": "en"}]
        assert not self.all("script") and not self.all("link")
        links = [a[key] for _, a in self.elements for key in ("src", "href") if key in a]
        assert len(links) >= 4 * articles  # sound twice, picture, JSON
        for link in links:
            assert ":" not in link and not link.startswith("/") and (self.path.parent / unquote(link)).is_file(), link
        for image in self.all("img"):
            assert image["alt"].startswith("Spectrogram of ") and image["width"] and image["height"]
        assert all(a["preload"] == "none" and a["aria-label"] and "controls" in a for a in self.all("audio"))
        assert all(a["role"] == "img" and "seconds" in a["aria-label"] for a in self.all("svg"))


def test_page_of_the_demo(demo: Any, made: tuple[Path, str]) -> None:
    page = Page(made[0] / "index.html")
    page.check(articles=8)
    assert all(prompt in page.text for prompt in demo.PROMPTS) and torch.__version__ in page.text
    assert "of all 6" not in page.text and "for all 6 pieces of the batch" in page.text
    assert "prefers-color-scheme: dark" in page.path.read_text() and page.all("meta")[1]["name"] == "viewport"
    assert len([a for a in page.all("path") if a["class"] == "given"]) == 1 and "0.2 s that were given" in page.text


def test_pictures_for_the_documentation(made: tuple[Path, str]) -> None:
    docs = made[0].parent / "docs"
    assert sorted(path.name for path in docs.iterdir()) == [f"{name}.png" for name in PIECES]
    for path in docs.iterdir():
        pixels, _ = _decode(path.read_bytes())
        assert pixels.shape == (128, 400) and pixels.max() >= 20 and path.stat().st_size < 40_000


def test_everything_is_escaped(run: Run, tmp_path: Path) -> None:
    nasty = "<script>alert('1')</script> & \"><img src=x onerror=alert(1)> ]]> ünï 音楽 &amp;"
    (tmp_path / "prompts.txt").write_text(nasty + "\n", encoding="utf-8")
    out = tmp_path / "ou t #1%20&'<b>"
    code, _, error = run("--prompts", tmp_path / "prompts.txt", "-o", out)
    assert code == 0, error
    page = Page(out / "index.html")
    page.check(articles=3)
    assert page.text.count(nasty) == 3 and not any("onerror" in a for _, a in page.elements)


def test_names_and_facts_are_escaped_too(pages: Any, tmp_path: Path) -> None:
    nasty = '"><b>&'
    audio = tmp_path / "sub" / "a #1%?'.wav"
    audio.parent.mkdir()
    audio.with_suffix(".json").write_text("{}")
    audio.write_bytes(b"")
    piece = pages.Piece(nasty, "half a pair \ud83d", audio, torch.zeros(2, 7), RATE, {nasty: nasty})
    page = Page(pages.write_page(tmp_path, [piece], title=nasty, facts={nasty: nasty}, note=nasty))
    page.check(articles=1)
    assert not page.all("b") and page.text.count(nasty) == 9


# -- the pictures -----------------------------------------------------------------------------------------------------


def _decode(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [h, w] and palette [n, 3] of a PNG with a palette and no filters; checks every length and checksum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", data, place + 8 + size)[0] == zlib.crc32(kind + body)
        chunks[kind], place = body, place + 12 + size
    assert place == len(data) and list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 3, 0, 0, 0]
    raw = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8)
    assert raw.size == height * (width + 1)
    rows = raw.reshape(height, width + 1)
    palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    assert not rows[:, 0].any() and rows.max() < len(palette)
    return rows[:, 1:], palette


def _tone(pages: Any, folder: Path, name: str, hertz: float, amplitude: float, rate: int = RATE) -> Any:
    wav = amplitude * torch.sin(2 * torch.pi * hertz * torch.arange(rate) / rate)[None]
    return pages.Piece(name, name, folder / f"{name}.wav", wav, rate)


@pytest.mark.parametrize("rate", [16000, 32000, 44100])
def test_a_tone_lights_its_rows(pages: Any, tmp_path: Path, rate: int) -> None:
    for hertz in (250, 1000, 2000, 4000):
        (path,) = pages.write_pictures(tmp_path, [_tone(pages, tmp_path, "tone", hertz, 0.5, rate)])
        pixels = _decode(path.read_bytes())[0][:, 20:-20].astype(int)
        rows = 127 - pixels.argmax(0)  # from the bottom
        assert np.abs(rows + 0.5 - 128 * pages.height(hertz, rate)).max() <= 1.5
        assert pixels.max() == 47 and (pixels > 35).sum(0).max() <= 20 and pixels[-3:].max() < 20
    labels = dict(re.findall(r"bottom:([\d.]+)%\">([^<]+)<", pages._hertz(rate)))
    place = {text: float(bottom) for bottom, text in labels.items()}
    assert place["2 kHz"] == pytest.approx(100 * pages.height(2000, rate), abs=0.1) and place["250 Hz"] < 15


def test_height_is_mel(pages: Any) -> None:
    """By the formula: 2 kHz is 1521 mel, 8 kHz is 2840."""
    assert pages.height(2000, 16000) == pytest.approx(1521.4 / 2840.0, abs=0.005)
    assert pages.height(8000, 16000) == pytest.approx(1.0, abs=0.01)


def test_a_softer_piece_is_darker(pages: Any, tmp_path: Path) -> None:
    tones = [_tone(pages, tmp_path, name, 1000, level) for name, level in (("loud", 0.8), ("soft", 0.08))]
    peaks = [int(_decode(path.read_bytes())[0].max()) for path in pages.write_pictures(tmp_path, tones)]
    assert peaks[0] == 47 and peaks[1] == pytest.approx(47 - 20 / 70 * 47, abs=1)
    waves = [pages.waveform_svg(tone) for tone in tones]
    tops = [min(float(y) for y in re.findall(r",([\d.]+)", svg)) for svg in waves]
    assert tops == pytest.approx([50 - 40, 50 - 4], abs=0.2)  # half of 100 is full scale
    assert "peak -1.9 dB" in waves[0]


@pytest.mark.parametrize("seconds", [0.0001, 0.02, 70.0])
def test_any_length(pages: Any, tmp_path: Path, seconds: float) -> None:
    wav = torch.randn(2, max(1, int(seconds * RATE)), generator=torch.Generator().manual_seed(0)) / 4
    (path,) = pages.write_pictures(tmp_path, [pages.Piece("a", "a", tmp_path / "a.wav", wav, RATE)])
    assert _decode(path.read_bytes())[0].shape == (128, 400) and path.stat().st_size < 40_000


def test_worst_case_of_a_picture(pages: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, pages.LEVELS, (pages.BANDS, pages.WIDTH)).astype(np.uint8)
    data = pages.png(pixels, pages.colour_map(pages.LEVELS))
    assert len(data) < 40_000 and np.array_equal(_decode(data)[0], pixels)


def test_colours_get_lighter_evenly(pages: Any) -> None:
    """CIE L* of the colours: rising, in steps that differ by a factor of two at most from their mean."""
    srgb = pages.colour_map(pages.LEVELS) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(luminance > 216 / 24389, 116 * np.cbrt(luminance) - 16, luminance * 24389 / 27)
    steps = np.diff(lightness)
    assert lightness[0] < 5 and lightness[-1] > 95
    assert steps.min() > steps.mean() / 2 and steps.max() < steps.mean() * 2


def test_time_axis(pages: Any) -> None:
    for seconds in (0.01, 0.4, 4.0, 8.0, 20.0, 61.0, 600.0):
        marks = [float(text) for text in re.findall(r">([\d.]+) s<", pages._time(seconds))]
        assert marks[0] == 0 and 2 <= len(marks) <= 6 and marks[-1] <= seconds
        assert np.allclose(np.diff(marks), marks[1])

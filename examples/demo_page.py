"""A page to listen at: prompts, players, waveforms and spectrograms of finished pieces, as one static index.html.

Needs no server, no network and no script: everything it links to lies beside it, and it opens from a disk as well. The
spectrograms are small PNG files (mel axis, one scale of decibels for all pieces of a page), written here; axes and
waveforms are HTML and SVG, so they stay sharp and follow a dark screen. Waveforms are float [C, n], any rate from
4 kHz; they are shown as they are in the files. It knows no model: what is said of a piece is handed to it.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from musicgen_fast.audio_encode import replacing
from musicgen_fast.evaluation.spectra import decibels, mel_filters, mono, spectrogram

WIDTH, BANDS = 400, 128  # of a spectrogram, in pixels
LEVELS = 48  # colours. 400 x 128 pixels of log2(48) bits are 36 kB: even noise, which no zlib shortens, stays below 40
RANGE_DB = 70.0  # from the darkest colour to the brightest
WINDOW_SECONDS = 0.064  # bins of 16 Hz, which part the lowest neighbours of a scale, and beats still stand alone
TOP_HZ = 16000.0
# Ever lighter in about even steps (L* 4, 18, 35, 55, 73, 96), so that it reads the same printed in grey.
COLOURS = ((10, 12, 30), (48, 30, 104), (140, 40, 120), (226, 84, 74), (250, 160, 60), (254, 246, 196))


@dataclass(frozen=True)
class Piece:
    """One finished piece.

    Attributes:
        title: a short heading, such as "Piece 1".
        prompt: what it was made of.
        audio: its sound file; pictures and links are named after it.
        wav: float [C, n], what the file holds.
        sample_rate: in Hz.
        facts: name and value of everything to be listed, in order (parameters, seed, time taken).
        given: seconds at its start that were not generated but given.
    """

    title: str
    prompt: str
    audio: Path
    wav: Tensor
    sample_rate: int
    facts: Mapping[str, object] = field(default_factory=dict)
    given: float = 0.0

    @property
    def seconds(self) -> float:
        return self.wav.shape[-1] / self.sample_rate


# -- pictures ---------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, pieces: Sequence[Piece]) -> list[Path]:
    """A spectrogram of each piece, `<stem of its sound file>.png` in `folder`, which is made if need be.

    400 x 128 pixels, below 40 kB each; low frequencies at the bottom, in mel. All share one scale: 70 dB down from the
    loudest spot of all pieces, so that a soft piece looks soft. OSError where the files cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spectra = [mel_decibels(piece.wav, piece.sample_rate) for piece in pieces]
    loudest = max((float(spectrum.max()) for spectrum in spectra), default=0.0)
    paths = []
    for piece, spectrum in zip(pieces, spectra, strict=True):
        light = ((spectrum - loudest) / RANGE_DB + 1).clamp(0, 1).flip(0)
        pixels = (light * (LEVELS - 1)).round().to(torch.uint8).numpy()
        paths.append(folder / f"{piece.audio.stem}.png")
        with replacing(paths[-1]) as file:
            file.write(png(pixels, colour_map(LEVELS)))
    return paths


def mel_decibels(wav: Tensor, sample_rate: int) -> Tensor:
    """Mel power in dB, [BANDS, WIDTH], the lowest band first; whatever the length, all of it is there."""
    signal = mono(wav, sample_rate, min_seconds=0.0)
    n_fft = 2 ** round(math.log2(WINDOW_SECONDS * sample_rate))
    hop = max(1, min(n_fft // 4, len(signal) // WIDTH))
    power = spectrogram(signal, n_fft, hop).square()
    bands = mel_filters(n_fft, sample_rate, BANDS, 0.0, TOP_HZ) @ power
    return decibels(F.adaptive_avg_pool1d(bands[None], WIDTH)[0])


def height(hertz: float, sample_rate: int) -> float:
    """Where a frequency lies in a spectrogram: 0 at its lower edge, 1 at the upper one."""
    mel = [math.log10(1 + f / 700) for f in (hertz, min(TOP_HZ, sample_rate / 2))]
    return (mel[0] / mel[1] * (BANDS + 1) - 0.5) / BANDS  # band i peaks at corner i + 1 of BANDS + 2


def colour_map(levels: int) -> np.ndarray:
    """uint8 [levels, 3], dark to light, straight lines between COLOURS."""
    place = np.linspace(0, len(COLOURS) - 1, levels)
    channels = [np.interp(place, np.arange(len(COLOURS)), channel) for channel in zip(*COLOURS, strict=True)]
    return np.stack(channels, 1).round().astype(np.uint8)


def png(pixels: np.ndarray, palette: np.ndarray) -> bytes:
    """A PNG file of pixels uint8 [h, w], indices of the palette uint8 [n <= 256, 3]."""
    rows, columns = pixels.shape
    raw = np.zeros((rows, columns + 1), np.uint8)  # each row begins with its filter: 0, none
    raw[:, 1:] = pixels

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)  # 8 bits, palette, nothing interlaced
    parts = {b"IHDR": header, b"PLTE": palette.tobytes(), b"IDAT": zlib.compress(raw.tobytes(), 9), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts.items())


def waveform_svg(piece: Piece) -> str:
    """The range of the samples in each of WIDTH columns, full scale from edge to edge, in the colour of the text."""
    wav = piece.wav.detach().float().cpu().clamp(-1, 1)
    high = F.adaptive_max_pool1d(wav, WIDTH).amax(0)
    low = -F.adaptive_max_pool1d(-wav, WIDTH).amax(0)
    points = [f"{x + 0.5:g},{50 - 50 * y:.1f}" for x, y in enumerate(high.tolist())]
    points += [f"{x + 0.5:g},{50.4 - 50 * y:.1f}" for x, y in reversed(list(enumerate(low.tolist())))]
    peak = float(decibels(wav.abs().max() ** 2))
    border = piece.given / piece.seconds * WIDTH
    line = f'<path class="given" d="M{border:.1f} 0V100"/>' if piece.given else ""
    label = f"Waveform of {piece.title}: {piece.seconds:.1f} seconds, peak {peak:.1f} dB of full scale"
    return (
        f'<svg class="wave" role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} 100" '
        f'preserveAspectRatio="none"><polygon points="{" ".join(points)}"/>{line}</svg>'
    )


# -- the page ---------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c24; --soft: #5a5a68; --paper: #fdfdfb; --card: #f1f0ec; --line: #a04;
  --wave: #46307c; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf2; --soft: #a6a6b6; --paper: #15151c; --card: #20202b;
  --line: #fa8; --wave: #c9b8f4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0.5rem 0; }
h2 { font-size: 1.05rem; margin: 0 0 0.6rem; }
h2 small { display: block; color: var(--soft); font-weight: normal; }
article { background: var(--card); border-radius: 0.6rem; padding: 1rem; margin: 1.2rem 0; }
audio { width: 100%; display: block; }
figure { margin: 0.8rem 0 0; }
.plot { display: grid; grid-template-columns: 3.2rem 1fr; gap: 0.3rem 0.4rem; font-size: 0.75rem; color: var(--soft); }
.plot > * { position: relative; min-width: 0; }
.wave { grid-column: 2; width: 100%; height: 4rem; fill: var(--wave); }
.given { stroke: var(--line); stroke-width: 2; stroke-dasharray: 6 4; vector-effect: non-scaling-stroke; }
.plot img { display: block; width: 100%; height: 10rem; }
.hz span { position: absolute; right: 0; transform: translateY(50%); white-space: nowrap; }
.time { grid-column: 2; height: 1.1rem; }
.time span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.time span:first-child { transform: none; }
figcaption, details, .note { color: var(--soft); font-size: 0.85rem; margin-top: 0.4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 0.8rem; margin: 0.4rem 0 0; }
dt { color: var(--soft); }
dd { margin: 0; }
a { color: inherit; }
"""


def write_page(
    folder: Path, pieces: Sequence[Piece], *, title: str, facts: Mapping[str, object], note: str = ""
) -> Path:
    """`folder`/index.html with the pieces, and the pictures it shows.

    Args:
        folder: where the sound files lie too, or a folder above them: links are relative.
        pieces: in the order of the page.
        title: its heading.
        facts: about all pieces: model, versions, date.
        note: a sentence that a listener should read first, or nothing.

    Raises:
        OSError: a file cannot be written; an index.html that was there is then as it was.
    """
    pictures = write_pictures(folder, pieces)
    shown = "".join(_article(folder, *pair) for pair in zip(pieces, pictures, strict=True))
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{f'<p class="note">{escape(note)}</p>' if note else ""}
{_list(facts)}
</header>
<main>
{shown}</main>
</body>
</html>
"""
    path = folder / "index.html"
    with replacing(path) as file:
        file.write(text.encode("utf-8", "xmlcharrefreplace"))  # half of a surrogate pair can come out of a terminal
    return path


def _article(folder: Path, piece: Piece, picture: Path) -> str:
    name, sound = escape(piece.title), _link(piece.audio, folder)
    notes = piece.audio.with_suffix(".json")
    more = f'<p><a href="{_link(notes, folder)}">Everything about it, as JSON</a></p>' if notes.is_file() else ""
    given = f" Left of the dashed line: {piece.given:g} s that were given." if piece.given else ""
    return f"""<article>
<h2><small>{name}</small>{escape(piece.prompt)}</h2>
<audio controls preload="none" src="{sound}" aria-label="{name}"><a href="{sound}">{name}</a></audio>
<figure>
<div class="plot">
{waveform_svg(piece)}
{_hertz(piece.sample_rate)}
<img src="{_link(picture, folder)}" width="{WIDTH}" height="{BANDS}" loading="lazy" alt="{_describe(piece)}">
{_time(piece.seconds)}
</div>
<figcaption>Waveform and spectrogram; the lighter, the louder, down to {RANGE_DB:g} dB below the loudest spot of all
pieces.{given}</figcaption>
</figure>
<details><summary>How it was made</summary>
{_list(piece.facts)}
{more}</details>
</article>
"""


def _describe(piece: Piece) -> str:
    top = min(TOP_HZ, piece.sample_rate / 2) / 1000
    text = f"Spectrogram of {piece.title}: {piece.seconds:.1f} seconds from left to right, 0 to {top:g} kHz upwards"
    return escape(text)


def _link(path: Path, folder: Path) -> str:
    return escape(quote(Path(os.path.relpath(path, folder)).as_posix()))


def _list(facts: Mapping[str, object]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items()) + "</dl>"


def _hertz(sample_rate: int) -> str:
    """Labels of the frequency axis. Hidden from screen readers: the text of the picture says its range."""
    top = min(TOP_HZ, sample_rate / 2)
    marks = [(f, f"{f} Hz" if f < 1000 else f"{f / 1000:g} kHz") for f in (250, 500, 1000, 2000, 4000, 8000, 16000)]
    spans = [f'<span style="bottom:{100 * height(f, sample_rate):.1f}%">{text}</span>' for f, text in marks if f <= top]
    return f'<div class="hz" aria-hidden="true">{"".join(spans)}</div>'


def _time(seconds: float) -> str:
    """Labels of the time axis: at most six, at multiples of 1, 2 or 5 times a power of ten."""
    steps = (m * 10.0**e for e in range(-3, 9) for m in (1, 2, 5))
    step = next(s for s in steps if seconds / s <= 5.2)
    marks = [i * step for i in range(int(seconds / step + 1e-6) + 1) if i * step <= 0.97 * seconds]
    spans = [f'<span style="left:{100 * t / seconds:.1f}%">{t:g} s</span>' for t in marks]
    return f'<div class="time" aria-hidden="true">{"".join(spans)}</div>'

"""The picture and the sounds at the top of README, from what `make demo` wrote: docs/demo/gallery.png and piece-N.mp3.

    python examples/demo_gallery.py out -o docs/demo

Needs matplotlib (`pip install musicgen-fast[plot]`). The spectrograms are those of the page that `make demo` makes: mel
axis, one scale of decibels for all pieces. Dark on any page, so that one file serves light and dark screens.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from demo_page import LEVELS, RANGE_DB, colour_map, mel_decibels

from musicgen_fast.audio import audio_read, audio_write

SHOWN = ("piece-1", "piece-2", "piece-3", "piece-4", "piece-5", "piece-6")
SOUNDS = ("piece-1", "piece-3", "piece-5")
INK, PAPER = "#e6e6f0", "#0a0c1e"  # the paper is the darkest colour of a spectrogram
INCHES, DOTS = (10.0, 5.4), 120  # 1200 x 648 pixels, about 200 kB


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="what `make demo` wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/demo"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.folder, args.output / "gallery.png")
    for name in SOUNDS:
        wav, rate = audio_read(args.folder / f"{name}.wav")
        audio_write(args.output / name, wav, rate, format="mp3", mp3_rate=64, normalize=False)
    print(f"wrote {args.output / 'gallery.png'} and {len(SOUNDS)} sounds")


def draw(folder: Path, target: Path) -> None:
    """Six spectrograms, each under the words it was made of."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from PIL import Image

    sounds = [audio_read(folder / f"{name}.wav") for name in SHOWN]
    pictures = [mel_decibels(wav, rate).numpy() for wav, rate in sounds]
    top = max(float(np.max(picture)) for picture in pictures)
    colours = ListedColormap(colour_map(LEVELS) / 255)
    figure, cells = plt.subplots(3, 2, figsize=INCHES, dpi=DOTS, facecolor=PAPER)
    for cell, name, picture, (wav, rate) in zip(cells.flat, SHOWN, pictures, sounds, strict=True):
        seconds = wav.shape[-1] / rate
        cell.imshow(
            picture, origin="lower", aspect="auto", cmap=colours, vmin=top - RANGE_DB, vmax=top,
            extent=(0, seconds, 0, 1), interpolation="nearest",
        )  # fmt: skip
        prompt = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["prompt"]
        cell.set_title("\n".join(textwrap.wrap(prompt, 80)), color=INK, fontsize=8, loc="left", pad=4)
        cell.set_yticks([])
        cell.set_xticks([0, seconds / 2, seconds], labels=["0", f"{seconds / 2:g}", f"{seconds:g} s"])
        cell.tick_params(colors=INK, labelsize=7, length=2)
        for side in cell.spines.values():
            side.set_color("#30305a")
    figure.tight_layout(h_pad=1.0, w_pad=1.5)
    figure.savefig(target, facecolor=PAPER)
    Image.open(target).convert("RGB").quantize(96).save(target, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main()

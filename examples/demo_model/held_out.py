"""Held-out songs as recordings: `python examples/demo_model/held_out.py --count 32 --seconds 10 -o out/held_out`.

Writes the songs of seeds -1, -2, ..., which no training has seen, as float32 WAV files (nothing is rounded on the way
to the codec), and songs.jsonl with `audio` and `prompt`, a caption of each: what `musicgen-fast bench quality --clips`
and `musicgen-fast render` read. Every file goes on a little behind `--seconds`, as the songs of the training sets do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FRAMES_A_SECOND = 50
TAIL = 8  # frames behind the end, as in tokens.py: the codec looks ahead, and a song does not end there


def write_songs(out: Path, count: int, seconds: float) -> Path:
    """`count` songs in the folder `out`; the path of the manifest."""
    import soundfile

    from examples.demo_model.captions import caption
    from examples.demo_model.synth import RATE, compose, render

    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(-1, -1 - count, -1):
        song = compose(seed)
        name = f"song{-seed:03d}.wav"
        wav = render(song, round(seconds * FRAMES_A_SECOND) + TAIL)
        soundfile.write(out / name, wav, RATE, subtype="FLOAT")
        rows.append(json.dumps({"audio": name, "prompt": caption(song, seed)}) + "\n")
    manifest = out / "songs.jsonl"
    manifest.write_text("".join(rows), encoding="utf-8")
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Write held-out songs of the demo model as recordings.")
    parser.add_argument("--count", type=int, default=32, help="default 32")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a song that are scored (default 10)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder")
    args = parser.parse_args(argv)
    if args.count < 1 or not args.seconds >= 1 / FRAMES_A_SECOND:
        parser.error("at least one song of at least one frame (0.02 s)")
    sys.path.insert(0, str(ROOT))  # run as a file, the examples are no package
    print(write_songs(args.out, args.count, args.seconds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

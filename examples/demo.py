"""A tour of musicgen_fast on a fresh machine, without a network: text to music, a piece longer than the model's window,
the continuation of a real recording. What `make demo` runs.

Without --model it first writes a small model with RANDOM weights, in the layout of the released ones, and loads it as
one would load those. What such a model makes is noise: the demo shows that every part runs, and how fast.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from musicgen_fast import MusicGen, __version__, audio_read, audio_write
from musicgen_fast.checkpoints.write import tiny_checkpoint, write_transformers_folder
from musicgen_fast.config import CodecConfig, ModelConfig, TextConfig

PROMPTS = ("lofi beat with warm piano", "80s pop track with bassy drums and synth", "calm strings, slow, minor key")
NOISE = "The weights are random, so the sound is noise, until a trained demo model comes with this repository."
PACKAGE = "immich-memories-music==0.1.0"  # 28 tracks under the MIT licence
TRACK = "calm/calm_acoustic_1.opus"
TRACK_SECONDS = 5.0


def write_random_model(folder: Path) -> Path:
    """A model of 30 MB with a window of 5 s instead of 30, so that a piece of 8 s already takes two windows."""
    config = ModelConfig(
        dim=256, num_layers=6, num_heads=4, ffn_dim=1024, vocab_size=256, text=TextConfig(dim=64), max_duration=5.0
    )
    codec = CodecConfig(num_filters=8, dimension=32, lstm_layers=1, codebook_size=256)
    checkpoint = tiny_checkpoint(config=config, codec_config=codec)
    return write_transformers_folder(folder, checkpoint=checkpoint, captions=PROMPTS)


def find_track() -> Path | None:
    """A recording out of the package of tracks; None where it is not installed."""
    spec = importlib.util.find_spec("immich_memories_music")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "tracks" / TRACK
    return path if path.is_file() else None


def make_piece(
    model: MusicGen,
    path: Path,
    prompt: str,
    duration: float,
    seed: int,
    note: str,
    recording: tuple[Tensor, int] | None = None,
) -> None:
    """Make one piece, write it with its sidecar, and say what it took. `recording` is (wav [C, n], its rate)."""
    model.set_generation_params(duration=duration)
    started = time.perf_counter()
    if recording is None:
        wav = model.generate([prompt], seed=seed)[0]
    else:
        wav = model.generate_continuation(*recording, [prompt], seed=seed)[0]
    taken = time.perf_counter() - started

    seconds = wav.shape[-1] / model.sample_rate
    given = recording[0].shape[-1] / recording[1] if recording else 0.0
    sidecar = {
        "prompt": prompt,
        "seed": seed,
        "note": note,
        "model": model.name,
        "parameters": asdict(model.params()),
        "window": model.max_duration,
        "recording": {"file": TRACK, "package": PACKAGE, "seconds": given} if recording else None,
        "seconds_taken": taken,
        "times_real_time": (seconds - given) / taken,
        "musicgen_fast": __version__,
    }
    written = audio_write(
        path,
        wav.cpu(),
        model.sample_rate,
        strategy="loudness",
        loudness_headroom_db=20,  # 6 dB below the usual level: noise is tiring
        loudness_compressor=True,
        metadata={"title": prompt, "comment": note, "software": f"musicgen_fast {__version__}"},
        sidecar=sidecar,
    )
    print(f"  {written}  {seconds:.2f} s in {taken:.1f} s, {(seconds - given) / taken:.1f}x real time")


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split("\n\n")[0].split()))
    parser.add_argument("-o", "--output-dir", type=Path, default=Path("out"), help="default: out")
    parser.add_argument("--duration", type=float, default=4.0, metavar="S", help="seconds of new music (default: 4)")
    parser.add_argument("--model", help="a hub id or a folder, instead of a small model with random weights")
    args = parser.parse_args()
    started = time.perf_counter()
    out: Path = args.output_dir

    name, note = args.model, ""
    if name is None:
        # Matrices this small gain nothing from a second thread, and wait for it: on two cores that other processes used
        # too, the demo took 149 s with two threads and 26 s with one.
        torch.set_num_threads(1)
        name, note = write_random_model(out / "random-model"), NOISE
        print(f"Wrote a small model with random weights: {name}\n{NOISE}")
    model = MusicGen.get_pretrained(name)
    print(f"Loaded {model.name} on {model.device}")

    print(f"\nText to music: {len(PROMPTS)} pieces of {args.duration:g} s")
    for seed, prompt in enumerate(PROMPTS):
        print(f"  {prompt!r}")
        make_piece(model, out / f"text-{seed}", prompt, args.duration, seed, note)

    window = model.max_duration
    print(f"\nLonger than the model's window: {window + 3:g} s in windows of {window:g} s that overlap")
    make_piece(model, out / "long", PROMPTS[0], window + 3, 0, note)

    print(
        f"\nContinuation: {TRACK_SECONDS:g} s of a real recording as the codec hears it, then {args.duration:g} s more"
    )
    track = find_track()
    if track is None:
        print(f"  left out: the recordings are not installed (pip install {PACKAGE}; needs Python 3.11 or newer)")
    else:
        print(f"  {TRACK} of {PACKAGE}")
        recording = audio_read(track, duration=TRACK_SECONDS)
        make_piece(model, out / "continuation", PROMPTS[0], TRACK_SECONDS + args.duration, 0, note, recording)

    print(f"\nDone in {time.perf_counter() - started:.0f} s. {note}".rstrip())


if __name__ == "__main__":
    main()

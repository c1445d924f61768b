"""A tour of musicgen_fast on a fresh machine, without a network: six prompts in one batch, a piece longer than the
model's window, another ending for the first piece, and a page to listen at. What `make demo` runs.

It plays the small demo model that comes with the package. Where that is missing it writes a model with RANDOM weights,
in the layout of the released ones, and loads it as one would load those: what such a model makes is noise, and shows
that every part runs.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from demo_page import Piece, write_page, write_pictures
from torch import Tensor

from musicgen_fast import MusicGen, __version__, audio_write
from musicgen_fast.audio import loudness
from musicgen_fast.checkpoints.sources import EMBEDDED
from musicgen_fast.checkpoints.write import tiny_checkpoint, write_transformers_folder
from musicgen_fast.cli_output import OutputFolder
from musicgen_fast.config import CodecConfig, ModelConfig, TextConfig

# In the words that the demo model has learnt (demo_model/captions.py); together they ask for every label's every value,
# and one spells a melody: up the scale and down again.
PROMPTS = (
    "a fast playful bright dense loud chiptune in major with a square wave and rock drums",
    "a slow sad dark sparse soft tune in minor with bells and no drums",
    "calm, a flute, no percussion, in major, slow, simple, quiet, bright, notes 1 d5 - e5 - 2 f#5 - a5 - 3 b5 - d6 - "
    "4 e6 - f#6 - 5 e6 - d6 - 6 b5 - a5 - 7 f#5 - e5 - 8 d5 - - -",
    "a fast tense dark busy strong game tune in a minor key with a chip lead and a dance beat",
    "happy, medium tempo, a glockenspiel, in a major key, rock drums, crisp, loud, dense",
    "a mysterious moderate mellow simple soft melody with a recorder and dance drums in minor",
)
NOISE = "The weights are random, so the sound is noise."
MISSING = " The trained demo model is not part of this installation."
MAX_PROMPTS = 64  # they run as one batch, and each takes its share of memory
HEADROOM_DB, NOISE_HEADROOM_DB = 14.0, 20.0  # audiocraft's usual level; noise is tiring
CEILING = 10 ** (-1 / 20)  # no sample goes higher: nothing is clipped
MAX_GAIN = 10.0  # what is all but silent stays quiet


def has_demo_model() -> bool:
    """Whether the trained demo model is part of this installation."""
    return (EMBEDDED["demo"] / "model.safetensors").is_file()


def write_random_model(folder: Path) -> Path:
    """A model of 7 MB with a window of 2 s instead of 30, so that a piece of 4 s already takes several windows."""
    config = ModelConfig(
        dim=128, num_layers=4, num_heads=2, ffn_dim=512, vocab_size=128, text=TextConfig(dim=64), max_duration=2.0
    )
    codec = CodecConfig(
        sample_rate=16000, ratios=(5, 4, 4, 4), num_filters=8, dimension=32, lstm_layers=1, codebook_size=128
    )
    checkpoint = tiny_checkpoint(config=config, codec_config=codec)
    return write_transformers_folder(folder, checkpoint=checkpoint, captions=PROMPTS)


def common_gain(wavs: Sequence[Tensor], sample_rate: int, headroom_db: float) -> float:
    """The factor that brings the loudest of wavs [C, n] to -`headroom_db` LUFS, or as near as its peaks allow.

    One factor for all: levelled one by one, "soft" and "loud" would sound alike.
    """
    loudest = max(loudness(wav, sample_rate) for wav in wavs)
    peak = max(float(wav.abs().max()) for wav in wavs)
    gain = 1.0 if math.isinf(loudest) else min(10 ** ((-headroom_db - loudest) / 20), MAX_GAIN)
    return min(gain, CEILING / max(peak, 1e-9))


@dataclass
class Tour:
    """One run: makes pieces, writes each with its sidecar as soon as it is there, and remembers them for the page."""

    model: MusicGen
    out: Path
    note: str
    gain: float = 1.0
    pieces: list[Piece] = field(default_factory=list)
    taken: float = 0.0
    made: float = 0.0

    def batch(self, prompts: Sequence[str], duration: float, seed: int) -> Tensor:
        """A piece for each prompt, all at once, seeds from `seed` on; wav [C, n] of the first as the model made it."""
        seeds = [seed + i for i in range(len(prompts))]
        wavs, taken = self._timed(duration, lambda bar: self.model.generate(prompts, bar, seed=seeds))
        self.gain = common_gain(list(wavs), self.model.sample_rate, NOISE_HEADROOM_DB if self.note else HEADROOM_DB)
        for i, (prompt, wav) in enumerate(zip(prompts, wavs, strict=True)):
            self._write(f"piece-{i + 1}", f"Piece {i + 1}", prompt, seeds[i], wav, taken, batch=len(prompts))
        self._say(len(prompts) * wavs.shape[-1] / self.model.sample_rate, taken)
        return wavs[0]

    def long(self, prompt: str, duration: float, seed: int) -> None:
        """A piece longer than the model's window."""
        wavs, taken = self._timed(duration, lambda bar: self.model.generate([prompt], bar, seed=[seed]))
        self._write("long", "Longer than the window", prompt, seed, wavs[0], taken)
        self._say(wavs.shape[-1] / self.model.sample_rate, taken)

    def another_ending(self, prompt: str, wav: Tensor, new: float, seed: int) -> None:
        """wav [C, n], as the codec hears it, and `new` seconds that go on from it."""
        rate = self.model.sample_rate
        given = wav.shape[-1] / rate
        wavs, taken = self._timed(
            given + new, lambda bar: self.model.generate_continuation(wav, rate, [prompt], bar, seed=[seed]), given
        )
        self._write("continuation", "Another ending for piece 1", prompt, seed, wavs[0], taken, given=given)
        self._say(wavs.shape[-1] / rate - given, taken)

    def page(self) -> Path:
        """index.html for what has been made so far."""
        facts = {
            "Model": self.model.name,
            "Window": f"{self.model.max_duration:g} s, {self.model.sample_rate / 1000:g} kHz",
            "Versions": ", ".join(f"{name} {version}" for name, version in _versions().items()),
            "Device": f"{self.model.device}, threads: {torch.get_num_threads()}",
            "Made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            "Time": f"{self.made:.0f} s of sound in {self.taken:.0f} s, {self.made / self.taken:.1f}x real time",
            "Level": f"one gain for all pieces ({20 * math.log10(self.gain):+.1f} dB): soft ones are soft",
        }
        return write_page(self.out, self.pieces, title="Made by musicgen_fast", facts=facts, note=self.note)

    def _timed(self, duration: float, generate: Callable[[bool], Any], given: float = 0.0) -> tuple[Tensor, float]:
        """wavs [B, C, n] on the CPU and the seconds that they took. `generate` is told whether to show a bar."""
        self.model.set_generation_params(duration=duration)
        started = time.perf_counter()
        wavs: Tensor = generate(sys.stderr.isatty()).float().cpu()
        taken = time.perf_counter() - started
        self.taken += taken
        self.made += len(wavs) * (wavs.shape[-1] / self.model.sample_rate - given)
        return wavs, taken

    def _write(
        self, stem: str, title: str, prompt: str, seed: int, wav: Tensor, taken: float, batch: int = 1, given: float = 0
    ) -> None:
        rate = self.model.sample_rate
        seconds = wav.shape[-1] / rate
        gain = min(self.gain, CEILING / max(float(wav.abs().max()), 1e-9))  # a later piece may have higher peaks
        wav = wav * gain
        parameters = asdict(self.model.params())
        sidecar = {
            "prompt": prompt,
            "seed": seed,
            "note": self.note,
            "model": self.model.name,
            "parameters": parameters,
            "window": self.model.max_duration,
            "continues": {"file": self.pieces[0].audio.name, "seconds": given} if given else None,
            "batch": batch,
            "gain_db": 20 * math.log10(gain),
            "seconds_taken": taken,
            "times_real_time": batch * (seconds - given) / taken,
            "versions": _versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        tags = {"title": prompt, "comment": self.note, "software": f"musicgen_fast {__version__}"}
        path = audio_write(self.out / stem, wav, rate, strategy="none", metadata=tags, sidecar=sidecar)
        level = loudness(wav, rate)
        facts = {
            "Seed": seed,
            "Length": f"{seconds:.2f} s" + (f", the first {given:g} s given" if given else ""),
            "Time taken": f"{taken:.1f} s" + (f" for all {batch} pieces of the batch" if batch > 1 else ""),
            "Loudness": "silent" if math.isinf(level) else f"{level:.1f} LUFS",
            **{name.replace("_", " "): value for name, value in parameters.items() if value is not None},
        }
        self.pieces.append(Piece(title, prompt, path, wav, rate, facts, given))
        print(f"  {path}  {seconds:.2f} s  seed {seed}  {prompt!r}", flush=True)

    def _say(self, seconds: float, taken: float) -> None:
        print(f"  {seconds:.1f} s of new sound in {taken:.1f} s: {seconds / taken:.1f}x real time", flush=True)


def _versions() -> dict[str, str]:
    return {"musicgen_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}


def load(name: str | None, out: Path) -> tuple[MusicGen, str]:
    """The model, and what a listener should know first. CheckpointError where there is none of this name."""
    note = "" if name is None or not name.startswith("random") else NOISE
    if name is None:
        name, note = ("demo", "") if has_demo_model() else ("random", NOISE + MISSING)
    if name in ("demo", "random"):
        # Matrices this small gain nothing from a second thread, and wait for it: on two cores that other processes used
        # too, the demo took 149 s with two threads and 26 s with one.
        torch.set_num_threads(1)
    if name == "random":
        name = str(write_random_model(out / "random-model"))
        print(f"Wrote a small model with random weights: {name}")
    model = MusicGen.get_pretrained(name)
    print(f"Loaded {model.name} on {model.device}" + (f"\n{note}" if note else ""), flush=True)
    return model, note


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty. ValueError where there are none or too many, OSError without a file."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; it should hold one prompt a line") from None
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{path} holds {len(prompts)} prompts; at most {MAX_PROMPTS} make one batch")
    return prompts


def run(tour: Tour, prompts: Sequence[str], duration: float, seed: int) -> None:
    """All pieces, in order."""
    window, rate, count = tour.model.max_duration, tour.model.sample_rate, len(prompts)
    print(f"\nText to music: {count} pieces of {duration:g} s in one batch, each from its own seed")
    first = tour.batch(prompts, duration, seed)

    length = max(window + min(window, 10.0), duration)
    print(f"\nLonger than the model's window: {length:g} s in windows of {window:g} s that overlap")
    tour.long(prompts[-1], length, seed + count)

    kept = first[:, : first.shape[-1] // 2]
    print(f"\nContinuation: {kept.shape[-1] / rate:g} s of piece 1 as the codec hears it, then {duration:g} s more")
    tour.another_ending(prompts[0], kept, duration, seed + count + 1)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.1 and 600 seconds")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 4294967295")
    return value


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.py", description=" ".join((__doc__ or "").split("\n\n")[0].split()))
    parser.add_argument("-o", "--output-dir", type=Path, default=Path("out"), metavar="DIR", help="default: out")
    parser.add_argument(
        "--duration", type=_seconds, default=8.0, metavar="S", help="seconds of each piece (default: 8)"
    )
    parser.add_argument(
        "--model", help='a hub id, a folder, "demo" (default), or "random" for a small model that makes noise'
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of the first piece; the others count on (default: 0)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line, in the place of our six")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="put spectrograms of the prompts' pieces there too")
    return parser.parse_args(argv)


def _prepare(folder: Path) -> None:
    """Make the folder. OSError where there is none to be had: now, not after the music has been made."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder; name another one, or move it away")
    OutputFolder(folder, "{index}").prepare()


def main(argv: Sequence[str] | None = None) -> int:
    """The command. 0; 2 for anything that cannot be used (no such model, no folder to write to); 130 after Ctrl-C."""
    args = _arguments(argv)
    out, tour = args.output_dir, None
    try:
        prompts = PROMPTS if args.prompts is None else read_prompts(args.prompts)
        for folder in filter(None, (out, args.docs)):
            _prepare(folder)
        model, note = load(args.model, out)
        tour = Tour(model, out, note)
        run(tour, prompts, args.duration, args.seed)
        page = tour.page()
        if args.docs is not None:
            write_pictures(args.docs, tour.pieces[: len(prompts)])
            print(f"\nWrote {len(prompts)} spectrograms to {args.docs}")
    except KeyboardInterrupt:
        return _interrupted(tour, out)
    except (OSError, ValueError) as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    print(f"\nListen: {page}  ({tour.made:.0f} s of sound in {tour.taken:.0f} s) {tour.note}".rstrip())
    return 0


def _interrupted(tour: Tour | None, out: Path) -> int:
    if tour is None or not tour.pieces:
        print("\nInterrupted before a piece was finished: no sound was written", file=sys.stderr)
        return 130
    names = ", ".join(piece.audio.name for piece in tour.pieces)
    print(f"\nInterrupted. Written to {out}: {names}; {tour.page()} plays them", file=sys.stderr)
    return 130


if __name__ == "__main__":
    raise SystemExit(main())

"""The language model's data, songs as codec tokens: `python -m examples.demo_model.tokens CODEC OUT --clips 4000`.

OUT gets tokens.npy (int16 codes [N, K, T], to be memory-mapped), songs.jsonl (seed, labels and a caption of each row)
and meta.json. An interrupted run goes on where it stopped when it is started again, and gives the same file. Songs of
training sets have seeds 0, 1, ...; held-out ones (--held) -1, -2, .... Encodes in float32 with musicgen_fast's codec.
It does not know the language model: the delays, the crops and the captions of a training step are made in lm_data.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from musicgen_fast.codec import EnCodec

from .captions import caption
from .synth import FRAME, RATE, Song, compose, render

_FORMAT = 2
_TAIL = 8  # frames rendered past a clip's end and dropped: the codec looks ahead, and a song does not end there


@dataclass(frozen=True)
class TokenSet:
    """A finished data set.

    Attributes:
        tokens: int16 [N, K, T], memory-mapped, read-only.
        songs: of each row.
        captions: one of each row; more come from `captions.caption`.
        codes: entries of a codebook.
    """

    tokens: NDArray[np.int16]
    songs: tuple[Song, ...]
    captions: tuple[str, ...]
    codes: int


def load_codec(folder: Path) -> EnCodec:
    """musicgen_fast's codec, float32, from a folder that transformers' EncodecModel was saved to."""
    from safetensors.torch import load_file

    from musicgen_fast.checkpoints.codec_config import codec_config_from_transformers
    from musicgen_fast.checkpoints.codec_weights import canonical_codec_weights

    path = folder / "model.safetensors"
    config = codec_config_from_transformers(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if (config.sample_rate, config.hop_length, config.channels) != (RATE, FRAME, 1):
        raise ValueError(f"{folder}: the songs need a mono codec of {RATE} Hz with frames of {FRAME} samples")
    with torch.device("meta"):
        codec = EnCodec(config)
    codec.load_state_dict(canonical_codec_weights(load_file(path), config, str(path)), assign=True)
    return codec.eval().requires_grad_(False)


def encode_songs(codec: EnCodec, seeds: Sequence[int], frames: int) -> Tensor:
    """Codes int64 [B, K, frames] of the songs' first frames."""
    clips = [torch.from_numpy(render(compose(seed), frames + _TAIL)) for seed in seeds]
    return codec.encode(torch.stack(clips)[:, None])[0][..., :frames]


def make_tokens(
    codec_folder: Path,
    out: Path,
    clips: int,
    frames: int = 600,
    *,
    held: bool = False,
    batch: int = 8,
    log: bool = False,
) -> TokenSet:
    """Makes the data set, or the rest of it.

    Args:
        codec_folder: an EncodecModel in transformers' layout; the float16 one if that is what will be shipped.
        clips: rows N.
        frames: T, 525 to 600 (10.5 to 12 s) leave room for crops of 512 at other offsets.
        held: songs of negative seeds.
        batch: clips in one pass of the codec; part of what makes a run repeatable, as rounding depends on it.

    Raises:
        ValueError: `out` holds another data set.
    """
    if clips < 1 or frames < 1 or batch < 1:
        raise ValueError(f"clips, frames and batch must be at least 1, not {clips}, {frames} and {batch}")
    codec = load_codec(codec_folder)
    seeds = [-1 - i for i in range(clips)] if held else list(range(clips))
    fingerprint = hashlib.sha256((codec_folder / "model.safetensors").read_bytes()).hexdigest()
    meta = {
        "format": _FORMAT, "clips": clips, "books": codec.num_codebooks, "frames": frames, "held": held,
        "batch": batch, "codes": codec.cardinality, "codec": fingerprint,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    done, tokens = _opened(out, meta)
    began, first = time.monotonic(), done
    while done < clips:
        rows = range(done, min(done + batch, clips))
        tokens[rows.start : rows.stop] = encode_songs(codec, [seeds[row] for row in rows], frames).numpy()
        tokens.flush()  # before the note that says so
        done = rows.stop
        _write_json(out / "meta.json", {**meta, "done": done})
        if log:
            speed = (done - first) * frames / 50 / (time.monotonic() - began)
            end = "\n" if done == clips else ""
            print(f"\r{done} of {clips} clips, {speed:.0f} s of sound a second", end=end, flush=True)
    return read_tokens(out)


def _opened(out: Path, meta: dict[str, Any]) -> tuple[int, Any]:
    """Rows that are there, and the array; songs.jsonl is written where the set begins."""
    path, shape = out / "tokens.npy", (meta["clips"], meta["books"], meta["frames"])
    if (out / "meta.json").exists():
        found = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        other = [name for name, value in meta.items() if found.get(name) != value]
        if other:
            told = ", ".join(f"{name} {found.get(name)} instead of {meta[name]}" for name in other)
            raise ValueError(f"{out} holds another data set ({told}): take another folder, or remove it")
        return found["done"], np.lib.format.open_memmap(path, mode="r+")
    tokens = np.lib.format.open_memmap(path, mode="w+", dtype=np.int16, shape=shape)
    with (out / "songs.jsonl").open("w", encoding="utf-8") as file:
        for row in range(meta["clips"]):
            seed = -1 - row if meta["held"] else row
            song = compose(seed)
            file.write(json.dumps({"seed": seed, **asdict(song.labels), "caption": caption(song, seed)}) + "\n")
    _write_json(out / "meta.json", {**meta, "done": 0})
    return 0, tokens


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_tokens(folder: Path) -> TokenSet:
    """A data set that `make_tokens` finished; ValueError where it did not."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["format"] != _FORMAT or meta["done"] != meta["clips"]:
        missing = f"{meta['clips'] - meta['done']} of {meta['clips']} clips are missing"
        raise ValueError(f"{folder}: {missing}; run the command that made it again")
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    rows = [json.loads(line) for line in (folder / "songs.jsonl").read_text(encoding="utf-8").splitlines()]
    captions = tuple(row.pop("caption") for row in rows)
    songs = tuple(compose(row["seed"]) for row in rows)
    for row, song in zip(rows, songs, strict=True):
        if {"seed": row["seed"], **asdict(song.labels)} != row:
            raise ValueError(f"{folder}: song {row['seed']} is composed otherwise now; make the tokens again")
    return TokenSet(tokens, songs, captions, meta["codes"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo_model.tokens", description="Encode songs for the demo model's training."
    )
    parser.add_argument("codec", type=Path, help="folder of an EncodecModel, as train_codec writes them")
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--frames", type=int, default=600, help="of 20 ms in a clip (default 600)")
    parser.add_argument("--held", action="store_true", help="songs that training sets never hold")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own choice)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        make_tokens(args.codec, args.out, args.clips, args.frames, held=args.held, batch=args.batch, log=True)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A list of pieces made in this process, the whole way (text encoder, tokens, codec): this project's loop, or a peer.

    python -m musicgen_fast.bench.throughput_worker '{"kind": "loop", "model": "demo", "precision": "int8", ...}'

prints a JSON document as its last line: what was measured, or {"absent": why}. The fields are those of `Task`. A peer
reads a folder that the kind `write` made before, in a process of its own: so its peak memory holds nothing of ours.
Sounds are [channels, samples].
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..machine import synchronize
from .job import DTYPES, AbsentError
from .transformers_folder import load_folder, tokenizer_of, write_folder
from .worker import peak_bytes

__all__ = ["Facts", "Task", "batches", "loop", "run_transformers", "write_peer"]

Facts = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """`kind` loop (ours), write (the model and the pieces, for a peer, into `peer`) or transformers (from `peer`).

    `manifest` is a file of rows {"id", "prompt", "duration", "seed"}; sounds go to the folder `out`, `batch` at once.
    """

    kind: str
    model: str
    precision: str
    device: str
    manifest: str
    out: str = ""
    peer: str = ""
    batch: int = 1


class Clock:
    """Adds up what a way takes: making and writing apart, from the loaded model on."""

    def __init__(self, load_s: float, sample_rate: int, tokens_per_second: float, task: Task) -> None:
        self._load, self._rate, self._tokens, self._task = load_s, sample_rate, tokens_per_second, task
        self._making = self._writing = self._first = self._audio = 0.0

    def add(self, make: Callable[[], Any], names: list[str]) -> None:
        """Makes sounds (a list of them, or a tensor), writes them as `render` does, and notes both times."""
        from ..audio import audio_write

        start = perf_counter()
        sounds = make()
        synchronize(self._task.device)
        self._making += perf_counter() - start
        for name, sound in zip(names, sounds, strict=True):
            start = perf_counter()
            audio_write(Path(self._task.out) / name, sound.float().cpu(), self._rate, strategy="loudness")
            self._writing += perf_counter() - start
            self._first = self._first or self._load + self._making + self._writing
            self._audio += sound.shape[-1] / self._rate

    def facts(self) -> Facts:
        return {
            "seconds": self._making,
            "seconds_writing": self._writing,
            "seconds_first": self._first,
            "load_s": self._load,
            "audio_seconds": self._audio,
            "tokens_per_audio_second": self._tokens,
            "peak_bytes": peak_bytes(self._task.device),
        }


def loop(task: Task) -> Facts:
    """One `MusicGen.generate` per row, as a script would; in this process.

    {"seconds", "seconds_writing", "seconds_first", "load_s", "audio_seconds", "tokens_per_audio_second",
    "peak_bytes"}: `seconds` of `generate` alone; `seconds_first` from the beginning of loading to the first file,
    without the piece that warms up.
    """
    from ..musicgen import MusicGen

    began = perf_counter()
    model = MusicGen.get_pretrained(task.model, task.device, precision=task.precision)
    synchronize(task.device)
    loaded = perf_counter()
    model.set_generation_params(duration=0.5)
    model.generate(["warm up"], seed=[0])
    clock = Clock(loaded - began, model.sample_rate, model.frame_rate * model.lm.num_codebooks, task)
    for row in _rows(task.manifest):
        model.set_generation_params(duration=row["duration"])
        clock.add(partial(model.generate, [row["prompt"]], seed=[row["seed"]]), [row["id"]])
    return clock.facts()


def write_peer(task: Task) -> Facts:
    """The model in transformers' layout, and the pieces as ids and frames, into the folder `peer`.

    Matrices are stored in the precision that the peer will run in. AbsentError: see `write_folder`; and for pieces that
    are longer than its window.
    """
    folder, rows = Path(task.peer), _rows(task.manifest)
    checkpoint = write_folder(folder, task.model, DTYPES[task.precision])
    config, codec, tokenizer = checkpoint.config, checkpoint.codec_config, tokenizer_of(task.model, folder)
    if max(row["duration"] for row in rows) > config.max_duration:
        raise AbsentError(f"transformers makes one window, {config.max_duration:g} s here: take a lower --longest")
    pieces = {
        "sample_rate": codec.sample_rate, "hop": codec.hop_length, "codebooks": config.num_codebooks,
        "delay": config.num_codebooks // config.audio_channels - 1,
        "pieces": [
            {"id": row["id"], "ids": tokenizer.ids(row["prompt"]), "frames": int(row["duration"] * codec.frame_rate)}
            for row in rows
        ],
    }  # fmt: skip
    (folder / "pieces.json").write_text(json.dumps(pieces))
    return {}


def batches(pieces: list[Row], size: int) -> Iterator[list[Row]]:
    """The pieces by length, `size` at a time: a batch runs to its longest, so neighbours waste the least."""
    ordered = sorted(pieces, key=lambda piece: piece["frames"])
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def run_transformers(task: Task) -> Facts:
    """`MusicgenForConditionalGeneration.generate` on batches of the pieces, in the folder of `write_peer`.

    Guidance 3, top-k 250. A batch runs to its longest piece; the sounds are cut afterwards. The ids of the texts are
    read beforehand, which favours it a little. Facts as of `loop`.
    """
    told = json.loads((Path(task.peer) / "pieces.json").read_text())
    torch.manual_seed(0)
    began = perf_counter()
    # T5 and codec in it, too: with AMX the codec took 1.1 to 1.3 s in bfloat16 for 8 s of sound, 1.6 in float32
    model = load_folder(Path(task.peer), DTYPES[task.precision], task.device)
    synchronize(task.device)
    clock = Clock(
        perf_counter() - began, told["sample_rate"], told["sample_rate"] / told["hop"] * told["codebooks"], task
    )

    def make(batch: list[Row]) -> list[Tensor]:
        width = max(len(piece["ids"]) for piece in batch)
        ids = torch.tensor([piece["ids"] + [0] * (width - len(piece["ids"])) for piece in batch], device=task.device)
        mask = torch.tensor([[int(n < len(p["ids"])) for n in range(width)] for p in batch], device=task.device)
        wavs = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=250, guidance_scale=3.0,
            max_new_tokens=batch[-1]["frames"] + told["delay"],
        )  # fmt: skip
        return [wav[..., : piece["frames"] * told["hop"]] for wav, piece in zip(wavs, batch, strict=True)]

    make([{**told["pieces"][0], "frames": 25}])  # warm up, as ours does
    for batch in batches(told["pieces"], task.batch):
        clock.add(partial(make, batch), [piece["id"] for piece in batch])
    return clock.facts()


def _rows(manifest: str) -> list[Row]:
    return [json.loads(line) for line in Path(manifest).read_text().splitlines()]


_KINDS: dict[str, Callable[[Task], Facts]] = {"loop": loop, "write": write_peer, "transformers": run_transformers}


def main(fields: str) -> None:
    task = Task(**json.loads(fields))
    try:
        found = _KINDS[task.kind](task)
    except AbsentError as reason:
        found = {"absent": str(reason)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What the demo model is worth: `python -m examples.demo_model.evaluate MODEL TRAIN HELD OUT`.

MODEL is the shipped folder, TRAIN and HELD are token sets of its codec. Writes OUT.json and prints tables: nats per
codebook beside the unigram's, with and without captions; and how many clips sound as their prompts asked, beside chance
and beside the analyser's ceiling on true songs that went through the codec. Loads through `MusicGen.get_pretrained`,
as a user would. Trains nothing but the analyser.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicgen_fast import MusicGen
from musicgen_fast.evaluation import (
    Analyser,
    Score,
    markdown_table,
    measure,
    negative_log_likelihood,
    score,
    unigram_cross_entropy,
)

from .captions import caption, demands
from .synth import VALUES, Labels, Song, render, song_from
from .tokens import TokenSet, read_tokens

FIT_SEED, TRUE_SEED, PROMPT_SEED = 5_000_000, 6_000_000, 7_000_000  # songs that no training has seen
CLIPS_AT_ONCE = 16


def likelihood(model: MusicGen, train: TokenSet, held: TokenSet, clips: int, frames: int) -> dict[str, Any]:
    """Nats per codebook on held-out songs: unigram, the model with captions, and without."""
    tokens = torch.from_numpy(np.asarray(held.tokens[:clips, :, :frames], dtype=np.int64))
    seen = torch.from_numpy(np.asarray(train.tokens[:, :, :frames], dtype=np.int64))
    unigram = unigram_cross_entropy(seen, tokens, train.codes)
    found = negative_log_likelihood(model.lm, tokens, held.captions[:clips])
    blind = negative_log_likelihood(model.lm, tokens)
    return {
        "clips": len(tokens),
        "frames": frames,
        "unigram": unigram.tolist(),
        "with captions": found.per_codebook.tolist(),
        "standard error": found.standard_error.tolist(),
        "without captions": blind.per_codebook.tolist(),
    }


def likelihood_table(found: dict[str, Any]) -> str:
    """Markdown; the reduction is that of the model with captions against the unigram."""
    lines = ["| codebook | unigram | without captions | with captions | reduction |", "|---|---|---|---|---|"]
    rows = list(zip(found["unigram"], found["without captions"], found["with captions"], strict=True))
    rows.append(tuple(sum(column) / len(rows) for column in zip(*rows, strict=True)))
    names = [str(k + 1) for k in range(len(rows) - 1)] + ["mean"]
    for name, (unigram, blind, nats) in zip(names, rows, strict=True):
        lines.append(f"| {name} | {unigram:.3f} | {blind:.3f} | {nats:.3f} | {100 * (1 - nats / unigram):.0f} % |")
    return "\n".join(lines) + "\n"


def random_labels(count: int, seed: int) -> list[Labels]:
    """Every attribute drawn alike, each on its own."""
    rng = Random(f"labels {seed}")
    return [Labels(**{name: rng.choice(values) for name, values in VALUES.items()}) for _ in range(count)]


def full_caption(labels: Labels, seed: int) -> str:
    """A caption that names every attribute: the first of its kind among those of the seeds from `seed` on."""
    song = Song(labels, 1, 0, ())
    while True:
        text = caption(song, seed)
        said = demands(text)
        if all(said.get(name) == {getattr(labels, name)} for name in VALUES):
            return text
        seed += 1


def true_clips(model: MusicGen, labels: Sequence[Labels], seed: int, frames: int) -> list[Tensor]:
    """Songs with these labels as the codec makes them: what a perfect language model could sound like."""
    clips: list[Tensor] = []
    for first in range(0, len(labels), CLIPS_AT_ONCE):
        rows = range(first, min(first + CLIPS_AT_ONCE, len(labels)))
        wavs = [torch.from_numpy(render(song_from(labels[i], seed + i), frames)) for i in rows]
        codes = model.compression_model.encode(torch.stack(wavs)[:, None])[0]
        clips += list(model.compression_model.decode(codes)[:, 0])
    return clips


def generated_clips(model: MusicGen, prompts: Sequence[str], seed: int) -> list[Tensor]:
    """One clip per prompt with the parameters that the model has now."""
    clips: list[Tensor] = []
    for first in range(0, len(prompts), CLIPS_AT_ONCE):
        part = list(prompts[first : first + CLIPS_AT_ONCE])
        clips += list(model.generate(part, seed=seed + first)[:, 0])
    return clips


def adherence(model: MusicGen, prompts: int, seconds: float, top_k: int, fit_clips: int) -> dict[str, Any]:
    """Scores at cfg 1 and 3 of `seconds`, the ceiling, and of the last part of clips three windows long."""
    frames = round(seconds * model.frame_rate)
    fitted, true = random_labels(fit_clips, 1), random_labels(prompts, 2)
    analyser = Analyser.fitted(true_clips(model, fitted, FIT_SEED, frames), _rows(fitted), model.sample_rate)
    ceiling = score(
        analyser.labels(measure(true_clips(model, true, TRUE_SEED, frames), model.sample_rate)), _rows(true)
    )
    wanted = random_labels(prompts, 3)
    texts = [full_caption(labels, PROMPT_SEED + 1000 * i) for i, labels in enumerate(wanted)]
    columns: dict[str, dict[str, Score]] = {}

    def judge(name: str, clips: Sequence[Tensor], labels: Sequence[Labels]) -> None:
        columns[name] = score(analyser.labels(measure(clips, model.sample_rate)), _rows(labels))

    for cfg in (1.0, 3.0):
        model.set_generation_params(duration=seconds, top_k=top_k, cfg_coef=cfg)
        judge(f"cfg {cfg:g}", generated_clips(model, texts, 11), wanted)
    window = model.max_duration
    model.set_generation_params(duration=3 * window, top_k=top_k, cfg_coef=3.0)
    half = len(texts) // 2
    samples = round(seconds * model.sample_rate)
    ends = [clip[-samples:] for clip in generated_clips(model, texts[:half], 12)]
    judge(f"end of {3 * window:g} s", ends, wanted[:half])
    print(markdown_table(columns, ceiling), flush=True)
    return {
        "prompts": prompts,
        "seconds": seconds,
        "top_k": top_k,
        "analyser clips": fit_clips,
        "ceiling": _numbers(ceiling),
        **{name: _numbers(scores) for name, scores in columns.items()},
    }


def _rows(labels: Sequence[Labels]) -> list[dict[str, str]]:
    return [asdict(row) for row in labels]


def _numbers(scores: dict[str, Score]) -> dict[str, dict[str, float]]:
    return {
        name: {"n": s.n, "hits": s.hits, "chance": s.chance, "accuracy": s.accuracy, "z": s.z}
        for name, s in scores.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo_model.evaluate",
        description="Measure the demo model on held-out songs and prompts.",
    )
    parser.add_argument("model", type=Path, help="the shipped folder")
    parser.add_argument("train", type=Path, help="token set that it was trained on, for the unigram")
    parser.add_argument("held", type=Path, help="held-out token set")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--clips", type=int, default=64, help="held-out clips for the likelihood (default 64)")
    parser.add_argument("--frames", type=int, default=500, help="of each (default 500, 10 s)")
    parser.add_argument("--prompts", type=int, default=128, help="default 128")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a judged clip (default 6)")
    parser.add_argument("--top-k", type=int, default=100, help="default 100")
    parser.add_argument("--fit-clips", type=int, default=400, help="true songs that the analyser learns from")
    args = parser.parse_args(argv)
    began = time.monotonic()
    model = MusicGen.get_pretrained(args.model, device="cpu")
    train, held = read_tokens(args.train), read_tokens(args.held)
    report: dict[str, Any] = {"likelihood": likelihood(model, train, held, args.clips, args.frames)}
    print(likelihood_table(report["likelihood"]), flush=True)
    report["adherence"] = adherence(model, args.prompts, args.seconds, args.top_k, args.fit_clips)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out} after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

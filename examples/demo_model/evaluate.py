"""What the demo model is worth: `python -m examples.demo_model.evaluate MODEL TRAIN HELD OUT`.

MODEL is the shipped folder, TRAIN and HELD are token sets of its codec. Writes OUT.json and prints tables: figures of
the codec; nats per codebook beside the unigram's, with and without captions; and how many clips sound as their prompts
asked, beside chance and beside the analyser's ceiling on true songs that went through the codec. Loads through
`MusicGen.get_pretrained`, as a user would. Trains nothing but the analyser.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
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
    codebook_perplexity,
    codec_figures,
    markdown_table,
    mu_law,
    negative_log_likelihood,
    score,
    unigram_cross_entropy,
)

from .captions import GROUP, GROUPS, caption, demands, melody_from, spelled
from .codec_data import held_out_excerpts, held_out_songs, read_tracks
from .melody import agreement
from .synth import VALUES, Labels, Song, render, song_from
from .tokens import TokenSet, read_tokens

FIT_SEED, TRUE_SEED, PROMPT_SEED = 5_000_000, 6_000_000, 7_000_000  # songs that no training has seen
CLIPS_AT_ONCE = 16


def codec_figures_table(model: MusicGen, clips: int, frames: int = 100) -> dict[str, Any]:
    """Figures of the codec on held-out songs and tracks beside random codes and mu-law, and the codebooks' use.

    The tracks are left out where `immich_memories_music` is not installed.
    """
    codec, rate = model.compression_model, model.sample_rate
    sets = {"synth": held_out_songs(clips, frames)}
    if kept := read_tracks()[1]:
        sets["real"] = held_out_excerpts(kept, clips, frames)
    found: dict[str, Any] = {}
    pooled: list[Tensor] = []
    for name, wav in sets.items():
        codes = codec.encode(wav[:, None])[0]
        pooled.append(codes)
        drawn = torch.randint(codec.cardinality, codes.shape, generator=torch.Generator().manual_seed(0))
        rows = {"codec": codec.decode(codes)[:, 0], "random codes": codec.decode(drawn)[:, 0]}
        rows |= {f"mu-law {bits} bits": mu_law(wav, bits) for bits in (4, 2)}
        figures = {row: asdict(codec_figures(list(wav), list(other), rate)) for row, other in rows.items()}
        found[name] = {**figures, "perplexity": codebook_perplexity(codes, codec.cardinality).tolist()}
    together = codebook_perplexity(torch.cat(pooled), codec.cardinality).tolist()
    return {"clips": clips, "frames": frames, "codes": codec.cardinality, **found, "perplexity of both": together}


def codec_markdown(found: dict[str, Any]) -> str:
    lines = ["| held-out | | spectral convergence | log-mel | SI-SNR, dB | codes in use |", "|---|---|---|---|---|---|"]
    for name in ("synth", "real"):
        for row, figures in found.get(name, {}).items():
            if row == "perplexity":
                continue
            numbers = " | ".join(f"{value:.2f}" for value in figures.values())
            used = ", ".join(f"{p:.0f}" for p in found[name]["perplexity"]) if row == "codec" else ""
            lines.append(f"| {name} | {row} | {numbers} | {used} |")
    lines.append("| both | | | | | " + ", ".join(f"{p:.0f}" for p in found["perplexity of both"]) + " |")
    return "\n".join(lines) + "\n"


def likelihood(model: MusicGen, train: TokenSet, held: TokenSet, clips: int, spans: Sequence[int]) -> dict[str, Any]:
    """Nats per codebook on the first frames of held-out songs: unigram, the model without captions, with those of other
    songs, with their own, and with captions that name every label and spell the whole melody."""
    texts = list(held.captions[:clips])
    full = [full_caption(song, PROMPT_SEED + 1000 * i) for i, song in enumerate(held.songs[:clips])]
    found: dict[str, Any] = {"clips": len(texts)}
    for frames in spans:
        tokens = torch.from_numpy(np.asarray(held.tokens[:clips, :, :frames], dtype=np.int64))
        seen = torch.from_numpy(np.asarray(train.tokens[:, :, :frames], dtype=np.int64))
        columns: dict[str, Any] = {"unigram": unigram_cross_entropy(seen, tokens, train.codes).tolist()}
        given = {"without": None, "of another": texts[1:] + texts[:1], "with captions": texts, "that say all": full}
        for name, descriptions in given.items():
            nats = negative_log_likelihood(model.lm, tokens, descriptions)
            columns[name] = nats.per_codebook.tolist()
        columns["standard error"] = nats.standard_error.tolist()
        found[str(frames)] = columns
    return found


def likelihood_table(found: dict[str, Any]) -> str:
    """Markdown, nats per token; the reduction is that of the model with captions against the unigram."""
    titles = ("unigram", "without", "of another", "with captions", "that say all")
    lines = ["| frames | codebook | " + " | ".join(titles) + " | reduction |", "|---" * (len(titles) + 3) + "|"]
    for frames, columns in found.items():
        if frames == "clips":
            continue
        rows = list(zip(*(columns[title] for title in titles), strict=True))
        rows.append(tuple(sum(column) / len(rows) for column in zip(*rows, strict=True)))
        for name, row in zip([*map(str, range(1, len(rows))), "mean"], rows, strict=True):
            numbers = " | ".join(f"{nats:.3f}" for nats in row)
            lines.append(f"| {frames} | {name} | {numbers} | {100 * (1 - row[3] / row[0]):.0f} % |")
    return "\n".join(lines) + "\n"


def melody_table(found: dict[str, float]) -> str:
    """Markdown, percent."""
    names = [name for name in found if name != "prompts"]
    rows = [names, ["---:"] * len(names), [f"{100 * found[name]:.0f}" for name in names]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def random_labels(count: int, seed: int) -> list[Labels]:
    """Every attribute drawn alike, each on its own."""
    rng = Random(f"labels {seed}")
    return [Labels(**{name: rng.choice(values) for name, values in VALUES.items()}) for _ in range(count)]


def full_caption(song: Song, seed: int) -> str:
    """A caption that names every label, and spells the window's melody of a song that has one: the first of its kind
    among those of the seeds from `seed` on."""
    melody = spelled(melody_from(song, 0, GROUP * GROUPS), song.labels.mode) if song.melody else ""
    while True:
        text = caption(song, seed)
        said = demands(text)
        if text.endswith(melody) and all(said.get(name) == {getattr(song.labels, name)} for name in VALUES):
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
    """Scores at cfg 1, 2 and 3 of `seconds`, the ceiling, and of the last part of clips three windows long; and for
    each attribute the clips that cfg 3 wins and loses against cfg 1 (prompts and seeds are the same)."""
    frames = round(seconds * model.frame_rate)
    fitted, true = random_labels(fit_clips, 1), random_labels(prompts, 2)
    tempi = sorted({replace(fitted[0], tempo=tempo).bpm for tempo in VALUES["tempo"]})
    analyser = Analyser.fitted(
        true_clips(model, fitted, FIT_SEED, frames), _rows(fitted), model.sample_rate, candidates=tempi
    )
    judged = _told(analyser.labels(analyser.measure(true_clips(model, true, TRUE_SEED, frames))))
    ceiling = score(judged, _told(_rows(true)))
    wanted = random_labels(prompts, 3)
    texts = [full_caption(Song(labels), PROMPT_SEED + 1000 * i) for i, labels in enumerate(wanted)]
    columns: dict[str, dict[str, Score]] = {}
    heard: dict[str, list[dict[str, str]]] = {}

    def judge(name: str, clips: Sequence[Tensor], labels: Sequence[Labels]) -> None:
        heard[name] = _told(analyser.labels(analyser.measure(clips)))
        columns[name] = score(heard[name], _told(_rows(labels)))

    for cfg in (1.0, 2.0, 3.0):
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
        "won, lost": won_and_lost(heard["cfg 1"], heard["cfg 3"], _told(_rows(wanted))),
        **{name: _numbers(scores) for name, scores in columns.items()},
    }


def won_and_lost(
    before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]], wanted: Sequence[Mapping[str, str]]
) -> dict[str, tuple[int, int]]:
    """For each attribute the clips whose verdict is the wanted one only afterwards, and only before."""
    rows = list(zip(before, after, wanted, strict=True))
    return {
        name: (
            sum(b[name] != w[name] == a[name] for b, a, w in rows),
            sum(a[name] != w[name] == b[name] for b, a, w in rows),
        )
        for name in wanted[0]
    }


def melodies(model: MusicGen, prompts: int, seconds: float, top_k: int) -> dict[str, float]:
    """Shares of the steps in which the spelled note is heard: in true songs through the codec, in pieces at cfg 1 and
    3; and in those at cfg 3 of the melody of another prompt, which is what chance makes."""
    labels = random_labels(prompts, 4)
    songs = [song_from(each, TRUE_SEED + 10_000 + i) for i, each in enumerate(labels)]
    texts = [full_caption(song, PROMPT_SEED + 1000 * i) for i, song in enumerate(songs)]

    def mean(clips: Sequence[Tensor], played: Sequence[Song]) -> float:
        pairs = zip(clips, played, strict=True)
        return float(np.mean([agreement(clip.numpy(), song.melody, song.labels.mode) for clip, song in pairs]))

    frames = round(seconds * model.frame_rate)
    found = {"ceiling": mean(true_clips(model, labels, TRUE_SEED + 10_000, frames), songs)}
    for cfg in (1.0, 3.0):
        model.set_generation_params(duration=seconds, top_k=top_k, cfg_coef=cfg)
        clips = generated_clips(model, texts, 13)
        found[f"cfg {cfg:g}"] = mean(clips, songs)
    # Another song of the same mode: a scale has its own notes.
    others = [
        next(other for other in songs[i + 1 :] + songs[:i] if other.labels.mode == song.labels.mode)
        for i, song in enumerate(songs)
    ]
    return found | {"of another": mean(clips, others), "prompts": prompts}


def _rows(labels: Sequence[Labels]) -> list[dict[str, str]]:
    return [asdict(row) for row in labels]


def _told(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The labels, and whether there are drums at all."""
    return [{**row, "drums or none": "none" if row["drums"] == "off" else "drums"} for row in rows]


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
    parser.add_argument("--spans", type=int, nargs="+", default=[25, 50, 500], help="first frames (default 25 50 500)")
    parser.add_argument("--prompts", type=int, default=256, help="default 256")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a judged clip (default 6)")
    parser.add_argument("--top-k", type=int, default=100, help="default 100")
    parser.add_argument("--fit-clips", type=int, default=400, help="true songs that the analyser learns from")
    args = parser.parse_args(argv)
    began = time.monotonic()
    model = MusicGen.get_pretrained(args.model, device="cpu")
    train, held = read_tokens(args.train), read_tokens(args.held)
    report: dict[str, Any] = {"codec": codec_figures_table(model, min(args.clips, 36))}
    print(codec_markdown(report["codec"]), flush=True)
    report["likelihood"] = likelihood(model, train, held, args.clips, args.spans)
    print(likelihood_table(report["likelihood"]), flush=True)
    report["adherence"] = adherence(model, args.prompts, args.seconds, args.top_k, args.fit_clips)
    report["melody"] = melodies(model, args.prompts // 4, args.seconds, args.top_k)
    print(melody_table(report["melody"]), flush=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out} after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

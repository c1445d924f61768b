"""What streaming costs: EnCodec 32 kHz decoded in chunks, against one decode of all; random weights, one process.

    python benchmarks/bench_codec_stream.py --seconds 10 --chunks 10 25 50 100 --rounds 3

The peer is what streaming with transformers does (the `MusicgenStreamer` of its demo): at each chunk its codec decodes
all codes so far. All take turns on the same codes; the ratios are to the one decode of the same round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch
from bench_codec import CODEBOOKS, CODES, HOP, RATE, codecs
from torch import Tensor

from musicgen_fast.bench.machine import append_json, machine_card, synchronize
from musicgen_fast.codec import EnCodec
from musicgen_fast.codec_stream import StreamingDecoder


@dataclass(frozen=True)
class Row:
    """One way in one round; `ratio` to the one decode, `slowest_chunk` in seconds, `error` relative to the peak."""

    way: str
    chunk: int
    round: int
    seconds_per_second: float
    ratio: float
    slowest_chunk: float
    error: float | None


Chunks = tuple[Tensor, ...]
Way = Callable[[Chunks, list[float]], Tensor | None]


def streamed(codec: EnCodec, chunks: Chunks, stamps: list[float]) -> Tensor:
    decoder = StreamingDecoder(codec, chunks[0].shape[0])
    parts = []
    for chunk in chunks:
        parts.append(decoder.push(chunk))
        stamp(stamps, chunk)
    parts.append(decoder.finish())
    stamp(stamps, chunks[0])
    return torch.cat(parts, dim=2)


def decoded_again(decode: Callable[[Tensor], Tensor], chunks: Chunks, stamps: list[float]) -> None:
    """All codes so far at each chunk. Its sound is not compared: a streamer of this kind cuts the inexact end off."""
    for count in range(1, len(chunks) + 1):
        decode(torch.cat(chunks[:count], dim=2))
        stamp(stamps, chunks[0])


def at_once(codec: EnCodec, chunks: Chunks, stamps: list[float]) -> Tensor:
    sound = codec.decode(torch.cat(chunks, dim=2))
    stamp(stamps, chunks[0])
    return sound


def stamp(stamps: list[float], tensor: Tensor) -> None:
    synchronize(tensor.device.type)
    stamps.append(perf_counter())


def timed(way: Way, chunks: Chunks) -> tuple[float, float, Tensor | None]:
    """Seconds of all, seconds of the slowest chunk, the sound."""
    stamps: list[float] = []
    stamp(stamps, chunks[0])
    sound = way(chunks, stamps)
    return stamps[-1] - stamps[0], max(b - a for a, b in zip(stamps, stamps[1:], strict=False)), sound


@torch.no_grad()
def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    card = machine_card(args.device)
    print(f"{card['gpu'] or card['cpu']}, {args.threads} threads, torch {torch.__version__}, commit {card['commit']}")
    theirs, ours = codecs(args.device)
    frames = round(args.seconds * RATE / HOP)
    codes = torch.randint(0, CODES, (args.batch, CODEBOOKS, frames)).to(args.device)
    ways: dict[str, Way] = {"stream": partial(streamed, ours)}
    if not args.without_peer:
        ways["transformers, all again"] = partial(decoded_again, lambda codes: theirs.decode(codes[None], [None])[0])
    turns = [(name, chunk) for chunk in args.chunks for name in ways]
    for way in [partial(at_once, ours), *ways.values()]:
        timed(way, codes[:, :, :50].split(10, dim=2))
    rows: list[Row] = []
    for number in range(args.rounds):
        whole, slowest, expected = timed(partial(at_once, ours), (codes,))
        assert expected is not None
        rows.append(Row("at once", frames, number, whole / args.seconds, 1.0, slowest, 0.0))
        for name, chunk in turns[:: 1 if number % 2 == 0 else -1]:
            total, slowest, sound = timed(ways[name], codes.split(chunk, dim=2))
            error = None if sound is None else ((sound - expected).abs().max() / expected.abs().max()).item()
            rows.append(Row(name, chunk, number, total / args.seconds, total / whole, slowest, error))
    print(table(rows))
    shape = {"device": args.device, "threads": args.threads, "batch": args.batch, "seconds": args.seconds}
    append_json(args.json, [{"benchmark": "codec_stream", **vars(row), **shape, "machine": card} for row in rows])


def table(rows: list[Row]) -> str:
    """Markdown: medians over the rounds; of the ratio also least and most."""
    lines = [
        "| way | frames a chunk | s per s of audio | times one decode | slowest chunk, ms | max relative error |",
        "|---|---|---|---|---|---|",
    ]
    for way, chunk in sorted({(row.way, row.chunk) for row in rows}):
        group = [row for row in rows if (row.way, row.chunk) == (way, chunk)]
        ratios = sorted(row.ratio for row in group)
        ratio = f"{median(ratios):.3f} [{ratios[0]:.3f}..{ratios[-1]:.3f}]"
        times = f"{median(row.seconds_per_second for row in group):.4f}"
        slowest = f"{1000 * median(row.slowest_chunk for row in group):.1f}"
        errors = [row.error for row in group if row.error is not None]
        lines.append(f"| {way} | {chunk} | {times} | {ratio} | {slowest} | {f'{max(errors):.1e}' if errors else ''} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the audio")
    parser.add_argument("--chunks", type=int, nargs="+", default=[10, 25, 50, 100], help="frames a chunk, 50 a second")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peer", action="store_true", help="only this project")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a way, chunk and round")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Seconds of codec per second of audio, beside transformers: EnCodec 32 kHz, random weights, both in one process.

    python benchmarks/bench_codec.py --seconds 10 30 --rounds 3 --json benchmarks/results/codec.jsonl

The two take turns on the same codes and waveforms, and their results are compared: a relative error for sound, the
share of codes that differ for encoding (a code differs where two entries are about equally near).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from musicgen_fast.bench.machine import append_json, machine_card, synchronize
from musicgen_fast.checkpoints.codec_weights import canonical_codec_weights, codec_config_from_transformers
from musicgen_fast.codec import EnCodec

RATE, HOP, CODEBOOKS, CODES = 32000, 640, 4, 2048


@dataclass(frozen=True)
class Row:
    """One provider, direction and length in one round; `error` against the other provider."""

    provider: str
    direction: str
    seconds: float
    round: int
    seconds_per_second: float
    error: float


def codecs(device: str) -> tuple[Any, EnCodec]:
    """transformers' model and ours, with the same random weights."""
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        sampling_rate=RATE, target_bandwidths=[2.2], codebook_size=CODES, num_filters=64,
        upsampling_ratios=[8, 5, 4, 4], use_causal_conv=False, use_conv_shortcut=False,
    )  # fmt: skip
    theirs = EncodecModel(config).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        # as drawn, biases drown what goes in: small ones, and louder weights (original0: of weight norm)
        parameter.mul_(0.1 if "bias" in name else 2.0 if "original0" in name else 1.0)
    for layer in theirs.quantizer.layers:
        layer.codebook.embed.normal_(std=0.3)
    shapes = codec_config_from_transformers(config.to_dict())
    with torch.device("meta"):
        ours = EnCodec(shapes)
    ours.load_state_dict(canonical_codec_weights(theirs.state_dict(), shapes, "transformers"), assign=True)
    return theirs.to(device), ours.eval().to(device)


def runs(device: str) -> dict[str, dict[str, Callable[[Tensor], Tensor]]]:
    """direction -> provider -> function of codes [1, K, T] or a waveform [1, 1, n]."""
    theirs, ours = codecs(device)
    return {
        "decode": {
            "musicgen_fast": ours.decode,
            "transformers": lambda codes: theirs.decode(codes[None], [None]).audio_values,
        },
        "encode": {
            "musicgen_fast": lambda wav: ours.encode(wav)[0],
            "transformers": lambda wav: theirs.encode(wav).audio_codes[0],
        },
    }


def difference(result: Tensor, other: Tensor) -> float:
    """Largest error of a waveform relative to its peak; share of different codes."""
    if result.is_floating_point():
        return ((result - other).abs().max() / other.abs().max()).item()
    return (result != other).double().mean().item()


def inputs(seconds: float, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    frames = int(seconds * RATE / HOP)
    codes = torch.randint(0, CODES, (1, CODEBOOKS, frames), generator=generator)
    wav = 0.1 * torch.randn(1, 1, frames * HOP, generator=generator)
    return {"decode": codes.to(device), "encode": wav.to(device)}


@torch.no_grad()
def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    card = machine_card(args.device)
    print(f"{card['gpu'] or card['cpu']}, {args.threads} threads, torch {torch.__version__}, commit {card['commit']}")
    functions = runs(args.device)
    warm = inputs(1.0, args.device)
    for direction, providers in functions.items():
        for run in providers.values():
            run(warm[direction])
    rows: list[Row] = []
    for number in range(args.rounds):
        for seconds in args.seconds:
            given = inputs(seconds, args.device)
            for direction, providers in functions.items():
                names = list(providers)[:: 1 if number % 2 == 0 else -1]
                rows += one_turn({n: providers[n] for n in names}, direction, given[direction], seconds, number)
    print(table(rows))
    lines = [{"benchmark": "codec", **vars(row), "device": args.device, "threads": args.threads} for row in rows]
    append_json(args.json, [{**line, "machine": card} for line in lines])


def one_turn(
    providers: dict[str, Callable[[Tensor], Tensor]], direction: str, given: Tensor, seconds: float, number: int
) -> list[Row]:
    times, results = {}, {}
    for name, run in providers.items():
        synchronize(given.device.type)
        start = perf_counter()
        results[name] = run(given)
        synchronize(given.device.type)
        times[name] = (perf_counter() - start) / seconds
    error = difference(results["musicgen_fast"], results["transformers"])
    return [Row(name, direction, seconds, number, time, error) for name, time in times.items()]


def table(rows: list[Row]) -> str:
    """Markdown: seconds of work per second of audio, median [least..most] over the rounds."""
    lines = [
        "| direction | audio | musicgen_fast | transformers | times faster | max relative error, differing codes |",
        "|---|---|---|---|---|---|",
    ]
    for direction, seconds in dict.fromkeys((row.direction, row.seconds) for row in rows):
        group = [row for row in rows if (row.direction, row.seconds) == (direction, seconds)]
        ours, theirs = (
            sorted(row.seconds_per_second for row in group if row.provider == name)
            for name in ("musicgen_fast", "transformers")
        )
        spans = [f"{v[len(v) // 2]:.4f} [{v[0]:.4f}..{v[-1]:.4f}]" for v in (ours, theirs)]
        faster = theirs[len(theirs) // 2] / ours[len(ours) // 2]
        error = max(row.error for row in group)
        lines.append(f"| {direction} | {seconds:g} s | {' | '.join(spans)} | {faster:.2f} | {error:.1e} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 30.0], help="lengths of the audio")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a provider, direction, length and round")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""`musicgen-fast bench throughput`: seconds of audio per second for a list of pieces, beside transformers' batches."""

from __future__ import annotations

import argparse
from typing import Any

from .options import PRECISIONS, add_kind, at_least, machine_options, names, output_options, sayer, seconds, several

NAME = "throughput"
PROVIDERS = ("musicgen_fast", "transformers", "audiocraft")
_ABOUT = """\
Seconds of audio per second for a list of pieces of mixed lengths, the whole way: text encoder, tokens, codec. These
ways side by side, each in a process of its own that loads the model once, in another order each round:

  musicgen_fast  one `MusicGen.generate` per piece, and `musicgen-fast render` with each number of slots
  transformers   its `generate` on batches of the pieces sorted by length, each batch as long as its longest piece

transformers runs the same shapes, weights and texts (text models only), in the fastest precision that it has.
"x generate" is against our loop, "x transformers" against its best batch of the same round. The time for writing files
counts for render alone.
"""


def add(kinds: Any) -> argparse.ArgumentParser:
    """`throughput` among the kinds."""
    parser = add_kind(kinds, NAME, run, help="seconds of audio per second for many pieces", about=_ABOUT)
    parser.add_argument(
        "-m", "--model", default="demo", help="demo, random:SIZE, hub id or folder (default: %(default)s)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="default: int8 on a CPU, float16 on a GPU")
    machine_options(parser)
    parser.add_argument("--pieces", type=at_least(1), default=64, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--shortest",
        type=_length,
        default=1.0,
        metavar="S",
        help="seconds of the shortest piece (default: %(default)g)",
    )
    parser.add_argument(
        "--longest", type=_length, default=8.0, metavar="S", help="seconds of the longest piece (default: %(default)g)"
    )
    parser.add_argument(
        "--batches", type=several(at_least(1)), default=[8, 16], metavar="N,N", help="slots of render (default: 8,16)"
    )
    parser.add_argument(
        "--peer-batches", type=several(at_least(1)), metavar="N,N",
        help="batches of transformers (default: 1 and those of --batches)",
    )  # fmt: skip
    parser.add_argument(
        "--providers", type=names(PROVIDERS), default=["musicgen_fast", "transformers"], metavar="NAMES",
        help=f"some of {','.join(PROVIDERS)} (default: musicgen_fast,transformers)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--timeout", type=seconds, default=1800.0, metavar="S", help="seconds for a process (default: %(default)g)"
    )
    output_options(parser, "one JSON line a way")
    return parser


def _length(text: str) -> float:
    """Seconds, in tenths: pieces are as long as whole tenths."""
    value = round(seconds(text), 1)
    if value < 0.1:
        raise argparse.ArgumentTypeError(f"expected at least 0.1 seconds, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code. RuntimeError where a way of this project could not be timed."""
    if args.longest < args.shortest:
        raise argparse.ArgumentError(None, f"--longest {args.longest:g} is below --shortest {args.shortest:g}")
    import torch

    from ..bench.machine import append_json, machine_card
    from ..bench.throughput import Work, run_rounds, ways
    from ..bench.throughput_lines import lines, table
    from ..config import named_config
    from ..loading import pick_device, pick_precision

    say = sayer(args)
    device = pick_device(args.device)
    precision = pick_precision(args.precision or "auto", device)
    if args.model.startswith("random:"):
        named_config(args.model.removeprefix("random:"))
    threads = args.threads or torch.get_num_threads()
    work = Work(args.model, precision, str(device), args.pieces, args.shortest, args.longest, threads)
    card = machine_card(str(device))
    say(f"{card['gpu'] or card['cpu']}, {threads} threads, torch {torch.__version__}")
    every = ways(args.providers, args.batches, args.peer_batches or sorted({1, *args.batches}))
    found = run_rounds(work, every, args.rounds, say, args.timeout)
    told = lines(work, found, card)
    if args.json != "-":
        print(table(told))
    append_json(args.json, told)
    for way, why in found.absent.items():
        say(f"{way.provider}, {way.way}, {way.batch} at once is absent: {why}")
    for way, why in found.absent.items():
        if way.provider == "musicgen_fast":
            raise RuntimeError(f"musicgen_fast, {way.way}, {way.batch} at once, could not be timed: {why}")
    return 0

"""`musicgen-fast bench latency`: milliseconds a step, beside other implementations."""

from __future__ import annotations

import argparse
from typing import Any

from .options import PRECISIONS, add_kind, at_least, machine_options, names, output_options, sayer

NAME = "latency"
PROVIDERS = ("musicgen_fast", "transformers", "transformers_compiled", "audiocraft", "openvino", "fast_musicgen")
FEWEST_STEPS = 10
LAST_POSITION = 1503  # columns of a window of 30 s
_ABOUT = """\
Milliseconds per decoding step, with guidance, beside other implementations on the same machine in the same run. Every
provider runs in a process of its own, in another order each round. The floor is the time of reading the bytes of a step
(weights, keys and values), measured with as many threads.

parity: of float32, whether the tokens equal those of the torch decoder; of the others, whether the relative error of
the logits is within a limit. Peers that lack a precision run in the fastest that they have, which the line names.
"""


def add(kinds: Any) -> argparse.ArgumentParser:
    """`latency` among the kinds."""
    parser = add_kind(kinds, NAME, run, help="milliseconds per decoding step", about=_ABOUT)
    parser.add_argument(
        "-m", "--model", default="random:small",
        help="random:SIZE, hub id, folder or demo; peers run its shapes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", type=names(PRECISIONS), action="extend", metavar="NAMES",
        help=f"some of {','.join(PRECISIONS)} (default: float32 on a CPU, float16 on a GPU)",
    )  # fmt: skip
    machine_options(parser)
    parser.add_argument(
        "--steps", type=at_least(FEWEST_STEPS), default=200, metavar="N",
        help="a round, the first 20 (at most half) left out (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--positions",
        type=_positions,
        metavar="N,N",
        help="steps around these positions of a window instead of its first",
    )
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--providers", type=names(PROVIDERS), metavar="NAMES",
        help=f"some of {','.join(PROVIDERS)} (default: ours and those that are installed)",
    )  # fmt: skip
    parser.add_argument(
        "--text-tokens", type=at_least(1), default=16, metavar="N", help="states of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--parity-frames", type=at_least(0), default=40, metavar="N",
        help="frames over which parity is looked at; 0: not at all (default: %(default)s)",
    )  # fmt: skip
    output_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code. RuntimeError where this project's own decoder could not be timed."""
    import torch

    from ..bench.job import Job
    from ..bench.latency import jobs_for, lines, parities, run_rounds, starts_for, table
    from ..bench.machine import append_json, machine_card
    from ..config import named_config
    from ..loading import pick_device

    say = sayer(args)
    device = pick_device(args.device)
    if args.model.startswith("random:"):
        named_config(args.model.removeprefix("random:"))
    threads = args.threads or torch.get_num_threads()
    if args.positions and args.steps > LAST_POSITION:
        raise ValueError(f"--steps must be at most {LAST_POSITION} with --positions: blocks lie within a window")
    warmup = min(20, args.steps // 2)
    starts = starts_for(args.positions, args.steps, warmup) if args.positions else (0,)
    base = Job("", args.model, "", str(device), threads, args.steps, warmup, starts, text_tokens=args.text_tokens)
    precisions = args.precision or (["float32"] if device.type == "cpu" else ["float16"])
    jobs = jobs_for(base, dict.fromkeys(precisions), args.providers)
    card = machine_card(str(device))
    say(f"{card['gpu'] or card['cpu']}, {threads} threads, torch {torch.__version__}")
    rows, absent = run_rounds(jobs, args.rounds, say)
    parity = parities(jobs, absent, args.parity_frames, say)
    if args.json != "-":
        print(table(rows, absent, parity))
    append_json(args.json, lines(rows, absent, parity, card))
    for (provider, precision), why in absent.items():
        say(f"{provider} {precision} is absent: {why}")
        if provider == "musicgen_fast":
            raise RuntimeError(f"musicgen_fast could not be timed in {precision}: {why}")
    return 0


def _positions(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < LAST_POSITION for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected positions 0..{LAST_POSITION - 1}, such as 16,768,1480, got {text!r}"
        )
    return [int(part) for part in parts]

"""`musicgen-fast bench stream`: how soon sound comes, and whether a player would run dry."""

from __future__ import annotations

import argparse
from typing import Any, cast

from .options import PRECISIONS, add_kind, at_least, machine_options, names, output_options, sayer, seconds

NAME = "stream"
PROVIDERS = ("musicgen_fast", "transformers")
_ABOUT = """\
What a listener meets: when the first sound is there, in a fresh process (cold) and later; the gaps between chunks; and
for how long a player who starts with the first chunk would have been silent before the end, and how often. By as much
he would have to start later to hear no silence. Every provider runs in a process of its own, in another order each
round, with the same weights.

transformers streams as its users do: after every --peer-chunk seconds of tokens it decodes all of them so far and plays
what is new. It has no windows. Peers that lack a precision run in the fastest that they have, which the line names.
"""


def add(kinds: Any) -> argparse.ArgumentParser:
    """`stream` among the kinds."""
    parser = add_kind(kinds, NAME, run, help="time to the first sound, gaps, silence", about=_ABOUT)
    parser.add_argument(
        "-m", "--model", default="demo", help="demo, folder, hub id or random:SIZE (default: %(default)s)"
    )
    parser.add_argument(
        "--precision", type=names(PRECISIONS), action="extend", metavar="NAMES",
        help=f"some of {','.join(PRECISIONS)} (default: int8 on a CPU, float16 on a GPU)",
    )  # fmt: skip
    machine_options(parser)
    parser.add_argument(
        "--duration", type=seconds, default=12.0, metavar="SECONDS", help="of a stream (default: %(default)s)"
    )
    parser.add_argument(
        "--window", type=seconds, metavar="SECONDS",
        help="ours only: a shorter window, so that windows change on the way (default: the model's)",
    )  # fmt: skip
    parser.add_argument(
        "--peer-chunk", type=seconds, default=1.0, metavar="SECONDS",
        help="between two decodes of the peer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--providers", type=names(PROVIDERS), metavar="NAMES", default=list(PROVIDERS),
        help=f"some of {','.join(PROVIDERS)} (default: both)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", help="after which a process counts as failed (default: never)"
    )
    output_options(parser, "one JSON line a provider and precision")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code. RuntimeError where this project's own stream could not be timed."""
    import torch

    from ..bench.latency import jobs_for
    from ..bench.machine import append_json, machine_card
    from ..bench.stream import StreamJob, lines, run_rounds, table
    from ..config import named_config
    from ..loading import pick_device

    say = sayer(args)
    device = pick_device(args.device)
    if args.model.startswith("random:"):
        named_config(args.model.removeprefix("random:"))
    threads = args.threads or torch.get_num_threads()
    base = StreamJob(
        "", args.model, "", str(device), threads,
        seconds=args.duration, window=args.window, peer_chunk=args.peer_chunk,
    )  # fmt: skip
    precisions = args.precision or (["int8"] if device.type == "cpu" else ["float16"])
    jobs = cast(list[StreamJob], jobs_for(base, dict.fromkeys(precisions), args.providers))
    card = machine_card(str(device))
    say(f"{card['gpu'] or card['cpu']}, {threads} threads, torch {torch.__version__}")
    rows, absent = run_rounds(jobs, args.rounds, say, args.timeout)
    said = lines(rows, absent, base, card)
    if args.json != "-":
        print(table(said))
    append_json(args.json, said)
    for (provider, precision), why in absent.items():
        say(f"{provider} {precision} is absent: {why}")
        if provider == "musicgen_fast":
            raise RuntimeError(f"musicgen_fast could not be timed in {precision}: {why}")
    return 0

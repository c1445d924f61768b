"""`musicgen-fast bench`: its options, and what it prints. What measures is in `bench/`, imported late."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

__all__ = ["add_commands", "run_compare", "run_latency"]

# Written out here, so that --help and mistakes cost no import of torch.
PROVIDERS = ("musicgen_fast", "transformers", "transformers_compiled", "audiocraft", "openvino")
PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")
FEWEST_STEPS = 10
_ABOUT = """\
Milliseconds per decoding step, with guidance, beside other implementations on the same machine in the same run. Every
provider runs in a process of its own, in another order each round. The floor is the time of reading the bytes of a step
(weights, keys and values), measured with as many threads.

parity: of float32, whether the tokens equal those of the torch decoder; of the others, whether the relative error of
the logits is within a limit. Peers that lack a precision run in the fastest that they have, which the line names.
"""
_COMPARED = """\
Says of every measurement that both files hold by how much B is worse: median and 90th percentile of a step, peak
memory, and the share of the memory's speed (floor), which a slow minute of the machine moves least.
"""


def add_commands(commands: argparse._SubParsersAction) -> dict[str, argparse.ArgumentParser]:
    """Adds `bench` and what is below it; returns the parsers by name."""
    bench = commands.add_parser("bench", help="how fast this machine is, beside other implementations")
    bench.set_defaults(command="bench", verbose=False)
    kinds = bench.add_subparsers(metavar="{latency,compare}", required=True)
    latency = kinds.add_parser(
        "latency",
        help="milliseconds per decoding step",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    latency.set_defaults(run=run_latency, command="bench latency")
    _latency_options(latency)
    compare = kinds.add_parser(
        "compare",
        help="two files of results side by side",
        description=_COMPARED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare.set_defaults(run=run_compare, command="bench compare")
    compare.add_argument("before", metavar="A", help="JSON lines, as --json writes them")
    compare.add_argument("after", metavar="B", help="the same work, later")
    compare.add_argument(
        "--fail-if", action="append", default=[], metavar="METRIC:SHARE%",
        help="exit with 1 where B is worse by more: median:5%%, p90, peak, floor; may be given several times",
    )  # fmt: skip
    compare.add_argument("-v", "--verbose", action="store_true", help="tracebacks of errors")
    return {"bench": bench, "bench latency": latency, "bench compare": compare}


def _latency_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", default="random:small",
        help="random:SIZE, hub id, folder or demo; peers run its shapes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", type=_names(PRECISIONS), action="extend", metavar="NAMES",
        help=f"some of {','.join(PRECISIONS)} (default: float32 on a CPU, float16 on a GPU)",
    )  # fmt: skip
    parser.add_argument("-d", "--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--threads", type=_at_least(1), metavar="N", help="default: the physical cores, as torch counts"
    )
    parser.add_argument(
        "--steps", type=_at_least(FEWEST_STEPS), default=200, metavar="N",
        help="a round, the first 20 (at most half) left out (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=_at_least(1), default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--providers", type=_names(PROVIDERS), metavar="NAMES",
        help=f"some of {','.join(PROVIDERS)} (default: ours and those that are installed)",
    )  # fmt: skip
    parser.add_argument(
        "--text-tokens", type=_at_least(1), default=16, metavar="N", help="states of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--parity-frames", type=_at_least(0), default=40, metavar="N",
        help="frames over which parity is looked at; 0: not at all (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a provider; - prints them, and no table")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks of errors")


def run_latency(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code. RuntimeError where this project's own decoder could not be timed."""
    import torch

    from .bench.job import Job
    from .bench.latency import jobs_for, lines, parities, run_rounds, table
    from .bench.machine import append_json, machine_card
    from .config import named_config
    from .loading import pick_device

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    device = pick_device(args.device)
    if args.model.startswith("random:"):
        named_config(args.model.removeprefix("random:"))
    threads = args.threads or torch.get_num_threads()
    warmup = min(20, args.steps // 2)
    base = Job("", args.model, "", str(device), threads, args.steps, warmup, text_tokens=args.text_tokens)
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


def run_compare(args: argparse.Namespace) -> int:
    """Print both sides; 1 where a limit is passed, or where a measurement of ours is gone. ValueError, OSError."""
    from .bench.compare import changes, different_machines, failed, load, parse_limit, table

    limits = [parse_limit(text) for text in args.fail_if]
    (before, there), (after, here) = load(args.before), load(args.after)
    found = changes(before, after)
    if not any(change.before and change.after for change in found):
        raise ValueError("the files have no measurement in common: other models, precisions, threads or steps")
    print(table(found))
    if warning := different_machines(there, here):
        print(f"musicgen-fast: {warning}", file=sys.stderr)
    wrong = failed(found, limits) if limits else []
    for sentence in wrong:
        print(f"musicgen-fast: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if wrong := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {','.join(wrong)!r}")
        return list(dict.fromkeys(chosen))

    return parse


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, at least {least}, got {text!r}")
        return int(text)

    return parse

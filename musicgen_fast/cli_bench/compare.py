"""`musicgen-fast bench compare`: two files of results, and an exit code."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .options import add_kind

NAME = "compare"
_ABOUT = """\
Says of every measurement that both files hold by how much B is worse. Metrics, as far as the files have them:

  median  of a step or a draw        speed  seconds of sound per second
  p90     of a step                  ttfa   time to first audio
  p99     of a step or a gap         nats   per token (quality)
  peak    memory
  floor   share of the memory's speed, which a slow minute of the machine moves least
"""


def add(kinds: Any) -> argparse.ArgumentParser:
    """`compare` among the kinds."""
    parser = add_kind(kinds, NAME, run, help="two files of results side by side", about=_ABOUT)
    parser.add_argument("before", metavar="A", help="JSON lines, as --json writes them")
    parser.add_argument("after", metavar="B", help="the same work, later")
    parser.add_argument(
        "--fail-if", action="append", default=[], metavar="METRIC:SHARE%",
        help="exit with 1 where B is worse by more, such as median:5%%; may be given several times",
    )  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks of errors")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print both sides; 1 where a limit is passed, or where a measurement of ours is gone. ValueError, OSError."""
    from ..bench.compare import changes, different_machines, failed, load, parse_limit, table

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

"""`musicgen-fast bench`: every kind's options and what it prints, one file a kind. What measures is in `bench/`.

Nothing of `bench/`, and no torch, is imported before a command runs.
"""

from __future__ import annotations

import argparse

from . import compare, latency, plot, quality, sampler, stream, throughput

__all__ = ["add_commands"]

KINDS = (latency, throughput, stream, sampler, quality, compare, plot)


def add_commands(commands: argparse._SubParsersAction) -> dict[str, argparse.ArgumentParser]:
    """Adds `bench` and what is below it; returns the parsers by name."""
    bench = commands.add_parser("bench", help="how fast this machine is, beside other implementations")
    bench.set_defaults(command="bench", verbose=False)
    kinds = bench.add_subparsers(metavar="{" + ",".join(kind.NAME for kind in KINDS) + "}", required=True)
    return {"bench": bench, **{f"bench {kind.NAME}": kind.add(kinds) for kind in KINDS}}

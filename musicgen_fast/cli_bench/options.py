"""What the kinds of `musicgen-fast bench` have in common: how one is declared, and the options that all of them take.

Names are written out here, so that --help and mistakes cost no import of torch; a test holds them to the real ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = [
    "PRECISIONS",
    "add_kind",
    "at_least",
    "machine_options",
    "names",
    "output_options",
    "sayer",
    "seconds",
    "several",
]

T = TypeVar("T")
PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")


def add_kind(
    kinds: Any, name: str, run: Callable[[argparse.Namespace], int], *, help: str, about: str
) -> argparse.ArgumentParser:
    """The parser of `bench NAME`, which calls `run`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        name, help=help, description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(run=run, command=f"bench {name}")
    return parser


def machine_options(parser: argparse.ArgumentParser) -> None:
    """--device and --threads; both may stay None."""
    parser.add_argument("-d", "--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="default: the physical cores, as torch counts")


def output_options(parser: argparse.ArgumentParser, lines: str = "one JSON line a provider") -> None:
    """--json, --quiet, --verbose."""
    parser.add_argument("--json", metavar="FILE", help=f"append {lines}; - prints them, and no table")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks of errors")


def sayer(args: argparse.Namespace) -> Callable[[str], None]:
    """What tells of progress, on standard error; silent after --quiet."""

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    return say


def names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Type of an option that takes some of `known`, separated by commas."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if wrong := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {','.join(wrong)!r}")
        return list(dict.fromkeys(chosen))

    return parse


def at_least(least: int) -> Callable[[str], int]:
    """Type of an option that takes a whole number."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, at least {least}, got {text!r}")
        return int(text)

    return parse


def several(one: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Type of an option that takes values of the type `one`, separated by commas."""
    return lambda text: list(dict.fromkeys(one(part) for part in text.split(",")))


def seconds(text: str) -> float:
    """Type of an option that takes a duration above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, above 0, got {text!r}")
    return value

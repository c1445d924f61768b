"""`musicgen-fast bench plot`: pictures of results, for light and dark pages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .options import add_kind, names

NAME = "plot"
PLOTS = ("step", "peers", "throughput", "memory", "quality", "sampler", "stream")
THEMES = ("light", "dark")
_ABOUT = """\
Draws what the files hold, as NAME-light.png and NAME-dark.png, and prints their paths. Needs matplotlib:
pip install musicgen-fast[plot]

  step        ms a step against its position, the floor, and real time
  peers       average ms a step of all providers, and how many times faster than the best transformers
  throughput  seconds of sound made in a second against requests at once
  memory      peak memory of each provider and precision
  quality     what each precision costs in nats a token, and its distance from float32
  sampler     microseconds of a draw by filter and batch
  stream      time to the first sound, cold and warm

Where lines repeat a measurement the latest date counts. Machines, models and numbers of threads are not mixed: where
there are several, each has files of its own, with what tells it apart in their names.
"""


def add(kinds: Any) -> argparse.ArgumentParser:
    """`plot` among the kinds."""
    parser = add_kind(kinds, NAME, run, help="pictures of results", about=_ABOUT)
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON lines, as --json writes them")
    parser.add_argument("-o", "--output", default="plots", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument(
        "--only", type=names(PLOTS), default=list(PLOTS), metavar="NAMES", help=f"some of {','.join(PLOTS)}"
    )
    parser.add_argument(
        "--theme", type=names(THEMES), default=list(THEMES), metavar="NAMES",
        help=f"some of {','.join(THEMES)} (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", type=int, choices=(1, 2, 3, 4), default=2, help="pixels in one of a column of 600 (default: 2)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks of errors")
    return parser


def run(args: argparse.Namespace) -> int:
    """Draw and print the paths. ImportError without matplotlib; ValueError where there is nothing to draw; OSError."""
    from ..bench.plot import check_matplotlib, draw
    from ..bench.plot_data import pictures
    from ..bench.result_lines import read_lines

    check_matplotlib()
    found = pictures(read_lines(args.files), args.only)
    missing = [name for name in args.only if name not in {picture.plot for picture in found}]
    if not found:
        raise ValueError(f"the files hold nothing to draw for {', '.join(missing)}: were all providers absent?")
    if missing and args.only != list(PLOTS):
        print(f"musicgen-fast: the files hold nothing to draw for {', '.join(missing)}", file=sys.stderr)
    for path in draw(found, Path(args.output), args.theme, args.scale):
        print(path)
    return 0

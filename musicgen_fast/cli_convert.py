"""`musicgen-fast convert`: a checkpoint in another layout or precision, see `checkpoints/convert.py`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .checkpoints.convert import convert
from .cli_info import describe, facts_of_disk, print_table
from .loading import DTYPES

__all__ = ["run"]

_WARNING = """\
WARNING: --trust-pickle reads a pickle, which can run any code that its author put in. It is read in a child process
without network (below is what holds on this system), but with your rights on files: it could read or delete them.
Use it for files that you or people you trust have made."""


def run(args: argparse.Namespace) -> int:
    """Convert, and say what came out; returns the exit code."""
    if args.trust_pickle:
        print(f"musicgen-fast: {_WARNING}", file=sys.stderr)
    patches: dict[str, Any] = {}
    if args.base is not None:
        patches["base"] = args.base
    if args.adapter is not None:
        patches.update(adapter=args.adapter, adapter_scale=args.adapter_scale)
    if args.to == "packed":
        return _pack(args, patches)
    if args.precision in ("int8", "int4"):
        raise ValueError(f"the layout of {args.to} has no {args.precision}: take --to packed")
    with _Bar(not args.quiet and sys.stderr.isatty()) as bar:
        result, notes = convert(
            args.input,
            args.output,
            args.to,
            precision=DTYPES[args.precision] if args.precision else None,
            text_encoder=args.text_encoder,
            revision=args.revision,
            cache_dir=args.cache_dir,
            overwrite=args.overwrite,
            trust_pickle=args.trust_pickle,
            progress=bar,
            **patches,
        )
    for note in notes if not args.quiet else ():
        print(f"musicgen-fast: note: {note}", file=sys.stderr)
    if not args.quiet:
        print(f"{args.output}: written in the layout of {args.to}, read back and compared")
        print_table(describe(facts_of_disk(result)))
    return 0


def _pack(args: argparse.Namespace, patches: dict[str, Any]) -> int:
    from .packed_files import convert_to_packed

    if args.trust_pickle:
        raise ValueError("--trust-pickle converts to transformers or audiocraft: pack what that makes")
    precision = args.precision or "int8"
    convert_to_packed(
        args.input,
        args.output,
        precision,
        text_encoder=args.text_encoder,
        revision=args.revision,
        cache_dir=args.cache_dir,
        overwrite=args.overwrite,
        **patches,
    )
    if not args.quiet:
        size = sum(file.stat().st_size for file in Path(args.output).iterdir())
        print(f"{args.output}: packed in {precision}, {size / 1e6:.0f} MB; load it by its path, on a CPU")
    return 0


class _Bar:
    """Called with (bytes done, bytes in all); shows a bar on a terminal."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self.bar = tqdm(
            disable=not self.shown, unit="B", unit_scale=True, dynamic_ncols=True, leave=False, file=sys.stderr
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

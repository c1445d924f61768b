"""`musicgen-fast render`: the options, from them to a plan, and what a dry run prints.

Mistakes on the command line and in the manifest cost no model. The options are in `render/arguments.py`, the rendering
itself is `render/run.py`; torch is imported when the options are good.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from .config import MAX_DURATION, GenerationParams
from .render.arguments import add_options

if TYPE_CHECKING:
    from .render.plan import Options, Plan

__all__ = ["EXIT_CODES", "add_command", "add_options", "options_of", "run"]

EXIT_CODES = """\
exit codes of render:
  0    everything is there
  1    the run ended before its end, or the manifest is wrong: the message says why
  2    a mistake on the command line; nothing was done
  3    finished, but some pieces failed: failures.jsonl holds them
  130  interrupted with Ctrl-C; the same command goes on where it was
"""
_EXAMPLES = """\
examples:
  musicgen-fast render prompts.txt -o out --duration 20
  musicgen-fast render pieces.jsonl -o out -m facebook/musicgen-medium -f flac --dry-run
  musicgen-fast render pieces.csv -o set -f webdataset --shard auto
"""


def add_command(commands: argparse._SubParsersAction) -> dict[str, argparse.ArgumentParser]:
    """Adds `render`; returns its parser by name."""
    parser = commands.add_parser(
        "render",
        help="make thousands of pieces from a manifest, with nothing lost and nothing made twice",
        description="Make the pieces of a manifest, side by side. What is there already is not made again, so the\n"
        "same command goes on after a crash or an interrupt. Options may be spelled with - or with _.",
        epilog=f"{_EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, command="render")
    add_options(parser)
    return {"render": parser}


def run(args: argparse.Namespace) -> int:
    """Render what the command line asks for, or say what that would be; returns the exit code."""
    from .render.item import ManifestError
    from .render.plan import describe, make_plan

    try:
        options = options_of(args)
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from error
    try:
        plan = make_plan(options)
    except ManifestError as error:
        print(f"musicgen-fast: error: {_printable(str(error))}", file=sys.stderr)
        return 1
    if args.dry_run:
        told = describe(plan, args.speed)
        print(json.dumps(told, indent=2) if args.progress == "json" else _prose(plan, told))
        return 0
    from .render.run import render

    return render(plan)


def options_of(args: argparse.Namespace) -> Options:
    """The options of a run. ValueError where they do not fit together."""
    from .render.item import Limits
    from .render.output import Settings
    from .render.plan import Options
    from .render.resume import Rules

    if args.max_input_seconds > MAX_DURATION:
        raise ValueError(f"--max-input-seconds must be at most {MAX_DURATION}, got {args.max_input_seconds:g}")
    if args.overwrite and args.retry_failed:
        raise ValueError("--overwrite renders everything: --retry-failed says nothing besides")
    layout = "webdataset" if args.format == "webdataset" else "files"
    return Options(
        manifest=args.manifest,
        output_dir=args.output_dir,
        model=args.model,
        device=args.device,
        precision=args.precision,
        text_encoder=args.text_encoder,
        style_encoder=args.style_encoder,
        revision=args.revision,
        cache_dir=args.cache_dir,
        compat=args.compat,
        seed=args.seed,
        params=_params(args),
        settings=Settings(
            args.audio_format or ("flac" if layout == "webdataset" else args.format),
            args.loudness, not args.no_sidecar, args.tokens,
        ),
        layout=layout,
        shard_pieces=args.shard_pieces,
        filename=args.filename,
        input_root=args.input_root,
        manifest_format=args.manifest_format,
        ignore_extra=args.ignore_extra,
        limits=Limits(
            prompt_chars=args.max_prompt, duration=args.max_duration, variations=args.max_variations,
            input_seconds=args.max_input_seconds,
        ),
        rules=Rules(args.overwrite, args.retry_failed, args.max_attempts),
        shard=args.shard,
        limit=args.limit,
        max_failures=1 if args.fail_fast else args.max_failures,
        batch_size=args.batch_size,
        writers=args.writers,
        item_timeout=args.item_timeout,
        engine=args.engine,
        address=args.address,
        workers=args.workers,
        gpus_per_worker=args.gpus_per_worker,
        progress=args.progress,
        quiet=args.quiet,
    )  # fmt: skip


def _params(args: argparse.Namespace) -> GenerationParams:
    return GenerationParams(
        use_sampling=not args.greedy,
        top_k=args.top_k,
        top_p=args.top_p,
        temperature=args.temperature,
        duration=args.duration,
        cfg_coef=args.cfg_coef,
        cfg_coef_beta=args.cfg_coef_beta,
        two_step_cfg=args.two_step_cfg,
        extend_stride=args.extend_stride,
    )


def _prose(plan: Plan, told: dict[str, Any]) -> str:
    """The lines of a dry run."""
    free, left = told["disk_bytes_free"], told["disk_bytes_left"]
    lines = [
        f"{told['pieces']} pieces of {told['lines']} lines, {told['audio_hours']:.2f} hours of audio, "
        f"the longest {told['longest_seconds']:g} s" + (f", shard {told['shard']}" if plan.options.shard.name else ""),
        f"{told['pieces_made_before']} of them are in {told['output_dir']} already (as far as their ids tell); "
        f"{told['pieces_left']} pieces, {told['audio_hours_left']:.2f} hours, are left",
        f"disk: {left / 1e9:.2f} GB needed" + ("" if free is None else f", {free / 1e9:.2f} GB free"),
    ]
    if free is not None and free < left:
        lines[-1] += ": NOT ENOUGH"
    if told["hours_left"] is None:
        lines.append("time: not known before a first run in this folder, or --speed")
    else:
        lines.append(f"time: {told['hours_left']:.2f} hours at {told['speed']:.2f} seconds of audio per second")
    lines.append("nothing was rendered (--dry-run)")
    return "\n".join(map(_printable, lines))


def _printable(text: str) -> str:
    """Without characters that move a terminal's cursor: names of files and ids come from strangers."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)

"""`musicgen-fast bench quality`: what a precision, or a decoder, costs in nats."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .options import PRECISIONS, add_kind, at_least, machine_options, names, output_options, sayer, seconds

NAME = "quality"
PROVIDERS = ("musicgen_fast", "transformers")
COUNT, DURATION = 16, 8.0  # of own samples
_ABOUT = """\
How well a precision still predicts: known tokens go step by step through the decoder that serves it, its KV cache
included, and its logits are compared with those of the float32 reference transformer: nats per token (teacher-forced,
conditional branch), KL divergence float32 || precision, relative error, share of equal most likely tokens.
transformers (float32, bfloat16; float16 on a GPU) has the same weights and tokens, in one pass.

Without --clips the tokens are drawn by the float32 model itself for built-in prompts: no data is needed, and the
difference in nats estimates the KL divergence.

examples:
  musicgen-fast bench quality -m facebook/musicgen-small --precision float32,int8
  musicgen-fast bench quality -m demo --clips songs.jsonl --fail-over 0.5
"""


def add(kinds: Any) -> argparse.ArgumentParser:
    """`quality` among the kinds."""
    parser = add_kind(kinds, NAME, run, help="what a precision costs in likelihood", about=_ABOUT)
    parser.add_argument("-m", "--model", default="demo", help="hub id, folder, random:SIZE or demo (default: demo)")
    parser.add_argument(
        "--precision", type=names(PRECISIONS), action="extend", metavar="NAMES",
        help=f"some of {','.join(PRECISIONS)} (default: all but float16 on a CPU, all but int4 on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--clips", metavar="FILE",
        help="JSONL, CSV or TSV with the fields audio (a path relative to the file) and prompt",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=at_least(1), metavar="N", help=f"clips (default: {COUNT}; with --clips all of them)"
    )
    parser.add_argument(
        "--duration", type=seconds, metavar="SECONDS",
        help=f"of a clip (default: {DURATION:g}; with --clips all of it, at most the model's window)",
    )  # fmt: skip
    parser.add_argument(
        "--providers", type=names(PROVIDERS), metavar="NAMES",
        help=f"some of {','.join(PROVIDERS)} (default: those that are installed)",
    )  # fmt: skip
    machine_options(parser)
    parser.add_argument(
        "--fail-over", type=percent, metavar="PERCENT",
        help="exit with 1 where a precision of ours other than int4 has so much more nats than float32",
    )  # fmt: skip
    output_options(parser, "one JSON line a provider and precision")
    return parser


def percent(text: str) -> float:
    """Type of --fail-over: '0.5' or '0.5%'."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of percent, such as 0.5, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 where --fail-over is passed. ValueError, OSError; RuntimeError where ours failed."""
    import torch

    from ..bench.machine import append_json, machine_card
    from ..bench.quality import QualityJob, jobs_for
    from ..bench.quality import run as run_jobs
    from ..bench.quality_clips import read_manifest
    from ..bench.quality_lines import lines, over, table
    from ..loading import pick_device

    say = sayer(args)
    device = pick_device(args.device)
    rows = read_manifest(args.clips)[: args.count] if args.clips else None
    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    left_out = "float16" if device.type == "cpu" else "int4"
    precisions = args.precision or [name for name in PRECISIONS if name != left_out]
    base = QualityJob("", args.model, "", str(device), threads)
    if not (jobs := jobs_for(base, precisions, args.providers)):
        raise ValueError("transformers alone has none of these precisions: add float32 or bfloat16, or musicgen_fast")
    card = machine_card(str(device))
    say(f"{card['gpu'] or card['cpu']}, {threads} threads, torch {torch.__version__}")
    clips = _clips(args, str(device), rows, say)
    said = lines(run_jobs(jobs, clips, say), Path(args.clips).name if args.clips else "own samples", card)
    if args.json != "-":
        print(table(said))
    append_json(args.json, said)
    for line in said:
        if line["provider"] == "musicgen_fast" and line.get("absent", "").startswith("failed"):
            raise RuntimeError(f"musicgen_fast could not be measured in {line['precision']}: {line['absent']}")
    wrong = [] if args.fail_over is None else over(said, args.fail_over)
    for sentence in wrong:
        print(f"musicgen-fast: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def _clips(args: argparse.Namespace, device: str, rows: Any, say: Any) -> Any:
    """The clips to be scored. The float32 model that makes them is gone when this returns."""
    from .. import MusicGen
    from ..bench.quality_clips import own_samples, recorded

    model = MusicGen.get_pretrained(args.model, device, precision="float32")
    if model.lm.config.style is not None:
        raise ValueError(f"{args.model} is a style model: its likelihood without a style means little; take another")
    if rows is not None:
        say(f"{len(rows)} recordings through the codec")
        return recorded(model, rows, args.duration)
    say(f"{args.count or COUNT} clips drawn in float32")
    return own_samples(model, args.count or COUNT, args.duration or DURATION)

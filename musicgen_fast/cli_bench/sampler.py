"""`musicgen-fast bench sampler`: microseconds per draw, beside other samplers, and whether ours are right."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from .options import add_kind, at_least, machine_options, names, output_options, sayer, seconds, several

NAME = "sampler"
PRECISIONS = ("float32", "float16", "bfloat16")
PEERS = ("audiocraft", "transformers", "compiled", "flashinfer", "vllm")
PROVIDERS = (
    *PEERS,
    *(f"{form}:{b}" for b in ("torch", "cpu", "triton", "cuda") for form in ("sample", "draw", "noise")),
)
VOCAB = 2048
_ABOUT = """\
Microseconds from the logits of one column (guidance of two branches, 2048 tokens a codebook) to its tokens, beside
other samplers in the same run. All take turns in one process, in another order each round. On a GPU also the number and
time of the kernels, and the time of a draw as a node of a CUDA graph.

providers: audiocraft (its operations, in torch), transformers (its processors), compiled (audiocraft's by
torch.compile, 20 s a case to begin with), flashinfer, vllm, and ours as FORM:BACKEND, with the backends torch, cpu,
triton, cuda. draw: as a generation calls it; noise: the same with the random numbers of audiocraft; sample: the public
function. What is not installed, or cannot run here, is named as absent.

parity: whether the tokens of ours equal those of the torch reference for fixed seeds. The exit code is 1 where they do
not.
"""


def add(kinds: Any) -> argparse.ArgumentParser:
    """`sampler` among the kinds."""
    parser = add_kind(kinds, NAME, run, help="microseconds per draw of a column's tokens", about=_ABOUT)
    parser.add_argument("--batch", type=several(at_least(1)), default=[1, 16], metavar="N,...", help="default: 1,16")
    parser.add_argument("--codebooks", type=several(at_least(1)), default=[4], metavar="N,...", help="default: 4")
    parser.add_argument(
        "--filters", type=several(_filter), default=["top_k250", "top_p0.9", "none"], metavar="NAMES",
        help="none, top_kN, top_pX (default: top_k250,top_p0.9,none)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", type=names(PRECISIONS), metavar="NAMES",
        help=f"of the logits, some of {','.join(PRECISIONS)} (default: float32 on a CPU, float16 on a GPU)",
    )  # fmt: skip
    machine_options(parser)
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=seconds, default=0.3, metavar="S", help="of each sampler and round (default: %(default)s)"
    )
    parser.add_argument(
        "--providers", type=names(PROVIDERS), metavar="NAMES",
        help=f"some of {','.join(PEERS)},draw:torch,... (default: all of the device)",
    )  # fmt: skip
    output_options(parser, "one JSON line a sampler, case and round")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 where one of our samplers draws other tokens than the reference. ValueError, OSError."""
    import torch

    from ..bench.machine import append_json, machine_card
    from ..bench.sampler import failures, measure, place, table
    from ..bench.sampler_case import Case
    from ..bench.sampler_peers import default_names
    from ..loading import pick_device

    device, say = pick_device(args.device), sayer(args)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"samplers are measured on a CPU or a CUDA device, not on {device}")
    cases = [
        Case(str(device), batch, codebooks, kind, precision)
        for precision in args.precision or (["float32"] if device.type == "cpu" else ["float16"])
        for kind in args.filters
        for codebooks in args.codebooks
        for batch in args.batch
    ]
    threads = args.threads or torch.get_num_threads()
    with place(device, threads):
        card = machine_card(str(device))
        settings = {"threads": threads, "machine": card}

        def write(made: list[dict[str, Any]]) -> None:
            append_json(args.json, [line | settings for line in made])

        say(f"{card['gpu'] or card['cpu']}, {threads} threads, torch {torch.__version__}")
        found = measure(cases, args.providers or default_names(device), args.rounds, args.seconds, write, say)
    if args.json != "-":
        print(table(found))
    wrong = failures(found)
    for sentence in wrong:
        print(f"musicgen-fast: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def _filter(text: str) -> str:
    if text.startswith("top_k") and text[5:].isdecimal() and int(text[5:]) > VOCAB:
        raise argparse.ArgumentTypeError(f"a codebook has {VOCAB} tokens, got {text!r}")
    if not re.fullmatch(r"none|top_k[1-9]\d*|top_p0?\.\d*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected none, top_k250 or top_p0.9 with numbers of your own, got {text!r}")
    return text

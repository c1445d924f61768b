"""Milliseconds per decoding step and peak memory, beside transformers and audiocraft in the same run.

    python benchmarks/bench_step.py --size small --steps 200 --rounds 3 --json benchmarks/results/step.jsonl

`musicgen-fast bench latency` for the record: one JSON line a round, several precisions, no parity. Every provider runs
in a process of its own, one after the other, in another order each round. Random weights: no download.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import torch

from musicgen_fast.bench.job import PRECISIONS, Job
from musicgen_fast.bench.latency import Row, jobs_for, quantile, ratio, run_rounds, table
from musicgen_fast.bench.machine import append_json, machine_card
from musicgen_fast.bench.providers import PROVIDERS

FEWEST_STEPS = 10


def main() -> None:
    args = arguments()
    warmup = min(20, args.steps // 2)
    base = Job("", f"random:{args.size}", "", args.device, args.threads, args.steps, warmup)
    torch.set_num_threads(args.threads)
    card = machine_card(args.device)
    print(f"{card['gpu'] or card['cpu']}, {args.threads} threads, torch {torch.__version__}, commit {card['commit']}")
    jobs = jobs_for(base, args.precision, args.providers)
    rows, absent = run_rounds(jobs, args.rounds, lambda text: print(text, file=sys.stderr, flush=True))
    print(table(rows, absent))
    append_json(args.json, [record(row, rows, card) for row in rows])


def record(row: Row, rows: list[Row], card: dict[str, Any]) -> dict[str, Any]:
    """The JSON line of one provider and round."""
    return {
        "benchmark": "step",
        **asdict(row.job),
        "round": row.round,
        "ms_per_step": {name: round(quantile(row.ms, q), 4) for name, q in (("p50", 0.5), ("p10", 0.1), ("p90", 0.9))},
        "times_faster_than_transformers": ratio(row, rows),
        "peak_mib": row.peak_mib,
        "floor_ms": row.floor_ms,
        "percent_of_floor": 100 * row.floor_ms / row.median,
        "read_gb_s": row.read_gb_s,
        "machine": card,
    }


def arguments() -> argparse.Namespace:
    def names(known: Any):
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            if set(chosen) - set(known):
                raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {text}")
            return chosen

        return parse

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="small", choices=("small", "medium", "large"))
    parser.add_argument("--steps", type=int, default=200, help="columns of the sequence; the first 20 are left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    known = ["musicgen_fast", "transformers", "audiocraft"]
    parser.add_argument("--providers", type=names(PROVIDERS), default=known, help=",".join(PROVIDERS))
    parser.add_argument("--precision", type=names(PRECISIONS), help=",".join(PRECISIONS), default=None)
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a provider and round")
    args = parser.parse_args()
    if args.steps < FEWEST_STEPS:
        parser.error(f"--steps must be at least {FEWEST_STEPS}")
    if args.precision is None:
        args.precision = ["float32", "bfloat16"] if args.device == "cpu" else ["float16", "bfloat16"]
    return args


if __name__ == "__main__":
    main()

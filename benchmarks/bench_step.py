"""Milliseconds per decoding step and peak memory, beside transformers and audiocraft in the same run.

    python benchmarks/bench_step.py --size small --steps 200 --rounds 3 --json benchmarks/results/step.jsonl

Every provider runs in a process of its own, one after the other, in another order each round. The floor is the bytes
that a step must read over the bandwidth measured in the same round. Random weights: no download.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import providers
import torch
from machine import ROOT, append_json, machine_card, read_bandwidth
from providers import DELAY, PRECISIONS, PROVIDERS, TEXT_TOKENS, Job

from musicgen_fast.config import named_config
from musicgen_fast.roofline import step_bytes

REFERENCE = "transformers"


@dataclass(frozen=True)
class Row:
    """One provider in one round; `ms` the time of each step."""

    job: Job
    round: int
    ms: list[float]
    peak_mib: int
    floor_ms: float
    read_gb_s: float

    @property
    def key(self) -> tuple[str, str]:
        return self.job.provider, self.job.precision

    @property
    def median(self) -> float:
        return quantile(self.ms, 0.5)


def quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def main() -> None:
    args = arguments()
    jobs = [
        Job(name, args.size, precision, args.device, args.threads, args.steps, min(20, args.steps // 2))
        for precision in args.precision
        for name in args.providers
    ]
    torch.set_num_threads(args.threads)
    card = machine_card(args.device)
    print(f"{card['gpu'] or card['cpu']}, {args.threads} threads, torch {torch.__version__}, commit {card['commit']}")
    rows: list[Row] = []
    absent: dict[tuple[str, str], str] = {}
    for number in range(args.rounds):
        bandwidth = read_bandwidth(args.device)
        turn = number % len(jobs)
        for job in jobs[turn:] + jobs[:turn]:
            print(f"round {number + 1} of {args.rounds}: {job.provider} {job.precision}", file=sys.stderr, flush=True)
            result = in_own_process(job)
            if "absent" in result:
                absent[job.provider, job.precision] = result["absent"]
                continue
            item = PRECISIONS[job.precision].itemsize
            middle = (job.warmup + job.steps) / 2
            floor = 1000 * step_bytes(named_config(job.size), item, middle, text_tokens=TEXT_TOKENS) / bandwidth
            rows.append(Row(job, number, result["ms"], result["peak_mib"], floor, bandwidth / 1e9))
    print(table(rows, absent))
    append_json(args.json, [record(row, rows, card) for row in rows])


def in_own_process(job: Job) -> dict[str, Any]:
    """`providers.measure(job)` in a fresh process; one that fails is absent, with the last line of its errors."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, providers.__file__, json.dumps(asdict(job))],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"absent": f"failed: {lines[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def ratio(row: Row, rows: list[Row]) -> float | None:
    """How many times faster than the reference of the same round and precision."""
    for other in rows:
        if (other.key, other.round) == ((REFERENCE, row.job.precision), row.round):
            return other.median / row.median
    return None


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


def table(rows: list[Row], absent: dict[tuple[str, str], str]) -> str:
    """Markdown: the steps of all rounds together; ratio and floor are medians over the rounds."""
    lines = [
        f"| provider | precision | ms/step [p10..p90] | times {REFERENCE} | % of floor | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.key].append(row)
    for (provider, precision), group in sorted(groups.items(), key=lambda item: item[0][::-1]):
        every = [ms for row in group for ms in row.ms]
        low, median, high = (quantile(every, q) for q in (0.1, 0.5, 0.9))
        ratios = [r for row in group if (r := ratio(row, rows)) is not None]
        faster = f"{quantile(ratios, 0.5):.2f}" if ratios else "-"
        floor = quantile([100 * row.floor_ms / row.median for row in group], 0.5)
        peak = max(row.peak_mib for row in group)
        span = f"{median:.2f} [{low:.2f}..{high:.2f}]"
        lines.append(f"| {provider} | {precision} | {span} | {faster} | {floor:.0f} | {peak} |")
    lines += [f"| {provider} | {precision} | absent: {why} | | | |" for (provider, precision), why in absent.items()]
    if rows:
        speeds = [row.read_gb_s for row in rows]
        lines.append(f"\nmemory read at {min(speeds):.1f} to {max(speeds):.1f} GB/s")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    def names(known: dict[str, Any]):
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
    parser.add_argument("--providers", type=names(PROVIDERS), default=list(PROVIDERS), help=",".join(PROVIDERS))
    parser.add_argument("--precision", type=names(PRECISIONS), help=",".join(PRECISIONS), default=None)
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a provider and round")
    args = parser.parse_args()
    if args.steps < 2 * DELAY + 4:
        parser.error(f"--steps must be at least {2 * DELAY + 4}")
    if args.precision is None:
        args.precision = ["float32", "bfloat16"] if args.device == "cpu" else ["float16", "bfloat16"]
    return args


if __name__ == "__main__":
    main()

"""Steps at a change of windows: with a shadow, which fills the next cache while this window plays, and with a prefill.

    python benchmarks/bench_stream.py --window 6 --seconds 12 --json benchmarks/results/stream.jsonl

The two take turns in one process, on the decoder that serves a model of this precision. What a listener meets, beside
transformers, is `musicgen-fast bench stream`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from musicgen_fast import MusicGen
from musicgen_fast.bench.job import PRECISIONS
from musicgen_fast.bench.machine import append_json, machine_card
from musicgen_fast.bench.stream_worker import TimedSteps
from musicgen_fast.conditioning import ConditioningAttributes
from musicgen_fast.lm import request_seeds
from musicgen_fast.windows import WindowPlan


@dataclass(frozen=True)
class Row:
    """One run: milliseconds. `alone` and `beside`: median steps without and with a shadow; `change`: the longest of the
    steps around the changes of windows."""

    way: str
    round: int
    alone: float
    beside: float | None
    change: float
    steps: int


def step_times(model: MusicGen, seconds: float, shadow: bool) -> tuple[list[float], list[int]]:
    """Milliseconds of each step, and the rows that ran in it; -1: a prefill."""
    rate, params = model.frame_rate, model.params()
    decoder: Any = model.lm.decoder
    window, stride = int(model.max_duration * rate), int(params.stride(model.max_duration) * rate)
    conditions = model.lm.encode([ConditioningAttributes({"description": "lofi beat with warm piano"})], params)
    rows: list[int] = []
    step, prefill = decoder.step, decoder.prefill

    def counted_step(*states: Any) -> None:
        rows.append(sum(len(state.lengths) for state in states))
        step(*states)

    def counted_prefill(state: Any, draw: bool = True) -> None:
        rows.append(-1)
        prefill(state, draw)

    decoder.step, decoder.prefill = counted_step, counted_prefill
    prompt = torch.zeros(1, model.lm.num_codebooks, 0, dtype=torch.int64, device=model.device)
    plan = WindowPlan(round(seconds * rate), window, stride)
    try:
        generation = model.lm.stream(plan, prompt, lambda _: conditions, params, request_seeds(0, 1), shadow=shadow)
        timed = TimedSteps(generation, plan, str(model.device))
        while not timed.done:
            next(timed)
    finally:
        decoder.step, decoder.prefill = step, prefill
    return timed.ms(), rows


def measured(model: MusicGen, seconds: float, shadow: bool, number: int) -> Row:
    """One run; the first ten steps warm up and are left out."""
    times, rows = step_times(model, seconds, shadow)
    usual = min(count for count in rows if count > 0)
    alone = [t for t, count in zip(times, rows, strict=True) if count == usual][10:]
    beside = [t for t, count in zip(times, rows, strict=True) if count > usual]
    changes = [
        i for i, count in enumerate(rows) if i > 20 and (count == -1 or (count == usual and rows[i - 1] > usual))
    ]
    longest = max(t for i in changes for t in times[max(i - 4, 0) : i + 5])
    way = "shadow" if shadow else "prefill"
    return Row(way, number, median(alone), median(beside) if beside else None, longest, len(times))


@torch.no_grad()
def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    card = machine_card(args.device)
    print(f"{card['gpu'] or card['cpu']}, {args.threads} threads, torch {torch.__version__}, commit {card['commit']}")
    model = MusicGen.get_pretrained(args.model, device=args.device, precision=args.precision)
    print(f"{args.model}, {args.precision}, {type(model.lm.decoder).__name__}")
    model.max_duration = args.window
    model.set_generation_params(duration=args.seconds)  # with the stride of this window
    rows = [measured(model, args.seconds, shadow, n) for n in range(args.rounds) for shadow in (True, False)]
    print(
        "| way | step, ms | step beside a shadow | longest around a change | over the median |\n|---|---|---|---|---|"
    )
    for way in ("shadow", "prefill"):
        group = [row for row in rows if row.way == way]
        alone = median(row.alone for row in group)
        besides = [row.beside for row in group if row.beside is not None]
        beside = f"{median(besides):.1f} (+{100 * (median(besides) / alone - 1):.0f} %)" if besides else ""
        change = median(row.change for row in group)
        print(
            f"| {way} | {alone:.1f} | {beside} | {change:.1f} | {median(row.change / row.alone for row in group):.2f} |"
        )
    size = args.model.removeprefix("random:")
    shape = {"size": size, "window": args.window, "seconds": args.seconds, "threads": args.threads}
    told = {**shape, "precision": args.precision, "machine": card}
    append_json(args.json, [{"benchmark": "windows", **vars(row), **told} for row in rows])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", default="random:small", help="random:SIZE, folder or demo")
    parser.add_argument("--precision", default="int8", choices=PRECISIONS, help="default: %(default)s")
    parser.add_argument("--window", type=float, default=6.0, help="seconds; the released models have 30 (default 6)")
    parser.add_argument("--seconds", type=float, default=12.0, help="of music in a run (default 12)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a run")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Seconds of audio per second of `musicgen-fast render`, beside a loop of one `MusicGen.generate` per prompt.

    python benchmarks/bench_render.py --model demo --rounds 3 --json benchmarks/results/render.jsonl
    python benchmarks/bench_render.py --model random:small --count 24 --longest 4 --rounds 1

The loop is this project's own model in one process, loaded once. See `musicgen_fast/bench/render.py`.
"""

from __future__ import annotations

import argparse

import torch

from musicgen_fast.bench.machine import append_json, machine_card
from musicgen_fast.bench.render import Work, lines, rounds, table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="a name, a folder, or random:SIZE (default: demo)")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--count", type=int, default=64, help="pieces")
    parser.add_argument("--shortest", type=float, default=1.0, help="seconds")
    parser.add_argument("--longest", type=float, default=8.0, help="seconds")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16], help="slots of render")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a process")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a way")
    args = parser.parse_args()
    work = Work(args.model, args.precision, args.count, args.shortest, args.longest, args.threads)
    card = machine_card("cpu")
    print(f"{card['cpu']}, {args.threads or torch.get_num_threads()} threads, commit {card['commit']}", flush=True)
    measured = []
    for number, batch, facts in rounds(work, args.batches, args.rounds, args.timeout):
        measured.append((number, batch, facts))
        seconds = facts["seconds_busy"] if batch else facts["seconds"]
        print(f"round {number}, {f'batch {batch}' if batch else 'one by one'}: {seconds:.2f} s", flush=True)
    told = lines(work, measured, card)
    print(f"\n{table(told)}")
    append_json(args.json, told)


if __name__ == "__main__":
    main()

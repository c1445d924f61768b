"""What streaming costs: steps at a change of windows, the shadow, and the time to the first sound; random weights.

    python benchmarks/bench_stream.py --size small --window 3 --seconds 8 --json benchmarks/results/stream.jsonl

Two ways of going from window to window take turns in one process: with a shadow, which fills the next cache while this
window plays, and with a prefill at the change. The first sound is timed beside what transformers' MusicgenStreamer
does: wait for the whole first chunk of tokens, then decode all of them at once.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from musicgen_fast import MusicGen
from musicgen_fast.bench.machine import append_json, machine_card, synchronize
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
    """Milliseconds of each step, and the rows that ran in it."""
    rate, params = model.frame_rate, model.params()
    window, stride = int(model.max_duration * rate), int(params.stride(model.max_duration) * rate)
    conditions = model.lm.encode([ConditioningAttributes({"description": "lofi beat with warm piano"})], params)
    rows: list[int] = []
    step, prefill = model.lm.decoder.step, model.lm.decoder.prefill
    model.lm.decoder.step = lambda *states: (rows.append(sum(len(s.lengths) for s in states)), step(*states))[1]
    model.lm.decoder.prefill = lambda state, draw=True: (rows.append(-1), prefill(state, draw))[1]
    prompt = torch.zeros(1, model.lm.num_codebooks, 0, dtype=torch.int64, device=model.device)
    plan = WindowPlan(round(seconds * rate), window, stride)
    times = []
    try:
        generation = model.lm.stream(plan, prompt, lambda _: conditions, params, request_seeds(0, 1), shadow=shadow)
        while not generation.done:
            start = perf_counter()
            next(generation)
            synchronize(model.device.type)
            times.append(1000 * (perf_counter() - start))
    finally:
        model.lm.decoder.step, model.lm.decoder.prefill = step, prefill
    return times, rows


def measured(model: MusicGen, seconds: float, shadow: bool, number: int) -> Row:
    """One run; the first ten steps warm up and are left out."""
    times, rows = step_times(model, seconds, shadow)
    usual = min(count for count in rows if count > 0)
    alone = [t for t, count in zip(times, rows, strict=False) if count == usual][10:]
    beside = [t for t, count in zip(times, rows, strict=False) if count > usual]
    changes = [
        i for i, count in enumerate(rows) if i > 20 and (count == -1 or (count == usual and rows[i - 1] > usual))
    ]
    longest = max(t for i in changes for t in times[max(i - 4, 0) : i + 5])
    way = "shadow" if shadow else "prefill"
    return Row(way, number, median(alone), median(beside) if beside else None, longest, len(times))


def first_sound(model: MusicGen, chunk_seconds: float) -> dict[str, float]:
    """Seconds from the call to the first sound: of `stream`, and of waiting for a whole chunk as peers do: the same
    engine makes its tokens, and one decode its sound."""
    prompt = "lofi beat with warm piano"
    model.lm.conditioner.encode_text("warm up")
    start = perf_counter()
    stream = model.stream([prompt], duration=30, seed=0)
    text = perf_counter() - start
    next(stream).audio.cpu()
    ours, steps = perf_counter() - start, stream.steps_done
    stream.close()

    start = perf_counter()
    rate, params = model.frame_rate, model.params()
    conditions = model.lm.encode([ConditioningAttributes({"description": prompt})], params)
    plan = WindowPlan(round(30 * rate), int(model.max_duration * rate), int(params.stride(model.max_duration) * rate))
    nothing = torch.zeros(1, model.lm.num_codebooks, 0, dtype=torch.int64, device=model.device)
    generation = model.lm.stream(plan, nothing, lambda _: conditions, params, request_seeds(0, 1))
    parts: list[torch.Tensor] = []
    while sum(part.shape[2] for part in parts) < round(rate * chunk_seconds):
        parts.append(next(generation))
    model.generate_audio(torch.cat(parts, dim=2)).cpu()
    peer = perf_counter() - start
    generation.close()
    return {"stream": ours, "text": text, "steps": steps, "peer": peer}


@torch.no_grad()
def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    card = machine_card(args.device)
    print(f"{card['gpu'] or card['cpu']}, {args.threads} threads, torch {torch.__version__}, commit {card['commit']}")
    model = MusicGen.get_pretrained(f"random:{args.size}", device=args.device)
    model.max_duration = args.window
    model.set_generation_params(duration=args.seconds)
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
    sounds = [first_sound(model, args.peer_chunk) for _ in range(args.rounds)]
    first = {name: median(sound[name] for sound in sounds) for name in sounds[0]}
    print(
        f"\nfirst sound after {first['stream']:.2f} s ({first['steps']:.0f} steps); after {first['peer']:.2f} s where"
    )
    print(f"a chunk of {args.peer_chunk:g} s is waited for and decoded")
    shape = {"size": args.size, "window": args.window, "seconds": args.seconds, "threads": args.threads}
    lines = [{"benchmark": "stream", **vars(row), **shape, "machine": card} for row in rows]
    lines += [{"benchmark": "stream_first_sound", **sound, **shape, "machine": card} for sound in sounds]
    append_json(args.json, lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--window", type=float, default=6.0, help="seconds; the released models have 30 (default 6)")
    parser.add_argument("--seconds", type=float, default=12.0, help="of music in a run (default 12)")
    parser.add_argument("--peer-chunk", type=float, default=1.0, help="seconds of the peer's chunks (default 1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a run")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Microseconds per column of sampled tokens, beside audiocraft, transformers and others in the same run.

    python benchmarks/bench_sampler.py --batch 1,16 --filters top_k250 --threads 1 --json results.jsonl

All take turns in one process, in another order each round; the ratio is to audiocraft's chain of the same round. On a
GPU also the time and number of kernels, and the time of a node in a CUDA graph. Pytest runs the few cases at the end.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from sampler_peers import DTYPES, REFERENCE, AbsentError, Case, Sampler, build, first_line, peers, reset
from torch import Tensor

from musicgen_fast.bench.machine import append_json, machine_card, synchronize

BURST = 20  # draws between two waits for a GPU: a generation does not wait for each of them either
NODES = 100  # draws in the captured graph
Key = tuple[Case, str]
QUANTILES = (("p50", 0.5), ("p10", 0.1), ("p90", 0.9))


@dataclass(frozen=True)
class Row:
    """One sampler in one round; `us` the time of each draw (on a GPU: mean times of bursts)."""

    case: Case
    name: str
    round: int
    us: list[float]

    @property
    def key(self) -> Key:
        return self.case, self.name

    @property
    def median(self) -> float:
        return quantile(self.us, 0.5)


def quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    card = machine_card(args.device)
    print(f"{card['gpu'] or card['cpu']}, {args.threads} threads, torch {torch.__version__}, commit {card['commit']}")
    cases = [
        Case(args.device, batch, codebooks, kind, args.dtype)
        for kind in args.filters
        for codebooks in args.codebooks
        for batch in args.batch
    ]
    settings = {"threads": args.threads, "machine": card}
    rows: list[Row] = []
    absent: dict[Key, str] = {}
    costs: dict[Key, dict[str, Any]] = {}
    for case in cases:  # written as they come: what is interrupted keeps what it has
        print(case.title, file=sys.stderr, flush=True)
        gone: dict[Key, str] = {}
        found = measure(case, args.peers, args.rounds, args.seconds, gone)
        append_json(args.json, [record(row, found) | settings for row in found])
        append_json(args.json, [head("sampler", key) | {"absent": why} | settings for key, why in gone.items()])
        rows += found
        absent |= gone
    # Last, and ours first: a capture that fails may leave torch's generator unfit for anything that comes after it.
    keys = dict.fromkeys(row.key for row in rows if args.device == "cuda")
    for key in sorted(keys, key=lambda key: ":" not in key[1]):
        costs[key] = device_costs(*key)
        append_json(args.json, [head("sampler_on_device", key) | costs[key] | settings])
    print(table(rows, absent, costs))


# -- timing ----------------------------------------------------------------------------------------------------------


def measure(case: Case, names: list[str], rounds: int, seconds: float, absent: dict[Key, str]) -> list[Row]:
    """All of `names` in turns; those that cannot run go into `absent`."""
    ready: list[tuple[str, Sampler]] = []
    for name in names:
        try:
            ready.append((name, build(name, case)))
        except AbsentError as reason:
            absent[case, name] = str(reason)
    logits = case.logits()
    rows = []
    for number in range(rounds):
        turn = number % max(1, len(ready))
        for name, sampler in ready[turn:] + ready[:turn]:
            rows.append(Row(case, name, number, times(sampler, logits, seconds)))
    return rows


def times(sampler: Sampler, logits: Tensor, seconds: float) -> list[float]:
    """Microseconds of each draw, for `seconds` but at least 5 times, after 5 that are left out."""
    device, burst = str(logits.device), BURST if logits.device.type == "cuda" else 1
    for _ in range(5):
        sampler(logits)
    synchronize(device)
    taken: list[float] = []
    end = perf_counter() + seconds
    while len(taken) < 5 or perf_counter() < end:
        start = perf_counter()
        for _ in range(burst):
            sampler(logits)
        synchronize(device)
        taken.append(1e6 * (perf_counter() - start) / burst)
    return taken


def device_costs(case: Case, name: str) -> dict[str, Any]:
    """{"kernels": count, "kernel_us": their time} of a draw, {"graph_us": time of a node} or {"graph_absent": why}."""
    try:
        sampler, logits = build(name, case), case.logits()
        costs: dict[str, Any] = kernels(sampler, logits)
    except Exception as error:
        return {"graph_absent": first_line(error)}
    if name.startswith("sample:") or name == "flashinfer":
        return costs | {"graph_absent": "waits for the device, or takes its seed from the host"}
    try:
        return costs | {"graph_us": graph_us(sampler, logits)}
    except Exception as error:
        return costs | {"graph_absent": first_line(error)}


def kernels(sampler: Sampler, logits: Tensor) -> dict[str, Any]:
    """Number and time of what a draw runs on the device, copies and fills among them: means of 20 draws."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    reset(sampler)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(BURST):
            sampler(logits)
        torch.cuda.synchronize()
    waits = ("Sync", "Wait")  # newer profilers list these beside the kernels
    ran = [e for e in trace.events() if e.device_type == DeviceType.CUDA and not any(w in e.name for w in waits)]
    busy = sum(event.time_range.elapsed_us() for event in ran)
    return {"kernels": len(ran) / BURST, "kernel_us": busy / BURST}


def graph_us(sampler: Sampler, logits: Tensor, replays: int = 30) -> float:
    """Time of a draw as a node of a CUDA graph: the median replay of 100 draws, over 100."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            sampler(logits)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reset(sampler)  # captured as well: every replay must find unknown cells
        for _ in range(NODES):
            sampler(logits)
    taken = []
    for number in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            taken.append(1000 * start.elapsed_time(end) / NODES)
    return quantile(taken, 0.5)


# -- what is said ----------------------------------------------------------------------------------------------------


def ratio(row: Row, rows: list[Row]) -> float | None:
    """How many times faster than audiocraft's chain of the same round and case."""
    for other in rows:
        if other.key == (row.case, REFERENCE) and other.round == row.round:
            return other.median / row.median
    return None


def head(benchmark: str, key: Key) -> dict[str, Any]:
    return {"benchmark": benchmark, "provider": key[1], **asdict(key[0])}


def record(row: Row, rows: list[Row]) -> dict[str, Any]:
    """The JSON line of one sampler and round."""
    return {
        **head("sampler", row.key),
        "round": row.round,
        "us": {name: round(quantile(row.us, q), 3) for name, q in QUANTILES},
        "times_faster_than_audiocraft": ratio(row, rows),
    }


def table(rows: list[Row], absent: dict[Key, str], costs: dict[Key, dict[str, Any]]) -> str:
    """Markdown, a table a case: the draws of all rounds together; the ratio is the median over the rounds."""
    groups: dict[Case, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.case][row.name].append(row)
    more = " kernels | us of kernels | us of a graph node |" if costs else ""
    lines = []
    for case, named in groups.items():
        lines += [f"\n{case.title}\n", f"| sampler | us/draw [p10..p90] | times {REFERENCE} |{more}"]
        lines.append("|---|---|---|" + "---|---|---|" * bool(costs))
        for name, group in named.items():
            every = [us for row in group for us in row.us]
            low, median, high = (quantile(every, q) for q in (0.1, 0.5, 0.9))
            ratios = [r for row in group if (r := ratio(row, rows)) is not None]
            faster = f"{quantile(ratios, 0.5):.2f}" if ratios else "-"
            on_device = cells(costs.get((case, name)))
            lines.append(f"| {name} | {median:.1f} [{low:.1f}..{high:.1f}] | {faster} |{on_device}")
        width = 6 if costs else 3
        gone = [(name, why) for (other, name), why in absent.items() if other == case]
        lines += [f"| {name} | absent: {why.replace('|', '/')}" + " |" * (width - 1) for name, why in gone]
    return "\n".join(lines)


def cells(costs: dict[str, Any] | None) -> str:
    if costs is None:
        return ""
    count, busy = (f"{costs[key]:.1f}" if key in costs else "-" for key in ("kernels", "kernel_us"))
    node = f"{costs['graph_us']:.2f}" if "graph_us" in costs else costs["graph_absent"].replace("|", "/")
    return f" {count} | {busy} | {node} |"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    for name, default in (("--batch", [1, 4, 16, 64]), ("--codebooks", [4, 8])):
        parser.add_argument(name, type=lambda text: [int(part) for part in text.split(",")], default=default)
    parser.add_argument("--filters", type=lambda text: text.split(","), default=["top_k250", "top_p0.9", "none"])
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    parser.add_argument("--peers", type=lambda text: text.split(","), default=None, help="default: all of the device")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a sampler, case and round")
    args = parser.parse_args(given)
    known = peers(args.device)
    args.peers = list(known) if args.peers is None else args.peers
    if unknown := set(args.peers) - set(known):
        parser.error(f"--peers {','.join(sorted(unknown))}: expected some of {','.join(known)}")
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    try:
        for kind in args.filters:
            Case(filter=kind, batch=min(args.batch), codebooks=min(args.codebooks))
    except ValueError as error:
        parser.error(str(error))
    return args


# -- pytest-benchmark: `make bench` ----------------------------------------------------------------------------------


def run_benchmark(benchmark: Any, case: Case, name: str) -> None:
    """Grouped by case. On a GPU a round is a burst of draws and the wait for it."""
    try:
        sampler = build(name, case)
    except AbsentError as reason:
        pytest.skip(f"absent: {reason}")
    benchmark.group = case.title
    logits, burst = case.logits(), range(BURST if case.device == "cuda" else 1)

    def draws() -> None:
        for _ in burst:
            sampler(logits)
        synchronize(case.device)

    benchmark(draws)


if sys.modules.get("pytest"):  # the script must run on a GPU machine without pytest
    import pytest

    # Compiling takes 20 s: that one is the script's.
    @pytest.mark.parametrize("batch", [1, 16])
    @pytest.mark.parametrize("name", [name for name in peers("cpu") if name != "compiled"])
    def test_sampler_on_cpu(benchmark, name, batch):
        run_benchmark(benchmark, Case(batch=batch), name)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("batch", [1, 16])
    @pytest.mark.parametrize("name", [name for name in peers("cuda") if name != "compiled"])
    def test_sampler_on_gpu(benchmark, name, batch):
        run_benchmark(benchmark, Case("cuda", batch=batch, dtype="float16"), name)


if __name__ == "__main__":
    main()

"""How fast the CPU decoder's matrices stream: GB/s of packed weights, beside a plain read of the same bytes.

    python benchmarks/bench_cpu_linear.py --rows 2 --threads 1 2 --rounds 5

The read and the kernels of every format and instruction set take turns; a ratio is to the read of the same round and
thread count. The weights lie in huge pages and are more than caches hold. Threads take contiguous halves, as the
decoder's do. Preparing the rows is part of the time.
"""

from __future__ import annotations

import argparse
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from musicgen_fast import native
from musicgen_fast.bench.machine import append_json, machine_card

FORMATS = ("float32", "bfloat16", "int8", "int4")
BLOCK = 4096  # outputs that are packed; the rest are copies of them
TILE = 16


@dataclass(frozen=True)
class Row:
    """One round of one kernel; `ratio` is its share of the plain read's speed."""

    format: str
    isa: str
    rows: int
    threads: int
    round: int
    gb_per_s: float
    weights_per_ns: float
    ratio: float


def arena(size: int) -> np.ndarray:
    """Zeroed bytes in huge pages, where the system has them."""
    memory = mmap.mmap(-1, size + 64, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:size]


def fill(C: Any, format: str, memory: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """(the packed matrix in `memory`, its outputs): as many blocks as there is room for."""
    block = np.empty(C.linear_packed_bytes(format, BLOCK, k), np.uint8)
    C.linear_pack(format, np.random.default_rng(0).standard_normal((BLOCK, k), np.float32), block)
    count = len(memory) // len(block)
    packed = memory[: count * len(block)]
    packed.reshape(count, len(block))[:] = block
    return packed, count * BLOCK


def seconds(pool: ThreadPoolExecutor, threads: int, part: Callable[[int], object]) -> float:
    start = perf_counter()
    list(pool.map(part, range(threads)))
    return perf_counter() - start


def measure(C: Any, args: argparse.Namespace, pool: ThreadPoolExecutor) -> list[Row]:
    memory = arena(args.megabytes << 20)
    rows: list[Row] = []
    for format in args.formats:
        packed, n = fill(C, format, memory, args.k)
        for count in args.rows:
            x = np.random.default_rng(1).standard_normal((count, args.k), np.float32)
            kernel = partial(C.linear_apply, format, packed, x, np.zeros((count, n), np.float32))
            for number in range(args.rounds):
                for threads in args.threads:
                    bounds = [n // TILE * i // threads for i in range(threads + 1)]
                    read = seconds(pool, threads, partial(read_part, C, np.array_split(packed, threads)))
                    for isa in args.isas:
                        time = seconds(pool, threads, partial(apply_part, kernel, bounds, isa))
                        speeds = (len(packed) / time / 1e9, n * args.k / time / 1e9, read / time)
                        rows.append(Row(format, isa, count, threads, number, *speeds))
    return rows


def read_part(C: Any, parts: list[np.ndarray], i: int) -> None:
    C.read_all(parts[i])


def apply_part(kernel: Callable[..., None], bounds: list[int], isa: str, i: int) -> None:
    kernel(first=bounds[i], last=bounds[i + 1], isa=isa)


def table(rows: list[Row]) -> str:
    """Markdown: medians over the rounds; of the ratio also least and most."""
    lines = ["| weights | instructions | rows | threads | GB/s | weights per ns | of a plain read |", "|" + "---|" * 7]
    keys = list(dict.fromkeys((row.format, row.isa, row.rows, row.threads) for row in rows))
    for key in keys:
        group = [row for row in rows if (row.format, row.isa, row.rows, row.threads) == key]
        ratios = sorted(row.ratio for row in group)
        ratio = f"{median(ratios):.2f} [{ratios[0]:.2f}..{ratios[-1]:.2f}]"
        speeds = f"{median(r.gb_per_s for r in group):.1f} | {median(r.weights_per_ns for r in group):.1f}"
        lines.append(f"| {' | '.join(map(str, key))} | {speeds} | {ratio} |")
    return "\n".join(lines)


def arguments(isas: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--isas", nargs="+", default=isas, choices=isas)
    parser.add_argument("--rows", type=int, nargs="+", default=[2], help="rows of activations")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--k", type=int, default=1024, help="inputs")
    parser.add_argument("--megabytes", type=int, default=400, help="of packed weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a kernel and round")
    return parser.parse_args()


def main() -> None:
    C = native.extension()
    args = arguments(C.linear_isas())
    card = machine_card("cpu")
    print(f"{card['cpu']}, {card['cores']} cores, commit {card['commit']}, K = {args.k}")
    with ThreadPoolExecutor(max(args.threads)) as pool:
        rows = measure(C, args, pool)
    print(table(rows))
    append_json(args.json, [{"benchmark": "cpu_linear", **vars(row), "k": args.k, "machine": card} for row in rows])


if __name__ == "__main__":
    main()

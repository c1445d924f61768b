"""How fast this machine reads memory, measured: what `roofline.py` divides by. Nothing else is known here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from . import native
from .arena import allocate

__all__ = ["ReadSpeed", "read_bandwidth", "read_speed", "synchronize"]

_SMALLEST = 360_000_000  # bytes of a read: what is smaller lies partly in the caches


@dataclass(frozen=True)
class ReadSpeed:
    """Bytes a second of reading memory once: the best and the median of the passes."""

    best: float
    median: float


def read_speed(device: str, threads: int, size: float, passes: int = 12) -> ReadSpeed:
    """How fast `threads` threads read `size` bytes (at least 360 MB), each its own part.

    On a CPU from huge pages where the system gives them: 4 KiB pages read 10 to 20 % slower. The extension's plain read
    of 64 bytes at a time is used where it is built; otherwise a sum and a product of torch take turns.
    """
    count = -(-int(max(size, _SMALLEST)) // 4096) * 1024
    cpu = torch.device(device).type == "cpu"
    buffer = allocate(4 * count).view(torch.float32).fill_(1.0) if cpu else torch.ones(count, device=device)
    seconds = []
    with _readers(buffer, threads, cpu) as reads:
        for number in range(passes + len(reads)):  # the first of each warms up
            synchronize(device)
            start = perf_counter()
            reads[number % len(reads)]()
            synchronize(device)
            seconds.append(perf_counter() - start)
    kept = seconds[len(reads) :]
    return ReadSpeed(buffer.nbytes / min(kept), buffer.nbytes / median(kept))


@contextmanager
def _readers(buffer: Tensor, threads: int, cpu: bool) -> Iterator[list[Callable[[], object]]]:
    if not cpu or not native.available():
        yield [buffer.sum, partial(buffer.dot, buffer)]
        return
    read = native.extension().read_all
    parts = [part.view(torch.uint8).numpy() for part in buffer.tensor_split(threads)]
    with ThreadPoolExecutor(threads) as pool:  # the read lets go of the GIL
        yield [lambda: list(pool.map(read, parts))]


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


@functools.cache
def read_bandwidth() -> float:
    """Bytes a second: of the GPU that torch sees, else of the CPU with torch's number of threads. Takes 0.3 s, once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return read_speed(device, torch.get_num_threads(), _SMALLEST, passes=4).best

"""Captured CUDA graphs, hundreds of launches as one; and the order of those who share their memory.

Knows nothing of what is captured. A capture must neither wait for the device nor allocate outside of torch's pools.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

Launch = Callable[[], None]


class Capture(Protocol):
    """Turns launches into one: what `body` launches now, its replay launches again on the same memory."""

    def __call__(self, body: Launch) -> Launch: ...


class CudaGraphs:
    """Graphs of one device that share a memory pool: they never run at the same time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None

    def __call__(self, body: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            # Other threads may work on their GPUs meanwhile, and allocate there.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                body()
            self._pool = self._pool or graph.pool()
        return graph.replay


class Turns:
    """A lock for memory on a device: threads take turns, and so does what they launch, whatever their streams."""

    def __init__(self, device: torch.device):
        self._device = device
        self._lock = threading.RLock()
        self._last: Any = None

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if self._last is not None and stream != self._last:
                stream.wait_stream(self._last)
            self._last = stream

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def launch_at_once(body: Launch) -> Launch:
    """No capture: every replay launches kernel by kernel."""
    return body

"""What a benchmark says about its machine: a card of names and versions, and how fast memory can be read.

The time that no decoder can beat is bytes that must be read / bandwidth, so the bandwidth is measured beside every
figure: same machine, same threads, same minute. Knows nothing of models.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .. import native

__all__ = [
    "ReadSpeed", "ROOT", "append_json", "cpu_flags", "machine_card", "read_speed", "synchronize",
]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent.parent  # of a checkout; the folder of the packages where it is installed
_PACKAGES = (
    "musicgen-fast", "torch", "transformers", "tts-webui-audiocraft", "audiocraft", "openvino", "nncf", "triton",
)  # fmt: skip
_SMALLEST = 360_000_000  # bytes of a read: what is smaller lies partly in the caches


def machine_card(device: str) -> dict[str, Any]:
    """Names, versions, the commit of this project, the time (UTC)."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    """The name, and the instruction sets that decide which kernels run: virtual machines hide the name."""
    fields = _cpu_fields()
    sets = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    named = fields.get("model name") or platform.processor() or platform.machine()
    return " ".join([named, *(name for name in sets if name in cpu_flags())])


def cpu_flags() -> set[str]:
    """Linux's names of the instruction sets; empty elsewhere."""
    return set(_cpu_fields().get("flags", "").split())


def _cpu_fields() -> dict[str, str]:
    fields: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return fields
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """None where this is no checkout: an installed package may lie inside somebody else's repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if not (ROOT / "csrc").is_dir():
        return None
    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


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
    buffer = _huge_pages(4 * count) if cpu else torch.ones(count, device=device)
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


def _huge_pages(size: int) -> Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.ones(size // 4)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no huge pages
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def append_json(path: str | None, lines: list[dict[str, Any]]) -> None:
    """One JSON document a line, at the end of the file, or '-' on standard output; None writes nothing."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if path is None:
        return
    if path == "-":
        print(text, end="", flush=True)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)

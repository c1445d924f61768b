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
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "tts-webui-audiocraft", "audiocraft", "triton")


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
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", "").split()
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if name in flags]
    return " ".join([fields.get("model name", platform.machine()), *sets])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_bandwidth(device: str, repeats: int = 5, size: int = 1_500_000_000) -> float:
    """Bytes a second of reading `size` bytes once, with torch's present number of threads; the best of `repeats`.

    On a CPU from huge pages where the system gives them: 4 KiB pages read 10 to 20 % slower. A sum and a product of the
    buffer with itself take turns: on one AVX-512 core torch's sum reaches 9.8 GB/s where the product reads 11.8.
    """
    buffer = _huge_pages(size) if device == "cpu" else torch.ones(size // 4, device=device)
    seconds = []
    for _ in range(repeats + 1):  # the first time warms up
        for read in (buffer.sum, partial(buffer.dot, buffer)):
            synchronize(device)
            start = perf_counter()
            read()
            synchronize(device)
            seconds.append(perf_counter() - start)
    return buffer.nbytes / min(seconds[2:])


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
    """One JSON document a line, at the end of the file; None writes nothing."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)

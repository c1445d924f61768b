"""How many pieces fit beside each other: from the memory that is free, and from what an earlier run here found out.

Keys and values are most of what a piece needs (157 MB for 30 s of the small model in int8, guidance included); they are
allocated for the longest window of the run. Knows nothing of engines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from ..audio_encode import replacing
from ..config import ModelConfig
from ..pattern import build_pattern
from ..roofline import KV_FORMAT, kv_bytes, kv_numbers
from .plan import Plan

__all__ = ["Memory", "batch_size", "bytes_per_piece", "free_memory"]

_MOST = {"cpu": 16, "cuda": 64}  # beyond that a step's time grows with its rows, and a piece only takes longer
_SHARE = 0.7  # of the free memory: the rest is for texts, samples, the codec and whoever else computes here
_TEXT = 64  # positions of a text in front of the tokens; longer ones are rare


def bytes_per_piece(config: ModelConfig, precision: str, frames: int, rows: int) -> float:
    """Of the keys and values of a piece with windows of `frames` frames and so many rows (branches)."""
    positions = build_pattern(config.pattern, config.num_codebooks, frames).num_steps + _TEXT
    if config.melody is not None:
        positions += config.melody.chroma_length
    return kv_bytes(config, KV_FORMAT[precision]) * kv_numbers(config, positions) * rows


def batch_size(
    config: ModelConfig, precision: str, frames: int, rows: int, device: torch.device, share: float = 1.0
) -> int:
    """Pieces at once that a share of the device's free memory has room for, at least one."""
    room = _SHARE * share * free_memory(device) / bytes_per_piece(config, precision, frames, rows)
    return max(1, min(int(room), _MOST.get(device.type, _MOST["cuda"])))


def free_memory(device: torch.device) -> float:
    """Bytes that can be had on a device; on a CPU no more than the container allows."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    found = [free for free in (_of_machine(), _of_container()) if free is not None]
    return float(min(found, default=4 * 2**30))


def _of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _of_container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What cgroups leave, of version 2 or 1. Pages of files count as used there, though they can be had back."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = int((root / limit).read_text()), int((root / used).read_text())
            stat = (root / limit).with_name("memory.stat").read_text().split()
            cached = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
        except (OSError, ValueError):  # "max": no limit
            continue
        return max(most - now + cached, 0)
    return None


class Memory:
    """What the runs of a folder know of their batch size: a file that is written when a batch turned out too large."""

    def __init__(self, plan: Plan, facts: Iterable[str]) -> None:
        """`facts`: what the size belongs to, such as model, precision and device."""
        self._path = plan.file(".musicgen_fast-batch", ".json")
        self._facts = list(facts)

    def read(self) -> int | None:
        """The size that worked; None where nothing went wrong here so far."""
        try:
            told = json.loads(self._path.read_bytes())
            size = told["batch_size"] if told["of"] == self._facts else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return size if isinstance(size, int) and size >= 1 else None

    def write(self, size: int) -> None:
        with replacing(self._path) as file:
            file.write((json.dumps({"of": self._facts, "batch_size": size}) + "\n").encode())

"""What a benchmark says about its machine: a card of names and versions, and how fast memory can be read.

The time that no decoder can beat is bytes that must be read / bandwidth, so the bandwidth is measured beside every
figure (`machine.read_speed`): same machine, same threads, same minute. Knows nothing of models.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..machine import ReadSpeed, read_speed, synchronize

__all__ = [
    "ReadSpeed", "ROOT", "append_json", "cpu_flags", "machine_card", "read_speed", "synchronize",
]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent.parent  # of a checkout; the folder of the packages where it is installed
_PACKAGES = (
    "musicgen-fast", "torch", "transformers", "tts-webui-audiocraft", "audiocraft", "openvino", "nncf", "triton",
    "fast-musicgen",
)  # fmt: skip


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

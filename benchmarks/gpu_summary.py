"""What a GPU report comes to: the card of the machine, a step's time of each size, ratios to peers, targets met or not.

Reads the lines of the sections; whatever section is missing leaves gaps, never an error.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from typing import Any

import torch
from gpu_lines import smi

Sections = dict[str, dict[str, Any]]
COLUMNS = 1503  # of a window of 30 s
CARD = (
    "name", "driver_version", "vbios_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.mem",
    "clocks.sm", "clocks.mem", "persistence_mode", "ecc.mode.current",
)  # fmt: skip
STEP_TARGETS = {"small": 0.50, "medium": 1.6, "large": 2.5}


def gpu_card(device: str) -> dict[str, Any]:
    """Driver, CUDA, compute capability, clocks; what cannot be found out is left out."""
    card: dict[str, Any] = {"cuda_of_torch": torch.version.cuda, "nvcc": _nvcc()}
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(device)
        card |= {
            "compute_capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1), "l2_mib": getattr(found, "L2_cache_size", 0) / 2**20,
            "nvidia_smi": smi(CARD),
        }  # fmt: skip
    return {key: value for key, value in card.items() if value}


def _nvcc() -> str | None:
    try:
        done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else None


def measured(sections: Sections, kind: str, **wanted: Any) -> list[dict[str, Any]]:
    """The lines of all sections that measure this and have these values."""
    every = (line for section in sections.values() for line in section["lines"])
    return [
        line for line in every
        if line.get("measures") == kind and "error" not in line and all(line.get(k) == v for k, v in wanted.items())
    ]  # fmt: skip


def average(points: Iterable[tuple[float, float]], columns: int = COLUMNS) -> float | None:
    """Over the columns of a window, of (position, ms) joined by straight lines and level outside."""
    points = sorted(points)
    if not points:
        return None
    total, (x, y) = points[0][0] * points[0][1], points[0]
    for nx, ny in points[1:]:
        total += (nx - x) * (y + ny) / 2
        x, y = nx, ny
    return (total + (columns - x) * y) / columns


def summary(sections: Sections) -> dict[str, Any]:
    windows = {
        f"{w['size']} {w['version']} {w['precision']}" + (" int8 cache" if w["kv"] == "int8" else ""): {
            "ms": w["ms"], "percent_of_floor": w["percent"], "times_real_time": w["real_time"],
        }
        for w in measured(sections, "window")
    }  # fmt: skip
    peers = {}
    for provider in dict.fromkeys(line["provider"] for line in measured(sections, "peer")):
        found = measured(sections, "peer", provider=provider)
        ms = average((line["position"], line["ms"]) for line in found if "ms" in line)
        peers[provider] = {"absent": found[0].get("absent")} if ms is None else {"ms": ms, **_ratios(windows, ms)}
    read = max((line["gb_s"] for line in measured(sections, "read")), default=None)
    failed = [f"{name}: {_what(line)}" for name, s in sections.items() for line in s["lines"] if _failed(line)]
    failed += [f"{name}: {s['why']}" for name, s in sections.items() if s["status"] == "failed" and s.get("why")]
    return {
        "read_gb_s": read, "windows": windows, "peers": peers, "targets": targets(sections, windows, peers),
        "failed": failed, "skipped": [name for name, s in sections.items() if s["status"] == "skipped"],
        "absent": {name: _why(s) for name, s in sections.items() if s["status"] == "absent"},
    }  # fmt: skip


def _failed(line: dict[str, Any]) -> bool:
    return line.get("status") == "failed"


def _what(line: dict[str, Any]) -> str:
    """A line that failed, by its name and its error."""
    names = [str(line[key]) for key in ("check", "measures", "size", "version", "error") if key in line]
    return " ".join(names)


def _why(section: dict[str, Any]) -> str:
    reasons = (line.get("why") or line.get("absent") for line in section["lines"])
    return next((reason for reason in reasons if reason), "")


def _ratios(windows: dict[str, dict[str, float]], ms: float) -> dict[str, float]:
    """How many times longer than ours a peer takes."""
    names = {v: f"small {v} float16" for v in ("v3", "v1")}
    return {f"times_{v}": ms / windows[name]["ms"] for v, name in names.items() if name in windows}


def targets(sections: Sections, windows: dict[str, Any], peers: dict[str, Any]) -> list[dict[str, Any]]:
    """What the design hopes for on an H100; not met is no failure, not measured is None."""
    found: list[dict[str, Any]] = []

    def add(what: str, target: float, value: float | None, least: bool = False) -> None:
        met = None if value is None else (value >= target if least else value <= target)
        found.append({"what": what, "target": target, "measured": value, "met": met})

    for size, target in STEP_TARGETS.items():
        add(f"ms a step, {size}", target, windows.get(f"{size} v3 float16", {}).get("ms"))
    add("times audiocraft, v3", 12, peers.get("audiocraft", {}).get("times_v3"), least=True)
    add("times audiocraft, v1", 5, peers.get("audiocraft", {}).get("times_v1"), least=True)
    add("times fast-musicgen, v3", 2, peers.get("fast_musicgen", {}).get("times_v3"), least=True)
    batch = measured(sections, "batch", requests=32, kv="as activations")
    add("% of the ceiling, small, 32 requests", 65, batch[0]["percent"] if batch else None, least=True)
    first = measured(sections, "first frame")
    add("ms to the first frame", 30, first[0]["ms"] if first else None)
    for cache, target in (("cold", 30.0), ("warm", 5.0)):
        started = measured(sections, "startup", cache=cache)
        add(f"s to start, {cache}", target, started[0]["seconds"] if started else None)
    chain = measured(sections, "chain", kernels="without attention")
    add("ms, small's step without attention", 0.40, min((c["ms"] for c in chain), default=None))
    return found


def text(report: dict[str, Any]) -> str:
    """The report in a few lines, for a terminal."""
    said, lines = report["summary"], ["", "== what it comes to"]
    if said["read_gb_s"]:
        lines.append(f"memory is read at {said['read_gb_s']:.0f} GB/s")
    for name, found in said["windows"].items():
        lines.append(f"{name:34} {found['ms']:8.3f} ms a step, {found['percent_of_floor']:5.1f} % of the floor")
    for name, found in said["peers"].items():
        if "ms" in found:
            lines.append(f"{name:34} {found['ms']:8.3f} ms a step, {found.get('times_v3', float('nan')):5.1f} x ours")
        else:
            lines.append(f"{name:34} absent: {found['absent']}")
    for t in said["targets"]:
        value = "not measured" if t["measured"] is None else f"{t['measured']:.3g}"
        lines.append(f"target {t['what']:38} {t['target']:6g}  {value:>12}  {_MET[t['met']]}")
    lines += [f"absent: {name}: {why}" for name, why in said["absent"].items()]
    if said["skipped"]:
        lines.append(f"left out, the time was over: {', '.join(said['skipped'])}")
    if said["failed"]:
        lines.append(f"FAILED: {', '.join(said['failed'])}")
    lines.append("all checks passed" if report["passed"] else "A CHECK FAILED, or none of its kind could be made")
    return "\n".join(lines)


_MET = {True: "met", False: "NOT MET", None: ""}

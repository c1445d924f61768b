"""`musicgen-fast doctor`: the report of `doctor.py` for a person or, with --json, for a bug report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from .doctor import examine

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 where something is broken."""
    report = examine(with_self_test=not args.no_self_test)
    if args.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        for key, text in _lines(report):
            print(f"{key:12}  {text}")
    return 1 if report["problems"] else 0


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    versions, system, compiled = report["versions"], report["system"], report["compiled"]
    yield "version", f"musicgen_fast {report['musicgen_fast']}, Python {versions['python']}"
    yield "packages", ", ".join(f"{name} {version or '-'}" for name, version in versions.items() if name != "python")
    yield "system", f"{system['platform']}; {system['processor']}"
    yield (
        "threads",
        (
            f"{system['torch_threads']} used by torch, {system['available_threads'] or '?'} available, "
            f"{system['processors']} processors; cgroup: cpu {system['cgroup']['cpu.max'] or 'no limit'}, "
            f"memory {system['cgroup']['memory.max'] or 'no limit'}"
        ),
    )
    if report["variables"]:
        yield "variables", ", ".join(f"{name}={value}" for name, value in report["variables"].items())
    yield "extension", "C++, built in" if compiled["extension"] else f"no: {compiled['why_not']}"
    if compiled["extension"]:
        yield "instructions", f"{' '.join(compiled['linear'])} (attention: {' '.join(compiled['attention'])})"
    for gpu in report["gpu"]:
        size = f"{gpu['free'] / 1e9:.1f} of {gpu['memory'] / 1e9:.1f} GB free"
        yield "GPU", f"{gpu['name']}, capability {gpu['capability']}, {size}, CUDA {gpu['cuda']}"
    if not report["gpu"]:
        yield "GPU", "none"
    for device, backends in report["samplers"].items():
        yield f"samplers {device}"[:12], "; ".join(f"{name}: {state}" for name, state in backends.items())
    memory, hub = report["memory"], report["hub"]
    free = "?" if memory["free"] is None else f"{memory['free'] / 1e9:.1f} GB"
    yield "memory", f"{free} free; {memory['temporary_disk_free'] / 1e9:.1f} GB of temporary disk"
    if hub:
        models = ", ".join(hub["models"]) or "no models of ours"
        offline = "; offline" if hub["offline"] else ""
        yield "hub cache", f"{hub['cache']}, {hub['free'] / 1e9:.1f} GB free: {models}{offline}"
    test = report["self_test"]
    if test is not None:
        yield "self-test", f"{'passed' if test['ok'] else 'FAILED'} on {test['device']} in {test['seconds']} s"
    for kind, found in (("note", report["notes"]), ("PROBLEM", report["problems"])):
        for each in found:
            yield kind, f"{each['what']} -> {each['do']}"
    if not report["problems"]:
        yield "", "nothing is broken"

"""A section of the GPU report: its command line, and the JSON lines that it writes. Needs no more than torch.

A section is a script `gpu_*.py --part NAME --device cuda --json FILE` that appends one line for everything it finds, so
that a crash loses only what comes after it. With `--device cpu --tiny` every line of it runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

POSITIONS = (50, 750, 1450)  # of a window, where steps are timed


@dataclass(frozen=True)
class Bench:
    """Where a section runs, and whether it only tries itself."""

    device: str = "cuda"
    tiny: bool = False

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    @property
    def frames(self) -> int:
        """Of a window."""
        return self.pick(1500, 30)

    @property
    def positions(self) -> tuple[int, ...]:
        return self.pick(POSITIONS, (5, 12, 20))

    @property
    def pdl(self) -> bool:
        """Whether the GPU has programmatic dependent launch: it came with Hopper."""
        return self.cuda and torch.cuda.get_device_capability(self.device)[0] >= 9


class Lines:
    """Appends what a section finds to its file, and shows it."""

    def __init__(self, path: str | None):
        self._path = path

    def add(self, **line: Any) -> None:
        text = json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()})
        print(text, flush=True)
        if self._path:
            with Path(self._path).open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    @contextmanager
    def guarded(self, **named: Any) -> Iterator[None]:
        """What fails inside becomes a line of its own, and the section goes on."""
        try:
            yield
        except Exception as problem:
            traceback.print_exc()
            self.add(**named, status="failed", error=f"{type(problem).__name__}: {problem}"[:600])


def smi(fields: tuple[str, ...]) -> dict[str, str] | None:
    """What nvidia-smi says of these fields; None without it. Fields that it does not know are asked for one by one."""

    def ask(names: tuple[str, ...]) -> list[str] | None:
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        first = done.stdout.strip().splitlines()
        return first[0].split(", ") if done.returncode == 0 and first else None

    values = ask(fields)
    if values is not None and len(values) == len(fields):
        return dict(zip(fields, values, strict=True))
    single = {name: answer[0] for name in fields if (answer := ask((name,)))}
    return single or None


Part = Callable[[Bench, Lines], None]


def run_part(parts: Mapping[str, Part], about: str) -> int:
    """The command line of a section's script."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--part", required=True, choices=parts)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="try the script itself, on any device")
    parser.add_argument("--json", metavar="FILE", help="append a JSON line for everything found")
    args = parser.parse_args()
    parts[args.part](Bench(args.device, args.tiny), Lines(args.json))
    return 0

"""Is everything right on this GPU, and how fast is it? One command, under ten minutes, one JSON file and plots.

    python benchmarks/gpu_report.py --json benchmarks/results/gpu.json

Checks first, then musicgen-small's step, then the rest; what does not fit into `--seconds` is left out by name. Every
section is a process of its own with a time limit, so that one that crashes or hangs stops no other. Exit status 1 if a
check failed or none of its kind could be made. Needs no more than torch; with `--device cpu --tiny` it tries itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from gpu_plots import draw_plots
from gpu_summary import gpu_card, summary, text

from musicgen_fast.bench.machine import ROOT, machine_card

HERE = Path(__file__).resolve().parent
LEAST = 8.0  # seconds that a section is worth starting for


@dataclass(frozen=True)
class Section:
    """A script of this folder (or -m and a module), seconds that it may take, and whether it is a check."""

    command: str
    limit: float
    check: bool = False


def _part(script: str, name: str, limit: float, check: bool = False) -> dict[str, Section]:
    return {name: Section(f"{script}.py --part {name}", limit, check)}


SAMPLER = (
    "-m musicgen_fast bench sampler --batch 1,16 --codebooks 4 --filters top_k250,top_p0.9 --precision float16"
    " --seconds 0.1"
)
SECTIONS: dict[str, Section] = {
    **_part("gpu_sampler", "golden:triton", 60, True),
    **_part("gpu_sampler", "golden:cuda", 60, True),
    **_part("gpu_checks", "logits", 120, True),
    **_part("gpu_checks", "exact", 60, True),
    **_part("gpu_checks", "seeds", 100, True),
    **_part("gpu_checks", "graph", 70, True),
    **_part("gpu_failures", "nan", 45, True),
    **_part("gpu_failures", "memory", 45, True),
    **_part("gpu_checks", "fixed", 45, True),
    **_part("gpu_checks", "fuzz", 60, True),
    **_part("gpu_steps", "small", 110),
    **_part("gpu_floor", "floor", 120),
    **_part("gpu_peers", "peers", 100),
    **_part("gpu_steps", "batch", 90),
    **_part("gpu_steps", "startup", 110),
    **_part("gpu_steps", "first", 40),
    **_part("gpu_sampler", "rows:triton", 90, True),
    **_part("gpu_steps", "medium", 90),
    **_part("gpu_steps", "large", 110),
    **_part("gpu_sampler", "draws:triton", 80, True),
    **_part("gpu_tests", "tests:decoder", 90, True),
    **_part("gpu_sampler", "rows:cuda", 60, True),
    **_part("gpu_sampler", "draws:cuda", 60, True),
    **_part("gpu_tests", "tests:package", 120, True),
    "sampler": Section(SAMPLER, 150),
}


def run_section(name: str, device: str, tiny: bool, limit: float) -> dict[str, Any]:
    """A section in a process of its own: what it found, and how it ended."""
    section, start = SECTIONS[name], perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found, said = Path(folder) / "lines.jsonl", Path(folder) / "output.txt"
        script, *options = section.command.split()
        start_of = ["-m"] if script == "-m" else [str(HERE / script)]
        command = [sys.executable, *start_of, *options, "--device", device, "--json", str(found)]
        ended = _run(command + ["--tiny"] * (tiny and script.startswith("gpu_")), said, max(1.0, limit))
        output = said.read_text(errors="replace")
        print(output, end="", flush=True)
        written = found.read_text().splitlines() if found.exists() else []
    lines = [json.loads(line) for line in written if line.endswith("}")]
    result = {"status": _status(section, lines, ended), "seconds": round(perf_counter() - start, 1), "lines": lines}
    if ended:
        result |= {"why": ended, "errors": output.strip().splitlines()[-15:]}
    return result


def _run(command: list[str], said: Path, limit: float) -> str:
    """How it ended, if not well. A time limit ends its children too, which may hold the GPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with said.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except BaseException as problem:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(problem, subprocess.TimeoutExpired):
                raise
            return f"not done after {limit:.0f} s"
    return f"exit status {status}" if status else ""


def _status(section: Section, lines: list[dict[str, Any]], ended: str) -> str:
    """failed, passed, absent (nothing could be checked) or done (measured)."""
    statuses = [line.get("status") for line in lines]
    if ended or "failed" in statuses or not lines:
        return "failed"
    if section.check:
        return "passed" if "passed" in statuses else "absent"
    return "absent" if all("absent" in line for line in lines) else "done"


def verdict(sections: dict[str, dict[str, Any]]) -> bool:
    """Whether every check that could be made was right, and at least one of each kind (before the colon) was."""
    checks = {name: found["status"] for name, found in sections.items() if SECTIONS[name].check}
    kinds = {name.split(":")[0] for name in checks} - {"tests"}  # pytest may well be missing
    made = [any(s == "passed" for name, s in checks.items() if name.split(":")[0] == kind) for kind in kinds]
    return "failed" not in checks.values() and all(made)


def main() -> int:
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_report.py needs a CUDA device, and torch sees none.", file=sys.stderr)
        return 2
    end = perf_counter() + args.seconds
    sections: dict[str, dict[str, Any]] = {}
    card = machine_card(args.device) | {"gpu_card": gpu_card(args.device)}
    report: dict[str, Any] = {"benchmark": "gpu_report", "tiny": args.tiny, "machine": card, "sections": sections}
    for name in args.sections:
        left = end - perf_counter()
        print(f"== {name}", flush=True)
        if left < LEAST:
            sections[name] = {"status": "skipped", "why": f"the {args.seconds:.0f} s were over", "lines": []}
        else:
            sections[name] = run_section(name, args.device, args.tiny, min(SECTIONS[name].limit, left))
        shown = {key: sections[name].get(key) for key in ("status", "seconds", "why")}
        print(json.dumps({key: value for key, value in shown.items() if value}), flush=True)
        report |= {"passed": verdict(sections), "summary": summary(sections)}
        _write(args.json, report)  # after every section, so that an interruption loses only what has not run
    if args.json:
        report["plots"] = [path.name for path in draw_plots(report, Path(args.json))]
        _write(args.json, report)
    print(text(report))
    return 0 if report["passed"] else 1


def _write(path: str | None, report: dict[str, Any]) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu, with --tiny, tries the report itself")
    parser.add_argument("--tiny", action="store_true", help="models of two layers, a few steps: figures mean nothing")
    parser.add_argument("--seconds", type=float, default=570, help="for all sections together (default: %(default)s)")
    parser.add_argument(
        "--sections", type=lambda text: text.split(","), default=list(SECTIONS), help=",".join(SECTIONS)
    )
    parser.add_argument("--json", metavar="FILE", help="where the report is written; the plots go beside it")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"--sections {','.join(sorted(unknown))}: expected some of {','.join(SECTIONS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
